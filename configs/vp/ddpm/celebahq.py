"""DDPM on CelebA-HQ at 256x256.

    python train.py --config=configs/vp/ddpm/celebahq.py

111.6 M parameters, 2.4 M steps of batch 64. The paper shows samples, no number. Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("celeb_a_hq/256", "discrete_vp", num_scales=1000)
    config.model = models.ddpm_256()
    config.optim.lr = 2e-5
    config.sampling.predictor = "ancestral_sampling"
    return config
