"""What the programs share: a config becomes objects, a run folder is opened, a mistake becomes one line.

The only module, with the programs themselves, that reads a config.
"""

import difflib
import errno
import inspect
import json
import logging as python_logging
import os
import pathlib
import re
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

from ems import estimate, statistics
from ems.statistics import EMS
from score_sde import VERSION, checkpoint, data, denoiser, figures, models, parallel, training
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE, SDES
from solvers import SOLVERS
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
    from configs import base

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
    network: object  # a flax Module: (x, label, y, dropout keys) -> (B, H, W, C)
    noise_of: Callable  # (params, class labels (B,) or None, dropout keys (B,) or None) -> NoiseFn

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

    def images(self, split: str) -> data.Images:
        fields = self.config.data
        return data.load(
            fields.dataset,
            split,
            image_size=fields.image_size,
            num_channels=fields.num_channels,
            resize=fields.resize,
            crop=fields.crop,
            data_dir=fields.data_dir,
        )

    def loss(self) -> Callable:
        fields = self.config.training
        return training.make_loss(
            self.noise_of,
            self.sde,
            self.preprocess,
            continuous=fields.continuous,
            num_scales=self.config.denoiser.num_scales,
            t_min=fields.t_min,
            likelihood_weighting=fields.likelihood_weighting,
            reduce_mean=fields.reduce_mean,
        )


def build(config: ConfigDict) -> Experiment:
    """The objects of a config; mistakes in it are named here, before any work."""
    sde = construct(SDES, config.sde, "SDE")
    fields = config.denoiser
    for name, table in (("output", denoiser.OUTPUTS), ("label", denoiser.LABELS)):
        if fields[name] not in table:
            raise UserError(f"unknown denoiser.{name} {fields[name]!r}: use one of {', '.join(table)}")
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


# ------------------------------------------------------------------------------------------------ run folders


