"""NCSN++ cont. (deep) on CIFAR-10 with the sub-VP SDE.

    python train.py --config=configs/subvp/cifar10_ncsnpp_deep_continuous.py

107.5 M parameters, 0.95 M steps of batch 128. The paper gives no number for this pair. Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("subvp")
    config.model = models.ncsnpp(num_res_blocks=8)
    config.training.n_iters = 950_000
    config.sampling.predictor = "euler_maruyama"
    return config
