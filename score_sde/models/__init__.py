"""The published score networks."""

from score_sde.models.ncsnpp import NCSNpp

# Config name -> network; each is called as (x, label, y, dropout keys).
MODELS = {"ncsnpp": NCSNpp}
