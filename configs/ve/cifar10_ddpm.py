"""DDPM's network on CIFAR-10 with NCSN's chain of 1000 noise levels.

    python train.py --config=configs/ve/cifar10_ddpm.py

35.2 M parameters, 1.3 M steps of batch 128. Published: FID 3.60 (Song et al. 2021, Table 1). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_ve")
    config.model = models.ddpm()
    return config
