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
from ems.statistics import EMS
from score_sde import checkpoint, data, denoiser, events, files, guidance, losses, models, packed, parallel, training
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.models.classifier import CLASSIFIERS, logits_fn
from score_sde.sde import SDE, SDES
from solvers import SOLVERS, predictor_corrector, tableau
from solvers.dpm_solver_v3 import published_options
from solvers.tableau import Tableau

RUNS = pathlib.Path("runs")
PRETRAINED = pathlib.Path(os.path.relpath(pathlib.Path(__file__).resolve().parent / "pretrained"))
BOXED = "fashion_mnist"  # the packed model that is taken where there is no run
DATASET_AT = flags.DEFINE_string("dataset_at", None, "Where a run's data set is now, if not where its config says.")
CACHE = str(pathlib.Path.home() / ".cache" / "score_sde")
COMPILATION_CACHE = flags.DEFINE_string("compilation_cache", None, f"Of compiled programs: a folder, {CACHE}, or off.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0 of several; see docs/pods.md.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this program.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0 on.", lower_bound=0)
# Fields that a continued run may change: how it ends and how it is watched, nothing of what it did so far.
FREE = (
    *(f"training.{field}" for field in ("n_iters", "cooldown", "accumulate", "non_finite")),
    *(f"training.{field}_freq" for field in ("log", "eval", "checkpoint", "keep")),
)
START = "start.json"  # in a run folder: the history of the model whose parameters the run started from
REFUSALS = ("ENOSPC", "EROFS", "EACCES", "EPERM", "EDQUOT", "ENOTDIR", "EISDIR")  # of a disk, which its user can mend
HISTORY, ROWS = 4, 32  # to which a sampler makes its tables alike
LARGE = 2**16  # numbers of a coefficient per pixel, above which a table keeps its length for the sake of memory
FREE_SECTIONS = ("sampling.", "ems.", "eval.")


# ------------------------------------------------------------------------------------------------ programs


def run(main: Callable[..., None], *, files: bool = False):
    """Run a program after parsing its flags. A UserError, or a disk that refuses, is one line and exit code 2.

    Of several processes the first alone talks; if one dies, the others end with exit code 75.
    files: whether it takes arguments that are no flags; main is called with them.
    """
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)  # errors of writers come back to us anyway
    # TensorStore's readers of a damaged checkpoint still answer when Orbax has given up
    sys.unraisablehook = lambda found: str(found.exc_value) == "Event loop is closed" or sys.__unraisablehook__(found)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def guarded(argv):
        cache = COMPILATION_CACHE.value or os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE)
        jax.config.update("jax_compilation_cache_dir", None if cache == "off" else cache)
        if len(argv) > 1 and not files:
            raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
        parallel.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        with parallel.together():
            return main(argv[1:]) if files else main()

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if errno.errorcode.get(error.errno) not in REFUSALS:
            raise
        _fail(
            f"cannot write {error.filename or 'to disk'}: {error.strerror}: free some space or choose another --workdir"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error):
    print(f"error: {error}", file=sys.stderr, flush=True)
    parallel.leave(2)


def _parse(argv):
    """Parse flags; whatever absl, ml_collections and the code of a config raise becomes one line."""
    try:
        return flags.FLAGS(argv)
    except UserError:
        raise
    except Exception as error:  # a config is anyone's code
        flag = getattr(error, "flagname", "")
        if flag.startswith("config.") and "config" in flags.FLAGS and not flags.FLAGS["config"].present:
            raise UserError(f"--{flag} changes a field of a config, and none is given: add --config=FILE") from None
        file = next((argument for argument in argv if argument.lstrip("-").startswith("config=")), None)
        where = "" if file is None or isinstance(error, flags.Error) else f"{file}: {type(error).__name__}: "
        raise UserError(where + " ".join(str(error).replace("\\n", " ").split())) from None


def progress(*iterable, **options) -> tqdm:
    """A progress bar, shown by the process that talks."""
    return tqdm(*iterable, dynamic_ncols=True, disable=not parallel.writes(), **options)


