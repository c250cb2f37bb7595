"""An autoencoder of Fashion-MNIST 28x28, in whose latents 7x7x4 configs/fashion_mnist_latent.py trains a model.

    python train.py --config=configs/autoencoder/fashion_mnist.py
    python train.py --config=configs/autoencoder/fashion_mnist.py --config.data.dataset=fashion_mnist.npz

0.17 M parameters; not yet trained here.
"""

from configs import fashion_mnist, models


def get_config():
    config = fashion_mnist.get_config()
    config.unlock()
    config.model = models.autoencoder(nf=8, ch_mult=(1, 2, 4), num_res_blocks=1, channels=1, groups=4)
    config.training.batch_size = 32
    config.training.n_iters = 10_000
    config.training.cooldown = 1000
    config.training.ema_rate = 0.999
    config.training.checkpoint_freq = 500
    config.training.keep_freq = 1000
    config.optim.warmup = 200
    return config.lock()
