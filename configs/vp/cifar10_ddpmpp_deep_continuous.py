"""DDPM++ cont. (deep) on CIFAR-10 with the VP SDE.

    python train.py --config=configs/vp/cifar10_ddpmpp_deep_continuous.py

106.6 M parameters, 0.95 M steps of batch 128. Published: FID 2.41, IS 9.68 (Song et al. 2021, Table 3); by the ODE
FID 3.08, 3.13 bits/dim (Table 2); with DPM-Solver-v3 FID 12.76 / 3.40 / 2.64 at 5 / 10 / 25 evaluations (Zheng et
al. 2023, Table 1). Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("vp")
    config.model = models.ddpmpp(num_res_blocks=8)
    config.training.n_iters = 950_000
    config.sampling.predictor = "euler_maruyama"
    return config
