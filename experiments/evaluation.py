"""What there is to measure of a model, and the report that it adds up in: what evaluate.py does."""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from ems import statistics
from experiments import build, events, figures, guides, latent_mse, measuring, program, quality, runs, samplers, times
from experiments import report as reports
from experiments.prompts import Prompts
from score_sde import VERSION, files, parallel, seeds
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.metrics import features
from score_sde.metrics.features import FeatureNetwork
from solvers import probability_flow
from solvers.dpm_solver import dpm_solver_pp

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


class Options(NamedTuple):
    """How models are measured; what metrics do not ask for has no effect."""

    seed: int = 0  # of all noise
    ems: str | None = None  # file for dpmv3; the run's own if None
    solvers: list[str] | None = None  # of fid, and the first of samples; the config's if None
    steps: list[int] | None = None  # evaluations, each with each solver; the config's if None
    grid: str | None = None  # of samples and fid: a named grid or "gits"; each solver's own if None
    tableau: str | None = None  # a file of python -m tools.search, in the place of solvers, steps and grid
    num_samples: int = 10_000  # of fid
    network: Callable = quality.feature_network  # config -> the FeatureNetwork of fid
    reference: str | None = None  # statistics that fid compares with; those of the config's data set if None
    guidance: Guidance = measuring.NONE  # of samples, fid and convergence
    label: int | None = None  # class of their samples; all by turns if None
    beside: runs.Guide | None = None  # guides in the place of the model's own classes
    prompts: Prompts | None = None  # what the model was told, for the record

    def guide(self, model: runs.Model) -> runs.Model:
        """The model as it is sampled."""
        return runs.with_guidance(model, self.guidance, label=self.label, beside=self.beside)

    def ways(self, model: runs.Model) -> list[tuple[str, int]]:
        """Each solver with each number of evaluations."""
        if (searched := self.searched(model)) is not None:
            return [(searched.solver, searched.steps)]
        fields = model.config.sampling
        return [(name, k) for name in self.solvers or [fields.solver] for k in self.steps or [fields.steps]]

    def searched(self, model: runs.Model) -> samplers.Searched | None:
        """What `tableau` holds, if there is one; UserError where it is not for the model as it is sampled."""
        if self.tableau is None:
            return None
        return samplers.read_search(model, self.tableau, guides.bent_by(self.guidance, self.beside))

    def ems_for(self, solver: str, model: runs.Model):
        """The EMS that the solver takes for the model as it is sampled, if it takes any."""
        return measuring.ems_of(model, self.ems, self.guidance, self.beside) if solver == "dpmv3" else None

    def options_for(self, solver: str, steps: int, sampled: runs.Model, ems) -> dict:
        """The options that the solver is given; sampled: the model guided."""
        if (searched := self.searched(sampled)) is not None:
            return searched.options
        given = {} if self.grid is None else dict(grid=self.grid)
        return times.with_times(sampled, solver, steps, given, ems)

    def bending(self) -> dict:
        """What bends the model, for the record; empty where nothing does."""
        scale, interval, threshold, *_ = self.guidance
        beside = self.beside and self.beside.name
        bending = dict(guidance=scale, interval=interval, threshold=threshold, label=self.label, guided_by=beside)
        if self.prompts is not None:
            bending |= dict(prompts=self.prompts.name, negative_prompt=self.prompts.negative or None)
        return {name: value for name, value in bending.items() if value is not None}

    def picture(self, folder, metric: str) -> dict:
        """`picture`, its file in the report's folder, and `asked`, a hash that tells whether that is taken."""
        asked = features.fingerprint(self.seed, self.ems, self.solvers, self.steps, self.bending())
        earlier = (reports.read(folder) or {}).get(metric)
        own = earlier is None or earlier.get("asked", asked) == asked
        return dict(picture=f"{metric}.png" if own else f"{metric}-{asked}.png", asked=asked)


