"""What the programs share: a config becomes objects, a run folder is opened, a mistake becomes one line.

The only module, with the programs themselves, that reads a config.
"""

import ast
import difflib
import errno
import inspect
import json
import logging as python_logging
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from tqdm import tqdm

from configs import base
from ems import estimate, moments, statistics
from ems.statistics import EMS
from score_sde import VERSION, checkpoint, data, denoiser, figures, files, guidance, models, parallel, training
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.models.classifier import CLASSIFIERS, logits_fn
from score_sde.sde import SDE, SDES
from solvers import SOLVERS, predictor_corrector, tableau
from solvers.dpm_solver import dpm_solver_pp
from solvers.dpm_solver_v3 import published_options
from solvers.tableau import Tableau

RUNS = pathlib.Path("runs")
# Fields by which a run may differ from the one it continues: they do not change what its parameters are.
FREE = ("training.n_iters", "training.log_freq", "training.eval_freq", "training.checkpoint_freq", "training.keep_freq")
FREE_SECTIONS = ("sampling.", "ems.", "eval.")


# ------------------------------------------------------------------------------------------------ programs


def run(main: Callable[..., None], *, files: bool = False):
    """Run a program after parsing its flags. A UserError, or a disk that refuses, is one line and exit code 2.

    files: whether it takes arguments that are no flags; main is called with them.
    """
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)  # errors of writers come back to us anyway
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "score_sde"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def guarded(argv):
        if files:
            return main(argv[1:])
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
        return main()

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOTDIR):
            raise
        _fail(
            f"cannot write {error.filename or 'to disk'}: {error.strerror}: free some space or choose another --workdir"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _parse(argv):
    """Parse flags; whatever absl and ml_collections raise about a flag becomes one line."""
    try:
        return flags.FLAGS(argv)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise UserError(" ".join(str(error).split())) from None


def config_flag():
    """Define --config=FILE with its overrides --config.x.y=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; fields by --config.x.y=value.", lock_config=True
    )


def config_of(flag) -> ConfigDict:
    """The value of `config_flag()`, given or refused."""
    file = flags.FLAGS["config"].config_filename
    if file is None or not pathlib.Path(file).is_file():
        raise UserError(f"no config file {file}: choose one of configs/, as in --config=configs/digits.py")
    return flag.value


# ------------------------------------------------------------------------------------------------ configs


def flat(config) -> dict:
    """Nested fields by dotted name."""
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, (ConfigDict, dict))
        fields |= {f"{key}.{k}": v for k, v in flat(value).items()} if nested else {key: value}
    return fields


def check_fields(config: ConfigDict, source: str):
    """Refuse fields that no program reads, by name; `sde` and `model` are checked by what they construct."""
    known = flat(base.get_config())
    for field in flat(config):
        if field not in known and not field.startswith(("sde.", "model.")):
            near = difflib.get_close_matches(field, known, 1)
            raise UserError(f"{source}: unknown field {field}" + (f", did you mean {near[0]}?" if near else ""))


def construct(table: dict, section: ConfigDict, what: str, **more):
    """table[section.name](**section, **more), with the mistakes that a config can make in it named."""
    arguments = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in section.items()}
    name = arguments.pop("name")
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: use one of {', '.join(table)}")
    try:
        return table[name](**arguments, **more)
    except TypeError as error:
        raise UserError(f"{what} {name!r}: {' '.join(str(error).split())}") from None


# ------------------------------------------------------------------------------------------------ objects of a config


class Experiment(NamedTuple):
    """What a config stands for."""

    config: ConfigDict
    sde: SDE
    network: object  # a flax Module: (x, label, y, dropout keys) -> (B, H, W, C), or a classifier's
    noise_of: Callable | None  # (params, class labels (B,) or None, dropout keys (B,) or None) -> NoiseFn
    logits_of: Callable | None = None  # of a classifier, in its place: params -> (x, t) -> logits (B, classes)

    @property
    def num_classes(self) -> int:
        """Of a class-conditional network, whose label for "no class" this is too, or of a classifier; else 0."""
        return self.config.model.get("num_outputs" if self.logits_of else "num_classes", 0)

    @property
    def data_range(self) -> tuple[float, float]:
        return (-1.0, 1.0) if self.config.data.centered else (0.0, 1.0)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.config.data.image_size
        return (size, size, self.config.data.num_channels)

    def init_params(self, seed: int):
        """Parameters before training."""
        return jax.jit(self._init)(jax.random.key(seed))

    def params_template(self):
        """Shapes and types of the parameters."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def _init(self, key):
        x = jnp.zeros((1, *self.image_shape))
        return self.network.init(key, x, jnp.ones((1,)))["params"]

    def to_uint8(self, x) -> np.ndarray:
        return np.asarray(data.to_uint8(x, centered=self.config.data.centered))

    def preprocess(self, key, image, *, flip: bool | None = None):
        """A uint8 image as the model sees it; `flip` overrides the config's random flips."""
        fields = self.config.data
        return data.preprocess(
            key,
            image,
            random_flip=fields.random_flip if flip is None else flip,
            uniform_dequantization=fields.uniform_dequantization,
            centered=fields.centered,
        )

    def as_seen(self, keys, images):
        """uint8 images (B, H, W, C) as the model sees them, unflipped; keys (B,) of their dequantization."""
        return jax.vmap(lambda key, image: self.preprocess(key, image, flip=False))(keys, images)

    def images(self, split: str) -> data.Images:
        fields = self.config.data
        images = data.load(
            fields.dataset,
            split,
            image_size=fields.image_size,
            num_channels=fields.num_channels,
            resize=fields.resize,
            crop=fields.crop,
            data_dir=fields.data_dir,
        )
        field = "model.num_outputs" if self.logits_of else "model.num_classes"
        return checked_labels(images, self.num_classes, field) if self.num_classes else images

    def classes(self, index, label: int | None = None):
        """Classes (B,) of samples numbered `index`: `label`, or all by turns; None for a network without classes."""
        if not self.num_classes:
            return None
        return index % self.num_classes if label is None else jnp.full_like(index, label)

    def guided(self, params, y, scale: float, interval: tuple[float, float] | None = None) -> NoiseFn:
        """The class-conditional network guided towards classes y (B,), at times in `interval` alone if given."""
        conditional = lambda y: self.noise_of(params, y)
        guided = guidance.classifier_free(conditional, y, self.num_classes, scale)
        return guided if interval is None else guidance.within(conditional(y), guided, *interval)

    def loss(self) -> Callable:
        fields = self.config.training
        if self.logits_of:
            return training.make_classifier_loss(self.logits_of, self.sde, self.preprocess, t_min=fields.t_min)
        return training.make_loss(
            self.noise_of,
            self.sde,
            self.preprocess,
            continuous=fields.continuous,
            num_scales=self.config.denoiser.num_scales,
            t_min=fields.t_min,
            likelihood_weighting=fields.likelihood_weighting,
            reduce_mean=fields.reduce_mean,
            label_dropout=fields.label_dropout,
            null_label=self.num_classes,
        )


def checked_labels(images: data.Images, num_classes: int, field: str) -> data.Images:
    """Images whose labels are refused unless they are classes of the network."""

    def take(indices):
        batch = images.take(indices)
        if "label" not in batch:
            raise UserError(f"{images.name} has no labels, but {field} is {num_classes}: choose labelled images, or 0")
        if batch["label"].max() >= num_classes:
            raise UserError(
                f"{images.name} has the label {batch['label'].max()}, but {field} is {num_classes}: "
                "labels count from 0, so set it to the largest label + 1"
            )
        return batch

    take(np.arange(1))
    return images._replace(take=take)


def build(config: ConfigDict) -> Experiment:
    """The objects of a config; mistakes in it are named here, before any work."""
    sde = construct(SDES, config.sde, "SDE")
    if config.model.name in CLASSIFIERS:
        return build_classifier(config, sde)
    fields = config.denoiser
    for name, table in (("output", denoiser.OUTPUTS), ("label", denoiser.LABELS)):
        if fields[name] not in table:
            raise UserError(f"unknown denoiser.{name} {fields[name]!r}: use one of {', '.join(table)}")
    hidden = config.training.label_dropout
    if not 0 <= hidden < 1 or (hidden and not config.model.get("num_classes")):
        raise UserError(
            f"training.label_dropout is {hidden}: expected a share in [0, 1), and 0 unless model.num_classes is set"
        )
    noise_levels = {k: v for k, v in config.sde.items() if k in ("sigma_min", "sigma_max")}
    network = construct(
        models.MODELS,
        config.model,
        "network",
        centered=config.data.centered,
        num_scales=fields.num_scales,
        **noise_levels,
    )

    def noise_of(params, y=None, dropout_keys=None) -> NoiseFn:
        y = y if config.model.get("num_classes") else None
        apply = lambda x, label: network.apply({"params": params}, x, label, y, dropout_keys)
        return denoiser.noise_fn(apply, sde, output=fields.output, label=fields.label, num_scales=fields.num_scales)

    experiment = Experiment(config, sde, network, noise_of)
    experiment.params_template()  # an impossible image size or network speaks up now
    return experiment


def build_classifier(config: ConfigDict, sde: SDE) -> Experiment:
    """The objects of a config whose `model` is a noise-conditional classifier."""
    network = construct(CLASSIFIERS, config.model, "classifier")
    apply = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
    experiment = Experiment(config, sde, network, None, lambda params: logits_fn(apply(params), sde))
    experiment.params_template()
    return experiment


# ------------------------------------------------------------------------------------------------ run folders


def claim_workdir(workdir: pathlib.Path, config: ConfigDict):
    """Make `workdir` the folder of this config; refuse one that holds another experiment."""
    known = workdir / "config.json"
    if known.exists():
        theirs, ours = flat(read_config(workdir)), flat(config)
        for field in ours:
            changed = _plain(theirs.get(field)) != _plain(ours[field])
            if changed and field not in FREE and not field.startswith(FREE_SECTIONS):
                raise UserError(
                    f"{workdir} holds another experiment: its {field} is {theirs.get(field)!r}, not {ours[field]!r}: "
                    f"choose another --workdir, or continue that one with python train.py --workdir={workdir}"
                )
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no config.json: choose another --workdir")
    files.write(known, json.dumps(config.to_dict(), indent=2) + "\n")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run folder."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"no run in {workdir} (no config.json): train one first, python train.py --config=configs/digits.py"
        )
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a config: {error}") from None
    check_fields(config, str(path))
    for section, fields in base.get_config().items():
        if section not in ("seed", "sde", "model"):  # a run may be older than a field
            config[section] = ConfigDict(fields.to_dict() | config.get(section, ConfigDict()).to_dict())
    return config


