"""ADM-U, which enlarges ImageNet's images from 64x64 to 256x256, FILE being 64_256_upsampler.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/upsampler --config=configs/adm/upsampler_64_256.py
    python sample.py --workdir=runs/upsampler --base_samples=runs/base/samples/NAME/samples.npz --solver=dpmpp

311.8 M parameters. Published: FID 3.94 at the end of a guided stack from 64x64 (ADM-G, ADM-U; Dhariwal & Nichol 2021,
Table 6). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(256)
    config.model = models.adm_upsampler()
    return config
