"""What the studies share: flags, samples from the same noises, their features, and where results are kept."""

import json
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags

from experiments import program, quality, report, runs, samplers
from score_sde import VERSION, files, parallel
from score_sde.errors import UserError
from score_sde.metrics import distances, features
from solvers import tableau
from solvers.dpm_solver import dpm_solver_pp

WORKDIR = flags.DEFINE_list("workdir", None, "The run folders; the newest under runs/ if absent.")
STEPS = flags.DEFINE_list("steps", ["5", "6", "8", "10", "12", "15", "20"], "Network evaluations.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 256, "Noises that everything starts from.", lower_bound=2)
SEEDS = flags.DEFINE_integer("seeds", 3, "Repeats with other noise.", lower_bound=2)
NETWORK = program.path_flag("network", None, "Weights of the feature network; those of the data set if absent.")

FOLDER = runs.RUNS / "benchmarks"
BATCH = 256  # samples at a time


def models() -> Iterator[runs.Model]:
    """The models of --workdir."""
    return map(runs.open_model, [program.path_of(path) for path in WORKDIR.value or ()] or [None])


def steps() -> list[int]:
    """The numbers of --steps."""
    return [int(text) for text in STEPS.value]


def from_noises(model: runs.Model, seed: int, n: int) -> Callable:
    """tableau -> samples (n, H, W, C) in the data range, from the same n noises each time."""
    size = parallel.round_up(min(n, BATCH))
    sample = samplers.sampler(model.diffusion, model.params, seed)

    def solve(table: tableau.Tableau) -> np.ndarray:
        return np.concatenate([sample(table, np.arange(i, i + size)) for i in range(0, n, size)])[:n]

    return solve


def fine_solution(model: runs.Model, part: int = 1) -> tableau.Tableau:
    """The solver that others are compared with, in 1 / part of its evaluations."""
    return dpm_solver_pp(model.diffusion.sde, model.config.eval.fine_steps // part, order=2)


def feature_network(model: runs.Model) -> features.FeatureNetwork:
    """The network of --network, or the local one of the model's data set, of this package or in runs/."""
    name = features.local_name(model.config.data.dataset)
    own = features.local_networks().get(name, runs.RUNS / f"{name.replace('-', '_', 1)}.npz")
    if NETWORK.value is None and not own.exists():
        raise UserError(f"no feature network {own}: train it by python -m tools.train_features with --folder=runs")
    return features.local(NETWORK.value or own)


def reference_and_floor(model: runs.Model, network: features.FeatureNetwork) -> tuple[features.Statistics, float, int]:
    """Statistics of the training images; the Frechet distance of all test images to them, and their number."""
    train, test = (quality.data_statistics(model.config, network, split)[0] for split in ("train", "test"))
    return train, distances.frechet_distance(test.mean, test.covariance, train.mean, train.covariance), test.n


def of_samples(model: runs.Model, network: features.FeatureNetwork, x: np.ndarray) -> features.Measured:
    """Features of samples x (n, H, W, C) in the data range."""
    images = np.asarray(model.diffusion.space.decode(x))
    return features.measure(network, lambda start, stop: images[start:stop], len(images), batch_size=BATCH)


def rows(corner: str, columns, cells: dict[str, list]) -> list[str]:
    """Lines of a markdown table; numbers to four figures, a dash for None."""
    shown = lambda value: "-" if value is None else value if isinstance(value, str) else f"{value:#.4g}"
    return [*report.table([corner, *columns], [[name, *map(shown, row)] for name, row in cells.items()]), ""]


def write(name: str, lines: list[str], new: list[str], record: dict):
    """Print `new`, the last lines of markdown; keep all lines and the record in runs/benchmarks/."""
    command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
    record = record | dict(command=command, versions=dict(score_sde=VERSION, jax=jax.__version__))
    files.write(FOLDER / f"{name}.md", "\n".join([f"`{command}`", "", *lines]))
    files.write(FOLDER / f"{name}.json", json.dumps(record, indent=2) + "\n")
    print("\n".join(["", *new, f"wrote {FOLDER}/{name}.md and .json"]))
