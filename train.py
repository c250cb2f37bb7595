"""Train a score model, a classifier or an autoencoder, or continue a run that was stopped.

python train.py --config=configs/digits.py [--workdir=runs/digits] [--config.training.n_iters=1000]
python train.py --config=configs/classifier/digits.py       at its end, accuracy on test images by noise level
python train.py --config=configs/autoencoder/digits.py      at its end, the PSNR of test images that it codes
python train.py --config=configs/digits_latent.py           in the latents of that one
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
        config = program.config_of(CONFIG)
        workdir = pathlib.Path(WORKDIR.value or runs.folder_for(config, program.config_file()))
    return trainer.train(config, workdir, minutes=MINUTES.value)


if __name__ == "__main__":
    program.run(main)
