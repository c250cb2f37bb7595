"""The published score networks."""

from score_sde.models.ddpm import DDPM
from score_sde.models.ncsnpp import NCSNpp
from score_sde.models.ncsnv2 import NCSN, NCSNv2, ncsnv2_128, ncsnv2_256
from score_sde.models.unet import UNet

# Config name -> network; each is called as (x, label, y, dropout keys).
MODELS = {
    "ncsnpp": NCSNpp,
    "unet": UNet,
    "ddpm": DDPM,
    "ncsn": NCSN,
    "ncsnv2_64": NCSNv2,
    "ncsnv2_128": ncsnv2_128,
    "ncsnv2_256": ncsnv2_256,
}
