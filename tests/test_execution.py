"""However the network is run, what a run computes and keeps is the same but for rounding."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.execution import Execution
from diffusion_lit.module import DiffusionModule
from tests import tiny

# All that torch.compile does but for the generated code, which takes minutes of a processor.
BACKEND = "aot_eager"
SWITCHES: dict[str, dict[str, Any]] = {
    "channels last": {"channels_last": True},
    "channels last and compiled": {"channels_last": True, "compile": BACKEND},
}


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, fused=True)


def train(run: Path, steps: int, ckpt_path: str | None = None, **switches: Any) -> Any:
    """A model after so many steps with a fused optimiser, without dropout."""
    model = tiny.module(network=tiny.network(dropout=0.0), optimizer=fused)
    callbacks: list[L.Callback] = [EMA([0.9]), Scalars(), Checkpoints()]
    trainer = tiny.trainer(run, steps, callbacks, **switches)
    trainer.fit(model, tiny.data(), ckpt_path=ckpt_path)
    return model


def close(a: Any, b: Any) -> None:
    """Raises AssertionError unless two checkpoints hold the same names and, up to rounding, the same weights."""
    for part in ("state_dict", "current_model_state"):
        assert list(a[part]) == list(b[part])
        for name, value in a[part].items():
            torch.testing.assert_close(value, b[part][name], rtol=1e-3, atol=2e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("way", SWITCHES)
def test_a_run_is_the_same_however_the_network_is_run_and_goes_on_in_another_way(tmp_path: Path, way: str) -> None:
    switches = SWITCHES[way]
    train(tmp_path / "plain", 4)
    plain = tiny.load(tiny.last(tmp_path / "plain"))
    assert not any("orig_mod" in name for name in plain["state_dict"])
    model = train(tmp_path / "whole", 4, **switches)
    close(tiny.load(tiny.last(tmp_path / "whole")), plain)
    # The averages come and go in the weights that the compiled network holds.
    raw = model.sample(range(2))
    with model.averaged_weights():
        averaged = model.sample(range(2))
    assert not torch.allclose(raw, averaged)
    alone = tiny.module(network=tiny.network(dropout=0.0))
    alone.load_state_dict(plain["state_dict"])
    torch.testing.assert_close(averaged, alone.sample(range(2)), rtol=1e-3, atol=1e-3)
    # Half of the run in one way, half in the other.
    for first, second in ((switches, {}), ({}, switches)):
        run = tmp_path / ("there" if first else "back")
        train(run, 2, **first)
        train(run, 4, "last", **second)
        close(tiny.load(tiny.last(run)), plain)


@pytest.mark.slow
def test_a_compiled_network_with_dropout_is_resumed_exactly(tmp_path: Path) -> None:
    def fit(run: Path, steps: int, ckpt_path: str | None = None) -> None:
        tiny.trainer(run, steps, compile=BACKEND).fit(tiny.module(), tiny.data(), ckpt_path=ckpt_path)

    fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 1)
    fit(tmp_path / "parts", 3, "last")
    whole, parts = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    assert tiny.identical(whole["current_model_state"], parts["current_model_state"])


@pytest.mark.further
def test_evaluations_of_a_compiled_network_are_counted() -> None:
    model = tiny.module()
    model.execute(Execution(compile=BACKEND))
    run = model.denoiser.run
    assert run is not None
    calls: list[tuple[Any, ...]] = []

    def counting(*inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return run(*inputs)

    model.denoiser.run = counting
    model.sample(range(2))
    assert len(calls) == model.evaluations(None) == model.sampler.steps == 3


class HostReads(TorchDispatchMode):
    """Counts the values of tensors that a program reads: each makes it wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


class CountReads(L.Callback):
    """The reads until each step's end."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads
        self.counts: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.append(self.reads.count)


@pytest.mark.parametrize(("max_skipped_steps", "expected"), [(None, 0), (10, 1)])
def test_a_step_reads_nothing_from_the_device_but_whether_gradients_are_finite_if_asked_to(
    tmp_path: Path, max_skipped_steps: int | None, expected: int
) -> None:
    model: DiffusionModule = tiny.module(optimizer=fused, max_skipped_steps=max_skipped_steps)
    with HostReads() as reads:
        counter = CountReads(reads)
        trainer = tiny.trainer(tmp_path, 5, [EMA([0.9]), Scalars(), counter], log_every_n_steps=100, logger=False)
        trainer.fit(model, tiny.data())
    steps = [after - before for before, after in zip(counter.counts[:-1], counter.counts[1:], strict=True)]
    assert steps == [expected] * 4


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda_graphs=true needs the network compiled"):
        Execution(cuda_graphs=True)
    with pytest.raises(ValueError, match=r"compile='nonsense' is no backend of torch\.compile; choose inductor"):
        tiny.trainer(tmp_path, compile="nonsense")


@pytest.mark.slow
def test_generated_code_computes_what_the_network_does(tmp_path: Path) -> None:
    train(tmp_path / "plain", 3)
    switches: dict[str, Any] = {"channels_last": True, "compile": "inductor", "cuda_graphs": True}
    model = train(tmp_path / "compiled", 3, **switches)
    plain = tiny.load(tiny.last(tmp_path / "plain"))
    close(tiny.load(tiny.last(tmp_path / "compiled")), plain)
    alone = tiny.module(network=tiny.network(dropout=0.0))
    alone.load_state_dict(plain["current_model_state"])
    torch.testing.assert_close(model.sample(range(2)), alone.sample(range(2)), rtol=1e-3, atol=1e-3)
