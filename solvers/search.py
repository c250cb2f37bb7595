"""Find the times and options that a few-step solver does best with on a model.

    python -m solvers.search --steps=5 [--solver=dpmv3] [--workdir=runs/digits] [--option order=2]
    python sample.py --tableau=runs/digits/solvers/step3000-dpmv3-5.json

What is minimised is the RMS distance to the fine solution of the ODE over some noises: first over the solver's options
and the named grids, then over the times between t_max and the end, one at a time. (Optimised grids: GITS, Chen et al.
2024; LD3, Tong et al. 2024; here together with measured statistics.) What is reported was measured on other noises. The
result, a solver's name and options, is a small file that sample.py takes.
"""

import functools
import itertools
import json
import sys
import time

import jax
import numpy as np
from absl import flags

import experiment as experiments
from score_sde import VERSION, parallel
from score_sde.errors import UserError
from solvers import SOLVERS, tableau
from solvers.dpm_solver import dpm_solver_pp
from solvers.grids import GRIDS

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_string("solver", "dpmv3", f"One of {', '.join(SOLVERS)}.")
STEPS = flags.DEFINE_integer("steps", 5, "Network evaluations.", lower_bound=2)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver to hold fixed, name=value; may be repeated.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
NOISES = flags.DEFINE_integer("noises", 128, "Noises to search on, and as many others to judge by.", lower_bound=2)
MINUTES = flags.DEFINE_float("minutes", 10.0, "The search stops here at the latest.", lower_bound=0.1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noises to judge by, as in evaluate.py; the search uses the next.")

# Options worth trying, by solver; those that are absent have none but their times.
CHOICES = {
    "dpmv3": {
        "order": (2, 3),
        "pseudo": (False, True),
        "corrector": ("on", "off"),
        "corrector_pseudo": (False, True),
        "lower_order_final": (False, True),
    },
    "dpmpp": {"order": (2, 3), "lower_order_final": (False, True)},
    "unipc": {"order": (2, 3), "prediction": ("data", "noise"), "lower_order_final": (False, True)},
    "deis": {"order": (2, 3, 4)},
    "ipndm": {"order": (2, 3, 4)},
}


def main():
    # ------------------------------------------------------------------------------ what to search
    model = experiments.open_model(WORKDIR.value, CHECKPOINT.value)
    solver, steps, given = SOLVER.value, STEPS.value, experiments.parse_options(OPTION.value)
    ems = experiments.ems_of(model, EMS.value) if solver == "dpmv3" else None
    build = functools.partial(experiments.build_tableau, model, solver, steps, ems)
    published, _ = build(**given)
    search, judge = (distance_to_fine(model, seed) for seed in (SEED.value + 1, SEED.value))
    deadline = time.monotonic() + 60 * MINUTES.value

    def distance(options: dict) -> float:
        try:
            return search(build(**options)[0])
        except UserError:  # options that do not go together, or times that fall on one node
            return np.inf

    # ------------------------------------------------------------------------------ options, then times
    choices = {name: values for name, values in CHOICES.get(solver, {}).items() if name not in given}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    grids = [given["grid"]] if "grid" in given else list(GRIDS)
    tried = []
    for grid, combination in itertools.product(grids, combinations):
        options = given | combination | {"grid": grid}
        tried.append((distance(options), options))
        if time.monotonic() > deadline - 30 * MINUTES.value:  # half of the time is for the times
            break
    value, options = min(tried, key=lambda pair: pair[0])
    named = options
    print(f"{len(tried)} combinations of options and grids; the best, {shown(options)}: {value:.4f}")
    sde, t = model.experiment.sde, build(**options)[0].t
    end = sde.t_min if ems is None else ems.t[-1]
    times = np.array([*t, options.get("t_end") or end])
    with_times = lambda lam: options | {"grid": sde.t_of_lam(lam).clip(times[-1], times[0]).tolist()}
    lam, value = descend(lambda lam: distance(with_times(lam)), sde.lam(times), deadline)
    options = with_times(lam)

    # ------------------------------------------------------------------------------ judge, write
    rows = {"published": published, "best named grid": build(**named)[0], "searched": build(**options)[0]}
    held_out = {name: judge(table) for name, table in rows.items()}
    print(f"\nRMS distance to the fine solution over {NOISES.value} other noises, {solver} in {steps} evaluations:")
    for name, found in held_out.items():
        print(f"  {name:16s} {found:.4f}  {100 * (found / held_out['published'] - 1):+.0f} %")
    record = dict(
        solver=solver,
        steps=steps,
        options=options,
        checkpoint=model.identity,
        held_out_rms=held_out,
        searched_rms=value,
        noises=NOISES.value,
        seed=SEED.value,
        command=" ".join(sys.argv),
        score_sde=VERSION,
    )
    path = model.workdir / "solvers" / f"step{model.step}-{solver}-{steps}.json"
    experiments.write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}; use it by python sample.py --tableau={path}")


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def distance_to_fine(model, seed: int):
    """tableau -> RMS distance, over pixels and noises, of its end points to those of the fine solution."""
    experiment = model.experiment
    n = -(-NOISES.value // jax.device_count()) * jax.device_count()
    index = parallel.shard(np.arange(n))
    draw = parallel.pmap(lambda index: experiments.prior(experiment, experiments.sample_keys(seed, index)))
    on_devices = parallel.pmap(
        lambda params, table, x: tableau.solve(experiment.noise_of(params), table, x), in_axes=(0, None, 0)
    )
    params, x = parallel.replicate(model.params), draw(index)

    def solve(table):
        table = tableau.uniform(table, max(4, table.history), experiment.image_shape)
        return parallel.gather(on_devices(params, jax.tree.map(np.float32, table), x)).astype(np.float64)

    fine = solve(dpm_solver_pp(experiment.sde, experiment.config.eval.fine_steps, order=2))
    return lambda table: float(np.sqrt(np.square(solve(table) - fine).mean()))


def descend(distance, lam, deadline: float):
    """(lam, distance(lam)) of a local minimum over the interior of a rising lam (n + 1,), or of where time ran out.

    Each point in turn tries a part of the way to either neighbour; when no point moves, the part is halved.
    """
    best, part = distance(lam), 0.5
    while part > 0.02:
        moved = False
        for i, side in itertools.product(range(1, len(lam) - 1), (-1, 1)):
            if time.monotonic() > deadline:
                return lam, best
            trial = lam.copy()
            trial[i] += part * (lam[i + side] - lam[i])
            value = distance(trial)
            if value < best:
                lam, best, moved = trial, value, True
        if not moved:
            part /= 2
    return lam, best


if __name__ == "__main__":
    experiments.run(main)
