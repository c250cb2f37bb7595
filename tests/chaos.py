"""Break the programs on purpose, let them go on, and compare with undisturbed runs: the table of docs/reliability.md.

    python -m tests.chaos                                     everything, half an hour to an hour on two cores
    python -m tests.chaos --fault=train,sample --times=10     some of it

The model is tiny, so that a step takes milliseconds and a checkpoint is being written most of the time.
"""

import collections
import contextlib
import io
import json
import pathlib
import re
import shutil
import signal
import tempfile
import time

import numpy as np
from absl import flags

from experiments import program
from score_sde import checkpoint
from tests import programs
from tests.programs import arrays_of, ended, equal, restored, said, start, torment, wait_until

STEPS, EVERY = 200, 10  # of a training, and between its checkpoints
TINY = [
    *programs.TINY,
    f"--config.training.n_iters={STEPS}",
    f"--config.training.checkpoint_freq={EVERY}",
    "--config.training.keep_freq=1000000",
    "--config.training.eval_freq=1000000",
    "--config.ems.nodes=120",
    "--config.ems.num_data=768",
]
# What `python -m ems` does, but it saves where it is five times a second instead of every half minute.
EMS_SAVING_OFTEN = """
import functools, runpy
from ems import estimate
estimate.accumulate = functools.partial(estimate.accumulate, save_every=0.2)
runpy.run_module("ems", run_name="__main__")
"""
LATE = 60  # seconds
TRAINING_LATE = f"""
import runpy, sys, time
from score_sde import training
make_step = training.make_step
def late(*arguments, **options):
    time.sleep({LATE} * ("--process_id=1" in sys.argv))
    return make_step(*arguments, **options)
training.make_step = late
runpy.run_path("train.py", run_name="__main__")
"""

# ------------------------------------------------------------------------------------------------ faults
# Each: (folder, times, rng) -> (what is lost, result) and takes the undisturbed training from folder / "whole".


def whole(folder: pathlib.Path) -> pathlib.Path:
    """A training that nothing disturbs, done once; and how many seconds it took after it had begun."""
    workdir = folder / "whole"
    if not (workdir / "seconds").exists():
        started = start(folder / "log", "train.py", *TINY, f"--workdir={workdir}")
        wait_until(lambda: "M parameters" in said(folder / "log"), started)
        began = time.monotonic()
        ended(folder / "log", started)
        (workdir / "seconds").write_text(str(time.monotonic() - began))
    return workdir


