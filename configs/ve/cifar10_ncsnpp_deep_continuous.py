"""NCSN++ cont. (deep) on CIFAR-10 with the VE SDE.

    python train.py --config=configs/ve/cifar10_ncsnpp_deep_continuous.py

107.6 M parameters, 0.95 M steps of batch 128. Published: FID 2.20, IS 9.89 (Song et al. 2021, Table 3). Not run
here.
"""

from configs import base, models


def get_config():
    config = base.get_config("ve")
    config.model = models.ncsnpp_ve(num_res_blocks=8)
    config.training.n_iters = 950_000
    return config
