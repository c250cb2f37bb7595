"""NCSN++ on CIFAR-10 with DDPM's chain of 1000 steps.

    python train.py --config=configs/vp/cifar10_ncsnpp.py

62.7 M parameters, 1.3 M steps of batch 128. The paper gives no number for this pair. Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_vp")
    config.model = models.ncsnpp()
    return config
