"""Fashion-MNIST 28x28 in the latents 7x7x4 of an autoencoder.

    python train.py --config=configs/autoencoder/fashion_mnist.py
    python train.py --config=configs/fashion_mnist_latent.py

1.2 M parameters; not yet trained here.
"""

from configs import fashion_mnist, models


def get_config():
    config = fashion_mnist.get_config()
    config.latents.autoencoder = "runs/autoencoder_fashion_mnist"
    # 7 x 7 latents are not halved: one level, each block of which sees them all
    config.model = models.ddpmpp(nf=64, ch_mult=(1,), num_res_blocks=3, attn_resolutions=(7,), dropout=0.0)
    config.training.n_iters = 20_000
    config.training.cooldown = 4000
    return config
