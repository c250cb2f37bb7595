"""Digits on the straight path of flow matching, trained as configs/digits.py is.

    python train.py --config=configs/digits_flow.py
    python sample.py --solver=dpmv3

0.4 M parameters, and the time of configs/digits.py. The network predicts z - x_0, and its own squared error is the loss
(Lipman et al. 2023; Liu et al. 2023).
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config():
    config = digits.get_config()
    config.sde = ConfigDict(base.SDES["flow"]["sde"]).lock()
    config.denoiser.output = "flow"
    config.training.weight = "network"
    return config
