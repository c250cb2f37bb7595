"""Find the times and options that a few-step solver does best with on a model.

    python -m tools.search --steps=5 [--solver=dpmv3] [--workdir=runs/digits] [--option order=2]
    python -m tools.search --steps=5 --learn --minutes=20
    python -m tools.search --steps=5 --guidance=2 [--classifier=WORKDIR | --autoguidance=STEP]       as it is guided
    python sample.py --tableau=runs/digits/solvers/step3000-dpmv3-5.json

What is minimised is the RMS distance to the fine solution of the ODE over some noises: first over the solver's options,
the named grids, and the times of GITS (solvers/gits.py); then over the times between t_max and the end, one at a time
(LD3, Tong et al. 2024, optimises times too). With --learn, half of the minutes go into corrections of the table itself
(solvers/learned.py). What is reported was measured on other noises. The result, a solver's name, options and
corrections, is a small file that sample.py takes.
"""

import functools
import itertools
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

from ems import statistics
from experiments import guides, measuring, program, quality, runs, samplers
from experiments import report as reports
from experiments.config import shown
from score_sde import VERSION, files, parallel
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.metrics import features
from solvers import gits, learned
from solvers.dpm_solver import dpm_solver_pp
from solvers.grids import GRIDS
from solvers.learned import Learned
from solvers.search import CHOICES, descend
from solvers.tableau import Tableau

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_enum("solver", "dpmv3", list(CHOICES), "The solver.")
STEPS = flags.DEFINE_integer("steps", 5, "Network evaluations.", lower_bound=2)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver to hold fixed, name=value; may be repeated.")
EMS = program.path_flag("ems", None, "EMS file for dpmv3; the run's own if absent.")
NOISES = flags.DEFINE_integer("noises", 128, "Noises to search on, and as many others to judge by.", lower_bound=2)
MINUTES = flags.DEFINE_float("minutes", 10.0, "Length of the search, after the fine solutions.", lower_bound=0.1)
SEED = program.seed_flag("Seed of the noises to judge by, as in evaluate.py; the search uses the next.")
LEARN = flags.DEFINE_bool("learn", False, "Learn corrections of the best table too, within the same minutes.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Search for the model guided with this scale.")
CLASSIFIER = program.path_flag("classifier", None, "The run folder of a classifier that guides.")
AUTOGUIDANCE = program.path_flag("autoguidance", None, "An earlier step or a weaker model's run folder, which guides.")


def main():
    model = runs.open_model(WORKDIR.value, CHECKPOINT.value, dataset=program.dataset_at())
    path, held_out = search(
        model,
        SOLVER.value,
        STEPS.value,
        samplers.parse_options(OPTION.value),
        ems_path=EMS.value,
        noises=NOISES.value,
        minutes=MINUTES.value,
        seed=SEED.value,
        guidance=Guidance(GUIDANCE.value),
        beside=guides.guide_of(model, classifier=CLASSIFIER.value, autoguidance=AUTOGUIDANCE.value),
        learn=LEARN.value,
    )
    how = f"over {NOISES.value} other noises, {SOLVER.value} in {STEPS.value} evaluations"
    print(f"\nRMS distance to the fine solution {how}:")
    for name, distance in held_out.items():
        print(f"  {name:16s} {distance:.4f}  {100 * (distance / held_out['published'] - 1):+.0f} %")
    print(f"wrote {path}; use it by python sample.py --tableau={path}")


