"""Train a score model or a classifier, or continue a run that was stopped.

python train.py --config=configs/digits.py [--workdir=runs/digits] [--config.training.n_iters=1000]
python train.py --config=configs/classifier/digits.py       at its end, accuracy on test images by noise level
python train.py --workdir=runs/digits
python train.py --config=configs/digits.py --minutes=5      training.n_iters becomes what is done in that time
python train.py --config=configs/digits.py --config.data.dataset=FOLDER --config.training.init=runs/digits --workdir=...
"""

import pathlib

from absl import flags

from experiments import program, runs, trainer
from score_sde.errors import UserError

CONFIG = program.config_flag()
WORKDIR = program.path_flag("workdir", None, "The run folder; runs/<name of the config> if absent.")
MINUTES = flags.DEFINE_float(
    "minutes",
    None,
    "Train for about so long, the cooldown included: sets training.n_iters by the pace.",
    lower_bound=1e-3,
)


def main():
    if CONFIG.value is None and WORKDIR.value is None:
        raise UserError("nothing to train: give --config=configs/digits.py, or --workdir=... to continue a run")
    if CONFIG.value is None:
        workdir = pathlib.Path(WORKDIR.value)
        config = runs.read_config(workdir)
    else:
        config, name = program.config_of(CONFIG), pathlib.Path(program.config_file()).stem
        workdir = pathlib.Path(WORKDIR.value or runs.RUNS / name)
    return trainer.train(config, workdir, minutes=MINUTES.value)


if __name__ == "__main__":
    program.run(main)
