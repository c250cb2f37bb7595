"""Configs: that their values are the published ones, that older files open, that each builds what it says."""

import importlib
import importlib.util
import json
import pathlib
import re

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from experiments import build, runs
from experiments.config import check_fields, flat
from score_sde.errors import UserError
from tests.reference import cases

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(
    str(path.relative_to(ROOT / "configs").with_suffix(""))
    for path in (ROOT / "configs").rglob("*.py")
    if path.stem not in ("__init__", "base", "models")
)


def load(name: str):
    """The module of configs/<name>.py."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ the published files

# (dataset, category, image size) -> tensorflow-datasets name, or the user's folder
DATASETS = {
    ("CIFAR10", None, 32): "cifar10",
    ("CELEBA", None, 64): "celeb_a",
    ("CelebAHQ", None, 256): "celeb_a_hq/256",
    ("CelebAHQ", None, 1024): "celeb_a_hq/1024",
    ("FFHQ", None, 256): "ffhq",
    ("FFHQ", None, 1024): "ffhq",
    ("LSUN", "bedroom", 256): "lsun/bedroom",
    ("LSUN", "bedroom", 128): "lsun/bedroom",
    ("LSUN", "church_outdoor", 256): "lsun/church_outdoor",
}
# (sde, continuous) -> SDE, output and label; the official code derives the last two in models/utils.py
OBJECTIVES = {
    ("vpsde", True): ("vp", "eps", "time"),
    ("vpsde", False): ("discrete_vp", "eps", "index"),
    ("subvpsde", True): ("subvp", "eps", "time"),
    ("vesde", True): ("ve", "score", "sigma"),
    ("vesde", False): ("ve", "score", "reversed_index"),
}
SAME = (
    "seed",
    *("data.image_size", "data.num_channels", "data.centered", "data.random_flip", "data.uniform_dequantization"),
    *("training.batch_size", "training.reduce_mean", "training.log_freq", "training.eval_freq"),
    *("optim.lr", "optim.beta1", "optim.eps", "optim.weight_decay", "optim.warmup", "optim.grad_clip"),
    *("sampling.predictor", "sampling.corrector", "sampling.snr", "sampling.probability_flow"),
)
RENAMED = {
    "model.ema_rate": "training.ema_rate",
    "training.snapshot_freq": "training.keep_freq",
    "training.snapshot_freq_for_preemption": "training.checkpoint_freq",
    "sampling.noise_removal": "sampling.denoise",
    "sampling.n_steps_each": "sampling.corrector_steps",
}
# Fixed here to the only value that any official config has.
FIXED = {
    "model.attention_type": "ddpm",
    "model.conv_size": 3,
    "model.interpolation": "bilinear",
    "optim.amsgrad": False,
    "optim.optimizer": "Adam",
    "sampling.method": "pc",
    "training.snapshot_sampling": True,
}
# Of no counterpart. By section:
#   eval: when and on what the official evaluation runs, which here the programs are told
#   data.tfrecords_path: a path on the authors' machine; training.n_jitted_steps: a matter of speed alone
#   model.normalization: each network has its own; model.sigma_begin: read by nothing
#   training.continuouse, training.loss: misspelt, see CORRECTED
WITHOUT_COUNTERPART = (
    *("eval.batch_size", "eval.begin_ckpt", "eval.end_ckpt", "eval.num_samples"),
    *("eval.enable_sampling", "eval.enable_loss", "eval.enable_bpd", "eval.bpd_dataset"),
    *("data.tfrecords_path", "model.normalization", "model.sigma_begin"),
    *("training.n_jitted_steps", "training.continuouse", "training.loss"),
)
# Fields of the shared official defaults which the network or the SDE of a config does not have.
UNREAD = {
    "ncsnpp": (),
    "ddpm": ("embedding_type",),
    "ncsn": ("embedding_type", "dropout"),
    "ncsnv2_64": ("embedding_type", "dropout"),
    "ncsnv2_128": ("embedding_type", "dropout"),
    "vpsde": ("sigma_min", "sigma_max"),
    "subvpsde": ("sigma_min", "sigma_max"),
    "vesde": ("beta_min", "beta_max"),
}
CORRECTED = {
    "ve/ncsnv2/bedroom": {"training.continuous": False},  # continuouse = False: its network takes an index
    "ve/ncsn/celeba": {"training.sde": "vesde"},  # loss = "vesde": it would stop at the missing `sde`
}


def translated(official: dict) -> dict:
    """Our fields of an official config; an official field that nothing here knows is an error."""
    official = dict(official)
    sde, continuous = official.pop("training.sde"), official.pop("training.continuous")
    name, output, label = OBJECTIVES[sde, continuous]
    if official.pop("model.scale_by_sigma"):  # which divides by the very sigma of the score
        assert output == "score"
        output = "scaled_score"
    ours = {"sde.name": name, "denoiser.output": output, "denoiser.label": label}
    ours["training.times"] = "uniform" if continuous else "chain"
    ours["training.weight"] = "likelihood" if official.pop("training.likelihood_weighting") else "eps"
    image = (official.pop("data.dataset"), official.pop("data.category", None), official["data.image_size"])
    ours["data.dataset"] = DATASETS[image]
    ours["training.n_iters"] = official.pop("training.n_iters") - 1  # which counts step 0
    ours["denoiser.num_scales"] = ours["sampling.pc_steps"] = official.pop("model.num_scales")
    if name == "discrete_vp":
        ours["sde.n"] = ours["sampling.pc_steps"]
    if official["model.name"] == "ncsn":
        ours["model.num_scales"] = ours["sampling.pc_steps"]
    unread = UNREAD[official["model.name"]] + UNREAD[sde]
    for field, value in official.items():
        section, _, last = field.partition(".")
        if field in SAME:
            ours[field] = value
        elif field in RENAMED:
            ours[RENAMED[field]] = value
        elif field in FIXED:
            assert value == FIXED[field], field
        elif field in WITHOUT_COUNTERPART or (section == "model" and last in unread):
            continue
        elif last in ("sigma_min", "sigma_max", "beta_min", "beta_max"):
            ours[f"sde.{last}"] = value
        elif section == "model":
            ours[field] = tuple(value) if isinstance(value, list) else value
        else:
            raise AssertionError(f"official field {field} is neither mapped nor listed")
    return ours


OFFICIAL = cases("A_cifar10") | cases("A_large")


@pytest.mark.parametrize("name", OFFICIAL)
def test_equal_to_the_published_file(name):
    config = load(name).get_config()
    ours = flat(config)
    official = translated(flat(OFFICIAL[name]["config"]) | CORRECTED.get(name, {}))
    assert {field: ours.get(field, "absent") for field in official} == official
    # what is ours alone in the network and the SDE
    extra = {f"sde.{key}" for key in config.sde} | {f"model.{key}" for key in config.model}
    own = {"sde.t_min", "model.num_classes", "model.dtype", "model.remat", "model.patch_size"}
    unset = {"model.fourier_scale"} if config.model.get("embedding_type") == "positional" else set()
    assert extra - set(official) - unset <= own


# ------------------------------------------------------------------------------------------------ older files

# What `training` said before there were tables, and what it says now.
OLD_TRAINING = {
    "uniform": (dict(continuous=True), dict(times="uniform", weight="eps")),
    "without the younger fields": (dict(continuous=True, lam_normal=None), dict(times="uniform", weight="eps")),
    "chain": (
        dict(continuous=False, likelihood_weighting=False, v_weighting=False, lam_normal=None),
        dict(times="chain", weight="eps"),
    ),
    "likelihood": (dict(continuous=True, likelihood_weighting=True), dict(times="uniform", weight="likelihood")),
    "lam": (
        dict(continuous=True, lam_normal=[0.8, 1.5], v_weighting=True),
        dict(times="lam_normal", lam_normal=(0.8, 1.5), weight="v"),
    ),
}
# What networks said of SDE and data range, and what `model` and `denoiser` say now.
OLD_NETWORKS = {
    "ve/cifar10_ncsnpp_continuous": dict(scale_by_sigma=True, output="score"),
    "ve/cifar10_ncsnpp": dict(scale_by_sigma=True, output="score"),
    "ve/cifar10_ddpm": dict(scale_by_sigma=True, output="score"),
    "ve/ncsnv2/cifar10": dict(scale_by_sigma=True, output="score"),
    "ve/ncsn/cifar10": dict(scale_by_sigma=False, output="score"),
    "vp/ddpm/cifar10": dict(scale_by_sigma=False, output="eps"),
}


def older(config: ConfigDict, training: dict, network: dict) -> dict:
    """A config.json as it was written before: `training` and `network` say what is now in other words."""
    fields = config.to_dict()
    for field in ("times", "weight", "lam_normal"):
        del fields["training"][field]
    del fields["denoiser"]["sigma_data"]
    fields["model"].pop("num_scales", None)
    fields["denoiser"]["output"] = network.pop("output", fields["denoiser"]["output"])
    fields["training"] |= training
    fields["model"] |= network
    return fields


def plain(config: ConfigDict) -> dict:
    """As JSON gives it back, which has lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def reopened(folder: pathlib.Path, fields: dict) -> ConfigDict:
    (folder / "config.json").write_text(json.dumps(fields))
    return runs.read_config(folder)