def config_flag():
    """Define --config=FILE with its overrides --config.x.y=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; fields by --config.x.y=value.", lock_config=True
    )


def config_of(flag) -> ConfigDict:
    """The value of `config_flag()`, given or refused."""
    given = flags.FLAGS["config"]
    file = given.config_filename if given.present else "is given"
    if not pathlib.Path(file).is_file():
        raise UserError(f"no config file {file}: choose one of configs/, as in --config=configs/digits.py")
    if not isinstance(flag.value, ConfigDict):
        raise UserError(f"--config={file} gives {flag.value!r}: get_config must return configs.base.get_config()")
    check_fields(flag.value, file)
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


def check_values(config: ConfigDict, source: str = "the config"):
    """Refuse fields that are missing, of another type than their default, or outside the rules of configs/base.py."""
    given, known = flat(config), flat(base.get_config())
    for field, default in known.items():
        if field.startswith(("sde.", "model.")) or default is None:
            continue
        if field not in given:
            raise UserError(f"{source} has no {field}: start from configs.base.get_config(), where it is {default!r}")
        if not fits(given[field], default):
            raise UserError(f"{field} of {source} is {given[field]!r}: expected a value like {default!r}")
    for expected, holds, fields in base.RULES:
        for field in fields:
            try:
                held = field not in given or holds(given[field])
            except TypeError:
                held = False
            if not held:
                raise UserError(f"{field} of {source} is {given[field]!r}: expected {expected}")


def fits(value, default) -> bool:
    """Whether a value is of the type of a default; whole numbers are numbers, and lists, as JSON has them, tuples."""
    kinds = {float: (int, float), tuple: (tuple, list)}
    kind = kinds.get(type(default), type(default))
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)


def construct(table: dict, section: ConfigDict, what: str):
    """table[section.name](**section), with the mistakes that a config can make in it named."""
    arguments = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in section.items()}
    name = arguments.pop("name", None)
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: use one of {', '.join(table)}")
    try:
        return table[name](**arguments)
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
        return range_of(self.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return image_shape(self.config)

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
        """(params, batch, key, train) -> loss of each example (B,)."""
        fields, told = self.config.training, self.config.denoiser

        def times(key):
            return losses.TIMES[fields.times](key, (), self.sde, fields.t_min, told.num_scales, fields.lam_normal)

        def weight(t):
            own = denoiser.coefficients(told.output, self.sde, t, told.sigma_data)
            return losses.WEIGHTS[fields.weight](self.sde, t, own)

        if self.logits_of:
            return training.make_classifier_loss(self.logits_of, self.sde, self.preprocess, times=times)
        return training.make_loss(
            self.noise_of,
            self.sde,
            self.preprocess,
            times=times,
            weight=weight,
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
    check_values(config)
    sde = build_sde(config)
    check_rows(config, sde)
    if config.model.get("name") in CLASSIFIERS:
        return build_classifier(config, sde)
    hidden = config.training.label_dropout
    if hidden and not config.model.get("num_classes"):
        raise UserError(f"training.label_dropout is {hidden}: expected 0 unless model.num_classes is set")
    network, data_range = build_network(config), range_of(config)

    def noise_of(params, y=None, dropout_keys=None) -> NoiseFn:
        y = y if config.model.get("num_classes") else None
        apply = lambda x, label: network.apply({"params": params}, x, label, y, dropout_keys)
        return denoiser.noise_fn(apply, sde, data_range=data_range, **config.denoiser)

    return checked_network(Experiment(config, sde, network, noise_of))


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of a config's images."""
    return (config.data.image_size, config.data.image_size, config.data.num_channels)


def range_of(config: ConfigDict) -> tuple[float, float]:
    """Lowest and highest value of a config's data, as its model sees them."""
    return (-1.0, 1.0) if config.data.centered else (0.0, 1.0)


def check_rows(config: ConfigDict, sde: SDE):
    """Refuse what names no row of the four tables, and a chain that ends where alpha is 0."""
    fields = flat(config)
    for field, table in (
        ("denoiser.output", denoiser.PARAMETERIZATIONS),
        ("denoiser.label", denoiser.LABELS),
        ("training.times", losses.TIMES),
        ("training.weight", losses.WEIGHTS),
    ):
        name = fields[field]
        if name not in table:
            raise UserError(f"unknown {field} {name!r}: use one of {', '.join(table)}")
    with np.errstate(divide="ignore"):
        data_left = np.isfinite(sde.log_alpha(np.float64(1)))
    if config.training.times == "chain" and not data_left:
        raise UserError(
            f"training.times is 'chain', whose last node is t = 1, where alpha of the SDE {config.sde.name} is 0: "
            "use uniform or lam_normal"
        )


def build_network(config: ConfigDict):
    """The network of a config, a flax Module, not tried on anything yet."""
    return construct(models.MODELS, config.model, "network")


def build_sde(config: ConfigDict) -> SDE:
    """The SDE of a config, refused unless time runs from data to noise in it."""
    sde = construct(SDES, config.sde, "SDE")
    with np.errstate(all="ignore"):
        lam = sde.lam(np.linspace(sde.t_min, sde.t_max, 64))
    if not (0 < sde.t_min < sde.t_max and np.isfinite(lam).all() and (np.diff(lam) < 0).all()):
        raise UserError(
            f"there is no SDE with {shown(config.sde.to_dict())}: expected 0 < t_min < t_max, and alpha / sigma "
            "positive and falling between them"
        )
    if not config.training.t_min < sde.t_max:
        raise UserError(f"training.t_min is {config.training.t_min}: expected less than the SDE's end, {sde.t_max:g}")
    return sde


