"""Digits 8x8 in the latents 4x4x2 of an autoencoder: the whole road of latent diffusion in minutes on two CPU cores.

    python train.py --config=configs/autoencoder/digits.py
    python train.py --config=configs/digits_latent.py

0.4 M parameters. 318 seconds of one core on a busy machine; expect a test loss of 0.077 (evaluate.py --metrics=loss).
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.latents.autoencoder = "runs/autoencoder_digits"
    config.training.n_iters = 1500
    config.training.cooldown = 500
    config.training.checkpoint_freq = 500
    return config
