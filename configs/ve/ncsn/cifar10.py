"""NCSN on CIFAR-10.

    python train.py --config=configs/ve/ncsn/cifar10.py

34.4 M parameters, 1.3 M steps of batch 128. Published: FID 25.32, IS 8.87, and with a last denoising step, as here,
29.8 and 7.32 (Song & Ermon 2020, Table 1). Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("discrete_ve", num_scales=10)
    config.sde.sigma_max = 1.0
    base.ncsn(config)
    config.training.ema_rate = 0.0
    return base.annealed_langevin(config, lr=1e-3, snr=0.316, corrector_steps=100)
