"""Samples of a model over all devices: their keys, the prior, a solver's table and its options."""

import ast
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ems.statistics import EMS, describe_sde
from experiments.config import fits
from experiments.runs import Model
from score_sde import files, parallel, seeds
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.sde import SDE
from solvers import SOLVERS, learned, predictor_corrector, tableau
from solvers.dpm_solver_v3 import published_options
from solvers.learned import Corrections
from solvers.tableau import Tableau

HISTORY = 4  # to which a sampler makes its tables alike
ROWS = 32
LARGE = 2**16  # numbers of a coefficient per pixel, above which a table keeps its length for the sake of memory


def sample_keys(seed: int, index, purpose: int | None = None):
    """The key of each sample (B,): a function of the seed and the sample's index, and of what else it is drawn for."""
    keys = jax.vmap(lambda i: jax.random.fold_in(seeds.key(seed), i))(index)
    return keys if purpose is None else jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def prior(diffusion: Diffusion, keys):
    """Draws of the prior (B, H, W, C), one for each key."""
    normal = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), diffusion.space.shape))
    return diffusion.sde.prior_std * normal(keys)


def draws(diffusion: Diffusion, keys) -> Callable:
    """i -> the i-th standard normal draw (B, H, W, C) after the prior's, one for each key."""
    later = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    return predictor_corrector.noise_of_keys(later, diffusion.space.shape)


