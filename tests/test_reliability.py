"""Situations from public bug reports: what a result is called, seeds, paths, and what is refused before any work."""

import json
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections.config_flags import config_flags

from configs import digits
from experiments import evaluation, measuring, program, report, runs
from experiments.config import check_values
from experiments.drawing import folder_of_its_own
from score_sde import files, seeds
from score_sde.errors import UserError
from score_sde.metrics import features

# ------------------------------------------------------------------------------------------------ seeds


def words(seed: int) -> list[int]:
    return jax.random.key_data(seeds.key(seed)).tolist()


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1])
def test_keys_of_small_seeds_are_those_of_jax(seed):
    assert words(seed) == jax.random.key_data(jax.random.key(np.uint32(seed))).tolist() == [0, seed]


def test_a_seed_counts_with_all_its_bits(x64):
    several = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    assert len({tuple(words(seed)) for seed in several}) == len(several)
    assert words(2**40 + 5) == jax.random.key_data(jax.random.key(2**40 + 5)).tolist()
    assert words(2**64) == words(0)  # the next seed after the largest


@pytest.mark.parametrize("text", ["-1", str(2**64), "1e3", "1.5", "many", ""])
@pytest.mark.parametrize("name", ["seed", "config.seed"])
def test_what_is_no_seed_is_refused(name, text):
    with pytest.raises(UserError) as refusal:
        config = parsed("--config=configs/digits.py", f"--{name}={text}")
        if name == "config.seed":
            check_values(config)
    assert "\n" not in str(refusal.value)


def parsed(*arguments: str):
    """The config after a program's flags are parsed, in flags of their own."""
    values = flags.FlagValues()
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(flags, "FLAGS", values)
        patched.setattr(sys, "argv", ["program", *arguments])  # where ml_collections looks for overrides
        flags.DEFINE(program.PathParser(), "workdir", None, "", flag_values=values)
        flags.DEFINE(program.NameParser(), "name", None, "", flag_values=values)
        flags.DEFINE_integer("seed", 0, "", lower_bound=0, upper_bound=seeds.LARGEST, flag_values=values)
        config = config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        patched.setattr(program, "shared_flags", lambda: None)
        program._parse(["program", *arguments])
        return program.config_of(config) if any("config" in argument for argument in arguments) else values


def test_the_largest_seed_is_taken():
    assert parsed(f"--seed={2**64 - 1}").seed == 2**64 - 1


# ------------------------------------------------------------------------------------------------ paths


def test_a_home_folder_is_meant_by_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed("--workdir=~/runs/x").workdir == f"{tmp_path}/runs/x"
    config = parsed("--config=configs/digits.py", "--config.data.dataset=~/images", "--config.training.init=~/runs/a")
    assert (config.data.dataset, config.training.init) == (f"{tmp_path}/images", f"{tmp_path}/runs/a")
    (tmp_path / "mine.py").write_text("from configs.digits import get_config\n")
    assert parsed("--config=~/mine.py").data.dataset == "digits"
    assert parsed("--workdir=a~b").workdir == "a~b"


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "hdfs://x/y", "https://example.org/a.npz"])
def test_an_address_in_a_cloud_is_refused_and_nothing_is_left(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"an address in a cloud.*mount it"):
        parsed(f"--workdir={address}")
    config = digits.get_config()
    config.data.dataset = address
    with pytest.raises(UserError, match="no address in a cloud"):
        check_values(config)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["~/x", "/x", "../x", "a/../../x", "gs://x", ""])
def test_a_name_is_no_path(name):
    with pytest.raises(UserError, match="is no name"):
        parsed(f"--name={name}")


# ------------------------------------------------------------------------------------------------ before any work


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match=r"file is no folder: choose another place"):
            files.check_writable(place)
    files.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs this may write everywhere
    with pytest.raises(UserError, match="may not be written"):
        files.check_writable(tmp_path / "a" / "b")


