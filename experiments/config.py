"""What a config may hold: fields that some program reads, of the type of their defaults, within rules."""

import difflib
import importlib
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

import configs
from configs import base, models
from score_sde.errors import UserError

# What numbers must be, beyond their type: (what is expected, whether it is so, fields). `model` may lack some of them.
RULES = (
    (
        "a whole number of at least 1",
        lambda value: isinstance(value, int) and value >= 1,
        (
            *("data.image_size", "denoiser.num_scales"),
            *(f"training.{name}" for name in ("batch_size", "n_iters", "accumulate", "steps_per_call")),
            *(f"training.{name}_freq" for name in ("log", "eval", "checkpoint", "keep")),
            *(f"sampling.{name}" for name in ("steps", "num_samples", "batch_size", "pc_steps")),
            *(f"ems.{name}" for name in ("num_data", "batch_size", "own_steps")),
            *(f"eval.{name}" for name in ("num_data", "batch_size", "num_samples")),
            *(f"eval.likelihood.{name}" for name in ("num_data", "repeats", "num_probes")),
            *("model.nf", "model.num_res_blocks", "model.blocks_per_group", "model.channel_multiplier"),
            *("model.num_outputs", "model.patch_size", "model.num_scales", "model.channel_mult_emb"),
        ),
    ),
    ("a whole number from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64, ("seed",)),
    ("at least 2", lambda value: value >= 2, ("ems.nodes", "eval.fine_steps")),
    (
        "at least 0",
        lambda value: 0 <= value < float("inf"),
        (
            *("optim.warmup", "optim.weight_decay", "optim.eps", "training.cooldown", "training.kl_weight"),
            *("sampling.corrector_steps", "model.num_classes", "model.augment_dim", "model.channel_mult_noise"),
            *("latents.classes", "model.context_dim", "model.transformer_depth", "model.out_channels"),
            *("model.num_heads", "model.num_heads_upsample", "model.head_channels", "model.groups"),
        ),
    ),
    (
        "positive",
        lambda value: 0 < value < float("inf"),
        (
            *("optim.lr", "sampling.snr", "training.t_min", "denoiser.sigma_data", "latents.scale"),
            *(f"eval.likelihood.{name}" for name in ("t_min", "rtol", "atol")),
        ),
    ),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("optim.beta1", "training.label_dropout", "model.dropout")),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("training.ema_rate", "training.augment")),
    (
        "one or more whole numbers of at least 1",
        lambda values: len(values) > 0 and all(isinstance(value, int) and value >= 1 for value in values),
        ("model.ch_mult", "eval.steps"),
    ),
    (
        "the mean and the positive standard deviation of lam",
        lambda value: len(value) == 2 and abs(value[0]) < 100 and 0 < value[1] < 100,
        ("training.lam_normal",),
    ),
    (
        "relative widths between 0 and 0.288",
        lambda values: all(0 < value < 0.288 for value in values),
        ("training.power_ema",),
    ),
    (
        "a name or a path of this machine, no address in a cloud: mount it as a folder",
        lambda value: value is None or "://" not in value,
        ("data.dataset", "training.init", "latents.autoencoder"),
    ),
    ("stop or skip", lambda value: value in ("stop", "skip"), ("training.non_finite",)),
)

CONSTRUCTED = ("sde.", "model.", "autoencoder.", "text.")  # sections that are constructor arguments


def flat(config) -> dict:
    """Nested fields by dotted name."""
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, (ConfigDict, dict))
        fields |= {f"{key}.{k}": v for k, v in flat(value).items()} if nested else {key: value}
    return fields


def check_fields(config: ConfigDict, source: str):
    """Refuse fields that no program reads, by name; CONSTRUCTED are checked by what they construct."""
    known = flat(base.get_config())
    for field in flat(config):
        if field not in known and not field.startswith(CONSTRUCTED):
            near = difflib.get_close_matches(field, known, 1)
            raise UserError(f"{source}: unknown field {field}" + (f", did you mean {near[0]}?" if near else ""))


def check_values(config: ConfigDict, source: str = "the config"):
    """Refuse fields that are missing, of another type than their default, or outside RULES."""
    given, known = flat(config), flat(base.get_config())
    for field, default in known.items():
        if field.startswith(CONSTRUCTED) or default is None:
            continue
        if field not in given:
            raise UserError(f"{source} has no {field}: start from configs.base.get_config(), where it is {default!r}")
        if not fits(given[field], default):
            raise UserError(f"{field} of {source} is {given[field]!r}: expected a value like {default!r}")
    for expected, holds, fields in RULES:
        for field in fields:
            try:
                held = field not in given or holds(given[field])
            except TypeError:
                held = False
            if not held:
                raise UserError(f"{field} of {source} is {given[field]!r}: expected {expected}")


def fits(value, default) -> bool:
    """Whether a value is of the type of a default; whole numbers are numbers, and lists, as JSON has them, tuples."""
    kinds = {float: (int, float), tuple: (tuple, list)}
    kind = kinds.get(type(default), type(default))
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)


def package_configs() -> Iterator[tuple[str, ConfigDict]]:
    """Every config of this package, with its file as it is given to --config."""
    folder = pathlib.Path(configs.__file__).parent
    for path in sorted(folder.rglob("[!_]*.py")):
        module = importlib.import_module(".".join(path.relative_to(folder.parent).with_suffix("").parts))
        if module not in (base, models):
            yield str(path.relative_to(folder.parent)), module.get_config()


def portable(config: ConfigDict | dict) -> ConfigDict:
    """A config that names its data set and the model it starts from, not where this machine keeps them.

    The network computes in float32, whatever it was trained in: a CPU has no faster type, and EMS need it.
    """
    config = ConfigDict(config).copy_and_resolve_references()
    if "dtype" in config.model:
        config.model.dtype = "float32"
    path = pathlib.Path(config.data.dataset)
    config.data.dataset = path.stem if path.is_absolute() or path.suffix else config.data.dataset
    config.data.data_dir = None
    for section, field in ((config.training, "init"), (config.get("latents", {}), "autoencoder")):
        folder = section.get(field)
        if folder is not None and pathlib.Path(folder).is_absolute():
            section[field] = pathlib.Path(folder).name
    return config


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"
