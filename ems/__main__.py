"""Measure the empirical model statistics of a trained model, for DPM-Solver-v3.

    python -m ems [--workdir=runs/digits] [--nodes=120] [--num_data=1024]

Writes <workdir>/ems/step..._nodes..._data....npz and a picture of the curves; a stopped measurement goes on.
"""

from absl import flags

import experiment as experiments

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
NODES = flags.DEFINE_integer("nodes", None, "Intervals of the lam grid; the config's if absent.", lower_bound=2)
NUM_DATA = flags.DEFINE_integer("num_data", None, "Training images; the config's if absent.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time; the config's if absent.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of noise and probes.")


def main():
    model = experiments.open_model(WORKDIR.value, CHECKPOINT.value)
    budget = dict(model.experiment.config.ems)
    for name, flag in (("nodes", NODES), ("num_data", NUM_DATA), ("batch_size", BATCH_SIZE)):
        budget[name] = flag.value or budget[name]
    experiments.measure_ems(model, **budget, seed=SEED.value)


if __name__ == "__main__":
    experiments.run(main)
