"""CIFAR-10 with a network that two CPU cores train in a night: VP, continuous.

    python train.py --config=configs/cifar10_small.py
    python train.py --config=configs/cifar10_small.py --config.data.dataset=cifar10.npz

1.95 M parameters where the published DDPM++ has 62 M, on patches of 2x2 pixels. Expect colours and layouts, few
objects: this compares solvers on colour images; the paper's model is configs/vp/cifar10_ddpmpp_continuous.py.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.data.dataset = "cifar10"
    config.model = models.ddpmpp(
        nf=32, ch_mult=(1, 2, 3), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, patch_size=2
    )
    config.denoiser.output = "v"  # as in configs/fashion_mnist.py, for the same reasons
    config.denoiser.label = "lam"
    config.training.batch_size = 64
    config.training.n_iters = 100_000
    config.training.cooldown = 20_000
    # the noise levels at which images take shape, and structure rather than texture
    config.training.times = "lam_normal"
    config.training.lam_normal = (0.8, 1.5)
    config.training.weight = "network"
    config.training.ema_rate = 0.9995
    config.training.ema_warmup = True
    config.training.eval_freq = 1000
    config.training.checkpoint_freq = 1000
    config.training.keep_freq = 10_000
    config.optim.lr = 1e-3
    config.optim.warmup = 1000
    config.ems.nodes = 60
    config.eval.likelihood.num_data = 256
    config.eval.likelihood.repeats = 1
    return config
