"""Estimate EMS in one pass over data and noise.

The published procedure makes two passes, since f depends on l. But f is affine in l and f' in (l, l'), so that the
moments of three quantities are enough to form every statistic afterwards, for any l. With c = l_ref the statistic of
unit Gaussian data, sigma^2 / (alpha^2 + sigma^2), and d = l - c,

    f  = h - d x / alpha,                          h  = (sigma eps - c x) / alpha,
    f' = h' - d' x / alpha + d (h + c x / alpha),  h' = exp(-lam) ((c - 1) eps + eps') - c' x / alpha,

where ' is d/dlam along the probability-flow ODE, on which dx/dlam = (d log_alpha / dlam) x - sigma eps. The moments
are taken of (w, h, h', y = x / alpha), w = sigma (J v) v with J = d eps / dx, v = +-1, so that E w = l. The reference c
keeps the subtraction small: eps and x alone nearly cancel in f at large noise, and float32 moments would not survive.

Both tangents, the probe v and the ODE direction, share one linearization of the network.
"""

import os
import pathlib
import time
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ems.statistics import EMS
from score_sde.denoiser import NoiseFn
from score_sde.sde import SDE, derivative


class Nodes(NamedTuple):
    """What the estimate needs of the SDE at each node: (N + 1,) each, computed in float64."""

    t: np.ndarray
    lam: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    dt: np.ndarray  # dt / dlam
    dlog_alpha: np.ndarray  # d log_alpha / dlam
    c: np.ndarray  # l_ref
    dc: np.ndarray  # d l_ref / dlam


def nodes(sde: SDE, n: int, *, t_end: float | None = None) -> Nodes:
    """n + 1 nodes uniform in lam from t_max to t_end, the SDE's t_min by default."""
    ends = np.array([sde.t_max, sde.t_min if t_end is None else t_end], np.float64)
    lam = np.linspace(*sde.lam(ends), n + 1)
    t = sde.t_of_lam(lam)
    t[[0, -1]] = ends
    return nodes_at(sde, t, lam)


def nodes_at(sde: SDE, t: np.ndarray, lam: np.ndarray) -> Nodes:
    dt = 1 / derivative(sde.lam, t)
    c = 1 / (1 + np.exp(2 * lam))
    return Nodes(t, lam, sde.alpha(t), sde.sigma(t), dt, sde.drift(t) * dt, c, -2 * c * (1 - c))


class Moments(NamedTuple):
    """Count, means and centred second moments (summed products of deviations) of a set of samples; add by `merge`.

    Axes after the leading ones (nodes, say): P = (H, W, C).
    """

    n: np.ndarray  # (...)
    w: np.ndarray  # (..., *P) mean of the probe estimate of l
    ww: np.ndarray  # (..., *P) its centred second moment
    mean: np.ndarray  # (..., 3, *P) of (h, h', y)
    second: np.ndarray  # (..., 3, 3, *P)

    @classmethod
    def zeros(cls, leading: tuple[int, ...], image: tuple[int, ...]):
        zeros = lambda *axes: np.zeros((*leading, *axes, *image))
        return cls(np.zeros(leading), zeros(), zeros(), zeros(3), zeros(3, 3))


def merge(one: Moments, two: Moments) -> Moments:
    """Moments of the union of two sets (Chan et al. 1983), in float64 on the host."""
    one, two = (Moments(*(np.asarray(part, np.float64) for part in m)) for m in (one, two))
    n = one.n + two.n
    share, cross = (
        np.divide(part, n, out=np.zeros_like(n), where=n > 0).reshape(n.shape + (1,) * (one.w.ndim - n.ndim))
        for part in (two.n, one.n * two.n)
    )
    axis = n.ndim
    apart_w, apart = two.w - one.w, two.mean - one.mean
    products = np.expand_dims(apart, axis) * np.expand_dims(apart, axis + 1)
    expand = lambda values, times: values.reshape(n.shape + (1,) * times + values.shape[n.ndim :])
    return Moments(
        n,
        one.w + share * apart_w,
        one.ww + two.ww + cross * apart_w**2,
        one.mean + expand(share, 1) * apart,
        one.second + two.second + expand(cross, 2) * products,
    )


def batch_moments(noise: NoiseFn, node: Nodes, x0, z, v) -> Moments:
    """The moments of one batch at one node (scalar fields), from one network evaluation and two tangents.

    x0, z, v: (B, H, W, C) data, standard normal noise, random signs.
    """

    def of_example(x, v):
        """(w, h, h', y) of one example; x, v (H, W, C)."""
        eps, tangent = jax.linearize(lambda x, t: noise(x[None], t)[0], x, node.t)
        y = x / node.alpha
        along_probe = tangent(v, jnp.zeros_like(node.t))
        along_ode = tangent((node.dlog_alpha * x - node.sigma * eps), node.dt)
        h = (node.sigma * eps - node.c * x) / node.alpha
        dh = node.sigma / node.alpha * ((node.c - 1) * eps + along_ode) - node.dc * y
        return node.sigma * along_probe * v, h, dh, y

    w, *triple = jax.vmap(of_example)(node.alpha * x0 + node.sigma * z, v)
    triple = jnp.stack(triple, axis=1)
    mean, mean_w = triple.mean(0), w.mean(0)
    deviation = triple - mean[None]
    second = jnp.einsum("bi...,bj...->ij...", deviation, deviation)
    return Moments(jnp.asarray(len(x0), w.dtype), mean_w, jnp.square(w - mean_w[None]).sum(0), mean, second)


