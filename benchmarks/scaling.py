"""Time the training step on the devices of all processes that run this, as rows of a table.

    python -m benchmarks.scaling --config=configs/benchmark.py [--repeats=7] [--config.x.y=...]

Started like train.py, on one device, several, or by several processes (docs/pods.md). Strong scaling divides the
config's batch over all devices, weak scaling gives that batch to each. The first step traces and compiles: add
--compilation_cache=off to time that.
"""

import time

import jax
from absl import flags

from benchmarks import timed
from experiments import build, program

CONFIG = program.config_flag()
REPEATS = flags.DEFINE_integer("repeats", 7, "Steps timed of each.", lower_bound=1)


def main():
    config = program.config_of(CONFIG)
    diffusion = build.diffusion_of(config)
    batch = config.training.batch_size
    print(
        "| processes | devices of each | batch | first step | seconds of a step | images/s |\n|---|---|---|---|---|---|"
    )
    for size in dict.fromkeys((batch, batch * jax.device_count())):
        step = timed.parallel_step(config, diffusion, size)
        began = time.perf_counter()
        jax.block_until_ready(step())
        first = time.perf_counter() - began
        seconds = timed.seconds(step, REPEATS.value)
        layout = f"{jax.process_count()} | {jax.local_device_count()}"
        print(f"| {layout} | {size} | {first:.1f} | {seconds:.3f} | {size / seconds:.0f} |", flush=True)


if __name__ == "__main__":
    program.run(main)