def checked_network(experiment: Experiment) -> Experiment:
    """The experiment, refused if its network cannot take its images."""
    try:
        experiment.params_template()
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(
            f"no network with {shown(experiment.config.model.to_dict())} takes images of {experiment.image_shape}: "
            f"{one_line(error)}"
        ) from None
    return experiment


def build_classifier(config: ConfigDict, sde: SDE) -> Experiment:
    """The objects of a config whose `model` is a noise-conditional classifier."""
    network = construct(CLASSIFIERS, config.model, "classifier")
    apply = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
    return checked_network(Experiment(config, sde, network, None, lambda params: logits_fn(apply(params), sde)))


# ------------------------------------------------------------------------------------------------ run folders


def claim_workdir(workdir: pathlib.Path, config: ConfigDict):
    """Make `workdir` the folder of this config; refuse one that holds another experiment."""
    known = workdir / "config.json"
    if packed.is_packed(workdir):
        raise UserError(f"{workdir} holds a packed model, which is not trained further: choose another --workdir")
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
    parallel.wait_for_all("config is read")
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    if not known.exists() or known.read_text() != text:
        files.write(known, text)


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
        config = ConfigDict(translated(json.loads(path.read_text()), str(path)))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a config: {one_line(error)}: restore what train.py wrote") from None
    check_fields(config, str(path))
    for section in ("seed", "sde", "model"):
        if section not in config:
            raise UserError(f"{path} has no {section}: restore the file that train.py wrote")
    for section, fields in base.get_config().items():
        if section not in ("seed", "sde", "model"):  # a run may be older than a field
            config[section] = ConfigDict(fields.to_dict() | config.get(section, ConfigDict()).to_dict())
    check_values(config, str(path))
    return config


def translated(config: dict, source: str) -> dict:
    """A config.json of any age in today's words.

    Before there were TIMES and WEIGHTS, booleans of `training` stood for their rows, a network divided its output by
    sigma itself (`scale_by_sigma`), and eps of the output v was right for VP alone. UserError where no word fits.
    """
    fields = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    section = lambda name: fields[name] if isinstance(fields.get(name), dict) else {}
    training, network, told = section("training"), section("model"), section("denoiser")
    if "continuous" in training:
        drawn = "uniform" if training.pop("continuous") else "chain"
        training["times"] = "lam_normal" if training.get("lam_normal") else drawn
        if training.get("lam_normal") is None:
            training.pop("lam_normal", None)
        weights = {"likelihood_weighting": "likelihood", "v_weighting": "network" if told.get("output") == "v" else "v"}
        training["weight"] = next((row for old, row in weights.items() if training.get(old)), "eps")
        for old in weights:
            training.pop(old, None)
        if network.get("name") == "ncsn":
            network["num_scales"] = told["num_scales"]
        if told.get("output") == "v" and fields["sde"]["name"] in ("subvp", "ve", "edm"):
            raise UserError(f"{source}: output v under the SDE {fields['sde']['name']} has changed: train it again")
    if network.pop("scale_by_sigma", False):
        label = "sigma" if network.get("embedding_type") == "fourier" else "reversed_index"
        if (fields["sde"]["name"], told["output"], told["label"]) != ("ve", "score", label):
            raise UserError(
                f"{source}: model.scale_by_sigma is no more, but for SDE ve, output score and label {label}: "
                "train it again without"
            )
        told["output"] = "scaled_score"
    return fields


def config_of_run(folder: pathlib.Path) -> ConfigDict:
    """`read_config`, with the data set of --dataset_at."""
    config = read_config(folder)
    if flags.FLAGS.is_parsed() and DATASET_AT.value is not None:
        config.data.dataset = DATASET_AT.value
    return config


def newest_run() -> pathlib.Path:
    """The run folder under runs/ of a model of images, not a classifier, whose checkpoints changed last.

    Where there is none, the packed model of this package.
    """
    found = [path.parent for path in RUNS.glob("*/checkpoints") if (path.parent / "config.json").is_file()]
    for run in sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True):
        if read_config(run).model.name not in CLASSIFIERS:
            return run
    if packed.is_packed(PRETRAINED / BOXED):
        return PRETRAINED / BOXED
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

    @property
    def results(self) -> pathlib.Path:
        """Where what is made with it belongs: its run folder, or for a packed model one beside the runs."""
        return RUNS / "pretrained" / self.workdir.name if packed.is_packed(self.workdir) else self.workdir


