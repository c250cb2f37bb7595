"""Run folders: claimed, opened, and told of; packed models are opened in the same way."""

import contextlib
import json
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base
from experiments import build, events, packed
from experiments.config import check_fields, check_values, flat
from score_sde import checkpoint, files, parallel
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import OF_CLASSES, Classifier, Guidance, guide
from score_sde.latents import Coder

RUNS = pathlib.Path("runs")
PRETRAINED = pathlib.Path(os.path.relpath(pathlib.Path(__file__).resolve().parents[1] / "pretrained"))
BOXED = "fashion_mnist"  # the packed model that is taken where there is no run
# Fields that a continued run may change: how it ends and how it is watched, nothing of what it did so far.
FREE = (
    "data.skip_damaged",
    *(f"training.{field}" for field in ("n_iters", "cooldown", "accumulate", "non_finite")),
    *(f"training.{field}_freq" for field in ("log", "eval", "checkpoint", "keep")),
)
CLASSES = "classes.json"  # in a run folder: the names of labels 0, 1, ..., if they have any
START = "start.json"  # in a run folder: the history of the model whose parameters the run started from
FREE_SECTIONS = ("sampling.", "ems.", "eval.")


def folder_for(config: ConfigDict, file: str) -> pathlib.Path:
    """Where a config's run belongs if nobody says: runs/digits, or runs/classifier_digits for an aid of that kind."""
    kind, name = build.kind_of(config), pathlib.Path(file).stem
    return RUNS / (name if kind == "model" else f"{kind}_{name}")


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


@contextlib.contextmanager
def whole_or_nothing(workdir: pathlib.Path, config: ConfigDict, flag: str = "--workdir"):
    """Write a run folder at once: gives its Checkpoints, waits for them, and removes the folder if anything fails.

    UserError where something is there already; flag: what names another place.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty: choose another {flag}")
    files.check_writable(workdir)
    try:
        claim_workdir(workdir, config)
        checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
        yield checkpoints
        checkpoints.wait()
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run folder."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"no run in {workdir} (no config.json): train one first, python train.py --config=configs/digits.py"
        )
    with files.reading(path, "is not a config", "restore what train.py wrote"):
        config = ConfigDict(translated(json.loads(path.read_text()), str(path)))
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


def newest_run() -> pathlib.Path:
    """The run folder under runs/ of a model of images, not of an aid to one, whose checkpoints changed last.

    Where there is none, the packed model of this package.
    """
    found = [path.parent for path in RUNS.glob("*/checkpoints") if (path.parent / "config.json").is_file()]
    for run in sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True):
        if build.kind_of(read_config(run)) == "model":
            return run
    if packed.is_packed(PRETRAINED / BOXED):
        return PRETRAINED / BOXED
    raise UserError(f"no run in {RUNS}/: train one first, python train.py --config=configs/digits.py")


class Model(NamedTuple):
    """A trained model: its config, the values made of it, and the averaged parameters of one of its checkpoints."""

    workdir: pathlib.Path
    config: ConfigDict
    diffusion: Diffusion
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


class Aid(NamedTuple):
    """A trained classifier or autoencoder, with the averaged parameters of its last checkpoint."""

    workdir: pathlib.Path
    config: ConfigDict
    values: Classifier | Coder  # what its config stands for, as `diffusion` of a model
    params: dict
    step: int
    identity: str

    @property
    def name(self) -> str:
        return f"{self.workdir} at step {self.step} ({self.identity})"


def open_model(workdir: str | None = None, step: int | None = None, *, dataset: str | None = None) -> Model:
    """The model of a run folder or a packed one (`newest_run` if None), at a step (the last if None). Says which.

    dataset: where its data set is now, if not where its config says.
    """
    folder, config = _folder_and_config(newest_run() if workdir is None else workdir)
    if dataset is not None:
        config.data.dataset = dataset
    diffusion = build.diffusion_of(config, folder)
    template = jax.eval_shape(diffusion.init, jax.random.key(0))
    if not packed.is_packed(folder):
        model = Model(folder, config, diffusion, *_averaged(folder, template, step))
        print(f"model: {model.name}")
        if diffusion.num_classes:
            print("".join(f"{line}\n" for line in build.class_lines(read_classes(folder))), end="")
        return model
    params, provenance = packed.load(folder, template)
    model = Model(folder, config, diffusion, params, provenance["step"], provenance["identity"])
    if step not in (None, model.step):
        raise UserError(f"no checkpoint of step {step} in {folder}: a packed model has one, of step {model.step}")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"model: {model.name}, trained here for the box on {config.data.dataset}, "
        f"{size / 1e6:.2f} M parameters; {folder / 'card.md'} tells more"
    )
    return model


def with_size(model: Model, height: int | None = None, width: int | None = None) -> Model:
    """The model of latents for images of another size; UserError for models of pixels and sizes that do not divide."""
    if height is None and width is None:
        return model
    if not model.config.autoencoder:
        raise UserError(f"--height and --width are for models of latents; {model.name} draws one size alone")
    network, first = build.network_of(model.config), build.autoencoder_of(model.config)
    multiple = first.factor * 2 ** (len(network.ch_mult) - 1)
    sides = [side or model.config.data.image_size for side in (height, width)]
    for name, side in zip(("height", "width"), sides, strict=True):
        if side < multiple or side % multiple:
            raise UserError(
                f"--{name}={side}: the sizes of {model.name} are multiples of {multiple}: "
                f"take {max(1, round(side / multiple)) * multiple}"
            )
    space, (h, w) = model.diffusion.space, (side // first.factor for side in sides)
    return model._replace(diffusion=model.diffusion._replace(space=space._replace(shape=(h, w, space.shape[2]))))


# What a run folder holds, in words, and a config that trains such a one.
KINDS = {
    "model": ("a model of images", "configs/digits.py"),
    "classifier": ("a classifier", "configs/classifier/digits.py"),
    "autoencoder": ("an autoencoder", "configs/autoencoder/digits.py"),
}


def open_aid(workdir: str, kind: str) -> Aid:
    """The classifier or autoencoder of a run folder, as its last checkpoint has it."""
    folder, config = _folder_and_config(workdir, kind)
    values = build.trainable(config)
    template = jax.eval_shape(values.init, jax.random.key(0))
    return Aid(folder, config, values, *_averaged(folder, template, None))


def open_classifier(workdir: str, model: Model | None = None) -> Aid:
    """The classifier of a run folder, refused unless it was trained on the images and the SDE of `model`, if given."""
    trained = open_aid(workdir, "classifier")
    print("\n".join([f"classifier: {trained.name}", *build.class_lines(read_classes(trained.workdir))]))
    if model is not None:
        about = lambda value: (("sde", value.sde), ("image_shape", value.space.shape), ("data_range", value.space[3:]))
        for (what, theirs), (_, ours) in zip(about(trained.values), about(model.diffusion), strict=True):
            if theirs != ours:
                raise UserError(
                    f"{workdir} and {model.workdir} do not fit: the classifier's {what} is {theirs}, the model's "
                    f"{ours}: train one for the other"
                )
    return trained


def _folder_and_config(workdir, kind: str = "model") -> tuple[pathlib.Path, ConfigDict]:
    """A run folder and its config, refused unless it holds that kind."""
    folder, (wanted, example) = pathlib.Path(workdir).expanduser(), KINDS[kind]
    if not folder.is_dir():
        raise UserError(f"no such workdir {folder}: train first, python train.py --config={example}")
    config = read_config(folder)
    if build.kind_of(config) != kind:
        held = KINDS[build.kind_of(config)][0]
        raise UserError(f"{folder} holds {held}, not {wanted}: train one with --config={example}")
    return folder, config


def _averaged(folder: pathlib.Path, template, step: int | None) -> tuple[dict, int, str]:
    """(averaged parameters, step, their identity) of a run's checkpoint: of `step`, or the last whole one."""
    checkpoints = checkpoint.Checkpoints(folder)
    read = lambda step: checkpoints.restore_ema(step, template)
    checkpoints.step_or_last(step)  # says what there is
    step, params = checkpoints.last(read) if step is None else (step, read(step))
    return params, step, checkpoint.identity(params)


