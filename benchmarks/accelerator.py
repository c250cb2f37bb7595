"""One page about one accelerator: how exact results are on it, and how fast they come.

    python -m benchmarks.accelerator [--minutes=5] [--parts=times,differences] [--profile=FOLDER]
        [--config=configs/vp/cifar10_ddpmpp_continuous.py] [--batches=128,256,512]

Prints markdown. For --minutes programs compile, the most telling first and none after two thirds of that time; then
whatever is compiled is timed, one thing after another. What is not is named: a second call finds what the first has
compiled in the cache.
`python -m benchmarks.accelerator_peer 256` times a U-Net of like size under PyTorch.
"""

import functools
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timed
from ems import estimate, statistics
from experiments import runs, samplers
from experiments.build import diffusion_of
from experiments.program import config_flag, config_of, path_flag, run
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError, one_line
from solvers import SOLVERS, probability_flow, tableau

CONFIG = config_flag()
MINUTES = flags.DEFINE_float("minutes", 5.0, "Time to compile; what is compiled then is timed.", lower_bound=0)
PARTS = flags.DEFINE_list("parts", ["times", "differences"], "What is to be on the page.")
BATCHES = flags.DEFINE_list("batches", ["128", "256", "512"], "Images of a training step; the second of the rest.")
PROFILE = path_flag("profile", None, "A folder for traces of every row, by XLA's profiler.")
PACKED = "pretrained/fashion_mnist"
EVALUATIONS = 10  # of each solver
NODES = 2  # of EMS in one call
STEPS_PER_CALL = 10
THREADS = 3  # that compile
LATEST = 1 / 3  # of the time to compile must be left for a program to be begun: one that compiles disturbs the timing
PRODUCT = 8192  # side of the matrices whose product is the peak
COPIED = 2**30  # bytes of the copy that tells the memory's


def main():
    batches = checked_flags()
    began = time.monotonic()
    left = lambda: max(0.0, began + 60 * MINUTES.value - time.monotonic())
    print(f"# {jax.devices()[0].device_kind}\n")
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {jax.device_count()} device(s), ", end="")
    print(f"{os.cpu_count()} CPU cores; the first device alone is timed\n", flush=True)
    beside = [Beside(differences)] if "differences" in PARTS.value else []
    works = all_works(*batches) if "times" in PARTS.value else {}
    compiled = compile_all(works, left, 60 * MINUTES.value * LATEST)
    for part in beside:
        part.join(left())
        print("\n".join(part.lines), flush=True)
        if part.is_alive():
            print(f"\nThe rest was not done in {MINUTES.value:g} minutes.\n", flush=True)
    if works:
        times(compiled, operations(experiment_of()), PROFILE.value)
        if missing := [name for name in works if name not in compiled]:
            print(f"\nNot compiled in {MINUTES.value:g} minutes: {'; '.join(missing)}.")
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    os._exit(0)  # what still compiles would be waited for


def checked_flags() -> list[int]:
    """The sizes of --batches; UserError for them and for --parts."""
    for name in PARTS.value:
        if name not in PARTS.default:
            raise UserError(f"--parts={name}: choose among {','.join(PARTS.default)}")
    if len(BATCHES.value) < 2 or not all(text.isdecimal() and int(text) >= 4 for text in BATCHES.value):
        raise UserError(f"--batches={','.join(BATCHES.value)}: expected two or more sizes from 4 on, as in 128,256")
    return [int(text) for text in BATCHES.value]


class Beside(threading.Thread):
    """A part of the page that comes about beside the compilations, line by line; its failure is a line too."""

    def __init__(self, lines_of: Callable[[], Iterator[str]]):
        super().__init__(daemon=True)
        self.lines_of, self.lines = lines_of, []
        self.start()

    def run(self):
        try:
            for line in self.lines_of():
                self.lines.append(line)
        except Exception as error:  # it must not cost the other parts
            self.lines.append(f"\n{type(error).__name__}: {one_line(error)}")


# ------------------------------------------------------------------------------------------------ times


class Work(NamedTuple):
    """What is timed: a jitted function with one or several arguments of the same shapes."""

    function: Callable
    calls: dict[str, tuple]  # row of the table -> arguments
    images: int  # that a call takes through a step, or through the network
    precision: str
    passes: int | None = None  # forward passes' worth of operations for each of these images, where that is known
    donated: bool = False  # the first argument, for which the first result is the next
    evaluations: Callable = lambda result: 1  # of each image by the network


class Compiled(NamedTuple):
    """A work with its program, and the seconds that it took to compile."""

    work: Work
    program: Callable
    seconds: float


