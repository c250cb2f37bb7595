"""Few-step solvers compared on trained models, from the same noises.

    python -m benchmarks.few_steps --workdir=runs/digits,runs/digits_subvp,runs/digits_ve [--num_samples=256]
        [--steps=5,6,8,10,12,15,20] [--network=resnet20.npz] [--repeats=50]

Each solver runs on its paper's own grid of times, and on the named grid that did best on 64 other noises. Columns are
network evaluations; the tables hold the RMS distance to the fine solution over pixels and samples, in the data range,
and the Frechet distance to the training images in the features of a local network. A stochastic solver has no RMS
distance and keeps its own grid; F-PNDM needs 12 evaluations. Then the seconds that a batch takes with each solver, and
without the network. A new data set's network is trained by python -m tools.train_features (for
digits with `--dataset=digits --name=digits --image_size=8 --num_channels=1 --epochs=80 --folder=runs`, a minute). Six
minutes a digits model on two free cores.
"""

import functools

import jax
import numpy as np
from absl import flags

from benchmarks import study
from benchmarks.timed import by_turns
from experiments import figures, measuring, program, samplers
from score_sde.errors import UserError
from score_sde.metrics import features
from solvers.grids import GRIDS

REPEATS = flags.DEFINE_integer("repeats", 50, "Batches timed with each solver.", lower_bound=1)
SEED = 0  # of the noises; grids are chosen on those of the next
CHOOSING = 64  # noises that the grids are chosen on
TIMED_STEPS = 12  # every solver can do it

# row: solver, options, its paper's grid (the solver's default). Both DPM-Solvers of order 1 are DDIM.
SOLVERS = {
    "DDIM": ("ddim", {}, "logsnr"),
    "DPM-Solver 2S": ("dpm", {"order": 2}, "logsnr"),
    "DPM-Solver 3S": ("dpm", {"order": 3}, "logsnr"),
    "DPM-Solver 2M": ("dpm", {"order": 2, "method": "multistep"}, "logsnr"),
    "DPM-Solver 3M": ("dpm", {"order": 3, "method": "multistep"}, "logsnr"),
    "DPM-Solver++ 2S": ("dpmpp", {"order": 2, "method": "singlestep"}, "logsnr"),
    "DPM-Solver++ 3S": ("dpmpp", {"order": 3, "method": "singlestep"}, "logsnr"),
    "DPM-Solver++ 2M": ("dpmpp", {"order": 2}, "logsnr"),
    "DPM-Solver++ 3M": ("dpmpp", {"order": 3}, "logsnr"),
    "SDE-DPM-Solver++ 2M": ("sde_dpmpp", {}, "logsnr"),
    "UniPC bh1": ("unipc", {"variant": "bh1"}, "logsnr"),
    "UniPC bh2": ("unipc", {}, "logsnr"),
    "DEIS tAB3": ("deis", {}, "quadratic"),
    "S-PNDM": ("pndm", {"order": 2}, "time"),
    "F-PNDM": ("pndm", {}, "time"),
    "iPNDM": ("ipndm", {}, "time"),
    "Heun": ("heun", {}, "edm"),
    "DPM-Solver-v3": ("dpmv3", {}, "logsnr"),
}


def main():
    record, lines = {}, []
    for model in study.models():
        network, ems = study.feature_network(model), measuring.ems_of(model)
        found = compared(model, ems, network, study.steps(), study.NUM_SAMPLES.value)
        found["seconds"] = timed(model, ems, REPEATS.value)
        record[str(model.workdir)] = found
        new = shown(model, network, found)
        lines += new
        study.write("few_steps", lines, new, record)


