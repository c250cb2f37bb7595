"""The predictor-corrector samplers compared, in the shape of Table 1 of Song et al. 2021.

    python -m benchmarks.samplers --workdir=runs/digits_ve,runs/digits [--n=100] [--num_samples=256] [--seeds=3]

P with N and 2 N steps: the predictor alone; C: 2 N Langevin steps alone; PC: N steps of both. Each entry is the Frechet
distance to the training images in the features of a local network (see benchmarks/few_steps.py), mean and standard
deviation over seeds. The signal-to-noise ratio of the corrector is the config's. The paper takes N = 1000; here it is
100, and a digits model takes six minutes on two free cores.
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from benchmarks import study
from experiments import program, samplers
from score_sde import parallel
from score_sde.metrics import features
from solvers import predictor_corrector

N = flags.DEFINE_integer("n", 100, "N.", lower_bound=25)

PREDICTORS = {
    "ancestral sampling": dict(predictor="ancestral_sampling"),
    "reverse diffusion": dict(predictor="reverse_diffusion"),
    "probability flow": dict(predictor="reverse_diffusion", probability_flow=True),
}
NO_PREDICTOR = dict(predictor="none")
# column: steps, in units of N; corrector
COLUMNS = {"P, N": (1, "none"), "P, 2 N": (2, "none"), "C, 2 N": (2, "langevin"), "PC, N": (1, "langevin")}


def main():
    record, lines = {}, []
    for model in study.models():
        n, num_samples, seeds = N.value, study.NUM_SAMPLES.value, study.SEEDS.value
        network = study.feature_network(model)
        found, floor, floor_images = compared(model, network, n, num_samples, seeds)
        record[str(model.workdir)] = dict(frechet=found, floor=floor, floor_images=floor_images)
        shown = lambda values: f"{np.mean(values):.3g} +- {np.std(values, ddof=1):.2g}"
        cells = {name: [shown(row[column]) for column in COLUMNS] for name, row in found.items()}
        new = [
            f"## {model.name}",
            "",
            f"{type(model.diffusion.sde).__name__}, N = {n}, signal-to-noise ratio "
            f"{model.config.sampling.snr:g}. {network.distance} of {num_samples} samples against the "
            f"training images, mean and standard deviation over {seeds} seeds. {floor_images} test images have "
            f"{floor:.3g}.",
            "",
            *study.rows("predictor", COLUMNS, cells),
        ]
        lines += new
        study.write("samplers", lines, new, record)


def compared(model, network, n: int, num_samples: int, seeds: int):
    """(predictor: column: Frechet distance of each seed, that of the test images, their number)."""
    reference, floor, floor_images = study.reference_and_floor(model, network)
    cells = {name: {} for name in PREDICTORS}
    rows = [(name, column) for name in PREDICTORS for column in COLUMNS if column != "C, 2 N"]
    for name, column in program.progress([*rows, (None, "C, 2 N")], desc=model.workdir.name):
        steps, corrector = COLUMNS[column]
        sample = sampler(model, num_samples, n=steps * n, corrector=corrector, **PREDICTORS.get(name, NO_PREDICTOR))
        found = [features.frechet(study.of_samples(model, network, sample(seed)), reference) for seed in range(seeds)]
        for row in cells if name is None else [name]:  # without a predictor it is the same for all
            cells[row][column] = found
    return cells, floor, floor_images


def sampler(model, num_samples: int, *, n: int, **options) -> Callable:
    """seed -> samples (num_samples, H, W, C), the last means, as published."""
    diffusion, size = model.diffusion, parallel.round_up(min(num_samples, study.BATCH))
    options |= dict(n=n, snr=model.config.sampling.snr)

    def one_device(params, seed, index):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)  # `sample_keys`, traced
        noise, x = diffusion.noise_of(params, diffusion.conditions(index)), samplers.prior(diffusion, keys)
        return predictor_corrector.sample(noise, diffusion.sde, x, samplers.draws(diffusion, keys), **options)

    on_devices, params = parallel.pmap(one_device, in_axes=(0, None, 0)), parallel.replicate(model.params)

    def sample(seed: int) -> np.ndarray:
        starts = range(0, num_samples, size)
        batches = [parallel.gather(on_devices(params, seed, parallel.shard(np.arange(i, i + size)))) for i in starts]
        return np.concatenate(batches)[:num_samples]

    return sample


if __name__ == "__main__":
    program.run(main)
