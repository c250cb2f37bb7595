"""ADM on ImageNet at 64x64, class-conditional, FILE being 64x64_diffusion.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/imagenet64.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

295.9 M parameters. Published: FID 2.07 in 250 steps (Dhariwal & Nichol 2021, Table 5). Its chain is the cosine one.
Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(64, "adm_cosine")
    config.model = models.adm_64()
    return config
