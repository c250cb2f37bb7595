"""Evaluate a trained model: samples, test loss, and how near few-step solvers come to the exact ODE.

    python evaluate.py [--workdir=runs/digits] [--metrics=loss,convergence,samples]
    python evaluate.py --checkpoint=all                     every checkpoint of a run in turn, and a table of them
    python evaluate.py --metrics=bpd,encoding               bits/dim of test images; how well the ODE brings them back
    python evaluate.py --metrics=fid --num_samples=10000 [--solver=dpmv3 --steps=10] [--network=resnet20-fashion_mnist]
    python evaluate.py --metrics=fid --solver=ddim,dpmpp,unipc,dpmv3 --steps=5,6,8,10,12,15,20      the paper's table
    python evaluate.py --samples=FOLDER --config=configs/fashion_mnist.py       anyone's images against a data set
    python evaluate.py --statistics --config=configs/fashion_mnist.py           of a data set, kept in runs/statistics/

The convergence study starts the few-step solvers of STUDY from the same noise and measures the RMS distance,
over pixels and samples in the data range, to a finely solved ODE.

Writes report.json, report.md and figures to <workdir>/eval/, for checkpoints named by --checkpoint to eval/step<N>/.
What several calls measure of one checkpoint adds up in its report; `fid` adds a row for each solver, number of
evaluations, of samples, and seed. The report also shows the loss curve and the EMS, if the run has them.
"""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from ems import statistics
from experiments import events, figures, measuring, program, quality, runs, samplers
from experiments import report as reports
from experiments.build import build
from score_sde import VERSION, checkpoint, data, files, parallel
from score_sde.errors import UserError
from solvers import probability_flow
from solvers.dpm_solver import dpm_solver_pp

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Step of the checkpoint, or all; the last if absent.")
METRICS = flags.DEFINE_list("metrics", ["loss", "convergence", "samples"], "What to evaluate.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.")

CONFIG = program.config_flag()
STATISTICS = flags.DEFINE_bool("statistics", False, "Measure the features of a config's training images, and no more.")
SAMPLES = flags.DEFINE_string("samples", None, "Evaluate these images, a folder or an .npz, instead of a model's.")
REFERENCE = flags.DEFINE_string("reference", None, "Statistics to compare with (.npz of mu and sigma), not our own.")
NETWORK = flags.DEFINE_string("network", None, "inception, resnet20-NAME or its .npz; that of the data set if absent.")
INCEPTION_WEIGHTS = flags.DEFINE_string("inception_weights", None, "pytorch-fid's file; downloaded if absent.")
INCEPTION_MODE = flags.DEFINE_string("inception_mode", "tf", "Preprocessing: tf (TensorFlow's) or pf (pytorch-fid's).")
ANY_INCEPTION_WEIGHTS = flags.DEFINE_bool("any_inception_weights", False, "Accept weights of another hash.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 10_000, "Images of fid; published numbers take 50000.", lower_bound=2)
SOLVER = flags.DEFINE_list("solver", None, "Of fid, and the first of samples; the config's if absent.")
STEPS = flags.DEFINE_list("steps", None, "Network evaluations, likewise; with each solver. The config's if absent.")

# What the convergence study compares: row name -> solver and options.
STUDY = {
    "DDIM": ("ddim", {}),
    "DPM-Solver++ 2M": ("dpmpp", {"order": 2}),
    "DPM-Solver++ 3M": ("dpmpp", {"order": 3}),
    "DPM-Solver 3S": ("dpm", {"order": 3}),
    "DEIS tAB3": ("deis", {}),
    "iPNDM": ("ipndm", {}),
    "Heun": ("heun", {}),
    "UniPC bh2": ("unipc", {}),
    "DPM-Solver-v3": ("dpmv3", {}),
}


def main():
    if STATISTICS.value or SAMPLES.value is not None:
        images_and_data()
        return
    metrics = {"loss": held_out_loss, "convergence": convergence, "fid": sample_quality, "samples": sample_grid}
    metrics |= {"bpd": bits_per_dim, "encoding": encoding}
    for name in METRICS.value or [""]:
        if name not in metrics:
            raise UserError(f"unknown metric {name!r}: use one of {', '.join(metrics)}")
    for text in STEPS.value or []:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"--steps={text}: expected numbers of network evaluations, as in --steps=5,10")
    for name in SOLVER.value or []:
        samplers.check_solver(name)  # before the others have worked for hours
    chosen = {name: metrics[name] for name in METRICS.value}
    if CHECKPOINT.value is None:
        evaluate(runs.open_model(WORKDIR.value), chosen)
        return
    folder = run_folder()
    if not CHECKPOINT.value.isdecimal() and CHECKPOINT.value != "all":
        raise UserError(f"--checkpoint={CHECKPOINT.value}: expected a step, or all")
    steps = checkpoint.Checkpoints(folder).steps() if CHECKPOINT.value == "all" else [int(CHECKPOINT.value)]
    if not steps:
        raise UserError(f"{folder} has no finished checkpoints: leave out --checkpoint, or train first")
    found = {step: evaluate(runs.open_model(folder, step), chosen, f"step{step}") for step in steps}
    if len(found) > 1:
        lines = [f"# {folder}", "", *reports.compared(found), "", *(f"- [step {k}](step{k}/report.md)" for k in found)]
        files.write(folder / "eval" / "checkpoints.md", "\n".join([*lines, ""]))
        print("\n".join(["", *lines[:-1]]) + f"\nwrote {folder}/eval/checkpoints.md")


