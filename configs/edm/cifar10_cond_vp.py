"""EDM on CIFAR-10, class-conditional, with DDPM++, FILE being edm-cifar10-32x32-cond-vp.pkl.

    python -m tools.import_checkpoint FILE --workdir=runs/edm --config=configs/edm/cifar10_cond_vp.py
    python sample.py --workdir=runs/edm --solver=heun --steps=35

55.7 M parameters. Published: FID 1.79 in 35 evaluations (Karras et al. 2022, Table 2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.edm("cifar10", 32, batch_size=512, lr=1e-3, augment=0.12)
    config.model = models.edm_ddpmpp(num_classes=10)
    return config
