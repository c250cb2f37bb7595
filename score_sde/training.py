"""The training step: denoising score matching, Adam with warm-up and clipping, EMA; data-parallel.

Every random draw of a step is a function of the seed, the step and the example's index in the global batch, so that a
run depends neither on the number of devices nor, bit for bit, on where it was resumed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from score_sde import losses, parallel
from score_sde.sde import SDE


class State(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # () int32, steps done
    params: Any
    ema: Any  # exponential moving average of params; what sampling uses
    opt_state: optax.OptState


class Draws(NamedTuple):
    """The random numbers of a batch."""

    t: jax.Array  # (B,)
    z: jax.Array  # (B, H, W, C)
    data: jax.Array  # (B,) keys of the data's own randomness (flips, dequantization)
    dropout: jax.Array  # (B,) keys


def make_optimizer(
    *, lr: float, beta1: float, eps: float, warmup: int, grad_clip: float, weight_decay: float
) -> optax.GradientTransformation:
    """Adam as published: lr * min(step / warmup, 1), gradients clipped by global norm (no clipping if negative).

    Weight decay is decoupled, as in the official JAX code.
    """
    schedule = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else lr
    adam = optax.adamw(schedule, b1=beta1, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(grad_clip), adam) if grad_clip >= 0 else adam


def init_state(params, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step; EMA starts at the parameters."""
    return State(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def update_ema(ema, params, step, *, rate: float, warmup: bool):
    """rate * ema + (1 - rate) * params after `step` steps; with warmup the rate is at most (1 + step) / (10 + step).

    The official JAX code keeps the rate constant, the PyTorch code warms it up.
    """
    if warmup:
        rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, ema, 1.0 - rate)


def draw(key, index, shape, times: Callable) -> Draws:
    """The draws of examples numbered `index` (B,) in the global batch, of image `shape`; times: key -> t."""

    def of_example(i):
        time, noise, data, dropout = jax.random.split(jax.random.fold_in(key, i), 4)
        return Draws(times(time), jax.random.normal(noise, shape), data, dropout)

    return jax.vmap(of_example)(index)


def drop_labels(keys, y, *, rate: float, null: int):
    """Class labels y (B,), each replaced by `null` with probability `rate`, drawn from its example's key (B,).

    So that one network learns the conditional and the unconditional model (Ho & Salimans 2022, algorithm 1).
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 0), rate))(keys)
    return jnp.where(dropped, jnp.asarray(null, y.dtype), y)


def make_loss(
    noise_of: Callable,
    sde: SDE,
    preprocess: Callable,
    *,
    continuous: bool,
    num_scales: int,
    t_min: float,
    likelihood_weighting: bool,
    reduce_mean: bool,
    label_dropout: float = 0.0,
    null_label: int = 0,
) -> Callable:
    """(params, batch, key, train) -> loss of each example (B,).

    noise_of: (params, class labels (B,), dropout keys (B,) or None) -> NoiseFn.
    preprocess: (key, uint8 image) -> float image in the model's data range.
    batch: {"image": (B, H, W, C) uint8, "index": (B,) place in the global batch}, and "label" (B,) if there are any.
    continuous: times in (t_min, t_max); else among the num_scales nodes of the chain.
    label_dropout: probability that training hides an example's label, as null_label.
    """

    def times(key):
        return losses.draw_time(key, (), t_min=t_min, t_max=sde.t_max, num_scales=None if continuous else num_scales)

    def loss(params, batch, key, train: bool):
        draws = draw(key, batch["index"], batch["image"].shape[1:], times)
        x0 = jax.vmap(preprocess)(draws.data, batch["image"])
        y = batch.get("label")
        if train and label_dropout:
            y = drop_labels(draws.dropout, y, rate=label_dropout, null=null_label)
        noise = noise_of(params, y, draws.dropout if train else None)
        return losses.denoising_score_matching(
            noise, sde, x0, draws.t, draws.z, likelihood_weighting=likelihood_weighting, reduce_mean=reduce_mean
        )

    return loss


def make_classifier_loss(logits_of: Callable, sde: SDE, preprocess: Callable, *, t_min: float) -> Callable:
    """(params, batch, key, train) -> cross-entropy of each example (B,) at times uniform in (t_min, t_max).

    logits_of: params -> (x, t) -> (B, K). batch: as for `make_loss`, with "label".
    """

    def loss(params, batch, key, train: bool):
        times = lambda key: losses.draw_time(key, (), t_min=t_min, t_max=sde.t_max)
        draws = draw(key, batch["index"], batch["image"].shape[1:], times)
        x0 = jax.vmap(preprocess)(draws.data, batch["image"])
        return losses.cross_entropy(logits_of(params), sde, x0, draws.t, draws.z, batch["label"])

    return loss


def make_step(loss: Callable, optimizer, seed: int, *, ema_rate: float, ema_warmup: bool) -> Callable:
    """(state, batches) -> (state, metrics): one step for each batch along the leading axis of `batches`.

    Several steps a call save dispatch on accelerators. On CPU take one: convolution gradients inside a loop are 20
    times slower there, and a single step is not put in a loop. Run it through `parallel.pmap`.
    """

    def step(state: State, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean_loss = lambda params: loss(params, batch, key, True).mean()
        value, gradient = jax.value_and_grad(mean_loss)(state.params)
        value, gradient = parallel.mean((value, gradient))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step + 1, rate=ema_rate, warmup=ema_warmup)
        metrics = {"loss": value, "gradient norm": optax.global_norm(gradient)}
        return State(state.step + 1, params, ema, opt_state), metrics

    def steps(state: State, batches):
        if len(batches["image"]) > 1:
            return jax.lax.scan(step, state, batches)
        state, metrics = step(state, jax.tree.map(lambda b: b[0], batches))
        return state, jax.tree.map(lambda m: m[None], metrics)

    return steps
