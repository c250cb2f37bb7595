"""DDPM on CIFAR-10, its network not told the time.

    python train.py --config=configs/vp/ddpm/cifar10_unconditional.py

32.3 M parameters, 1.3 M steps of batch 128. Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_vp")
    config.model = models.ddpm(conditional=False)
    config.sampling.predictor = "ancestral_sampling"
    return config
