"""A config becomes objects; a mistake in it is named here, before any work."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.config import check_values, flat, shown
from score_sde import denoiser, losses, models, sources, space, training
from score_sde.data import Images
from score_sde.denoiser import Diffusion, NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.guidance import Classifier
from score_sde.models.classifier import CLASSIFIERS, LOGITS
from score_sde.sde import SDE, SDES
from score_sde.space import Space


def is_classifier(config: ConfigDict) -> bool:
    """Whether a config's `model` is a noise-conditional classifier, not a model of images."""
    return config.model.get("name") in CLASSIFIERS


def diffusion_of(config: ConfigDict) -> Diffusion:
    """The model of a config."""
    sde = _valid_sde(config)
    hidden, num_classes = config.training.label_dropout, config.model.get("num_classes", 0)
    if hidden and not num_classes:
        raise UserError(f"training.label_dropout is {hidden}: expected 0 unless model.num_classes is set")
    network, pixels = network_of(config), space_of(config)

    def noise_of(params, y=None, dropout_keys=None) -> NoiseFn:
        y = y if num_classes else None
        apply = lambda x, label: network.apply({"params": params}, x, label, y, dropout_keys)
        return denoiser.noise_fn(apply, sde, data_range=(pixels.low, pixels.high), **config.denoiser)

    init = _valid_init(config, network, pixels.shape)
    if not num_classes:
        return Diffusion(sde, pixels, init, noise_of)
    null = np.int32(num_classes) if hidden else None
    return Diffusion(sde, pixels, init, noise_of, null, denoiser.by_turns(num_classes), num_classes)


def classifier_of(config: ConfigDict) -> Classifier:
    """The classifier of a config."""
    sde = _valid_sde(config)
    network, pixels = network_of(config), space_of(config)
    apply = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
    init = _valid_init(config, network, pixels.shape)
    logits_of = lambda params: LOGITS[config.model.name](apply(params), sde, config.denoiser)
    return Classifier(sde, pixels, init, logits_of, config.model.num_outputs)


def trainable(config: ConfigDict) -> Diffusion | Classifier:
    """What a config trains."""
    return classifier_of(config) if is_classifier(config) else diffusion_of(config)


def network_of(config: ConfigDict):
    """The network of a config, a flax Module, not tried on anything yet."""
    if is_classifier(config):
        return construct(CLASSIFIERS, config.model, "classifier")
    return construct(models.MODELS, config.model, "network")


def sde_of(config: ConfigDict) -> SDE:
    """The SDE of a config, refused unless time runs from data to noise in it, in float32 too."""
    sde = construct(SDES, config.sde, "SDE")
    times = np.linspace(sde.t_min, sde.t_max, 64)
    with np.errstate(all="ignore"):
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


def space_of(config: ConfigDict, *, dequantize: bool | None = None) -> Space:
    """The pixels of a config's images; dequantize: if not as data.uniform_dequantization says."""
    fields = config.data
    dequantize = fields.uniform_dequantization if dequantize is None else dequantize
    shape = (fields.image_size, fields.image_size, fields.num_channels)
    return space.pixels(shape, centered=fields.centered, dequantize=dequantize)


def images_of(config: ConfigDict, split: str) -> Images:
    """A split of a config's data set, as uint8 images, whose labels are classes of the network if it has any."""
    keys = ("image_size", "num_channels", "resize", "crop", "data_dir")
    images = sources.load(config.data.dataset, split, **{key: config.data[key] for key in keys})
    field = "num_outputs" if is_classifier(config) else "num_classes"
    num_classes = config.model.get(field, 0)
    return checked_labels(images, num_classes, f"model.{field}") if num_classes else images


def loss_of(config: ConfigDict, trained: Diffusion | Classifier) -> Callable:
    """(params, batch, key, train) -> loss of each example (B,) of what a config trains."""
    fields, told, sde = config.training, config.denoiser, trained.sde

    def preprocess(key, image):
        image = space.random_flip(key, image) if config.data.random_flip else image
        return trained.space.encode(key, image)

    def times(key):
        return losses.TIMES[fields.times](key, (), sde, fields.t_min, told.num_scales, fields.lam_normal)

    def weight(t):
        own = denoiser.coefficients(told.output, sde, t, told.sigma_data)
        return losses.WEIGHTS[fields.weight](sde, t, own)

    if is_classifier(config):
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
    )


def construct(table: dict, section: ConfigDict, what: str):
    """table[section.name](**section), with the mistakes that a config can make in it named."""
    arguments = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in section.items()}
    name = arguments.pop("name", None)
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: use one of {', '.join(table)}")
    try:
        return table[name](**arguments)
    except TypeError as error:
        raise UserError(f"{what} {name!r}: {' '.join(str(error).split())}") from None


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
    if not is_classifier(config):
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
    init = jax.jit(lambda key: network.init(key, jnp.zeros((1, *shape)), jnp.ones((1,)))["params"])
    try:
        jax.eval_shape(init, jax.random.key(0))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(
            f"no network with {shown(config.model.to_dict())} takes images of {shape}: {one_line(error)}"
        ) from None
    return init
