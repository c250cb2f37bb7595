"""Fashion-MNIST at 32x32 (28 padded).

    python train.py --config=configs/fashion_mnist.py
    python train.py --config=configs/fashion_mnist.py --config.data.dataset=fashion_mnist.npz

The first form reads tensorflow-datasets, the second an .npz, IDX files or a folder. 1.8 M parameters; not yet trained
to the end here, so no number to expect.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.data.dataset = "fashion_mnist"
    config.data.num_channels = 1
    config.data.resize = "pad"
    config.model = models.ddpmpp(nf=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(8,))
    config.denoiser.label = "lam"  # smooth along the ODE sooner than 999 t, which EMS and multistep solvers need
    config.training.n_iters = 60_000
    config.training.ema_rate = 0.999
    config.training.ema_warmup = True
    config.training.eval_freq = 1000
    config.training.checkpoint_freq = 1000
    config.training.keep_freq = 10_000
    config.optim.warmup = 1000
    return config
