"""DDPM++ cont. on CIFAR-10 with the sub-VP SDE.

    python train.py --config=configs/subvp/cifar10_ddpmpp_continuous.py

61.8 M parameters, 1.3 M steps of batch 128. Published: FID 2.61, 3.02 bits/dim (Song et al. 2021, Tables 2 and 3).
Not run here at full scale.
"""

from configs import base


def get_config():
    return base.get_config("subvp")
