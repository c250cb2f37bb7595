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

import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ems.moments import BLOCKS, Moments, jackknife, merge, union
from ems.statistics import EMS
from score_sde import files, parallel
from score_sde.errors import UserError
from score_sde.sde import SDE, derivative

EPSILON = float(np.finfo(np.float32).eps)


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
    if not 0 < ends[1] < ends[0]:
        raise UserError(f"EMS from t={ends[0]:g} to t={ends[1]:g}: expected an end in (0, {ends[0]:g})")
    lam = np.linspace(*sde.lam(ends), n + 1)
    t = sde.t_of_lam(lam)
    t[[0, -1]] = ends
    return nodes_at(sde, t, lam)


def nodes_at(sde: SDE, t: np.ndarray, lam: np.ndarray) -> Nodes:
    dt = 1 / derivative(sde.lam, t)
    c = 1 / (1 + np.exp(2 * lam))
    return Nodes(t, lam, sde.alpha(t), sde.sigma(t), dt, sde.drift(t) * dt, c, -2 * c * (1 - c))


def pairwise_sum(values):
    """Sum over the leading axis, by halves: of n values, none goes through more than log2(n) + 1 roundings.

    In which order `sum` and `einsum` add is the device's choice; one value after the other, the roundings of float32
    come to exceed what is left where f does not vary.
    """
    while len(values) > 1:
        half = len(values) // 2
        values = jnp.concatenate([values[:half] + values[half : 2 * half], values[2 * half :]])
    return values[0]


def batch_moments(noise: Callable, node: Nodes, x0, z, v, *condition) -> Moments:
    """The moments of one batch at one node (scalar fields), from one network evaluation and two tangents.

    x0, z, v: (B, H, W, C) data, standard normal noise, random signs.
    condition: further arguments of `noise` after x and t, trees of one row an example.
    """

    def of_example(x, v, *condition):
        """(w, h, h', y) of one example; x, v (H, W, C)."""
        rows = jax.tree.map(lambda row: row[None], condition)
        eps, tangent = jax.linearize(lambda x, t: noise(x[None], t, *rows)[0], x, node.t)
        y = x / node.alpha
        along_probe = tangent(v, jnp.zeros_like(node.t))
        along_ode = tangent((node.dlog_alpha * x - node.sigma * eps), node.dt)
        h = (node.sigma * eps - node.c * x) / node.alpha
        dh = node.sigma / node.alpha * ((node.c - 1) * eps + along_ode) - node.dc * y
        return node.sigma * along_probe * v, h, dh, y

    w, *triple = jax.vmap(of_example)(node.alpha * x0 + node.sigma * z, v, *condition)
    triple = jnp.stack(triple, axis=1)
    mean = pairwise_sum(triple) / len(x0)
    deviation = triple - mean[None]
    second = pairwise_sum(deviation[:, :, None] * deviation[:, None, :])
    return Moments(jnp.asarray(len(x0), w.dtype), pairwise_sum(w) / len(x0), mean, second)


def draws(key, index, node_index, shape, dtype=jnp.float32):
    """Noise and random signs of one example at one node: each is a function of the seed, the example and the node."""
    key = jax.random.fold_in(jax.random.fold_in(key, index), node_index)
    noise_key, sign_key = jax.random.split(key)
    return jax.random.normal(noise_key, shape, dtype), jax.random.rademacher(sign_key, shape, dtype)


