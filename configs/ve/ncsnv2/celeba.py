"""NCSNv2 on CelebA at 64x64.

    python train.py --config=configs/ve/ncsnv2/celeba.py

34.0 M parameters, 1.3 M steps of batch 128. Published: FID 10.23 (Song & Ermon 2020, Table 1). Not run here.
"""

from configs import base, models


def get_config():
    config = base.celeba(num_scales=500)
    config.model = models.ncsnv2(64)
    return base.annealed_langevin(config, lr=1e-4, snr=0.128, corrector_steps=5)
