"""How near few-step samples of a latent model come to a fine solution, as DPM-Solver-v3's paper measures it.

The mean over samples of |x - x*|^2 / D, with D the numbers of a latent; x* is the sample that 200 evaluations of
DPM-Solver++ draw of the same noise and condition (Zheng et al. 2023, section 4.1, and the settings of their code).
"""

import hashlib
import inspect
from collections.abc import Iterator

import jax
import numpy as np

from ems.statistics import EMS
from experiments import program, runs, samplers
from score_sde import files, parallel
from score_sde.errors import UserError
from score_sde.metrics import features
from solvers import SOLVERS
from solvers.dpm_solver import dpm_solver_pp

REFERENCE_STEPS = 200


def settings(solver: str, steps: int, guidance_scale: float | None) -> dict:
    """The published options for latents: times uniform, of order 3, with guidance 2; DPM-Solver-v3 has its own."""
    if solver == "dpmv3":
        return {}
    order = 3 if guidance_scale in (None, 1) else 2
    known = inspect.signature(SOLVERS[solver]).parameters
    wanted = dict(order=min(order, steps), grid="time")
    return {name: value for name, value in wanted.items() if name in known}


def measure(
    model: runs.Model,
    ways: list[tuple[str, int]],
    *,
    n: int,
    seed: int,
    ems: EMS | None = None,
    guidance_scale: float | None = None,
    bending: dict,
) -> Iterator[dict]:
    """A result for each way, a solver and a number of evaluations, on the model's first n samples.

    model: guided or not; ems: for the ways by dpmv3; bending: what bends the model, for the record. A stopped call goes
    on after its last batch. UserError for models of pixels, and for samples that are not finite.
    """
    diffusion = model.diffusion
    if not model.config.autoencoder:
        raise UserError(f"latent_mse is measured on latents, and {model.name} has pixels: use --metrics=convergence")
    built = []
    for solver, steps in ways:
        statistics = ems if solver == "dpmv3" else None
        own = settings(solver, steps, guidance_scale)
        built.append(samplers.build_tableau(diffusion.sde, solver, steps, statistics, **own))
    reference = settings("dpmpp", REFERENCE_STEPS, guidance_scale)
    tables = [dpm_solver_pp(diffusion.sde, REFERENCE_STEPS, **reference), *(table for table, _ in built)]
    batch_size = min(parallel.round_up(n), parallel.round_up(model.config.sampling.batch_size))
    hashes = [hashlib.sha256(np.float32(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(tables)]
    identity = features.fingerprint(model.identity, hashes, bending, diffusion.space.shape, seed)
    partial = model.results / "eval" / f"latent_mse-{identity}.partial.npz"
    sample = samplers.sampler(diffusion, model.params, seed)
    errors = _earlier(partial, len(ways))
    with program.progress(total=n, initial=min(n, errors.shape[1]), desc="latent_mse", unit="sample") as bar:
        while errors.shape[1] < n:
            index = np.arange(errors.shape[1], errors.shape[1] + batch_size)
            fine, *coarse = (sample(table, index).astype(np.float64) for table in tables)
            batch = np.stack([np.square(x - fine).mean((1, 2, 3)) for x in coarse])
            if not np.isfinite(batch).all():
                solver, steps = ways[int(np.isfinite(batch).all(1).argmin())]
                raise UserError(f"samples by {solver} in {steps} evaluations, or the fine ones, are not finite")
            errors = np.concatenate([errors, batch], axis=1)
            files.save_npz(partial, dict(errors=errors))
            bar.update(min(n, errors.shape[1]) - bar.n)
    errors = errors[:, :n]
    for (solver, steps), (_, options), values in zip(ways, built, errors, strict=True):
        error = values.std(ddof=1) / np.sqrt(n) if n > 1 else None
        result = dict(solver=solver, steps=steps, options=options, mse=values.mean(), standard_error=error)
        about = dict(dimension=int(np.prod(diffusion.space.shape)), reference=dict(steps=REFERENCE_STEPS) | reference)
        yield result | dict(num_samples=n) | about | bending
    if parallel.writes():
        partial.unlink(missing_ok=True)


def _earlier(partial, count: int) -> np.ndarray:
    """The errors (ways, samples) of a stopped call, or none."""
    try:
        errors = files.load_npz(partial)["errors"]
        return errors if errors.ndim == 2 and len(errors) == count else np.zeros((count, 0))
    except (OSError, KeyError, ValueError):
        return np.zeros((count, 0))
