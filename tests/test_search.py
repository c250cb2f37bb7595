"""The search for a solver's times."""

import time

import numpy as np

from solvers import search


def test_descent_finds_the_minimum():
    """Of a quadratic whose minimum is a rising grid, to the finest part of a gap that is tried; the ends stay."""
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
