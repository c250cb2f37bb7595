"""ADM on LSUN horses at 256x256, FILE being lsun_horse.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/adm --config=configs/adm/lsun_horse.py
    python sample.py --workdir=runs/adm --solver=dpmpp --steps=20

552.8 M parameters. Published: FID 2.57 in 1000 steps (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(256, dataset="lsun/horse")
    config.model = models.adm(num_classes=0, dropout=0.1)
    return config
