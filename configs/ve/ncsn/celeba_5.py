"""NCSN on CelebA at 64x64, with technique 5 of Song & Ermon 2020: averaged parameters.

    python train.py --config=configs/ve/ncsn/celeba_5.py

34.4 M parameters, 1.3 M steps of batch 128. Not run here.
"""

from configs import base


def get_config():
    config = base.celeba(num_scales=10)
    config.sde.sigma_max = 1.0
    base.ncsn(config)
    return base.annealed_langevin(config, lr=1e-3, snr=0.316, corrector_steps=100)
