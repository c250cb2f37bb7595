"""NCSN++ cont. on CIFAR-10 with the VE SDE.

    python train.py --config=configs/ve/cifar10_ncsnpp_continuous.py

62.8 M parameters, 1.3 M steps of batch 128. Published: FID 2.38, IS 9.83 with 1000 predictor-corrector
steps (Song et al. 2021, Table 3). Not run here at full scale.
"""

from configs import base, models


def get_config():
    config = base.get_config("ve")
    with config.unlocked():
        config.model = models.ncsnpp_ve()
    return config