@pytest.mark.parametrize("name", OLD_TRAINING)
def test_losses_of_older_runs(name, tmp_path):
    before, now = OLD_TRAINING[name]
    config = load("digits").get_config()
    fields = reopened(tmp_path, older(config, dict(before), dict(scale_by_sigma=False)))
    config.training.update(now)
    assert plain(fields) == plain(config)


@pytest.mark.parametrize("name", OLD_NETWORKS)
def test_networks_of_older_runs(name, tmp_path):
    """A run of each published family is today's config again."""
    config = load(name).get_config()
    before = older(config, dict(continuous=config.training.times == "uniform"), dict(OLD_NETWORKS[name]))
    assert plain(reopened(tmp_path, before)) == plain(config)


def test_an_older_run_of_v_has_the_weight_of_its_network(tmp_path):
    config = load("cifar10_small").get_config()
    before = older(config, dict(continuous=True, v_weighting=True, lam_normal=[0.8, 1.5]), dict(scale_by_sigma=False))
    assert reopened(tmp_path, before).training.weight == "network"
    runs.claim_workdir(tmp_path, config)  # which refuses a run of another config


@pytest.mark.parametrize(
    "name, output, told",
    [
        ("digits", "eps", "scale_by_sigma is no more"),
        ("digits_subvp", "v", "output v under the SDE subvp has changed"),
    ],
)
def test_older_runs_without_a_meaning_today_are_refused(name, output, told, tmp_path):
    fields = older(load(name).get_config(), dict(continuous=True), dict(scale_by_sigma=name == "digits", output=output))
    with pytest.raises(UserError, match=f"config.json: .*{told}.*train it again"):
        reopened(tmp_path, fields)


