"""What a training step needs besides a system: seeds, gradients of several processes, logs, explanations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn

TRAINING, VALIDATION = 0, 1
MEAN_LOSS = "mean_loss"
QUARTERS = 4


def seed_step(seed: int, stream: int, rank: int, batch: int) -> None:
    """Seeds torch for one batch, so that no two processes or batches share noise and a resumed run repeats it.

    Args:
        seed: Of the run.
        stream: `TRAINING` or `VALIDATION`.
        rank: Of the process.
        batch: Counted from 0.
    """
    state = np.random.SeedSequence([seed, stream, rank, batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def totals(parts: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Sums what `System.losses` returned over the images of a batch.

    Args:
        parts: From `losses`, or from `training_step`.
        count: Images in the batch.

    Returns:
        By the name in logs: [sum, number], float64, (2,). Scalars count once per image. Values per image come as a
        whole, and by quarter of the time where there is one: "loss", "loss_t_0.00_0.25" and so on.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, total: Tensor, number: float) -> None:
        # Filled on the device: a copy from the host would wait for the step.
        found[name] = torch.stack([total.double(), torch.full_like(total, number, dtype=torch.double)])

    loss = parts.get(MEAN_LOSS, parts.get("loss"))
    t = parts.get("t")
    for name, value in parts.items():
        values = value.detach()
        if name == "loss" and loss is not None:
            add("loss", loss.detach() * count, count)
        elif values.ndim == 0 and name != MEAN_LOSS:
            add(name, values * count, count)
        elif values.ndim == 1 and name != "t":
            if name != "losses":
                add(name, values.sum(), len(values))
            if t is not None:
                quarter = (t * QUARTERS).ceil().long().clamp(1, QUARTERS) - 1
                rows = torch.stack([values.double(), torch.ones_like(values).double()])
                by_quarter = rows.new_zeros(2, QUARTERS).index_add_(1, quarter, rows)
                for i in range(QUARTERS):
                    label = f"{'loss' if name == 'losses' else name}_t_{i / QUARTERS:.2f}_{(i + 1) / QUARTERS:.2f}"
                    found[label] = by_quarter[:, i]
    return found


def copy_buffers(module: nn.Module) -> None:
    """Gives the running means and other buffers of the first process to all others; collective."""
    parameters = dict(module.named_parameters())
    for name, buffer in module.state_dict().items():
        if name not in parameters:
            torch.distributed.broadcast(buffer, 0)


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replaces gradients by their mean over all processes; collective."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def why_stopped(trainer: L.Trainer, outputs: Sequence[Mapping[str, Tensor]], in_a_row: int, rate: float) -> str:
    """What a person needs to find the cause of gradients that are not finite; collective.

    Args:
        trainer: Of the run.
        outputs: What `System.losses` returned for each batch of the newest step.
        in_a_row: Skipped steps.
        rate: Learning rate of the newest step.
    """
    step = trainer.global_step
    find = getattr(getattr(trainer, "datamodule", None), "images_of_step", None)
    images = [] if find is None else find(step)
    bad = bad_images(outputs, trainer.world_size)
    named = [image for image, is_bad in zip(images, bad, strict=False) if is_bad] or images
    what = "images with non-finite losses" if any(bad) else "images of that step"
    return (
        f"gradients were not finite in {in_a_row} steps in a row, the last of them step {step}, at a learning rate of "
        f"{rate:.3g}; {what}: {', '.join(map(str, named)) or 'not known'}; the weights of step {step - in_a_row} are "
        f"in {trainer.default_root_dir}/checkpoints/last.ckpt; lower the learning rate, or look at these images"
    )


def bad_images(outputs: Sequence[Mapping[str, Tensor]], world_size: int) -> list[bool]:
    """Whether the loss of each image of a step was not finite, in the order of the step; collective."""
    losses = [output["losses"] for output in outputs if "losses" in output]
    if not losses:
        return []
    # Gathered by rank; in a step the order is micro-batch, rank, image.
    by_rank = gather(torch.stack(losses).float()[None], world_size)
    return cast(list[bool], (~by_rank.isfinite()).transpose(0, 1).flatten().tolist())


def gather(tensor: Tensor, world_size: int) -> Tensor:
    """Joins a tensor, (n, ...), with those of the other W - 1 processes: (W n, ...), by rank; collective."""
    if world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def means(totals: Mapping[str, Tensor], world_size: int) -> dict[str, float]:
    """Means over all images of all processes, of which some may have had none; collective.

    Args:
        totals: As from `totals`, added up over the batches of this process.
        world_size: Number of processes.
    """
    own = {name: total.tolist() for name, total in totals.items()}
    parts: list[Any] = [own]
    if world_size > 1:
        parts = [None] * world_size
        torch.distributed.all_gather_object(parts, own)
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        sums, counts = zip(*(part[name] for part in parts if name in part), strict=True)
        if sum(counts):
            found[name] = sum(sums) / sum(counts)
    return found
