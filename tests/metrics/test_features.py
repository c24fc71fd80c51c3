import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffusion_lit.metrics import (
    FeatureExtractor,
    Inception,
    Pixels,
    WeightsUnavailable,
    exact_float32,
    features,
)
from tests.metrics.inception import random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    extractor = Inception(str(weights))
    extractor.prepare()
    return extractor


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub's, and no network: nothing listens where the weights should come from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception-6726825d.pth")
    return tmp_path / "hub" / "checkpoints"


def images(count: int = 3, channels: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class Edges(FeatureExtractor):
    name = "edges"
    num_features = 6

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        with torch.no_grad():
            self.conv.weight.copy_(torch.linspace(-1, 1, self.conv.weight.numel()).view_as(self.conv.weight))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self.conv(images.float() / 255)).mean((2, 3))
        return self.gain * features


def test_inception_gives_torch_fidelitys_features(inception: Inception, weights: Path) -> None:
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    expected = theirs(images())[0]
    result = inception(images())
    assert result.shape == (3, inception.num_features)
    assert expected.std() > 1e-2
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_inception_sees_a_grey_image_as_three_equal_channels(inception: Inception) -> None:
    grey = images(2, channels=1, size=8)
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)


def test_inceptions_features_do_not_depend_on_the_callers_precision(inception: Inception, weights: Path) -> None:
    expected = inception(images(1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            extractor = Inception(str(weights))
            result = extractor(images(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_making_inception_touches_no_file_and_preparing_it_draws_no_random_number(weights: Path) -> None:
    Inception("nowhere")
    before = torch.random.get_rng_state()
    Inception(str(weights)).prepare()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_inception_never_trains(inception: Inception) -> None:
    inception.train()
    assert not any(module.training for module in inception.modules())
    assert not inception(images(1)).requires_grad


def test_inceptions_fingerprint_follows_weights_not_files(inception: Inception, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save(dict(state), tmp_path / "same.pth", _use_new_zipfile_serialization=False)
    state["Mixed_7c.branch1x1.bn.running_mean"][0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    assert Inception(str(tmp_path / "same.pth")).fingerprint() == inception.fingerprint()
    assert Inception(str(tmp_path / "other.pth")).fingerprint() != inception.fingerprint()


def test_the_default_weights_come_from_torch_hubs_folder(hub: Path, inception: Inception, weights: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "weights-inception-6726825d.pth").symlink_to(weights)
    extractor = Inception()
    extractor.prepare()
    assert extractor.fingerprint() == inception.fingerprint()


def test_without_file_and_network_one_line_says_where_it_looked_and_what_to_do(hub: Path) -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        Inception().prepare()
    message = str(caught.value)
    assert "\n" not in message
    assert str(hub) in message
    assert "weights-inception-6726825d.pth" in message
    assert "--evaluation.extractor.weights PATH" in message
    assert "--evaluation.extractor Pixels" in message
    assert not list(hub.iterdir())


def test_a_download_is_kept_if_its_hash_is_the_one_in_its_name(
    hub: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    for name, accepted in ((f"weights-{digest}.pth", True), ("weights-00000000.pth", False)):
        (tmp_path / name).symlink_to(weights)
        monkeypatch.setattr(features, "URL_INCEPTION_V3", (tmp_path / name).as_uri())
        if accepted:
            Inception().prepare()
        else:
            with pytest.raises(WeightsUnavailable, match="damaged"):
                Inception().prepare()
    assert [path.name for path in hub.iterdir()] == [f"weights-{digest}.pth"]


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"absent\.pth: no such file; pass torch-fidelity's"):
        Inception(str(tmp_path / "absent.pth")).prepare()


def test_files_that_are_not_its_weights_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "another.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    state = torch.load(weights, weights_only=True)
    del state["Conv2d_1a_3x3.conv.weight"]
    torch.save(state, tmp_path / "incomplete.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(WeightsUnavailable) as caught:
            Inception(str(path)).prepare()
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


class _Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_weights_file_does_not_run(form: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    attack = {"Mixed_7c.branch1x1.conv.weight": _Attack(mark)}
    if form == "torch":
        torch.save(attack, path)
    else:
        path.write_bytes(pickle.dumps(attack))
    with pytest.raises(WeightsUnavailable, match="not a file of tensors"):
        Inception(str(path)).prepare()
    assert not mark.exists()


def test_only_inceptions_distance_is_called_fid() -> None:
    assert Inception().metric_name == "fid"
    assert Pixels().metric_name == "frechet/pixels"
    assert Edges().metric_name == "frechet/edges"
    assert Inception().scalar("kid") == "kid"
    assert Edges().scalar("kid") == "kid/edges"


def test_pixels_averages_areas_in_unit_range() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, 0, :2, :2] = torch.tensor([[255, 0], [0, 0]])
    image[0, 2, 2:, 2:] = 255
    expected = [0.25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert Pixels(size=2)(image).tolist() == [expected]
    assert Pixels(size=2).num_features == len(expected)


def test_pixels_has_one_dimension_for_grey_colour_small_and_large_images() -> None:
    extractor = Pixels(size=4)
    for channels, size in ((1, 2), (1, 8), (3, 5), (3, 64)):
        assert extractor(images(2, channels, size)).shape == (2, extractor.num_features)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_that_are_not_8_bit_grey_or_colour_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="pixels takes uint8 images"):
        Pixels()(wrong)


def test_pixels_needs_a_size() -> None:
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        Pixels(0)


def test_an_extractor_stays_in_evaluation_mode() -> None:
    extractor = Edges().train()
    extractor(images(5))
    assert not any(module.training for module in extractor.modules())
    assert extractor.norm.num_batches_tracked == 0


class HalfOnly(Pixels):
    """Takes two images at once, no more."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return super().outputs(images)


def test_out_of_memory_features_are_made_of_fewer_images_at_once() -> None:
    with pytest.warns(UserWarning, match="out of memory in pixels"):
        found = features.outputs_in_memory(HalfOnly(), images(7))
    assert torch.equal(found["features"], Pixels()(images(7)))


def test_fingerprints_tell_weights_settings_and_classes_apart_and_nothing_else() -> None:
    other_weights = Edges()
    with torch.no_grad():
        other_weights.conv.weight[0, 0, 0, 0] += 1
    other_statistics = Edges()
    nn.init.ones_(other_statistics.norm.running_mean)  # type: ignore[arg-type]
    different = [Edges(), Edges(gain=2), other_weights, other_statistics, Pixels(4), Pixels(8)]
    assert len({module.fingerprint() for module in different}) == len(different)
    assert Edges().fingerprint() == Edges().train().fingerprint()
    assert Pixels(8).fingerprint() == Pixels().fingerprint()


def test_exact_float32_undoes_reduced_precision_and_gives_it_back() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with exact_float32(torch.device("cpu")):
                result = left @ right
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
            assert (left @ right).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_new_extractor_is_a_subclass_with_a_forward_alone() -> None:
    class Brightness(FeatureExtractor):
        name = "brightness"
        num_features = 1

        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean((1, 2, 3)).unsqueeze(1)

    extractor = Brightness()
    extractor.prepare()
    assert extractor.metric_name == "frechet/brightness"
    assert extractor.fingerprint().startswith("brightness-")
