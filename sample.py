"""Draw samples from a trained model.

    python sample.py --solver=dpmv3 [--steps=10] [--num_samples=64] [--seed=0] [--workdir=runs/digits]
    python sample.py --solver=dpmpp --option order=3
    python sample.py --solver=pc --steps=1000
    python sample.py --label=3 --guidance=2.0       of a class-conditional model; without --label, classes by turns
    python sample.py --task=class --label=3 --classifier=runs/classifier_digits      any model, guided by a classifier
    python sample.py --task=inpaint [--image=FILE.png] [--mask=FILE.png]      white is known; absent: the upper half is
    python sample.py --task=colorize [--image=FILE.png]
    python sample.py --solver=ode [--option rtol=1e-5 --option atol=1e-5 --option temperature=0.9]
    python sample.py --task=interpolate                          between the latents of pairs of test images

Solvers: those of solvers/__init__.py (dpmv3, DPM-Solver-v3, measures EMS first if the run has none; sde_dpmpp alone is
stochastic), pc (predictor-corrector), and ode (adaptive, to a stated tolerance). Writes samples.npz, grid.png and
run.json to <workdir>/samples/<name>/; a stopped run goes on after its last batch. A sample depends on its index and the
seed alone, not on the batch size or the number of devices and hosts (pc with a corrector: also on its batch; ode: to
within its tolerance).

The tasks inpaint and colorize are done by pc, class by any solver (dpmpp if absent), best with --guidance=3. Without
--image they take test images, four samples each; grid.png then shows, in a row, an image, what was known of it, and its
samples.
"""

