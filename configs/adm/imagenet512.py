"""ADM on ImageNet at 512x512, class-conditional, FILE being 512x512_diffusion.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/imagenet512.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

559.0 M parameters. Published: FID 23.24 in 250 steps, 7.72 guided (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(512)
    config.model = models.adm_512()
    return config
