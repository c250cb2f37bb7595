"""The classifier of noisy ImageNet images of 64x64 that guides ADM, FILE being 64x64_classifier.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/classifier --config=configs/adm/classifier_64.py

65.4 M parameters. Published: without it ADM has FID 2.07 (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(64, "adm_cosine")
    config.model = models.adm_classifier(ch_mult=(1, 2, 3, 4), num_res_blocks=4, attn_levels=(1, 2, 3))
    return config
