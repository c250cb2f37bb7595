"""Fashion-MNIST at its own 28x28 with a network for one GPU.

    python train.py --config=configs/fashion_mnist_gpu.py
    python train.py --config=configs/fashion_mnist_gpu.py --config.data.dataset=fashion_mnist.npz

4.2 M parameters. docs/studies.md tells how far 1900 steps came; the model in the box is of configs/fashion_mnist.py.
"""

from configs import fashion_mnist, models


def get_config():
    config = fashion_mnist.get_config()
    config.model = models.ddpmpp(
        nf=32, ch_mult=(1, 2, 4), num_res_blocks=2, attn_resolutions=(14, 7), dropout=0.0, dtype="bfloat16"
    )
    config.training.batch_size = 256
    config.training.times = "lam_normal"
    config.training.lam_normal = (0.8, 1.5)  # the noise levels at which images take shape
    config.training.weight = "network"
    config.training.ema_rate = 0.999
    config.training.n_iters = 12_000
    config.training.cooldown = 1500
    config.training.steps_per_call = 20
    config.training.log_freq = 100
    config.training.eval_freq = 1_000_000
    config.training.checkpoint_freq = 1_000_000
    config.training.keep_freq = 1_000_000
    config.optim.warmup = 500
    config.sampling.batch_size = 1000
    config.ems.num_data = 4096
    config.ems.batch_size = 256
    return config
