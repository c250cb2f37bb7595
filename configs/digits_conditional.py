"""Digits by class: the network of configs/digits.py, told which digit, for guidance without a classifier.

    python train.py --config=configs/digits_conditional.py
    python sample.py --label=3 --guidance=2.0

0.4 M parameters, and the time of configs/digits.py.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.model.num_classes = 10
    config.training.label_dropout = 0.15
    return config
