"""Evaluate a trained model: test loss, and how near few-step solvers come to the exact ODE.

    python evaluate.py [--workdir=runs/digits] [--metrics=loss,convergence]
    python evaluate.py --metrics=bpd,encoding               bits/dim of test images; how well the ODE brings them back
    python evaluate.py --metrics=fid --num_samples=10000 [--solver=dpmv3 --steps=10] [--network=resnet20-fashion_mnist]
    python evaluate.py --samples=FOLDER --config=configs/fashion_mnist.py       anyone's images against a data set
    python evaluate.py --statistics --config=configs/fashion_mnist.py           of a data set, kept in runs/statistics/

The convergence study starts the few-step solvers of STUDY from the same noise and measures the RMS distance,
over pixels and samples in the data range, to a finely solved ODE. Writes report.json, report.md and
convergence.png to <workdir>/eval/.
"""

import functools
import hashlib
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import experiment as experiments
import model_statistics
from score_sde import VERSION, data, figures, files, parallel
from score_sde.errors import UserError
from score_sde.metrics import distances, features, inception
from solvers import probability_flow, tableau
from solvers.dpm_solver import dpm_solver_pp

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
METRICS = flags.DEFINE_list("metrics", ["loss", "convergence"], "What to evaluate.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.")

CONFIG = experiments.config_flag()
STATISTICS = flags.DEFINE_bool("statistics", False, "Measure the features of a config's training images, and no more.")
SAMPLES = flags.DEFINE_string("samples", None, "Evaluate these images, a folder or an .npz, instead of a model's.")
REFERENCE = flags.DEFINE_string("reference", None, "Statistics to compare with (.npz of mu and sigma), not our own.")
NETWORK = flags.DEFINE_string("network", None, "inception, resnet20-NAME or its .npz; that of the data set if absent.")
INCEPTION_WEIGHTS = flags.DEFINE_string("inception_weights", None, "pytorch-fid's file; downloaded if absent.")
INCEPTION_MODE = flags.DEFINE_string("inception_mode", "tf", "Preprocessing: tf (TensorFlow's) or pf (pytorch-fid's).")
ANY_INCEPTION_WEIGHTS = flags.DEFINE_bool("any_inception_weights", False, "Accept weights of another hash.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 10_000, "Images of fid; published numbers take 50000.", lower_bound=2)
SOLVER = flags.DEFINE_string("solver", None, "Of fid; the config's if absent.")
STEPS = flags.DEFINE_integer("steps", None, "Network evaluations of fid; the config's if absent.", lower_bound=1)

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
    metrics = {"loss": held_out_loss, "convergence": convergence, "fid": sample_quality}
    metrics |= {"bpd": bits_per_dim, "encoding": encoding}
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
        files.write(folder / "report.json", json.dumps(report, indent=2) + "\n")
        files.write(folder / "report.md", "\n".join(text))
    print(f"\nwrote {folder}/report.json and report.md")


def test_batches(experiment, images, n: int):
    """(index, batch) of the first n of test images, sharded over devices; the last batch is filled up."""
    devices = jax.device_count()
    batch_size = -(-min(experiment.config.eval.batch_size, n) // devices) * devices
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        yield index, parallel.shard(images.take(index.clip(max=n - 1)) | {"index": index})


def held_out_loss(model, folder) -> tuple[dict, list[str]]:
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
    return dict(mean=mean, standard_error=error, images=n), [f"Test loss {mean:.5f} +- {error:.5f} ({n} images)"]


def convergence(model, folder) -> tuple[dict, list[str]]:
    """RMS distance to the fine solution for each solver of STUDY and number of evaluations."""
    experiment, fields = model.experiment, model.experiment.config.eval
    n = -(-fields.num_samples // jax.device_count()) * jax.device_count()
    sample = experiments.sampler(model, lambda params, *_: experiment.noise_of(params), SEED.value)
    solve = lambda table: sample(tableau.uniform(table, 4, experiment.image_shape), np.arange(n))

    fine, coarser = (
        solve(dpm_solver_pp(experiment.sde, k, order=2)) for k in (fields.fine_steps, fields.fine_steps // 2)
    )
    ems = model_statistics.ems_of(model, EMS.value)
    steps = list(fields.steps)
    distances = {name: [] for name in STUDY}
    seconds = time.perf_counter()
    for k in tqdm(steps, desc="convergence", dynamic_ncols=True):
        for name, (solver, options) in STUDY.items():
            table = experiments.build_tableau(model, solver, k, ems, **options)
            distances[name].append(experiments.rms(solve(table[0]) - fine))
    seconds = time.perf_counter() - seconds
    # halving the step of a second-order solver quarters its error
    uncertainty = experiments.rms(fine - coarser) / 3
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


# ------------------------------------------------------------------------------------------------ likelihood


def bits_per_dim(model, folder) -> tuple[dict, list[str]]:
    """Bits/dim of uniformly dequantized test images: an upper bound, in the mean, on those of their levels."""
    experiment, fields = model.experiment, model.experiment.config.eval.likelihood
    centered, shape = experiment.config.data.centered, experiment.image_shape
    if fields.probe not in probability_flow.PROBES:
        raise UserError(f"unknown probe {fields.probe!r}: use one of {', '.join(probability_flow.PROBES)}")
    images = experiment.images("test")
    n = min(fields.num_data, images.size)

    def one_device(params, batch, repeat):
        keys = experiments.sample_keys(SEED.value, batch["index"], repeat)
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
    for repeat in tqdm(range(fields.repeats), desc="bits/dim", dynamic_ncols=True):
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
    given = ", given their classes" if experiment.num_classes else ""
    lines = [
        f"Bits/dim {mean:.4f} +- {error:.4f} ({n} images{given}, {fields.repeats} repeats of {fields.num_probes} "
        f"{fields.probe} probes, {np.mean(evaluations):.0f} evaluations)",
    ]
    if not experiment.config.data.uniform_dequantization:
        lines += [
            "",
            "Of levels dequantized here, (level + u) / 256; this model was trained on levels alone "
            "(data.uniform_dequantization is off), so the bound is valid but looser than after training for it.",
        ]
    result = dict(mean=mean, standard_error=error, spread_of_repeats=spread, **options)
    return result | dict(evaluations=evaluations), lines


def encoding(model, folder) -> tuple[dict, list[str]]:
    """How far test images come back from their latents."""
    experiment, fields = model.experiment, model.experiment.config.eval
    sde, images = experiment.sde, experiment.images("test")
    n = min(fields.num_samples, images.size)
    tolerances = dict(rtol=fields.likelihood.rtol, atol=fields.likelihood.atol)

    def one_device(params, batch):
        noise = experiment.noise_of(params, batch.get("label"))
        x = experiment.as_seen(experiments.sample_keys(SEED.value, batch["index"]), batch["image"])
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
    there, back = np.mean(evaluations, axis=0)
    line = (
        f"Data to latent and back: RMS error {rms:.1e}, largest {largest:.1e} in the data range "
        f"({n} images, rtol {tolerances['rtol']:g}, {there:.0f} + {back:.0f} evaluations)"
    )
    return dict(rms=rms, largest=largest, images=n, evaluations=evaluations, **tolerances), [line]


# ------------------------------------------------------------------------------------------------ quality of images


def sample_quality(model, folder) -> tuple[dict, list[str]]:
    """Distances of --num_samples samples to the training images, in the features of a network; resumes if stopped."""
    experiment, fields = model.experiment, model.experiment.config.sampling
    network = feature_network(experiment.config)
    solver, steps = SOLVER.value or fields.solver, STEPS.value or fields.steps
    ems = model_statistics.ems_of(model, EMS.value) if solver == "dpmv3" else None
    table, options = experiments.build_tableau(model, solver, steps, ems)
    devices = jax.local_device_count()
    batch_size = -(-fields.batch_size // devices) * devices
    sample = experiments.sampler(model, experiment.noise_of, SEED.value)

    def images_of(start, stop):
        x = sample(table, np.arange(start, start + batch_size))
        if not np.isfinite(x).all():
            raise UserError(f"samples {start} to {stop} are not all finite: try another solver or more steps")
        return experiment.to_uint8(x)[: stop - start]

    arrays = [hashlib.sha256(np.float32(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(table)]
    identity = features.fingerprint(model.identity, solver, arrays, SEED.value, network.identity())
    batches = folder / f"step{model.step}-{solver}-{steps}-seed{SEED.value}-{identity}"
    found = features.measure(
        network,
        images_of,
        NUM_SAMPLES.value,
        batch_size=batch_size,
        folder=batches,
        progress=functools.partial(tqdm, desc=f"samples by {solver}", unit="batch", dynamic_ncols=True),
    )
    title = f"{NUM_SAMPLES.value} samples by {solver}, {steps} evaluations, seed {SEED.value}"
    result, lines = compared(experiment, network, found, title)
    return result | dict(solver=solver, steps=steps, options=options, seed=SEED.value), lines


def images_and_data():
    """--statistics and --samples: a data set's statistics alone, or anyone's images against them."""
    config = experiments.read_config(run_folder()) if CONFIG.value is None else experiments.config_of(CONFIG)
    experiment = experiments.build(config)
    network = feature_network(config)
    if STATISTICS.value:
        print(f"statistics: {data_statistics(experiment, network, 'train')[1]}")
    if SAMPLES.value is not None:
        images = given_images(config)
        found = measured_images(network, images, images.size)
        result, lines = compared(experiment, network, found, f"{images.size} images of {SAMPLES.value}")
        print("\n".join(["", *lines]))
        path = experiments.RUNS / "evaluated" / f"{pathlib.Path(SAMPLES.value).stem}-{network.distance}.json"
        record = result | dict(samples=SAMPLES.value, command=" ".join(sys.argv))
        files.write(path, json.dumps(record, indent=2) + "\n")
        print(f"\nwrote {path}")


def run_folder() -> pathlib.Path:
    return experiments.newest_run() if WORKDIR.value is None else pathlib.Path(WORKDIR.value)


def given_images(config) -> data.Images:
    """The images of --samples; of any one size for the Inception network, of the config's for others."""
    fields, path = config.data, pathlib.Path(SAMPLES.value)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("samples", "images") if key in file.files}
        except Exception as error:  # zipfile, zlib and NumPy raise many types on a damaged file
            raise UserError(f"{path} is not a readable .npz: {data.one_line(error)}") from None
        if not arrays:
            raise UserError(f"{path} holds neither `samples` nor `images`")
        raw = data.from_arrays(next(iter(arrays.values())), None, str(path))
        if raw.size < 2:
            raise UserError(f"{path} holds {raw.size} images, which have no covariance: give more")
        return data.Images(str(path), raw.size, functools.partial(data.gather, raw.arrays))
    images = data.load(str(path), "all", image_size=fields.image_size, num_channels=fields.num_channels)
    if images.size < 2:
        raise UserError(f"{path} holds one image, which has no covariance: give more")
    return images


def feature_network(config) -> features.FeatureNetwork:
    """The network of --network, or the local one trained on the config's data set; says which."""
    own = f"resnet20-{pathlib.Path(config.data.dataset).stem}"
    name = NETWORK.value or ("inception" if INCEPTION_WEIGHTS.value else own)
    known = features.local_networks()
    if name != "inception" and name not in known and not name.endswith(".npz"):
        raise UserError(
            f"no feature network {name!r}: choose --network={' or --network='.join(['inception', *known])}, "
            "or train one, python -m score_sde.metrics"
        )
    if name == "inception":
        path = INCEPTION_WEIGHTS.value or inception.download(pathlib.Path.home() / ".cache" / "score_sde")
        network = features.standard(path, mode=INCEPTION_MODE.value, any_weights=ANY_INCEPTION_WEIGHTS.value)
    else:
        network = features.local(known.get(name, name))
    gray = ", gray images as RGB of three equal channels" if config.data.num_channels < network.channels else ""
    print(f"features: {network.name}, weights {network.sha256[:8]}, {network.preprocessing}{gray}")
    return network


def measured_images(network, images, n: int) -> features.Measured:
    """Features of the first n images of a split."""
    return features.measure(
        network,
        lambda start, stop: images.take(np.arange(start, stop))["image"],
        n,
        batch_size=128 if network.dimension < 1000 else 32,
        progress=functools.partial(tqdm, desc=images.name, unit="batch", dynamic_ncols=True),
    )


def data_statistics(experiment, network, split: str, n: int | None = None) -> tuple[features.Statistics, pathlib.Path]:
    """Statistics of the first n (all if None) images of a split, measured once and kept in runs/statistics/."""
    images, fields = experiment.images(split), experiment.config.data
    n = min(n or images.size, images.size)
    processing = {name: fields[name] for name in ("image_size", "num_channels", "crop", "resize")}
    first = np.ascontiguousarray(images.take(np.arange(min(64, n)))["image"])  # tells data sets of one name apart
    origin = dict(data=fields.dataset, split=split, n=n, first_images=hashlib.sha256(first.tobytes()).hexdigest())
    provenance = origin | processing | network.identity()
    stem = pathlib.Path(fields.dataset).stem
    path = experiments.RUNS / "statistics" / f"{stem}-{split}-{n}-{features.fingerprint(provenance)}.npz"
    if not path.exists():
        features.save(path, features.statistics(measured_images(network, images, n), provenance))
    return features.load(path, network), path


def compared(experiment, network, found: features.Measured, title: str) -> tuple[dict, list[str]]:
    """Every distance to the data, with the floor: what as many test images have."""
    n = found.moments.n
    if REFERENCE.value is None:
        reference, path = data_statistics(experiment, network, "train")
    else:
        reference, path = features.load(REFERENCE.value, network), REFERENCE.value
    test, _ = data_statistics(experiment, network, "test", n)
    floor = distances.frechet_distance(test.mean, test.covariance, reference.mean, reference.covariance)
    result = features.compare(found, reference)
    standard = network.distance == "FID"
    kernel, score = (
        ("KID", "Inception Score") if standard else (f"KD-{network.name}", f"score of the classes of {network.name}")
    )
    against = f"{reference.n} training images" if reference.provenance else f"{path}, whose origin is unknown"
    lines = [
        f"{title}, against {against}; weights {network.sha256[:8]}, {network.preprocessing}",
        "",
        f"| {network.distance} | floor: {test.n} test images |",
        "|---|---|",
        f"| {result['frechet']:.4g} | {floor:.4g} |",
        "",
        f"{score} {result['inception_score']:.3f} +- {result['inception_score_std']:.3f} "
        f"({result['inception_score_splits']} splits)",
    ]
    if "kernel" in result:
        lines += [
            "",
            f"{kernel} {result['kernel']:.6f} +- {result['kernel_std']:.6f} (standard deviation over "
            f"{result['kernel_subsets']} subsets of {result['kernel_subset_size']})",
            "",
            f"Precision {result['precision']:.4f}, recall {result['recall']:.4f} (k = 3, {result['pairs_samples']} "
            f"images among {result['pairs_reference']})",
        ]
    if n <= network.dimension:
        lines += [
            "",
            f"Warning: {n} images do not determine a covariance of {network.dimension} features: {network.distance} is "
            "too large by an amount that depends on the number; compare it at equal numbers only",
        ]
    identity = dict(distance=network.distance, floor=floor, floor_num_samples=test.n, reference=str(path))
    return result | identity | network.identity(), lines


if __name__ == "__main__":
    experiments.run(main)
