"""Reads a network's config.json as diffusers writes it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_lit.networks import ADMUNet
from diffusion_lit.networks.layers import level_channels

Fixed = Mapping[str, tuple[object, object]]
"""By key, the value that a network here needs, and the value that a missing key has in diffusers."""

AVERAGE = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
"""How `EMAModel` averaged the weights, in the configuration of a folder `unet_ema`; it changes no output."""


NULL_LABEL = "_null_label"
"""Key by which an export says that the last of the class embeddings is that of "no class"; diffusers ignores it."""


def differences(config: Mapping[str, Any], fixed: Fixed, read: Collection[str]) -> list[str]:
    """What in a configuration differs from what a network needs, or is not known.

    Args:
        config: The configuration.
        fixed: What the network needs.
        read: Further keys, which are read.
    """
    different = [
        f"{key}={config.get(key, missing)!r} where ours has {ours!r}"
        for key, (ours, missing) in fixed.items()
        if config.get(key, missing) != ours and (key, config.get(key)) != ("act_fn", "swish")
    ]
    known = {*fixed, *read, *AVERAGE}
    different += [
        f"{key}={value!r}, which is not known here"
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value not in (None, False)
    ]
    return different


def whole_numbers(config: Mapping[str, Any], key: str, missing: Any) -> Any:
    """A positive whole number, or a list of such where that is what a missing key means; ValueError otherwise."""
    value = config.get(key, missing)
    numbers = value if isinstance(missing, list) else [value]
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"{key}={value!r} in the configuration must be whole numbers above 0")
    return value


def image_size(config: Mapping[str, Any], missing: int | None) -> int:
    """The height of square images, `sample_size`; ValueError if it is anything else."""
    size = config.get("sample_size", missing)
    size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if type(size) is not int:
        raise ValueError(f"sample_size={size!r}: our networks need the height of square images; write it into the file")
    return size


def levels_of(config: Mapping[str, Any], missing: list[int]) -> tuple[int, list[int | float]]:
    """The arguments `width` and `multipliers` of a network with the channels `block_out_channels`.

    Raises:
        ValueError: If the channels are no whole numbers, or no multiples of the first.
    """
    channels = whole_numbers(config, "block_out_channels", missing)
    width = channels[0]
    multipliers = [c // width if c % width == 0 else c / width for c in channels]
    if level_channels(width, multipliers) != channels:
        raise ValueError(f"block_out_channels={channels}: ours are multiples of the first")
    return width, multipliers


class Blocks(NamedTuple):
    """Names of the blocks of encoder and decoder, without attention and with it."""

    down: tuple[str, str]
    up: tuple[str, str]

    def types(self, attended: Sequence[bool]) -> dict[str, list[str]]:
        """What a configuration says of levels, from full resolution, of which some have attention."""
        down, up = ([kinds[has] for has in attended] for kinds in (self.down, self.up))
        return {"down_block_types": down, "up_block_types": up[::-1]}

    def attended(self, config: Mapping[str, Any], levels: int, missing: Sequence[bool]) -> list[int]:
        """The levels with attention, from full resolution; ValueError unless encoder and decoder agree."""
        given = {key: list(config.get(key, kinds)) for key, kinds in self.types(missing).items()}
        attended = [i for i, kind in enumerate(given["down_block_types"]) if kind == self.down[1]]
        if given != self.types([i in attended for i in range(levels)]):
            raise ValueError(
                f"{' and '.join(f'{key}={kinds}' for key, kinds in given.items())}: our {levels} levels have "
                f"{self.down[0]} and {self.up[0]}, or with attention {self.down[1]} and {self.up[1]}, in both the same"
            )
        return attended


def channels_of(config: Mapping[str, Any], missing: int) -> dict[str, int]:
    """The arguments `in_channels`, `out_channels` and `concat_channels` of an `ADMUNet`.

    Where the input has more channels than the output, those beyond are concatenated.
    """
    given = whole_numbers(config, "in_channels", missing)
    out = whole_numbers(config, "out_channels", missing)
    return {"in_channels": min(given, out), "out_channels": out, "concat_channels": max(given - out, 0)}


def classes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `num_classes` and `null_label` of an `ADMUNet`.

    Diffusers counts a null label as one more class; that it is one is known of exports of this program alone.
    """
    if config.get("num_class_embeds") is None:
        return {"num_classes": None}
    has_null = config.get(NULL_LABEL) is True
    classes = whole_numbers(config, "num_class_embeds", None) - has_null
    return {"num_classes": classes, **({"null_label": True} if has_null else {})}


def class_configuration(network: ADMUNet) -> dict[str, Any]:
    """What a config.json says of the classes of an `ADMUNet`."""
    if network.num_classes is None:
        return {"num_class_embeds": None}
    rows = {"num_class_embeds": network.label_emb.num_embeddings}
    return {**rows, **({NULL_LABEL: True} if network.has_null_label else {})}


def with_null_label(network: dict[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A network's configuration, of whose classes the last is the null label if a recipe's network has one.

    Args:
        network: Class and arguments.
        recipe: The network of a recipe, likewise; {}: there is none.
    """
    arguments = network["init_args"]
    asked = (recipe.get("init_args") or {}).get("null_label") is True
    if not asked or arguments.get("num_classes") is None or arguments.get("null_label"):
        return network
    changed = {"num_classes": arguments["num_classes"] - 1, "null_label": True}
    return {**network, "init_args": {**arguments, **changed}}
