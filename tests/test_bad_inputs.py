"""Whatever a user gives a program by mistake: exit code 2, one line that names culprit and remedy, no file changed."""

import contextlib
import gzip
import io
import json
import pathlib
import runpy
import shlex
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from ems import estimate, moments, statistics
from experiments import build, runs
from score_sde import checkpoint, files, training
from tests import programs

# ------------------------------------------------------------------------------------------------ what is given

TINY = """
from configs.{} import *
whole = get_config
def get_config():
    config = whole()
    config.unlock()
    config.model.update({})
    config.training.update(batch_size=8, n_iters=8, checkpoint_freq=4, keep_freq=4)
    config.ems.update(nodes=22, num_data=16, batch_size=8)
    config.eval.update(num_samples=4, steps=(5, 6), fine_steps=20)
    config.sampling.update(num_samples=2)
    return config.lock()
"""
NETWORK = "nf=8, ch_mult=(1,), attn_resolutions=()"
CONFIGS = {
    "tiny.py": TINY.format("digits", NETWORK),
    "ve.py": TINY.format("digits_ve", NETWORK),
    "flow.py": TINY.format("digits_flow", NETWORK),
    "by_class.py": TINY.format("digits_conditional", NETWORK),
    "classifier.py": TINY.format("classifier.digits", ""),
    "syntax.py": "def get_config(:\n    return 1\n",
    "empty.py": "",
    "other.py": "def get_config():\n    return 7\n",
    "failing.py": "def get_config():\n    raise RuntimeError('no luck\\nat all')\n",
    "importing.py": "import no_such_module\n",
    "text.txt": "hello",
}


def make_run(folder: pathlib.Path, config: str, seed: int = 0):
    """The config and the state of a run of eight steps that never trained."""
    config = runpy.run_path(folder / config)["get_config"]()
    rng, template = np.random.default_rng(seed), jax.eval_shape(build.trainable(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), template)
    state = training.init_state(params, training.make_optimizer(**config.optim))
    return config, jax.tree.map(np.asarray, state._replace(step=np.int32(8)))


def write_run(workdir: pathlib.Path, config, state) -> pathlib.Path:
    runs.claim_workdir(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=4)
    checkpoints.save(state, {"stream": "another", "position": 8, "seed": 42})
    checkpoints.wait()
    return workdir


def write_ems(folder: pathlib.Path, workdir: pathlib.Path):
    """A file that fits the run, and what may be wrong with such a file; moments likewise."""
    model = runs.open_model(str(workdir))
    node = estimate.nodes(model.diffusion.sde, 22)
    shape = (23, *model.diffusion.space.shape)
    origin = dict(
        checkpoint=model.identity, step=8, sde=statistics.describe_sde(model.diffusion.sde), t_end=float(node.t[-1]),
        data="digits", num_data=16, images=[[0, 16]], nodes=22, seed=0, guidance_scale=None,
    )  # fmt: skip
    ems = statistics.EMS(node.t, node.lam, np.zeros(shape), np.zeros(shape), np.ones(shape), origin)
    name = "step8_nodes22_data16.npz"
    statistics.save(workdir / "ems" / name, ems)
    content = (workdir / "ems" / name).read_bytes()
    files.write(folder / "ems" / "truncated.npz", content[: len(content) // 2])
    changed = {
        "checkpoint": ems._replace(origin=origin | {"checkpoint": "abc"}),
        "sde": ems._replace(lam=ems.lam + 1),
        "shape": ems._replace(**{key: getattr(ems, key)[:, :4] for key in "lsb"}),
        "nan": ems._replace(s=np.full(shape, np.nan)),
        "short": ems._replace(b=ems.b[:-1]),
        "rank": ems._replace(l=ems.l[..., 0, 0]),
        "guided": ems._replace(origin=origin | {"guidance_scale": 2.0}),
        "list": ems._replace(origin=[1, 2]),
        "falling": ems._replace(t=ems.t[::-1], lam=ems.lam[::-1]),
    }
    for key, value in changed.items():
        statistics.save(folder / "ems" / f"{key}.npz", value)
    np.savez(folder / "ems" / "words.npz", **ems._asdict() | dict(l=np.full(shape, "a"), origin=json.dumps(origin)))
    blocks = moments.Moments.zeros((moments.BLOCKS, 23), model.diffusion.space.shape)
    for key, part in (("one", origin), ("two", origin | {"images": [[8, 24]]}), ("seed", origin | {"data": "other"})):
        moments.save(folder / "ems" / f"{key}.moments", moments.Saved(node.t, node.lam, blocks, part))
    published = folder / "ems" / "published"
    files.save_npz(published / "l.npz", dict(l=np.zeros((3, 8, 8, 3))))
    files.save_npz(published / "sb.npz", dict(s=np.zeros((3, 8, 8, 3)), b=np.zeros((3, 8, 8, 3))))


def write_data(folder: pathlib.Path):
    """Images that cannot be trained on."""
    folder.mkdir()
    four = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    arrays = {
        "good": dict(images=four, labels=np.arange(40) % 10),
        "unlabelled": dict(images=four),
        "high": dict(images=four, labels=np.arange(40)),
        "key": dict(x=four),
        "float": dict(images=four / 255),
        "channels": dict(images=four.repeat(8, 3)),
        "few": dict(images=four, labels=np.arange(3)),
        "negative": dict(images=four, labels=np.arange(40) - 1),
        "pickled": dict(images=np.array([{}, 1], object)),
        "one": dict(images=four[:1]),
        "samples": dict(samples=four[:1]),
        "statistics": dict(mu=np.zeros(7), sigma=np.eye(7)),
        "infinite": dict(mu=np.full(64, np.inf), sigma=np.eye(64)),
        "latents": dict(latents=np.zeros((16, 4, 4, 1))),
        "infinite_latents": dict(latents=np.full((16, 8, 8, 1), np.inf)),
    }
    for name, contents in arrays.items():
        np.savez(folder / f"{name}.npz", **contents)
    good = (folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(good[:300])
    (folder / "empty.npz").write_bytes(b"")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**14, 8, 8, 1)})
    with zipfile.ZipFile(folder / "lying.npz", "w") as file:
        file.writestr("images.npy", header.getvalue() + bytes(100))
    (folder / "a-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + b"\x7f\0\0\0" * 3)
    (folder / "b-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\3" + bytes(12)))
    (folder / "table.csv").write_text("1,2")
    for name in ("none", "mixed", "corrupt", "words", "deep", "bomb", "single"):
        (folder / name).mkdir()
    save = lambda name, size=(8, 8), mode="L": Image.new(mode, size).save(folder / name)
    save("mixed/a.png")
    save("mixed/b.png", (9, 8))
    for i in range(100):
        save(f"corrupt/{i}.png")
    (folder / "corrupt" / "b.png").write_bytes((folder / "corrupt" / "0.png").read_bytes()[:40])
    (folder / "words" / "a.png").write_text("hello")
    save("deep/a.png", mode="I;16")
    save("bomb/a.png", (12000, 10000), "1")
    save("single/a.png")
    save("large.png", (16, 16))
    save("colour.png", mode="RGB")
    (folder / "word.png").write_text("hello")