def config_with(**changes):
    """The config of --config, or the published CIFAR-10 one, with fields of the network changed."""
    if flags.FLAGS["config"].present:
        config = config_of(CONFIG).copy_and_resolve_references()
    else:
        from configs.vp import cifar10_ddpmpp_continuous

        config = cifar10_ddpmpp_continuous.get_config()
    with config.unlocked():
        config.model.update(changes)
    return config


def experiment_of(**changes) -> Diffusion:
    """The model of `config_with`."""
    return diffusion_of(config_with(**changes))


def all_works(small: int, middle: int, *large: int) -> dict[str, Callable[[], Work]]:
    """What is compiled and timed, the most telling first; to be made by the thread that compiles it.

    Arguments: images of a training step, of which `middle` are the batch of the rest too.
    """
    bfloat16 = dict(dtype="bfloat16")
    several = dict(count=STEPS_PER_CALL)
    list_of = [
        functools.partial(training, middle, "bfloat16", bfloat16),
        functools.partial(training, middle, "default", {}),
        functools.partial(forward, middle, "default", {}),
        functools.partial(sampling, middle, "default", {}),
        functools.partial(measuring, middle, "highest", {}),
        functools.partial(forward, middle, "bfloat16", bfloat16),
        functools.partial(forward, middle, "highest", {}),
        functools.partial(training, middle, "bfloat16", bfloat16, **several),
        functools.partial(likelihood, middle // 4, "highest", {}),
        functools.partial(training, small, "bfloat16", bfloat16),
        functools.partial(training, small, "default", {}),
    ]
    for batch in large:
        list_of.append(functools.partial(training, batch, "bfloat16", bfloat16))
        list_of.append(functools.partial(training, batch, "bfloat16", bfloat16 | dict(remat=True)))
    return {f"{make.func.__name__} {make.args} {make.keywords or ''}".strip(): make for make in list_of}


def some_params(experiment):
    """Parameters of the size of trained ones, without the compilation that drawing them as published takes."""
    rng = np.random.default_rng(0)
    fan_in = lambda leaf: max(1, np.prod(leaf.shape[:-1]))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.float32(fan_in(leaf)) ** 0.5),
        jax.eval_shape(experiment.init, jax.random.key(0)),
    )


def some_images(experiment, batch: int):
    return jax.random.normal(jax.random.key(0), (batch, *experiment.space.shape))


def training(batch: int, precision: str, changes: dict, count: int = 1) -> Work:
    config = config_with(**changes)
    experiment = diffusion_of(config)
    step, state = timed.training_step(config, experiment, some_params(experiment))
    blank = timed.blank(experiment, np.tile(np.arange(batch), (count, 1)))
    random = np.random.default_rng(0).integers(0, 256, blank["image"].shape, np.uint8)
    batches = jax.device_put(blank | {"image": random})
    more = [f"{count} steps a call"] * (count > 1) + ["remat"] * bool(changes.get("remat"))
    name = ", ".join(["training step", precision, f"batch {batch}", *more])
    function = jax.jit(step, donate_argnums=0)
    return Work(function, {name: (state, batches, 0)}, batch * count, precision, 3, donated=True)


def forward(batch: int, precision: str, changes: dict) -> Work:
    experiment = experiment_of(**changes)
    function = jax.jit(at(precision, lambda params, x, t: experiment.noise_of(params)(x, t)))
    arguments = some_params(experiment), some_images(experiment, batch), jnp.full((batch,), 0.5)
    return Work(function, {f"forward, {precision}, batch {batch}": arguments}, batch, precision, 1)


def at(precision: str, function: Callable) -> Callable:
    """The function with its products of float32 in that precision, "highest" or JAX's default."""

    def precise(*arguments):
        with jax.default_matmul_precision("highest" if precision == "highest" else None):
            return function(*arguments)

    return precise


def sampling(batch: int, precision: str, changes: dict) -> Work:
    """All few-step solvers that draw no noise: one program, of which the table is an argument."""
    experiment = experiment_of(**changes)
    params, x = some_params(experiment), some_images(experiment, batch)
    times = experiment.sde.t_min, experiment.sde.t_max
    tables = {
        name: build(
            experiment.sde, EVALUATIONS, **({"ems": timed.flat_ems(experiment, times)} if name == "dpmv3" else {})
        )
        for name, build in SOLVERS.items()
        if name != "pndm"  # it needs 12 evaluations
    }
    tables = {name: table for name, table in tables.items() if table.noise is None}
    history = max(table.history for table in tables.values())
    calls = {}
    for name, table in tables.items():
        table = jax.tree.map(jnp.float32, tableau.uniform(table, history, experiment.space.shape))
        calls[f"{name}, {EVALUATIONS} evaluations, {precision}, batch {batch}"] = params, table, x
    function = jax.jit(lambda params, table, x: tableau.solve(experiment.noise_of(params), table, x))
    return Work(function, calls, batch, precision, 1, evaluations=lambda result: EVALUATIONS)


