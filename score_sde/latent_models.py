"""Reads published latent diffusion models: Stable Diffusion 1 and 2, and those of latent diffusion.

A model is a folder of diffusers, or a single .safetensors or .ckpt file of latent-diffusion's code, best with its .yaml
of the same name beside it. Nothing in a file is run. Every mistake is a UserError of one line.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import yaml

from score_sde.errors import UserError, one_line
from score_sde.foreign import read_checkpoint
from score_sde.models import autoencoder, clip_text, published_latents


class Part(NamedTuple):
    """A network and its parameters, which have the floating-point types of the file."""

    network: nn.Module
    params: dict


class LatentModel(NamedTuple):
    """A published latent diffusion model.

    unet, autoencoder: its networks; text: its text encoder, or None
    classes: (K, D) the context of each class instead, or None; the last one is "no class"
    scale: the latents that the U-Net sees are those of the autoencoder times this
    sde: arguments of score_sde.sde.DiscreteVP; the U-Net is told the label "node"
    output: what the U-Net predicts, a key of denoiser.PARAMETERIZATIONS
    size: height and width of the latents that it was trained on; 0: not told
    tokenizer: the folder with its vocabulary, None where the file is all there is
    """

    unet: Part
    autoencoder: Part
    text: Part | None
    classes: np.ndarray | None
    scale: float
    sde: dict[str, Any]
    output: str
    size: int = 0
    tokenizer: pathlib.Path | None = None


def read(
    path: str | os.PathLike,
    *,
    variant: str = "",
    raw: bool = False,
    dtype: str = "float32",
    output: str = "",
    clip: str | os.PathLike | None = None,
    state: Mapping[str, np.ndarray] | None = None,
) -> LatentModel:
    """The model in a diffusers folder or a single file.

    variant: of the folder's files, as in "fp16" for *.fp16.safetensors; by default none, or fp16 if there is no other
    raw: take a single file's parameters themselves instead of their moving average, where it has both
    dtype: what the networks compute in
    output: "eps" or "v", for a single file of Stable Diffusion 2 without a .yaml, of which "v" (768 x 768) and "eps"
        (512 x 512) have the same shapes; by default "v"
    clip: for a single file, the folder with the tokenizer and, there or beside it in text_encoder/, the config.json of
        the text encoder, if it is not one of the published
    state: the entries of a single file that has been read already
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            return _folder(path, variant, dtype)
        state = _state(path) if state is None else state
        return _single_file(path, state, raw, dtype, output, pathlib.Path(clip) if clip else None)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        # a description with words for numbers, or numbers that no network has
        raise UserError(f"the description of the model in {path} makes no network: {one_line(error)}") from None


# -- folders of diffusers --

OUTPUTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What of a folder's files must be so, if it is told at all: part: its names and values.
EXPECTED = {
    "autoencoder": {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "text encoder": {"layer_norm_eps": 1e-5},
    "scheduler": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False, "trained_betas": None},
}
# Names of a folder's weights, the best first; {} is the variant, with a dot.
WEIGHTS = ("{}{}.safetensors", "{}{}.bin")


def _folder(folder: pathlib.Path, variant: str, dtype: str) -> LatentModel:
    index = _json(folder / "model_index.json")
    first_stage = "vqvae" if "vqvae" in index else "vae"
    configs = {}
    for part in ("unet", first_stage, "scheduler"):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        configs[part] = _json(folder / part / name)
    _expect("autoencoder", configs[first_stage])
    _expect("scheduler", configs["scheduler"])
    unet = published_latents.of_diffusers(configs["unet"], dtype=dtype)
    state = _weights(folder / "unet", "diffusion_pytorch_model", variant)
    unet = Part(unet, published_latents.from_published(state, unet))
    state = _weights(folder / first_stage, "diffusion_pytorch_model", variant)
    first = autoencoder.of_state(state, groups=configs[first_stage].get("norm_num_groups", 32), dtype=dtype)
    first = Part(first, autoencoder.from_published(state, first))
    text, tokenizer = None, None
    if unet.network.context_dim:
        state = _weights(folder / "text_encoder", "model", variant)
        text = _text(state, _json(folder / "text_encoder" / "config.json"), dtype)
        tokenizer = folder / "tokenizer"
        if not tokenizer.is_dir():
            raise UserError(f"{folder} has no tokenizer/: it should hold vocab.json and merges.txt")
    schedule = configs["scheduler"]
    predicts = schedule.get("prediction_type", "epsilon")
    if predicts not in OUTPUTS:
        raise UserError(f"the scheduler has prediction_type = {predicts!r}; known are {', '.join(OUTPUTS)}")
    default = 1.0 if first.network.num_codes else 0.18215
    return _checked(
        LatentModel(
            unet=unet,
            autoencoder=first,
            text=text,
            classes=None,
            scale=_number(configs[first_stage], "scaling_factor", default),
            sde=_schedule(
                _number(schedule, "beta_start"),
                _number(schedule, "beta_end"),
                int(_number(schedule, "num_train_timesteps", 1000)),
            ),
            output=OUTPUTS[predicts],
            size=int(_number(configs["unet"], "sample_size", 0)),
            tokenizer=tokenizer,
        )
    )


