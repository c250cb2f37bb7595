"""The classifier of noisy ImageNet images of 256x256 that guides ADM, FILE being 256x256_classifier.pt.

    python -m tools.import_checkpoint FILE --workdir=runs/classifier --config=configs/adm/classifier_256.py

54.1 M parameters. Published: guided, ADM has FID 4.59 instead of 10.94 (Dhariwal & Nichol 2021, Table 5). Not run here.
"""

from configs import base, models


def get_config():
    config = base.adm(256)
    config.model = models.adm_classifier()
    return config