import bisect
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import figures, measuring, program, runs, samplers
from experiments.config import fits, shown
from score_sde import VERSION, files, guidance, losses, parallel, sources
from score_sde.errors import UserError
from score_sde.metrics import features
from solvers import SOLVERS, conditioning, predictor_corrector, probability_flow, tableau

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}, pc or ode; the config's if absent.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Network evaluations (pc: time steps); the config's if absent.", lower_bound=1
)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver, name=value; may be repeated.")
TABLEAU = flags.DEFINE_string("tableau", None, "File of python -m tools.search: a solver, its steps and options.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many; the config's if absent.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "At a time; the config's if absent.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
LABEL = flags.DEFINE_integer("label", None, "Class of all samples; all classes by turns if absent.", lower_bound=0)
GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of guidance; 1 is the conditional model.")
GUIDANCE_INTERVAL = flags.DEFINE_string("guidance_interval", None, "Times low,high outside which there is no guidance.")
THRESHOLD = flags.DEFINE_enum("threshold", None, ["dynamic", "static"], "Keeps data predictions in the data range.")
TASK = flags.DEFINE_enum("task", None, ["inpaint", "colorize", "class", "interpolate"], "What is known of samples.")
IMAGE = flags.DEFINE_string("image", None, "The image to complete or colour; test images if absent.")
MASK = flags.DEFINE_string("mask", None, "Image of what is known, white, to inpaint; the upper half if absent.")
CLASSIFIER = flags.DEFINE_string("classifier", None, "The run folder of the classifier of --task=class.")
NAME = flags.DEFINE_string("name", None, "Folder under <workdir>/samples/; made from the solver if absent.")

CHUNK = 25  # steps of pc between two looks at the progress
PER_IMAGE = 4  # samples of each test image
PER_PAIR = 8  # samples from one test image to another
# Solver of a task where none is given; for a class not dpmv3, whose EMS are those of the model without the classifier.
TASK_SOLVERS = {"inpaint": "pc", "colorize": "pc", "class": "dpmpp", "interpolate": "ode"}


def main():
    # ------------------------------------------------------------------------------ what to run
    model = runs.open_model(WORKDIR.value, CHECKPOINT.value)
    experiment = model.experiment
    defaults = experiment.config.sampling
    solver = SOLVER.value or TASK_SOLVERS.get(TASK.value, defaults.solver)
    steps = STEPS.value or (defaults.pc_steps if solver == "pc" else defaults.steps)
    options = samplers.parse_options(OPTION.value)
    if TABLEAU.value is not None:
        for flag in (SOLVER, STEPS, OPTION):
            if flag.value:
                raise UserError(f"--tableau brings its own solver, steps and options: leave out --{flag.name}")
        solver, steps, options = samplers.read_search(model, TABLEAU.value)
    n = NUM_SAMPLES.value or defaults.num_samples
    batch_size = min(BATCH_SIZE.value or defaults.batch_size, parallel.round_up(n))
    parallel.batch_per_device(batch_size)
    check_task(solver)
    classifier = runs.open_classifier(CLASSIFIER.value, model) if TASK.value == "class" else None
    known = Known.of_flags(experiment) if TASK.value in ("inpaint", "colorize") else None
    if solver == "pc":
        draw, nfe, options, tables = predictor_corrected(model, classifier, known, steps, options)
    elif solver == "ode":
        draw, nfe, options, tables = adaptive(model, classifier, options)
        steps = 1  # of the progress bar: a batch
    else:
        draw, nfe, options, tables = tabled(model, classifier, solver, steps, options)
    print(f"{n} samples by {solver}, {nfe} evaluations each, {shown(options | bent())}, seed {SEED.value}")

    given = [text for text in OPTION.value if "/" not in text] + ["searched"] * (TABLEAU.value is not None)
    given += [f"{flag}={value}" for flag, value in bent().items() if "/" not in str(value)]
    run = [f"step{model.step}", solver] + ([] if solver == "ode" else [str(steps)])
    name = NAME.value or "-".join([*run, *given, f"seed{SEED.value}"])
    folder = model.results / "samples" / name

    # ------------------------------------------------------------------------------ sample
    identities = (model.identity, classifier and classifier.identity, known and known.identity(), tables)
    made = features.fingerprint(*identities, solver, steps, options, bent(), SEED.value, batch_size)
    kept = folder / f"unfinished-{made}"
    params = parallel.replicate((model.params, classifier.params if classifier else None))
    images, seconds, evaluations, failure = [], [], [], None
    starts = range(0, n, batch_size)
    with program.progress(total=len(starts) * steps, unit="step") as bar:
        for start in starts:
            path = kept / f"{start:07d}.npz"
            batch = read_batch(path)
            if batch is None:
                began = time.perf_counter()
                try:
                    x, calls = draw(params, np.arange(start, start + batch_size), bar)
                except UserError as error:
                    failure = error
                    break
                batch = dict(images=experiment.to_uint8(x), calls=calls, seconds=time.perf_counter() - began)
                if len(starts) > 1:
                    files.save_npz(path, batch)
            else:
                bar.update(steps)
            seconds.append(float(batch["seconds"]))
            evaluations.append(int(batch["calls"]))
            images.append(batch["images"])
    if not images:
        raise failure
    images = np.concatenate(images)[:n]
    if known is not None:
        images = known.put_back(images)

    # ------------------------------------------------------------------------------ write
    record = dict(
        model=dict(workdir=str(model.workdir), step=model.step, identity=model.identity),
        solver=solver,
        steps=None if solver == "ode" else steps,
        nfe=max(evaluations),
        options=options,
        **bent(),
        seed=SEED.value,
        num_samples=len(images),
        batch_size=batch_size,
        seconds_per_batch=float(np.median(seconds)),
        seconds_of_first_batch=seconds[0],
        devices=jax.device_count(),
        platform=jax.default_backend(),
        versions=dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0]),
        command=" ".join(sys.argv),
    )
    write(folder, images, record)
    if known is not None:
        known.save_grid(folder / "grid.png", images)
    if TASK.value == "interpolate":
        figures.save_grid(folder / "grid.png", images[:256], PER_PAIR)
    if parallel.writes():
        shutil.rmtree(kept, ignore_errors=True)
    if solver == "ode":
        print(f"{max(evaluations)} evaluations at most")
    print(f"wrote {folder}/samples.npz, grid.png and run.json")
    if failure is not None:
        raise UserError(f"{failure}; the {len(images)} samples finished before it are in {folder}")


