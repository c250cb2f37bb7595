"""Digits 8x8 in the latents 4x4x2 of an autoencoder: the whole road of latent diffusion in minutes on two CPU cores.

    python train.py --config=configs/autoencoder/digits.py
    python train.py --config=configs/digits_latent.py

0.4 M parameters.
"""

from configs import digits, models


def get_config():
    config = digits.get_config()
    config.latents.autoencoder = "runs/autoencoder_digits"
    config.model = models.ddpmpp(nf=24, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
    return config
