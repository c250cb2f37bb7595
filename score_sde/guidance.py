"""What bends a model while sampling: each function takes NoiseFns, (x, t) -> eps, and returns one.

They compose: guidance first, then a guidance interval, then thresholding, which sees what the solver would see. A
`Guidance` is the choice of them as a value; `guide` applies it to a whole Diffusion.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import Diffusion, NoiseFn, by_turns
from score_sde.errors import UserError
from score_sde.losses import log_probability
from score_sde.sde import SDE, per_image
from score_sde.space import Space

OF_CLASSES = "train a model that has, python train.py --config=configs/digits_conditional.py"


class Classifier(NamedTuple):
    """A classifier of noisy images without its config, as a Diffusion is a model without its own."""

    sde: SDE
    space: Space
    init: Callable  # key -> params before training
    logits_of: Callable  # params -> (x (B, H, W, C), t) -> logits (B, num_classes)
    num_classes: int


class Guidance(NamedTuple):
    """How a model is bent while sampling; by default not at all."""

    scale: float | None = None  # of classifier-free guidance, of the classifier's gradient, or of autoguidance
    interval: tuple[float, float] | None = None  # times outside which there is none, see `within`
    threshold: str | None = None  # a key of THRESHOLDS: keeps data predictions in the data range
    classifier: Classifier | None = None  # guides in the place of the model's own unconditional part
    weaker: Diffusion | None = None  # guides likewise, by `autoguidance`

    @property
    def beside(self) -> bool:
        """Whether something with parameters of its own guides: a classifier, or a weaker model."""
        return self.classifier is not None or self.weaker is not None

    @property
    def own_scale(self) -> float | None:
        """The scale of classifier-free guidance; None where there is none, as 1 is the model itself."""
        return None if self.beside or self.scale == 1 else self.scale


def guide(diffusion: Diffusion, guidance: Guidance) -> Diffusion:
    """The model bent by `guidance`; with a classifier or a weaker model its params are the pair (model's, theirs).

    A conditional model is guided by a classifier towards the classes that condition it. UserError where the model or
    the classifier cannot do it.
    """
    scale, interval, threshold, classifier, weaker = guidance
    if scale is not None and not np.isfinite(scale):
        raise UserError(f"guidance {scale:g}: expected a number, as in --guidance=2.0")
    if threshold is not None:
        if threshold not in THRESHOLDS:
            raise UserError(f"unknown threshold {threshold!r}: use one of {', '.join(THRESHOLDS)}")
        check_range(diffusion.space.low, diffusion.space.high)
    if classifier is not None and weaker is not None:
        raise UserError("a classifier and a weaker model cannot guide at once: choose one of them")
    if scale is not None and not guidance.beside and not diffusion.num_classes and diffusion.null is None:
        raise UserError(f"guidance {scale:g}: this model has no classes: {OF_CLASSES}")
    if guidance.own_scale is not None and diffusion.null is None:
        raise UserError(
            f"guidance {scale:g}: this model never saw a hidden label, so it has no unconditional part: "
            "train with --config.training.label_dropout=0.1"
        )
    if classifier is not None and diffusion.num_classes not in (0, classifier.num_classes):
        raise UserError(
            f"a classifier of {classifier.num_classes} classes cannot guide a model of {diffusion.num_classes}"
        )
    if weaker is not None:
        check_weaker(diffusion, weaker, scale)

    def noise_of(params, condition=None, keys=None) -> NoiseFn:
        own = condition
        if guidance.beside:
            params, theirs = params
        if classifier is not None:
            own = condition if diffusion.num_classes else None
        plain = bent = diffusion.noise_of(params, own, keys)
        if classifier is not None:
            towards = log_probability(classifier.logits_of(theirs), condition)
            bent = classifier_guidance(plain, diffusion.sde, towards, 1.0 if scale is None else scale)
        elif weaker is not None:
            bent = autoguidance(plain, weaker.noise_of(theirs, condition), scale)
        elif guidance.own_scale is not None:
            bent = classifier_free(lambda y: diffusion.noise_of(params, y), condition, diffusion.null, scale)
        if interval is not None:
            bent = within(plain, bent, *interval)
        if threshold is not None:
            bent = THRESHOLDS[threshold](bent, diffusion.sde, diffusion.space.low, diffusion.space.high)
        return bent

    classes = {}
    if classifier is not None and not diffusion.num_classes:
        classes = dict(num_classes=classifier.num_classes, conditions=by_turns(classifier.num_classes))
    return diffusion._replace(noise_of=noise_of, **classes)


def classifier_guidance(noise: NoiseFn, sde: SDE, log_probability: Callable, scale: float = 1.0) -> NoiseFn:
    """eps - scale sigma_t grad_x log p(y | x, t) (Song et al. 2021, eq. 14; Dhariwal & Nichol 2021, algorithm 2).

    log_probability: (x (B, H, W, C), t (B,)) -> (B,), in nats, each from its own image alone.
    """

    def guided(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x)
        return noise(x, t) - scale * per_image(sde.sigma(t), x) * gradient

    return guided


def classifier_free(noise_of: Callable, y, null, scale: float) -> NoiseFn:
    """eps_null + scale (eps_y - eps_null), both from one call on twice the batch (Ho & Salimans 2022, eq. 6).

    noise_of: condition, a tree of (N, ...) -> NoiseFn on N images.
    y: condition, a tree of (B, ...), class labels say; null: the same tree that says nothing, broadcast to its shapes.
    scale: in the convention of the DPM-Solver papers, one more than Ho & Salimans' w: 1 is the conditional model,
        evaluated alone; 0 the unconditional one.
    """
    if scale == 1:
        return noise_of(y)
    both = lambda own, none: jnp.concatenate([own, jnp.broadcast_to(jnp.asarray(none, own.dtype), own.shape)])
    noise = noise_of(jax.tree.map(both, jax.tree.map(jnp.asarray, y), null))

    def guided(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        conditional, unconditional = jnp.split(noise(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


def autoguidance(noise: NoiseFn, weaker: NoiseFn, scale: float) -> NoiseFn:
    """weaker + scale (noise - weaker): away from the errors that a model shares with a weaker one of its kind.

    weaker: a smaller or less trained model of the same data and condition (Karras et al. 2024, 2406.02507, eq. 3).
    scale: 1 is `noise`, evaluated alone; the paper's w.
    """
    if scale == 1:
        return noise

    def guided(x, t):
        below = weaker(x, t)
        return below + scale * (noise(x, t) - below)

    return guided


def check_weaker(diffusion: Diffusion, weaker: Diffusion, scale: float | None):
    """Refuse to guide by a model of other images, or without a scale."""
    if scale is None:
        raise UserError("autoguidance needs a scale above 1: --guidance=2.0")
    for what, theirs, ours in (
        ("sde", weaker.sde, diffusion.sde),
        ("image_shape", weaker.space.shape, diffusion.space.shape),
        ("data_range", weaker.space[3:], diffusion.space[3:]),
        ("number of classes", weaker.num_classes, diffusion.num_classes),
    ):
        if theirs != ours:
            raise UserError(f"the {what} of the weaker model is {theirs}, the model's {ours}: train one like the other")


def within(noise: NoiseFn, guided: NoiseFn, t_low: float, t_high: float) -> NoiseFn:
    """`guided` at times in (t_low, t_high], `noise` at others (Kynkaanniemi et al. 2024, eq. 6).

    One of the two is evaluated where t is (), as in every sampler; for different times (B,) in a batch both are.
    """

    def chosen(x, t):
        inside = (t_low < t) & (t <= t_high)
        if jnp.ndim(t) == 0:
            return jax.lax.cond(inside, guided, noise, x, t)
        return jnp.where(per_image(inside, x), guided(x, t), noise(x, t))

    return chosen


def static_threshold(noise: NoiseFn, sde: SDE, low: float, high: float) -> NoiseFn:
    """The eps whose data prediction is that of `noise`, clipped to the data range [low, high] (Saharia et al. 2022)."""
    return _on_data_prediction(noise, sde, low, high, lambda u: jnp.clip(u, -1.0, 1.0))


def dynamic_threshold(
    noise: NoiseFn, sde: SDE, low: float, high: float, *, quantile: float = 0.995, minimum: float = 1.0
) -> NoiseFn:
    """The eps of a dynamically thresholded data prediction (Saharia et al. 2022, sec. 2.3).

    With u the data prediction mapped from the data range [low, high] to [-1, 1], and s the larger of `minimum` and the
    `quantile` of |u| over an image: u <- clip(u, -s, s) / s. Where s is 1 this is the static threshold.
    """

    def threshold(u):
        s = jnp.maximum(jnp.quantile(jnp.abs(u).reshape(len(u), -1), quantile, axis=1), minimum)
        s = per_image(s, u)
        return jnp.clip(u, -s, s) / s

    return _on_data_prediction(noise, sde, low, high, threshold)


def _on_data_prediction(noise: NoiseFn, sde: SDE, low: float, high: float, threshold: Callable) -> NoiseFn:
    """The NoiseFn whose data prediction is `threshold` of that of `noise`, mapped from the data range to [-1, 1]."""
    check_range(low, high)
    middle, half = (low + high) / 2, (high - low) / 2

    def thresholded(x, t):
        eps = noise(x, t)
        alpha, sigma = per_image(sde.alpha(t), x), per_image(sde.sigma(t), x)
        u = ((x - sigma * eps) / alpha - middle) / half
        # eps + ..., not (x - alpha x0) / sigma: what no threshold touches stays the same bit for bit
        return eps + half * alpha / sigma * (u - threshold(u))

    return thresholded


def check_range(low: float, high: float):
    """Refuse to threshold data that have no range."""
    if not (np.isfinite([low, high]).all() and low < high):
        raise UserError(
            f"thresholding data in [{low}, {high}]: expected a bounded range, which latents do not have: leave it out"
        )


THRESHOLDS = {"dynamic": dynamic_threshold, "static": static_threshold}
