"""ADM-U, which enlarges ImageNet's images from 128x128 to 512x512, FILE being 128_512_upsampler.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/upsampler --config=configs/adm/upsampler_128_512.py
    python sample.py --workdir=runs/upsampler --base_samples=runs/base/samples/NAME/samples.npz --solver=dpmpp

308.8 M parameters. Published: FID 3.85 at the end of a guided stack from 128x128 (ADM-G, ADM-U; Dhariwal & Nichol 2021,
Table 6). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(512)
    config.model = models.adm_upsampler(attn_levels=(4, 5))
    return config
