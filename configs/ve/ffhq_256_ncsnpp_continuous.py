"""NCSN++ cont. on FFHQ at 256x256 with the VE SDE.

    python train.py --config=configs/ve/ffhq_256_ncsnpp_continuous.py

65.6 M parameters, 2.4 M steps of batch 64. No number is published. Reads a folder of 256x256 images, ffhq/ unless
--config.data.dataset=FOLDER. Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("ffhq", "ve", num_scales=2000)
    config.sde.sigma_max = 348.0
    config.model = models.ncsnpp_256()
    return config
