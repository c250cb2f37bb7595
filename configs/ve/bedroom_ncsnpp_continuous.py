"""NCSN++ cont. on LSUN bedroom at 256x256 with the VE SDE.

    python train.py --config=configs/ve/bedroom_ncsnpp_continuous.py

65.6 M parameters, 2.4 M steps of batch 64. The paper shows samples, no number. Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("lsun/bedroom", "ve", num_scales=2000)
    config.sde.sigma_max = 378.0
    config.model = models.ncsnpp_256()
    return config
