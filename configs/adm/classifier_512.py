"""The classifier of noisy ImageNet images of 512x512 that guides ADM, FILE being 512x512_classifier.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/classifier --config=configs/adm/classifier_512.py

54.4 M parameters. Published: guided, ADM has FID 7.72 instead of 23.24 (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(512)
    config.model = models.adm_classifier(
        nf=64, ch_mult=(1, 2, 2, 4, 4, 8, 8), attn_levels=(4, 5, 6), channel_mult_noise=2, channel_mult_emb=8
    )
    return config
