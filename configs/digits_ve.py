"""Digits under the VE SDE, trained as configs/digits.py is.

    python train.py --config=configs/digits_ve.py

0.4 M parameters, and the time of configs/digits.py; what to expect is in docs/studies.md. As published for VE, data in
[0, 1] and a sigma_max of the largest distance between two training images (Song & Ermon 2020, technique 1): 4.8 here.
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config():
    config = digits.get_config()
    config.data.centered = False
    config.sde = ConfigDict(base.SDES["ve"]["sde"] | dict(sigma_max=5.0)).lock()
    config.sampling.corrector = "langevin"
    return config
