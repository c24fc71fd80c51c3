from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lit.files import default_cache_dir
from diffusion_lit.metrics import (
    Pixels,
    Reference,
    WrongImageCount,
    cache_path,
    cached_reference,
    compute_reference,
)


def images(count: int = 40, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, channels, 6, 6), dtype=torch.uint8, generator=generator)


def reference(size: int = 2) -> Reference:
    return compute_reference(torch.split(images(), 16), Pixels(size), "cpu", name="noise")


def statistics(dimension: int = 12) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(50, dimension))
    return {"mu": values.mean(0), "sigma": np.cov(values, rowvar=False)}


def test_the_reference_of_all_images_is_numpys_mean_and_covariance_of_their_features() -> None:
    result = compute_reference(torch.split(images(), 16), Pixels(6), "cpu", expected=lambda: 40, name="noise")
    pixels = images().flatten(1).numpy().astype(np.float64) / 255
    np.testing.assert_allclose(result.mu.numpy(), pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.sigma.numpy(), np.cov(pixels, rowvar=False), atol=1e-7)
    assert (result.count, result.name, result.extractor) == (40, "noise", Pixels(6).fingerprint())


def test_a_dropped_last_batch_is_an_error_with_both_counts() -> None:
    with pytest.raises(WrongImageCount, match="counted 32 images, but noise has 40"):
        compute_reference(torch.split(images(), 16)[:2], Pixels(2), "cpu", expected=lambda: 40, name="noise")


def test_images_are_counted_over_all_processes() -> None:
    def two_alike(tensor: Tensor) -> Tensor:
        return tensor * 2

    result = compute_reference(torch.split(images(), 16), Pixels(2), "cpu", two_alike, expected=lambda: 40)
    assert result.count == 80
    torch.testing.assert_close(result.mu, reference().mu)
    torch.testing.assert_close(result.sigma, reference().sigma * (2 * 39 / 79))


def test_grey_images_have_a_reference_too() -> None:
    result = compute_reference([images(channels=1)], Pixels(2), "cpu")
    assert result.mu.shape == (12,)