@parallel.full_precision  # at large noise f is the small difference of large numbers
def measure(noise: Callable, node: Nodes, node_index, key, x0, index, *condition) -> Moments:
    """The moments of a batch x0 (B, H, W, C) of examples numbered `index` (B,), at a chunk of nodes (M,): (M, ...).

    noise: a NoiseFn, called with the rows of `condition` too if there are any.
    """

    def at_node(_, inputs):
        node, i = inputs
        z, v = jax.vmap(lambda example: draws(key, example, i, x0.shape[1:], x0.dtype))(index)
        return None, batch_moments(noise, node, x0, z, v, *condition)

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
    of f' = s f + b over the samples, per pixel (Zheng et al. 2023, eq. 11). Where f does not vary at all (a pixel that
    is the same in all data, a linear model), any s fits: there s = 0 and b = mean f', and origin counts these places
    as `constant_f`.
    """
    l = np.asarray(moments.w)
    dl = smooth(np.gradient(l, np.asarray(node.lam), axis=0), smoothing)
    s, b, constant = np.empty_like(l), np.empty_like(l), 0
    for j, (c, dc) in enumerate(zip(np.asarray(node.c), np.asarray(node.dc), strict=True)):
        d, dd = l[j] - c, dl[j] - dc
        one, zero = np.ones_like(d), np.zeros_like(d)
        # f and f' as combinations of (h, h', y)
        f, df = np.stack([one, zero, -d]), np.stack([d, one, d * c - dd])
        mean, second = moments.mean[j], moments.second[j]
        product = lambda a, b, second=second: np.einsum("i...,ij...,j...->...", a, second, b)
        variance = product(f, f)
        # what float32 leaves of it where f does not vary: in the moments, and in h and y themselves
        terms = second[0, 0] + d**2 * second[2, 2]
        squares = second[0, 0] + c**2 * second[2, 2] + moments.n[j] * (mean[0] ** 2 + c**2 * mean[2] ** 2)
        varies = variance > 4 * EPSILON * terms + (2 * EPSILON) ** 2 * squares
        s[j] = np.divide(product(f, df), variance, out=np.zeros_like(variance), where=varies)
        b[j] = (df * mean).sum(0) - s[j] * (f * mean).sum(0)
        constant += int((~varies).sum())
    return EMS(np.asarray(node.t), np.asarray(node.lam), l, s, b, origin | {"constant_f": constant})


def with_errors(node: Nodes, blocks: Moments, origin: dict) -> tuple[EMS, list[EMS], list[float]]:
    """The statistics with their standard errors, those with each block left out, and the blocks' numbers of images.

    Blocks without images are dropped; one block alone has no errors and leaves nothing.
    """
    filled = np.flatnonzero(blocks.n[:, 0])
    sizes = blocks.n[filled, 0].tolist()
    whole = statistics(node, union(blocks, filled), origin)
    if len(filled) == 1:
        return whole, [], sizes
    without = [statistics(node, union(blocks, filled[filled != g]), origin) for g in filled]
    root_mean_square = lambda values: np.sqrt(np.square(values).mean((1, 2, 3)))
    errors = [
        root_mean_square(jackknife(getattr(whole, key), [getattr(part, key) for part in without], sizes))
        for key in "lsb"
    ]
    return whole._replace(errors=np.stack(errors)), without, sizes


# K suffices if more images would bring few-step samples nearer to the exact ODE by no more than this share.
TOLERANCE = 0.02


def needed(distance: float, error: float, num_data: int) -> tuple[float, int | None]:
    """By what share the statistics' error lengthens the distance of samples to the exact ODE; and what K suffices.

    distance: RMS, of samples by statistics of `num_data` images; error: their standard error from these statistics.
    The error is independent of what separates samples from the ODE even with exact statistics, D, so that
    distance^2 = D^2 + error^2, and error^2 goes as 1 / K. K is None where nothing is left for D.
    """
    exact = distance**2 - error**2
    if not exact > 0:
        return math.inf, None
    excess = (1 + TOLERANCE) ** 2 - 1
    return distance / math.sqrt(exact) - 1, math.ceil(num_data * error**2 / (excess * exact))


def accumulate(
    measure_on_devices: Callable,
    nodes: Nodes,
    take: Callable,
    images: range,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int,
    chunk: int = 11,
    partial: pathlib.Path | None = None,
    identity: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    save_every: float = 30.0,
) -> Moments:
    """The moments over `images`, a whole number of batches, at all nodes: (BLOCKS, nodes), float64 on the host.

    measure_on_devices: (chunk of nodes, their indices, indices of images, *arrays of `take`) -> Moments with a leading
        device axis.
    take: indices of images (b,) -> arrays of b rows; called once for each batch.
    Batches go to the blocks by turns of the images' numbers.
    partial: a file from which a stopped estimate goes on, if it was written for the same `identity` and sizes.
    progress: called with (units done, units in all); a unit is one batch at `chunk` nodes.
    """
    n, batches = len(nodes.t), len(images) // batch_size
    chunks = [np.arange(i, i + chunk).clip(max=n - 1) for i in range(0, n, chunk)]  # the last node pads the last chunk
    identity = f"{identity} {n} {images} {batch_size} {chunk} {nodes.t[-1]}"
    total, done = Moments.zeros((BLOCKS, n), image_shape), 0
    if partial is not None and partial.exists():
        total, done = _read_partial(partial, identity) or (total, 0)
    saved, arrays = time.monotonic(), None
    for unit in range(done, batches * len(chunks)):
        progress(unit, batches * len(chunks))
        batch, node_index = divmod(unit, len(chunks))
        index = np.asarray(images[batch * batch_size : (batch + 1) * batch_size])
        if arrays is None or node_index == 0:
            arrays = take(index)
        node_index = chunks[node_index]
        node = jax.tree.map(lambda values: values[node_index], nodes)
        measured = jax.tree.map(np.asarray, measure_on_devices(node, node_index, index, *arrays))
        real = np.unique(node_index)
        block = index[0] // batch_size % BLOCKS
        for device in range(len(measured.n)):
            part = jax.tree.map(lambda values: values[device, : len(real)], measured)
            merged = merge(jax.tree.map(lambda values: values[block, real], total), part)
            for whole, values in zip(total, merged, strict=True):
                whole[block, real] = values
        if partial is not None and time.monotonic() - saved > save_every:
            began = time.monotonic()
            files.save_npz(partial, total._asdict() | dict(done=unit + 1, identity=identity))
            saved = time.monotonic()
            save_every *= 2 if saved - began > save_every / 20 else 1  # large moments on a slow disk
    progress(batches * len(chunks), batches * len(chunks))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return total


def _read_partial(path: pathlib.Path, identity: str) -> tuple[Moments, int] | None:
    """Moments and units done of a stopped estimate, or None if it belongs to another estimate or is damaged."""
    try:
        arrays = files.load_npz(path)
        if str(arrays["identity"]) == identity:
            return Moments(*(arrays[name] for name in Moments._fields)), int(arrays["done"])
    except (OSError, KeyError, ValueError):
        pass
    return None
