"""A packed model draws what its run would with rounded parameters, and is taken where there is no run, without data."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from ems import statistics
from experiments import build, packed, runs
from score_sde import checkpoint, training
from score_sde.errors import UserError
from tests.programs import ok, program


@pytest.fixture(scope="module", autouse=True)
def box_here():
    """The box is in the folder where a program runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "PRETRAINED", pathlib.Path("pretrained"))
        yield


def write_run(workdir, dataset, change=lambda params: params) -> dict:
    """A run of a tiny network with one checkpoint, at step 5; its parameters."""
    config = digits.get_config()
    with config.unlocked():
        config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
        config.data.dataset = str(dataset)
        config.data.data_dir = "/somewhere"
        config.training.init = "/somewhere/older"
        config.ems.update(nodes=22, num_data=16, batch_size=8)
        config.sampling.update(num_samples=4, batch_size=4)
    runs.claim_workdir(workdir, config)
    init = build.diffusion_of(config).init
    random = np.random.default_rng(0)
    noisy = lambda leaf: np.asarray(leaf) + 0.01 * random.normal(size=leaf.shape).astype(np.float32)
    params = change(jax.tree.map(noisy, init(jax.random.key(0))))
    state = training.init_state(params, training.make_optimizer(**config.optim))
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
    checkpoints.save(jax.tree.map(np.asarray, state._replace(step=np.int32(5))), {})
    checkpoints.wait()
    return params


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A folder where a run was packed, measured, and packed again; the run is not under runs/, its data are gone."""
    folder = tmp_path_factory.mktemp("box")
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8)
    np.savez(folder / "garments.npz", train_images=images, test_images=images[:8])
    write_run(folder / "elsewhere", folder / "garments.npz")
    history = runs.history(runs.open_model(str(folder / "elsewhere")))
    (folder / "elsewhere" / runs.START).write_text(json.dumps(history))
    pack = ["pack", "--workdir=elsewhere", "--name=fashion_mnist"]
    missing = ok(program(*pack, folder=folder))
    assert "python -m ems --workdir=pretrained/fashion_mnist" in missing
    first = (folder / "pretrained/fashion_mnist/ema.npz").read_bytes()
    ok(program("ems", "--workdir=pretrained/fashion_mnist", f"--dataset_at={folder}/garments.npz", folder=folder))
    assert "-m ems" not in ok(program(*pack, folder=folder))
    assert (folder / "pretrained/fashion_mnist/ema.npz").read_bytes() == first
    (folder / "measured.npz").write_bytes(
        next((folder / "runs/pretrained/fashion_mnist/ems").glob("*.npz")).read_bytes()
    )
    shutil.rmtree(folder / "runs")
    (folder / "garments.npz").unlink()
    return folder


def test_what_is_packed(box):
    """Half precision, statistics to a thousandth, no path of this machine."""
    folder = box / "pretrained/fashion_mnist"
    assert {path.name for path in folder.iterdir()} == {"config.json", "ema.npz", "ems.npz", "card.md"}
    model = runs.open_model(str(folder))
    run = runs.open_model(str(box / "elsewhere"))
    assert model.step == run.step == 5
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(run.params), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs.astype(np.float16).astype(np.float32))
    assert model.identity == checkpoint.identity(packed.rounded(run.params)) != run.identity
    with np.load(folder / "ems.npz") as file:
        assert (file["l"].dtype, file["s"].dtype, file["b"].dtype) == (np.float32, np.float16, np.float16)
    kept, measured = statistics.load(folder / "ems.npz"), statistics.load(box / "measured.npz")
    assert kept.origin["checkpoint"] == model.identity
    np.testing.assert_array_equal(kept.lam, measured.lam)
    np.testing.assert_array_equal(kept.l, measured.l.astype(np.float32))
    for ours, theirs in ((kept.s, measured.s), (kept.b, measured.b)):
        error = np.abs(ours - theirs).max((1, 2, 3))
        assert error.max() > 0
        assert (error <= 1e-3 * np.abs(theirs).max((1, 2, 3))).all()
    assert json.loads((folder / "config.json").read_text())["data"]["dataset"] == "garments"
    for name in ("config.json", "card.md"):
        text = (folder / name).read_text()
        assert str(box) not in text
        assert "/somewhere" not in text
    assert str(box) not in json.dumps(kept.origin)
    card = (folder / "card.md").read_text()
    assert f"| identity | {model.identity};" in card
    assert f"| started from | {run.identity}, trained for 5 steps by " in card
    before = runs.history(model)[1:]
    assert [made["identity"] for made in before] == [run.identity]
    assert str(box) not in json.dumps(before)


def samples(path) -> np.ndarray:
    with np.load(path / "samples.npz") as file:
        return file["samples"]


def test_drawn_without_runs_and_data(box, tmp_path):
    """Without --workdir: the packed model, said in one line; to the bit what a run of the rounded parameters draws."""
    shutil.copytree(box / "pretrained", tmp_path / "pretrained")
    out = ok(program("sample", "--solver=dpmv3", "--steps=5", folder=tmp_path))
    (line,) = [line for line in out.splitlines() if line.startswith("model: ")]
    for word in ("pretrained/fashion_mnist at step 5", "for the box", "garments", "M parameters", "card.md"):
        assert word in line
    assert "EMS: pretrained/fashion_mnist/ems.npz" in out
    drawn = samples(tmp_path / "runs/pretrained/fashion_mnist/samples/step5-dpmv3-5-seed0")
    assert len(drawn) == 4
    assert {path.name for path in (tmp_path / "pretrained/fashion_mnist").iterdir()} == {
        "config.json", "ema.npz", "ems.npz", "card.md"
    }  # fmt: skip

    write_run(tmp_path / "runs/newer", "digits", packed.rounded)
    ems = f"--ems={tmp_path / 'pretrained/fashion_mnist/ems.npz'}"
    out = ok(program("sample", "--solver=dpmv3", "--steps=5", ems, folder=tmp_path))  # a run goes first
    assert "model: runs/newer at step 5" in out
    assert "box" not in out
    np.testing.assert_array_equal(samples(tmp_path / "runs/newer/samples/step5-dpmv3-5-seed0"), drawn)


def test_packed_again_without_its_run(box, tmp_path):
    """What is measured later comes to the card beside what was there; a report of another model does not."""
    folder, results = tmp_path / "pretrained/fashion_mnist", tmp_path / "runs/pretrained/fashion_mnist/eval"
    shutil.copytree(box / "pretrained", tmp_path / "pretrained")
    model = runs.open_model(str(folder))
    packed.save(folder, model.params, dict(step=model.step, run="older"))  # nothing of its training, as once
    parameters = (folder / "ema.npz").read_bytes()
    repack = ["pack", "--workdir=pretrained/fashion_mnist"]
    results.mkdir(parents=True)
    made = dict(seed=0, seconds=1.0, command="evaluate.py", versions={})
    measured = dict(
        loss=dict(mean=0.25, standard_error=0.125, images=8) | made,
        encoding=dict(rms=0.5, largest=1.0, images=8, evaluations=[[3, 4]], rtol=0.1, atol=0.1) | made,
    )
    for metric, identity in (("loss", model.identity), ("encoding", model.identity), ("encoding", "another")):
        report = dict(model=dict(workdir="x", step=model.step, identity=identity)) | {metric: measured[metric]}
        (results / "report.json").write_text(json.dumps(report))
        out = ok(program(*repack, folder=tmp_path))
    assert "--metrics=bpd" in out
    assert "--metrics=loss" not in out
    card = (folder / "card.md").read_text()
    assert "Test loss 0.25000 +- 0.12500 (8 images)" in card
    assert "RMS error 5.0e-01" in card
    assert f"| identity | {model.identity}; of the run, in single precision, older |" in card
    assert (folder / "ema.npz").read_bytes() == parameters
    refused = program(*repack, "--name=other", folder=tmp_path)
    assert refused.returncode == 2
    assert "packed already" in refused.stderr


def test_mistakes(box, tmp_path):
    """Another step, a damaged file, another network, training it further, no box: one line each."""
    folder = tmp_path / "fashion_mnist"
    shutil.copytree(box / "pretrained/fashion_mnist", folder)
    with pytest.raises(UserError, match="has one, of step 5"):
        runs.open_model(str(folder), 4)
    with pytest.raises(UserError, match="packed model"):
        runs.claim_workdir(folder, runs.read_config(folder))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["nf"] = 16
    whole = (folder / "ema.npz").read_bytes()
    for bad in (whole[:-100], b"", whole[:3000] + bytes(50) + whole[3050:]):
        (folder / "ema.npz").write_bytes(bad)
        with pytest.raises(UserError, match="holds no packed model") as told:
            runs.open_model(str(folder))
        assert "\n" not in str(told.value)
    (folder / "ema.npz").write_bytes(whole)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        runs.open_model(str(folder))
    with pytest.raises(UserError, match="beyond"):
        packed.rounded({"a": np.full(3, 1e6, np.float32)})
    for damaged in ("{", "[3]", '[{"name": "older"}]'):
        (tmp_path / "start.json").write_text(damaged)
        with pytest.raises(UserError, match="is no history of a model"):
            runs.read_start(tmp_path / "start.json")
    (tmp_path / "empty").mkdir()
    refused = program("sample", "--solver=ddim", folder=tmp_path / "empty")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: no run in runs/")
