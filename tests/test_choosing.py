"""--solver=auto: what is measured once is the best, is kept and found again, and a search's file goes before it."""

import json
import types

import numpy as np
import pytest

from experiments import choosing, evaluation, measuring, report, samplers
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.sde import VP
from score_sde.space import pixels
from tests import programs
from tests.test_guides import CLASSIFIER, model_in


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two solvers on two grids, and a model whose statistics are not asked for."""
    monkeypatch.setattr(choosing, "CHOICES", {"ddim": {}, "deis": {"order": (2,)}})
    monkeypatch.setattr(choosing, "GRIDS", ("logsnr", "time"))
    monkeypatch.setattr(choosing, "NOISES", 4)
    monkeypatch.setattr(choosing, "FEW", 2)
    monkeypatch.setattr(measuring, "ems_of", lambda *arguments: None)
    return model_in(tmp_path)


def test_the_best_is_measured_once_and_a_search_goes_before_it(small, capsys):
    searched, path = choosing.best(small, 5)
    record = json.loads(path.read_text())
    distances = [way["rms"] for way in record["others"]]
    assert (len(distances), record["held_out_rms"]["measured"]) == (4, min(distances))
    assert (searched.solver, searched.options) == (record["solver"], record["options"])
    table = lambda options: samplers.build_tableau(VP(t_min=0.1), searched.solver, 5, **options)[0]
    np.testing.assert_array_equal(table(searched.options).t, table(record["options"]).t)
    capsys.readouterr()
    assert choosing.best(small, 5)[1] == path
    assert "measured in" not in capsys.readouterr().out
    mine = path.with_name("step8-ddim-5.json")
    theirs = dict(solver="ddim", steps=5, options={}, checkpoint="c0ffee", held_out_rms={"searched": 9.0})
    mine.write_text(json.dumps(theirs))
    assert choosing.best(small, 5)[1] == mine
    for change in (dict(steps=6), dict(checkpoint="other"), dict(guidance_scale=2.0, guided_by=None)):
        mine.write_text(json.dumps(theirs | change))
        assert choosing.best(small, 5)[1] == path


def test_what_was_searched_or_learned_is_measured_and_labelled(small, tmp_path):
    """A file of a search takes the place of solvers and steps; its learned corrections change the samples."""
    path = tmp_path / "search.json"
    lam = [0.1, -0.1, 0.1]
    corrections = dict(predict=np.zeros((3, 4)).tolist(), correct=np.zeros((3, 5)).tolist(), lam=lam)
    record = dict(solver="ddim", steps=3, options=dict(grid="time"), checkpoint="c0ffee")
    drawn = {}
    for name, given in (("searched", None), ("learned", corrections)):
        path.write_text(json.dumps(record | dict(corrections=given)))
        options = evaluation.Options(tableau=str(path))
        assert options.ways(small) == [("ddim", 3)]
        (result,) = evaluation.sample_grid(small, tmp_path / name, options)
        assert (result["table"], result["options"]["grid"]) == (name, "time")
        assert report.way(result) == f"ddim ({name})"
        drawn[name] = (tmp_path / name / "samples.png").read_bytes()
    assert drawn["searched"] != drawn["learned"]


def test_a_file_of_another_guidance_is_refused(small, tmp_path):
    path = tmp_path / "search.json"
    record = dict(solver="ddim", steps=5, options={}, checkpoint="c0ffee", guidance_scale=2.0, guided_by=None)
    path.write_text(json.dumps(record))
    assert samplers.read_search(small, str(path), (2.0, None)).steps == 5
    for bent, words in (((None, None), "sampling has no guidance"), ((2.0, "classifier one"), "by classifier one")):
        with pytest.raises(UserError, match=words):
            samplers.read_search(small, str(path), bent)


def test_a_file_of_another_sde_is_refused(small):
    path = choosing.best(small, 5)[1]
    record = json.loads(path.read_text())
    assert record["sde"]["name"] == "VP"
    path.write_text(json.dumps(record | dict(sde=record["sde"] | dict(beta_max=15.0))))
    with pytest.raises(UserError, match=r"searched under \{.*15\.0.*, this model's SDE is \{.*: search again"):
        samplers.read_search(small, str(path))
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "sde"}))  # of before
    assert samplers.read_search(small, str(path)).steps == 5


def test_a_search_for_a_model_guided_by_a_classifier(small, capsys):
    """Its file is for that guide alone, and is what --solver=auto takes."""
    search = programs.contents("search")["search"]
    given = dict(noises=4, minutes=0.1, guidance=Guidance(2.0), beside=CLASSIFIER)
    path, held_out = search(small, "ddim", 3, {}, **given)
    assert path.name == "step8-ddim-3-guidance2-by-classifier-one.json"
    assert held_out["searched"] > 0
    with pytest.raises(UserError, match="was searched for guidance 2 by classifier one, sampling has no guidance"):
        samplers.read_search(small, str(path))
    assert choosing.best(small, 3, guidance=Guidance(2.0), beside=CLASSIFIER)[1] == path


@pytest.mark.parametrize(
    ("dataset", "shape", "name"),
    [
        ("data/cifar10.npz", (32, 32, 3), "resnet20-cifar10"),
        ("cifar10", (16, 16, 3), None),
        ("digits", (8, 8, 1), None),
        (None, (32, 32, 3), None),
    ],
)
def test_learning_counts_features_of_images_of_this_size_alone(dataset, shape, name):
    config = types.SimpleNamespace(data=types.SimpleNamespace(dataset=dataset))
    own_network = programs.contents("search")["own_network"]
    network = own_network(types.SimpleNamespace(config=config, diffusion=types.SimpleNamespace(space=pixels(shape))))
    assert (network and network.name) == name
