"""The four programs as a user runs them: resume bit for bit, samples by index, one clear line for each mistake."""

import json
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from ems import statistics
from score_sde import checkpoint
from tests import reference
from tests.programs import TINY, finished, ok, process, program

pytestmark = pytest.mark.slow  # the mistakes of test_bad_inputs.py are quick


def leaves(workdir, step: int) -> dict:
    """Every array of a checkpoint, read without a template."""
    import orbax.checkpoint as ocp

    folder = pathlib.Path(workdir) / "checkpoints" / str(step)
    read = ocp.StandardCheckpointer()
    flat = {}

    def walk(tree, path):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            nested = isinstance(value, (dict, list, tuple))
            walk(value, (*path, key)) if nested else flat.update({(*path, key): np.asarray(value)})

    for item in ("state", "ema"):
        walk(read.restore(folder.resolve() / item), (item,))
    return flat


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    ok(program("train", *TINY, "--config.training.n_iters=8", f"--workdir={workdir}"))
    return workdir


def equal(one: dict, two: dict):
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=str(name))


def test_resumed_training_is_bit_for_bit_the_undisturbed(run, tmp_path):
    """Stopped after four steps, once by its end, once by Ctrl-C at an unknown step, the run comes to the same bits."""
    ok(program("train", *TINY, "--config.training.n_iters=4", f"--workdir={tmp_path / 'half'}"))
    out = ok(program("train", *TINY, "--config.training.n_iters=8", f"--workdir={tmp_path / 'half'}"))
    assert "continuing at step 4" in out
    equal(leaves(run, 8), leaves(tmp_path / "half", 8))


def test_minutes_set_the_number_of_steps(tmp_path):
    """Late from the start, the run ends as soon as its pace is known and its cooldown done."""
    fields = ("n_iters=1000000", "log_freq=1", "cooldown=2")
    given = [*TINY, *(f"--config.training.{field}" for field in fields), "--minutes=0.001", f"--workdir={tmp_path}/run"]
    assert "finished at step 4" in ok(program("train", *given))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["n_iters"] == 4


def test_a_run_that_starts_from_another(run, tmp_path):
    """Its first update, of learning rate 0, leaves the averaged parameters of the other, which may be gone later."""
    other, fresh = tmp_path / "other", tmp_path / "fresh"
    shutil.copytree(run, other)
    new = [*TINY, f"--config.training.init={other}", "--config.seed=1", f"--workdir={fresh}"]
    assert f"model: {other} at step 8" in ok(program("train", *new, "--config.training.n_iters=1"))
    theirs, ours = leaves(run, 8), leaves(fresh, 1)
    for path in [path for path in theirs if path[0] == "ema"]:
        np.testing.assert_array_equal(ours["state", "params", *path[1:]], theirs[path])
    (begun,) = json.loads((fresh / "start.json").read_text())
    assert (begun["name"], begun["step"], begun["training"]) == ("other", 8, None)  # 8 steps log nothing
    assert begun["config"]["training"]["n_iters"] == 8
    shutil.rmtree(other)
    ending = ("--config.training.n_iters=2", "--config.training.cooldown=1")
    assert "continuing at step 1" in ok(program("train", *new, *ending))


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    workdir = tmp_path / "stopped"
    started = process("train", *TINY, "--config.training.n_iters=1000000", f"--workdir={workdir}")
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / "4").is_dir():
        assert time.monotonic() < deadline
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=100)
    assert started.returncode == 130, err
    assert f"continue with python train.py --workdir={workdir}" in out
    step = int(out.split("stopped at step ")[1].split(",")[0])
    assert step in checkpoint.Checkpoints(workdir).steps()


def test_samples_depend_on_index_and_seed_alone(run, tmp_path):
    """The same images from one batch of eight, from batches of four, and over two devices."""
    sampled = {}
    shutil.rmtree(run / "ems", ignore_errors=True)  # of another test
    for name, batch, devices in (("one", 8, 1), ("two", 4, 1), ("devices", 8, 2)):
        common = ["--solver=dpmv3", "--steps=5", "--num_samples=8", f"--workdir={run}", f"--name={name}"]
        out = ok(program("sample", *common, f"--batch_size={batch}", devices=devices))
        assert ("measuring once" in out) == (name == "one")
        with np.load(run / "samples" / name / "samples.npz") as file:
            sampled[name] = file["samples"].astype(int)
        record = json.loads((run / "samples" / name / "run.json").read_text())
        assert record["nfe"] == 5
        assert record["options"]["pseudo"] is True
        assert (run / "samples" / name / "grid.png").stat().st_size > 0
    assert sampled["one"].shape == (8, 8, 8, 1)
    assert sampled["one"].std() > 0
    for name in ("two", "devices"):
        assert np.abs(sampled[name] - sampled["one"]).max() <= 1  # a level: rounding before truncation


def test_other_solvers_and_the_sampler(run):
    common = ["--num_samples=4", f"--workdir={run}"]
    ok(program("sample", *common, "--solver=dpmpp", "--steps=6", "--option", "order=3", "--option", "grid=time"))
    ok(program("sample", *common, "--solver=pc", "--steps=25", "--option", "corrector=langevin"))
    record = json.loads((run / "samples" / "step8-pc-25-corrector=langevin-seed0" / "run.json").read_text())
    assert record["nfe"] == 50


