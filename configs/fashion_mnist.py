"""Fashion-MNIST at its own 28x28.

    python train.py --config=configs/fashion_mnist.py
    python train.py --config=configs/fashion_mnist.py --config.data.dataset=fashion_mnist.npz

The first form reads tensorflow-datasets, the second an .npz, IDX files or a folder. 1.4 M parameters; not yet trained
to the end here: the model in the box (pretrained/fashion_mnist) had 21 500 steps, 2000 of them a cooldown.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.data.dataset = "fashion_mnist"
    config.data.num_channels = 1
    config.data.image_size = 28
    config.data.random_flip = False  # all shoes point one way
    # few channels at the full resolution, many where a pixel sees the whole garment: cheaper at equal size
    config.model = models.ddpmpp(nf=16, ch_mult=(1, 2, 6), num_res_blocks=1, attn_resolutions=(7,), dropout=0.0)
    # At large noise an eps slightly wrong is an x0 very wrong, which few-step solvers do not mend; a v is not.
    config.denoiser.output = "v"
    config.denoiser.label = "lam"  # smooth along the ODE sooner than 999 t, which EMS and multistep solvers need
    config.training.batch_size = 64
    config.training.n_iters = 60_000
    config.training.cooldown = 12_000
    config.training.ema_rate = 0.9995
    config.training.ema_warmup = True
    config.training.eval_freq = 1000
    config.training.checkpoint_freq = 1000
    config.training.keep_freq = 10_000
    config.eval.likelihood.num_data = 256
    config.eval.likelihood.repeats = 1
    config.optim.lr = 1e-3
    config.optim.warmup = 1000
    return config
