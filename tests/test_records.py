"""Records of results, and parts as plain data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_lit.diffusion import DDIM
from diffusion_lit.frozen import Frozen
from diffusion_lit.records import append_once, append_record, describe, digest, read_records


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_not_recorded_and_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, {"step": 10**400, "scores": {"fid": 1.0}, "times": [0.5]})
    for record, name in (({"scores": {"fid": value}}, "scores.fid"), ({"times": [0.5, {"a": value}]}, "times.1.a")):
        with pytest.raises(ValueError, match=rf"^{name}={value} is not finite"):
            append_record(path, record)
    assert len(read_records(path)) == 1


def test_a_record_is_appended_once_whatever_time_it_took(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    names = ("weights", "scores")
    record: dict[str, Any] = {"weights": "abc", "scores": {"fid": 1 / 3}, "interval": (0, 1), "seconds": 5.0}
    assert append_once(path, record, names)
    assert not append_once(path, {**record, "seconds": 7.0}, names)
    assert append_once(path, {**record, "scores": {"fid": 0.5}}, names)
    assert append_once(path, {**record, "weights": "def"}, names)
    assert not append_once(path, record, ("interval",))
    assert [(r["weights"], r["scores"]["fid"]) for r in read_records(path)] == [
        ("abc", 1 / 3),
        ("abc", 0.5),
        ("def", 1 / 3),
    ]


class Inner(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width
        self.layer = nn.Linear(width, width)


class Outer(nn.Module):
    """A module with a part, a layer of its own and an option that a layer is named after."""

    def __init__(self, inner: nn.Module, scale: float = 0.5, dropout: float = 0.1) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.head = Inner(3)


class Holder:
    """A part that is no module."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network


def inner() -> Inner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Inner()


def outer(part: nn.Module) -> Outer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Outer(part)


def test_a_module_is_described_by_its_options_its_parts_and_a_hash_of_its_tensors() -> None:
    module = outer(inner())
    part = {"class": "Inner", "width": 2, "weights": digest(module.inner.state_dict().items())}
    expected = {"class": "Outer", "scale": 0.5, "inner": part, "weights": digest(module.state_dict().items())}
    assert describe(module) == expected
    json.dumps(describe(module))


@pytest.mark.parametrize("hold", [outer, Holder, lambda network: outer(outer(network))])
def test_a_frozen_network_is_described_as_itself_and_any_of_its_bits_counts(hold: Any) -> None:
    first, second = (hold(Frozen(inner())) for _ in range(2))
    assert describe(first) == describe(second)
    assert '"class": "Inner"' in json.dumps(describe(first))
    network = inner()
    before = describe(hold(Frozen(network)))
    assert before == describe(first)
    with torch.no_grad():
        network.layer.bias[1] += 1e-3
    after = describe(hold(Frozen(network)))
    assert after != before
    assert after.get("weights") != before.get("weights") or hold is Holder


def test_a_part_without_tensors_is_described_by_its_options() -> None:
    expected = {"class": "DDIM", "steps": 7, "eta": 0.0, "clip": True, "grid": {"class": "Uniform"}}
    assert describe(DDIM(7)) == expected
