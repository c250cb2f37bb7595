"""Reports add up over calls and are the same to read as to compute with; scalars come back from event files."""

import json
import struct

import jax
import numpy as np
import pytest
from tensorboardX import SummaryWriter

from configs import digits
from experiments import build, events, report, runs
from score_sde import checkpoint, training
from score_sde.errors import UserError
from tests.programs import ok, program

MADE = dict(seed=0, seconds=1.0, command="evaluate.py", versions=dict(jax="0"))


def quality(**changes) -> dict:
    """A result of "fid" as it is made for samples."""
    result = dict(
        title="samples by ddim", solver="ddim", steps=5, options={}, num_samples=100, num_reference=1500, frechet=0.5,
        inception_score=2.0, inception_score_std=0.1, inception_score_splits=10, kernel=0.01, kernel_std=0.001,
        kernel_subsets=100, kernel_subset_size=100, precision=0.5, recall=0.25, pairs_samples=100, pairs_reference=1500,
        floor=0.125, floor_num_samples=100, distance="FD-resnet20-toy", dimension=64, against="1500 training images",
        reference="runs/statistics/toy.npz", network="resnet20-toy", weights_sha256="0123456789", preprocessing="none",
    )  # fmt: skip
    return result | MADE | changes


# -- Event files --


def test_scalars_come_back(tmp_path):
    """What was written, by step; of a step written again by a resumed run the later value; none beyond the last."""
    values = np.random.default_rng(0).random(40).astype(np.float32)
    with SummaryWriter(str(tmp_path)) as board:
        board.add_text(events.DEVICES, "2 x cpu", 0)
        for step, value in enumerate(values[:30]):
            board.add_scalar("loss", value, step)
            board.add_image("samples", np.zeros((1, 4, 4), np.uint8), step)
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0")  # a file is named for its second
    with SummaryWriter(str(tmp_path)) as board:
        for step in range(20, 40):
            board.add_scalar("loss", 2 * values[step], step)
    curves, hours, devices = events.scalars(tmp_path, 39)
    np.testing.assert_array_equal(curves["loss"].steps, np.arange(40))
    np.testing.assert_array_equal(curves["loss"].values, np.where(np.arange(40) < 20, values, 2 * values))
    assert 0 < hours < 0.1
    assert devices == events.training(tmp_path, 39)[0]["devices"] == ["2 x cpu"]
    np.testing.assert_array_equal(events.scalars(tmp_path, 25)[0]["loss"].steps, np.arange(26))
    record, _, held_out = events.training(tmp_path, 39)
    np.testing.assert_allclose(record["loss"], 2 * values[20:].mean(), rtol=1e-6)
    assert held_out is None
    assert record["held_out_loss"] is None
    assert events.training(tmp_path / "none", 39) is None


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_killed_writer_loses_its_last_record_alone(tmp_path, cut):
    with SummaryWriter(str(tmp_path)) as board:
        for step in range(10):
            board.add_scalar("loss", step, step)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    np.testing.assert_array_equal(events.scalars(tmp_path, 9)[0]["loss"].values, np.arange(9))


@pytest.mark.parametrize(
    "damage", [np.full(40, 255, np.uint8).tobytes(), struct.pack("<QI", 40, 0) + bytes([255] * 44)]
)
def test_damage_ends_what_is_read(tmp_path, damage):
    """A length beyond the file; a record that is no event."""
    with SummaryWriter(str(tmp_path)) as board:
        for step in range(10):
            board.add_scalar("loss", step, step)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + damage)
    curves, *_ = events.scalars(tmp_path, 9)
    np.testing.assert_array_equal(curves["loss"].values, np.arange(10))


# -- Adding up --


def test_results_add_up():
    """A metric is replaced; "fid" gains a row for every other way of sampling and replaces the same one."""
    found = {"model": dict(workdir="runs/toy", step=3, identity="abc")}
    for mean in (1.0, 2.0):
        found = report.add(found, "loss", dict(mean=mean, standard_error=0.1, images=5) | MADE)
    assert found["loss"]["mean"] == 2.0
    ways = [dict(steps=5), dict(steps=6), dict(solver="dpmv3"), dict(num_samples=200), dict(options=dict(grid=(1, 2)))]
    for i, way in enumerate(ways):
        found = report.add(found, "fid", quality(frechet=i, **way))
    for i, way in enumerate(ways):  # the same again, better
        found = report.add(found, "fid", quality(frechet=10 + i, **way))
    assert [row["frechet"] for row in found["fid"]] == [10, 11, 12, 13, 14]
    assert json.loads(json.dumps(found)) == found


def test_rendered_rows(tmp_path):
    """Each row with its samples, its floor and the weights; networks apart; FID for the standard one alone."""
    found = {"model": dict(workdir="runs/toy", step=3, identity="abc")}
    for steps in (10, 5):
        found = report.add(found, "fid", quality(steps=steps))
    found = report.add(found, "fid", quality(network="resnet20-other", distance="FD-resnet20-other", num_samples=50))
    text = report.render(found)
    assert "FID" not in text
    table = [line for line in text.splitlines() if line.startswith("| ddim")]
    assert [line.split(" | ")[1:3] for line in table] == [["5", "100"], ["10", "100"], ["5", "50"]]
    assert all("0.5 | 0.125 (100)" in line for line in table)
    assert text.count("weights 01234567") == 2
    assert text.count("Warning: 50 images do not determine") == 1
    assert text.count("`python evaluate.py`") == 3
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert report.read(tmp_path) == found
    for damaged in ("{", "[]", '{"model": {}}'):
        (tmp_path / "report.json").write_text(damaged)
        with pytest.raises(UserError, match="delete it"):
            report.read(tmp_path)
    assert report.read(tmp_path / "none") is None