class Guide(NamedTuple):
    """What guides a model with parameters of its own; experiments/guides.py opens them."""

    identity: str  # "classifier c0ffee" or "weaker c0ffee"
    name: str
    flag: str  # that gives it to a program
    part: dict  # of `Guidance`
    params: dict


def with_guidance(model: Model, guidance: Guidance, *, label: int | None = None, beside: Guide | None = None) -> Model:
    """The model guided; its params are a pair if a guide, whose part in `guidance` this adds, stands beside it.

    label: class of all samples; all classes by turns if None.
    """
    if beside is not None:
        guidance = guidance._replace(**beside.part)
        model = model._replace(params=(model.params, beside.params))
    diffusion = guide(model.diffusion, guidance)
    if label is None:
        return model._replace(diffusion=diffusion)
    if not diffusion.num_classes:
        raise UserError(f"--label={label}: {model.name} has no classes: {OF_CLASSES}")
    if label >= diffusion.num_classes:
        raise UserError(f"--label={label}: the classes of {model.name} are 0 to {diffusion.num_classes - 1}")
    names = read_classes(model.workdir)
    if names is not None and label < len(names):
        print(f"label {label}: {names[label]}")
    return model._replace(diffusion=diffusion._replace(conditions=lambda index: jnp.full_like(index, label)))


def history(model: Model) -> list[dict]:
    """How a model came about, as far as its folder tells: its config and training, then those of what it began as."""
    if packed.is_packed(model.workdir):
        made = packed.load(model.workdir, model.params)[1]
        log, before = made.get("training"), made.get("start", [])
    else:
        found = events.training(model.workdir / "tensorboard", model.step)
        log, before = found and found[0], read_start(model.workdir / START)
    about = dict(name=model.workdir.name, step=model.step, identity=model.identity, training=log)
    return [about | dict(config=model.config.to_dict()), *before]


def read_classes(folder: pathlib.Path) -> list[str] | None:
    """The names of labels 0, 1, ... that train.py wrote into a run's folder; None if there are none."""
    if not (folder / CLASSES).exists():
        return None
    with files.reading(folder / CLASSES, "does not name classes", "delete it"):
        classes = json.loads((folder / CLASSES).read_text())
        return [str(classes[str(label)]) for label in range(len(classes))]


def read_start(path: pathlib.Path) -> list[dict]:
    """The history that train.py wrote into a run's folder; empty for a run that started from its seed."""
    if not path.exists():
        return []
    with files.reading(path, "is no history of a model", "delete it"):
        before = json.loads(path.read_text())
        for made in before:
            made["name"], made["step"], made["identity"], made["training"], made["config"]
    return before