def _weights(folder: pathlib.Path, name: str, variant: str) -> dict[str, np.ndarray]:
    """The state_dict in a part's folder."""
    variants = [f".{variant}"] if variant else ["", ".fp16"]
    names = [one.format(name, which) for which in variants for one in WEIGHTS]
    if name == "model":  # transformers wrote .bin under another name
        names += [f"pytorch_model{which}.bin" for which in variants]
    for file in names:
        if (folder / file).is_file():
            return _state(folder / file)
    raise UserError(f"{folder} has none of {', '.join(names)}: this part of the model is missing")


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {one_line(error)}") from None
    return _mapping(content, str(path))


def _expect(part: str, config: Mapping[str, Any]) -> None:
    for name, expected in EXPECTED[part].items():
        if config.get(name, expected) != expected:
            raise UserError(f"the {part} has {name} = {config[name]!r}; known is {expected!r} alone")


def _text(state: Mapping[str, np.ndarray], config: Mapping[str, Any], dtype: str) -> Part:
    """The text encoder with a transformers' config.json, of CLIPTextModel or of CLIP as a whole."""
    config = _mapping(config.get("text_config", config), "text_config")
    _expect("text encoder", config)
    told = {"heads": "num_attention_heads", "activation": "hidden_act"}
    given = {ours: config[theirs] for ours, theirs in told.items() if theirs in config}
    network = clip_text.of_state(state, dtype=dtype, **given)
    return Part(network, clip_text.from_published(state, network))


# -- single files --

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
# Prefixes of text encoders: transformers' and OpenCLIP's.
TEXT = ("cond_stage_model.transformer.", "cond_stage_model.model.")
CLASSES = "cond_stage_model.embedding.weight"
# Betas by features of the context, where no .yaml tells them: Stable Diffusion's, and those of latent diffusion.
BETAS = {768: (0.00085, 0.012), 1024: (0.00085, 0.012), 1280: (0.00085, 0.012)}
LDM_BETAS = (0.0015, 0.0195)


def is_folder(path: str | os.PathLike) -> bool:
    """Whether this is a folder of diffusers, or what is left of one."""
    return any((pathlib.Path(path) / part).exists() for part in ("model_index.json", "unet"))


def is_single_file(state: Mapping[str, Any]) -> bool:
    """Whether these are the entries of a latent diffusion model's file, by their names."""
    return any(name.startswith(UNET) for name in state)


