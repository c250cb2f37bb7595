"""The search for a solver's times, and the file of what it came to."""

import json
import time
import types

import numpy as np
import pytest

from experiments import samplers
from score_sde.errors import UserError
from score_sde.sde import VP
from solvers import SOLVERS, search


def test_descent_finds_the_minimum():
    """A quadratic's minimum, a rising grid, is met to the finest part of a gap that is tried; the ends stay."""
    best = np.array([-5.0, -3.5, -0.2, 0.1, 4.0])
    distance = lambda lam: float(np.square(lam - best).sum())
    lam, value = search.descend(distance, np.linspace(-5, 4, 5), time.monotonic() + 60)
    assert (np.diff(lam) > 0).all()
    assert (lam[0], lam[-1]) == (-5, 4)
    np.testing.assert_allclose(lam, best, atol=0.1)
    assert value == distance(lam)


def test_descent_ends_in_time_with_what_it_has():
    start = np.linspace(0, 1, 4)
    lam, value = search.descend(lambda lam: float(lam[1]), start, time.monotonic() - 1)
    np.testing.assert_array_equal(lam, start)
    assert value == start[1]


def test_learned_corrections_come_back_and_damaged_ones_are_refused(tmp_path):
    """A file of a search holds them as lists; of other shapes, or not finite, it is no such file."""
    model = types.SimpleNamespace(identity="abc")
    record = dict(solver="ddim", steps=3, options={}, checkpoint="abc")
    zeros = dict(predict=np.zeros((3, 4)).tolist(), correct=np.zeros((3, 5)).tolist(), lam=[0.1, 0.2, 0.3])
    file = tmp_path / "search.json"

    def read(corrections):
        file.write_text(json.dumps(record | dict(corrections=corrections)))
        return samplers.read_search(model, str(file)).corrections

    assert read(None) is None
    corrections = read(zeros)
    np.testing.assert_allclose(corrections.lam, [0.1, 0.2, 0.3])
    sde = VP()
    table = samplers.with_corrections(SOLVERS["ddim"](sde, 3), sde, corrections)
    assert (table.t != np.float32(SOLVERS["ddim"](sde, 3).t))[1:].all()
    for damaged in (
        zeros | dict(lam=[0.1]),
        zeros | dict(correct=zeros["predict"]),
        zeros | dict(lam=[0.1, 0.2, float("nan")]),
        dict(lam=[0.1]),
        [1],
    ):
        with pytest.raises(UserError, match=r"no file of python -m tools\.search"):
            read(damaged)
    with pytest.raises(UserError, match="for 3 evaluations"):
        samplers.with_corrections(SOLVERS["ddim"](sde, 4), sde, corrections)
