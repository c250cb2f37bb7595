"""Moments of what EMS need, additive over images: batches, devices, machines; and the error of what is made of them."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from score_sde import files
from score_sde.errors import UserError

BLOCKS = 4  # disjoint sets of images whose moments are kept apart, so that errors can be told
SUFFIX = ".moments"  # an .npz by another name, so that *.npz are statistics
_UPPER = [(i, j) for i in range(3) for j in range(i, 3)]


class Moments(NamedTuple):
    """Count, means and centred second moments (summed products of deviations) of a set of samples; add by `merge`.

    Axes after the leading ones (blocks and nodes, say): P = (H, W, C).
    """

    n: np.ndarray  # (...)
    w: np.ndarray  # (..., *P) mean of the probe estimate of l
    mean: np.ndarray  # (..., 3, *P) of (h, h', y)
    second: np.ndarray  # (..., 3, 3, *P)

    @classmethod
    def zeros(cls, leading: tuple[int, ...], image: tuple[int, ...]):
        zeros = lambda *axes: np.zeros((*leading, *axes, *image))
        return cls(np.zeros(leading), zeros(), zeros(3), zeros(3, 3))


def merge(one: Moments, two: Moments) -> Moments:
    """Moments of the union of two sets (Chan et al. 1983), in float64 on the host."""
    one, two = (Moments(*(np.asarray(part, np.float64) for part in m)) for m in (one, two))
    n = one.n + two.n
    share, cross = (
        np.divide(part, n, out=np.zeros_like(n), where=n > 0).reshape(n.shape + (1,) * (one.w.ndim - n.ndim))
        for part in (two.n, one.n * two.n)
    )
    axis = n.ndim
    apart = two.mean - one.mean
    products = np.expand_dims(apart, axis) * np.expand_dims(apart, axis + 1)
    expand = lambda values, times: values.reshape(n.shape + (1,) * times + values.shape[n.ndim :])
    return Moments(
        n,
        one.w + share * (two.w - one.w),
        one.mean + expand(share, 1) * apart,
        one.second + two.second + expand(cross, 2) * products,
    )


def union(blocks: Moments, which: Sequence[int]) -> Moments:
    """The moments of some blocks (leading axis) together; node by node, since merging takes memory of its own."""
    nodes = blocks.n.shape[1]
    total = Moments.zeros((nodes,), blocks.w.shape[2:])
    for j in range(nodes):
        merged = functools.reduce(merge, (Moments(*(part[g, j] for part in blocks)) for g in which))
        for whole, part in zip(total, merged, strict=True):
            whole[j] = part
    return total


def jackknife(whole, without: Sequence, sizes: Sequence[int]):
    """Standard error of an estimate, an array or a number, from its values on all blocks and with each left out.

    The delete-a-group jackknife for unequal groups (Busing et al. 1999): with h_g = n / n_g and the pseudo-values
    p_g = h_g whole - (h_g - 1) without_g, the variance is the mean over g of (p_g - P)^2 / (h_g - 1), where
    P = sum_g p_g / h_g. To first order in 1 / n it holds for any smooth function of the moments.
    """
    h = np.sum(sizes) / np.asarray(sizes, np.float64)
    pseudo = [k * whole - (k - 1) * part for k, part in zip(h, without, strict=True)]
    centre = sum(p / k for k, p in zip(h, pseudo, strict=True))
    return np.sqrt(sum((p - centre) ** 2 / (k - 1) for k, p in zip(h, pseudo, strict=True)) / len(h))


def bytes_needed(nodes: int, image: tuple[int, ...]) -> int:
    """Bound on the host's memory for the moments, and for the statistics and errors made of them at the end.

    It does not depend on the number of images.
    """
    moments = (BLOCKS + 1) * (1 + 3 + 9)  # the blocks, and their union or that of all but one
    statistics = 3 * (BLOCKS + 1) + 9  # l, s, b of each such union, and what they pass through
    return 8 * nodes * int(np.prod(image)) * (moments + statistics)


# ------------------------------------------------------------------------------------------------ the file


class Saved(NamedTuple):
    """A finished measurement, from which others of the same model can be added."""

    t: np.ndarray  # (nodes,)
    lam: np.ndarray
    blocks: Moments  # (BLOCKS, nodes, ...)
    origin: dict  # with `images`: the [first, end) ranges of images that were taken, none touching another


def save(path, saved: Saved):
    """Write one .npz, atomically; of the symmetric second moments the upper half."""
    arrays = saved.blocks._asdict()
    second = arrays.pop("second")
    arrays |= {f"second{i}{j}": second[:, :, i, j] for i, j in _UPPER}
    files.save_npz(path, arrays | dict(t=saved.t, lam=saved.lam, origin=json.dumps(saved.origin)))


def load(path) -> Saved:
    """Read what `save` wrote; of statistics, the file of moments beside them."""
    path = pathlib.Path(path).with_suffix(SUFFIX)
    absent = f"no moments {path}: copy the file that python -m ems wrote beside the statistics"
    with files.reading(path, "holds no moments", f"give what python -m ems wrote, *{SUFFIX}", absent=absent):
        arrays = files.load_npz(path)
        origin = json.loads(str(arrays.pop("origin")))
        if missing := {*SHARED, "images", "num_data"} - {"guided_by", *origin}:
            raise ValueError(f"its origin lacks {', '.join(sorted(missing))}")
        arrays = {name: np.asarray(value, np.float64) for name, value in arrays.items()}
        n, w = arrays["n"], arrays["w"]
        if n.shape != (BLOCKS, arrays["t"].size) or w.shape[:2] != n.shape or w.ndim != 5:
            raise ValueError(f"its arrays n and w are {n.shape} and {w.shape}")
        shapes = dict.fromkeys(("t", "lam"), n.shape[1:]) | dict(n=n.shape, mean=(*n.shape, 3, *w.shape[2:]))
        for name, value in arrays.items():
            if value.shape != shapes.get(name, w.shape) or not np.isfinite(value).all():
                raise ValueError(f"{name} is {value.shape}, expected finite {shapes.get(name, w.shape)}")
        blocks = Moments.zeros(n.shape, w.shape[2:])._replace(n=n, w=w, mean=arrays["mean"])
        for i, j in _UPPER:
            blocks.second[:, :, i, j] = blocks.second[:, :, j, i] = arrays[f"second{i}{j}"]
        return Saved(arrays["t"], arrays["lam"], blocks, origin)


# What measurements must share to be added, and what it is called.
SHARED = {
    "checkpoint": "checkpoint",
    "sde": "SDE",
    "data": "data",
    "guidance_scale": "guidance scale",
    "guided_by": "guide",
}
TOLD = {"prompts": "prompts", "size": "size of latents"}  # likewise, where they are told


def add(one: Saved, two: Saved, names: tuple[str, str]) -> Saved:
    """The measurement on the images of both; refused unless they are of one model, at one grid, on other images."""
    for key, what in (SHARED | TOLD).items():
        if one.origin.get(key) != two.origin.get(key):
            raise UserError(
                f"{names[0]} and {names[1]} do not add up: {what} {one.origin.get(key)} and {two.origin.get(key)}"
            )
    if len(one.t) != len(two.t) or not np.allclose(one.lam, two.lam):
        grids = [f"{len(part.t) - 1} nodes down to t={part.t[-1]:g}" for part in (one, two)]
        raise UserError(f"{names[0]} and {names[1]} do not add up: {grids[0]} and {grids[1]}")
    for first, end in one.origin["images"]:
        for other_first, other_end in two.origin["images"]:
            if first < other_end and other_first < end:
                raise UserError(
                    f"{names[0]} and {names[1]} share images {max(first, other_first)} to "
                    f"{min(end, other_end) - 1}: measure others, python -m ems --first_image={max(end, other_end)}"
                )
    images = []
    for first, end in sorted([*one.origin["images"], *two.origin["images"]]):
        if images and images[-1][1] == first:  # as if they had been measured at once
            images[-1][1] = end
        else:
            images.append([first, end])
    num_data = one.origin["num_data"] + two.origin["num_data"]
    return one._replace(
        blocks=merge(one.blocks, two.blocks), origin=one.origin | dict(images=images, num_data=num_data)
    )
