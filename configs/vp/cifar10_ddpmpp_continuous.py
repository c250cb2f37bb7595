"""DDPM++ cont. on CIFAR-10 with the VP SDE.

    python train.py --config=configs/vp/cifar10_ddpmpp_continuous.py

61.8 M parameters, 1.3 M steps of batch 128. Published: FID 2.55, 3.16 bits/dim (Song et al. 2021, Tables 2
and 3); with DPM-Solver-v3 FID 12.76 / 3.40 / 2.64 at 5 / 10 / 25 evaluations of the deep model (Zheng et al. 2023,
Table 1). Not run here at full scale.
"""

from configs import base


def get_config():
    return base.get_config("vp")
