"""Search for the times and options that suit a model; `python -m tools.search` is the program."""

import itertools
import time
from collections.abc import Callable

import numpy as np

# Options worth trying, of each deterministic solver with one evaluation per step.
CHOICES = {
    "ddim": {},
    "dpmv3": {
        "order": (2, 3),
        "pseudo": (False, True),
        "corrector": ("on", "off"),
        "corrector_pseudo": (False, True),
        "lower_order_final": (False, True),
    },
    "dpmpp": {"order": (2, 3), "lower_order_final": (False, True)},
    "unipc": {"order": (2, 3), "prediction": ("data", "noise"), "lower_order_final": (False, True)},
    "deis": {"order": (2, 3, 4)},
    "ipndm": {"order": (2, 3, 4)},
}


def descend(distance: Callable, lam: np.ndarray, deadline: float) -> tuple[np.ndarray, float]:
    """(lam, distance(lam)) of a local minimum over the interior of a rising lam (n + 1,), or of where time ran out.

    distance: lam -> what is to be small; deadline: in time.monotonic().

    Each point in turn tries a part of the way to either neighbour; when no point moves, the part is halved.
    """
    best, part = distance(lam), 0.5
    while part > 0.02:
        moved = False
        for i, side in itertools.product(range(1, len(lam) - 1), (-1, 1)):
            if time.monotonic() > deadline:
                return lam, best
            trial = lam.copy()
            trial[i] += part * (lam[i + side] - lam[i])
            value = distance(trial)
            if value < best:
                lam, best, moved = trial, value, True
        if not moved:
            part /= 2
    return lam, best
