"""Time what a config computes, each as a ratio to one forward pass and to this machine's peaks, all in one run.

    python -m benchmarks.run --config=configs/benchmark.py [--repeats=7] [--config.x.y=...]

Each figure is the median of --repeats calls after a first one that compiles. The peaks are those of a matrix product
and of a 3x3 convolution, measured first: a slower hour of the machine lowers both. The network's rows tell
the share of the convolution peak that its floating-point operations, as XLA counts them, reach. Prints markdown.
"""

import functools
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timed
from ems import estimate
from experiments import program, samplers
from experiments.build import diffusion_of
from score_sde import data, parallel
from solvers import SOLVERS, probability_flow, tableau

CONFIG = program.config_flag()
REPEATS = flags.DEFINE_integer("repeats", 7, "Calls timed of each.", lower_bound=1)
STEPS = 12  # network evaluations of each solver


def seconds(function, *arguments) -> float:
    return timed.seconds(functools.partial(function, *arguments), REPEATS.value)


def main():
    # ------------------------------------------------------------------------------ what is timed, and on what
    config = program.config_of(CONFIG)
    diffusion = diffusion_of(config)
    batch_size = config.training.batch_size
    parallel.batch_per_device(batch_size)
    params = diffusion.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(0), (batch_size, *diffusion.space.shape))
    t = jnp.full((batch_size,), 0.5)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}, jax {jax.__version__}")
    print(
        f"{size / 1e6:.2f} M parameters, images {diffusion.space.shape}, batch {batch_size}, one device where not said"
    )

    # ------------------------------------------------------------------------------ the machine
    square = jnp.ones((2048, 2048))
    convolve, maps, kernel, in_convolution = timed.convolution()
    product = 2 * square.size * len(square) / seconds(jax.jit(jnp.matmul), square, square)
    convolution = in_convolution / seconds(convolve, maps, kernel)
    print(f"peaks: matrix product {product / 1e9:.0f} GFLOP/s, 3x3 convolution {convolution / 1e9:.0f} GFLOP/s\n")
    print("| | seconds | images/s | forwards | GFLOP | of the convolution peak |\n|---|---|---|---|---|---|")

    # ------------------------------------------------------------------------------ the work
    network = jax.jit(lambda params, x, t: diffusion.noise_of(params)(x, t))
    forward = seconds(network, params, x, t)

    def show(name: str, duration: float, flops: float | None = None, images: int = batch_size):
        counted = " | " if flops is None else f"{flops / 1e9:.1f} | {flops / duration / convolution:.2f}"
        print(
            f"| {name} | {duration:.4f} | {images / duration:.0f} | {duration / forward:.2f} | {counted} |", flush=True
        )

    show("forward", forward, timed.operations(network, params, x, t))

    step, state = timed.training_step(config, diffusion)
    step, arguments = jax.jit(step), (state, timed.blank(diffusion, np.arange(batch_size)[None]), 0)
    show("training step", seconds(step, *arguments), timed.operations(step, *arguments))

    if jax.device_count() > 1:  # as train.py and sample.py compute
        devices = f"over {jax.device_count()} devices"
        show(f"forward {devices}", seconds(timed.parallel_forward(diffusion, params, x, t)))
        show(f"training step {devices}", seconds(timed.parallel_step(config, diffusion, batch_size)))

    node = jax.tree.map(np.float32, estimate.nodes(diffusion.sde, 3))
    measure = jax.jit(
        lambda params, node, x: estimate.measure(
            diffusion.noise_of(params), node, np.arange(4), jax.random.key(0), x, np.arange(batch_size)
        )
    )
    show("EMS, one node", seconds(measure, params, node, x) / 4)
    two_pass = jax.jit(functools.partial(published_two_pass, diffusion))
    show("EMS, one node, the published two passes", seconds(two_pass, params, x, t))

    draws = samplers.draws(diffusion, samplers.sample_keys(0, np.arange(batch_size)))
    solve = jax.jit(lambda params, table, x: tableau.solve(diffusion.noise_of(params), table, x, draws))
    times = diffusion.sde.t_min, diffusion.sde.t_max
    tables = {
        name: build(diffusion.sde, STEPS, **({"ems": timed.flat_ems(diffusion, times)} if name == "dpmv3" else {}))
        for name, build in SOLVERS.items()
    }
    history = max(table.history for table in tables.values())  # then all that draw no noise share one program
    for name, table in tables.items():
        table = jax.tree.map(np.float32, tableau.uniform(table, history, diffusion.space.shape))
        show(f"{name}, one of {STEPS} evaluations", seconds(solve, params, table, x) / STEPS)

    probe = probability_flow.rademacher(jax.random.key(1), 1, x.shape)
    likelihood = jax.jit(
        lambda params, x: probability_flow.log_likelihood(
            diffusion.noise_of(params), diffusion.sde, x, probe, rtol=1e-2, atol=1e-2
        )[::2]
    )
    _, run = likelihood(params, x)
    show("likelihood, one evaluation", seconds(likelihood, params, x) / int(run.evaluations))

    # ------------------------------------------------------------------------------ the data
    shape = (50_000, *diffusion.space.shape)
    pictures = np.zeros(shape, np.uint8)
    images = data.Images("zeros", len(pictures), lambda index: {"image": pictures[index]})
    stream = data.Stream(images, batch_size=1024, seed=0)
    show("data in memory, batches of 1024", seconds(lambda: stream.batch(7)["image"]), images=1024)
    print(f"\ncompilations for all solvers: {solve._cache_size()}")


def published_two_pass(diffusion, params, x, t):
    """What the published EMS procedure evaluates per node: a jvp for l; then a forward and a jvp for f and f'."""
    noise = diffusion.noise_of(params)
    jvp_of_l = jax.jvp(lambda x: noise(x, t), (x,), (jnp.ones_like(x),))[1]
    later = x + 0.1  # the second pass draws other noise
    eps = noise(later, t)
    along_ode = jax.jvp(noise, (later, t), (later - eps, jnp.ones_like(t)))[1]
    return jvp_of_l, eps, along_ode


if __name__ == "__main__":
    program.run(main)