def test_search(run):
    """What it finds on its own noises is no worse than the named grids; sample.py takes it, another model does not."""
    ok(program("search", f"--workdir={run}", "--steps=4", "--noises=4", "--solver=deis"))
    path = run / "solvers" / "step8-deis-4.json"
    found = json.loads(path.read_text())
    assert len(found["options"]["grid"]) == 5
    assert found["searched_rms"] < found["held_out_rms"]["published"]
    ok(program("sample", f"--workdir={run}", "--num_samples=4", f"--tableau={path}", "--name=searched"))
    record = json.loads((run / "samples" / "searched" / "run.json").read_text())
    assert (record["solver"], record["nfe"], record["options"]) == ("deis", 4, found["options"])
    other = run / "other.json"
    other.write_text(json.dumps(found | {"checkpoint": "another"}))
    result = program("sample", f"--workdir={run}", f"--tableau={other}")
    assert result.returncode == 2
    assert "search again" in result.stderr
    assert result.stderr.count("\n") == 1


def test_ems_and_evaluation(run):
    out = ok(program("ems", f"--workdir={run}", "--nodes=24"))
    assert "nodes24" in out
    assert "already measured" in ok(program("ems", f"--workdir={run}", "--nodes=24"))
    (one,) = (run / "ems").glob("*nodes24*.npz")
    alone = statistics.load(one.rename(one.with_name("alone.npz")))
    ok(program("ems", f"--workdir={run}", "--nodes=24", devices=2))
    shared = statistics.load(one)
    np.testing.assert_allclose(shared.l, alone.l, atol=1e-5)
    np.testing.assert_allclose(shared.b, alone.b, atol=1e-3 * np.abs(alone.b).max())
    assert len(list((run / "ems").glob("*nodes24*.png"))) == 1
    ok(program("evaluate", f"--workdir={run}"))
    report = json.loads((run / "eval" / "report.json").read_text())
    assert report["loss"]["images"] == 297
    assert list(report["convergence"]["rms"]) == [
        "DDIM",
        "DPM-Solver++ 2M",
        "DPM-Solver++ 3M",
        "DPM-Solver 3S",
        "DEIS tAB3",
        "iPNDM",
        "Heun",
        "UniPC bh2",
        "DPM-Solver-v3",
    ]
    assert "| DPM-Solver-v3 |" in (run / "eval" / "report.md").read_text()
    assert (run / "eval" / "convergence.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("train", [*TINY, "--config.sde.name=vpp"], "subvp"),
        ("ems", ["--num_data=4", "--batch_size=8"], "smaller batch"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(name, arguments, word, run):
    """As a process of its own sees it; test_bad_inputs.py has every mistake."""
    result = finished(process(name, *arguments, f"--workdir={run}"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert word in result.stderr


def test_a_batch_that_devices_do_not_divide(tmp_path):
    result = program("train", *TINY, f"--workdir={tmp_path}", devices=3)
    assert result.returncode == 2
    assert "does not divide over 3 devices" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_workdir(tmp_path):
    tmp_path.chmod(0o500)
    result = program("train", *TINY, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


SMALL_VE = [  # the network of the published implementations' example checkpoints
    "--config=configs/ve/cifar10_ncsnpp_continuous.py",
    "--config.data.image_size=8",
    "--config.model.nf=8",
    "--config.model.ch_mult=(1, 2)",
    "--config.model.num_res_blocks=1",
    "--config.model.attn_resolutions=(4,)",
]


def imported(file, workdir, *more):
    return program("importers", file, *SMALL_VE, f"--workdir={workdir}", *more)


def test_published_checkpoints_become_runs(tmp_path):
    """Both formats give the same run, which samples without training, and goes back out under the PyTorch names."""
    for kind, file in (("torch", "torch_checkpoint_7.pth"), ("flax", "jax_checkpoint_7")):
        out = ok(imported(reference.file(f"ckpt/{file}"), tmp_path / kind))
        assert f"{kind} checkpoint of step 7" in out
        assert "averaged parameters" in out
    equal(leaves(tmp_path / "torch", 7), leaves(tmp_path / "flax", 7))
    out = ok(program("sample", f"--workdir={tmp_path / 'flax'}", "--solver=dpmpp", "--steps=3", "--num_samples=2"))
    assert "step7-dpmpp-3" in out
    ok(program("importers", f"--workdir={tmp_path / 'torch'}", f"--export={tmp_path / 'weights.npz'}"))
    with np.load(tmp_path / "weights.npz") as exported, np.load(reference.file("ckpt/expected.npz")) as expected:
        for name in exported.files:
            stored = f"ema/{name}" if f"ema/{name}" in expected.files else f"model/{name}"  # Fourier W: no average
            np.testing.assert_array_equal(exported[name], expected[stored], err_msg=name)


def test_an_import_that_fails_leaves_nothing(tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(reference.file("ckpt/torch_checkpoint_7.pth").read_bytes()[:5000])
    wrong = "--config.model.nf=16"
    for file, more, word in (
        (cut, (), "cut.pth"),
        (reference.file("ckpt/torch_checkpoint_7.pth"), (wrong,), "shape"),
        ("no", (), "no"),
    ):
        result = imported(file, tmp_path / "run", *more)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert word in result.stderr
        assert not (tmp_path / "run").exists()
