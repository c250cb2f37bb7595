"""Distances between two sets of features, in float64 on the host.

x and y are features (N, D) of two sets of images; gaussians stand for sets of any size in bounded memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special

from score_sde.errors import UserError

BLOCK = 1024  # rows of a distance matrix at a time

# ------------------------------------------------------------------------------------------------- Frechet distance


class Gaussian(NamedTuple):
    """Number, mean (D,) and scatter (D, D), the sum of squares about the mean, of features seen so far."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased (ddof 1); UserError for fewer than two features."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, found {self.n}")
        return self.scatter / (self.n - 1)


def empty(dimension: int) -> Gaussian:
    """The moments of no features yet."""
    return Gaussian(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def merge(a: Gaussian, b: Gaussian) -> Gaussian:
    """The moments of both sets together (Chan et al. 1983, eq. 2.1): centred, so nothing cancels."""
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n)
    return Gaussian(n, a.mean + shift * (b.n / n), scatter)


def gaussian(x: np.ndarray) -> Gaussian:
    """The moments of features (N, D)."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    centred = x - mean
    return Gaussian(len(x), mean, centred.T @ centred)


def frechet_distance(mean1, covariance1, mean2, covariance2) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2): the FID, if the features are Inception's (Heusel et al. 2017).

    With C = R^T R, the last trace is the sum of the singular values of R1 R2^T. Unlike the square root of the product
    C1 C2, this squares nothing, so it is exact to rounding for singular covariances as well. Rounding can leave the
    result slightly negative.
    """
    product = square_root(covariance1) @ square_root(covariance2).T
    trace = np.trace(covariance1) + np.trace(covariance2) - 2 * scipy.linalg.svdvals(product).sum()
    return float(np.square(mean1 - mean2).sum() + trace)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """R with R^T R = covariance; eigenvalues at the level of rounding are zero."""
    values, vectors = scipy.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return np.sqrt(np.where(values > rounding, values, 0.0))[:, None] * vectors.T


# --------------------------------------------------------------------------------------------------- kernel distance


def mmd2(x, y, *, degree: int = 3, gamma: float | None = None, coef0: float = 1.0, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy with the kernel (gamma x.y + coef0)^degree; gamma is 1/D by default.

    Unbiased: without the terms of a feature with itself, divided by n (n - 1) (Binkowski et al. 2018, section 4).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    gamma = 1 / x.shape[1] if gamma is None else gamma
    kernel = lambda product: (gamma * product + coef0) ** degree
    between = lambda a, b: sum(kernel(rows @ b.T).sum() for rows in blocks(a))

    def within(a):
        n = len(a)
        total = between(a, a)
        return (total - kernel(np.square(a).sum(1)).sum()) / (n * (n - 1)) if unbiased else total / n**2

    return float(within(x) + within(y) - 2 * between(x, y) / (len(x) * len(y)))


def kernel_distance(x, y, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> np.ndarray:
    """Unbiased `mmd2` of random subsets without replacement, float64 (subsets,); the KID is their mean.

    The subsets are those of torch-fidelity with the same seed, which also reports their standard deviation (ddof 0).
    Raises UserError if a subset would be larger than a set.
    """
    if subset_size > min(len(x), len(y)):
        raise UserError(f"KID subsets of {subset_size} need as many images on both sides, found {len(x)} and {len(y)}")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen_x = random.choice(len(x), subset_size, replace=False)
        chosen_y = random.choice(len(y), subset_size, replace=False)
        values.append(mmd2(x[chosen_x], y[chosen_y]))
    return np.array(values)


def block_kernel_distance(x, y, blocks: int) -> tuple[float, float]:
    """Mean of unbiased `mmd2` over disjoint blocks of consecutive features, and its standard error.

    Unlike the subsets of `kernel_distance`, which overlap, the blocks are independent, so this error is one.
    """
    parts = lambda a: [a[i * len(a) // blocks : (i + 1) * len(a) // blocks] for i in range(blocks)]
    values = np.array([mmd2(*pair) for pair in zip(parts(x), parts(y), strict=True)])
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(blocks))


# --------------------------------------------------------------------------------------------------- Inception Score


def inception_score(logits, *, splits: int = 10, seed: int | None = None) -> np.ndarray:
    """exp of the mean over images of KL(p(class | image), p(class)), for each split, float64 (splits,).

    Salimans et al. 2016; the score is the mean over the splits of equal size, i N // splits to (i + 1) N // splits,
    whose mean p(class) is. seed: shuffle first, as torch-fidelity does (with 2020). Scores of other N or numbers of
    splits do not compare.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise UserError(f"an Inception Score over {splits} splits needs at least as many images, found {n}")
    order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
    scores = []
    for i in range(splits):
        part = np.asarray(logits)[order[i * n // splits : (i + 1) * n // splits]].astype(np.float64)
        log_p = part - scipy.special.logsumexp(part, axis=1, keepdims=True)
        p = np.exp(log_p)
        log_mean = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))  # finite where p underflows
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return np.array(scores)


# ----------------------------------------------------------------------------------------------- precision and recall


class Manifolds(NamedTuple):
    """Which generated features lie among the real ones, and which real ones among the generated (boolean)."""

    generated_inside: np.ndarray
    real_inside: np.ndarray

    @property
    def precision(self) -> float:
        return float(self.generated_inside.mean())

    @property
    def recall(self) -> float:
        return float(self.real_inside.mean())


def precision_recall(generated, real, *, k: int = 3) -> Manifolds:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1).

    A set's manifold is the union of the balls about its features that reach to their k-th nearest neighbour in the
    set, not counting themselves. Raises UserError unless both sets have more than k features.
    """
    if min(len(generated), len(real)) <= k:
        raise UserError(f"precision and recall with {k} neighbours need more images than found")
    centre = np.mean(real, 0, np.float64)
    generated, real = generated - centre, real - centre
    return Manifolds(inside(generated, real, k), inside(real, generated, k))


def radii2(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each feature to its k-th nearest neighbour but itself, (N,)."""
    return np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in squared_distances(x, x)])


def inside(points: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    """Whether each point lies in a ball of the manifold of x, boolean (len(points),)."""
    radius2 = radii2(x, k)
    return np.concatenate([(rows <= radius2).any(1) for rows in squared_distances(points, x)])


def squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """|a_i - b_j|^2 in blocks of rows (BLOCK, len(b)), by |a|^2 + |b|^2 - 2 a.b; coincident features give exactly 0."""
    norm_b = np.square(b).sum(1)
    for rows in blocks(a):
        norms = np.square(rows).sum(1)[:, None] + norm_b
        distances = norms - 2 * (rows @ b.T)
        yield np.where(distances > 1e-13 * norms, distances, 0.0)


def blocks(a: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive rows, BLOCK at a time."""
    return (a[start : start + BLOCK] for start in range(0, len(a), BLOCK))
