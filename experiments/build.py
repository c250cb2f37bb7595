"""A config becomes objects; a mistake in it is named here, before any work."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.config import check_values, flat, shown
from score_sde import data, denoiser, guidance, losses, models, sources, training
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.models.classifier import CLASSIFIERS, logits_fn
from score_sde.sde import SDE, SDES


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


class Experiment(NamedTuple):
    """What a config stands for."""

    config: ConfigDict
    sde: SDE
    network: object  # a flax Module: (x, label, y, dropout keys) -> (B, H, W, C), or a classifier's
    noise_of: Callable | None  # (params, class labels (B,) or None, dropout keys (B,) or None) -> NoiseFn
    logits_of: Callable | None = None  # of a classifier, in its place: params -> (x, t) -> logits (B, classes)

    @property
    def num_classes(self) -> int:
        """Of a class-conditional network, whose label for "no class" this is too, or of a classifier; else 0."""
        return self.config.model.get("num_outputs" if self.logits_of else "num_classes", 0)

    @property
    def data_range(self) -> tuple[float, float]:
        return range_of(self.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return image_shape(self.config)

    def init_params(self, seed: int):
        """Parameters before training."""
        return jax.jit(self._init)(jax.random.key(seed))

    def params_template(self):
        """Shapes and types of the parameters."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def _init(self, key):
        x = jnp.zeros((1, *self.image_shape))
        return self.network.init(key, x, jnp.ones((1,)))["params"]

    def to_uint8(self, x) -> np.ndarray:
        return np.asarray(data.to_uint8(x, centered=self.config.data.centered))

    def preprocess(self, key, image, *, flip: bool | None = None):
        """A uint8 image as the model sees it; `flip` overrides the config's random flips."""
        fields = self.config.data
        return data.preprocess(
            key,
            image,
            random_flip=fields.random_flip if flip is None else flip,
            uniform_dequantization=fields.uniform_dequantization,
            centered=fields.centered,
        )

    def as_seen(self, keys, images):
        """uint8 images (B, H, W, C) as the model sees them, unflipped; keys (B,) of their dequantization."""
        return jax.vmap(lambda key, image: self.preprocess(key, image, flip=False))(keys, images)

    def images(self, split: str) -> data.Images:
        fields = self.config.data
        images = sources.load(
            fields.dataset,
            split,
            image_size=fields.image_size,
            num_channels=fields.num_channels,
            resize=fields.resize,
            crop=fields.crop,
            data_dir=fields.data_dir,
        )
        field = "model.num_outputs" if self.logits_of else "model.num_classes"
        return checked_labels(images, self.num_classes, field) if self.num_classes else images

    def classes(self, index, label: int | None = None):
        """Classes (B,) of samples numbered `index`: `label`, or all by turns; None for a network without classes."""
        if not self.num_classes:
            return None
        return index % self.num_classes if label is None else jnp.full_like(index, label)

    def guided(self, params, y, scale: float, interval: tuple[float, float] | None = None) -> NoiseFn:
        """The class-conditional network guided towards classes y (B,), at times in `interval` alone if given."""
        conditional = lambda y: self.noise_of(params, y)
        guided = guidance.classifier_free(conditional, y, self.num_classes, scale)
        return guided if interval is None else guidance.within(conditional(y), guided, *interval)

    def loss(self) -> Callable:
        """(params, batch, key, train) -> loss of each example (B,)."""
        fields, told = self.config.training, self.config.denoiser

        def times(key):
            return losses.TIMES[fields.times](key, (), self.sde, fields.t_min, told.num_scales, fields.lam_normal)

        def weight(t):
            own = denoiser.coefficients(told.output, self.sde, t, told.sigma_data)
            return losses.WEIGHTS[fields.weight](self.sde, t, own)

        if self.logits_of:
            return training.make_classifier_loss(self.logits_of, self.sde, self.preprocess, times=times)
        return training.make_loss(
            self.noise_of,
            self.sde,
            self.preprocess,
            times=times,
            weight=weight,
            reduce_mean=fields.reduce_mean,
            label_dropout=fields.label_dropout,
            null_label=self.num_classes,
        )