def newest_run() -> pathlib.Path:
    """The run folder under runs/ of a model of images, not a classifier, whose checkpoints changed last."""
    found = [path.parent for path in RUNS.glob("*/checkpoints") if (path.parent / "config.json").is_file()]
    for run in sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True):
        if read_config(run).model.name not in CLASSIFIERS:
            return run
    raise UserError(f"no run in {RUNS}/: train one first, python train.py --config=configs/digits.py")


class Model(NamedTuple):
    """A trained model: an experiment and the averaged parameters of one of its checkpoints."""

    workdir: pathlib.Path
    experiment: Experiment
    params: dict
    step: int
    identity: str

    @property
    def name(self) -> str:
        return f"{self.workdir} at step {self.step} ({self.identity})"


def open_model(workdir: str | None, step: int | None = None, *, classifier: bool = False) -> Model:
    """The model of a run folder (the newest under runs/ if None), at a step (the last if None). Says which.

    classifier: whether the run must be a classifier's; it must not, otherwise.
    """
    folder = newest_run() if workdir is None else pathlib.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"no such workdir {folder}: train first, python train.py --config=configs/digits.py")
    experiment = build(read_config(folder))
    if classifier != (experiment.logits_of is not None):
        held, wanted = ("a model of images", "a classifier") if classifier else ("a classifier", "a model of images")
        example = "classifier/digits" if classifier else "digits"
        raise UserError(f"{folder} holds {held}, not {wanted}: train one with --config=configs/{example}.py")
    checkpoints = checkpoint.Checkpoints(folder)
    step = checkpoints.step_or_last(step)
    params = checkpoints.restore_ema(step, experiment.params_template())
    model = Model(folder, experiment, params, step, checkpoint.identity(params))
    print(f"{'classifier' if classifier else 'model'}: {model.name}")
    return model