class Network:
    name, dimension = "toy", 3

    def identity(self) -> dict:
        return {"network": self.name}


def test_features_of_the_official_code_are_read(tmp_path):
    pool = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    np.savez(tmp_path / "cifar10_stats.npz", pool_3=pool)
    found = features.load(tmp_path / "cifar10_stats.npz", Network())
    np.testing.assert_allclose(found.mean, pool.mean(0, dtype=np.float64), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pool.astype(np.float64).T), rtol=1e-10)
    assert found.n == 5000 and np.array_equal(found.features, pool)
    for arrays in (dict(pool_3=pool[0]), dict(pool_3=pool[:1]), dict(other=pool), dict(pool_3=pool[:, :2])):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(UserError, match=r"pool_3|another network"):
            features.load(tmp_path / "wrong.npz", Network())


def test_a_wrong_reference_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    worked = []
    monkeypatch.setattr(evaluation.quality, "of_images", lambda *arguments: worked.append(arguments))
    with pytest.raises(UserError, match="no mu and sigma"):
        evaluation.images_and_data(None, Network(), samples="a.npz", reference=str(tmp_path / "wrong.npz"))
    options = evaluation.Options(network=lambda config: Network(), reference=str(tmp_path / "wrong.npz"))
    model = model_of("runs/digits", types.SimpleNamespace(sde=None))
    monkeypatch.setattr(evaluation.Options, "ways", lambda self, model: [])
    monkeypatch.setattr(evaluation.Options, "guide", lambda self, model: model)
    with pytest.raises(UserError, match="no mu and sigma"):
        evaluation.checked(model, ["loss", "fid"], options)
    assert not worked


# ------------------------------------------------------------------------------------------------ results


def model_of(workdir: str, diffusion, identity: str = "abc") -> runs.Model:
    return runs.Model(pathlib.Path(workdir), None, diffusion, {}, 8, identity)


IMAGES = dict(
    samples="/a/samples.npz", first_images="x", num_samples=9, dataset="digits", reference="r", weights_sha256="w",
    preprocessing="p",
)  # fmt: skip


