"""What `predict` writes of the anomalies that are found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data import Folder, ImageData
from tests import tiny
from tests.methods.test_anomaly import data, images, model, table


def test_predict_writes_the_map_the_overlay_and_the_score_of_each_image(tmp_path: Path) -> None:
    system = model()
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(system, data(), out=str(tmp_path / "out"), num_images=5, batch_size=2, seed=3)
    found = system.detect(images(5), range(5), 3)
    rows = table(tmp_path / "out" / "scores.csv")
    assert rows[0] == ["image", "pred_score"]
    names = [name for name, _ in rows[1:]]
    assert names == [f"good/{i:03d}" for i in range(5)]
    torch.testing.assert_close(torch.tensor([float(s) for _, s in rows[1:]]), found.pred_score, atol=1e-5, rtol=1e-4)
    for index, name in enumerate(names):
        with Image.open(tmp_path / "out" / f"{name}_map.tiff") as image:
            stored = torch.from_numpy(np.array(image))
        torch.testing.assert_close(stored, found.anomaly_map[index], atol=1e-5, rtol=1e-4)
        with Image.open(tmp_path / "out" / f"{name}_overlay.png") as image:
            assert (image.mode, image.size) == ("RGB", (128, 128))
            assert float(image.info["pred_score"]) == float(rows[1 + index][1])


@pytest.mark.parametrize("in_memory", [None, False])
def test_predict_takes_a_plain_folder_without_masks(tmp_path: Path, in_memory: bool | None) -> None:
    for name in ("a.png", "b.png", "b.jpg"):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.new("L", (20, 12)).save(tmp_path / "new" / name)
    source = ImageData(Folder(str(tmp_path / "new"), 8, 1, val_root=str(tmp_path / "new"), in_memory=in_memory))
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(model(), source, out=str(tmp_path / "out"))
    rows = table(tmp_path / "out" / "scores.csv")
    assert [name for name, _ in rows[1:]] == ["a.png", "b.jpg", "b.png"]


@pytest.mark.parametrize("in_memory", [None, False])
def test_unreadable_images_are_left_out_where_that_is_asked_for(tmp_path: Path, in_memory: bool | None) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("L", (8, 8)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no image")
    source = ImageData(Folder(str(folder), 8, 1, val_root=str(folder), in_memory=in_memory), on_corrupt="skip")
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    with pytest.warns(UserWarning, match=r"left out: .*b.png"):
        made.predict(model(), source, out=str(tmp_path / "out"))
    rows = table(tmp_path / "out" / "scores.csv")
    assert [name for name, _ in rows[1:]] == ["a", "c"]


def test_predict_without_data_or_of_another_size_is_refused(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    with pytest.raises(ValueError, match=r"give --data.source"):
        made.predict(model(), out=str(tmp_path / "out"))
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\) but the model takes \(1, 8, 8\)"):
        made.predict(model(), ImageData(Folder(str(tmp_path / "a"), 8, 3)), out=str(tmp_path / "out"))