def draws(key, index, node_index, shape, dtype=jnp.float32):
    """Noise and random signs of one example at one node: each is a function of the seed, the example and the node."""
    key = jax.random.fold_in(jax.random.fold_in(key, index), node_index)
    noise_key, sign_key = jax.random.split(key)
    return jax.random.normal(noise_key, shape, dtype), jax.random.rademacher(sign_key, shape, dtype)


def measure(noise: NoiseFn, node: Nodes, node_index, key, x0, index) -> Moments:
    """The moments of a batch x0 (B, H, W, C) of examples numbered `index` (B,), at a chunk of nodes (M,): (M, ...)."""

    def at_node(_, inputs):
        node, i = inputs
        z, v = jax.vmap(lambda example: draws(key, example, i, x0.shape[1:], x0.dtype))(index)
        return None, batch_moments(noise, node, x0, z, v)

    node = jax.tree.map(lambda values: jnp.asarray(values, x0.dtype), node)
    return jax.lax.scan(at_node, None, (node, node_index))[1]


def smooth(values: np.ndarray, width: int = 11) -> np.ndarray:
    """Moving average over the leading axis, over fewer values near the ends."""
    reach, n = width // 2, len(values)
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    low, high = np.maximum(np.arange(n) - reach, 0), np.minimum(np.arange(n) + reach + 1, n)
    return (total[high] - total[low]) / (high - low).reshape(-1, *(1,) * (values.ndim - 1))


def statistics(node: Nodes, moments: Moments, origin: dict, *, smoothing: int = 11) -> EMS:
    """l, s, b from the moments at all nodes, in float64.

    l' by central differences, then a moving average over `smoothing` nodes, as published; s and b the least-squares fit
    of f' = s f + b over the samples, per pixel (Zheng et al. 2023, eq. 11). Where f does not vary at all, s = 0.
    """
    column = lambda values: np.asarray(values).reshape(-1, 1, 1, 1)
    l = np.asarray(moments.w)
    dl = smooth(np.gradient(l, np.asarray(node.lam), axis=0), smoothing)
    d, dd = l - column(node.c), dl - column(node.dc)
    # f and f' as combinations of (h, h', y)
    one, zero = np.ones_like(l), np.zeros_like(l)
    f = np.stack([one, zero, -d], axis=1)
    df = np.stack([d, one, d * column(node.c) - dd], axis=1)
    dot = lambda weights: (weights * moments.mean).sum(1)
    product = lambda a, b: np.einsum("ni...,nij...,nj...->n...", a, moments.second, b)
    variance = product(f, f)
    s = np.divide(product(f, df), variance, out=np.zeros_like(variance), where=variance > 0)
    return EMS(np.asarray(node.t), np.asarray(node.lam), l, s, dot(df) - s * dot(f), origin)


def accumulate(
    measure_on_devices: Callable,
    nodes: Nodes,
    x0: np.ndarray,
    *,
    batch_size: int,
    chunk: int = 11,
    partial: pathlib.Path | None = None,
    identity: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    save_every: float = 30.0,
) -> Moments:
    """The moments over all images x0 (K, H, W, C), K a multiple of batch_size, at all nodes; float64 on the host.

    measure_on_devices: (chunk of nodes, their indices, images, their indices) -> Moments with a leading device axis.
    partial: a file from which a stopped estimate goes on, if it was written for the same `identity` and sizes.
    progress: called with (units done, units in all); a unit is one batch at `chunk` nodes.
    """
    n, batches = len(nodes.t), len(x0) // batch_size
    chunks = [np.arange(i, i + chunk).clip(max=n - 1) for i in range(0, n, chunk)]  # the last node pads the last chunk
    identity = f"{identity} {n} {len(x0)} {batch_size} {chunk}"
    total, done = Moments.zeros((n,), x0.shape[1:]), 0
    if partial is not None and partial.exists():
        total, done = _read_partial(partial, identity) or (total, 0)
    saved = time.monotonic()
    for unit in range(done, batches * len(chunks)):
        progress(unit, batches * len(chunks))
        batch, node_index = divmod(unit, len(chunks))
        node_index = chunks[node_index]
        index = np.arange(batch * batch_size, (batch + 1) * batch_size)
        node = jax.tree.map(lambda values: values[node_index], nodes)
        measured = jax.tree.map(np.asarray, measure_on_devices(node, node_index, x0[index], index))
        real = np.unique(node_index)
        for device in range(len(measured.n)):
            part = jax.tree.map(lambda values: values[device, : len(real)], measured)
            merged = merge(jax.tree.map(lambda values: values[real], total), part)
            for whole, values in zip(total, merged, strict=True):
                whole[real] = values
        if partial is not None and time.monotonic() - saved > save_every:
            _write_partial(partial, total, unit + 1, identity)
            saved = time.monotonic()
    progress(batches * len(chunks), batches * len(chunks))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return total


def _write_partial(path: pathlib.Path, total: Moments, done: int, identity: str):
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **total._asdict(), done=done, identity=identity)
    os.replace(temporary, path)


def _read_partial(path: pathlib.Path, identity: str) -> tuple[Moments, int] | None:
    """What `_write_partial` wrote, or None if it belongs to another estimate or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) == identity:
                return Moments(*(file[name] for name in Moments._fields)), int(file["done"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        pass
    return None