def open_classifier(workdir: str, model: Model) -> Model:
    """The classifier of a run folder, refused unless it was trained on the images and the SDE of `model`."""
    classifier = open_model(workdir, classifier=True)
    theirs, ours = classifier.experiment, model.experiment
    for what in ("sde", "image_shape", "data_range"):
        if getattr(theirs, what) != getattr(ours, what):
            raise UserError(
                f"{workdir} and {model.workdir} do not fit: the classifier's {what} is {getattr(theirs, what)}, the "
                f"model's {getattr(ours, what)}: train one for the other"
            )
    return classifier


# ------------------------------------------------------------------------------------------------ EMS of a model


def ems_path(model: Model, origin: dict) -> pathlib.Path:
    """Where the statistics of that origin belong; whatever tells measurements of one size apart is in the name."""
    name = f"step{model.step}_nodes{origin['nodes']}_data{origin['num_data']}"
    first, sde = origin["images"][0][0], model.experiment.sde
    apart = {
        "_first": first or None,
        "_end": None if origin["t_end"] == sde.t_min else origin["t_end"],
        "_guidance": origin["guidance_scale"],
        "_seed": origin["seed"] or None,
    }
    name += "".join(f"{key}{value:g}" for key, value in apart.items() if value is not None)
    name += "" if origin["data"] == model.experiment.config.data.dataset else f"_{pathlib.Path(origin['data']).stem}"
    return model.workdir / "ems" / f"{name.replace(' ', '_')}.npz"


