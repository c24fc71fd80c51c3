"""Process, parameterization and sampler as the configuration of diffusers' DDPM, DDIM and PNDM schedulers.

Diffusers gives its network index 0 for what we call k = 1, as our process does.
"""

from collections.abc import Mapping
from typing import Any

from diffusion_lit.diffusion import (
    DDIM,
    PLMS,
    X0,
    Ancestral,
    Cosine,
    DiscreteProcess,
    Eps,
    FixedLarge,
    FixedSmall,
    Leading,
    LearnedRange,
    Linear,
    Parameterization,
    Process,
    Sampler,
    ScaledLinear,
    Spanning,
    Trailing,
    Uniform,
    V,
)
from diffusion_lit.diffusion.grid import Grid
from diffusion_lit.diffusion.schedule import Schedule
from diffusion_lit.networks import ADMUNet, UNet
from diffusion_lit.tools.diffusers_config import differences
from diffusion_lit.tools.unet2d import out_channels

DDPM_CLASS, DDIM_CLASS, PNDM_CLASS = "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"
CLASSES = (DDPM_CLASS, DDIM_CLASS, PNDM_CLASS)
COSINE = "squaredcos_cap_v2"
SCHEDULES = {"linear": Linear, "scaled_linear": ScaledLinear}
PREDICTIONS = {"epsilon": Eps, "sample": X0, "v_prediction": V}
LEADING = "leading"
SPACINGS = {LEADING: Uniform, "trailing": Trailing, "linspace": Spanning}
VARIANCES = {
    "fixed_small": FixedSmall,
    "fixed_small_log": FixedSmall,
    "fixed_large": FixedLarge,
    "learned_range": LearnedRange,
}

FIXED: dict[str, tuple[object, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False, None),
    "rescale_betas_zero_snr": (False, None),
}
"""By key, the values with which a scheduler has an equal here; the first is that of a missing key."""

READ = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "clip_sample_range",
    "prediction_type", "timestep_spacing", "variance_type", "steps_offset", "set_alpha_to_one",
    "skip_prk_steps",
)  # fmt: skip
UNUSED = ("dynamic_thresholding_ratio", "sample_max_value", "tensor_format")


def part(cls: type, **init_args: Any) -> dict[str, Any]:
    """The configuration of a part: its class, by name, and its arguments."""
    return {"class_path": cls.__name__, "init_args": init_args}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configurations of process, parameterization and sampler that a scheduler has.

    Args:
        config: Its scheduler_config.json; a missing key has its default in diffusers.

    Raises:
        ValueError: If it has no equal here.
    """
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(
            f"the scheduler is a {kind}; only {', '.join(CLASSES)} have an equal here. It is a matter of the sampler, "
            f"not of the weights: save it as another, {DDIM_CLASS}.from_config(pipeline.scheduler.config)"
        )
    refused = [
        f"{key}={config.get(key, allowed[0])!r} where only {allowed[0]!r} is known"
        for key, allowed in FIXED.items()
        if config.get(key, allowed[0]) not in allowed
    ]
    # A PNDMScheduler never clips.
    clip = kind != PNDM_CLASS and config.get("clip_sample", True)
    if kind == PNDM_CLASS:
        if not config.get("skip_prk_steps", False):
            refused.append("skip_prk_steps=False where only True is known")
        if config.get("prediction_type", "epsilon") != "epsilon":
            refused.append(f"prediction_type={config['prediction_type']!r} where only 'epsilon' is known")
    if clip and config.get("clip_sample_range", 1.0) != 1.0:
        refused.append(f"clip_sample_range={config['clip_sample_range']!r} where only 1.0 is known")
    refused += differences(config, {}, (*FIXED, *READ, *UNUSED))
    if refused:
        raise ValueError(f"this {kind} has no equal here: {'; '.join(refused)}")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"num_train_timesteps={steps!r} of the {kind} is not a whole number above 0")
    prediction = choose("prediction_type", config.get("prediction_type", "epsilon"), PREDICTIONS)
    return {
        "process": part(DiscreteProcess, num_steps=steps, schedule=schedule_of(config)),
        "parameterization": part(prediction),
        "sampler": sampler_of(config, steps, bool(clip)),
    }


def choose(key: str, value: Any, choices: Mapping[str, type]) -> type:
    """The class that has the meaning of a value in diffusers; ValueError if there is none."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={value!r} has no equal here; known are {', '.join(choices)}")
    return choices[value]


def schedule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a scheduler's noise schedule."""
    name = config.get("beta_schedule", "linear")
    if name == COSINE:
        return part(Cosine)
    cls = choose("beta_schedule", name, {**SCHEDULES, COSINE: Cosine})
    return part(cls, beta_start=config.get("beta_start", 1e-4), beta_end=config.get("beta_end", 0.02))


def sampler_of(config: Mapping[str, Any], num_steps: int, clip: bool) -> dict[str, Any]:
    """The configuration of a scheduler's sampler; all steps for DDPM, else 50, as diffusers' pipelines do."""
    grid = grid_of(config)
    if config["_class_name"] == DDIM_CLASS:
        return part(DDIM, steps=min(50, num_steps), grid=grid, clip=clip)
    if config["_class_name"] == PNDM_CLASS:
        return part(PLMS, steps=min(50, num_steps), grid=grid, clip=clip)
    variance = choose("variance_type", config.get("variance_type", "fixed_small"), VARIANCES)
    return part(Ancestral, steps=None, variance=part(variance), grid=grid, clip=clip)


