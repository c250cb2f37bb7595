"""DDPM on LSUN church at 256x256.

    python train.py --config=configs/vp/ddpm/church.py

111.6 M parameters, 2.4 M steps of batch 64. Published: FID 7.89 (Ho et al. 2020, Table 3). Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("lsun/church_outdoor", "discrete_vp", num_scales=1000)
    config.model = models.ddpm_256()
    config.optim.lr = 2e-5
    config.sampling.predictor = "ancestral_sampling"
    return config