def find_ems(model: Model, guidance_scale: float | None = None) -> pathlib.Path | None:
    """The run's statistics of this checkpoint and guidance: on data before own samples, on most images, then nodes."""
    found = {
        path: statistics.load_origin(path)
        for path in sorted((model.workdir / "ems").glob(f"step{model.step}_*.npz"))
        if not path.name.endswith(".partial.npz")
    }
    rank = lambda path: (
        found[path]["data"] != OWN_SAMPLES,
        found[path]["num_data"],
        found[path]["nodes"],
        -found[path].get("t_end", np.inf),
    )
    wanted = (model.identity, guidance_scale)
    fitting = [path for path, origin in found.items() if (origin["checkpoint"], origin["guidance_scale"]) == wanted]
    return max(fitting, key=rank, default=None)


def load_ems(model: Model, path: pathlib.Path, guidance_scale: float | None = None) -> EMS:
    """Statistics from a file, refused unless they were measured on this very model, with this scale of guidance."""
    ems = statistics.load(path)
    origin = ems.origin
    if origin.get("checkpoint") != model.identity:
        raise UserError(
            f"{path} was measured on checkpoint {origin.get('checkpoint')} (step {origin.get('step')}), "
            f"this is {model.identity} (step {model.step}): measure again with python -m ems --workdir={model.workdir}"
        )
    if ems.l.shape[1:] != model.experiment.image_shape:
        raise UserError(f"{path} is for images {ems.l.shape[1:]}, this model's are {model.experiment.image_shape}")
    if origin.get("guidance_scale") != guidance_scale:
        theirs, ours = (
            "without guidance" if scale is None else f"with guidance {scale:g}"
            for scale in (origin.get("guidance_scale"), guidance_scale)
        )
        flag = "" if guidance_scale is None else f" --guidance={guidance_scale:g}"
        raise UserError(
            f"{path} was measured {theirs}, sampling is {ours}: measure again with "
            f"python -m ems --workdir={model.workdir}{flag}"
        )
    statistics.check_sde(ems, model.experiment.sde)
    return ems


OWN_SAMPLES = "own samples"
OWN_STEPS = 50  # evaluations of DPM-Solver++ 2M for each of them


class Source(NamedTuple):
    """What EMS are measured on."""

    name: str
    size: float  # number of images
    take: Callable  # indices (b,) -> (x0 (b, H, W, C),), and the classes (b,) if the network has any


def training_images(experiment: Experiment) -> Source:
    """The training images, unflipped, in a fixed random order: a stored order may be one class after the other."""
    try:
        images = experiment.images("train")
    except UserError as error:
        raise UserError(f"{error}; without the images, python -m ems --data=samples measures on own samples") from None
    order = data.permutation(0, 0, images.size)
    preprocess = jax.jit(experiment.as_seen)

    def take(index):
        batch = images.take(order[index])
        x0 = np.asarray(preprocess(sample_keys(0, index), batch["image"]))
        return (x0, batch["label"]) if experiment.num_classes else (x0,)

    return Source(experiment.config.data.dataset, images.size, take)


