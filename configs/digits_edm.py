"""Digits as EDM trains: its noise levels, weights and augmentation, of which the network is told.

    python train.py --config=configs/digits_edm.py
    python sample.py --solver=dpmv3

0.4 M parameters, and about the time of configs/digits.py. Two power-function averages are kept beside the exponential
one, so that `python -m tools.ema --std=0.08 --out=runs/digits_edm0.08` makes another.
"""

from configs import base, models


def get_config():
    config = base.edm("digits", 8, batch_size=64, lr=1e-3, augment=0.12)
    config.data.num_channels = 1
    config.model = models.edm_ddpmpp(nf=24, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
    config.training.n_iters = 3000
    config.training.ema_rate = 0.999
    config.training.ema_warmup = True
    config.training.power_ema = (0.05, 0.1)
    config.training.eval_freq = 500
    config.training.checkpoint_freq = 500
    config.training.keep_freq = 500
    config.optim.warmup = 200
    return config