def _single_file(
    path: pathlib.Path,
    state: Mapping[str, np.ndarray],
    raw: bool,
    dtype: str,
    output: str,
    clip: pathlib.Path | None,
) -> LatentModel:
    described = _yaml(path.with_suffix(".yaml"))
    inside = lambda prefix: {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
    unet_state, first_state = inside(UNET), inside(FIRST_STAGE)
    if not unet_state or not first_state:
        missing = UNET if not unet_state else FIRST_STAGE
        raise UserError(f"{path} is no latent diffusion model: none of its {len(state)} names begins with {missing}")
    if not raw and any(name.startswith(EMA) for name in state):
        unet_state = {name: _average(state, name) for name in unet_state}
    config = _inner(described, "unet_config") or published_latents.description(unet_state)
    unet = published_latents.of_compvis(config, dtype=dtype)
    order = "new" if config.get("use_new_attention_order") else "legacy"
    unet = Part(unet, published_latents.from_published(unet_state, unet, order))
    first = autoencoder.of_state(first_state, dtype=dtype)
    first = Part(first, autoencoder.from_published(first_state, first))
    text = next((found for found in map(inside, TEXT) if found), None)
    if text is not None:
        text = _text(text, _clip_config(clip), dtype)
    start, end = BETAS.get(unet.network.context_dim, LDM_BETAS)
    start, end = _number(described, "linear_start", start), _number(described, "linear_end", end)
    scale = _number(described, "scale_factor", 1.0 if first.network.num_codes else 0.18215)
    if "scale_factor" in state:  # measured from data
        scale = float(np.asarray(state["scale_factor"], np.float64).reshape(-1)[0])
    predicts = "v" if unet.network.context_dim == 1024 and not described else "eps"
    model = LatentModel(
        unet=unet,
        autoencoder=first,
        text=text,
        classes=state.get(CLASSES),
        scale=scale,
        sde=_schedule(start, end, int(_number(described, "timesteps", 1000))),
        output=output or described.get("parameterization", predicts),
        size=int(_number(described, "image_size", 0)),
        tokenizer=clip,
    )
    if "betas" in state and not np.allclose(state["betas"].astype(np.float64), _betas(model.sde), rtol=2e-3):
        raise UserError(f"{path} has other betas than {start:g} to {end:g}: put its .yaml, of the same name, beside it")
    return _checked(model)


def _state(path: pathlib.Path) -> dict[str, np.ndarray]:
    state = read_checkpoint(path)
    if state.kind != "torch" or state.model is None:
        raise UserError(f"{path} is no latent diffusion model: it is a checkpoint of another kind ({state.kind})")
    return state.model | (state.ema or {})


def _average(state: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The moving average of a parameter of the U-Net, which the file keeps under its name without the dots."""
    flat = EMA + f"diffusion_model.{name}".replace(".", "")
    if flat not in state:
        raise UserError(f"the checkpoint has moving averages, but none of {name}; the parameters themselves are there")
    return state[flat]


def _yaml(path: pathlib.Path) -> dict[str, Any]:
    """The parameters of the model in latent-diffusion's .yaml; empty if there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    model = _mapping(_mapping(content, str(path)).get("model"), f"model in {path}")
    return _mapping(model.get("params"), f"model.params in {path}")


def _inner(described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of a part in a .yaml; empty if it tells none."""
    return _mapping(_mapping(described.get(name, {}), name).get("params", {}), f"{name}.params")


def _clip_config(clip: pathlib.Path | None) -> dict[str, Any]:
    """The text encoder's config.json in the folder of the tokenizer, or beside it; empty if there is none."""
    places = [] if clip is None else [clip / "config.json", clip.parent / "text_encoder" / "config.json"]
    return next((_json(place) for place in places if place.is_file()), {})


# -- both --


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} should hold names and values, not {one_line(value)!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise UserError(f"{name} should be a number, not {one_line(value)!r}")
    return float(value)


def _schedule(start: float, end: float, n: int) -> dict[str, Any]:
    """Arguments of DiscreteVP; see it for the scale of its betas."""
    if not (0 < start <= end < 1 and 1 < n <= 100_000):
        raise UserError(f"{n} steps of noise with betas from {start:g} to {end:g}: they should rise within (0, 1)")
    return dict(beta_min=start * n, beta_max=end * n, n=n, scaled=True, t_first=1 / n, t_min=1 / n)


def _betas(sde: Mapping[str, Any]) -> np.ndarray:
    ends = (np.sqrt(sde[name] / sde["n"]) for name in ("beta_min", "beta_max"))
    return np.linspace(*ends, sde["n"]) ** 2


def _checked(model: LatentModel) -> LatentModel:
    """The model, if its parts fit each other."""
    unet, first = model.unet.network, model.autoencoder.network
    if unet.out_channels != first.embed_dim:
        raise UserError(
            f"the parts do not fit: the U-Net gives {unet.out_channels} channels, "
            f"the autoencoder's latents have {first.embed_dim}"
        )
    if (channels := model.unet.params["input_0"]["kernel"].shape[2]) != first.embed_dim:
        raise UserError(
            f"the U-Net is told {channels} channels, but the autoencoder's latents have {first.embed_dim}: it is told "
            "more than x, as those that complete or enlarge images are"
        )
    if model.text is not None and model.text.network.width != unet.context_dim:
        raise UserError(
            f"the parts do not fit: the U-Net's context has {unet.context_dim} features, "
            f"the text encoder {model.text.network.width}"
        )
    if model.classes is not None and model.classes.shape[1:] != (unet.context_dim,):
        raise UserError(f"the classes have shape {model.classes.shape}, but the U-Net's context {unet.context_dim}")
    if unet.context_dim and model.text is None and model.classes is None:
        raise UserError("the U-Net has a context, but there is neither a text encoder nor a table of classes")
    if model.output not in ("eps", "v", "x0"):
        raise UserError(f"the U-Net predicts {model.output!r}; known are eps, v and x0")
    return model
