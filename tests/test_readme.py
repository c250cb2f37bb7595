"""The programs of the README run as they stand there."""

import pathlib
import re

import numpy as np
import pytest

README = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text()
OPEN_A_RUN, YOUR_OWN_NETWORK = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(program: str) -> dict:
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    return names


def test_a_run_is_opened_and_drawn_from(monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[1])
    assert len(OPEN_A_RUN.splitlines()) <= 10
    images = run(OPEN_A_RUN)["images"]
    assert images.shape == (8, 28, 28, 1) and images.dtype == np.uint8
    assert images.std() > 50  # garments, neither gray nor constant


@pytest.mark.slow
def test_a_network_of_ones_own_is_measured_sampled_and_judged():
    assert len(YOUR_OWN_NETWORK.splitlines()) <= 25
    names = run(YOUR_OWN_NETWORK)
    exact = names["data"].log_density(names["x"], 1.0, 0.0).mean()
    drawn = names["data"].log_density(names["data"].draw(names["key"], 256), 1.0, 0.0).mean()
    assert abs(names["log_p"].mean() - exact) < 2  # nats of 64 dimensions; one probe
    assert abs(exact - drawn) < 8


def test_its_length():
    assert len(README.splitlines()) <= 110
