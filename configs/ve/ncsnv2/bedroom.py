"""NCSNv2 on LSUN bedroom at 128x128.

    python train.py --config=configs/ve/ncsnv2/bedroom.py

83.4 M parameters, 2.4 M steps of batch 128. The paper shows samples, no FID. The official file misspells
`continuous`; its network has a chain, as here. Not run here.
"""

from configs import base, models


def get_config():
    config = base.large("lsun/bedroom", "discrete_ve", num_scales=1086)
    config.data.image_size = 128
    config.data.resize = "resize_crop"
    config.sde.sigma_max = 190.0
    config.model = models.ncsnv2(128)
    config.training.batch_size = 128
    config.training.ema_rate = 0.9999
    return base.annealed_langevin(config, lr=1e-4, snr=0.095, corrector_steps=3)
