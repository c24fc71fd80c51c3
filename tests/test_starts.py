"""How a run starts: from nothing or from weights, in a directory of its own, with classes that the network knows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.conditioner import Labels
from diffusion_lit.data import Folder, ImageData
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, ConvClassifier
from diffusion_lit.prediction import asked_requests
from diffusion_lit.requests import Requests
from tests import forked, tiny


def folder(root: Path, classes: str = "abc", **kwargs: Any) -> ImageData:
    generator = np.random.default_rng(0)
    for name in classes:
        for i in range(3):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return ImageData(Folder(str(root), image_size=8, channels=1, **kwargs), batch_size=4)


def conditional(num_classes: int, null_label: bool = True, **kwargs: Any) -> DiffusionModule:
    network = ADMUNet(
        8, 1, width=8, multipliers=[1], num_blocks=1, attention=[], num_groups=4, num_classes=num_classes,
        null_label=null_label,
    )  # fmt: skip
    return tiny.module(network=network, conditioner=Labels(0.5 if null_label else 0.0), **kwargs)


def test_more_classes_in_the_data_than_in_the_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data have 3 classes \(a, b, c\) but the network has num_classes=2"):
        tiny.trainer(tmp_path / "run", 1).fit(conditional(2), folder(tmp_path / "data"))


def test_a_classifier_of_too_few_classes_is_refused_too(tmp_path: Path) -> None:
    system = FeatureNetworkModule(ConvClassifier(8, 1, num_classes=1, width=8))
    with pytest.raises(ValueError, match=r"the data have 3 classes .* num_classes=1"):
        tiny.trainer(tmp_path / "run", 1).fit(system, folder(tmp_path / "data"))


def test_fewer_classes_in_the_data_are_said_and_only_these_are_shown(tmp_path: Path) -> None:
    system = conditional(10)
    with pytest.warns(UserWarning, match=r"num_classes=10 but the data have only 3 classes \(a, b, c\)"):
        tiny.trainer(tmp_path / "run", 1).fit(system, folder(tmp_path / "data"))
    assert system.conditions()(torch.arange(3))["label"].tolist() == [0, 1, 2]
    assert tiny.load(tiny.last(tmp_path / "run"))["class_names"] == ["a", "b", "c"]


def test_classes_of_another_meaning_are_refused_when_a_run_continues_and_in_every_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.trainer(run, 1).fit(conditional(3), folder(tmp_path / "data"))
    other = folder(tmp_path / "other", "acx", val_root=str(tmp_path / "other"))
    line = r"label 1 is 'c' in the data, and 'b' to the model, which was trained on the classes a, b, c"
    with pytest.raises(ValueError, match=line):
        tiny.trainer(run, 2).fit(conditional(3), other, ckpt_path="last")
    for command in ("validate", "test"):
        with pytest.raises(ValueError, match=line):
            getattr(tiny.trainer(run, limit_val_batches=1), command)(conditional(3), other, str(tiny.last(run)))
    # Other classes altogether: a new run.
    tiny.trainer(tmp_path / "new", 1).fit(conditional(3), other, init_from=str(tiny.last(run)))
    assert tiny.load(tiny.last(tmp_path / "new"))["class_names"] == ["a", "c", "x"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_more_classes_in_the_data_than_in_the_network_are_refused_in_evaluations_too(
    command: str, tmp_path: Path
) -> None:
    tiny.trainer(tmp_path / "run", 1).fit(conditional(3), folder(tmp_path / "data"))
    data = folder(tmp_path / "more", "abcd", val_root=str(tmp_path / "more"))
    evaluate = getattr(tiny.trainer(tmp_path / "run", limit_val_batches=1), command)
    with pytest.raises(ValueError, match=r"the data have 4 classes \(a, b, c, d\) but the network has num_classes=3"):
        evaluate(conditional(3), data, str(tiny.last(tmp_path / "run")))


def test_a_run_may_continue_with_further_classes_at_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="only 3 classes"):
        tiny.trainer(run, 1).fit(conditional(4), folder(tmp_path / "data"))
    tiny.trainer(run, 2).fit(conditional(4), folder(tmp_path / "more", "abcd"), ckpt_path="last")
    assert tiny.load(tiny.last(run))["class_names"] == ["a", "b", "c", "d"]


def test_a_network_with_classes_refuses_data_without_labels(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "a")
    with pytest.raises(ValueError, match="ADMUNet has classes but the data have no labels"):
        tiny.trainer(tmp_path / "run", 1).fit(conditional(3), data)


def test_a_run_starts_from_weights_with_another_number_of_classes(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first", 2).fit(conditional(3), folder(tmp_path / "data"))
    weights = tiny.load(tiny.last(tmp_path / "first"))["state_dict"]
    system = conditional(5)
    before = system.denoiser.network.get_parameter("label_emb.weight").clone()
    trainer = tiny.trainer(tmp_path / "second", 0)
    trainer.fit(system, folder(tmp_path / "more", "abcde"), init_from=str(tiny.last(tmp_path / "first")))
    own = system.state_dict()
    assert torch.equal(own.pop("denoiser.network.label_emb.weight"), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.items())
    assert trainer.global_step == 0


def test_a_run_starts_from_the_weights_asked_for(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first", 2).fit(tiny.module(), tiny.data())
    first = str(tiny.last(tmp_path / "first"))
    checkpoint = tiny.load(Path(first))
    for weights, expected in (("averaged", "state_dict"), ("raw", "current_model_state")):
        recorder = tiny.Recorder()
        made = tiny.trainer(tmp_path / weights, 1, [recorder], logger=False)
        made.fit(tiny.module(), tiny.data(), init_from=first, weights=weights)
        assert recorder.weights[0]
        assert all(torch.equal(value, checkpoint[expected][n].double()) for n, value in recorder.weights[0].items())
    assert not tiny.identical(checkpoint["state_dict"], checkpoint["current_model_state"])
    for options, message in (
        ({"init_from": first, "weights": "0.3"}, r"weights='0\.3' are not in the checkpoint"),
        ({"weights": "raw"}, r"weights='raw' are those of --init_from, which is not given"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.trainer(tmp_path / "refused", 1).fit(tiny.module(), tiny.data(), **options)
    with pytest.raises(FileNotFoundError, match=r"init_from=nowhere\.ckpt: there is no such file"):
        tiny.trainer(tmp_path / "refused", 1).fit(tiny.module(), tiny.data(), init_from="nowhere.ckpt")


def test_a_run_does_not_start_from_weights_of_another_network(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first", 1).fit(tiny.module(), tiny.data())
    with pytest.raises(ValueError, match="the checkpoint is of another architecture"):
        tiny.trainer(tmp_path / "second", 1).fit(
            tiny.module(network=tiny.network(width=32)), tiny.data(), init_from=str(tiny.last(tmp_path / "first"))
        )


def test_a_checkpoint_without_steps_left_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data())
    with pytest.raises(ValueError, match=r"is of step 2, and trainer\.max_steps=2 leaves none.*--init_from"):
        tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data(), ckpt_path=str(tiny.last(tmp_path)))
    with pytest.raises(ValueError, match=r"is of step 2, beyond trainer\.max_steps=1; raise"):
        tiny.trainer(tmp_path, 1).fit(tiny.module(), tiny.data(), ckpt_path="last")
    # A job that is submitted again after its end has nothing to do.
    tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data(), ckpt_path="last")


def test_a_checkpoint_of_another_run_does_not_continue_in_a_directory_that_holds_one(tmp_path: Path) -> None:
    for name in ("own", "other"):
        tiny.trainer(tmp_path / name, 2).fit(tiny.module(), tiny.data())
    before = tiny.last(tmp_path / "own").read_bytes()
    with pytest.raises(ValueError, match="own holds a run already"):
        tiny.trainer(tmp_path / "own", 4).fit(tiny.module(), tiny.data(), ckpt_path=str(tiny.last(tmp_path / "other")))
    assert tiny.last(tmp_path / "own").read_bytes() == before


def test_a_run_does_not_both_continue_and_start_from_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path=a\.ckpt continues a run and init_from=b\.ckpt starts one"):
        tiny.trainer(tmp_path, 1).fit(tiny.module(), tiny.data(), ckpt_path="a.ckpt", init_from="b.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "batches"), [(4, [4]), (64, [64]), (100, [50, 50]), (129, [43, 43, 43])])
def test_as_many_images_are_made_as_are_asked_for(asked: int, batches: list[int]) -> None:
    requests = asked_requests(None, asked, None, 0)
    assert [len(requests[i]["index"]) for i in range(len(requests))] == batches


def test_a_process_without_images_gets_an_empty_request() -> None:
    [request] = list(Requests(3, 4).loader(rank=1, world_size=2))
    assert len(request["index"]) == 0


def test_fewer_batches_than_processes_are_predicted_by_two(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "run", 1).fit(tiny.module(), tiny.data())

    def predict() -> None:
        trainer = tiny.trainer(tmp_path / "run", devices=2, strategy="ddp")
        trainer.predict(tiny.module(), ckpt_path=str(tiny.last(tmp_path / "run")), num_images=3)

    assert forked.wait(forked.fork(lambda: forked.in_two(predict), tmp_path / "output.txt")) == 0
    images = tmp_path / "run" / "predictions" / "last_seed_0"
    assert sorted(path.name for path in images.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert (images.parent / "last_seed_0_grid.png").is_file()
