"""NCSNv2 on CIFAR-10.

    python train.py --config=configs/ve/ncsnv2/cifar10.py

34.0 M parameters, 1.3 M steps of batch 128. Published: FID 10.87, IS 8.40 (Song & Ermon 2020, Table 1). Not run
here.
"""

from configs import base, models


def get_config():
    config = base.get_config("discrete_ve", num_scales=232)
    config.model = models.ncsnv2(64)
    return base.annealed_langevin(config, lr=1e-4, snr=0.176, corrector_steps=5)
