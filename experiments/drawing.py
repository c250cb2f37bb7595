"""Draw samples batch by batch, by any of three methods, and write them: what sample.py does.

A stopped run of many batches goes on after its last one. A sample depends on its index and the seed alone.
"""

import functools
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ems.statistics import EMS
from experiments import build, figures, measuring, program, runs, samplers
from experiments.config import fits
from experiments.inverse_problems import Measured
from experiments.restoration import Known
from score_sde import VERSION, files, parallel
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.metrics import features
from score_sde.space import Space
from solvers import predictor_corrector, probability_flow, tableau
from solvers.learned import Corrections

CHUNK = 25  # steps of the predictor-corrector sampler between two looks at the progress
PER_PAIR = 8  # samples from one test image to another
DECODED = 8  # latents that become images between two looks at the progress


class Method(NamedTuple):
    """A way of drawing samples of a model, and what there is to tell of it."""

    draw: Callable  # (indices (b,), what is called with the number of steps done) -> x (b, H, W, C), evaluations
    solver: str
    steps: int | None  # None: as many as the tolerance takes
    evaluations: int | str  # of the network, for each sample
    options: dict
    identity: tuple[str, ...] = ()  # hashes of what else decides the samples


# ------------------------------------------------------------------------------------------------ methods


def few_step(
    model: runs.Model,
    solver: str,
    steps: int,
    options: dict | None = None,
    *,
    seed: int = 0,
    ems: EMS | None = None,
    corrections: Corrections | None = None,
    start: Callable | None = None,
    measured: Measured | None = None,
) -> Method:
    """A few-step solver. model: as sampled, guided or not; ems: as for `samplers.build_tableau`.

    corrections: what was learned for its table, if anything; measured: of the samples' images, if anything.
    start: keys of samples -> the x that they start from at the table's first time; draws of the prior if None.
    """
    diffusion, given = model.diffusion, options or {}
    start = functools.partial(samplers.prior, diffusion) if start is None else start
    table, options = samplers.build_tableau(diffusion.sde, solver, steps, ems, **given)
    if ems is not None and "t_end" not in given:
        t_end = samplers.published_for(diffusion.sde, steps, ems)["t_end"]
        if t_end < options["t_end"]:
            print(
                f"sampling ends at t={options['t_end']:g}, as the EMS; for {t_end:g}: python -m ems --t_end={t_end:g}"
            )
    if corrections is not None:
        table = samplers.with_corrections(table, diffusion.sde, corrections)

    def one_device(params, table, index, y, trajectory=False):
        keys = samplers.sample_keys(seed, index)
        noise = diffusion.noise_of(params, diffusion.conditions(index))
        noise = noise if measured is None else measured.bend(noise, y)
        x, noises = start(keys), samplers.draws(diffusion, keys)
        x = tableau.solve(noise, table, x, noises, trajectory=trajectory)
        return jnp.moveaxis(x, 0, 1) if trajectory else x

    def over_devices(**options):
        mapped = parallel.pmap(functools.partial(one_device, **options), in_axes=(0, None, 0, 0))
        return lambda index: parallel.gather(mapped(params, table, *parallel.shard((index, y_of(index)))))

    params, table = parallel.replicate(model.params), jax.tree.map(np.float32, table)
    hashes = [hashlib.sha256(leaf.tobytes()).hexdigest() for leaf in jax.tree.leaves(table)]
    y_of = lambda index: None if measured is None else measured.values(index)
    solved, path = over_devices(), over_devices(trajectory=True)

    def draw(index, report):
        x = solved(index)
        if not np.isfinite(x).all():  # again, with what every evaluation leads to
            between = path(index)
            k = int(np.isfinite(between).all((0, 2, 3, 4)).argmin())
            refuse_not_finite(between[:, k], index, f"evaluation {k + 1}", table.t[k])
        report(steps)
        return x, steps

    hashes += [] if measured is None else measured.identity()
    return Method(draw, solver, steps, steps, options, tuple(hashes))


