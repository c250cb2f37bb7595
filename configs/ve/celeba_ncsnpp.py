"""NCSN++ on CelebA at 64x64 with NCSN's chain of 1000 noise levels.

    python train.py --config=configs/ve/celeba_ncsnpp.py

62.7 M parameters, 1.3 M steps of batch 128. The paper plots its FID only. Not run here.
"""

from configs import base, models


def get_config():
    config = base.celeba()
    config.model = models.ncsnpp()
    return config