@pytest.mark.parametrize("field", IMAGES)
def test_evaluations_of_other_images_are_kept_side_by_side(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = evaluation.path_of(IMAGES, "samples-FID")
    files.write(first, json.dumps(IMAGES))
    assert evaluation.path_of(IMAGES, "samples-FID") == first
    other = evaluation.path_of(IMAGES | {field: "another"}, "samples-FID")
    assert other != first and other.parent == first.parent
    assert first.name == "samples-FID.json"


ORIGIN = dict(
    checkpoint="abc", sde={"name": "VP"}, t_end=1e-3, data="digits", first_images="x", images=[[0, 64]], nodes=120,
    seed=0, guidance_scale=None,
)  # fmt: skip
CHANGES = dict(
    checkpoint="def", sde={"name": "VE"}, t_end=1e-4, data="other", first_images="y", images=[[64, 128]], nodes=60,
    seed=2**40, guidance_scale=2.0,
)  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_statistics_of_another_origin_are_kept_side_by_side(field, tmp_path, monkeypatch):
    path = tmp_path / "step8_nodes120_data64.npz"
    np.savez(path, origin=json.dumps(ORIGIN))
    assert measuring.of_its_own(path, ORIGIN) == path
    other = measuring.of_its_own(path, ORIGIN | {field: CHANGES[field]})
    assert other != path and other.name.startswith("step8_nodes120_data64_")
    before = {key: value for key, value in ORIGIN.items() if key != "first_images"}  # by an earlier version
    np.savez(path, origin=json.dumps(before))
    assert measuring.of_its_own(path, ORIGIN) == path


def test_numbers_in_names_keep_their_digits():
    told = [measuring.all_digits(value) for value in (2.0, 0.1, 1e-3, 2**32, 2**32 + 1, 2.0000001)]
    assert told == ["2", "0.1", "0.001", "4294967296", "4294967297", "2.0000001"]


def test_samples_of_another_call_are_kept_side_by_side(tmp_path):
    folder = tmp_path / "step8-ddim-5-seed0"
    assert folder_of_its_own(folder, "aa") == folder
    folder.mkdir()
    for record, own in (('{"identity": "aa"}', True), ('{"identity": "bb"}', False), ("{}", False), ("no", False)):
        (folder / "run.json").write_text(record)
        assert (folder_of_its_own(folder, "aa") == folder) == own
    assert folder_of_its_own(folder, "aa").name == "step8-ddim-5-seed0-aa"


LOSS = dict(mean=0.5, standard_error=0.1, images=10, seed=0, dataset="digits", ems_file=None, command="c", seconds=1.0)
LOSS |= dict(versions={})


@pytest.mark.parametrize("change", [dict(seed=1), dict(dataset="other"), dict(guidance=2.0), dict(ems_file="a.npz")])
def test_a_report_keeps_results_that_were_asked_for_otherwise(change):
    whole = report.add({"model": dict(workdir="a", step=1, identity="x")}, "loss", LOSS)
    whole = report.add(whole, "loss", LOSS | dict(mean=0.4))  # the same again takes its place
    assert "others" not in whole
    whole = report.add(whole, "loss", LOSS | change | dict(mean=0.3))
    assert (whole["loss"]["mean"], [row["mean"] for row in whole["others"]]) == (0.3, [0.4])
    whole = report.add(whole, "loss", LOSS | dict(mean=0.2))  # and back
    assert (whole["loss"]["mean"], [row["mean"] for row in whole["others"]]) == (0.2, [0.3])
    assert "Test loss 0.30000" in report.render(whole)
    again = report.joined({"model": whole["model"]}, {name: whole[name] for name in ("loss", "others")})
    assert (again["loss"]["mean"], [row["mean"] for row in again["others"]]) == (0.2, [0.3])


def test_pictures_of_results_that_were_asked_for_otherwise_have_other_names(tmp_path):
    plain, seeded = evaluation.Options(), evaluation.Options(seed=1)
    first = plain.picture(tmp_path, "samples")
    assert first["picture"] == "samples.png"
    whole = {"model": dict(workdir="a", step=1, identity="x"), "samples": first}
    files.write(tmp_path / "report.json", json.dumps(whole))
    assert plain.picture(tmp_path, "samples") == first
    assert seeded.picture(tmp_path, "samples")["picture"] not in ("samples.png", None)


def test_a_report_put_aside_twice_loses_nothing(tmp_path):
    """One checkpoint, then another, and the first again: results of both are in folders of their own."""
    at = lambda identity: model_of(str(tmp_path), None, identity)
    for identity, seed in (("aa", 0), ("bb", 0), ("aa", 1), ("bb", 1), ("cc", 0)):
        whole = evaluation.earlier(at(identity), tmp_path)
        evaluation.write(tmp_path, report.add(whole, "loss", LOSS | dict(seed=seed)))
    kept = {}
    for folder in (tmp_path / "step8", tmp_path / "step8-bb"):
        found = report.read(folder)
        kept[found["model"]["identity"]] = {row["seed"] for row in [found["loss"], *found.get("others", [])]}
    assert kept == {"aa": {0, 1}, "bb": {0, 1}}
    assert report.read(tmp_path)["model"]["identity"] == "cc"


def test_a_search_that_was_asked_for_otherwise_is_kept(tmp_path):
    path, keys = tmp_path / "step8-ddim-5.json", ("checkpoint", "asked")
    record = dict(checkpoint="abc", asked="x", held_out_rms={})
    assert report.beside(path, record, keys) == path
    files.write(path, json.dumps(record))
    assert report.beside(path, record | dict(held_out_rms={"published": 1}), keys) == path
    for change in (dict(checkpoint="def"), dict(asked="y")):
        assert report.beside(path, record | change, keys) != path