def evaluate(model, metrics: dict, name: str = ".") -> dict:
    """Measure, print, and write what is measured to the report in eval/<name>/, which is returned."""
    folder = model.results / "eval" / name
    report = earlier(model, folder)
    versions = dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0], on=parallel.devices())
    for metric, measure in metrics.items():
        ways = [()]
        if metric == "fid":
            ways, measure = sampling_ways(model), measure(model)  # which compiles once for all ways
        for way in ways:
            began = time.perf_counter()
            result = measure(model, folder, *way)
            seconds = time.perf_counter() - began
            result |= dict(seed=SEED.value, seconds=seconds, command=" ".join(sys.argv), versions=versions)
            report = reports.add(report, metric, result)
            print("\n".join(["", *reports.lines(metric, result)]))
            write(folder, report)
    report |= training(model, folder) | shown_ems(model, folder)
    write(folder, report)
    print(f"\nwrote {folder}/report.json and report.md")
    return report


def earlier(model, folder) -> dict:
    """The report that grows: of this checkpoint; one of another makes room, in a folder of its own."""
    about = dict(workdir=str(model.workdir), step=model.step, identity=model.identity)
    report = reports.read(folder)
    if report is not None and report["model"]["identity"] == model.identity:
        return report | dict(model=about)
    if report is not None and parallel.writes():
        aside = folder / f"step{report['model']['step']}"
        aside.mkdir(exist_ok=True)
        for path in [*folder.glob("report.*"), *folder.glob("*.png")]:
            path.replace(aside / path.name)
        print(f"the report of step {report['model']['step']} is now in {aside}")
    return dict(model=about)


def write(folder, report: dict):
    files.write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    files.write(folder / "report.md", reports.render(report))


def training(model, folder) -> dict:
    """The loss as training logged it, up to this checkpoint, and its picture."""
    found = events.training(model.workdir / "tensorboard", model.step)
    if found is None:
        return {}
    record, loss, held_out = found
    figures.save_loss(folder / "loss.png", loss, held_out, model.name)
    return dict(training=record)


def shown_ems(model, folder) -> dict:
    """Of which images the statistics are that a sampler would take, and their picture."""
    path = measuring.find(model)
    if path is None:
        return {}
    ems = statistics.load(path)
    figures.save_ems(folder / "ems.png", ems.lam, {"l": ems.l, "s": ems.s, "b": ems.b}, f"EMS of {model.name}")
    return dict(ems=ems.origin)


def test_batches(experiment, images, n: int):
    """(index, batch) of the first n of test images, sharded over devices; the last batch is filled up."""
    batch_size = parallel.round_up(min(experiment.config.eval.batch_size, n))
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        yield index, parallel.shard(images.take(index.clip(max=n - 1)) | {"index": index})


