"""DDPM++ cont. on CIFAR-10 with the VP SDE.

    python train.py --config=configs/vp/cifar10_ddpmpp_continuous.py

61.8 M parameters, 1.3 M steps of batch 128. Published: FID 2.55, IS 9.58 (Song et al. 2021, Table 3); by the ODE
FID 3.93, 3.16 bits/dim (Table 2). Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("vp")
    config.sampling.predictor = "euler_maruyama"
    return config
