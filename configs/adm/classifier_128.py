"""The classifier of noisy ImageNet images of 128x128 that guides ADM, FILE being 128x128_classifier.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/classifier --config=configs/adm/classifier_128.py

42.6 M parameters. Published: guided, ADM has FID 2.97 instead of 5.91 (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(128)
    config.model = models.adm_classifier(ch_mult=(1, 1, 2, 3, 4), attn_levels=(2, 3, 4))
    return config
