"""NCSN++ cont. on CelebA-HQ at 1024x1024 with the VE SDE.

    python train.py --config=configs/ve/celebahq_ncsnpp_continuous.py

105.8 M parameters, 2.4 M steps of batch 8. The paper shows samples, no number. Not run here.
"""

from configs import base


def get_config():
    return base.faces_1024("celeb_a_hq/1024")