def pc(
    model: runs.Model, steps: int, options: dict | None = None, *, seed: int = 0, known: Known | None = None
) -> Method:
    """The predictor-corrector sampler, whose options are the config's where none are given; known: what is restored."""
    diffusion, fields, options = model.diffusion, model.config.sampling, options or {}
    options_known = ("predictor", "corrector", "corrector_steps", "snr", "probability_flow", "denoise")
    samplers.check_options("pc", options, options_known)
    for name, value in options.items():
        if not fits(value, fields[name]):
            kind = type(fields[name]).__name__
            raise UserError(f"--option {name}={value}: expected a {kind}, as in --option {name}={fields[name]}")
    options = {name: fields[name] for name in options_known} | options
    update_options = {name: value for name, value in options.items() if name != "denoise"}
    nfe = predictor_corrector.evaluations(
        steps, **{name: options[name] for name in ("predictor", "corrector", "corrector_steps")}
    )
    if not nfe:
        raise UserError("neither a predictor nor a corrector: choose one, as in --option predictor=reverse_diffusion")

    def start(index):
        x = samplers.prior(diffusion, samplers.sample_keys(seed, index))
        return predictor_corrector.Update(x, x)

    def advance(params, index, given, update, first, last):
        """Steps first to last - 1; given: what is known of each sample, if anything."""
        step = predictor_corrector.stepper(
            diffusion.noise_of(params, diffusion.conditions(index)),
            diffusion.sde,
            samplers.draws(diffusion, samplers.sample_keys(seed, index)),
            n=steps,
            condition=None if known is None else known.condition(given),
            **update_options,
        )
        return jax.lax.fori_loop(first, last, step, update)

    given_to = lambda index: None if known is None else known.in_data_range(index)
    one = np.arange(1)  # options that have no meaning speak up now
    jax.eval_shape(advance, model.params, one, given_to(one), jax.eval_shape(start, one), 0, 1)
    start = parallel.pmap(start)
    advance = parallel.pmap(advance, in_axes=(0, 0, 0, 0, None, None))
    times, params = np.asarray(predictor_corrector.times(diffusion.sde, steps)), parallel.replicate(model.params)

    def draw(index, report):
        shards = parallel.shard((index, given_to(index)))
        update = start(shards[0])
        for first in range(0, steps, CHUNK):
            before, last = update, min(first + CHUNK, steps)
            update = advance(params, *shards, before, first, last)
            if not np.isfinite(parallel.gather(update.x)).all():
                for k in range(first, last):  # again, one by one, to find the first
                    before = advance(params, *shards, before, k, k + 1)
                    refuse_not_finite(parallel.gather(before.x), index, f"step {k + 1}", times[k])
            report(last - first)
        return parallel.gather(update.mean if options["denoise"] else update.x), nfe

    return Method(draw, "pc", steps, nfe, options, () if known is None else tuple(known.identity()))


