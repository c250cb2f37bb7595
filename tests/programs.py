"""Programs as a user starts them, alone or as several processes, and what may happen to them and to their files."""

import contextlib
import io
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from absl import flags

from experiments import build, runs
from experiments.program import shared_flags
from score_sde import checkpoint, training

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = {
    "train": "train",
    "sample": "sample",
    "evaluate": "evaluate",
    "ems": "ems.__main__",
    "importers": "tools.import_checkpoint",
    "search": "tools.search",
    "average": "tools.ema",
    "metrics": "tools.train_features",
    "pack": "tools.pack",
}
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


def process(name: str, *arguments, devices: int = 1, folder: pathlib.Path = ROOT) -> subprocess.Popen:
    """A program of this checkout as a user starts it, in a folder."""
    script = ROOT / f"{name}.py"
    command = [script] if script.exists() else ["-m", PROGRAMS[name].removesuffix(".__main__")]
    return subprocess.Popen(
        [sys.executable, *map(str, (*command, *arguments))],
        cwd=folder, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(started: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def program(name: str, *arguments, devices: int = 1, folder: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    """Run a program of this checkout in a folder to its end: in this process, or on several devices in its own."""
    if devices > 1:
        return finished(process(name, *arguments, devices=devices, folder=folder))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(name, *map(str, arguments))
    return subprocess.CompletedProcess(name, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_its_own_process(*arguments):
    """Flags of a program alone, though this process has others; settings that a program makes are undone."""
    shared_flags()  # which stay, as those of absl do
    given = flags.FLAGS
    modules = {name: given.find_module_defining_flag(name) for name in given}
    of_programs = [name for name, module in modules.items() if name == "config" or module in PROGRAMS.values()]
    others = {name: given[name] for name in of_programs}
    for name in others:
        delattr(given, name)
    before, argv, hook = set(given), sys.argv, sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    settings = {name: getattr(jax.config, name) for name in options}
    sys.argv = list(arguments)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        sys.argv, sys.unraisablehook = argv, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in settings.items():
            jax.config.update(name, value)
        for name in set(given) - before:
            delattr(given, name)
        given.unparse_flags()
        for name, flag in others.items():
            given[name] = flag
            given.register_flag_by_module(modules[name], flag)


def contents(name: str) -> dict:
    """The names in a program's module, whose flags are out of the way of other programs'."""
    with as_its_own_process(name):
        return runpy.run_module(PROGRAMS[name])


def run(name: str, *arguments: str) -> int:
    """Run a program in this process, by its own `if __name__ == "__main__"`; its exit code."""
    with as_its_own_process(name, *arguments), pytest.raises(SystemExit) as ended:
        runpy.run_module(PROGRAMS[name], run_name="__main__")
    return ended.value.code or 0


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
