"""NCSN++ cont. on CelebA-HQ at 256x256 with the VE SDE.

    python train.py --config=configs/ve/celebahq_256_ncsnpp_continuous.py

65.6 M parameters, 2.4 M steps of batch 64. No number is published. Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("celeb_a_hq/256", "ve", num_scales=2000)
    config.sde.sigma_max = 348.0
    config.model = models.ncsnpp_256()
    return config