def grid_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the grid of a scheduler's sampler.

    Raises:
        ValueError: If it has no equal here.
    """
    spacing = config.get("timestep_spacing", LEADING)
    kind = config["_class_name"]
    # Of a DDPMScheduler the last step always leads to clean data.
    clean = kind == DDPM_CLASS or config.get("set_alpha_to_one", kind == DDIM_CLASS)
    if spacing != LEADING:
        grid = part(choose("timestep_spacing", spacing, SPACINGS))
        if not clean:
            raise ValueError(f"set_alpha_to_one=False has no equal here with timestep_spacing={spacing!r}")
        return grid
    offset = config.get("steps_offset", 0) or 0
    if type(offset) is not int or offset < 0 or type(clean) is not bool:
        raise ValueError(
            f"steps_offset={offset!r} must be a whole number, at least 0, and set_alpha_to_one={clean!r} true or false"
        )
    return part(Leading, offset=offset, clean=clean) if offset or not clean else part(Uniform)


def grid_configuration(grid: Grid) -> dict[str, Any]:
    """What a scheduler_config.json says of a grid; one that diffusers lacks becomes "leading"."""
    spacings = {cls.__name__: name for name, cls in SPACINGS.items()}
    return {
        "timestep_spacing": spacings.get(type(grid).__name__, LEADING),
        "steps_offset": grid.offset if isinstance(grid, Leading) else 0,
        # Of no account to a DDPMScheduler, and kept by it for the DDIMScheduler that is made from it.
        "set_alpha_to_one": not isinstance(grid, Leading) or grid.clean,
    }


def ddim_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a `DDIMScheduler` of that of a `DDPMScheduler`; ValueError for a learned variance."""
    if config["variance_type"] == "learned_range":
        raise ValueError("diffusers has no pipeline over latents with a learned variance; use --to safetensors")
    rest = {key: value for key, value in config.items() if key != "variance_type"}
    return {**rest, "_class_name": DDIM_CLASS}


def configuration(
    process: Process, parameterization: Parameterization, sampler: Sampler, network: UNet | ADMUNet
) -> dict[str, Any]:
    """The scheduler_config.json of a `DDPMScheduler`, from which a `DDIMScheduler` can be made too.

    Args:
        process: The model's.
        parameterization: The model's.
        sampler: Its clipping and grid are written, and, if it is ancestral, its variance; else the small variance is.
        network: The channels of its output say whether it has learned the variance.

    Raises:
        ValueError: If diffusers has no such process, parameterization or output.
    """
    predictions = {cls: name for name, cls in PREDICTIONS.items()}
    if type(parameterization) not in predictions:
        raise ValueError(
            f"diffusers has no {type(parameterization).__name__}: its schedulers know {', '.join(PREDICTIONS)}"
        )
    if not isinstance(process, DiscreteProcess):
        raise ValueError(
            f"diffusers has no {type(process).__name__}: {DDPM_CLASS} and {DDIM_CLASS} have a chain of steps, as "
            "DiscreteProcess; use --to safetensors"
        )
    if process.network_steps not in (None, process.num_steps):
        raise ValueError(
            f"diffusers has no process.network_steps={process.network_steps}: its networks get the index among "
            f"{process.num_steps} steps"
        )
    return {
        "_class_name": DDPM_CLASS,
        "num_train_timesteps": process.num_steps,
        **schedule_configuration(process.schedule, process.num_steps),
        "prediction_type": predictions[type(parameterization)],
        "variance_type": variance_type(sampler, network),
        "clip_sample": sampler.clip,
        "clip_sample_range": 1.0,
        **grid_configuration(sampler.grid),
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def schedule_configuration(schedule: Schedule, num_steps: int) -> dict[str, Any]:
    """A scheduler's noise schedule: its name, or its betas where diffusers has no name for it."""
    names = {cls: name for name, cls in SCHEDULES.items()}
    if isinstance(schedule, Linear | ScaledLinear) and type(schedule) in names:
        name = names[type(schedule)]
        return {"beta_schedule": name, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    if type(schedule) is Cosine and schedule.offset == 0.008:
        return {"beta_schedule": COSINE}
    return {"trained_betas": schedule.betas(num_steps).tolist()}


def variance_type(sampler: Sampler, network: UNet | ADMUNet) -> str:
    """The name of the reverse variance; ValueError if the network's output has no meaning in diffusers."""
    channels, out = network.in_channels, out_channels(network)
    if out == 2 * channels:
        return "learned_range"
    if out != channels:
        raise ValueError(
            f"diffusers has no scheduler for out_channels={out} of images with {channels} channels; "
            f"it has for {channels} and {2 * channels}"
        )
    large = isinstance(sampler, Ancestral) and type(sampler.variance) is FixedLarge
    return "fixed_large" if large else "fixed_small"