def search(
    model: runs.Model,
    solver: str,
    steps: int,
    given: dict,
    *,
    ems_path: str | None = None,
    noises: int = 128,
    minutes: float = 10.0,
    seed: int = 0,
    guidance: Guidance = measuring.NONE,
    beside: runs.Guide | None = None,
    learn: bool = False,
) -> tuple[pathlib.Path, dict[str, float]]:
    """Write what is found: (the file, the distance on other noises of each table that was made, by name).

    The tables are the published one, that on the best grid, the searched one, and the learned one.

    given: options to hold fixed; guidance: of the model that is searched for; without, it is the model alone.
    beside: what guides with parameters of its own, if anything.
    learn: spend half of the time on corrections of the searched table.
    """
    # ------------------------------------------------------------------------------ what to search
    files.check_writable(model.results / "solvers")
    ems = measuring.ems_of(model, ems_path, guidance, beside) if solver == "dpmv3" else None
    guided = runs.with_guidance(model, guidance, beside=beside)
    diffusion, (scale, guided_by) = guided.diffusion, guides.bent_by(guidance, beside)
    if guidance.scale is None and beside is None:
        diffusion = diffusion._replace(conditions=lambda index: None)
    sde = diffusion.sde
    build = functools.partial(samplers.build_tableau, sde, solver, steps, ems)
    published, _ = build(**given)
    fine = dpm_solver_pp(sde, model.config.eval.fine_steps, order=2)
    index = np.arange(parallel.round_up(noises))
    network = own_network(model) if learn else None
    if learn:
        print(f"learning will count pixels{f' and features of {network.name}' if network else ' alone'}")
    print(f"{2 * len(index)} fine solutions of {model.config.eval.fine_steps} evaluations, then the search", flush=True)
    searching, judging = (Trajectories(diffusion, guided.params, each, index, fine) for each in (seed + 1, seed))
    seconds = 30 * minutes if learn else 60 * minutes  # of the search, before anything is learned
    deadline = time.monotonic() + seconds

    def distance(options: dict) -> float:
        try:
            return searching.distance(build(**options)[0])
        except UserError:  # options that do not go together, or times that fall on one node
            return np.inf

    # ------------------------------------------------------------------------------ options, then times
    choices = {name: values for name, values in CHOICES[solver].items() if name not in given}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    grids = [given["grid"]] if "grid" in given else list(GRIDS)
    tried = []
    for grid, combination in itertools.product(grids, combinations):
        options = given | combination | {"grid": grid}
        tried.append((distance(options), options))
        if time.monotonic() > deadline - seconds / 2:  # the rest is for the times
            break
    value, named = min(tried, key=lambda pair: pair[0])
    print(f"{len(tried)} combinations of options and grids; the best, {shown(named)}: {value:.4f}")
    t_end = named.get("t_end") or (sde.t_min if ems is None else ems.t[-1])
    if "grid" not in given:
        cheap = cheapest_times(searching, steps, t_end)
        along = named | {"grid": cheap.tolist()}
        value_along = distance(along)
        print(f"the times of GITS: {value_along:.4f}")
        named = along if value_along < value else named
    times = np.array([*build(**named)[0].t, t_end])
    with_times = lambda lam: named | {"grid": sde.t_of_lam(lam).clip(times[-1], times[0]).tolist()}
    lam, value = descend(lambda lam: distance(with_times(lam)), sde.lam(times), deadline)
    options = with_times(lam)

    # ------------------------------------------------------------------------------ judge, write
    rows = {"published": published, "best grid": build(**named)[0], "searched": build(**options)[0]}
    found = None
    if learn:
        found = learn_from(rows["searched"], searching, deadline + seconds, network)
        rows["learned"] = samplers.with_corrections(rows["searched"], sde, found.corrections)
    held_out = {name: judging.distance(table) for name, table in rows.items()}
    record = dict(
        solver=solver,
        steps=steps,
        options=options,
        checkpoint=model.identity,
        sde=statistics.describe_sde(sde),
        asked=features.fingerprint(
            given, guidance.scale, noises, seed, ems_path, *([] if beside is None else [guided_by])
        ),
        guidance_scale=scale,
        guided_by=guided_by,
        corrections=found and {name: values.tolist() for name, values in found.corrections._asdict().items()},
        learned_by=found and dict(loss=["pixels", *([network.name] if network else [])], held_out=found.held_out),
        held_out_rms=held_out,
        searched_rms=value,
        noises=noises,
        seed=seed,
        command=" ".join(sys.argv),
        score_sde=VERSION,
    )
    name = f"step{model.step}-{solver}-{steps}{samplers.guided_name(scale, guided_by)}{'-learned' if learn else ''}"
    path = model.results / "solvers" / f"{name}.json"
    path = reports.beside(path, record, ("checkpoint", "asked"))
    files.write(path, json.dumps(record, indent=2) + "\n")
    return path, held_out


