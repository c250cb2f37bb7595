"""EDM on FFHQ at 64x64 with NCSN++, FILE being edm-ffhq-64x64-uncond-ve.pkl.

    python -m tools.import_checkpoint FILE --workdir=runs/edm --config=configs/edm/ffhq_ve.py
    python sample.py --workdir=runs/edm --solver=heun --steps=79

62.8 M parameters. Published: FID 2.53 in 79 evaluations (Karras et al. 2022, Table 2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.edm("ffhq", 64, batch_size=256, lr=2e-4, augment=0.15)
    config.model = models.edm_ncsnpp(ch_mult=(1, 2, 2, 2), dropout=0.05)
    return config
