"""Build an average of parameters of any width from the power-function averages that a run kept.

    python -m tools.ema --std=0.08 --workdir=runs/trained --out=runs/trained_ema0.08 [--step=N]

For runs with training.power_ema = (0.05, 0.1): the averages of all checkpoints up to a step, the last by default, are
combined to that of the relative width --std (Karras et al. 2024, sec. 3), and written as a run folder of its own, which
sample.py, evaluate.py and ems take. Checkpoints are kept at multiples of training.keep_freq.
"""

from absl import flags

from experiments import averages, program, runs
from score_sde.errors import UserError

WORKDIR = program.path_flag("workdir", None, "The run folder to read; the newest run if absent.")
OUT = program.path_flag("out", None, "The run folder to write.")
STD = flags.DEFINE_float("std", None, "Relative width of the average, its standard deviation over the steps.")
STEP = flags.DEFINE_integer("step", None, "The step at which it ends; the last if absent.", lower_bound=1)


def main():
    if STD.value is None or not OUT.value:
        raise UserError("give --std, the relative width of the average such as 0.08, and --out=FOLDER")
    averages.write(runs.newest_run() if WORKDIR.value is None else WORKDIR.value, STD.value, OUT.value, STEP.value)


if __name__ == "__main__":
    program.run(main)