def checked_labels(images: data.Images, num_classes: int, field: str) -> data.Images:
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


def build(config: ConfigDict) -> Experiment:
    """The objects of a config; mistakes in it are named here, before any work."""
    check_values(config)
    sde = build_sde(config)
    check_rows(config, sde)
    if config.model.get("name") in CLASSIFIERS:
        return build_classifier(config, sde)
    hidden = config.training.label_dropout
    if hidden and not config.model.get("num_classes"):
        raise UserError(f"training.label_dropout is {hidden}: expected 0 unless model.num_classes is set")
    network, data_range = build_network(config), range_of(config)

    def noise_of(params, y=None, dropout_keys=None) -> NoiseFn:
        y = y if config.model.get("num_classes") else None
        apply = lambda x, label: network.apply({"params": params}, x, label, y, dropout_keys)
        return denoiser.noise_fn(apply, sde, data_range=data_range, **config.denoiser)

    return checked_network(Experiment(config, sde, network, noise_of))


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of a config's images."""
    return (config.data.image_size, config.data.image_size, config.data.num_channels)


def range_of(config: ConfigDict) -> tuple[float, float]:
    """Lowest and highest value of a config's data, as its model sees them."""
    return (-1.0, 1.0) if config.data.centered else (0.0, 1.0)


def check_rows(config: ConfigDict, sde: SDE):
    """Refuse what names no row of the four tables, and a chain that ends where alpha is 0."""
    fields = flat(config)
    for field, table in (
        ("denoiser.output", denoiser.PARAMETERIZATIONS),
        ("denoiser.label", denoiser.LABELS),
        ("training.times", losses.TIMES),
        ("training.weight", losses.WEIGHTS),
    ):
        name = fields[field]
        if name not in table:
            raise UserError(f"unknown {field} {name!r}: use one of {', '.join(table)}")
    with np.errstate(divide="ignore"):
        data_left = np.isfinite(sde.log_alpha(np.float64(1)))
    if config.training.times == "chain" and not data_left:
        raise UserError(
            f"training.times is 'chain', whose last node is t = 1, where alpha of the SDE {config.sde.name} is 0: "
            "use uniform or lam_normal"
        )


def build_network(config: ConfigDict):
    """The network of a config, a flax Module, not tried on anything yet."""
    return construct(models.MODELS, config.model, "network")


def build_sde(config: ConfigDict) -> SDE:
    """The SDE of a config, refused unless time runs from data to noise in it."""
    sde = construct(SDES, config.sde, "SDE")
    with np.errstate(all="ignore"):
        lam = sde.lam(np.linspace(sde.t_min, sde.t_max, 64))
    if not (0 < sde.t_min < sde.t_max and np.isfinite(lam).all() and (np.diff(lam) < 0).all()):
        raise UserError(
            f"there is no SDE with {shown(config.sde.to_dict())}: expected 0 < t_min < t_max, and alpha / sigma "
            "positive and falling between them"
        )
    if not config.training.t_min < sde.t_max:
        raise UserError(f"training.t_min is {config.training.t_min}: expected less than the SDE's end, {sde.t_max:g}")
    return sde


def checked_network(experiment: Experiment) -> Experiment:
    """The experiment, refused if its network cannot take its images."""
    try:
        experiment.params_template()
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(
            f"no network with {shown(experiment.config.model.to_dict())} takes images of {experiment.image_shape}: "
            f"{one_line(error)}"
        ) from None
    return experiment


def build_classifier(config: ConfigDict, sde: SDE) -> Experiment:
    """The objects of a config whose `model` is a noise-conditional classifier."""
    network = construct(CLASSIFIERS, config.model, "classifier")
    apply = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
    return checked_network(Experiment(config, sde, network, None, lambda params: logits_fn(apply(params), sde)))
