"""ADM on ImageNet at 256x256, class-conditional, FILE being 256x256_diffusion.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/imagenet256.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

553.8 M parameters. Published: FID 10.94 in 250 steps, 4.59 guided (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(256)
    config.model = models.adm()
    return config