def sampler(diffusion: Diffusion, params, seed: int, *, purpose: int | None = None) -> Callable:
    """(table, indices (b,)) -> samples (b, H, W, C) over all devices, from the draws for this purpose.

    Tables of any length and history share a program; those with coefficients per pixel or with noise have their own.
    """

    def one_device(params, table, evaluations, index):
        keys, noise = sample_keys(seed, index, purpose), diffusion.noise_of(params, diffusion.conditions(index))
        return tableau.solve(noise, table, prior(diffusion, keys), draws(diffusion, keys), evaluations)

    on_devices, params = parallel.pmap(one_device, in_axes=(0, None, None, 0)), parallel.replicate(params)

    def sample(table, index):
        evaluations, shape = len(table.t), table.l.shape[1:]
        rows = ROWS if table.l[0].size <= LARGE else 1
        table = tableau.uniform(table, max(HISTORY, table.history), shape)
        table = tableau.lengthened(table, -(-evaluations // rows) * rows)
        return parallel.gather(
            on_devices(params, jax.tree.map(np.float32, table), np.int32(evaluations), parallel.shard(index))
        )

    return sample


def rms(difference) -> float:
    """Root mean square over all entries."""
    return float(np.sqrt(np.square(difference.astype(np.float64)).mean()))


def check_solver(name: str):
    """Refuse what is no few-step solver."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}: use one of {', '.join(SOLVERS)}, or in sample.py pc or ode")


def check_options(solver: str, options: dict, known):
    """Refuse options that a solver does not have, by name."""
    for name in options:
        if name not in known:
            raise UserError(f"solver {solver} has no option {name!r}: it has {', '.join(known)}")


def parse_options(texts: list[str]) -> dict:
    """--option name=value pairs; values are Python literals or plain words."""
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--option {text}: expected name=value, as in --option order=2")
        if name in options:
            raise UserError(f"--option {text}: {name} is given twice, leave one of them out")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def guidance_of(scale: float | None = None, interval: str | None = None, threshold: str | None = None) -> Guidance:
    """Guidance as flags give it; interval: "low,high"."""
    if interval is None:
        return Guidance(scale, None, threshold)
    if scale is None:
        raise UserError(f"--guidance_interval={interval} needs the scale within it: --guidance=2.0")
    try:
        low, high = (float(word) for word in interval.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 <= low < high:
        raise UserError(f"--guidance_interval={interval}: expected two rising times, as in 0.2,0.8")
    return Guidance(scale, (low, high), threshold)


class Searched(NamedTuple):
    """What `python -m tools.search` writes: a solver, and the corrections of its table if they were learned."""

    solver: str
    steps: int
    options: dict
    corrections: Corrections | None


def read_search(model: Model, path: str, bent: tuple[float | None, str | None] = (None, None)) -> Searched:
    """The file of a search, refused unless it was made for this model, guided in this way (`guides.bent_by`)."""
    with files.reading(path, "is no file of python -m tools.search", "make one for this model"):
        record = json.loads(pathlib.Path(path).read_text())
        solver, steps, options, identity = (record[key] for key in ("solver", "steps", "options", "checkpoint"))
        corrections = record.get("corrections")
        if not (fits(steps, 1) and fits(options, {}) and steps > 0 and fits(corrections or {}, {})):
            raise ValueError("its entries are not those of a search")
        if corrections:
            corrections = Corrections(**{name: np.array(values, np.float32) for name, values in corrections.items()})
            (n,), (_, width) = corrections.lam.shape, corrections.predict.shape
            shapes = dict(predict=(n, width), correct=(n, width + 1), lam=(n,))
            finite = all(np.isfinite(values).all() for values in corrections)
            if not finite or {name: values.shape for name, values in corrections._asdict().items()} != shapes:
                raise ValueError("its corrections are not whole")
    if identity != model.identity:
        raise UserError(f"{path} was searched for checkpoint {identity}, this is {model.identity}: search again")
    if "sde" in record:  # older files do not tell
        ours = json.loads(json.dumps(describe_sde(model.diffusion.sde)))
        if record["sde"] != ours:
            raise UserError(f"{path} was searched under {record['sde']}, this model's SDE is {ours}: search again")
    theirs = record.get("guidance_scale"), record.get("guided_by")
    if "guidance_scale" in record and theirs != bent:  # older files do not tell
        told = lambda scale, guide: (
            "no guidance" if scale is None else f"guidance {scale:g}" + f" by {guide}" * bool(guide)
        )
        raise UserError(f"{path} was searched for {told(*theirs)}, sampling has {told(*bent)}: search again")
    return Searched(solver, steps, options, corrections)


def guided_name(scale: float | None, guided_by: str | None) -> str:
    """What bends a model (`guides.bent_by`), for the name of a file."""
    if scale is None:
        return ""
    return f"-guidance{scale:g}" + (f"-by-{guided_by.replace(' ', '-')}" if guided_by else "")


def with_corrections(table: Tableau, sde: SDE, corrections: Corrections) -> Tableau:
    """A solver's table with what was learned; UserError for corrections of another number of evaluations or history."""
    table = jax.tree.map(np.float32, learned.with_history(table))
    if corrections.predict.shape != (len(table.t), table.history + 1):
        raise UserError(
            f"these corrections are for {len(corrections.lam)} evaluations and a history of "
            f"{corrections.predict.shape[1] - 1}, the table has {len(table.t)} and {table.history}: search again"
        )
    return jax.tree.map(np.asarray, learned.corrected(table, sde, corrections))


def published_for(sde: SDE, steps: int, ems: EMS) -> dict:
    """The published options of DPM-Solver-v3 for the kind of model, guided or not, that these EMS are of."""
    known = ems.origin.get
    guided = dict(guidance_scale=known("guidance_scale"), beside=known("guided_by") is not None)
    return published_options(steps, sde, latent=known("latent", False), **guided)


def build_tableau(sde: SDE, solver: str, steps: int, ems: EMS | None = None, /, **options) -> tuple[Tableau, dict]:
    """A solver's table under an SDE, and the options it was built with; misspelt options are refused by name.

    ems: of the model as it is sampled, for dpmv3; None for the others. Options of dpmv3 that are not given are those
        published for the kind of model; sampling ends at no smaller t than the EMS do.
    """
    check_solver(solver)
    build = SOLVERS[solver]
    parameters = inspect.signature(build).parameters
    known = [name for name in parameters if name not in ("sde", "steps", "ems")]
    check_options(solver, options, known)
    for name, value in options.items():
        if parameters[name].annotation is bool and not isinstance(value, bool):
            raise UserError(f"option {name}={value} of solver {solver}: use True or False")
    if solver == "dpmv3":
        published = published_for(sde, steps, ems)
        options = published | dict(t_end=max(published["t_end"], float(ems.t[-1]))) | options
        return build(sde, steps, ems=ems, **options), options
    return build(sde, steps, **options), options