def read_batch(path: pathlib.Path) -> dict | None:
    """A batch of samples that a stopped run of the same left behind; None if there is none, or it is damaged."""
    try:
        found = files.load_npz(path)
        return {name: found[name] for name in ("images", "calls", "seconds")}
    except (OSError, KeyError, ValueError):
        return None


def bent() -> dict:
    """The flags that bend the model, where given."""
    given = (TASK, IMAGE, MASK, CLASSIFIER, LABEL, GUIDANCE, GUIDANCE_INTERVAL, THRESHOLD)
    return {flag.name: flag.value for flag in given if flag.value is not None}


def noise_of_samples(model, classifier=None):
    """((model's params, classifier's), indices (B,)) -> the NoiseFn of those samples, bent as the flags say."""
    experiment, scale, interval = model.experiment, GUIDANCE.value, guidance_interval()
    if scale is not None and not np.isfinite(scale):
        raise UserError(f"--guidance={scale:g}: expected a number, as in --guidance=2.0")
    if classifier is not None:
        return classifier_guided(model, classifier)
    for flag in (LABEL, GUIDANCE):
        if flag.value is not None and not experiment.num_classes:
            raise UserError(
                f"--{flag.name}={flag.value:g}: {model.name} has no classes: "
                "train a model that has, python train.py --config=configs/digits_conditional.py"
            )
    check_label(model)
    if scale not in (None, 1) and not experiment.config.training.label_dropout:
        raise UserError(
            f"--guidance={scale:g}: {model.name} never saw a hidden label, so it has no unconditional part: "
            "train with --config.training.label_dropout=0.1"
        )

    def noise_of(params, index):
        params, _ = params
        y = experiment.classes(index, LABEL.value)
        noise = experiment.noise_of(params, y) if scale is None else experiment.guided(params, y, scale, interval)
        return thresholded(noise, experiment)

    return noise_of


def check_label(model):
    """Refuse a --label that is no class of a model, or a classifier."""
    classes = model.experiment.num_classes
    if LABEL.value is not None and LABEL.value >= classes:
        raise UserError(f"--label={LABEL.value}: the classes of {model.name} are 0 to {classes - 1}")


def thresholded(noise, experiment):
    """A NoiseFn with --threshold."""
    if THRESHOLD.value is None:
        return noise
    threshold = guidance.dynamic_threshold if THRESHOLD.value == "dynamic" else guidance.static_threshold
    return threshold(noise, experiment.sde, *experiment.data_range)


def classifier_guided(model, classifier):
    """`noise_of_samples` of --task=class."""
    experiment = model.experiment
    scale, interval = 1.0 if GUIDANCE.value is None else GUIDANCE.value, guidance_interval()
    if experiment.num_classes:
        raise UserError(f"--task=class: {model.name} knows classes by itself: leave out --task and --classifier")
    check_label(classifier)

    def noise_of(params, index):
        params, classifier_params = params
        y = classifier.experiment.classes(index, LABEL.value)
        noise = experiment.noise_of(params)
        log_probability = losses.log_probability(classifier.experiment.logits_of(classifier_params), y)
        guided = guidance.classifier_guidance(noise, experiment.sde, log_probability, scale)
        return thresholded(guided if interval is None else guidance.within(noise, guided, *interval), experiment)

    return noise_of


def guidance_interval() -> tuple[float, float] | None:
    """The value of --guidance_interval."""
    text = GUIDANCE_INTERVAL.value
    if text is None:
        return None
    if GUIDANCE.value is None:
        raise UserError(f"--guidance_interval={text} needs the scale within it: --guidance=2.0")
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 <= low < high:
        raise UserError(f"--guidance_interval={text}: expected two rising times, as in --guidance_interval=0.2,0.8")
    return low, high