def last_step(workdir: pathlib.Path) -> int:
    """The last finished checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=0)


def killed_training(folder, times, rng):
    reference, log, runs, lost, writing = whole(folder), folder / "log", [], [], []

    def make():
        runs.append(folder / f"train{len(runs)}")
        return ["train.py", *TINY, f"--workdir={runs[-1]}"]

    def killed():
        shown = [int(step) for step in re.findall(rf"(\d+)/{STEPS}", said(log))]
        lost.append(max([*shown, last_step(runs[-1])]) - last_step(runs[-1]))
        writing.append(any((runs[-1] / "checkpoints").glob("*tmp*")))

    span, results = float((reference / "seconds").read_text()), []
    for _ in torment(log, make, "M parameters", span, times, rng, killed):
        results.append(equal(restored(reference, STEPS), restored(runs[-1], STEPS)))
    during = f"{sum(writing)} of them during a checkpoint's writing"
    return f"at most {max(lost)} steps (checkpoints every {EVERY}); {during}", summary(results)


def summary(results: list[str]) -> str:
    return "; ".join(f"{count} x {result}" for result, count in collections.Counter(results).items())


def killed_and_undisturbed(log, make, arrays, marker: str, times: int, rng) -> str:
    """Whether `arrays()` after what `make()` starts are those of an undisturbed one, however often it was killed."""
    began, results = time.monotonic(), []
    ended(log, start(log, *make()))
    span, undisturbed = (time.monotonic() - began) / 2, arrays()
    for _ in torment(log, make, marker, span, times, rng, lambda: None):
        results.append(equal(undisturbed, arrays()))
    return summary(results)


def killed_ems(folder, times, rng):
    reference, log, runs = whole(folder), folder / "log", []

    def make():
        runs.append(folder / f"ems{len(runs)}")
        shutil.copytree(reference, runs[-1], ignore=shutil.ignore_patterns("ems"))
        return ["-c", EMS_SAVING_OFTEN, f"--workdir={runs[-1]}"]

    arrays = lambda: [value for path in (runs[-1] / "ems").glob("*.moments") for value in arrays_of(path)]
    result = killed_and_undisturbed(log, make, arrays, "evaluations of", times, rng)
    return "what was done since it saved: every 30 s (0.2 s in this test), more rarely on slow disks", result


def killed_sampling(folder, times, rng):
    reference, log, names = whole(folder), folder / "log", []

    def make():
        names.append(f"samples{len(names)}")
        sizes = ["--num_samples=50000", "--batch_size=200", "--solver=ddim", "--steps=10"]
        return ["sample.py", f"--workdir={reference}", *sizes, f"--name={names[-1]}"]

    arrays = lambda: arrays_of(reference / "samples" / names[-1] / "samples.npz")
    return "at most the batch at work", killed_and_undisturbed(log, make, arrays, "evaluations each", times, rng)


def killed_evaluation(folder, times, rng):
    reference, log, runs = whole(folder), folder / "log", []
    network = ["--dataset=digits", "--name=digits", "--image_size=8", "--num_channels=1", "--epochs=1"]
    ended(log, start(log, "-m", "tools.train_features", *network, f"--folder={folder}"))

    def make():
        runs.append(folder / f"evaluation{len(runs)}")
        shutil.copytree(reference, runs[-1], ignore=shutil.ignore_patterns("eval", "samples"))
        what = ["--metrics=fid", f"--network={folder / 'resnet20_digits.npz'}", "--num_samples=50000"]
        return ["evaluate.py", f"--workdir={runs[-1]}", *what, "--solver=ddim", "--steps=10"]

    def found():
        (row,) = json.loads((runs[-1] / "eval" / "report.json").read_text())["fid"]
        return [np.array([row[name] for name in ("frechet", "kernel", "precision", "recall")])]

    return "at most the batch at work", killed_and_undisturbed(log, make, found, "features:", times, rng)


def damaged_checkpoints(folder, times, rng):
    reference, results = whole(folder), []
    right = {step: restored(reference, step) for step in (STEPS - EVERY, STEPS)}
    copy = folder / "damaged"
    for i in range(times):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(reference, copy)
        files = sorted(path for path in (copy / "checkpoints" / str(STEPS)).rglob("*") if path.is_file())
        programs.damage(files[rng.integers(len(files))], programs.DAMAGES[i % len(programs.DAMAGES)], rng)
        with contextlib.redirect_stdout(io.StringIO()):
            step, arrays = checkpoint.Checkpoints(copy).last(lambda step: restored(copy, step))
        where = "the last one, whose damage does not matter" if step == STEPS else "the one before"
        results.append(f"{where}, {equal(arrays, right[step])}")
    said_by = ended(folder / "log", start(folder / "log", "train.py", f"--workdir={copy}"))
    assert ("passed over" in said_by) == (step != STEPS), said_by
    results.append(f"trained on from there: {equal(restored(copy, STEPS), right[STEPS])}")
    return f"{EVERY} steps where the last is passed over", summary(results)


def difference(one: pathlib.Path, two: pathlib.Path) -> str:
    pairs = zip(restored(one, STEPS), restored(two, STEPS), strict=True)
    return f"largest difference {max(np.abs(a - b).max() for a, b in pairs):.1e} (the order of sums)"


def dead_process(folder, times, rng):
    """One of several processes is killed; the job goes on with another number of processes and devices."""
    reference, log, workdir = whole(folder), folder / "log", folder / "several"
    waits, codes = [], collections.Counter()
    layouts = [(4, 1), (2, 2), (2, 1)]
    for i in range(times):
        processes, devices = layouts[i % len(layouts)]
        begun = last_step(workdir)
        started = start(log, "train.py", *TINY, f"--workdir={workdir}", processes=processes, devices=devices)
        wait_until(lambda: last_step(workdir) > begun, started)
        victim = started[rng.integers(processes)]
        victim.kill()
        killed = time.monotonic()
        for process in started:
            process.wait(120)
        waits.append(time.monotonic() - killed)
        codes.update(process.returncode for process in started if process is not victim)
    ended(log, start(log, "train.py", f"--workdir={workdir}"))
    return (
        f"at most {EVERY} steps; the others ended within {max(waits):.1f} s with exit codes {dict(codes)}",
        difference(reference, workdir),
    )


def stopped_process(folder, times, rng):
    """SIGTERM reaches one of two processes: both save and stop at the same step."""
    reference, log, workdir = whole(folder), folder / "log", folder / "stopped"
    for i in range(times):
        begun = last_step(workdir)
        started = start(log, "train.py", *TINY, f"--workdir={workdir}", processes=2)
        wait_until(lambda: last_step(workdir) > begun, started)
        started[i % 2].send_signal(signal.SIGTERM)
        told = ended(log, started, code=128 + signal.SIGTERM)
        assert f"stopped at step {last_step(workdir)}" in told, told
    ended(log, start(log, "train.py", f"--workdir={workdir}", processes=2))
    return "nothing", difference(reference, workdir)


def late_process(folder, times, rng):
    """One of two processes comes to the first step long after the other, as when it alone has to compile."""
    reference, log, workdir = whole(folder), folder / "log", folder / "late"
    for i in range(times):
        begin = ["-c", TRAINING_LATE, *TINY, f"--config.training.n_iters={STEPS * (i + 1) // times}"]
        ended(log, start(log, *begin, f"--workdir={workdir}", processes=2, devices=1 + i % 2))
    return "nothing: the other waits", difference(reference, workdir)


def other_layouts(folder, times, rng):
    """Every number of processes and devices trains, measures, samples and evaluates as one process with one device."""
    log, steps = folder / "log", 2 * EVERY
    small = ["--config.training.batch_size=16", f"--config.training.n_iters={steps}"]
    ems = ["--config.ems.nodes=22", "--config.ems.num_data=32", "--config.ems.batch_size=16"]

    def made(processes, devices):
        run = folder / f"layout{processes}x{devices}"
        for command in (
            ["train.py", *TINY, *small, *ems],
            ["sample.py", "--solver=dpmv3", "--num_samples=32", "--batch_size=16", "--name=samples"],
            ["evaluate.py", "--metrics=loss"],
        ):
            ended(log, start(log, *command, f"--workdir={run}", processes=processes, devices=devices))
        (statistics,) = (path for path in (run / "ems").glob("*.npz") if "partial" not in path.name)
        loss = json.loads((run / "eval" / "report.json").read_text())["loss"]["mean"]
        return dict(
            parameters=restored(run, steps),
            EMS=arrays_of(statistics),
            samples=[image.astype(int) for image in arrays_of(run / "samples" / "samples" / "samples.npz")],
            loss=[np.array(loss)],
        )

    alone, differences = made(1, 1), collections.defaultdict(float)
    layouts = [(processes, devices) for processes in (1, 2, 4) for devices in (1, 2, 4)]
    for processes, devices in layouts[1 : 1 + times]:
        for what, arrays in made(processes, devices).items():
            found = max(np.abs(a - b).max() for a, b in zip(arrays, alone[what], strict=True))
            differences[what] = max(differences[what], float(found))
    told = ", ".join(f"{what} {value:.1e}" for what, value in differences.items())
    return "nothing", f"after {steps} steps: largest differences: {told}"


FAULTS = {
    "train": ("`kill -9` of a training", killed_training, 50),
    "ems": ("`kill -9` of `python -m ems`", killed_ems, 10),
    "sample": ("`kill -9` of `sample.py`", killed_sampling, 10),
    "evaluate": ("`kill -9` of `evaluate.py --metrics=fid`", killed_evaluation, 10),
    "damage": ("a damaged last checkpoint", damaged_checkpoints, 100),
    "dead": ("`kill -9` of one process of 4 or 2, resumed by another number", dead_process, 6),
    "stop": ("SIGTERM to one process of 2", stopped_process, 4),
    "late": (f"one process of 2 comes to the first step {LATE} seconds late", late_process, 2),
    "layouts": ("other layouts: 1, 2, 4 processes with 1, 2, 4 devices each", other_layouts, 8),
}
FAULT = flags.DEFINE_list("fault", list(FAULTS), "Which of them.")
TIMES = flags.DEFINE_integer("times", None, "How often each; as in the table of docs/reliability.md if absent.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.")


def main():
    rng = np.random.default_rng(SEED.value)
    print("| fault | times | work lost | result |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in FAULT.value:
            title, fault, times = FAULTS[name]
            times = times if TIMES.value is None else TIMES.value
            lost, result = fault(pathlib.Path(folder), times, rng)
            print(f"| {title} | {times} | {lost} | {result} |", flush=True)


if __name__ == "__main__":
    program.run(main)