def open_model(workdir: str | None, step: int | None = None, *, classifier: bool = False) -> Model:
    """The model of a run folder or a packed one (`newest_run` if None), at a step (the last if None). Says which.

    classifier: whether the run must be a classifier's; it must not, otherwise.
    """
    folder = newest_run() if workdir is None else pathlib.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"no such workdir {folder}: train first, python train.py --config=configs/digits.py")
    experiment = build(config_of_run(folder))
    if classifier != (experiment.logits_of is not None):
        held, wanted = ("a model of images", "a classifier") if classifier else ("a classifier", "a model of images")
        example = "classifier/digits" if classifier else "digits"
        raise UserError(f"{folder} holds {held}, not {wanted}: train one with --config=configs/{example}.py")
    if packed.is_packed(folder):
        return open_packed(folder, experiment, step)
    checkpoints = checkpoint.Checkpoints(folder)
    read = lambda step: checkpoints.restore_ema(step, experiment.params_template())
    checkpoints.step_or_last(step)  # says what there is
    step, params = checkpoints.last(read) if step is None else (step, read(step))
    model = Model(folder, experiment, params, step, checkpoint.identity(params))
    print(f"{'classifier' if classifier else 'model'}: {model.name}")
    return model


def open_packed(folder: pathlib.Path, experiment: Experiment, step: int | None) -> Model:
    """`open_model` of a packed model, which has one step."""
    params, provenance = packed.load(folder, experiment.params_template())
    model = Model(folder, experiment, params, provenance["step"], provenance["identity"])
    if step not in (None, model.step):
        raise UserError(f"no checkpoint of step {step} in {folder}: a packed model has one, of step {model.step}")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"model: {model.name}, trained here for the box on {experiment.config.data.dataset}, "
        f"{size / 1e6:.2f} M parameters; {folder / 'card.md'} tells more"
    )
    return model


def history(model: Model) -> list[dict]:
    """How a model came about, as far as its folder tells: its config and training, then those of what it began as."""
    if packed.is_packed(model.workdir):
        made = packed.load(model.workdir, model.experiment.params_template())[1]
        log, before = made.get("training"), made.get("start", [])
    else:
        found = events.training(model.workdir / "tensorboard", model.step)
        log, before = found and found[0], read_start(model.workdir / START)
    about = dict(name=model.workdir.name, step=model.step, identity=model.identity, training=log)
    return [about | dict(config=model.experiment.config.to_dict()), *before]


def read_start(path: pathlib.Path) -> list[dict]:
    """The history that train.py wrote into a run's folder; empty for a run that started from its seed."""
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        for made in before:
            made["name"], made["step"], made["identity"], made["training"], made["config"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is no history of a model ({one_line(error)}): delete it") from None
    return before


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
    Tables of any length and history share a program; those with coefficients per pixel or with noise have their own.
    """
    experiment = model.experiment

    def one_device(params, table, evaluations, index):
        classes = (experiment.classes(index),) if experiment.num_classes else ()
        keys, noise = sample_keys(seed, index, purpose), noise_of(params, *classes)
        return tableau.solve(noise, table, prior(experiment, keys), draws(experiment, keys), evaluations)

    on_devices, params = parallel.pmap(one_device, in_axes=(0, None, None, 0)), parallel.replicate(model.params)

    def sample(table, index):
        evaluations, shape = len(table.t), table.l.shape[1:]
        rows = ROWS if table.l[0].size <= LARGE else 1
        table = tableau.uniform(table, max(HISTORY, table.history), shape)
        table = tableau.lengthened(table, -(-evaluations // rows) * rows)
        return parallel.gather(
            on_devices(params, jax.tree.map(np.float32, table), np.int32(evaluations), parallel.shard(index))
        )

    return sample


def rms(difference) -> float:
    """Root mean square over all entries."""
    return float(np.sqrt(np.square(difference.astype(np.float64)).mean()))


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"


def check_solver(name: str):
    """Refuse what is no few-step solver."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}: use one of {', '.join(SOLVERS)}, or in sample.py pc or ode")


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
        if not (fits(steps, 1) and fits(options, {}) and steps > 0):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is no file of python -m solvers.search: make one for this model") from None
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

    ems: of the model, for dpmv3; None for the others. Of dpmv3, options that are not given are those published for the
        kind of model; sampling ends at no smaller t than the EMS do.
    guidance_scale: of the sampled model, if it is not the EMS' own.
    """
    check_solver(solver)
    build = SOLVERS[solver]
    parameters = inspect.signature(build).parameters
    known = [name for name in parameters if name not in ("sde", "steps", "ems")]
    check_options(solver, options, known)
    for name, value in options.items():
        if parameters[name].annotation is bool and not isinstance(value, bool):
            raise UserError(f"option {name}={value} of solver {solver}: use True or False")
    if solver == "dpmv3":
        published = published_for(model, steps, ems, guidance_scale)
        options = published | dict(t_end=max(published["t_end"], float(ems.t[-1]))) | options
        return build(model.experiment.sde, steps, ems=ems, **options), options
    return build(model.experiment.sde, steps, **options), options