def latents(experiment: Experiment, path: str) -> Source:
    """x0 as it is, from an .npz: `latents` (K, H, W, C) of floats, and `labels` (K,) if the network has classes."""
    keys = ["latents", "labels"] if experiment.num_classes else ["latents"]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys}
    except Exception as error:  # zipfile, zlib and NumPy raise many types on a damaged file
        raise UserError(f"--data={path}: expected samples, or an .npz with {' and '.join(keys)} ({error})") from None
    x0 = arrays["latents"]
    if x0.shape[1:] != experiment.image_shape or x0.dtype.kind != "f" or not np.isfinite(x0).all():
        raise UserError(
            f"{path}: latents are {x0.dtype} {x0.shape}, expected finite floats (K, *{experiment.image_shape}), NHWC"
        )
    columns = (x0.astype(np.float32), *(np.asarray(arrays[key], np.int32) for key in keys[1:]))
    return Source(path, len(x0), lambda index: tuple(column[index] for column in columns))


def own_samples(model: Model, noise_of: Callable, seed: int) -> Source:
    """Samples of the model itself, each a function of its index and the seed."""
    experiment = model.experiment
    table = dpm_solver_pp(experiment.sde, OWN_STEPS, order=2)
    sample = sampler(model, noise_of, seed, purpose=2)

    def take(index):
        x0 = sample(table, index)
        return (x0, np.asarray(experiment.classes(index))) if experiment.num_classes else (x0,)

    return Source(OWN_SAMPLES, np.inf, take)


def noise_of_ems(experiment: Experiment, guidance_scale: float | None) -> Callable:
    """(params, classes (B,) of a conditional network) -> the NoiseFn that is measured."""
    if guidance_scale is None:
        return experiment.noise_of
    if not experiment.num_classes or not experiment.config.training.label_dropout:
        raise UserError(
            f"guidance {guidance_scale:g}: this model has no unconditional part: "
            "train one that has, python train.py --config=configs/digits_conditional.py"
        )
    return lambda params, y: experiment.guided(params, y, guidance_scale)


def measure_ems(
    model: Model,
    *,
    nodes: int,
    num_data: int,
    batch_size: int,
    t_end: float | None = None,
    seed: int = 0,
    first_image: int = 0,
    source: str | None = None,
    guidance_scale: float | None = None,
    noise_of: Callable | None = None,
) -> pathlib.Path:
    """Measure l, s, b and their errors; write the statistics, their picture and the moments; return the first's path.

    t_end: where the nodes end, the SDE's t_min by default.
    first_image: where this measurement's images begin; several machines take different ones, and `merge_ems` adds.
    source: the config's training images by default; "samples" for the model's own, or an .npz of latents.
    guidance_scale: of classifier-free guidance, for statistics of the guided model; None for the model alone.
    noise_of: (params, *classes) -> NoiseFn, if another than guidance_scale says is to be measured.
    """
    experiment = model.experiment
    guidance_scale = None if guidance_scale == 1 else guidance_scale
    noise_of = noise_of or noise_of_ems(experiment, guidance_scale)
    t_end = experiment.sde.t_min if t_end is None else t_end
    node = estimate.nodes(experiment.sde, nodes, t_end=t_end)
    parallel.batch_per_device(batch_size)
    if source is None:
        images = training_images(experiment)
    elif source == "samples":
        images = own_samples(model, noise_of, seed)
    else:
        images = latents(experiment, source)
    there = max(0, min(num_data, images.size - first_image))
    used = int(there) // batch_size * batch_size
    if not used:
        raise UserError(
            f"EMS in batches of {batch_size} from {there:.0f} images of {images.name}, from image {first_image} on: "
            "use a smaller batch size (--batch_size), or an earlier --first_image"
        )
    origin = dict(
        checkpoint=model.identity,
        step=model.step,
        sde=statistics.describe_sde(experiment.sde),
        t_end=t_end,
        data=images.name,
        latent=source not in (None, "samples"),
        num_data=used,
        images=[[first_image, first_image + used]],
        nodes=nodes,
        seed=seed,
        guidance_scale=guidance_scale,
        jax=jax.__version__,
        score_sde=VERSION,
    )
    path = ems_path(model, origin)
    if path.exists() and statistics.load_origin(path)["checkpoint"] == model.identity:
        print(f"EMS: already measured, {path}")
        return path
    evaluations, megabytes = len(node.t) * used, moments.bytes_needed(len(node.t), experiment.image_shape) / 1e6
    guided = "" if guidance_scale is None else f", guidance {guidance_scale:g}"
    print(
        f"EMS: {len(node.t)} nodes x {used} images of {images.name} from image {first_image} on, seed {seed}{guided}: "
        f"{evaluations} evaluations of at most 3 forward passes; {megabytes:.0f} MB of memory for any number of images"
    )
    key = jax.random.key(seed)
    classes = (0,) if experiment.num_classes else ()
    on_devices = parallel.pmap(
        lambda params, node, node_index, index, x0, *y: estimate.measure(
            lambda x, t, *y: noise_of(params, *y)(x, t), node, node_index, key, x0, index, *y
        ),
        in_axes=(0, None, None, 0, 0, *classes),
    )
    params = parallel.replicate(model.params)

    def measure(node, node_index, *arrays):
        node = jax.tree.map(np.float32, node)
        return on_devices(params, node, node_index, *parallel.shard(arrays))

    path.parent.mkdir(parents=True, exist_ok=True)
    began = []
    with tqdm(total=1, bar_format="EMS {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", dynamic_ncols=True) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)
            began.append(time.monotonic())
            if len(began) == 3:  # the first call compiled, the second did not
                minutes = (began[2] - began[1]) * (total - done) / 60
                bar.write(f"EMS: about {minutes:.1f} minutes, {total} calls of {began[2] - began[1]:.2f} s")

        blocks = estimate.accumulate(
            measure,
            node,
            images.take,
            range(first_image, first_image + used),
            experiment.image_shape,
            batch_size=batch_size,
            partial=path.with_suffix(".partial.npz"),
            identity=f"{model.identity} {origin['sde']} {images.name} {guidance_scale} seed {seed}",
            progress=progress,
        )
    write_ems(model, path, moments.Saved(node.t, node.lam, blocks, origin), noise_of)
    return path


