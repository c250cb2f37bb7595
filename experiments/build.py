"""A config becomes objects; a mistake in it is named here, before any work."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import parts
from experiments.config import check_values, flat, shown
from score_sde import denoiser, latents, losses, models, sources, space, training
from score_sde.augmentation import NUM_LABELS, augment
from score_sde.data import Images
from score_sde.denoiser import Diffusion, NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.guidance import Classifier
from score_sde.latents import Coder
from score_sde.models.autoencoder import AUTOENCODERS, Autoencoder
from score_sde.models.classifier import CLASSIFIERS, LOGITS
from score_sde.models.clip_text import CLIPText
from score_sde.models.names import shapes_of
from score_sde.sde import SDE, SDES
from score_sde.space import Space


def kind_of(config: ConfigDict) -> str:
    """What a config's `model` is: "classifier", "autoencoder", or "model" of images."""
    tables = {"classifier": CLASSIFIERS, "autoencoder": AUTOENCODERS}
    return next((kind for kind, table in tables.items() if config.model.get("name") in table), "model")


def diffusion_of(config: ConfigDict, folder: pathlib.Path | None = None, autoencoder: dict | None = None) -> Diffusion:
    """The model of a config; folder: of its run, where the other parts of a latent model are.

    autoencoder: its parameters, if not those in the folder.
    """
    sde = _valid_sde(config)
    network, told = network_of(config), _condition_of(config, folder)
    hidden = config.training.label_dropout
    if hidden and not told.num_classes:
        raise UserError(f"training.label_dropout is {hidden}: expected 0 unless model.num_classes is set")
    if config.training.augment and config.model.get("augment_dim", 0) != NUM_LABELS:
        raise UserError(
            f"training.augment is {config.training.augment}: expected 0 unless the network is told of it, "
            f"model.augment_dim = {NUM_LABELS}"
        )
    x_space = space_of(config, folder, autoencoder)
    bounded = np.isfinite([x_space.low, x_space.high]).all()
    data_range = (x_space.low, x_space.high) if bounded else (-1.0, 1.0)  # latents reach the network as they are

    def noise_of(params, y=None, dropout_keys=None, **labels) -> NoiseFn:
        y, more = told.network_input(y)
        apply = lambda x, label: network.apply({"params": params}, x, label, y, dropout_keys, **more, **labels)
        return denoiser.noise_fn(apply, sde, data_range=data_range, **config.denoiser)

    init = _valid_init(config, network, x_space.shape)
    return Diffusion(sde, x_space, init, noise_of, told.null, told.conditions, told.num_classes)


class _Condition(NamedTuple):
    """What a network is told beside x and the time; the last three are fields of Diffusion."""

    network_input: Callable = lambda y: (None, {})  # condition -> the y of the network, and its further arguments
    null: Any = None
    conditions: Callable = lambda index: None
    num_classes: int = 0


def _condition_of(config: ConfigDict, folder: pathlib.Path | None) -> _Condition:
    """Nothing, classes, the context that a table has of each class, or one from prompts (experiments/prompts.py).

    Or small images to be enlarged, with classes (experiments/upsampling.py).
    """
    as_it_is = lambda y: (y, {})
    if config.model.get("low_res"):
        return _Condition(_enlarged, conditions=_base_samples_needed, num_classes=config.model.num_classes)
    if config.text:
        return _Condition(as_it_is, conditions=_prompts_needed)
    if features := config.model.get("context_dim", 0):
        table = _parts(folder, parts.CLASSES, {"table": (config.latents.classes + 1, features)})["table"]
        null = np.int32(config.latents.classes)
        context = lambda y: (None if y is None else jnp.asarray(table)[y][:, None], {})
        return _Condition(context, null, denoiser.by_turns(config.latents.classes), config.latents.classes)
    if not (classes := config.model.get("num_classes", 0)):
        return _Condition()
    null = np.int32(classes) if config.training.label_dropout else None
    return _Condition(as_it_is, null, denoiser.by_turns(classes), classes)


def _enlarged(condition):
    match condition:
        case {"y": y, "low_res": low_res}:
            return y, {"low_res": low_res}
    return _base_samples_needed(condition)


def _base_samples_needed(index):
    raise UserError(
        "this model enlarges small images: draw by sample.py --base_samples=FILE; other programs cannot yet"
    )


