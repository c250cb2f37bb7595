"""Time the training step on the devices of all processes that run this, as rows of a table.

    python -m benchmarks.scaling --config=configs/benchmark.py [--repeats=7] [--config.x.y=...]

Started like train.py, on one device, several, or by several processes (docs/pods.md). Strong scaling divides the
config's batch over all devices, weak scaling gives that batch to each. The first step traces and compiles: add
--compilation_cache=off to time that.
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

import experiment as experiments
from benchmarks import timed
from score_sde import parallel

CONFIG = experiments.config_flag()
REPEATS = flags.DEFINE_integer("repeats", 7, "Steps timed of each.", lower_bound=1)


def main():
    config = experiments.config_of(CONFIG)
    experiment = experiments.build(config)
    batch = config.training.batch_size
    print(
        "| processes | devices of each | batch | first step | seconds of a step | images/s |\n|---|---|---|---|---|---|"
    )
    for size in dict.fromkeys((batch, batch * jax.device_count())):
        first, seconds = seconds_of_a_step(experiment, size)
        layout = f"{jax.process_count()} | {jax.local_device_count()}"
        print(f"| {layout} | {size} | {first:.1f} | {seconds:.3f} | {size / seconds:.0f} |", flush=True)


def seconds_of_a_step(experiment: experiments.Experiment, batch: int) -> tuple[float, float]:
    """Times of steps of that global batch: of the first, which compiles, and the median of the others."""
    share = parallel.batch_per_device(batch)
    step, state = timed.training_step(experiment)
    step, state = parallel.pmap(step, in_axes=(0, 0, None), donate_argnums=0), parallel.replicate(state)
    index = parallel.shard(np.arange(batch)).reshape(-1, 1, share)  # (devices, steps, batch per device)
    images = timed.blank(experiment, index)
    times = []
    for number in range(REPEATS.value + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, images, number))
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:])


if __name__ == "__main__":
    experiments.run(main)