def write_ems(model: Model, path: pathlib.Path, saved: moments.Saved, noise_of: Callable):
    """Make statistics of moments; say how exact they are; write both, and a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    moments.save(path.with_suffix(moments.SUFFIX), saved)
    node = estimate.nodes_at(model.experiment.sde, saved.t, saved.lam)
    ems, without, sizes = estimate.with_errors(node, saved.blocks, saved.origin)
    if constant := ems.origin["constant_f"]:
        print(f"EMS: f is constant at {constant} of {ems.l.size} nodes and pixels; there s = 0 and b = f'")
    if without:
        ems = print_errors(model, ems, without, sizes, noise_of)
    else:
        print("EMS: one batch only, so no standard errors: use a smaller --batch_size or a larger --num_data")
    statistics.save(path, ems)
    figures.save_ems(path.with_suffix(".png"), ems.lam, {"l": ems.l, "s": ems.s, "b": ems.b}, f"EMS of {model.name}")
    for_merging = path.with_suffix(moments.SUFFIX)
    megabytes = for_merging.stat().st_size / 1e6
    print(f"EMS: wrote {path}, its .png and, needed for merging alone, {for_merging.name} ({megabytes:.0f} MB)")


JUDGED_STEPS, FINE_STEPS, JUDGED_SAMPLES = 10, 100, 32


def print_errors(model: Model, ems: EMS, without: list[EMS], sizes: list[float], noise_of: Callable) -> EMS:
    """Print the standard errors and whether the number of images suffices; the statistics, with that in their origin.

    That is told from samples: of all images' statistics, and of those without each block, against a fine solution.
    """
    size = np.stack([np.sqrt(np.square(getattr(ems, key)).mean((1, 2, 3))) for key in "lsb"])
    print("EMS: size +- standard error, root mean square over pixels, at some of the nodes")
    print(f"     lam{'l':>14}{'s':>20}{'b':>20}")
    for j in np.linspace(0, len(ems.lam) - 1, 9).astype(int):
        columns = (f"{size[i, j]:8.3f} +- {ems.errors[i, j]:.1e}" for i in range(3))
        print(f"  {ems.lam[j]:6.2f}" + "  ".join(columns))

    tables = [build_tableau(model, "dpmv3", JUDGED_STEPS, part)[0] for part in (ems, *without)]
    t_end = max(ems.t[-1], model.experiment.sde.t_min)
    fine = dpm_solver_pp(model.experiment.sde, FINE_STEPS, order=2, t_end=t_end)
    index = np.arange(-(-JUDGED_SAMPLES // jax.device_count()) * jax.device_count())
    sample = sampler(model, noise_of, 0, purpose=3)
    exact, whole, *parts = (sample(table, index) for table in (fine, *tables))
    distance, error = rms(whole - exact), rms(moments.jackknife(whole, parts, sizes))

    num_data = ems.origin["num_data"]
    excess, wanted = estimate.needed(distance, error, num_data)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = ", ".join(
            f"{np.nanmedian(share):.1%} of {key}" for key, share in zip("lsb", ems.errors / size, strict=True)
        )
    verdict = f"exact statistics would bring them {excess:.1%} nearer: K "
    if excess <= estimate.TOLERANCE:
        verdict += f"suffices (below {estimate.TOLERANCE:.0%})"
    else:
        verdict += f"does not suffice (above {estimate.TOLERANCE:.0%}), "
        verdict += f"about {wanted} images would" if wanted else "take many more"
    print(
        f"EMS: K = {num_data} images: standard error {relative} (median over nodes; half of it with {4 * num_data}). "
        f"It moves samples of {JUDGED_STEPS} evaluations by {error:.4f}, which are {distance:.4f} from the exact ODE; "
        + verdict
    )
    judged = dict(evaluations=JUDGED_STEPS, distance=distance, standard_error=error, sufficient_num_data=wanted)
    return ems._replace(origin=ems.origin | {"samples": judged})


def merge_ems(model: Model, paths: list[str]) -> pathlib.Path:
    """The statistics of this model from several machines' moments (or statistics with their moments beside)."""
    saved = [moments.load(path) for path in paths]
    if saved[0].origin["checkpoint"] != model.identity:
        raise UserError(
            f"{paths[0]} was measured on checkpoint {saved[0].origin['checkpoint']}, the model is {model.name}: "
            "name its run by --workdir"
        )
    whole, names = saved[0], paths[0]
    for path, part in zip(paths[1:], saved[1:], strict=True):
        whole, names = moments.add(whole, part, (names, path)), f"{names}, {path}"
    path = ems_path(model, whole.origin)
    print(f"EMS: {len(paths)} measurements, {whole.origin['num_data']} images of {whole.origin['data']}")
    write_ems(model, path, whole, noise_of_ems(model.experiment, whole.origin["guidance_scale"]))
    return path