def _prompts_needed(index):
    raise UserError("this model draws what prompts say: give --prompt='...' or --prompts=FILE, one a line")


def classifier_of(config: ConfigDict) -> Classifier:
    """The classifier of a config."""
    sde = _valid_sde(config)
    network, pixels = network_of(config), space_of(config)
    apply = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
    init = _valid_init(config, network, pixels.shape)
    logits_of = lambda params: LOGITS[config.model.name](apply(params), sde, config.denoiser)
    return Classifier(sde, pixels, init, logits_of, config.model.num_outputs)


def coder_of(config: ConfigDict) -> Coder:
    """The autoencoder that a config trains."""
    check_values(config)
    network, fields = network_of(config), config.data
    if network.num_codes:
        raise UserError(
            f"model.num_codes is {network.num_codes}: a codebook is not trained here, a KL autoencoder is: set it to 0"
        )
    if network.channels != fields.num_channels:
        raise UserError(
            f"model.channels is {network.channels}, data.num_channels {fields.num_channels}: make them equal"
        )
    latents.require_whole(network, fields.image_size, fields.image_size)
    pixels = space.pixels((fields.image_size, fields.image_size, fields.num_channels))
    return Coder(network, pixels, _valid_init(config, network, pixels.shape))


def trainable(config: ConfigDict, autoencoder: dict | None = None) -> Diffusion | Classifier | Coder:
    """What a config trains; autoencoder: the parameters of the one in whose latents it is trained, if any."""
    if kind_of(config) == "model":
        return diffusion_of(config, autoencoder=autoencoder)
    return classifier_of(config) if kind_of(config) == "classifier" else coder_of(config)


def network_of(config: ConfigDict):
    """The network of a config, a flax Module, not tried on anything yet."""
    table = {"classifier": CLASSIFIERS, "autoencoder": AUTOENCODERS, "model": models.MODELS}[kind_of(config)]
    return construct(table, config.model, "network")


def sde_of(config: ConfigDict) -> SDE:
    """The SDE of a config, refused unless time runs from data to noise in it, in float32 too."""
    sde = construct(SDES, config.sde, "SDE")
    times = np.linspace(sde.t_min, sde.t_max, 64)
    falls = inverts = False
    with np.errstate(all="ignore"), contextlib.suppress(ZeroDivisionError):  # of Python's own numbers
        lam = sde.lam(times)
        falls = np.isfinite(lam).all() and (np.diff(lam) < 0).all() and np.isfinite(sde.lam(np.float32(times))).all()
        inverts = np.allclose(sde.t_of_lam(lam), times, rtol=1e-4, atol=1e-6)
    if not (0 < sde.t_min < sde.t_max and falls and inverts):
        raise UserError(
            f"there is no SDE with {shown(config.sde.to_dict())}: expected 0 < t_min < t_max, and alpha / sigma "
            "positive and falling between them"
        )
    if not config.training.t_min < sde.t_max:
        raise UserError(f"training.t_min is {config.training.t_min}: expected less than the SDE's end, {sde.t_max:g}")
    return sde


def autoencoder_of(config: ConfigDict) -> Autoencoder:
    """The autoencoder of a latent model's config."""
    return instantiate(Autoencoder, config.autoencoder, "autoencoder")


def text_encoder_of(config: ConfigDict, folder: pathlib.Path) -> tuple[CLIPText, dict]:
    """The text encoder of a run, and its parameters."""
    network = instantiate(CLIPText, config.text, "text encoder")
    shapes = shapes_of(network, jax.ShapeDtypeStruct((1, network.length), jnp.int32))
    return network, _parts(folder, parts.TEXT, shapes)


def _parts(folder: pathlib.Path | None, name: str, shapes) -> dict:
    if folder is None:
        raise UserError("a published latent model is sampled and measured from its run folder; it is not trained here")
    return parts.load(folder, name, shapes)


def autoencoder_params(config: ConfigDict, folder: pathlib.Path | None) -> dict:
    """The parameters of a latent model's autoencoder, from the folder of its run; empty for a model of pixels."""
    if not config.autoencoder:
        return {}
    network = autoencoder_of(config)
    image = jax.ShapeDtypeStruct((1, network.factor, network.factor, network.channels), jnp.float32)
    return _parts(folder, parts.AUTOENCODER, shapes_of(network, image))