def compared(model, ems, network, steps: list[int], n: int) -> dict:
    """Distances of n samples of every solver, (RMS, Frechet), on its own grid and on the best, and the grids."""
    frechet = lambda found: features.frechet(found, reference)
    reference, floor, floor_images = study.reference_and_floor(model, network)
    solve = study.from_noises(model, SEED, n)
    try_out = study.from_noises(model, SEED + 1, CHOOSING)
    fine, tried = solve(study.fine_solution(model)), try_out(study.fine_solution(model))
    # halving the step of a second-order solver quarters its error
    uncertainty = samplers.rms(tried - try_out(study.fine_solution(model, 2))) / 3

    def measured(table) -> tuple[float | None, float]:
        x = solve(table)
        if not np.isfinite(x).all():
            return np.inf, np.inf
        distance = samplers.rms(x - fine) if table.noise is None else None
        return distance, frechet(study.of_samples(model, network, x))

    grids, own, best = ({name: [] for name in SOLVERS} for _ in range(3))
    for name, k in program.progress([(name, k) for k in steps for name in SOLVERS], desc=model.workdir.name):
        solver, options, published = SOLVERS[name]
        tables, errors = {}, {}
        for grid in GRIDS:
            try:
                tables[grid], _ = samplers.build_tableau(model.diffusion.sde, solver, k, ems, **options, grid=grid)
            except UserError:  # two times of the grid fall on one node of the EMS, or k is too few for F-PNDM
                continue
            if tables[grid].noise is None:
                errors[grid] = np.nan_to_num(samplers.rms(try_out(tables[grid]) - tried), nan=np.inf)
        chosen = min(errors, key=errors.get, default=published)
        own[name].append(measured(tables[published]) if tables else (None, None))
        best[name].append(own[name][-1] if chosen == published else measured(tables[chosen]))
        grids[name].append(chosen)
    return dict(
        steps=steps,
        samples=n,
        own=own,
        best=best,
        grids=grids,
        fine_frechet=frechet(study.of_samples(model, network, fine)),
        fine_uncertainty=uncertainty,
        floor=floor,
        floor_images=floor_images,
        ems={key: ems.origin[key] for key in ("nodes", "num_data")},
    )


def timed(model, ems, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a batch in TIMED_STEPS evaluations with each solver: with the network, and without it.

    By turns; without it, the solver alone works, on x in the network's place.
    """
    batch = np.arange(model.config.sampling.batch_size)
    tables = {
        name: samplers.build_tableau(model.diffusion.sde, solver, TIMED_STEPS, ems, **options)[0]
        for name, (solver, options, _) in SOLVERS.items()
    }
    whole = samplers.sampler(model.diffusion, model.params, SEED)
    alone = samplers.sampler(model.diffusion._replace(noise_of=lambda *_: lambda x, t: x), model.params, SEED)
    calls = [functools.partial(sample, table, batch) for sample in (whole, alone) for table in tables.values()]
    times = by_turns(calls, program.progress(range(repeats + 1), desc="seconds"))
    return dict(zip(tables, zip(times[: len(tables)], times[len(tables) :], strict=True), strict=True))


def shown(model, network, found) -> list[str]:
    """Lines of markdown; writes the picture."""
    rms = lambda which: {
        name: [distance for distance, _ in row]
        for name, row in found[which].items()
        if any(distance is not None for distance, _ in row)
    }
    frechet = lambda which: {name: [distance for _, distance in row] for name, row in found[which].items()}
    with_grid = lambda cells: {
        name: [value and f"{value:#.4g} {grid}" for value, grid in zip(row, found["grids"][name], strict=True)]
        for name, row in cells.items()
    }
    study.FOLDER.mkdir(parents=True, exist_ok=True)
    picture = study.FOLDER / f"few_steps_{model.workdir.name}.png"
    steps, n = found["steps"], found["samples"]
    figures.save_convergence(picture, steps, rms("best"), f"{model.name}, {n} noises, best named grids")
    fastest = min(found["seconds"].values())[0]
    data_range = f"[{model.diffusion.space.low:g}, {model.diffusion.space.high:g}]"
    network_name = f"{network.distance}, {n} samples against the training images"
    seconds = {
        name: [f"{1e3 * whole:.1f}", f"{whole / fastest - 1:+.1%}", f"{1e3 * alone:.2f}", f"{alone / whole:.1%}"]
        for name, (whole, alone) in found["seconds"].items()
    }
    return [
        f"## {model.name}",
        "",
        f"{type(model.diffusion.sde).__name__}, data in {data_range}. RMS distance to the fine solution (DPM-Solver++ "
        f"2M, {model.config.eval.fine_steps} evaluations, known to {found['fine_uncertainty']:.1e}), {n} "
        "noises, each solver on its paper's own grid:",
        "",
        *study.rows("evaluations", steps, rms("own")),
        f"The same on the named grid that was best on {CHOOSING} other noises:",
        "",
        *study.rows("evaluations", steps, with_grid(rms("best"))),
        f"{network_name}, own grids. The fine solution: {found['fine_frechet']:.3g}; "
        f"{found['floor_images']} test images: {found['floor']:.3g}.",
        "",
        *study.rows("evaluations", steps, frechet("own")),
        f"{network_name}, best grids:",
        "",
        *study.rows("evaluations", steps, frechet("best")),
        f"Milliseconds of a batch of {model.config.sampling.batch_size} in {TIMED_STEPS} evaluations, "
        f"median over turns ({jax.default_backend()}):",
        "",
        *study.rows("solver", ["ms", "above the fastest", "without network", "share"], seconds),
    ]


if __name__ == "__main__":
    program.run(main)