def held_out_loss(model, folder) -> dict:
    """The training loss on test images with the averaged parameters: mean and standard error over images."""
    experiment, fields = model.experiment, model.experiment.config.eval
    images = experiment.images("test")
    parallel.batch_per_device(min(fields.batch_size, images.size // jax.device_count() * jax.device_count()))
    loss = experiment.loss()
    key = jax.random.key(SEED.value)
    on_devices = parallel.pmap(lambda params, batch: loss(params, batch, key, False))
    params, values = parallel.replicate(model.params), []
    n = min(fields.num_data, images.size)
    for _, batch in test_batches(experiment, images, n):
        values.append(parallel.gather(on_devices(params, batch)))
    values = np.concatenate(values)[:n].astype(np.float64)
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(n)
    return dict(mean=mean, standard_error=error, images=n)


def convergence(model, folder) -> dict:
    """RMS distance to the fine solution for each solver of STUDY and number of evaluations."""
    experiment, fields = model.experiment, model.experiment.config.eval
    n = parallel.round_up(fields.num_samples)
    sample = samplers.sampler(model, lambda params, *_: experiment.noise_of(params), SEED.value)
    solve = lambda table: sample(table, np.arange(n))

    ems = measuring.ems_of(model, EMS.value)
    fine, coarser = (
        solve(dpm_solver_pp(experiment.sde, k, order=2)) for k in (fields.fine_steps, fields.fine_steps // 2)
    )
    steps = list(fields.steps)
    distances = {name: [] for name in STUDY}
    for k in program.progress(steps, desc="convergence"):
        for name, (solver, options) in STUDY.items():
            table = samplers.build_tableau(model, solver, k, ems, **options)
            distances[name].append(samplers.rms(solve(table[0]) - fine))
    # halving the step of a second-order solver quarters its error
    uncertainty = samplers.rms(fine - coarser) / 3
    figures.save_convergence(folder / "convergence.png", steps, distances, f"{model.name}, {n} noises")
    result = dict(steps=steps, rms=distances, fine_steps=fields.fine_steps, fine_uncertainty=uncertainty, noises=n)
    return result | dict(ems=ems.origin)


def sampling_ways(model) -> list[tuple[str, int]]:
    """Each of --solver with each of --steps."""
    fields = model.experiment.config.sampling
    steps = [int(text) for text in STEPS.value or [fields.steps]]
    return [(solver, count) for solver in SOLVER.value or [fields.solver] for count in steps]


def sample_grid(model, folder) -> dict:
    """A picture of the first samples, as many as the config's batches have."""
    solver, steps = sampling_ways(model)[0]
    sample = samplers.sampler(model, model.experiment.noise_of, SEED.value)
    images_of, _, options, n = quality.drawer(model, sample, solver, steps, EMS.value)
    figures.save_grid(folder / "samples.png", images_of(0, n)[:256])
    return dict(solver=solver, steps=steps, options=options, num_samples=min(n, 256))


# ------------------------------------------------------------------------------------------------ likelihood


def bits_per_dim(model, folder) -> dict:
    """Bits/dim of uniformly dequantized test images: an upper bound, in the mean, on those of their levels."""
    experiment, fields = model.experiment, model.experiment.config.eval.likelihood
    centered, shape = experiment.config.data.centered, experiment.image_shape
    if fields.probe not in probability_flow.PROBES:
        raise UserError(f"unknown probe {fields.probe!r}: use one of {', '.join(probability_flow.PROBES)}")
    images = experiment.images("test")
    n = min(fields.num_data, images.size)

    def one_device(params, batch, repeat):
        keys = samplers.sample_keys(SEED.value, batch["index"], repeat)
        dequantize = functools.partial(
            data.preprocess, random_flip=False, uniform_dequantization=True, centered=centered
        )
        x = jax.vmap(dequantize)(keys, batch["image"])
        probe = lambda key: probability_flow.PROBES[fields.probe](jax.random.fold_in(key, 2), fields.num_probes, shape)
        logp, _, run = probability_flow.log_likelihood(
            experiment.noise_of(params, batch.get("label")),
            experiment.sde,
            x,
            jax.vmap(probe, out_axes=1)(keys),
            rtol=fields.rtol,
            atol=fields.atol,
            t_min=fields.t_min,
        )
        return probability_flow.bits_per_dim(logp, shape, centered=centered), run

    on_devices = parallel.pmap(one_device, in_axes=(0, 0, None))
    params, values, evaluations = parallel.replicate(model.params), [], []
    for repeat in program.progress(range(fields.repeats), desc="bits/dim"):
        row = []
        for index, batch in test_batches(experiment, images, n):
            bpd, run = parallel.gather(on_devices(params, batch, repeat))
            probability_flow.check(run, bpd[:, None, None, None], index)
            row.append(bpd)
            evaluations.append(int(run.evaluations[0]))
        values.append(np.concatenate(row)[:n].astype(np.float64))
    per_image = np.mean(values, axis=0)
    mean, error = per_image.mean(), per_image.std(ddof=1) / np.sqrt(n)
    spread = np.std([row.mean() for row in values], ddof=1) if fields.repeats > 1 else None
    options = fields.to_dict() | dict(num_data=n)
    about = dict(
        conditional=experiment.num_classes > 0,
        trained_on_dequantized=experiment.config.data.uniform_dequantization,
        evaluations=evaluations,
    )
    return dict(mean=mean, standard_error=error, spread_of_repeats=spread, **options) | about


def encoding(model, folder) -> dict:
    """How far test images come back from their latents."""
    experiment, fields = model.experiment, model.experiment.config.eval
    sde, images = experiment.sde, experiment.images("test")
    n = min(fields.num_samples, images.size)
    tolerances = dict(rtol=fields.likelihood.rtol, atol=fields.likelihood.atol)

    def one_device(params, batch):
        noise = experiment.noise_of(params, batch.get("label"))
        x = experiment.as_seen(samplers.sample_keys(SEED.value, batch["index"]), batch["image"])
        z, there = probability_flow.solve(noise, sde, x, t_start=sde.t_min, t_end=sde.t_max, **tolerances)
        back, run = probability_flow.solve(noise, sde, z, **tolerances)
        return back, back - x, there, run

    on_devices, params = parallel.pmap(one_device), parallel.replicate(model.params)
    errors, evaluations = [], []
    for index, batch in test_batches(experiment, images, n):
        back, error, *runs = parallel.gather(on_devices(params, batch))
        for run in runs:
            probability_flow.check(run, back, index)
        errors.append(error)
        evaluations.append([int(run.evaluations[0]) for run in runs])
    errors = np.concatenate(errors)[:n].astype(np.float64)
    rms, largest = float(np.sqrt(np.square(errors).mean())), float(np.abs(errors).max())
    return dict(rms=rms, largest=largest, images=n, evaluations=evaluations, **tolerances)


# ------------------------------------------------------------------------------------------------ quality of images


def feature_network(config):
    return quality.feature_network(
        config,
        NETWORK.value,
        inception_weights=INCEPTION_WEIGHTS.value,
        inception_mode=INCEPTION_MODE.value,
        any_inception_weights=ANY_INCEPTION_WEIGHTS.value,
    )


def sample_quality(model) -> Callable:
    """(model, folder, solver, steps) -> distances of --num_samples samples to the training images; resumes if stopped.

    Sampler and feature network are compiled once for all solvers and numbers of steps.
    """
    network = feature_network(model.experiment.config)
    sample = samplers.sampler(model, model.experiment.noise_of, SEED.value)
    return functools.partial(
        quality.of_samples,
        sample=sample,
        network=network,
        n=NUM_SAMPLES.value,
        seed=SEED.value,
        ems_path=EMS.value,
        reference_path=REFERENCE.value,
    )


def images_and_data():
    """--statistics and --samples: a data set's statistics alone, or anyone's images against them."""
    config = runs.config_of_run(run_folder()) if CONFIG.value is None else program.config_of(CONFIG)
    experiment = build(config)
    network = feature_network(config)
    if STATISTICS.value:
        print(f"statistics: {quality.data_statistics(experiment, network, 'train')[1]}")
    if SAMPLES.value is not None:
        result = quality.of_images(experiment, network, SAMPLES.value, REFERENCE.value)
        print("\n".join(["", *reports.quality_lines(result)]))
        path = runs.RUNS / "evaluated" / f"{pathlib.Path(SAMPLES.value).stem}-{network.distance}.json"
        record = result | dict(samples=SAMPLES.value, command=" ".join(sys.argv))
        files.write(path, json.dumps(record, indent=2) + "\n")
        print(f"\nwrote {path}")


def run_folder() -> pathlib.Path:
    return runs.newest_run() if WORKDIR.value is None else pathlib.Path(WORKDIR.value)


if __name__ == "__main__":
    program.run(main)