def space_of(config: ConfigDict, folder: pathlib.Path | None = None, autoencoder: dict | None = None) -> Space:
    """Where x of a config's model lives: pixels, or latents of the autoencoder in the folder of its run.

    autoencoder: its parameters, if not those in the folder; inside of `jax.jit` they may be arguments.
    """
    if config.latents.autoencoder and not config.autoencoder:
        raise UserError(f"only training opens the autoencoder {config.latents.autoencoder}: train this config first")
    if not config.autoencoder:
        return pixels_of(config)
    params = autoencoder_params(config, folder) if autoencoder is None else autoencoder
    size = config.data.image_size
    return latents.space(autoencoder_of(config), params, config.latents.scale, size, size)


def pixels_of(config: ConfigDict, *, dequantize: bool | None = None) -> Space:
    """The pixels of a config's images; dequantize: if not as data.uniform_dequantization says."""
    if config.autoencoder:
        raise UserError("this model is one of latents, whose density says nothing of pixels: it has no bits/dim")
    fields = config.data
    dequantize = fields.uniform_dequantization if dequantize is None else dequantize
    shape = (fields.image_size, fields.image_size, fields.num_channels)
    return space.pixels(shape, centered=fields.centered, dequantize=dequantize)


def images_of(config: ConfigDict, split: str, *, tell: bool = True) -> Images:
    """A split of a config's data set, as uint8 images, whose labels are classes of the network if it has any.

    tell: say what was passed over in the set, and which class each label is.
    """
    if not config.data.dataset:
        raise UserError("this model was imported without its images: name them, --dataset_at=FOLDER")
    keys = ("image_size", "num_channels", "resize", "crop", "data_dir", "skip_damaged")
    try:
        images = sources.load(config.data.dataset, split, **{key: config.data[key] for key in keys})
    except sources.DamagedImage as error:
        raise UserError(f"{error}: restore it, or pass over damaged images, data.skip_damaged=True") from error
    if tell:
        say(images)
    field = "num_outputs" if kind_of(config) == "classifier" else "num_classes"
    num_classes = config.model.get(field, 0)
    return checked_labels(images, num_classes, f"model.{field}") if num_classes else images


def say(images: Images):
    """Print what a user should know of a data set: what was passed over in it, and which class each label is."""
    over = [f"{images.name}: passed over {len(images.damaged)} damaged image(s)"] if images.damaged else []
    print("".join(f"{line}\n" for line in [*images.notes, *over, *class_lines(images.classes)]), end="")


def class_lines(classes: Sequence[str] | None, most: int = 20) -> list[str]:
    """A line of the names of labels 0, 1, ..., shortened if they are many; none if their names are their numbers."""
    if not classes or list(classes) == list(map(str, range(len(classes)))):
        return []
    shown = [f"{label} {name}" for label, name in enumerate(classes)]
    if len(shown) > most:
        shown = [*shown[: most - 1], "...", shown[-1]]
    return [f"classes: {', '.join(shown)}".encode(errors="replace").decode()]


def loss_of(config: ConfigDict, trained: Diffusion | Classifier | Coder, autoencoder: dict | None = None) -> Callable:
    """(params, batch, key, train) -> loss of each example (B,) of what a config trains.

    autoencoder: the parameters of a latent model's, if not those of `trained`, in which they are constants.
    """
    fields, told = config.training, config.denoiser
    x_space = space_of(config, autoencoder=autoencoder) if autoencoder else trained.space

    def preprocess(key, image):
        image = space.random_flip(key, image) if config.data.random_flip else image
        return x_space.encode(key, image)

    if kind_of(config) == "autoencoder":
        return training.make_autoencoder_loss(trained.network, preprocess, kl_weight=fields.kl_weight)
    sde = trained.sde

    def times(key):
        return losses.TIMES[fields.times](key, (), sde, fields.t_min, told.num_scales, fields.lam_normal)

    def weight(t):
        own = denoiser.coefficients(told.output, sde, t, told.sigma_data)
        return losses.WEIGHTS[fields.weight](sde, t, own)

    if kind_of(config) == "classifier":
        return training.make_classifier_loss(trained.logits_of, sde, preprocess, times=times)
    return training.make_loss(
        trained.noise_of,
        sde,
        preprocess,
        times=times,
        weight=weight,
        reduce_mean=fields.reduce_mean,
        label_dropout=fields.label_dropout,
        null=trained.null,
        augment=functools.partial(augment, probability=fields.augment) if fields.augment else None,
    )