def write_foreign(folder: pathlib.Path):
    """Files that are no checkpoints."""
    folder.mkdir()
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_bytes(b"")
    np.savez(folder / "empty.npz")
    (folder / "evil.pth").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.")
    with zipfile.ZipFile(folder / "other.pth", "w") as archive:
        archive.writestr("archive/readme", b"hello")
    (folder / "cut_flax").write_bytes(b"\x81\xa6params\xde\xff\xff")
    (folder / "flax").write_bytes(b"\x81\xa6params\x80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that command lines may name, by relative paths."""
    folder = tmp_path_factory.mktemp("given")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    at = folder / "runs"
    config, state = make_run(folder, "tiny.py")
    with contextlib.redirect_stdout(io.StringIO()):
        write_ems(folder, write_run(at / "tiny", config, state))
        write_run(at / "by_class", *make_run(folder, "by_class.py"))
        write_run(at / "classifier", *make_run(folder, "classifier.py"))
        write_run(at / "ve", *make_run(folder, "ve.py", seed=1))
    write_data(folder / "data")
    write_foreign(folder / "foreign")
    for name, text in (
        ("cut", '{"seed": 42, "da'),
        ("list", "[1, 2]"),
        ("number", "7"),
        ("bare", "{}"),
        ("field", json.dumps(config.to_dict() | {"trainig": {"n_iters": 3}})),
        ("flat", json.dumps(config.to_dict() | {"training": 3})),
        ("typed", json.dumps(config.to_dict() | {"data": config.data.to_dict() | {"image_size": "8"}})),
    ):
        files.write(at / f"config_{name}" / "config.json", text)
    files.write(at / "occupied" / "notes.txt", "mine")
    files.write(at / "file", "a file")
    runs.claim_workdir(at / "unfinished", config)
    shutil.copytree(at / "tiny", at / "damaged")
    for path in (at / "damaged" / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    other = {"solver": "deis", "steps": 4, "options": {}, "checkpoint": "another"}
    for name, text in (
        ("other", json.dumps(other)),
        ("cut", "{"),
        ("list", "[]"),
        ("options", json.dumps(other | {"checkpoint": checkpoint.identity(state.ema), "options": [1]})),
        ("steps", json.dumps(other | {"checkpoint": checkpoint.identity(state.ema), "steps": "many"})),
    ):
        (folder / f"search_{name}.json").write_text(text)
    return folder


# ------------------------------------------------------------------------------------------------ the table

TRAIN = "train --config=tiny.py --workdir=runs/new "
SAMPLE = "sample --workdir=runs/tiny "
EVALUATE = "evaluate --workdir=runs/tiny "
EMS = "ems --workdir=runs/tiny "
IMPORT = "importers --config=tiny.py --workdir=runs/new "
SEARCH = "search --workdir=runs/tiny "
METRICS = "metrics --dataset=digits --name=mine --image_size=8 --num_channels=1 --folder=runs/new "

# what is wrong: (command line, words that the one line must hold)
BAD = {
    # flags and config files
    "nothing to train": ("train", "--config=configs/digits.py", "--workdir"),
    "field without a config": ("train --workdir=runs/tiny --config.seed=9", "--config.seed", "--config=FILE"),
    "absent config": ("train --config=none.py", "none.py", "configs/digits.py"),
    "config is a folder": ("train --config=data", "data", "configs/digits.py"),
    "config of another type": ("train --config=text.txt", "text.txt"),
    "config with a syntax error": ("train --config=syntax.py", "syntax.py"),
    "config without get_config": ("train --config=empty.py", "get_config"),
    "config that is a number": ("train --config=other.py", "other.py", "config"),
    "config that fails": ("train --config=failing.py", "no luck at all"),
    "config that imports nothing": ("train --config=importing.py", "no_such_module"),
    "unknown flag": (TRAIN + "--wrkdir=x", "wrkdir", "workdir"),
    "argument without a flag": (TRAIN + "fast", "'fast'", "--name=value"),
    "unknown field": (TRAIN + "--config.training.batchsize=3", "batchsize", "batch_size"),
    "unknown section": (TRAIN + "--config.trainig.batch_size=3", "trainig"),
    "field before its config": ("train --config.seed=1 --config=tiny.py", "config"),
    "word for an integer": (TRAIN + "--config.training.n_iters=many", "n_iters", "many"),
    "fraction for an integer": (TRAIN + "--config.training.n_iters=1.5", "n_iters", "1.5"),
    "word for a truth value": (TRAIN + "--config.data.centered=maybe", "centered", "maybe"),
    "word for a tuple": (TRAIN + "--config.model.ch_mult=wide", "ch_mult"),
    "section for a number": (TRAIN + "--config.training=3", "training"),
    # SDE, denoiser, network
    "unknown SDE": (TRAIN + "--config.sde.name=vpp", "'vpp'", "subvp"),
    "negative beta": (TRAIN + "--config.sde.beta_max=-1.0", "beta_max", "-1"),
    "falling sigma": ("train --config=ve.py --workdir=runs/new --config.sde.sigma_min=90.0", "sigma_min", "90"),
    "end after the start": (TRAIN + "--config.sde.t_min=2.0", "t_min", "2"),
    "end at zero": (TRAIN + "--config.sde.t_min=0.0", "t_min", "0"),
    "unknown output": (TRAIN + "--config.denoiser.output=noise", "'noise'", "eps"),
    "unknown label": (TRAIN + "--config.denoiser.label=clock", "'clock'", "time"),
    "no deviation of the data": (TRAIN + "--config.denoiser.sigma_data=0.0", "sigma_data", "positive"),
    "no noise levels": (TRAIN + "--config.denoiser.num_scales=0", "num_scales", "0"),
    "unknown network": (TRAIN + "--config.model.name=transformer", "'transformer'", "ncsnpp"),
    "no channels": (TRAIN + "--config.model.nf=0", "nf"),
    "negative channels": (TRAIN + "--config.model.nf=-8", "nf", "-8"),
    "no levels": (TRAIN + "--config.model.ch_mult=()", "ch_mult"),
    "no blocks": (TRAIN + "--config.model.num_res_blocks=0", "num_res_blocks"),
    "unknown type": (TRAIN + "--config.model.dtype=float17", "'float17'", "bfloat16"),
    "unknown nonlinearity": (TRAIN + "--config.model.nonlinearity=relux", "'relux'", "swish"),
    "unknown block": (TRAIN + "--config.model.resblock_type=big", "'big'", "biggan"),
    "unknown embedding": (TRAIN + "--config.model.embedding_type=sine", "'sine'", "fourier"),
    "unknown pyramid": (TRAIN + "--config.model.progressive=skip", "'skip'", "output_skip"),
    "dropout above 1": (TRAIN + "--config.model.dropout=1.5", "dropout", "1.5"),
    "negative classes": (TRAIN + "--config.model.num_classes=-1", "num_classes", "-1"),
    # training
    "no batch": (TRAIN + "--config.training.batch_size=0", "batch", "0"),
    "negative batch": (TRAIN + "--config.training.batch_size=-8", "batch", "-8"),
    "batch above the data": (TRAIN + "--config.training.batch_size=2000", "2000", "1500 images"),
    "no steps": (TRAIN + "--config.training.n_iters=0", "n_iters", "0"),
    "negative steps": (TRAIN + "--config.training.n_iters=-4", "n_iters", "-4"),
    "no log": (TRAIN + "--config.training.log_freq=0", "log_freq", "0"),
    "no evaluation": (TRAIN + "--config.training.eval_freq=0", "eval_freq", "0"),
    "no checkpoints": (TRAIN + "--config.training.checkpoint_freq=0", "checkpoint_freq", "0"),
    "negative keep": (TRAIN + "--config.training.keep_freq=-1", "keep_freq", "-1"),
    "no steps per call": (TRAIN + "--config.training.steps_per_call=0", "steps_per_call", "0"),
    "steps per call that do not divide": (TRAIN + "--config.training.steps_per_call=3", "steps_per_call", "divide"),
    "no slices": (TRAIN + "--config.training.accumulate=0", "accumulate", "0", "at least 1"),
    "slices that do not divide": (TRAIN + "--config.training.accumulate=3", "accumulate", "3", "divisor of"),
    "unknown reaction": (TRAIN + "--config.training.non_finite=ignore", "'ignore'", "stop or skip"),
    "training time after the end": (TRAIN + "--config.training.t_min=2.0", "training.t_min", "2"),
    "noise levels without spread": (TRAIN + "--config.training.lam_normal=(0.5,0)", "lam_normal", "positive"),
    "one number of noise levels": (TRAIN + "--config.training.lam_normal=(0.5,)", "lam_normal", "(0.5,)", "deviation"),
    "unknown times": (TRAIN + "--config.training.times=evenly", "'evenly'", "lam_normal"),
    "unknown weight": (TRAIN + "--config.training.weight=snr", "'snr'", "network"),
    "chain to where there are no data": (
        "train --config=flow.py --workdir=runs/new --config.training.times=chain", "'chain'", "flow", "uniform",
    ),
    "average above 1": (TRAIN + "--config.training.ema_rate=1.5", "ema_rate", "1.5"),
    "hidden labels of no classes": (TRAIN + "--config.training.label_dropout=0.1", "label_dropout", "num_classes"),
    "augmentation that the network is not told of": (
        TRAIN + "--config.training.augment=0.1", "training.augment", "0.1", "model.augment_dim = 9",
    ),
    "all labels hidden": (
        "train --config=by_class.py --workdir=runs/new --config.training.label_dropout=1.0", "label_dropout", "[0, 1)",
    ),
    "negative learning rate": (TRAIN + "--config.optim.lr=-1.0", "optim.lr", "-1"),
    "learning rate that is no number": (TRAIN + "--config.optim.lr=nan", "optim.lr", "nan"),
    "momentum of 1": (TRAIN + "--config.optim.beta1=1.0", "optim.beta1", "1"),
    "negative eps": (TRAIN + "--config.optim.eps=-1.0", "optim.eps", "-1"),
    "negative warm-up": (TRAIN + "--config.optim.warmup=-5", "optim.warmup", "-5"),
    "negative cooldown": (TRAIN + "--config.training.cooldown=-5", "training.cooldown", "-5"),
    "negative decay": (TRAIN + "--config.optim.weight_decay=-0.1", "optim.weight_decay", "-0.1"),
    "parameters of another network": (
        TRAIN + "--config.training.init=runs/tiny --config.model.nf=16", "does not fit", "(8,) there and (16,) here",
    ),
    "parameters of another meaning": (
        TRAIN + "--config.training.init=runs/tiny --config.denoiser.output=v", "denoiser.output 'eps', not 'v'",
    ),
    "parameters of no run": (TRAIN + "--config.training.init=runs/none", "no such workdir", "runs/none"),
    # data
    "unknown data set": (TRAIN + "--config.data.dataset=digit", "'digit'", "digits"),
    "absent data": (TRAIN + "--config.data.dataset=data/absent.npz", "data/absent.npz", "no such file"),
    "data of another kind": (TRAIN + "--config.data.dataset=./data/table.csv", "table.csv", ".npz"),
    "data of another size": (TRAIN + "--config.data.image_size=16", "8x8", "16", "resize"),
    "no size": (TRAIN + "--config.data.image_size=0", "image_size", "0"),
    "two channels": (TRAIN + "--config.data.num_channels=2", "num_channels", "1 or 3"),
    "unknown resize rule": (TRAIN + "--config.data.resize=stretch", "'stretch'", "crop_resize"),
    "large crop": (TRAIN + "--config.data.crop=9", "crop 9", "8x8"),
    **{
        f"data: {name}": (TRAIN + f"--config.data.dataset=./data/{name}", name.partition("/")[0], *words)
        for name, words in {
            "key.npz": ["neither `images` nor `train_images`"],
            "float.npz": ["float64", "uint8"],
            "channels.npz": ["(40, 8, 8, 8)", "(N, H, W, C)"],
            "few.npz": ["(3,)", "one integer for each"],
            "negative.npz": ["-1..38", "counting from 0"],
            "pickled.npz": ["plain arrays"],
            "truncated.npz": ["not a readable .npz"],
            "empty.npz": ["not a readable .npz"],
            "lying.npz": ["not a readable .npz"],
            "a-images-idx3-ubyte": ["promises"],
            "b-images-idx3-ubyte.gz": ["not an IDX file"],
            "none": ["holds no images"],
            "mixed": ["b.png is 9x8", "resize"],
            "corrupt": ["b.png is not a readable image"],
            "words": ["a.png is not a readable image"],
            "deep": ["8 bits a channel"],
            "bomb": ["12000x10000"],
        }.items()
    },
    "no labels": (
        "train --config=by_class.py --workdir=runs/new --config.data.dataset=data/unlabelled.npz",
        "no labels", "model.num_classes",
    ),
    "labels above the classes": (
        "train --config=by_class.py --workdir=runs/new --config.data.dataset=data/high.npz",
        "data/high.npz", "largest label + 1",
    ),
    # run folders
    "another experiment": (
        "train --config=tiny.py --workdir=runs/tiny --config.seed=1", "runs/tiny", "seed", "--workdir",
    ),
    "other data": ("train --config=tiny.py --workdir=runs/tiny", "trained on other data"),
    "occupied workdir": ("train --config=tiny.py --workdir=runs/occupied", "runs/occupied", "not empty", "--workdir"),
    "workdir is a file": ("train --config=tiny.py --workdir=runs/file", "runs/file"),
    "continue nothing": ("train --workdir=runs/none", "runs/none", "config.json"),
    "cut config.json": ("train --workdir=runs/config_cut", "runs/config_cut/config.json"),
    "config.json is a list": ("sample --workdir=runs/config_list", "runs/config_list/config.json"),
    "config.json is a number": ("sample --workdir=runs/config_number", "runs/config_number/config.json"),
    "config.json is empty": ("sample --workdir=runs/config_bare", "runs/config_bare/config.json"),
    "config.json has an unknown field": ("sample --workdir=runs/config_field", "config.json", "trainig.n_iters"),
    "config.json has no section": ("sample --workdir=runs/config_flat", "config.json", "training"),
    "config.json has another type": ("sample --workdir=runs/config_typed", "config.json", "image_size"),
    "no such workdir": ("sample --workdir=runs/none", "no such workdir", "train.py"),
    "workdir of samples is a file": ("sample --workdir=runs/file", "runs/file"),
    "no checkpoint yet": ("sample --workdir=runs/unfinished", "no finished checkpoint", "train"),
    "damaged checkpoint": ("sample --workdir=runs/damaged", "runs/damaged", "whole"),
    "absent checkpoint": (SAMPLE + "--checkpoint=3", "no checkpoint of step 3", "8"),
    "model where a classifier belongs": (
        SAMPLE + "--task=class --label=1 --classifier=runs/tiny", "not a classifier", "configs/classifier/digits.py",
    ),
    "classifier where a model belongs": ("sample --workdir=runs/classifier", "a classifier, not a model of images"),
    # solvers
    "unknown solver": (SAMPLE + "--solver=euler", "'euler'", "dpmv3"),
    "no evaluations": (SAMPLE + "--steps=0", "steps", "0"),
    "no samples": (SAMPLE + "--num_samples=0", "num_samples", "0"),
    "no batch of samples": (SAMPLE + "--batch_size=-1", "batch_size", "-1"),
    "word for a seed": (SAMPLE + "--seed=one", "seed", "one"),
    "unknown option": (SAMPLE + "--solver=dpmpp --option ordr=2", "'ordr'", "order"),
    "option without value": (SAMPLE + "--option order", "order", "name=value"),
    "too few evaluations": (SAMPLE + "--solver=dpmpp --steps=1 --option order=2", "order"),
    "unknown order": (SAMPLE + "--solver=dpmpp --option order=9", "order", "9"),
    "word for an order": (SAMPLE + "--solver=dpmpp --option order=high", "order", "high"),
    "unknown grid": (SAMPLE + "--solver=dpmpp --option grid=zigzag", "zigzag", "logsnr"),
    "falling grid": (SAMPLE + "--solver=dpmpp --steps=2 --option grid=[0.1,0.5,1.0]", "grid"),
    "late end": (SAMPLE + "--solver=dpmpp --option t_end=5.0", "t=5.0", "end < start"),
    "word for a truth value of a solver": (
        SAMPLE + "--solver=dpmpp --option lower_order_final=perhaps", "perhaps", "True",
    ),
    "too few stochastic steps": (SAMPLE + "--solver=pc --steps=9", "beta_max", "9"),
    "unknown predictor": (SAMPLE + "--solver=pc --option predictor=magic", "magic", "reverse_diffusion"),
    "unknown corrector": (SAMPLE + "--solver=pc --option corrector=magic", "magic", "langevin"),
    "word for a signal-to-noise ratio": (SAMPLE + "--solver=pc --option snr=high", "snr", "high", "0.16"),
    "neither predictor nor corrector": (SAMPLE + "--solver=pc --option predictor=none", "neither", "predictor="),
    "ancestral ODE": (
        SAMPLE + "--solver=pc --option predictor=ancestral_sampling --option probability_flow=True",
        "no probability flow",
    ),
    "negative tolerance": (SAMPLE + "--solver=ode --option rtol=-1", "rtol=-1", "positive"),
    "steps of the adaptive solver": (SAMPLE + "--solver=ode --steps=5", "--steps=5", "rtol"),
    "absent search": (SAMPLE + "--tableau=none.json", "none.json", "tools.search"),
    "cut search": (SAMPLE + "--tableau=search_cut.json", "search_cut.json", "tools.search"),
    "search is a list": (SAMPLE + "--tableau=search_list.json", "search_list.json", "tools.search"),
    "search of another model": (SAMPLE + "--tableau=search_other.json", "another", "search again"),
    "search with bad options": (SAMPLE + "--tableau=search_options.json", "search_options.json", "tools.search"),
    "search with bad steps": (SAMPLE + "--tableau=search_steps.json", "search_steps.json", "tools.search"),
    "search and a solver": (SAMPLE + "--tableau=search_other.json --solver=deis", "--solver", "leave out"),
    # guidance and tasks
    "label without classes": (SAMPLE + "--label=3", "--label=3", "no classes", "digits_conditional"),
    "label above the classes": ("sample --workdir=runs/by_class --label=10 --solver=dpmpp", "--label=10", "0 to 9"),
    "negative label": ("sample --workdir=runs/by_class --label=-1 --solver=dpmpp", "label", "-1"),
    "guidance without classes": (SAMPLE + "--guidance=2", "guidance 2", "no classes"),
    "guidance that is no number": ("sample --workdir=runs/by_class --guidance=nan --solver=dpmpp", "guidance", "nan"),
    "interval without guidance": (SAMPLE + "--guidance_interval=0.2,0.8", "--guidance_interval", "--guidance=2.0"),
    "interval of one": (
        "sample --workdir=runs/by_class --guidance=2 --guidance_interval=0.2 --solver=dpmpp", "0.2", "two rising times",
    ),
    "falling interval": (
        "sample --workdir=runs/by_class --guidance=2 --guidance_interval=0.8,0.2 --solver=dpmpp", "two rising times",
    ),
    "unknown threshold": (SAMPLE + "--threshold=hard", "hard", "dynamic"),
    "unknown task": (SAMPLE + "--task=dream", "dream", "inpaint"),
    "image without a task": (SAMPLE + "--image=data/large.png", "--image", "--task=inpaint"),
    "mask of another task": (SAMPLE + "--task=colorize --mask=data/large.png", "--mask", "--task=inpaint"),
    "classifier without a task": (SAMPLE + "--classifier=runs/classifier", "--classifier", "--task=class"),
    "task without a classifier": (SAMPLE + "--task=class", "--classifier=WORKDIR"),
    "absent classifier": (SAMPLE + "--task=class --classifier=runs/none", "runs/none"),
    "classifier of another SDE": (
        "sample --workdir=runs/ve --task=class --classifier=runs/classifier", "runs/classifier", "sde",
    ),
    "label above the classifier's": (
        SAMPLE + "--task=class --classifier=runs/classifier --label=12", "--label=12", "0 to 9",
    ),
    "interpolation by another solver": (SAMPLE + "--task=interpolate --solver=dpmpp", "--solver=ode"),
    "inpainting by another solver": (SAMPLE + "--task=inpaint --solver=ode", "few-step solvers", "--solver=dpmv3"),
    "factor of another task": (SAMPLE + "--task=inpaint --solver=dpmpp --factor=2", "--factor", "--task=super_resolve"),
    "factor that does not divide": (SAMPLE + "--task=super_resolve --solver=dpmpp --factor=3", "3", "8"),
    "no factor": (SAMPLE + "--task=super_resolve --solver=dpmpp --factor=0", "0"),
    "negative blur": (SAMPLE + "--task=deblur --solver=dpmpp --blur=-1", "-1"),
    "negative noise of a measurement": (SAMPLE + "--task=inpaint --solver=dpmpp --measurement_noise=-1", "-1"),
    "method of pc": (SAMPLE + "--task=inpaint --method=dps", "--method", "few-step solvers"),
    "no operator": (SAMPLE + "--task=custom --solver=dpmpp", "--operator"),
    "operator of no module": (SAMPLE + "--task=custom --solver=dpmpp --operator=no_such:thing", "no_such"),
    "operator without a function": (SAMPLE + "--task=custom --solver=dpmpp --operator=json", "json", "module:function"),
    "operator that is no function": (SAMPLE + "--task=custom --solver=dpmpp --operator=math:pi", "expected a function"),
    "operator of numbers": (SAMPLE + "--task=custom --solver=dpmpp --operator=math:sin", "does not take images"),
    "blur of another task": (SAMPLE + "--task=inpaint --blur=2", "--blur needs --task=deblur"),
    "deblurring by pc": (SAMPLE + "--task=deblur --solver=pc", "not by pc: --solver=dpmv3"),
    "a model that guides itself": (SAMPLE + "--autoguidance=8 --guidance=2 --solver=dpmpp", "the model itself"),
    "a step that is none": (SAMPLE + "--autoguidance=-5 --guidance=2 --solver=dpmpp", "-5", "step", "folder of a run"),
    "two guides": (SAMPLE + "--autoguidance=4 --classifier=runs/classifier --task=class", "--autoguidance", "leave"),
    "guidance that auto does not measure": (
        "sample --workdir=runs/by_class --solver=auto --guidance=2 --threshold=static", "leave out --threshold",
    ),
    "EMS of a solver that takes none": (SAMPLE + "--solver=dpmpp --ems=ems/absent.npz", "--ems", "leave it out"),
    "option given twice": (SAMPLE + "--solver=dpmpp --option order=2 --option order=3", "order is given twice"),
    "name with a folder": (SAMPLE + "--solver=dpmpp --name=a/b", "a/b", "without a folder"),
    "name that is this folder": (SAMPLE + "--solver=dpmpp --name=.", "no name"),
    "name of many letters": (SAMPLE + "--solver=dpmpp --name=" + 260 * "a", "150 letters"),
    "times of one's own from a noisy image": (
        SAMPLE + "--solver=dpmpp --steps=2 --strength=0.5 --image=data/single/a.png --option grid=[0.3,0.1,0.001]",
        "--strength", "named grid",
    ),
    "average to a cloud": ("average --workdir=runs/tiny --std=0.1 --out=gs://bucket/x", "gs://bucket/x"),
    "options of auto": (SAMPLE + "--solver=auto --option order=2", "leave out --option"),
    "prompt without a text encoder": (SAMPLE + "--prompt=cat --solver=dpmpp", "prompt"),
    "strength of pc": (SAMPLE + "--strength=0.5 --solver=pc --image=data/large.png", "--strength", "few-step"),
    "times of GITS of a singlestep solver": (SAMPLE + "--solver=heun --option grid=gits", "heun", "deis"),
    "absent image": (SAMPLE + "--task=inpaint --image=data/absent.png", "data/absent.png"),
    "a folder for an image": (SAMPLE + "--task=inpaint --image=data", "data is a folder", "one image file"),
    "image of another size": (SAMPLE + "--task=inpaint --image=data/large.png", "16x16", "8x8", "resize"),
    "image of other channels": (SAMPLE + "--task=inpaint --image=data/colour.png", "data/colour.png", "channel"),
    "image that is none": (SAMPLE + "--task=inpaint --image=data/word.png", "data/word.png", "not a readable image"),
    "image that is a bomb": (SAMPLE + "--task=inpaint --image=data/bomb/a.png", "12000x10000", "pixels"),
    "absent mask": (SAMPLE + "--task=inpaint --mask=data/absent.png", "data/absent.png"),
    "mask of another size": (SAMPLE + "--task=inpaint --mask=data/large.png", "16x16", "8x8"),
    "gray to colour": (SAMPLE + "--task=colorize", "gray"),
    # EMS
    "absent EMS": (SAMPLE + "--ems=ems/absent.npz", "ems/absent.npz", "python -m ems"),
    **{
        f"EMS: {name}": (SAMPLE + f"--ems={name}", name.rpartition("/")[2], "python -m ems", *words)
        for name, words in {
            "ems/truncated.npz": [],
            "data/empty.npz": [],
            "data/good.npz": [],
            "ems/words.npz": [],
            "ems/list.npz": [],
            "ems/nan.npz": ["finite"],
            "ems/short.npz": ["b is damaged", "23 nodes"],
            "ems/rank.npz": ["l is damaged"],
            "ems/checkpoint.npz": ["abc"],
            "ems/guided.npz": ["guidance 2"],
        }.items()
    },
    "EMS of another SDE": (SAMPLE + "--ems=ems/sde.npz", "another SDE", "python -m ems"),
    "EMS backwards": (SAMPLE + "--ems=ems/falling.npz", "python -m ems"),
    "EMS of other images": (SAMPLE + "--ems=ems/shape.npz", "(4, 8, 1)", "(8, 8, 1)"),
    "unknown preset": (EMS + "--preset=large", "large", "paper"),
    "one interval": (EMS + "--nodes=1", "nodes", "1"),
    "no images": (EMS + "--num_data=0", "num_data", "0"),
    "batch above the images": (EMS + "--num_data=4 --batch_size=8", "--batch_size"),
    "images beyond the last": (EMS + "--first_image=100000", "100000", "--first_image"),
    "EMS to a late end": (EMS + "--t_end=5", "t=5", "(0, 1)"),
    "EMS to a negative end": (EMS + "--t_end=-1", "t=-1", "(0, 1)"),
    "EMS with guidance": (EMS + "--guidance=2", "guidance 2", "digits_conditional"),
    "absent latents": (EMS + "--data=data/absent.npz", "data/absent.npz", "latents"),
    "latents of another shape": (EMS + "--data=data/latents.npz", "(16, 4, 4, 1)", "(8, 8, 1)"),
    "latents that are not finite": (EMS + "--data=data/infinite_latents.npz", "infinite_latents.npz", "finite"),
    "images for latents": (EMS + "--data=data/good.npz", "data/good.npz", "latents"),
    "unknown command": (EMS + "add", "'add'", "merge"),
    "merge nothing": (EMS + "merge", "2 file"),
    "merge one": (EMS + "merge ems/one.moments", "2 file", "got 1"),
    "merge the same images": (EMS + "merge ems/one.moments ems/two.moments", "share images 8 to 15", "--first_image"),
    "merge other data": (EMS + "merge ems/one.moments ems/seed.moments", "data digits and other"),
    "merge what is none": (EMS + "merge data/good.npz data/float.npz", "data/good.moments"),
    "merge of another model": (
        "ems merge ems/one.moments ems/two.moments --workdir=runs/ve", "ems/one.moments", "--workdir",
    ),
    "absent published EMS": (EMS + "published data", "data/l.npz", "sb.npz"),
    "published EMS of another shape": (EMS + "published ems/published", "ems/published", "(nodes, 1, 8, 8)"),
    # evaluation
    "unknown metric": (EVALUATE + "--metrics=fid50k", "'fid50k'", "convergence"),
    "no metric": (EVALUATE + "--metrics=", "metric ''", "loss"),
    "one sample": (EVALUATE + "--num_samples=1", "num_samples", "1"),
    "steps that are no number": (EVALUATE + "--metrics=fid --steps=5,ten", "--steps=ten", "--steps=5,10"),
    "one solver of two unknown": (EVALUATE + "--metrics=fid --solver=ddim,dmpv3", "'dmpv3'", "dpmv3"),
    "absent search to measure": (EVALUATE + "--metrics=fid --tableau=none.json", "none.json", "tools.search"),
    "search of another model to measure": (
        EVALUATE + "--metrics=samples --tableau=search_other.json", "another", "search again",
    ),
    "search and a grid to measure": (
        EVALUATE + "--metrics=fid --tableau=search_other.json --grid=time", "--grid", "leave out",
    ),
    "no evaluations to measure": (EVALUATE + "--metrics=fid --steps=0", "--steps=0", "--steps=5,10"),
    "unknown feature network": (EVALUATE + "--metrics=fid --network=vgg", "'vgg'", "inception"),
    "absent feature network": (EVALUATE + "--metrics=fid --network=none.npz", "none.npz"),
    "feature network that is none": (EVALUATE + "--metrics=fid --network=data/good.npz", "data/good.npz", "ResNet-20"),
    "absent Inception weights": (EVALUATE + "--metrics=fid --inception_weights=none.pth", "none.pth"),
    "other Inception weights": (
        EVALUATE + "--metrics=fid --inception_weights=foreign/text.pth", "foreign/text.pth", "SHA-256",
    ),
    "unknown Inception mode": (
        EVALUATE + "--metrics=fid --inception_weights=foreign/text.pth --inception_mode=x", "'x'", "tf",
    ),
    "EMS of an evaluation": (EVALUATE + "--metrics=convergence --ems=ems/absent.npz", "absent.npz", "python -m ems"),
    "evaluate nothing": ("evaluate --workdir=runs/none", "runs/none"),
    # importers
    "import nothing": ("importers", "one checkpoint file", "--workdir"),
    "import without parameters": ("importers foreign/flax --workdir=runs/new", "foreign/flax", "no arrays"),
    "import two": (IMPORT + "foreign/flax foreign/text.pth", "one checkpoint file"),
    "absent checkpoint file": (IMPORT + "foreign/none.pth", "foreign/none.pth"),
    "folder for a checkpoint": (IMPORT + "foreign", "foreign"),
    "text for a checkpoint": (IMPORT + "foreign/text.pth", "foreign/text.pth", "PyTorch"),
    "empty checkpoint": (IMPORT + "foreign/empty.pth", "foreign/empty.pth", "PyTorch"),
    "checkpoint with a program": (IMPORT + "foreign/evil.pth", "foreign/evil.pth"),
    "archive with a program": (IMPORT + "foreign/zip.pth", "foreign/zip.pth", "posix.system"),
    "archive of something else": (IMPORT + "foreign/other.pth", "foreign/other.pth", "data.pkl"),
    "cut Flax checkpoint": (IMPORT + "foreign/cut_flax", "foreign/cut_flax", "msgpack"),
    "empty Flax checkpoint": (IMPORT + "foreign/flax", "foreign/flax"),
    "export nothing": ("importers --export=weights.npz --workdir=runs/none", "runs/none"),
    "export onto a folder": ("importers --export=data --workdir=runs/tiny", "data is a folder", "data/weights.npz"),
    "checkpoint without arrays": (IMPORT + "foreign/empty.npz", "foreign/empty.npz", "no arrays"),
    # averages
    "average of no width": ("average --workdir=runs/tiny --out=runs/new", "--std"),
    "average to nowhere": ("average --workdir=runs/tiny --std=0.1", "--out"),
    "average of a width that none has": ("average --workdir=runs/tiny --std=0.4 --out=runs/new", "0.4", "0.289"),
    "average of none": ("average --workdir=runs/tiny --std=0.1 --out=runs/new", "runs/tiny", "training.power_ema"),
    "width that no average has": (TRAIN + "--config.training.power_ema=(0.05,0.5)", "power_ema", "(0.05, 0.5)"),
    # searches and feature networks
    "one step to search": (SEARCH + "--steps=1", "steps", "1"),
    "solver without choices": (SEARCH + "--solver=heun", "heun", "dpmv3"),
    "no time to search": (SEARCH + "--minutes=0", "minutes", "0"),
    "one noise": (SEARCH + "--noises=1", "noises", "1"),
    "unknown option to hold": (SEARCH + "--solver=deis --option ordr=2", "'ordr'", "order"),
    "search nothing": ("search --workdir=runs/none", "runs/none"),
    "feature network of nothing": ("metrics", "dataset"),
    "no epochs": (METRICS + "--epochs=0", "epochs", "0"),
    "feature network without labels": (METRICS + "--epochs=1 --dataset=./data/unlabelled.npz", "no labels"),
    "feature network of another size": (METRICS + "--epochs=1 --image_size=9", "8x8", "9"),
    "batch above the data of a feature network": (METRICS + "--epochs=1 --batch_size=2000", "2000", "1500"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the test


# Every flag that takes a path, and what is no seed: nothing is left behind by any of them.
CLOUDS = {
    "train --config=tiny.py": ("workdir", "dataset_at", "config.data.dataset", "config.training.init"),
    SAMPLE: ("workdir", "tableau", "ems", "image", "mask", "classifier", "name"),
    EVALUATE: ("workdir", "ems", "samples", "reference", "network", "inception_weights", "classifier"),
    "ems": ("workdir", "data"),
    "ems merge": ("workdir", ""),
    SEARCH: ("workdir", "ems"),
    "importers": ("workdir", "export", ""),
    METRICS: ("dataset", "folder", "name"),
}
BAD |= {
    f"{command.split()[0]} {flag or 'file'} in a cloud": (
        f"{command} {f'--{flag}=' if flag else ''}gs://bucket/a" + " x.moments" * (command == "ems merge"),
        "gs://bucket/a",
    )
    for command, flags_of in CLOUDS.items()
    for flag in flags_of
}
BAD |= {
    "an empty path of images": (SAMPLE + "--task=inpaint --image=", "--image=", "it is empty"),
    "an empty path of samples": (EVALUATE + "--samples=", "--samples=", "it is empty"),
    "an empty run folder": ("sample --workdir=", "--workdir=", "it is empty"),
    "an empty checkpoint's path": (IMPORT + "''", "''", "it is empty"),
}
BAD |= {
    f"{command.split()[0]} seed {seed}": (f"{command} --{'config.' * command.startswith('train')}seed={seed}", "seed")
    for command in ("train --config=tiny.py", SAMPLE, EVALUATE, "ems", SEARCH, METRICS)
    for seed in ("-1", 2**64, "1.5")
}
BAD |= {
    "no data at the end": (TRAIN + "--config.sde.beta_max=400", "says nothing of the data", "v or x0", "t_max=0.26"),
    "a file for a folder": ("train --config=tiny.py --workdir=tiny.py/x", "tiny.py is no folder"),
    "a wrong reference": (EVALUATE + "--metrics=loss,fid --network=resnet20-cifar10 --reference=ems/shape.npz", "mu"),
    "too few steps of a solver": (EVALUATE + "--metrics=loss,samples --solver=pndm --steps=2", "use --steps=4 or more"),
}


def contents(folder: pathlib.Path) -> dict:
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return {str(path): (known.st_size, known.st_mtime_ns) for path, known in found if path.is_file()} | {
        str(path): None for path in folder.rglob("*") if path.is_dir()
    }


def run(command: str) -> int:
    """The exit code of a command line, run in this process."""
    return programs.run(*shlex.split(command))


@pytest.mark.parametrize("what", BAD)
def test_a_bad_input_is_one_line(what, folder, monkeypatch, capfd):
    """In this process; test_programs.py has some as subprocesses."""
    command, *words = BAD[what]
    monkeypatch.chdir(folder)
    before = contents(folder)
    capfd.readouterr()
    code = run(command)
    told = capfd.readouterr().err
    assert code == 2, told
    assert told.startswith("error: ") and told.count("\n") == 1, told
    for word in words:
        assert word in told
    assert contents(folder) == before


def test_training_stops_before_numbers_that_are_not_finite_or_skips_them(folder, monkeypatch, capfd):
    """After one step of an absurd size nothing is finite; what is saved is the state before that, at step 1."""
    monkeypatch.chdir(folder)
    command = "train --config=tiny.py --workdir=runs/diverged --config.optim.lr=1e30 --config.optim.warmup=0 "
    assert run(command) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    for words in ("error: ", "not finite at step 1, batch 1", "digits (train)", "non_finite=skip"):
        assert words in line
    saved = checkpoint.Checkpoints(folder / "runs" / "diverged")
    template = jax.eval_shape(build.trainable(runpy.run_path("tiny.py")["get_config"]()).init, jax.random.key(0))
    assert saved.steps() == [1]
    kept = saved.restore_ema(1, template)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    assert run(command + "--config.training.non_finite=skip") == 0
    again = checkpoint.Checkpoints(folder / "runs" / "diverged")
    assert again.steps()[-1] == 8
    jax.tree.map(np.testing.assert_array_equal, again.restore_ema(8, template), kept)


@pytest.mark.parametrize(("given", "kept"), [("off", None), ("programs", "programs")])
def test_compilation_cache_has_a_switch(given, kept, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = []
    monkeypatch.setattr("score_sde.parallel.start", lambda *_: found.append(jax.config.jax_compilation_cache_dir))
    assert run(f"train --compilation_cache={given}") == 2
    assert found == [kept]
