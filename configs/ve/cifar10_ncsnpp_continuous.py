"""NCSN++ cont. on CIFAR-10 with the VE SDE.

    python train.py --config=configs/ve/cifar10_ncsnpp_continuous.py

62.8 M parameters, 1.3 M steps (in the paper 0.95 M) of batch 128. Published: FID 2.38, IS 9.83 (Song et al. 2021,
Table 3). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("ve")
    config.model = models.ncsnpp_ve()
    return config
