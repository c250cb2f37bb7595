"""NCSN++ on CIFAR-10 with NCSN's chain of 1000 noise levels.

    python train.py --config=configs/ve/cifar10_ncsnpp.py

62.7 M parameters, 1.3 M steps of batch 128. Published: FID 2.45, IS 9.73 (Song et al. 2021, Table 3). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_ve")
    config.model = models.ncsnpp()
    return config