def tabled(model, classifier, solver: str, steps: int, options: dict):
    """(draw, evaluations, options, hashes of the table) of a few-step solver.

    draw: (params, indices, bar) -> samples, evaluations.
    """
    experiment, noise_of = model.experiment, noise_of_samples(model, classifier)
    ems, scale, given = None, GUIDANCE.value, options
    if solver == "dpmv3":
        ems = measuring.ems_of(model, EMS.value, scale if classifier is None else None)
        if classifier is not None:
            print("EMS: of the model alone, the classifier has no part in them; dpmpp needs none")
    table, options = samplers.build_tableau(model, solver, steps, ems, scale, **given)
    if ems is not None and "t_end" not in given:
        t_end = samplers.published_for(model, steps, ems, scale)["t_end"]
        if t_end < options["t_end"]:
            print(
                f"sampling ends at t={options['t_end']:g}, as the EMS; for {t_end:g}: python -m ems --t_end={t_end:g}"
            )

    def one_device(params, table, index):
        keys = samplers.sample_keys(SEED.value, index)
        x, draws = samplers.prior(experiment, keys), samplers.draws(experiment, keys)
        return tableau.solve(noise_of(params, index), table, x, draws)

    on_devices = parallel.pmap(one_device, in_axes=(0, None, 0))
    table = jax.tree.map(np.float32, table)
    hashes = [hashlib.sha256(leaf.tobytes()).hexdigest() for leaf in jax.tree.leaves(table)]

    def draw(params, index, bar):
        def after(k):
            first = jax.tree.map(lambda rows: rows[:k], table)
            return parallel.gather(on_devices(params, first, parallel.shard(index)))

        x = after(steps)
        if not np.isfinite(x).all():
            k = 1 + bisect.bisect_left(range(1, steps), True, key=lambda k: not np.isfinite(after(k)).all())
            refuse_not_finite(after(k), index, f"evaluation {k}", table.t[k - 1])
        bar.update(steps)
        return x, steps

    return draw, steps, options, hashes


def predictor_corrected(model, classifier, known, steps: int, options: dict):
    """(draw, evaluations, options, no hashes) of the predictor-corrector sampler; draw as for `tabled`."""
    experiment, noise_of = model.experiment, noise_of_samples(model, classifier)
    fields = experiment.config.sampling
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
        x = samplers.prior(experiment, samplers.sample_keys(SEED.value, index))
        return predictor_corrector.Update(x, x)

    def advance(params, index, given, update, first, last):
        """Steps first to last - 1; given: what is known of each sample, if anything."""
        step = predictor_corrector.stepper(
            noise_of(params, index),
            experiment.sde,
            samplers.draws(experiment, samplers.sample_keys(SEED.value, index)),
            n=steps,
            condition=None if known is None else known.condition(given),
            **update_options,
        )
        return jax.lax.fori_loop(first, last, step, update)

    given_to = lambda index: None if known is None else known.in_data_range(index)
    params = (model.params, classifier.params if classifier else None)
    one = np.arange(1)  # options that have no meaning speak up now
    jax.eval_shape(advance, params, one, given_to(one), jax.eval_shape(start, one), 0, 1)
    start = parallel.pmap(start)
    advance = parallel.pmap(advance, in_axes=(0, 0, 0, 0, None, None))
    times = np.asarray(predictor_corrector.times(experiment.sde, steps))

    def draw(params, index, bar):
        shards = parallel.shard((index, given_to(index)))
        update = start(shards[0])
        for first in range(0, steps, CHUNK):
            before, last = update, min(first + CHUNK, steps)
            update = advance(params, *shards, before, first, last)
            if not np.isfinite(parallel.gather(update.x)).all():
                for k in range(first, last):  # again, one by one, to find the first
                    before = advance(params, *shards, before, k, k + 1)
                    refuse_not_finite(parallel.gather(before.x), index, f"step {k + 1}", times[k])
            bar.update(last - first)
        return parallel.gather(update.mean if options["denoise"] else update.x), nfe

    return draw, nfe, options, []


