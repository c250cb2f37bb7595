"""NCSN++ cont. on CIFAR-10 with the sub-VP SDE.

    python train.py --config=configs/subvp/cifar10_ncsnpp_continuous.py

62.7 M parameters, 1.3 M steps of batch 128. The paper gives no number for this pair. Not run here.
"""

from configs import base, models


def get_config():
    config = base.get_config("subvp")
    config.model = models.ncsnpp()
    config.sampling.predictor = "euler_maruyama"
    return config
