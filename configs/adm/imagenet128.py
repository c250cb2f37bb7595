"""ADM on ImageNet at 128x128, class-conditional, FILE being 128x128_diffusion.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/imagenet128.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

421.5 M parameters. Published: FID 5.91 in 250 steps, 2.97 guided (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(128)
    config.model = models.adm(ch_mult=(1, 1, 2, 3, 4), attn_levels=(2, 3, 4), num_heads=4, head_channels=0)
    return config