def write_atomically(path, content: bytes | str):
    """Replace a file whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


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
    write_atomically(known, json.dumps(config.to_dict(), indent=2) + "\n")


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
    return config


def newest_run() -> pathlib.Path:
    """The run folder under runs/ whose checkpoints changed last."""
    found = [path.parent for path in RUNS.glob("*/checkpoints") if (path.parent / "config.json").is_file()]
    if not found:
        raise UserError(f"no run in {RUNS}/: train one first, python train.py --config=configs/digits.py")
    return max(found, key=lambda run: (run / "checkpoints").stat().st_mtime)


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


def open_model(workdir: str | None, step: int | None = None) -> Model:
    """The model of a run folder (the newest under runs/ if None), at a step (the last if None). Says which."""
    folder = newest_run() if workdir is None else pathlib.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"no such workdir {folder}: train first, python train.py --config=configs/digits.py")
    experiment = build(read_config(folder))
    checkpoints = checkpoint.Checkpoints(folder)
    step = checkpoints.step_or_last(step)
    params = checkpoints.restore_ema(step, experiment.params_template())
    model = Model(folder, experiment, params, step, checkpoint.identity(params))
    print(f"model: {model.name}")
    return model


# ------------------------------------------------------------------------------------------------ EMS of a model


def ems_path(model: Model, nodes: int, num_data: int) -> pathlib.Path:
    return model.workdir / "ems" / f"step{model.step}_nodes{nodes}_data{num_data}.npz"


def find_ems(model: Model) -> pathlib.Path | None:
    """The statistics of this checkpoint measured on most images, then nodes, if any."""
    sizes = lambda path: tuple(int(word) for word in re.findall(r"\d+", path.stem)[1:])[::-1]
    found = [path for path in (model.workdir / "ems").glob(f"step{model.step}_*.npz") if "partial" not in path.name]
    return max(found, key=sizes, default=None)


def load_ems(model: Model, path: pathlib.Path) -> EMS:
    """Statistics from a file, refused unless they were measured on this very model."""
    ems = statistics.load(path)
    origin = ems.origin
    if origin.get("checkpoint") != model.identity:
        raise UserError(
            f"{path} was measured on checkpoint {origin.get('checkpoint')} (step {origin.get('step')}), "
            f"this is {model.identity} (step {model.step}): measure again with python -m ems --workdir={model.workdir}"
        )
    if ems.l.shape[1:] != model.experiment.image_shape:
        raise UserError(f"{path} is for images {ems.l.shape[1:]}, this model's are {model.experiment.image_shape}")
    statistics.check_sde(ems, model.experiment.sde)
    return ems


def measure_ems(model: Model, *, nodes: int, num_data: int, batch_size: int, seed: int = 0) -> pathlib.Path:
    """Measure l, s, b on training images, unflipped; write the file and its picture; return its path."""
    experiment = model.experiment
    path = ems_path(model, nodes, num_data)
    if path.exists():
        print(f"EMS: already measured, {path}")
        return path
    images = experiment.images("train")
    parallel.batch_per_device(batch_size)
    used = min(num_data, images.size) // batch_size * batch_size
    if not used:
        raise UserError(
            f"EMS in batches of {batch_size} from {min(num_data, images.size)} images: use a smaller batch size"
        )
    print(f"EMS: {nodes} nodes x {used} images of {experiment.config.data.dataset}, seed {seed}")
    key = jax.random.key(seed)
    levels = jnp.asarray(images.take(np.arange(used))["image"])
    x0 = np.asarray(
        jax.jit(jax.vmap(lambda i, image: experiment.preprocess(jax.random.fold_in(key, i), image, flip=False)))(
            jnp.arange(used), levels
        )
    )
    node = estimate.nodes(experiment.sde, nodes)
    on_devices = parallel.pmap(
        lambda params, node, node_index, x0, index: estimate.measure(
            experiment.noise_of(params), node, node_index, key, x0, index
        ),
        in_axes=(0, None, None, 0, 0),
    )
    params = parallel.replicate(model.params)

    def measure(node, node_index, x0, index):
        node = jax.tree.map(np.float32, node)
        return on_devices(params, node, node_index, *parallel.shard((x0, index)))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=1, bar_format="EMS {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", dynamic_ncols=True) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        moments = estimate.accumulate(
            measure,
            node,
            x0,
            batch_size=batch_size,
            partial=path.with_suffix(".partial.npz"),
            identity=f"{model.identity} {statistics.describe_sde(experiment.sde)} seed {seed}",
            progress=progress,
        )
    origin = dict(
        checkpoint=model.identity,
        step=model.step,
        sde=statistics.describe_sde(experiment.sde),
        data=experiment.config.data.dataset,
        num_data=used,
        nodes=nodes,
        seed=seed,
        guidance_scale=None,
        jax=jax.__version__,
        score_sde=VERSION,
    )
    ems = estimate.statistics(node, moments, origin)
    statistics.save(path, ems)
    figures.save_ems(path.with_suffix(".png"), ems.lam, {"l": ems.l, "s": ems.s, "b": ems.b}, f"EMS of {model.name}")
    print(f"EMS: wrote {path} and {path.with_suffix('.png').name}")
    return path


def ems_of(model: Model, path: str | None = None) -> EMS:
    """The statistics that a sampler needs: of `path`, or found in the run, or measured now, once."""
    found = pathlib.Path(path) if path is not None else find_ems(model)
    if found is None:
        budget = model.experiment.config.ems
        print(f"EMS: none yet for {model.name}; measuring once")
        found = measure_ems(model, **budget)
    print(f"EMS: {found}")
    return load_ems(model, found)


# ------------------------------------------------------------------------------------------------ sampling


def sample_keys(seed: int, index):
    """The key of each sample (B,): a function of the seed and the sample's index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def prior(experiment: Experiment, keys):
    """Draws of the prior (B, H, W, C), one for each key."""
    normal = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), experiment.image_shape))
    return experiment.sde.prior_std * normal(keys)


def build_tableau(model: Model, solver: str, steps: int, ems: EMS | None, **options) -> tuple[Tableau, dict]:
    """A solver's table for this model, and the options it was built with; misspelt options are refused by name.

    ems: for dpmv3; None to take or measure the run's own.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: use one of {', '.join([*SOLVERS, 'pc'])}")
    build = SOLVERS[solver]
    known = [name for name in inspect.signature(build).parameters if name not in ("sde", "steps", "ems")]
    for name in options:
        if name not in known:
            raise UserError(f"solver {solver} has no option {name!r}: it has {', '.join(known)}")
    if solver == "dpmv3":
        options = published_options(steps) | options
        return build(model.experiment.sde, steps, ems=ems or ems_of(model), **options), options
    return build(model.experiment.sde, steps, **options), options