def test_distances_by_evaluations():
    """Several solvers and numbers of evaluations make the papers' table, of equal samples and seed, gaps left empty."""
    ways = [("ddim", 5, 0.75), ("ddim", 10, 0.5), ("dpmv3", 5, 0.625), ("dpmv3", 20, 0.25)]
    results = [quality(solver=solver, steps=steps, frechet=value) for solver, steps, value in ways]
    lines = report.by_evaluations([*results, quality(solver="unipc", steps=6, seed=1)])
    assert lines[2:] == [
        "| evaluations | 5 | 10 | 20 |",
        "|---|---|---|---|",
        "| ddim | 0.75 | 0.5 |  |",
        "| dpmv3 | 0.625 |  | 0.25 |",
        "",
    ]
    assert "100 samples from the same noises (seed 0)" in lines[0]
    assert lines[2] in report.fid_lines(results)
    assert report.by_evaluations(results[:2]) == []  # one solver


def test_table_of_checkpoints():
    reports = {
        step: report.add({}, "loss", dict(mean=1 / step, standard_error=0.0, images=5) | MADE) for step in (1000, 2000)
    }
    reports[2000] = report.add(reports[2000], "fid", quality(solver="dpmv3"))
    header, _, *rows = report.compared(reports)
    assert header == "| step | test loss | FD-resnet20-toy of 100 by dpmv3 5 |"
    assert rows == ["| 1000 | 0.00100 +- 0.00000 |  |", "| 2000 | 0.00050 +- 0.00000 | 0.5 (floor 0.125) |"]


# -- The program --


def test_a_guided_model_has_rows_of_its_own():
    """What bends the model tells rows apart, and stands beside the solver; a row of an older report is not guided."""
    whole = dict(model=dict(workdir="run", step=1, identity="a"), fid=[quality()])
    for scale, frechet in ((2.0, 0.4), (3.0, 0.3), (2.0, 0.2)):
        whole = report.add(whole, "fid", quality(guidance=scale, interval=(0.1, 0.9), frechet=frechet))
    assert [(row.get("guidance"), row["frechet"]) for row in whole["fid"]] == [(None, 0.5), (3.0, 0.3), (2.0, 0.2)]
    assert "| ddim, guidance 2.0, interval [0.1, 0.9] | 5 |" in report.render(whole)


def untrained_run(workdir, dataset: str, steps) -> None:
    """A run of a tiny network on 8x8 images whose checkpoints at `steps` are all untrained, but different."""
    config = digits.get_config()
    with config.unlocked():
        config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
        config.data.dataset = dataset
        config.sampling.update(batch_size=4)
    runs.claim_workdir(workdir, config)
    init = build.diffusion_of(config).init
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
    for step in steps:
        state = training.init_state(init(jax.random.key(step)), training.make_optimizer(**config.optim))
        checkpoints.save(state._replace(step=np.int32(step)), {})
    checkpoints.wait()


def test_reports_of_a_run(tmp_path):
    """Calls add up; every checkpoint has its report; that of a last checkpoint is kept when the run goes on."""
    workdir = tmp_path / "run"
    untrained_run(workdir, "digits", [1, 2])
    other = {"model": dict(workdir="run", step=7, identity="another")}
    (workdir / "eval").mkdir()
    (workdir / "eval/report.json").write_text(json.dumps(other))
    out = ok(program("evaluate", "--workdir=run", "--metrics=loss", folder=tmp_path))
    assert "the report of step 7 is now in run/eval/step7" in out
    assert json.loads((workdir / "eval/step7/report.json").read_text()) == other
    ok(program("evaluate", "--workdir=run", "--metrics=samples", "--solver=ddim", "--steps=2", folder=tmp_path))
    both = json.loads((workdir / "eval/report.json").read_text())
    assert both.keys() == {"model", "loss", "samples"}
    assert f"Test loss {both['loss']['mean']:.5f}" in out
    for name in ("loss", "samples"):
        assert both[name]["seconds"] > 0
        assert f"--metrics={name}" in both[name]["command"]
        assert both[name]["versions"].keys() == {"score_sde", "jax", "python", "on"}
    text = (workdir / "eval/report.md").read_text()
    assert "![samples](samples.png)" in text
    assert (workdir / "eval/samples.png").stat().st_size > 0

    out = ok(program("evaluate", "--workdir=run", "--metrics=loss", "--checkpoint=all", folder=tmp_path))
    losses = [json.loads((workdir / f"eval/step{k}/report.json").read_text())["loss"]["mean"] for k in (1, 2)]
    assert losses[1] == both["loss"]["mean"] != losses[0]
    table = (workdir / "eval/checkpoints.md").read_text()
    for step, loss in zip((1, 2), losses, strict=True):
        assert f"| {step} | {loss:.5f}" in table
        assert f"| {step} | {loss:.5f}" in out
    refused = program("evaluate", "--workdir=run", "--checkpoint=last", folder=tmp_path)
    assert refused.returncode == 2
    assert "expected a step, or all" in refused.stderr