def ode(model: runs.Model, options: dict | None = None, *, seed: int = 0, pairs: bool = False) -> Method:
    """The ODE solved to a tolerance; pairs: decode what lies between the latents of pairs of test images."""
    diffusion, options = model.diffusion, options or {}
    defaults = dict(rtol=1e-5, atol=1e-5, temperature=1.0, denoise=model.config.sampling.denoise)
    samplers.check_options("ode", options, defaults)
    for name, value in options.items():
        if name != "denoise" and not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"--option {name}={value}: expected a positive number, as in {name}={defaults[name]}")
    options = defaults | options
    tolerances = {name: options[name] for name in ("rtol", "atol")}
    chain = model.config.denoiser.num_scales if options["denoise"] else None
    noise_at = lambda params, index: diffusion.noise_of(params, diffusion.conditions(index))

    def prior(index):
        return samplers.prior(diffusion, samplers.sample_keys(seed, index))

    def decode(params, index, z):
        z = options["temperature"] * z
        return probability_flow.solve(noise_at(params, index), diffusion.sde, z, denoise=chain, **tolerances)

    def encode(params, index, image):
        x = jax.vmap(diffusion.space.encode)(samplers.sample_keys(seed, index), image)
        times = dict(t_start=diffusion.sde.t_min, t_end=diffusion.sde.t_max)
        return probability_flow.solve(noise_at(params, index), diffusion.sde, x, **times, **tolerances)

    one = np.arange(1)  # options that have no meaning speak up now
    jax.eval_shape(decode, model.params, one, jax.eval_shape(prior, one))
    prior, decode, encode = (parallel.pmap(function) for function in (prior, decode, encode))
    test, params = build.images_of(model.config, "test") if pairs else None, parallel.replicate(model.params)

    def latents(index):
        """Latents between those of test images 2 k and 2 k + 1, for pair k; and the evaluations they took."""
        first = index[0] // PER_PAIR
        count = 2 * (index[-1] // PER_PAIR - first + 1)
        ends = 2 * first + np.arange(parallel.round_up(count))
        ends_on_devices = parallel.shard((ends, test.take(ends % test.size)["image"]))
        z, run = parallel.gather(encode(params, *ends_on_devices))
        probability_flow.check(run, z, ends)
        pair, share = 2 * (index // PER_PAIR - first), index % PER_PAIR / (PER_PAIR - 1)
        return probability_flow.interpolate(z[pair], z[pair + 1], share.astype(np.float32)), int(run.evaluations[0])

    def draw(index, report):
        shards, calls = parallel.shard(index), 0
        if test is None:
            z = prior(shards)
        else:
            z, calls = latents(index)
            z = parallel.shard(z)
        x, run = parallel.gather(decode(params, shards, z))
        probability_flow.check(run, x, index)
        report(1)
        return x, calls + int(run.evaluations[0])

    identity = () if test is None else (features.hash_of(test.take(np.arange(min(64, test.size)))["image"]),)
    return Method(draw, "ode", None, "adaptive", options, identity)


def refuse_not_finite(x, index, where: str, t: float):
    """Name the first of samples x that is not finite, if any."""
    bad = ~np.isfinite(x).all((1, 2, 3))
    if bad.any():
        raise UserError(
            f"sample {index[bad.argmax()]} is not finite after {where}, at t = {t:.3g}: "
            "try another solver, more steps, or another checkpoint"
        )


# ------------------------------------------------------------------------------------------------ samples


class Samples(NamedTuple):
    """Samples, and what they took."""

    images: np.ndarray  # uint8 (n, H, W, C)
    evaluations: list[int]  # of each batch
    seconds: list[float]  # of each batch
    failure: UserError | None = None  # what ended the drawing early
    folder: pathlib.Path | None = None  # where they were written


def sample(
    model: runs.Model,
    solver: str = "dpmv3",
    steps: int = 10,
    n: int = 64,
    *,
    seed: int = 0,
    guidance: Guidance = measuring.NONE,
    label: int | None = None,
    ems_path: str | None = None,
    **options,
) -> np.ndarray:
    """n samples of a model as uint8 images (n, H, W, C), by a few-step solver with its options; writes nothing.

    guidance: without a classifier; label: their class, all by turns if None. EMS are measured if dpmv3 has none.
    """
    ems = measuring.ems_of(model, ems_path, guidance) if solver == "dpmv3" else None
    model = runs.with_guidance(model, guidance, label=label)
    method = few_step(model, solver, steps, options, seed=seed, ems=ems)
    samples = draw(model, method, n, batch_size=min(model.config.sampling.batch_size, parallel.round_up(n)))
    if samples.failure is not None:
        raise samples.failure
    return samples.images


def draw(
    model: runs.Model, method: Method, n: int, *, batch_size: int, unfinished: pathlib.Path | None = None
) -> Samples:
    """n samples; unfinished: a folder for finished batches, from which a stopped call goes on.

    Where a batch fails and others have not, what was drawn before it comes back with the failure.
    """
    images, seconds, evaluations, failure = [], [], [], None
    starts, per_batch = range(0, n, batch_size), method.steps or 1
    with program.progress(total=len(starts) * per_batch, unit="step") as bar:
        for start in starts:
            path = None if unfinished is None else unfinished / f"{start:07d}.npz"
            batch = path and read_batch(path)
            if batch is None:
                began = time.perf_counter()
                try:
                    x, calls = method.draw(np.arange(start, start + batch_size), bar.update)
                except UserError as error:
                    failure = error
                    break
                levels = decoded(model.diffusion.space, x, bar)
                batch = dict(images=levels, calls=calls, seconds=time.perf_counter() - began)
                if path is not None and len(starts) > 1:
                    files.save_npz(path, batch)
            else:
                bar.update(per_batch)
            seconds.append(float(batch["seconds"]))
            evaluations.append(int(batch["calls"]))
            images.append(batch["images"])
    if not images:
        raise failure
    return Samples(np.concatenate(images)[:n], evaluations, seconds, failure)


def decoded(space: Space, x, bar) -> np.ndarray:
    """The uint8 images of a batch of samples x, in slices; the progress bar tells how many there are."""
    slices = []
    for first in range(0, len(x), DECODED):
        bar.set_postfix_str(f"{first} of {len(x)} images")
        slices.append(np.asarray(space.decode(x[first : first + DECODED])))
    return np.concatenate(slices)


def read_batch(path: pathlib.Path) -> dict | None:
    """A batch of samples that a stopped run of the same left behind; None if there is none, or it is damaged."""
    try:
        found = files.load_npz(path)
        return {name: found[name] for name in ("images", "calls", "seconds")}
    except (OSError, KeyError, ValueError):
        return None


def draw_and_write(
    model: runs.Model,
    method: Method,
    n: int,
    folder: pathlib.Path,
    *,
    batch_size: int,
    seed: int,
    bending: dict,
    identities: tuple = (),
    known: Known | Measured | None = None,
    columns: int | None = None,
) -> Samples:
    """Write n samples to a folder: samples.npz (uint8 NHWC, key `samples`), grid.png, run.json.

    Samples of another call that are there stay; these then go to a folder beside it, named by a hash of all that they
    depend on.
    bending: what bends the model, by the names of its flags, for run.json; identities: of what takes part besides the
    model, which tell whether batches left behind are those of this call; columns: of the grid.
    """
    how = (method.identity, method.solver, method.steps, method.options, bending, seed)
    identity = features.fingerprint(model.identity, *identities, *how, n)
    folder = folder_of_its_own(folder, identity)
    unfinished = folder / f"unfinished-{features.fingerprint(model.identity, *identities, *how, batch_size)}"
    samples = draw(model, method, n, batch_size=batch_size, unfinished=unfinished)
    if known is not None:
        samples = samples._replace(images=known.put_back(samples.images))
    record = dict(
        model=dict(workdir=str(model.workdir), step=model.step, identity=model.identity),
        solver=method.solver,
        steps=method.steps,
        nfe=max(samples.evaluations),
        options=method.options,
        **bending,
        seed=seed,
        identity=identity,
        num_samples=len(samples.images),
        batch_size=batch_size,
        seconds_per_batch=float(np.median(samples.seconds)),
        seconds_of_first_batch=samples.seconds[0],
        devices=jax.device_count(),
        platform=jax.default_backend(),
        versions=dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0]),
        command=" ".join(sys.argv),
    )
    files.save_npz(folder / "samples.npz", dict(samples=samples.images), compressed=True)
    if known is None:
        figures.save_grid(folder / "grid.png", samples.images[:256], columns)
    else:
        known.save_grid(folder / "grid.png", samples.images)
    files.write(folder / "run.json", json.dumps(record, indent=2) + "\n")
    if parallel.writes():
        shutil.rmtree(unfinished, ignore_errors=True)
    return samples._replace(folder=folder)


MOST_LETTERS = 150  # of a folder's name; file systems take 255 bytes


def name_of(parts: list[str]) -> str:
    """The name of what was drawn in this way, cut with a hash at its end if it is too long for one."""
    name = "-".join(parts)
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 9]}-{features.fingerprint(name)}"


def folder_of_its_own(folder: pathlib.Path, identity: str) -> pathlib.Path:
    """The folder, or one beside it if it holds samples of another identity."""
    record = folder / "run.json"
    if not record.exists():
        return folder
    try:
        there = json.loads(record.read_text()).get("identity")
    except (OSError, ValueError, AttributeError):
        there = None
    return folder if there == identity else folder.with_name(f"{folder.name}-{identity}")
