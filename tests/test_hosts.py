"""Several processes give what one gives, and what is killed or damaged goes on as if nothing had been.

The short version of `python -m tests.chaos`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
from score_sde import checkpoint, data, parallel
from score_sde.errors import UserError
from tests import programs
from tests.test_trainer import make_images
from tests.test_training import small_state

TRAIN = ["train.py", *programs.TINY, "--config.training.n_iters=8"]


def finish(folder, *command, **layout) -> str:
    return programs.ended(folder, programs.start(folder, *command, **layout))


def sample(workdir, log, **layout):
    """Sixteen samples by DPM-Solver-v3, which measures the EMS first."""
    sizes = ["--num_samples=16", "--batch_size=8", "--solver=dpmv3", "--steps=10"]
    finish(log, "sample.py", f"--workdir={workdir}", *sizes, "--name=samples", **layout)


def arrays(workdir, pattern: str) -> list[np.ndarray]:
    (path,) = workdir.glob(pattern)
    return programs.arrays_of(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of eight steps by one process, its samples and its EMS."""
    workdir = tmp_path_factory.mktemp("hosts") / "alone"
    finish(workdir.parent / "log", *TRAIN, f"--workdir={workdir}")
    sample(workdir, workdir.parent / "log")
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_train_as_one(alone, tmp_path, devices):
    """The parameters differ by the order of sums, and the first process alone talks.

    That no factor hides in Adam's invariance is shown by plain SGD in tests/test_training.py.
    """
    workdir = tmp_path / "run"
    said = finish(tmp_path / "log", *TRAIN, f"--workdir={workdir}", processes=2, devices=devices)
    assert f"{2 * devices} device(s)" in said
    assert "finished at step 8" in said
    assert "step" not in programs.said(tmp_path / "log", 1)
    for ours, theirs in zip(programs.restored(workdir, 8), programs.restored(alone, 8), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_two_processes_sample_and_measure_as_one(alone, tmp_path):
    """The same sample for each index, and the same moments for the EMS, up to rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir, ignore=shutil.ignore_patterns("ems", "samples"))
    sample(workdir, tmp_path / "log", processes=2)
    (ours,), (theirs,) = (arrays(run, "samples/samples/samples.npz") for run in (workdir, alone))
    assert len(ours) == 16
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # a level: rounding before truncation
    for ours, theirs in zip(arrays(workdir, "ems/*.moments"), arrays(alone, "ems/*.moments"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_one_process_of_two_is_told_to_stop_or_dies(tmp_path, sent):
    """Told to, both save and stop at one step; if one dies, the other ends by itself. One process alone goes on."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    started = programs.start(log, *TRAIN, "--config.training.n_iters=1000000", f"--workdir={workdir}", processes=2)
    programs.wait_until(lambda: (workdir / "checkpoints" / "4").is_dir(), started)
    started[1].send_signal(sent)
    codes = [process.wait(60) for process in started]
    if sent == signal.SIGTERM:
        assert codes == [143, 143], programs.said(log)
    else:
        assert codes[0] in (parallel.LOST, 128 + signal.SIGABRT, -signal.SIGABRT), programs.said(log)
    last = checkpoint.Checkpoints(workdir).steps()[-1]
    assert (f"stopped at step {last}" in programs.said(log)) == (sent == signal.SIGTERM)
    said = finish(log, "train.py", *TRAIN[1:-1], f"--config.training.n_iters={last + 4}", f"--workdir={workdir}")
    assert f"continuing at step {last}" in said
    assert f"finished at step {last + 4}" in said


SMALL_SETS_STAY_ON_DISK = """
import pathlib
import sys
from experiments import program, trainer
from score_sde import models, sources
from tests.test_trainer import OneNumber, config_of
models.MODELS["one_number"] = OneNumber
sources.MEMORY_BYTES = 0
trainer.samples = lambda model: lambda *arguments: None
images, workdir, skip = sys.argv[1:4]
del sys.argv[1:4]
program.run(lambda: trainer.train(config_of(images, 12, skip_damaged=skip == "skip"), pathlib.Path(workdir)))
"""


def test_a_damaged_image_of_one_process_of_two(tmp_path):
    """Both save at the step that one of them cannot take, and say so; passing over it, both go on to the end."""
    images, batch = make_images(tmp_path / "images", 100), 8
    order, stream = data.permutation(0, 0, 100), data.permutation(digits.get_config().seed, 0, 90)
    path = sorted(images.rglob("*.png"))[order[stream[3 * batch + batch - 1]]]  # of step 3, process 1
    path.write_bytes(path.read_bytes()[:60])
    script, workdir, log = tmp_path / "script.py", tmp_path / "run", tmp_path / "log"
    script.write_text(SMALL_SETS_STAY_ON_DISK)
    programs.ended(log, programs.start(log, script, images, workdir, "stop", processes=2), code=2)
    assert "another process cannot read its images, as it says: the 3 steps before it are saved" in programs.said(log)
    assert f"{path.name} is not a readable image" in programs.said(log, 1)
    assert checkpoint.Checkpoints(workdir).steps() == [3]
    said = finish(log, script, images, workdir, "skip", processes=2)
    assert "continuing at step 3" in said
    assert "passed over 1 damaged image(s), lastly: image" in said
    assert "finished at step 12" in said


@pytest.mark.slow
def test_killed_training_is_bit_for_bit_the_undisturbed(alone, tmp_path):
    """`kill -9` at two random moments, then to the end."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    make = lambda: [*TRAIN, f"--workdir={workdir}"]
    for said in programs.torment(log, make, "M parameters", 4.0, 2, np.random.default_rng(0), lambda: None):
        assert "finished at step 8" in said
    assert programs.equal(programs.restored(workdir, 8), programs.restored(alone, 8)) == "equal bit for bit"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # readers that Orbax has given up
@pytest.mark.parametrize("kind", programs.DAMAGES)
def test_damaged_checkpoint_is_passed_over(tmp_path, capsys, kind):
    """What is restored is bit for bit what was saved, now or one checkpoint before, and the step can be saved again."""
    states = {step: jax.tree.map(lambda x: x + np.asarray(step - 5, x.dtype), small_state()) for step in (10, 20)}
    checkpoints = checkpoint.Checkpoints(tmp_path / "whole", keep_every=5)
    for state in states.values():
        checkpoints.save(state, {"position": 1})
        checkpoints.wait()
    assert checkpoints.steps() == [10, 20]
    rng, passed_over, harmless = np.random.default_rng(0), 0, 0
    for i in range(1, 9):
        copy = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", copy)
        files = [path for path in (copy / "checkpoints" / "20").rglob("*") if path.is_file()]
        programs.damage(sorted(files, key=lambda path: (path.stat().st_size, path))[-i], kind, rng)
        with contextlib.suppress(checkpoint.Damaged):
            checkpoint.Checkpoints(copy).restore(20, small_state())
            harmless += 1
        damaged = checkpoint.Checkpoints(copy, keep_every=5)
        step, (state, meta) = damaged.last(lambda step: damaged.restore(step, small_state()))
        assert meta == {"position": 1}
        assert programs.equal(jax.tree.leaves(state), jax.tree.leaves(states[step])) == "equal bit for bit"
        if step == 10:
            passed_over += 1
            assert capsys.readouterr().out.count("\n") == 1
            damaged.save(states[20], meta)
            damaged.wait()
            assert damaged.last(lambda step: damaged.restore(step, small_state()))[0] == 20
    assert passed_over == 8 - harmless > 0


def test_incomplete_flags_are_refused():
    with pytest.raises(UserError, match="--process_id"):
        parallel.start("localhost:1", 2, None)


@pytest.mark.parametrize(
    ("flags", "before", "devices"),
    [
        ("", "", min(2, os.cpu_count())),
        ("--xla_force_host_platform_device_count=1", "", 1),
        ("--xla_force_host_platform_device_count=3", "", 3),
        ("", "jax.devices(); ", 1),
    ],
)
def test_alone_a_cpu_is_two_devices(flags, before, devices):
    """If nothing else was said, and nothing computed before."""
    code = f"import jax; from score_sde import parallel; {before}parallel.start(); print(jax.device_count())"
    environment = os.environ | {"XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, env=environment, capture_output=True)
    assert int(found.stdout) == devices, found.stderr


def test_one_process_asks_nobody():
    """What every program asks starts nothing in one process."""
    assert parallel.agreed(15) == 15
    assert parallel.writes()
    assert not jax.distributed.is_initialized()
