"""ADM on ImageNet at 256x256, unconditional, FILE being 256x256_diffusion_uncond.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/imagenet256_uncond.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

552.8 M parameters. Published: FID 26.21 in 250 steps, 12.00 guided (Dhariwal & Nichol 2021, Table 4). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(256)
    config.model = models.adm(num_classes=0)
    return config