class Trajectories:
    """Draws of the prior of a seed, and the fine solutions from them by the table `fine`."""

    def __init__(self, diffusion: Diffusion, params, seed: int, index: np.ndarray, fine: Tableau):
        self.diffusion, self.params, self.index = diffusion, params, index
        self.sample = samplers.sampler(diffusion, params, seed)
        self.starts = np.asarray(samplers.prior(diffusion, samplers.sample_keys(seed, index)))
        self.ends = self.sample(fine, index)
        self.conditions = jax.tree.map(np.asarray, diffusion.conditions(index))

    def distance(self, table: Tableau) -> float:
        """RMS over pixels and noises between the ends of a table and the fine ones."""
        return samplers.rms(self.sample(table, self.index) - self.ends)


def own_network(model: runs.Model) -> features.FeatureNetwork | None:
    """The local network of a model's data set; None where there is none, or it takes no such images."""
    path = features.local_networks().get(features.local_name(model.config.data.dataset or ""))
    space = model.diffusion.space
    if path is None or not np.isfinite(space.high):
        return None
    network, x = features.local(path), jax.ShapeDtypeStruct((1, *space.shape), np.float32)
    try:
        jax.eval_shape(quality.differentiable_features(network, space), x)
    except UserError:  # of images of another size
        return None
    return network


def cheapest_times(trajectories: Trajectories, steps: int, t_end: float) -> np.ndarray:
    """The times of GITS along trajectories from at most 32 of the noises."""
    starts, conditions = jax.tree.map(lambda values: values[:32], (trajectories.starts, trajectories.conditions))
    noise = trajectories.diffusion.noise_of(trajectories.params, conditions)
    return gits.times(noise, trajectories.diffusion.sde, starts, steps, t_end=t_end)


def learn_from(
    table: Tableau,
    trajectories: Trajectories,
    deadline: float,
    network: features.FeatureNetwork | None = None,
) -> Learned:
    """Corrections of a table, learned on three quarters of the trajectories; the last quarter chooses.

    network: if not None, its features count as much as the pixels do.
    """
    diffusion, n = trajectories.diffusion, len(trajectories.index)
    batch = parallel.round_up(max(1, min(32, n // 4)))
    n = n // batch * batch
    if n < 2 * batch:
        raise UserError(f"--learn on {n} noises: expected --noises={2 * batch} or more")
    whole_batches = jax.tree.map(
        lambda values: values[:n], (trajectories.starts, trajectories.ends, trajectories.conditions)
    )

    parts = [lambda x: x]
    if network is not None:
        parts.append(quality.differentiable_features(network, diffusion.space))
    ends = trajectories.sample(table, trajectories.index)
    units = [samplers.rms(part(ends) - part(trajectories.ends)) for part in parts]

    def seen(x):
        """Arrays whose squared differences have the same mean of 1 for each part, before anything is learned."""
        values = [part(x) / unit for part, unit in zip(parts, units, strict=True)]
        size = sum(value.size for value in values)
        return [value * (size / len(parts) / value.size) ** 0.5 for value in values]

    def progress(done, total, best):
        print(
            f"learning: {done} of at most {total} iterations, {best:.3f} of the first distance on noises held out",
            flush=True,
        )

    return learned.learn(
        diffusion.noise_of,
        trajectories.params,
        diffusion.sde,
        table,
        *whole_batches,
        held_out=max(1, n // (4 * batch)) * batch,
        batch_size=batch,
        features=seen,
        deadline=deadline,
        progress=progress,
    )


if __name__ == "__main__":
    program.run(main)
