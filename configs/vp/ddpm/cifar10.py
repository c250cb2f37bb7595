"""DDPM on CIFAR-10.

    python train.py --config=configs/vp/ddpm/cifar10.py

35.2 M parameters, 1.3 M steps of batch 128. Published: FID 3.17, IS 9.46 (Ho et al. 2020, Table 1); FID 3.24 (Song
et al. 2021, Table 1); by the ODE FID 3.37, 3.28 bits/dim (Table 2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_vp")
    config.model = models.ddpm()
    config.sampling.predictor = "ancestral_sampling"
    return config