def evaluate(model: runs.Model, metrics: list[str], options: Options, name: str = ".") -> dict:
    """Measure, print, and write what is measured to the report in eval/<name>/, which is returned."""
    folder = model.results / "eval" / name
    files.check_writable(folder)
    options = checked(model, metrics, options)
    report = earlier(model, folder)
    versions = dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0], on=parallel.devices())
    for metric in dict.fromkeys(metrics):
        began = time.perf_counter()
        for result in METRICS[metric](model, folder, options):
            seconds, began = time.perf_counter() - began, time.perf_counter()
            about = dict(seed=options.seed, dataset=model.config.data.dataset, ems_file=options.ems)
            result |= about | dict(seconds=seconds, command=" ".join(sys.argv), versions=versions)
            report = reports.add(report, metric, result)
            print("\n".join(["", *reports.lines(metric, result)]))
            write(folder, report)
    report |= training(model, folder) | shown_ems(model, folder)
    write(folder, report)
    print(f"\nwrote {folder}/report.json and report.md")
    return report


def checked(model: runs.Model, metrics: list[str], options: Options) -> Options:
    """The options, with all refused before anything is measured that can be; the network of fid is made once."""
    if {"fid", "samples", "convergence"} & set(metrics):
        sde = options.guide(model).diffusion.sde
        for solver, steps in options.ways(model):
            samplers.check_solver(solver)
            if solver != "dpmv3":
                samplers.build_tableau(sde, solver, steps)
            elif options.ems is not None:
                options.ems_for(solver, model)
    if "bpd" in metrics:
        build.pixels_of(model.config)  # refuses latents, which have none
        likelihood_probes(model)
    if "fid" in metrics:
        network = options.network(model.config)
        if options.reference is not None:
            quality.check_reference(model.config, network, options.reference)
        options = options._replace(network=lambda config: network)
    return options


def likelihood_probes(model: runs.Model) -> Callable:
    """What draws the probes of bits/dim."""
    probe = model.config.eval.likelihood.probe
    if probe not in probability_flow.PROBES:
        raise UserError(f"unknown probe {probe!r}: use one of {', '.join(probability_flow.PROBES)}")
    return probability_flow.PROBES[probe]


def earlier(model, folder) -> dict:
    """The report that grows: of this checkpoint; one of another makes room, in a folder of its own."""
    about = dict(workdir=str(model.workdir), step=model.step, identity=model.identity)
    report = reports.read(folder)
    if report is not None and report["model"]["identity"] == model.identity:
        return report | dict(model=about)
    if report is not None and parallel.writes():
        aside = folder / f"step{report['model']['step']}"
        before = reports.read(aside)
        if before is not None and before["model"]["identity"] != report["model"]["identity"]:
            aside = folder / f"{aside.name}-{report['model']['identity']}"
            before = reports.read(aside)
        if before is not None:  # of the same parameters, put aside earlier
            write(folder, reports.joined(before, {name: report[name] for name in report if name != "model"}))
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
    """Name the images behind the statistics that a sampler would take, and their picture."""
    path = measuring.find(model)
    if path is None:
        return {}
    ems = statistics.load(path)
    figures.save_ems(folder / "ems.png", ems.lam, {"l": ems.l, "s": ems.s, "b": ems.b}, f"EMS of {model.name}")
    return dict(ems=ems.origin)


def test_batches(model: runs.Model, images, n: int):
    """(index, batch) of the first n of test images, sharded over devices; the last batch is filled up."""
    batch_size = parallel.round_up(min(model.config.eval.batch_size, n))
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        yield index, parallel.shard(images.take(index.clip(max=n - 1)) | {"index": index})


# ------------------------------------------------------------------------------------------------ metrics
# Each takes (model, the report's folder, options) and yields results.


