"""NCSN++ cont. on FFHQ at 1024x1024 with the VE SDE.

    python train.py --config=configs/ve/ffhq_ncsnpp_continuous.py

105.8 M parameters, 2.4 M steps of batch 8. No number is published. Reads a folder of 1024x1024 images, ffhq/ unless
--config.data.dataset=FOLDER. Not run here.
"""

from configs import base


def get_config():
    config = base.faces_1024("ffhq")
    config.training.reduce_mean = True  # so published, unlike every other VE model
    return config