def import_ems(model: Model, folder: str, *, t_end: float) -> pathlib.Path:
    """Published statistics (l.npz, sb.npz), which tell of no model, taken for this model's."""
    origin = dict(
        checkpoint=model.identity,
        step=model.step,
        sde=statistics.describe_sde(model.experiment.sde),
        t_end=t_end,
        data=f"published {pathlib.Path(folder).name}",
        num_data=0,
        guidance_scale=None,
        score_sde=VERSION,
    )
    shape = model.experiment.image_shape
    ems = statistics.load_published(folder, model.experiment.sde, shape, t_end=t_end, origin=origin)
    ems = ems._replace(origin=origin | dict(nodes=len(ems.t) - 1))
    path = model.workdir / "ems" / f"step{model.step}_nodes{len(ems.t) - 1}_published_end{t_end:g}.npz"
    statistics.save(path, ems)
    print(f"EMS: wrote {path}; whether they belong to {model.name}, and end at t={t_end:g}, their files do not tell")
    return path


def ems_of(model: Model, path: str | None = None, guidance_scale: float | None = None) -> EMS:
    """The statistics that a sampler needs: of `path`, or found in the run, or measured now, once."""
    guidance_scale = None if guidance_scale == 1 else guidance_scale
    found = pathlib.Path(path) if path is not None else find_ems(model, guidance_scale)
    if found is None:
        budget = model.experiment.config.ems
        print(f"EMS: none yet for {model.name}; measuring once")
        found = measure_ems(model, **budget, guidance_scale=guidance_scale)
    print(f"EMS: {found}")
    return load_ems(model, found, guidance_scale)