def measuring(batch: int, precision: str, changes: dict) -> Work:
    experiment = experiment_of(**changes)
    node = jax.tree.map(jnp.float32, estimate.nodes(experiment.sde, NODES - 1))
    function = jax.jit(
        lambda params, node, x: estimate.measure(
            experiment.noise_of(params), node, np.arange(NODES), jax.random.key(0), x, np.arange(batch)
        )
    )
    calls = {
        f"EMS of a node, {precision}, batch {batch}": (some_params(experiment), node, some_images(experiment, batch))
    }
    return Work(function, calls, batch, precision, evaluations=lambda result: NODES)


def likelihood(batch: int, precision: str, changes: dict) -> Work:
    experiment = experiment_of(**changes)
    x = some_images(experiment, batch)
    probe = probability_flow.rademacher(jax.random.key(1), 1, x.shape)
    function = jax.jit(
        lambda params, x: probability_flow.log_likelihood(
            experiment.noise_of(params), experiment.sde, x, probe, rtol=1e-1, atol=1e-1
        )[::2]
    )
    calls = {f"likelihood, one evaluation, {precision}, batch {batch}": (some_params(experiment), x)}
    return Work(function, calls, batch, precision, evaluations=lambda result: int(result[1].evaluations))


def compile_all(
    works: dict[str, Callable[[], Work]], left: Callable[[], float], latest: float = 0.0
) -> dict[str, Compiled]:
    """The works that compile in the seconds left, some at once and in their order; none is begun in the `latest`."""
    waiting, compiled, done = queue.SimpleQueue(), {}, queue.SimpleQueue()
    for item in works.items():
        waiting.put(item)

    def work():
        while left() > latest:
            try:
                name, make = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((name, compile_one(make)))
            except Exception as error:  # memory may not suffice for one of them
                print(f"{name}: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
                done.put((name, None))

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    for _ in works:
        try:
            name, result = done.get(timeout=left())
        except queue.Empty:
            break
        compiled |= {} if result is None else {name: result}
        print(f"{name}: {'failed' if result is None else f'compiled in {result.seconds:.0f} s'}", file=sys.stderr)
    return {name: compiled[name] for name in works if name in compiled}


def compile_one(make: Callable[[], Work]) -> Compiled:
    began = time.monotonic()
    work = make()
    program = work.function.lower(*next(iter(work.calls.values()))).compile()
    return Compiled(work, program, time.monotonic() - began)


def operations(experiment) -> float:
    """Operations of a forward pass, an image, as XLA counts them for a CPU: a GPU's convolutions it does not count."""
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.eval_shape(experiment.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, *experiment.space.shape), jnp.float32)
        forward = jax.jit(lambda params, x: experiment.noise_of(params)(x, jnp.full((1,), 0.5)))
        return timed.operations(forward, params, x)