def test_a_saved_reference_comes_back_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "noise.npz"
    saved = reference()
    saved.save(path)
    loaded = Reference.load(path, Pixels(2))
    assert torch.equal(loaded.mu, saved.mu)
    assert torch.equal(loaded.sigma, saved.sigma)
    assert (loaded.count, loaded.name, loaded.extractor) == (40, "noise", Pixels(2).fingerprint())
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_reference_is_what_pytorch_fid_reads(tmp_path: Path) -> None:
    reference().save(tmp_path / "noise.npz")
    with np.load(tmp_path / "noise.npz") as file:
        mu, sigma = file["mu"][:], file["sigma"][:]
    np.testing.assert_array_equal(mu, reference().mu.numpy())
    np.testing.assert_array_equal(sigma, reference().sigma.numpy())


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "noise.npz"
    reference().save(path)
    before = path.read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        reference(size=3).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_of_pytorch_fid_load(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "cifar10.npz"
    arrays = {key: value.astype(dtype) for key, value in statistics().items()}
    np.savez(path, **arrays)
    loaded = Reference.load(path, Pixels(2))
    assert loaded.mu.dtype == loaded.sigma.dtype == torch.float64
    np.testing.assert_array_equal(loaded.sigma.numpy(), arrays["sigma"])
    assert (loaded.count, loaded.name, loaded.extractor) == (None, "cifar10", None)


def test_a_reference_batch_of_openais_evaluator_loads(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_lsun_bedroom256.npz"
    spatial = statistics(7)
    np.savez(
        path,
        arr_0=np.zeros((5, 4, 4, 3), np.uint8),
        mu_s=spatial["mu"],
        sigma_s=spatial["sigma"],
        **statistics(),
    )
    np.testing.assert_array_equal(Reference.load(path, Pixels(2)).mu.numpy(), statistics()["mu"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((5, 4, 4, 3), np.uint8)}, "has no mu and no sigma: it holds arr_0"),
        ({"mu": np.zeros(12)}, "has no sigma: it holds mu"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"mu \(12,\) and sigma \(11, 11\) are not"),
        ({"mu": np.zeros((1, 12)), "sigma": np.eye(12)}, r"mu \(1, 12\) and sigma"),
        ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "not finite"),
        ({"mu": np.zeros(12), "sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"mu": np.array(["a"] * 12), "sigma": np.eye(12)}, "could not convert"),
        ({"mu": np.zeros(12), "sigma": np.eye(12), "count": np.zeros(2)}, "bad.npz: "),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "describes 5 features, but pixels has 12"),
    ],
)
def test_statistics_that_lack_something_are_refused_with_the_files_name(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Reference.load(path, Pixels(2))
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_of_other_features_of_the_same_dimension_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.npz"
    Reference(**_as_tensors(statistics()), count=50, name="x", extractor="edges-0123").save(path)
    with pytest.raises(ValueError, match="computed with the extractor edges-0123, but this one is pixels-"):
        Reference.load(path, Pixels(2))
    assert Reference.load(path).count == 50


def _as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


class _Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_code_in_a_file_of_statistics_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / "attack.npz", mu=np.array([_Attack(mark)], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"attack\.npz is not a readable \.npz"):
        Reference.load(tmp_path / "attack.npz")
    assert not mark.exists()


def test_files_of_other_kinds_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("<html>")
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "array").open("wb") as file:
        np.save(file, np.zeros(3))
    torch.save({"mu": torch.zeros(2)}, tmp_path / "torch")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name) as caught:
            Reference.load(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file"):
        Reference.load(tmp_path / "absent.npz")


def test_every_part_of_the_key_has_its_own_cache_file(tmp_path: Path) -> None:
    def path(data: str = "a", extractor: str = "b", resolution: int = 32) -> Path:
        return cache_path(tmp_path, data, extractor, resolution)

    paths = [path(), path(data="c"), path(extractor="c"), path(resolution=64)]
    paths += [path("ab", ""), path("", "ab"), path(extractor=Pixels(4).fingerprint())]
    assert len(set(paths)) == len(paths)
    assert path() == path()
    assert path().parent == tmp_path


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    assert default_cache_dir() == cache_path(None, "a", "b", resolution=8).parent == tmp_path
    monkeypatch.delenv("DIFFUSION_LIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "diffusion_lit"


class Computation:
    """Computes the reference and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Reference:
        self.calls += 1
        return reference()


def test_a_cached_reference_is_computed_once(tmp_path: Path) -> None:
    path, compute = tmp_path / "noise.npz", Computation()
    first = cached_reference(path, compute, Pixels(2))
    second = cached_reference(path, compute, Pixels(2))
    assert compute.calls == 1
    assert torch.equal(first.sigma, second.sigma)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)


def _replace(path: Path) -> None:
    reference(size=3).save(path)


@pytest.mark.parametrize("damage", [_cut, _flip, _replace])
def test_a_damaged_cache_file_is_computed_anew_with_a_warning(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path, compute = tmp_path / "noise.npz", Computation()
    cached_reference(path, compute, Pixels(2))
    damage(path)
    with pytest.warns(UserWarning, match=r"noise\.npz .*computing it anew"):
        result = cached_reference(path, compute, Pixels(2))
    assert compute.calls == 2
    assert torch.equal(result.mu, reference().mu)
    assert torch.equal(Reference.load(path, Pixels(2)).mu, result.mu)


def test_a_process_computes_with_another_that_lacks_the_file(tmp_path: Path) -> None:
    path, compute = tmp_path / "noise.npz", Computation()
    reference().save(path)

    def other_lacks_it(tensor: Tensor) -> Tensor:
        return tensor + 1

    cached_reference(path, compute, Pixels(2), reduce_sum=other_lacks_it)
    assert compute.calls == 1


def test_only_the_writing_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "noise.npz"
    cached_reference(path, Computation(), Pixels(2), write=False)
    assert not path.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="were not kept in"):
        result = cached_reference(tmp_path / "file" / "noise.npz", Computation(), Pixels(2))
    assert result.count == 40
