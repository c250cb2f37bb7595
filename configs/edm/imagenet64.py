"""EDM on ImageNet at 64x64, class-conditional, with ADM's U-Net, FILE being edm-imagenet-64x64-cond-adm.pkl.

    python -m tools.import_checkpoint FILE --workdir=runs/edm --config=configs/edm/imagenet64.py
    python sample.py --workdir=runs/edm --solver=stochastic_heun --steps=511

295.9 M parameters. Published: FID 1.36 (Karras et al. 2022), in 511 evaluations (as told in Karras et al.
2024). Not run here.
"""

from configs import base, models


def get_config():
    config = base.edm("imagenet", 64, batch_size=4096, lr=1e-4, augment=0.0, millions=2500)
    config.model = models.adm_64(groups=0, learn_sigma=False)
    return config
