"""An autoencoder of digits 8x8, in whose latents 4x4x2 configs/digits_latent.py trains a model.

    python train.py --config=configs/autoencoder/digits.py

0.04 M parameters. 164 seconds of one core on a busy machine; expect test images to come back with a PSNR of 22.3 dB.
"""

from configs import digits, models


def get_config():
    config = digits.get_config()
    config.unlock()
    config.model = models.autoencoder(nf=8, ch_mult=(1, 2), num_res_blocks=1, embed_dim=2, channels=1, groups=4)
    config.training.n_iters = 1500
    config.training.keep_freq = 1500
    return config.lock()
