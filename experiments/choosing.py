"""The solver of `sample.py --solver=auto`: the best file of a search in the run, or the best named one, measured.

What is measured is the RMS distance to a fine solution of the ODE, over NOISES draws, of every solver of CHOICES with
all its options on all named grids: FEW of the draws first, and all of them for the BEST of those. The choice is kept in
the run.
"""

import itertools
import json
import math
import pathlib
import sys
import time

import numpy as np

from ems import statistics
from experiments import guides, measuring, runs, samplers
from experiments.config import shown
from experiments.samplers import Searched
from score_sde import VERSION, files, parallel
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from solvers.dpm_solver import dpm_solver_pp
from solvers.grids import GRIDS
from solvers.search import CHOICES

NOISES, FEW, BEST, SEED = 64, 16, 8, 1
FINE = 100  # evaluations of the fine solution, or five times those that are judged


def best(
    model: runs.Model,
    steps: int,
    *,
    guidance: Guidance = measuring.NONE,
    beside: runs.Guide | None = None,
    label: int | None = None,
    ems_path: str | None = None,
) -> tuple[Searched, pathlib.Path]:
    """The solver for so many evaluations of the model, guided in this way, and the file that tells of it.

    A file of python -m tools.search goes before what was measured here; of several the one of the least distance.
    """
    bent = guides.bent_by(guidance, beside)
    files_of_run = sorted((model.results / "solvers").glob("*.json"))
    fitting = [way for path in files_of_run if (way := _read(model, path, steps, bent)) is not None]
    if fitting:
        _, distance, path, searched = min(fitting, key=lambda way: way[:2])
        print(f"solver: {path}, {searched.solver}, RMS {distance:.4f}")
        return searched, path
    sampled = runs.with_guidance(model, guidance, label=label, beside=beside)
    return _measure(model, sampled, steps, measuring.ems_of(model, ems_path, guidance, beside), bent)


def _read(model: runs.Model, path: pathlib.Path, steps: int, bent: tuple):
    """(whether it was measured here, its distance, the path, what it holds); None for a file that does not fit."""
    try:
        searched = samplers.read_search(model, str(path), bent)
        record = json.loads(path.read_text())
        rows = record["held_out_rms"]  # of the file's own table, the last of these that it has
        distance = float([rows[name] for name in ("measured", "searched", "learned") if name in rows][-1])
    except (UserError, LookupError, ValueError, TypeError, AttributeError):
        return None
    fits = searched.steps == steps and math.isfinite(distance)
    return (record.get("measured", False), distance, path, searched) if fits else None


def _measure(model: runs.Model, sampled: runs.Model, steps: int, ems, bent: tuple) -> tuple[Searched, pathlib.Path]:
    """Measure all named solvers and write the best."""
    began, sde = time.monotonic(), sampled.diffusion.sde
    sample = samplers.sampler(sampled.diffusion, sampled.params, SEED)
    batches = np.split(np.arange(NOISES), NOISES // FEW)
    fine_table = dpm_solver_pp(sde, max(FINE, 5 * steps), order=2)
    fine = [sample(fine_table, index) for index in batches]

    def distance(table, number: int) -> float:
        """Over the first so many batches."""
        squares = [samplers.rms(sample(table, batches[k]) - fine[k]) ** 2 for k in range(number)]
        value = float(np.sqrt(np.mean(squares)))
        return value if math.isfinite(value) else math.inf

    tried = []
    for solver, choices in CHOICES.items():
        for grid, values in itertools.product(GRIDS, itertools.product(*choices.values())):
            options = dict(zip(choices, values, strict=True)) | dict(grid=grid)
            try:
                table, options = samplers.build_tableau(
                    sde, solver, steps, ems if solver == "dpmv3" else None, **options
                )
            except UserError:  # options that do not go together, or too few evaluations
                continue
            tried.append((distance(table, 1), solver, options, table))
    tried.sort(key=lambda way: way[0])
    judged = [(distance(way[3], len(batches)), *way[1:3]) for way in tried[:BEST]]
    value, solver, options = min(judged, key=lambda way: way[0])
    scale, guided_by = bent
    record = dict(
        solver=solver,
        steps=steps,
        options=options,
        checkpoint=model.identity,
        sde=statistics.describe_sde(sde),
        guidance_scale=scale,
        guided_by=guided_by,
        measured=True,
        held_out_rms={"measured": value},
        others=[dict(solver=name, options=given, rms=rms) for rms, name, given in judged],
        noises=NOISES,
        seed=SEED,
        command=" ".join(sys.argv),
        score_sde=VERSION,
    )
    name = f"step{model.step}-auto-{steps}{samplers.guided_name(scale, guided_by)}.json"
    path = model.results / "solvers" / name
    files.write(path, json.dumps(record, indent=2) + "\n")
    parallel.wait_for_all("the choice of a solver is written")
    print(
        f"solver: the best of {len(tried)} solvers, options and grids over {NOISES} noises, measured in "
        f"{time.monotonic() - began:.0f} s: {solver}, {shown(options)}, RMS {value:.4f}; kept in {path}"
    )
    return Searched(solver, steps, options, None), path