def held_out_loss(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """The training loss on test images with the averaged parameters: mean and standard error over images."""
    fields, images = model.config.eval, build.images_of(model.config, "test")
    parallel.batch_per_device(min(fields.batch_size, images.size // jax.device_count() * jax.device_count()))
    loss, key = functools.partial(build.loss_of, model.config, model.diffusion), seeds.key(options.seed)
    on_devices = parallel.pmap(lambda params, autoencoder, batch: loss(autoencoder)(params, batch, key, False))
    autoencoder = build.autoencoder_params(model.config, model.workdir)
    params, values = parallel.replicate((model.params, autoencoder)), []
    n = min(fields.num_data, images.size)
    for _, batch in test_batches(model, images, n):
        values.append(parallel.gather(on_devices(*params, batch)))
    values = np.concatenate(values)[:n].astype(np.float64)
    yield dict(mean=values.mean(), standard_error=values.std(ddof=1) / np.sqrt(n), images=n)


def convergence(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """RMS distance to the fine solution for each solver of STUDY and number of evaluations.

    The model is taken without conditions, unless something guides it.
    """
    bending, fields = options.bending(), model.config.eval
    sampled = options.guide(model)
    diffusion = sampled.diffusion if bending else sampled.diffusion._replace(conditions=lambda index: None)
    n = parallel.round_up(fields.num_samples)
    sample = samplers.sampler(diffusion, sampled.params, options.seed)
    solve = lambda table: sample(table, np.arange(n))

    ems = options.ems_for("dpmv3", model)
    fine, coarser = (
        solve(dpm_solver_pp(diffusion.sde, k, order=2)) for k in (fields.fine_steps, fields.fine_steps // 2)
    )
    steps = list(fields.steps)
    distances = {name: [] for name in STUDY}
    for k in program.progress(steps, desc="convergence"):
        for name, (solver, own) in STUDY.items():
            table = samplers.build_tableau(diffusion.sde, solver, k, ems, **own)
            distances[name].append(samplers.rms(solve(table[0]) - fine))
    # halving the step of a second-order solver quarters its error
    uncertainty = samplers.rms(fine - coarser) / 3
    about = options.picture(folder, "convergence")
    figures.save_convergence(folder / about["picture"], steps, distances, f"{model.name}, {n} noises")
    result = dict(steps=steps, rms=distances, fine_steps=fields.fine_steps, fine_uncertainty=uncertainty, noises=n)
    yield result | dict(ems=ems.origin) | about | bending


def sample_grid(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """A picture of the first samples, as many as the config's batches have."""
    sampled = options.guide(model)
    solver, steps = options.ways(model)[0]
    sample = samplers.sampler(sampled.diffusion, sampled.params, options.seed)
    ems = options.ems_for(solver, model)
    given = options.options_for(solver, steps, sampled, ems)
    searched = options.searched(model)
    way = quality.drawer(sampled, sample, solver, steps, ems, given, searched and searched.corrections)
    picture = options.picture(folder, "samples")
    figures.save_grid(folder / picture["picture"], way.images_of(0, way.batch_size)[:256])
    about = dict(solver=solver, steps=steps, options=way.options, num_samples=min(way.batch_size, 256))
    yield about | picture | options.bending() | quality.origin_of(searched)


def sample_quality(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """Distances of samples to the training images, for each way of sampling; resumes if stopped.

    Sampler and feature network are compiled once for all of them.
    """
    sampled, network = options.guide(model), options.network(model.config)
    sample = samplers.sampler(sampled.diffusion, sampled.params, options.seed)
    for solver, steps in options.ways(model):
        ems = options.ems_for(solver, model)
        yield quality.of_samples(
            sampled,
            solver,
            steps,
            sample=sample,
            network=network,
            n=options.num_samples,
            seed=options.seed,
            ems=ems,
            options=options.options_for(solver, steps, sampled, ems),
            searched=options.searched(model),
            reference_path=options.reference,
            bending=options.bending(),
            identities=() if options.beside is None else (options.beside.identity,),
        )


def bits_per_dim(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """Bits/dim of uniformly dequantized test images: an upper bound, in the mean, on those of their levels."""
    diffusion, fields = model.diffusion, model.config.eval.likelihood
    pixels = build.pixels_of(model.config, dequantize=True)
    draw = likelihood_probes(model)
    images = build.images_of(model.config, "test")
    n = min(fields.num_data, images.size)

    def one_device(params, batch, repeat):
        keys = samplers.sample_keys(options.seed, batch["index"], repeat)
        x = jax.vmap(pixels.encode)(keys, batch["image"])
        probe = lambda key: draw(jax.random.fold_in(key, 2), fields.num_probes, pixels.shape)
        logp, _, run = probability_flow.log_likelihood(
            diffusion.noise_of(params, batch.get("label")),
            diffusion.sde,
            x,
            jax.vmap(probe, out_axes=1)(keys),
            rtol=fields.rtol,
            atol=fields.atol,
            t_min=fields.t_min,
        )
        return probability_flow.bits_per_dim(logp, pixels), run

    on_devices = parallel.pmap(one_device, in_axes=(0, 0, None))
    params, values, evaluations = parallel.replicate(model.params), [], []
    for repeat in program.progress(range(fields.repeats), desc="bits/dim"):
        row = []
        for index, batch in test_batches(model, images, n):
            bpd, run = parallel.gather(on_devices(params, batch, repeat))
            probability_flow.check(run, bpd[:, None, None, None], index)
            row.append(bpd)
            evaluations.append(int(run.evaluations[0]))
        values.append(np.concatenate(row)[:n].astype(np.float64))
    per_image = np.mean(values, axis=0)
    mean, error = per_image.mean(), per_image.std(ddof=1) / np.sqrt(n)
    spread = np.std([row.mean() for row in values], ddof=1) if fields.repeats > 1 else None
    about = dict(
        conditional=diffusion.num_classes > 0,
        trained_on_dequantized=model.config.data.uniform_dequantization,
        evaluations=evaluations,
    )
    how = fields.to_dict() | dict(num_data=n)
    yield dict(mean=mean, standard_error=error, spread_of_repeats=spread, **how) | about


def encoding(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """How far test images come back from their latents."""
    diffusion, fields = model.diffusion, model.config.eval
    sde, images = diffusion.sde, build.images_of(model.config, "test")
    n = min(fields.num_samples, images.size)
    tolerances = dict(rtol=fields.likelihood.rtol, atol=fields.likelihood.atol)

    def one_device(params, batch):
        noise = diffusion.noise_of(params, batch.get("label"))
        keys = samplers.sample_keys(options.seed, batch["index"])
        x = jax.vmap(diffusion.space.encode)(keys, batch["image"])
        z, there = probability_flow.solve(noise, sde, x, t_start=sde.t_min, t_end=sde.t_max, **tolerances)
        back, run = probability_flow.solve(noise, sde, z, **tolerances)
        return back, back - x, there, run

    on_devices, params = parallel.pmap(one_device), parallel.replicate(model.params)
    errors, evaluations = [], []
    for index, batch in test_batches(model, images, n):
        back, error, *runs = parallel.gather(on_devices(params, batch))
        for run in runs:
            probability_flow.check(run, back, index)
        errors.append(error)
        evaluations.append([int(run.evaluations[0]) for run in runs])
    errors = np.concatenate(errors)[:n].astype(np.float64)
    rms, largest = float(np.sqrt(np.square(errors).mean())), float(np.abs(errors).max())
    yield dict(rms=rms, largest=largest, images=n, evaluations=evaluations, **tolerances)


def latent_mean_squares(model: runs.Model, folder, options: Options) -> Iterator[dict]:
    """Squared distances of samples to finely solved ones, for each way of sampling, in latents."""
    ways, scale = options.ways(model), options.guidance.scale
    ems = options.ems_for("dpmv3", model) if any(solver == "dpmv3" for solver, _ in ways) else None
    settings = dict(n=options.num_samples, seed=options.seed, ems=ems, guidance_scale=scale)
    yield from latent_mse.measure(options.guide(model), ways, **settings, bending=options.bending())


METRICS = {
    "loss": held_out_loss,
    "convergence": convergence,
    "fid": sample_quality,
    "samples": sample_grid,
    "bpd": bits_per_dim,
    "encoding": encoding,
    "latent_mse": latent_mean_squares,
}


# ------------------------------------------------------------------------------------------------ quality of images


def images_and_data(
    config,
    network: FeatureNetwork,
    *,
    of_data: bool = False,
    samples: str | None = None,
    reference: str | None = None,
):
    """Statistics of a config's data set alone, or anyone's images, a folder or an .npz, against them; printed."""
    files.check_writable(runs.RUNS)
    if reference is not None:
        quality.check_reference(config, network, reference)
    if of_data:
        print(f"statistics: {quality.data_statistics(config, network, 'train')[1]}")
    if samples is not None:
        result = quality.of_images(config, network, samples, reference)
        print("\n".join(["", *reports.quality_lines(result)]))
        result |= dict(samples=str(pathlib.Path(samples).resolve()), dataset=config.data.dataset)
        path = path_of(result, f"{pathlib.Path(samples).stem}-{network.distance}")
        files.write(path, json.dumps(result | dict(command=" ".join(sys.argv)), indent=2) + "\n")
        print(f"\nwrote {path}")


# What tells one result of anyone's images from another.
RESULT = ("samples", "first_images", "num_samples", "dataset", "reference", "weights_sha256", "preprocessing")


def path_of(result: dict, name: str) -> pathlib.Path:
    """Where a result of anyone's images belongs: beside one of other images or another reference, which is kept."""
    return reports.beside(runs.RUNS / "evaluated" / f"{name}.json", result, RESULT)