# ------------------------------------------------------------------------------------------------ sampling


def sample_keys(seed: int, index, purpose: int | None = None):
    """The key of each sample (B,): a function of the seed and the sample's index, and of what else it is drawn for."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
    return keys if purpose is None else jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def prior(experiment: Experiment, keys):
    """Draws of the prior (B, H, W, C), one for each key."""
    normal = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), experiment.image_shape))
    return experiment.sde.prior_std * normal(keys)


def draws(experiment: Experiment, keys) -> Callable:
    """i -> the i-th standard normal draw (B, H, W, C) after the prior's, one for each key."""
    later = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    return predictor_corrector.noise_of_keys(later, experiment.image_shape)


def sampler(model: Model, noise_of: Callable, seed: int, *, purpose: int | None = None) -> Callable:
    """(table, indices (b,)) -> samples (b, H, W, C) over all devices, from the draws for this purpose.

    noise_of: (params, *classes by turns (b,), if the network has any) -> NoiseFn.
    """
    experiment = model.experiment

    def one_device(params, table, index):
        classes = (experiment.classes(index),) if experiment.num_classes else ()
        keys = sample_keys(seed, index, purpose)
        return tableau.solve(noise_of(params, *classes), table, prior(experiment, keys), draws(experiment, keys))

    on_devices, params = parallel.pmap(one_device, in_axes=(0, None, 0)), parallel.replicate(model.params)
    return lambda table, index: parallel.gather(
        on_devices(params, jax.tree.map(np.float32, table), parallel.shard(index))
    )


def rms(difference) -> float:
    """Root mean square over all entries."""
    return float(np.sqrt(np.square(difference.astype(np.float64)).mean()))


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"


def check_options(solver: str, options: dict, known):
    """Refuse options that a solver does not have, by name."""
    for name in options:
        if name not in known:
            raise UserError(f"solver {solver} has no option {name!r}: it has {', '.join(known)}")


def parse_options(texts: list[str]) -> dict:
    """--option name=value pairs; values are Python literals or plain words."""
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--option {text}: expected name=value, as in --option order=2")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def read_search(model: Model, path: str) -> tuple[str, int, dict]:
    """(solver, steps, options) of a file of `python -m solvers.search`, refused unless it was made for this model."""
    try:
        found = json.loads(pathlib.Path(path).read_text())
        solver, steps, options, identity = (found[key] for key in ("solver", "steps", "options", "checkpoint"))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of python -m solvers.search") from None
    if identity != model.identity:
        raise UserError(f"{path} was searched for checkpoint {identity}, this is {model.identity}: search again")
    return solver, steps, options


def published_for(model: Model, steps: int, ems: EMS, guidance_scale: float | None = None) -> dict:
    """The published options of DPM-Solver-v3 for this kind of model; guidance_scale: if it is not the EMS' own."""
    scale = ems.origin.get("guidance_scale") if guidance_scale is None else guidance_scale
    return published_options(steps, model.experiment.sde, latent=ems.origin.get("latent", False), guidance_scale=scale)


def build_tableau(
    model: Model, solver: str, steps: int, ems: EMS | None, guidance_scale: float | None = None, /, **options
) -> tuple[Tableau, dict]:
    """A solver's table for this model, and the options it was built with; misspelt options are refused by name.

    ems: for dpmv3; None to take or measure the run's own. Options that are not given are those published for the kind
        of model; sampling ends no later than the EMS do.
    guidance_scale: of the sampled model, if it is not the EMS' own.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: use one of {', '.join(SOLVERS)}, or in sample.py pc or ode")
    build = SOLVERS[solver]
    parameters = inspect.signature(build).parameters
    known = [name for name in parameters if name not in ("sde", "steps", "ems")]
    check_options(solver, options, known)
    for name, value in options.items():
        if parameters[name].annotation is bool and not isinstance(value, bool):
            raise UserError(f"option {name}={value} of solver {solver}: use True or False")
    if solver == "dpmv3":
        ems = ems or ems_of(model)
        published = published_for(model, steps, ems, guidance_scale)
        options = published | dict(t_end=max(published["t_end"], float(ems.t[-1]))) | options
        return build(model.experiment.sde, steps, ems=ems, **options), options
    return build(model.experiment.sde, steps, **options), options
