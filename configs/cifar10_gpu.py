"""CIFAR-10 with a network that one GPU trains in minutes: VP, continuous.

    python train.py --config=configs/cifar10_gpu.py
    python train.py --config=configs/cifar10_gpu.py --config.data.dataset=cifar10.npz

9.0 M parameters where the published DDPM++ has 62 M, and a fifth of its operations. The model in the box
(pretrained/cifar10_gpu) was trained with it; its card tells how long and on what.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.data.dataset = "cifar10"
    config.model = models.ddpmpp(
        nf=64, ch_mult=(1, 2, 2), num_res_blocks=3, attn_resolutions=(16,), dropout=0.0, dtype="bfloat16"
    )
    config.denoiser.output = "v"  # as in configs/fashion_mnist.py, for the same reasons
    config.denoiser.label = "lam"
    config.training.batch_size = 256
    config.training.n_iters = 12_000
    config.training.cooldown = 2000
    # the noise levels at which images take shape
    config.training.times = "lam_normal"
    config.training.lam_normal = (0.8, 1.5)
    config.training.weight = "network"
    config.training.ema_rate = 0.999
    config.training.ema_warmup = True
    config.training.steps_per_call = 20
    config.training.log_freq = 100
    config.training.eval_freq = 1_000_000
    config.training.checkpoint_freq = 1_000_000
    config.training.keep_freq = 1_000_000
    config.optim.lr = 1e-3
    config.optim.warmup = 500
    config.sampling.batch_size = 1000
    config.ems.num_data = 4096
    config.ems.batch_size = 256
    config.eval.likelihood.num_data = 1000
    config.eval.likelihood.repeats = 1
    return config
