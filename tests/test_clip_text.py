"""Frozen text towers of CLIP, with random weights."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_lit.conditioners import CLIPText, Prompts
from diffusion_lit.text import encode_text
from tests import tiny
from tests.texts import PROMPTS, data, module


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower of CLIP with random weights, and a tokenizer of single letters, as a pipeline saves them."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    place = tmp_path_factory.mktemp("pipeline")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>")]).save_pretrained(place / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(place / "text_encoder")
    return place


def test_a_tower_of_clip_gives_the_last_hidden_state_of_77_tokens_without_a_mask(tower: Path) -> None:
    from transformers import CLIPTextModel

    text: Prompts = CLIPText(str(tower))
    texts = ["the seven", "x"]
    ids = torch.ones(2, 77, dtype=torch.int64)
    vocabulary = json.loads((tower / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    spelled = [["the</w>", "s", "e", "v", "e", "n</w>"], ["x</w>"]]
    for row, tokens in zip(ids, spelled, strict=True):
        row[: len(tokens) + 1] = torch.tensor([0, *(vocabulary[token] for token in tokens)])
    assert torch.equal(text.tokens_of(texts), ids)
    reference = CLIPTextModel.from_pretrained(tower / "text_encoder").eval()
    with torch.no_grad():
        expected = reference(input_ids=ids).last_hidden_state
    assert torch.equal(text.encode(texts), expected)
    assert (text.width, text.words("the seven")[1].positions) == (16, [2, 3, 4, 5, 6])
    with pytest.warns(UserWarning, match=r"5 tokens of the text 'xxx.*\.\.\.' were cut: the text encoder takes 77"):
        text.encode(["x" * 80])


def test_a_tower_of_clip_is_neither_trained_nor_saved(tower: Path, tmp_path: Path) -> None:
    system = module(conditioner=CLIPText(str(tower)))
    assert isinstance(system.conditioner, CLIPText)
    before = system.conditioner.encode(["a three"])
    tiny.trainer(tmp_path, 2).fit(system, data())
    assert torch.equal(system.conditioner.encode(["a three"]), before)
    assert not [name for name in tiny.load(tiny.last(tmp_path))["state_dict"] if name.startswith("conditioner")]
    again = module(conditioner=CLIPText(str(tower)))
    again.load(tiny.load(tiny.last(tmp_path)))
    with system.averaged_weights():
        given = {"caption": encode_text(PROMPTS)}
        assert torch.equal(system.sample(range(3), condition=given), again.sample(range(3), condition=given))


def test_a_missing_package_or_folder_is_one_line(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"holds no CLIP text model: .*config\.json is missing"):
        CLIPText(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no CLIP text model that can be read") as error:
        CLIPText(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the transformers package .*; pip install 'diffusion-lit\[text\]'"):
        CLIPText(str(tower))


def test_what_a_tower_s_files_ask_for_beside_its_shape_is_not_done(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, marker = tmp_path / "hostile", tmp_path / "MARKER"
    shutil.copytree(tower, place)
    monkeypatch.chdir(place / "text_encoder")
    (place / "text_encoder" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    asked = {
        "attn_implementation": "kernels-community/flash-attn2",
        "experts_implementation": "kernels-community/megablocks",
        "quantization_config": {"quant_method": "mxfp4"},
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "trust_remote_code": True,
    }
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        file = place / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    assert torch.equal(CLIPText(str(place)).encode(["the"]), CLIPText(str(tower)).encode(["the"]))
    assert not marker.exists()

    class Evil:
        def __reduce__(self) -> Any:
            return marker.touch, ()

    (place / "text_encoder" / "model.safetensors").unlink()
    torch.save({"text_model.final_layer_norm.weight": Evil()}, place / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights are a pickle that asks for more than tensors"):
        CLIPText(str(place))
    assert not marker.exists()
    (place / "text_encoder" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json changes the tower"):
        CLIPText(str(place))
