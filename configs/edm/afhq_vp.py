"""EDM on AFHQv2 at 64x64 with DDPM++, FILE being edm-afhqv2-64x64-uncond-vp.pkl.

    python -m tools.import_checkpoint FILE --workdir=runs/edm --config=configs/edm/afhq_vp.py
    python sample.py --workdir=runs/edm --solver=heun --steps=79

61.8 M parameters. Published: FID 1.96 in 79 evaluations (Karras et al. 2022, Table 2). Not run here.
"""

from configs import base, models


def get_config():
    config = base.edm("afhqv2", 64, batch_size=256, lr=2e-4, augment=0.15)
    config.model = models.edm_ddpmpp(ch_mult=(1, 2, 2, 2), dropout=0.25)
    return config
