"""Empirical model statistics (EMS): what DPM-Solver-v3 measures on a model, once.

    statistics = ems.measure(noise, sde, images)
    table = solvers.SOLVERS["dpmv3"](sde, 10, ems=statistics)

Any function (x, t) -> eps can be measured; `python -m ems` measures a run.
"""

from collections.abc import Callable

import jax
import numpy as np

from ems import estimate, statistics
from ems.statistics import EMS
from score_sde import seeds
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE


def measure(
    noise: NoiseFn,
    sde: SDE,
    images,
    *,
    nodes: int = 120,
    batch_size: int = 64,
    t_end: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EMS:
    """Measure l, s, b of any NoiseFn on images (K, H, W, C) float32, on one device (Zheng et al. 2023, sec. 3.2).

    nodes: intervals of a grid uniform in lam, from the prior to t_end (the SDE's t_min by default).
    batch_size: images at a time; what exceeds a whole number of batches is left out. K from four batches on give
        standard errors, which are in the result.
    progress: called with the units of work that are done and their number.
    Costs 2 to 3 forward passes for each node and image. UserError for fewer images than a batch.
    `python -m ems` does the same for a run, on all devices, resumes, and says whether K suffices.
    """
    x0 = np.asarray(images, np.float32)
    num_data = len(x0) // batch_size * batch_size
    if x0.ndim != 4 or not num_data:
        raise UserError(f"images are {x0.shape}: expected (K, H, W, C) with K at least the batch size, {batch_size}")
    key = seeds.key(seed)

    @jax.jit
    def on_device(node, node_index, index, x0):
        moments = estimate.measure(noise, node, node_index, key, x0, index)
        return jax.tree.map(lambda values: values[None], moments)

    as_float32 = lambda node, *rest: on_device(jax.tree.map(np.float32, node), *rest)
    node = estimate.nodes(sde, nodes, t_end=t_end)
    take = lambda index: (x0[index],)
    moments = estimate.accumulate(
        as_float32, node, take, range(num_data), x0.shape[1:], batch_size=batch_size, progress=progress
    )
    if not np.isfinite(moments.mean).all():
        raise UserError("noise(x, t) is not finite for these images: expected finite (B, H, W, C) for every t")
    origin = dict(sde=statistics.describe_sde(sde), num_data=num_data, nodes=nodes, seed=seed, t_end=float(node.t[-1]))
    return estimate.with_errors(node, moments, origin)[0]
