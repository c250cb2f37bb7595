"""Time the network, the training step, EMS and sampling of a config, as ratios to one forward pass of the same run.

    python -m benchmarks.run [--config=configs/benchmark.py] [--repeats=7] [--config.x.y=...]

Each figure is the median of --repeats calls after a first one that compiles.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import experiment as experiments
from ems import estimate
from score_sde import training
from solvers import tableau
from solvers.dpm_solver import ddim, dpm_solver_pp

CONFIG = experiments.config_flag()
REPEATS = flags.DEFINE_integer("repeats", 7, "Calls timed of each.", lower_bound=1)
STEPS = 10


def seconds(function, *arguments) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS.value):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main():
    config = experiments.config_of(CONFIG)
    experiment = experiments.build(config)
    batch_size = config.training.batch_size
    params = experiment.init_params(0)
    x = jax.random.normal(jax.random.key(0), (batch_size, *experiment.image_shape))
    t = jnp.full((batch_size,), 0.5)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{size / 1e6:.2f} M parameters, images {experiment.image_shape}, batch {batch_size}, {jax.default_backend()}"
    )

    forward = seconds(jax.jit(lambda params, x, t: experiment.noise_of(params)(x, t)), params, x, t)
    show("forward", forward, forward, batch_size)

    optimizer = training.make_optimizer(**config.optim)
    step = training.make_step(experiment.loss(), optimizer, 0, ema_rate=0.999, ema_warmup=False)
    batch = {
        "image": np.zeros((1, batch_size, *experiment.image_shape), np.uint8),
        "label": np.zeros((1, batch_size), np.int32),
        "index": np.arange(batch_size)[None],
    }
    show("training step", seconds(jax.jit(step), training.init_state(params, optimizer), batch), forward, batch_size)

    nodes = estimate.nodes(experiment.sde, 3)
    measure = jax.jit(
        lambda params, node, x: estimate.measure(
            experiment.noise_of(params), node, np.arange(4), jax.random.key(0), x, np.arange(batch_size)
        )
    )
    node = jax.tree.map(np.float32, nodes)
    show("EMS, one node", seconds(measure, params, node, x) / 4, forward, batch_size)
    two_pass = jax.jit(functools.partial(published_two_pass, experiment))
    show("EMS, one node, in the published two passes", seconds(two_pass, params, x, t), forward, batch_size)

    solve = jax.jit(lambda params, table, x: tableau.solve(experiment.noise_of(params), table, x))
    for name, table in (
        ("DDIM", ddim(experiment.sde, STEPS)),
        ("DPM-Solver++ 3M", dpm_solver_pp(experiment.sde, STEPS, order=3)),
    ):
        table = jax.tree.map(np.float32, tableau.uniform(table, 4, experiment.image_shape))
        show(f"{name}, one of {STEPS} evaluations", seconds(solve, params, table, x) / STEPS, forward, batch_size)
    print(f"compilations for these solvers: {solve._cache_size()}")


def show(name: str, duration: float, forward: float, images: int):
    print(f"{name:45s} {duration:8.4f} s {images / duration:9.0f} images/s {duration / forward:6.2f} forwards")


def published_two_pass(experiment, params, x, t):
    """What the published EMS procedure evaluates per node: a jvp for l; then a forward and a jvp for f and f'."""
    noise = experiment.noise_of(params)
    jvp_of_l = jax.jvp(lambda x: noise(x, t), (x,), (jnp.ones_like(x),))[1]
    later = x + 0.1  # the second pass draws other noise
    eps = noise(later, t)
    along_ode = jax.jvp(noise, (later, t), (later - eps, jnp.ones_like(t)))[1]
    return jvp_of_l, eps, along_ode


if __name__ == "__main__":
    experiments.run(main)
