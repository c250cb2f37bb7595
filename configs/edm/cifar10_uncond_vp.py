"""EDM on CIFAR-10, unconditional, with DDPM++, FILE being edm-cifar10-32x32-uncond-vp.pkl.

    python -m tools.import_checkpoint FILE --workdir=runs/edm --config=configs/edm/cifar10_uncond_vp.py
    python sample.py --workdir=runs/edm --solver=heun --steps=35

55.7 M parameters. Published: FID 1.97 in 35 evaluations (Karras et al. 2022, Table 2). DPM-Solver-v3: 12.21 in 5
evaluations, 2.51 in 10 (Zheng et al. 2023). Not run here.
"""

from configs import base, models


def get_config():
    config = base.edm("cifar10", 32, batch_size=512, lr=1e-3, augment=0.12)
    config.model = models.edm_ddpmpp()
    return config