def adaptive(model, classifier, options: dict):
    """(draw, evaluations, options, no hashes) of the ODE solved to a tolerance; draw as for `tabled`.

    --task=interpolate encodes pairs of test images, and decodes what lies between their latents.
    """
    experiment, noise_of = model.experiment, noise_of_samples(model, classifier)
    defaults = dict(rtol=1e-5, atol=1e-5, temperature=1.0, denoise=experiment.config.sampling.denoise)
    samplers.check_options("ode", options, defaults)
    for name, value in options.items():
        if name != "denoise" and not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"--option {name}={value}: expected a positive number, as in {name}={defaults[name]}")
    if STEPS.value is not None:
        raise UserError(f"--steps={STEPS.value}: solver ode chooses its steps: leave it out, or set --option rtol=1e-3")
    if TASK.value == "interpolate" and experiment.num_classes and LABEL.value is None:
        raise UserError(f"--task=interpolate: {model.name} has classes: give one for both images, as in --label=3")
    options = defaults | options
    tolerances = {name: options[name] for name in ("rtol", "atol")}
    chain = experiment.config.denoiser.num_scales if options["denoise"] else None

    def prior(index):
        return samplers.prior(experiment, samplers.sample_keys(SEED.value, index))

    def decode(params, index, z):
        z = options["temperature"] * z
        return probability_flow.solve(noise_of(params, index), experiment.sde, z, denoise=chain, **tolerances)

    def encode(params, index, image):
        x = experiment.as_seen(samplers.sample_keys(SEED.value, index), image)
        times = dict(t_start=experiment.sde.t_min, t_end=experiment.sde.t_max)
        return probability_flow.solve(noise_of(params, index), experiment.sde, x, **times, **tolerances)

    one = np.arange(1)  # options that have no meaning speak up now
    params = (model.params, classifier.params if classifier else None)
    jax.eval_shape(decode, params, one, jax.eval_shape(prior, one))
    prior, decode, encode = (parallel.pmap(function) for function in (prior, decode, encode))
    test = experiment.images("test") if TASK.value == "interpolate" else None

    def latents(params, index):
        """Latents between those of test images 2 k and 2 k + 1, for pair k; and the evaluations they took."""
        first = index[0] // PER_PAIR
        count = 2 * (index[-1] // PER_PAIR - first + 1)
        ends = 2 * first + np.arange(parallel.round_up(count))
        ends_on_devices = parallel.shard((ends, test.take(ends % test.size)["image"]))
        z, run = parallel.gather(encode(params, *ends_on_devices))
        probability_flow.check(run, z, ends)
        pair, share = 2 * (index // PER_PAIR - first), index % PER_PAIR / (PER_PAIR - 1)
        return probability_flow.interpolate(z[pair], z[pair + 1], share.astype(np.float32)), int(run.evaluations[0])

    def draw(params, index, bar):
        shards, calls = parallel.shard(index), 0
        if test is None:
            z = prior(shards)
        else:
            z, calls = latents(params, index)
            z = parallel.shard(z)
        x, run = parallel.gather(decode(params, shards, z))
        probability_flow.check(run, x, index)
        bar.update(1)
        return x, calls + int(run.evaluations[0])

    return draw, "adaptive", options, []


def refuse_not_finite(x, index, where: str, t: float):
    """Name the first of samples x that is not finite, if any."""
    bad = ~np.isfinite(x).all((1, 2, 3))
    if bad.any():
        raise UserError(
            f"sample {index[bad.argmax()]} is not finite after {where}, at t = {t:.3g}: "
            "try another solver, more steps, or another checkpoint"
        )


# ------------------------------------------------------------------------------------------------ tasks


def check_task(solver: str):
    """Refuse flags that do not go together."""
    task = TASK.value
    for flag, tasks in ((IMAGE, ("inpaint", "colorize")), (MASK, ("inpaint",)), (CLASSIFIER, ("class",))):
        if flag.value is not None and task not in tasks:
            raise UserError(f"--{flag.name} needs --task={' or --task='.join(tasks)}")
    if task == "class" and CLASSIFIER.value is None:
        raise UserError(
            "--task=class needs --classifier=WORKDIR: train one, python train.py --config=configs/classifier/digits.py"
        )
    if task == "interpolate" and solver != "ode":
        raise UserError(f"--task=interpolate is done by the ODE alone, not by {solver}: --solver=ode")
    if task in ("inpaint", "colorize") and solver != "pc":
        raise UserError(f"--task={task} is done by the predictor-corrector sampler alone, not by {solver}: --solver=pc")


class Known(NamedTuple):
    """What is known of the samples of --task=inpaint and --task=colorize."""

    experiment: object
    images: Callable  # indices of samples (b,) -> uint8 (b, H, W, C)
    mask: np.ndarray | None  # (1, H, W, 1), true where known; None: the gray of every pixel is

    @classmethod
    def of_flags(cls, experiment):
        height, width, channels = experiment.image_shape
        mask = None
        if TASK.value == "inpaint":
            mask = np.broadcast_to(np.arange(height)[:, None] < height // 2, (height, width))
            if MASK.value is not None:
                mask = read_image(MASK.value, experiment, None)[..., 0] > 127
            mask = mask[None, :, :, None]
        elif channels == 1:
            raise UserError(
                f"--task=colorize: the images of {experiment.config.data.dataset} are gray: use another model"
            )
        if IMAGE.value is not None:
            image = read_image(IMAGE.value, experiment, channels if TASK.value == "inpaint" else None)
            return cls(experiment, lambda index: np.broadcast_to(image, (len(index), *image.shape)), mask)
        test = experiment.images("test")
        return cls(experiment, lambda index: test.take(index // PER_IMAGE % test.size)["image"], mask)

    def identity(self) -> list[str]:
        """Hashes of the mask and the first image."""
        arrays = [self.images(np.arange(1))] + ([] if self.mask is None else [self.mask])
        return [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]

    def in_data_range(self, index):
        """The images of samples numbered `index` as the model sees them; of them, only what is known will count."""
        keys = jax.numpy.broadcast_to(jax.random.key(0), index.shape)
        return np.asarray(self.experiment.as_seen(keys, self.images(index)))

    def condition(self, images):
        if self.mask is None:
            return conditioning.colorization(self.experiment.sde, images)
        return conditioning.inpainting(self.experiment.sde, images, self.mask)

    def put_back(self, samples):
        """uint8 samples whose known pixels have exactly their known levels."""
        return samples if self.mask is None else np.where(self.mask, self.images(np.arange(len(samples))), samples)

    def shown(self, images):
        """uint8 images as far as they are known: gray where nothing is, or their gray."""
        if self.mask is None:
            return np.broadcast_to(images.mean(-1, keepdims=True), images.shape).astype(np.uint8)
        return np.where(self.mask, images, np.uint8(128))

    def save_grid(self, path, samples):
        """Images, what was known of them, and the samples, side by side; test images a row each."""
        per_image = PER_IMAGE if IMAGE.value is None else 256
        samples = samples[:256]
        starts = range(0, len(samples), per_image)
        rows = [
            part
            for start in starts
            for image in [self.images(np.array([start]))]
            for part in (image, self.shown(image), samples[start : start + per_image])
        ]
        figures.save_grid(path, np.concatenate(rows), 2 + PER_IMAGE if IMAGE.value is None else None)


def read_image(path: str, experiment, channels: int | None) -> np.ndarray:
    """A file as uint8 (H, W, C); refused unless its size is the model's and its channels are `channels`, if given."""
    height, width, ours = experiment.image_shape
    if not pathlib.Path(path).is_file():
        raise UserError(f"no such image {path}")
    image = sources.decode(pathlib.Path(path), path)
    if (image.height, image.width) != (height, width):
        raise UserError(f"{path} is {image.width}x{image.height}, the model's images are {width}x{height}: resize it")
    found = 1 if image.mode in ("1", "L", "LA") else 3
    if channels is not None and found != channels:
        raise UserError(f"{path} has {found} colour channel(s), the model's images have {channels}: convert it")
    wanted = channels or (1 if path == MASK.value else ours)
    return np.asarray(image.convert("L" if wanted == 1 else "RGB")).reshape(height, width, wanted)


def write(folder: pathlib.Path, images: np.ndarray, record: dict):
    """samples.npz (uint8 NHWC, key `samples`), grid.png, run.json."""
    files.save_npz(folder / "samples.npz", dict(samples=images), compressed=True)
    figures.save_grid(folder / "grid.png", images[:256])
    files.write(folder / "run.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    program.run(main)
