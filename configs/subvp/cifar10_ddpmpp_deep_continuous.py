"""DDPM++ cont. (deep) on CIFAR-10 with the sub-VP SDE.

    python train.py --config=configs/subvp/cifar10_ddpmpp_deep_continuous.py

106.6 M parameters, 0.95 M steps of batch 128. Published: FID 2.41, IS 9.57 (Song et al. 2021, Table 3); by the ODE
FID 2.92, 2.99 bits/dim (Table 2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("subvp")
    config.model = models.ddpmpp(num_res_blocks=8)
    config.training.n_iters = 950_000
    config.sampling.predictor = "euler_maruyama"
    return config
