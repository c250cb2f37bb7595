"""The training step: denoising score matching, Adam with warm-up and clipping, EMA; data-parallel.

Every random draw of a step is a function of the seed, the step and the example's index in the global batch, so that a
run depends neither on the number of devices nor, bit for bit, on where it was resumed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from score_sde import losses, parallel, power_ema, seeds
from score_sde.sde import SDE, per_image


class State(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # () int32, steps done
    params: Any
    ema: Any  # exponential moving average of params; what sampling uses
    opt_state: optax.OptState
    power_ema: tuple = ()  # averages of params by power functions (score_sde/power_ema.py)


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


def init_state(params, optimizer: optax.GradientTransformation, *, power_averages: int = 0) -> State:
    """The state before the first step; all averages start at the parameters."""
    copies = tuple(jax.tree.map(jnp.copy, params) for _ in range(1 + power_averages))
    return State(jnp.zeros((), jnp.int32), params, copies[0], optimizer.init(params), copies[1:])


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


def hide_conditions(keys, condition, *, rate: float, null):
    """A condition, a tree of (B, ...), in which `null` takes the place of an example's with probability `rate`.

    Drawn from each example's key (B,). One network so learns the conditional and the unconditional model (Ho &
    Salimans 2022, algorithm 1).
    """
    hidden = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 0), rate))(keys)
    return jax.tree.map(
        lambda own, none: jnp.where(per_image(hidden, own), jnp.asarray(none, own.dtype), own), condition, null
    )


def make_loss(
    noise_of: Callable,
    sde: SDE,
    preprocess: Callable,
    *,
    times: Callable,
    weight: Callable,
    reduce_mean: bool,
    label_dropout: float = 0.0,
    null=None,
    augment: Callable | None = None,
) -> Callable:
    """(params, batch, key, train) -> loss of each example (B,).

    noise_of: (params, condition, dropout keys (B,) or None) -> NoiseFn.
    preprocess: (key, uint8 image) -> float image in the model's data range.
    batch: {"image": (B, H, W, C) uint8, "index": (B,) place in the global batch}, and "label" (B,) if there are any.
    times: key -> t, the time of one example (`losses.TIMES`); weight: t (B,) -> (B,) (`losses.WEIGHTS`).
    reduce_mean: see `losses.denoising_score_matching`.
    label_dropout: probability that training hides an example's condition, by `null`.
    augment: (key, x_0) -> (x_0, labels of what was done), in training; `noise_of` then takes `augment`, the labels.
    """

    def loss(params, batch, key, train: bool):
        shape = jax.eval_shape(preprocess, key, batch["image"][0]).shape  # of latents another than the image's
        draws = draw(key, batch["index"], shape, times)
        x0 = jax.vmap(preprocess)(draws.data, batch["image"])
        y = batch.get("label")
        if train and label_dropout:
            y = hide_conditions(draws.dropout, y, rate=label_dropout, null=null)
        labels = {}
        if train and augment is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(draws.data)
            x0, labels["augment"] = jax.vmap(augment)(keys, x0)
        noise = noise_of(params, y, draws.dropout if train else None, **labels)
        return losses.denoising_score_matching(
            noise, sde, x0, draws.t, draws.z, weight=weight(draws.t), reduce_mean=reduce_mean
        )

    return loss


def make_classifier_loss(logits_of: Callable, sde: SDE, preprocess: Callable, *, times: Callable) -> Callable:
    """(params, batch, key, train) -> cross-entropy of each example (B,).

    logits_of: params -> (x, t) -> (B, K). times, and batch with "label": as for `make_loss`.
    """

    def loss(params, batch, key, train: bool):
        draws = draw(key, batch["index"], batch["image"].shape[1:], times)
        x0 = jax.vmap(preprocess)(draws.data, batch["image"])
        return losses.cross_entropy(logits_of(params), sde, x0, draws.t, draws.z, batch["label"])

    return loss


def make_autoencoder_loss(network, preprocess: Callable, *, kl_weight: float) -> Callable:
    """(params, batch, key, train) -> `losses.reconstruction` of each example (B,).

    network: an Autoencoder without a codebook; preprocess, batch: as for `make_loss`.
    """

    def loss(params, batch, key, train: bool):
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(batch["index"])
        x = jax.vmap(preprocess)(keys[:, 0], batch["image"])
        return losses.reconstruction(network, params, x, keys[:, 1], kl_weight=kl_weight)

    return loss


def make_step(
    loss: Callable,
    optimizer,
    seed: int,
    *,
    ema_rate: float,
    ema_warmup: bool,
    cooldown: int = 0,
    accumulate: int = 1,
    skip_non_finite: bool = False,
    power_gammas: tuple[float, ...] = (),
) -> Callable:
    """(state, batches, first, n_iters) -> (state, metrics): a step for each batch along the leading axis of `batches`.

    first: the number of the first batch; the state must have done that many steps.
    n_iters: () the number of steps in the end, for the cooldown; an argument, so that nothing is compiled for another.
    cooldown: during the last so many of n_iters steps updates shrink linearly to nothing (Hägele et al. 2024, arXiv
        2405.18392, section 3), beside whatever the optimizer does to its learning rate.
    accumulate: slices of a device's batch, equal in size, that pass the network one after another for the sake of
        memory; loss and gradient are their means, those of the whole batch up to rounding.
    skip_non_finite: an update whose loss or gradient norm is not finite is never applied. With it, that step counts as
        done and the next goes on from the same parameters, average and optimizer. Without, the state remains before
        that step whatever batches come after, so that a caller may look at `state.step` as rarely as it likes.
    power_gammas: the exponents of the averages in `state.power_ema`.
    metrics: the loss and the norms of gradient and parameters, and 1 for each update that was not applied, else 0.

    Several steps a call save dispatch on accelerators. On CPU take one: convolution gradients inside a loop are 20
    times slower there, so a single step is not put in a loop, and slices are unrolled. Run it through `parallel.pmap`.
    """

    def step(n_iters, state: State, inputs):
        batch, number = inputs
        key = jax.random.fold_in(seeds.key(seed), number)
        mean_loss = lambda params, batch: loss(params, batch, key, True).mean()
        value, gradient = parallel.mean(_mean_over_slices(mean_loss, state.params, batch, accumulate))
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        if cooldown:  # not in the optimizer's schedule: a continued run may set it, and its opt_state stays what it was
            share = jnp.clip((n_iters - number) / cooldown, 0, 1)
            updates = jax.tree.map(lambda update: share.astype(update.dtype) * update, updates)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, number + 1, rate=ema_rate, warmup=ema_warmup)
        applied = finite & (state.step == number)
        power = zip(state.power_ema, power_gammas, strict=True)
        averages = tuple(power_ema.update(average, params, number + 1, gamma) for average, gamma in power)
        done = State(number + 1, params, ema, opt_state, averages)
        state = jax.tree.map(lambda new, old: jnp.where(applied, new, old), done, state)
        if skip_non_finite:
            state = state._replace(step=done.step)
        norms = {"gradient norm": norm, "parameter norm": optax.global_norm(state.params)}
        return state, {"loss": value, **norms, "skipped updates": 1 - applied.astype(jnp.int32)}

    def steps(state: State, batches, first, n_iters=0):
        step_before = functools.partial(step, n_iters)
        count = len(batches["image"])
        inputs = batches, jnp.asarray(first, jnp.int32) + jnp.arange(count, dtype=jnp.int32)
        if count > 1:
            return jax.lax.scan(step_before, state, inputs)
        state, metrics = step_before(state, jax.tree.map(lambda b: b[0], inputs))
        return state, jax.tree.map(lambda m: m[None], metrics)

    return steps


def _mean_over_slices(mean_loss: Callable, params, batch, count: int):
    """Value and gradient of mean_loss(params, batch), as means over so many slices of the batch."""
    value_and_gradient = jax.value_and_grad(mean_loss)
    if count == 1:
        return value_and_gradient(params, batch)
    slices = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

    def add(total, part):
        # What is unrolled must still wait for its turn, or nothing is saved; XLA drops a barrier on CPU.
        part = part | {"index": part["index"] + jnp.isnan(optax.global_norm(total)).astype(jnp.int32)}
        return jax.tree.map(jnp.add, total, value_and_gradient(params, part)), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, _ = jax.lax.scan(add, zero, slices, unroll=jax.default_backend() == "cpu")
    return jax.tree.map(lambda x: x / count, total)
