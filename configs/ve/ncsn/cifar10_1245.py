"""NCSN on CIFAR-10, with techniques 1, 2, 4 and 5 of Song & Ermon 2020: all but the unconditional network.

    python train.py --config=configs/ve/ncsn/cifar10_1245.py

44.8 M parameters, 1.3 M steps of batch 128. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("discrete_ve", num_scales=232)
    base.ncsn(config)
    return base.annealed_langevin(config, lr=1e-3, snr=0.176, corrector_steps=5)