def peaks() -> float:
    """Operations per second of a product in bfloat16; prints those of other types and the bytes that a copy moves."""
    rates = {}
    for name, dtype, precision in (
        ("bfloat16", "bfloat16", None),
        ("float32, default", "float32", None),
        ("float32, highest", "float32", "highest"),
    ):
        a, b = jax.random.normal(jax.random.key(0), (2, PRODUCT, PRODUCT), dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        rates[name] = 2 * PRODUCT**3 / steadily(lambda: product(a, b))
    big = jnp.arange(COPIED // 4, dtype=jnp.float32)
    negative = jax.jit(jnp.negative)
    moved = 2 * COPIED / steadily(lambda: negative(big))
    shown = "; ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    print(f"## Times\n\nProducts of matrices of side {PRODUCT} in TFLOP/s: {shown}; a copy: {moved / 1e12:.3g} TB/s.\n")
    return rates["bfloat16"]


def steadily(call: Callable, target: float = 0.6) -> float:
    """Median seconds of a call among those that are sent without waiting for one another."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, min(200, round(target / 3 / (time.perf_counter() - began))))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(count):
            result = call()  # the results before are let go
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - began) / count)
    return float(np.median(seconds))


def times(compiled: dict[str, Compiled], operations: float, profile: str | None = None):
    """Print the table of what is compiled: each image's share, and in forward passes of the same precision.

    operations: of a forward pass, an image. profile: a folder for traces of every row.
    """
    peak, forwards, rows, calls = peaks(), {}, [], {}
    for work, program, seconds in compiled.values():
        for name, arguments in work.calls.items():
            call = stepping(program, *arguments) if work.donated else functools.partial(program, *arguments)
            calls[name] = call
            duration = steadily(call)
            images = work.images if work.donated else work.images * work.evaluations(call())
            if name.startswith("forward"):
                forwards[work.precision] = duration / images
            rows.append((name, work, images, duration, seconds))
    print("| | images/s | ms | GFLOP an image | TFLOP/s | of the bfloat16 peak | forwards | seconds to compile |")
    print("|---|---|---|---|---|---|---|---|")
    for name, work, images, duration, seconds in rows:
        counted = " | | "
        if work.passes:
            rate = work.passes * operations * images / duration
            counted = f"{work.passes * operations / 1e9:.1f} | {rate / 1e12:.3g} | {rate / peak:.2f}"
        forward = f"{duration / images / forwards[work.precision]:.2f}" if work.precision in forwards else ""
        print(f"| {name} | {images / duration:.0f} | {1000 * duration:.2f} | {counted} | {forward} | {seconds:.0f} |")
    sys.stdout.flush()
    if profile:
        for number, call in enumerate(calls.values(), 1):
            with jax.profiler.trace(os.path.join(profile, f"row{number}")):
                jax.block_until_ready([call() for _ in range(3)])


def stepping(program: Callable, state, *inputs) -> Callable:
    """The next step of a training, which takes the state of the one before; its loss."""

    def call():
        nonlocal state
        state, metrics = program(state, *inputs)
        return metrics["loss"]

    return call


# ------------------------------------------------------------------------------------------------ differences


def differences() -> Iterator[str]:
    """How far the device's results of the packed model are from those of the CPU in float32, by precision."""
    model = runs.open_model(PACKED)
    with jax.default_device(jax.devices("cpu")[0]):
        truth = results(model, "highest")
    yield "## Differences from the CPU\n"
    yield f"Results of {PACKED}, relative to the root mean square of the CPU's in float32; bits/dim as they are.\n"
    yield "| | " + " | ".join(truth) + " |"
    yield "|---" * (len(truth) + 1) + "|"
    for name, precision, dtype in (
        ("float32, highest", "highest", "float32"),
        ("float32, default", "default", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ):
        here = results(model, precision, dtype)
        differ = lambda key: here[key] - truth[key] if key == "bits/dim" else relative(here[key], truth[key])
        yield f"| {name} | " + " | ".join(f"{differ(key):.1e}" for key in truth) + " |"
    yield ""


def relative(value, truth) -> float:
    return samplers.rms(value - truth) / samplers.rms(truth)


def results(model, precision: str, dtype: str = "float32") -> dict:
    """The noise, EMS, samples of DPM-Solver-v3 and bits/dim of a packed model."""
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = dtype
    experiment = diffusion_of(config)
    noise, n = experiment.noise_of, 16
    key = jax.random.key(7)
    z = jax.random.normal(key, (n, *experiment.space.shape))
    t = jnp.linspace(0.02, 1.0, n)
    ems = statistics.load(f"{PACKED}/ems.npz")
    table = jax.tree.map(np.float32, SOLVERS["dpmv3"](experiment.sde, EVALUATIONS, ems=ems._replace(origin={})))
    node = jax.tree.map(lambda values: np.float32(values[1::2]), estimate.nodes(experiment.sde, 6))
    precise = lambda function: jax.jit(at(precision, function))
    eps = precise(lambda params, x: noise(params)(x, t))(model.params, z)
    x = precise(lambda params, x: tableau.solve(noise(params), table, x))(model.params, z)
    moments = precise(lambda params, x: estimate.measure(noise(params), node, np.arange(3), key, x, np.arange(n)))(
        model.params, jnp.clip(x, -1, 1)
    )
    probe = probability_flow.rademacher(key, 1, x.shape)
    log_p = precise(
        lambda params, x: probability_flow.log_likelihood(
            noise(params), experiment.sde, x, probe, rtol=1e-4, atol=1e-4, t_min=1e-3
        )[0]
    )(model.params, jnp.round(jnp.clip(x, -1, 1) * 127.5) / 127.5)
    bits = -np.asarray(log_p).mean() / x[0].size / np.log(2) + 7
    found = {"noise": eps, "l": moments.w, "mean of f'": moments.mean[:, 1], "samples": x}
    return {name: np.asarray(value, np.float64) for name, value in found.items()} | {"bits/dim": float(bits)}


if __name__ == "__main__":
    run(main)
