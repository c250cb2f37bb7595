"""Evaluate a trained model: test loss, and how near few-step solvers come to the exact ODE.

    python evaluate.py [--workdir=runs/digits] [--metrics=loss,convergence]

The convergence study starts DDIM, DPM-Solver++ and DPM-Solver-v3 from the same noise and measures the RMS distance,
over pixels and samples in the data range, to a finely solved ODE. Writes report.json, report.md and
convergence.png to <workdir>/eval/.
"""

import json
import sys
import time

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import experiment as experiments
from score_sde import VERSION, figures, parallel
from score_sde.errors import UserError
from solvers import tableau
from solvers.dpm_solver import dpm_solver_pp

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
METRICS = flags.DEFINE_list("metrics", ["loss", "convergence"], "What to evaluate.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.")

# What the convergence study compares: row name -> solver and options.
STUDY = {
    "DDIM": ("ddim", {}),
    "DPM-Solver++ 2M": ("dpmpp", {"order": 2}),
    "DPM-Solver++ 3M": ("dpmpp", {"order": 3}),
    "DPM-Solver-v3": ("dpmv3", {}),
}


def main():
    metrics = {"loss": held_out_loss, "convergence": convergence}
    for name in METRICS.value:
        if name not in metrics:
            raise UserError(f"unknown metric {name!r}: use one of {', '.join(metrics)}")
    model = experiments.open_model(WORKDIR.value, CHECKPOINT.value)
    folder = model.workdir / "eval"
    report = dict(
        model=dict(workdir=str(model.workdir), step=model.step, identity=model.identity),
        seed=SEED.value,
        command=" ".join(sys.argv),
        versions=dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0]),
    )
    text = [f"# {model.name}", "", f"`python {report['command']}`", ""]
    for name in METRICS.value:
        report[name], lines = metrics[name](model, folder)
        print("\n".join(["", *lines]))
        text += [*lines, ""]
    experiments.write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    experiments.write_atomically(folder / "report.md", "\n".join(text))
    print(f"\nwrote {folder}/report.json and report.md")


def held_out_loss(model, folder) -> tuple[dict, list[str]]:
    """The training loss on test images with the averaged parameters: mean and standard error over images."""
    experiment, fields = model.experiment, model.experiment.config.eval
    images = experiment.images("test")
    batch_size = min(fields.batch_size, images.size // jax.device_count() * jax.device_count())
    parallel.batch_per_device(batch_size)
    loss = experiment.loss()
    key = jax.random.key(SEED.value)
    on_devices = parallel.pmap(lambda params, batch: loss(params, batch, key, False))
    params, values = parallel.replicate(model.params), []
    n = min(fields.num_data, images.size)
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        batch = images.take(index.clip(max=n - 1)) | {"index": index}  # the last batch is filled up, and cut below
        values.append(parallel.gather(on_devices(params, parallel.shard(batch))))
    values = np.concatenate(values)[:n].astype(np.float64)
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(n)
    return dict(mean=mean, standard_error=error, images=n), [f"Test loss {mean:.5f} +- {error:.5f} ({n} images)"]


def convergence(model, folder) -> tuple[dict, list[str]]:
    """RMS distance to the fine solution for each solver of STUDY and number of evaluations."""
    experiment, fields = model.experiment, model.experiment.config.eval
    n = -(-fields.num_samples // jax.device_count()) * jax.device_count()
    noise = jax.jit(lambda index: experiments.prior(experiment, experiments.sample_keys(SEED.value, index)))
    x = parallel.shard(np.asarray(noise(np.arange(n))))
    on_devices = parallel.pmap(
        lambda params, table, x: tableau.solve(experiment.noise_of(params), table, x), in_axes=(0, None, 0)
    )
    params = parallel.replicate(model.params)

    def solve(table):
        table = jax.tree.map(np.float32, tableau.uniform(table, 4, experiment.image_shape))
        return parallel.gather(on_devices(params, table, x))

    fine, coarser = (
        solve(dpm_solver_pp(experiment.sde, k, order=2)) for k in (fields.fine_steps, fields.fine_steps // 2)
    )
    rms = lambda difference: float(np.sqrt(np.square(difference.astype(np.float64)).mean()))
    ems = experiments.ems_of(model, EMS.value)
    steps = list(fields.steps)
    distances = {name: [] for name in STUDY}
    seconds = time.perf_counter()
    for k in tqdm(steps, desc="convergence", dynamic_ncols=True):
        for name, (solver, options) in STUDY.items():
            table = experiments.build_tableau(model, solver, k, ems, **options)
            distances[name].append(rms(solve(table[0]) - fine))
    seconds = time.perf_counter() - seconds
    # halving the step of a second-order solver quarters its error
    uncertainty = rms(fine - coarser) / 3
    title = f"{model.name}, {n} noises"
    folder.mkdir(parents=True, exist_ok=True)
    figures.save_convergence(folder / "convergence.png", steps, distances, title)
    lines = [
        f"RMS distance to the fine solution over {n} noises (DPM-Solver++ 2M in {fields.fine_steps} evaluations, "
        f"itself known to {uncertainty:.1e})",
        "",
        "| evaluations | " + " | ".join(map(str, steps)) + " |",
        "|---" * (len(steps) + 1) + "|",
        *(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |" for name, values in distances.items()),
        "",
        "![convergence](convergence.png)",
    ]
    result = dict(steps=steps, rms=distances, fine_steps=fields.fine_steps, fine_uncertainty=uncertainty, noises=n)
    return result | dict(seconds=seconds, ems=ems.origin), lines


if __name__ == "__main__":
    experiments.run(main)
