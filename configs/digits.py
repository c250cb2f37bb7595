"""Digits 8x8, embedded in scikit-learn: the whole road in minutes on two CPU cores.

    python train.py --config=configs/digits.py

0.4 M parameters. Two and a half minutes on two CPU cores; what to expect of it is in README.md.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.data.dataset = "digits"
    config.data.image_size = 8
    config.data.num_channels = 1
    config.data.random_flip = False
    config.model = models.ddpmpp(nf=24, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
    # a network trained for minutes is rough in 999 t; few-step solvers and EMS need it smooth along the ODE
    config.denoiser.label = "lam"
    config.training.batch_size = 64
    config.training.n_iters = 3000
    config.training.ema_rate = 0.999
    config.training.ema_warmup = True
    config.training.eval_freq = 500
    config.training.checkpoint_freq = 1000
    config.training.keep_freq = 1500
    config.optim.lr = 1e-3
    config.optim.warmup = 200
    return config