def construct(table: dict, section: ConfigDict, what: str):
    """table[section.name](**section), with the mistakes that a config can make in it named."""
    name = section.get("name")
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: use one of {', '.join(table)}")
    return instantiate(table[name], {key: value for key, value in section.items() if key != "name"}, f"{what} {name!r}")


def instantiate(constructor: Callable, section: ConfigDict | dict, what: str):
    """constructor(**section), with arguments that it does not take named."""
    arguments = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in section.items()}
    try:
        return constructor(**arguments)
    except TypeError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


def checked_labels(images: Images, num_classes: int, field: str) -> Images:
    """Images whose labels are refused unless they are classes of the network."""

    def take(indices):
        batch = images.take(indices)
        if "label" not in batch:
            raise UserError(f"{images.name} has no labels, but {field} is {num_classes}: choose labelled images, or 0")
        if batch["label"].max() >= num_classes:
            raise UserError(
                f"{images.name} has the label {batch['label'].max()}, but {field} is {num_classes}: "
                "labels count from 0, so set it to the largest label + 1"
            )
        return batch

    take(np.arange(1))
    return images._replace(take=take)


def _valid_sde(config: ConfigDict) -> SDE:
    """The SDE, with all else refused that can be before there is a network.

    That is what names no row of the four tables, and a chain that ends where alpha is 0.
    """
    check_values(config)
    sde, fields = sde_of(config), flat(config)
    for field, table in (
        ("denoiser.output", denoiser.PARAMETERIZATIONS),
        ("denoiser.label", denoiser.LABELS),
        ("training.times", losses.TIMES),
        ("training.weight", losses.WEIGHTS),
    ):
        name = fields[field]
        if name not in table:
            raise UserError(f"unknown {field} {name!r}: use one of {', '.join(table)}")
    if kind_of(config) == "model":
        _refuse_lost_data(config, sde)
    with np.errstate(divide="ignore"):
        data_left = np.isfinite(sde.log_alpha(np.float64(1)))
    if config.training.times == "chain" and not data_left:
        raise UserError(
            f"training.times is 'chain', whose last node is t = 1, where alpha of the SDE {config.sde.name} is 0: "
            "use uniform or lam_normal"
        )
    return sde


def _refuse_lost_data(config: ConfigDict, sde: SDE):
    """Refuse outputs that say nothing of x_0 where alpha is 0 in float32, if the SDE comes there."""
    given = config.sde.get("t_max", type(sde).t_max)
    with np.errstate(all="ignore"):
        lost = config.sde.get("zero_terminal_snr", False) or sde.alpha(np.float64(given)) < np.finfo(np.float32).eps
        end = np.float64(1e-6), np.float64(1)  # alpha and sigma
        out = denoiser.PARAMETERIZATIONS[config.denoiser.output](*end, config.denoiser.sigma_data).out
    if lost and abs(out) > 1e-3:  # else it vanishes with alpha, so that x_0 is told as exactly as F
        rescaled = config.sde.get("zero_terminal_snr", False)
        remedy = "leave out zero_terminal_snr" if rescaled else f"end at sde.t_max={np.floor(999 * sde.t_max) / 1000:g}"
        raise UserError(
            f"denoiser.output is {config.denoiser.output!r}, which says nothing of the data where alpha is 0, as it is "
            f"at the end of the SDE {config.sde.name} in float32: use v or x0, or {remedy}"
        )


def _valid_init(config: ConfigDict, network, shape: tuple[int, int, int]) -> Callable:
    """key -> parameters before training; refused if the network cannot take images of this shape."""

    @jax.jit
    def init(key):
        time = () if kind_of(config) == "autoencoder" else (jnp.ones((1,)),)
        return network.init(key, jnp.zeros((1, *shape)), *time)["params"]

    try:
        jax.eval_shape(init, jax.random.key(0))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(
            f"no network with {shown(config.model.to_dict())} takes images of {shape}: {one_line(error)}"
        ) from None
    return init
