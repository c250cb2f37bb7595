"""DDPM++ on CIFAR-10 with DDPM's chain of 1000 steps.

    python train.py --config=configs/vp/cifar10_ddpmpp.py

61.8 M parameters, 1.3 M steps of batch 128. Published: FID 2.78, IS 9.64 (Song et al. 2021, Table 3). Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("discrete_vp")
    config.sampling.predictor = "ancestral_sampling"
    return config