# ------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("name", FILES)
def test_file(name):
    """It parses as the programs parse it, refuses unknown fields, and opens with its command."""
    path = f"configs/{name}.py"
    assert re.search(rf"^    python .+ --config={path}$", load(name).__doc__, re.MULTILINE)
    argv, values = ["train", f"--config={ROOT / path}", "--config.training.n_iters=7"], flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    assert holder.value.training.n_iters == 7
    check_fields(holder.value, path)
    config = load(name).get_config()
    for section in (config, *(value for _, value in config.items() if isinstance(value, ConfigDict))):
        with pytest.raises(AttributeError):
            section.unknown_field = 0


TEMPLATES = {}


@pytest.mark.parametrize("name", FILES)
def test_builds(name, monkeypatch):
    """Its SDE and network exist and fit its images, and its docstring counts the parameters right."""
    config = load(name).get_config()
    if config.latents.autoencoder:  # as training completes it
        coder = load(f"autoencoder/{pathlib.Path(config.latents.autoencoder).name.removeprefix('autoencoder_')}")
        config.autoencoder = {key: value for key, value in coder.get_config().model.items() if key != "name"}
    checked, key = build._valid_init, (config.model.to_json(), build.space_of(config, autoencoder={}).shape)
    if key not in TEMPLATES:
        TEMPLATES[key] = jax.eval_shape(checked(config, build.network_of(config), key[1]), jax.random.key(0))
    monkeypatch.setattr(build, "_valid_init", lambda *_: lambda key: None)
    build.trainable(config, {})
    params = TEMPLATES[key]
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    stated = re.search(r"([\d.]+) M parameters", load(name).__doc__)[1]
    assert stated == f"{millions:.{len(stated.partition('.')[2])}f}"


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("digits", dict(beta_min=-1.0)),
        ("digits", dict(beta_max=float("nan"))),
        ("digits", dict(t_min=0.0)),
        ("digits", dict(t_min=0.6, t_max=0.5)),
        ("digits_ve", dict(sigma_min=0.0)),
        ("digits_ve", dict(sigma_min=2.0, sigma_max=1.0)),
        ("digits_ve", dict(sigma_max=float("inf"))),
        ("digits_flow", dict(t_max=1.5)),
    ],
)
def test_a_schedule_that_is_none(file, fields):
    config = importlib.import_module(f"configs.{file}").get_config()
    with config.unlocked():
        config.sde.update(fields)
    with pytest.raises(UserError, match="there is no SDE with"):
        build.sde_of(config)
