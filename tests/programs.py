"""Programs as a user starts them, alone or as several processes, and what may happen to them and to their files."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from experiments import build, runs
from score_sde import checkpoint, training

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = [
    "--config=configs/digits.py",
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.model.attn_resolutions=()",
    "--config.model.dropout=0.1",
    "--config.training.batch_size=8",
    "--config.training.checkpoint_freq=4",
    "--config.training.keep_freq=4",
    "--config.optim.warmup=2",
    "--config.ems.nodes=22",
    "--config.ems.num_data=16",
    "--config.ems.batch_size=8",
    "--config.eval.num_samples=4",
    "--config.eval.steps=(5, 6)",
    "--config.eval.fine_steps=20",
]


def environment(devices: int) -> dict[str, str]:
    """What a process on so many devices inherits."""
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | dict(XLA_FLAGS=xla, PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))


def program(name: str, *arguments, devices: int = 1, wait: bool = True):
    """Run `python name ...` at the root of the checkout."""
    command = [sys.executable, *(("-m", "ems") if name == "ems" else (f"{name}.py",)), *map(str, arguments)]
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return started
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def start(folder: pathlib.Path, *command, devices: int = 1, processes: int = 1) -> list[subprocess.Popen]:
    """Processes of `python command` at the root of the checkout; what process i says goes to <folder>/<i>.log."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        several = [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}"]
        with open(folder / f"{i}.log", "w") as log:
            arguments = [sys.executable, *map(str, command), *(several if processes > 1 else [])]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment(devices), stdout=log, stderr=log))
    return started


def said(folder: pathlib.Path, process: int = 0) -> str:
    return (folder / f"{process}.log").read_text(errors="replace")


def ended(folder: pathlib.Path, started: list[subprocess.Popen], *, code: int = 0, seconds: float = 600) -> str:
    """What process 0 said, once all have ended with that code."""
    deadline = time.monotonic() + seconds
    for i, process in enumerate(started):
        found = process.wait(max(1, deadline - time.monotonic()))
        assert found == code, f"process {i} ended with {found}, not {code}:\n{said(folder, i)[-3000:]}"
    return said(folder)


def wait_until(condition: Callable[[], bool], started: list[subprocess.Popen], seconds: float = 600):
    """Until the condition holds or a process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and all(process.poll() is None for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def torment(
    folder: pathlib.Path, make: Callable[[], list], marker: str, span: float, times: int, rng, killed: Callable
) -> Iterator[str]:
    """Kill what `make()` starts so many times, each at a random moment of `span` seconds after it said `marker`.

    Started again each time; whenever it comes to its end, what it said is yielded, and another is made.
    """
    command, kills = make(), 0
    while True:
        (process,) = started = start(folder, *command)
        if kills < times:
            wait_until(lambda: marker in said(folder), started)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, span))
            if process.poll() is None:
                process.kill()
                process.wait()
                kills += 1
                killed()
                continue
        yield ended(folder, started)
        if kills >= times:
            return
        command = make()


def restored(workdir: pathlib.Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint, as a run reads it."""
    config = runs.read_config(workdir)
    optimizer, init = training.make_optimizer(**config.optim), build.trainable(config).init
    template = jax.eval_shape(lambda key: training.init_state(init(key), optimizer), jax.random.key(0))
    return jax.tree.leaves(checkpoint.Checkpoints(workdir).restore(step, template)[0])


def equal(one, two) -> str:
    return "equal bit for bit" if all(map(np.array_equal, one, two)) else "DIFFERENT"


def arrays_of(path) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return [file[name] for name in sorted(file.files) if file[name].dtype.kind in "fiu"]


def damage(file: pathlib.Path, kind: str, rng):
    """Cut a file, delete it, flip some of its bits, fill it with zeros, or empty the whole step's folder."""
    content = bytearray(file.read_bytes())
    if kind == "deleted":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.integers(max(1, len(content)))])
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    elif kind == "empty folder":
        step = next(path for path in file.parents if path.parent.name == "checkpoints")
        shutil.rmtree(step)
        step.mkdir()
    else:
        for place in rng.integers(len(content), size=3) if content else ():
            content[place] ^= 1 << rng.integers(8)
        file.write_bytes(content)


DAMAGES = ("flipped", "cut", "deleted", "zeros", "empty folder")
