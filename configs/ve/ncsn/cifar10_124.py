"""NCSN on CIFAR-10, with techniques 1, 2 and 4 of Song & Ermon 2020: noise levels and Langevin steps.

    python train.py --config=configs/ve/ncsn/cifar10_124.py

44.8 M parameters, 1.3 M steps of batch 128. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("discrete_ve", num_scales=232)
    base.ncsn(config)
    config.training.ema_rate = 0.0
    return base.annealed_langevin(config, lr=1e-3, snr=0.176, corrector_steps=5)
