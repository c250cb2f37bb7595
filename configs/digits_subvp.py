"""Digits under the sub-VP SDE, trained as configs/digits.py is.

    python train.py --config=configs/digits_subvp.py

0.4 M parameters, and the time of configs/digits.py; what to expect is in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config():
    config = digits.get_config()
    config.sde = ConfigDict(base.SDES["subvp"]["sde"]).lock()
    return config
