"""Translates checkpoints of version 0.1.0, so that their models still sample and can be scored."""

from collections.abc import Mapping
from typing import Any

FORMAT = 2
"""Written into every checkpoint; version 0.1.0 wrote none."""
LOADER = ("batch_size", "num_workers", "flip", "seed", "on_corrupt", "eval_batch_size")

_OF_SOURCES = ("root", "download", "image_size", "channels", "val_root", "in_memory", "category", "file")
RENAMED: dict[str, str] = {
    "frechet": "evaluation",
    "frechet.num_images": "evaluation.training_num_images",
    "frechet.sampler": "evaluation.training_sampler",
    "model.network.label_dropout": "model.conditioner.dropout",
    "model.objective.history": "model.objective.times.history",
    "model.objective.uniform": "model.objective.times.uniform",
    "model.learning_rate": "model.optimizer.lr",
    "model.lr": "model.optimizer.lr",
    "lr": "model.optimizer.lr",
    "batch_size": "data.batch_size",
    **{
        name: f"trainer.{name}" for name in ("max_steps", "max_epochs", "accelerator", "devices", "precision", "logger")
    },
    **{f"data.{name}": f"data.source.{name}" for name in _OF_SOURCES},
}
"""Keys of version 0.1.0 that have another name now, and names that others use; without init_args."""


def upgrade(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of version 0.1.0 as the present version writes it; tensors keep their names."""
    config = checkpoint.get("config")
    new = {**checkpoint, "config": upgrade_config(config) if isinstance(config, dict) else config}
    if isinstance(checkpoint.get("callbacks"), dict):
        new["callbacks"] = {name: state for name, state in checkpoint["callbacks"].items() if name != "Frechet"}
    return new


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint of version 0.1.0 carries, with today's keys."""
    new = {name: value for name, value in config.items() if name != "frechet"}
    if isinstance(config.get("model"), dict):
        new["model"] = _model(config["model"])
    if isinstance(config.get("data"), dict) and str(config["data"].get("class_path")).startswith("diffusion_lit.data."):
        new["data"] = _data(config["data"])
    if isinstance(config.get("frechet"), dict):
        new["evaluation"] = _evaluation(config["frechet"], config.get("evaluation") or {})
    return new


def _arguments(part: Any) -> dict[str, Any]:
    return dict(part.get("init_args") or {}) if isinstance(part, dict) else {}


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _arguments(model)
    network = arguments.get("network")
    if isinstance(network, dict) and "label_dropout" in _arguments(network):
        inner = _arguments(network)
        dropout = inner.pop("label_dropout")
        arguments["network"] = {**network, "init_args": {**inner, "null_label": dropout > 0}}
        arguments["conditioner"] = {"class_path": "diffusion_lit.conditioner.Labels", "init_args": {"dropout": dropout}}
    objective = arguments.get("objective")
    if isinstance(objective, dict) and str(objective.get("class_path")).endswith(".VariationalBound"):
        inner = _arguments(objective)
        times = {name: inner.pop(name) for name in ("history", "uniform") if name in inner}
        if times:
            inner["times"] = {"class_path": "diffusion_lit.diffusion.LossSecondMoment", "init_args": times}
        arguments["objective"] = {**objective, "init_args": inner}
    return {**model, "init_args": arguments}


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _arguments(data)
    loader = {name: arguments.pop(name) for name in LOADER if name in arguments}
    arguments.pop("on_device", None)
    source = {"class_path": data.get("class_path"), "init_args": arguments}
    return {"class_path": "diffusion_lit.data.ImageData", "init_args": {"source": source, **loader}}


def _evaluation(frechet: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: frechet[name] for name in ("extractor", "reference", "cache_dir", "at_start") if name in frechet}
    new = {**evaluation, **shared}
    if evaluation.get("every_n_steps") is not None and "num_images" in evaluation:
        new["training_num_images"] = evaluation["num_images"]
    if frechet.get("every_n_steps") is not None:
        new["every_n_steps"] = frechet["every_n_steps"]
        new["training_sampler"] = frechet.get("sampler")
        if "num_images" in frechet:
            new["training_num_images"] = frechet["num_images"]
    return new
