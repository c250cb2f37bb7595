"""NCSN on CelebA at 64x64, with techniques 1, 2, 4 and 5 of Song & Ermon 2020: all but the unconditional network.

    python train.py --config=configs/ve/ncsn/celeba_1245.py

57.4 M parameters, 1.3 M steps of batch 128. Not run here.
"""

from configs import base


def get_config():
    config = base.celeba(num_scales=500)
    base.ncsn(config)
    return base.annealed_langevin(config, lr=1e-3, snr=0.128, corrector_steps=5)
