"""DDPM cont. on CIFAR-10 with the sub-VP SDE.

    python train.py --config=configs/subvp/cifar10_ddpm_continuous.py

35.2 M parameters, 1.3 M steps of batch 128. Published: by the ODE FID 3.56, 3.05 bits/dim (Song et al. 2021, Table
2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("subvp")
    config.model = models.ddpm()
    config.sampling.predictor = "euler_maruyama"
    return config
