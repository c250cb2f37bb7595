"""Distances of features against torch-fidelity, pytorch-fid and closed forms; feature networks; statistics files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits
from experiments import build, runs
from score_sde import checkpoint, sources, training
from score_sde.errors import UserError
from score_sde.metrics import distances, features, resnet
from tests import reference
from tests.programs import ROOT, ok, program

GROUP = "I_metrics"


def figures(kind: str) -> dict:
    """The figures of one metric, empty where the reference is absent."""
    return reference.description(GROUP)[kind] if reference.find(f"{GROUP}.json") else {}


def features_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    """The two sets of a case that is named like `gen40_vs_real40_singular`."""
    stored = reference.arrays(GROUP)
    if case.startswith("dead_features"):
        pair = [stored[f"feat/{name}"].copy() for name in ("gen", "real")]
        for x in pair:
            x[:, [int(column) for column in case.split("_")[2:]]] = 0
        return tuple(pair)
    first, second = case.split("_vs_")
    return stored[f"feat/{first}"], stored[f"feat/{second.split('_')[0]}"]


def frechet(x, y) -> float:
    a, b = distances.gaussian(x), distances.gaussian(y)
    return distances.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("case", figures("fid"))
def test_frechet_distance_equals_published(case):
    """To the exact trace for singular covariances as well, where the published square roots lose half of the digits."""
    expected = figures("fid")[case]
    ours = frechet(*features_of(case))
    print(f"{case}: {ours:.12f}, off the nuclear norm of the features by {ours - expected['nuclear_norm_f64']:.1e}")
    np.testing.assert_allclose(ours, expected["nuclear_norm_f64"], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(ours, expected["pytorch_fid"], rtol=1e-9, atol=2e-6)


def test_moments_equal_published():
    stored = reference.arrays(GROUP)
    for name in ("gen", "real"):
        x = stored[f"feat/{name}"]
        streamed = distances.empty(x.shape[1])
        for part in np.split(x, [1, 7, 300]):
            streamed = distances.merge(streamed, distances.gaussian(part))
        for found in (distances.gaussian(x), streamed):
            assert found.n == len(x)
            np.testing.assert_allclose(found.mean, stored[f"fid/mu_{name}"], rtol=1e-12)
            np.testing.assert_allclose(found.covariance, stored[f"fid/sigma_{name}"], rtol=1e-10, atol=1e-14)


def test_frechet_distance_closed_forms():
    """Covariances that commute: the trace is sum (sqrt a - sqrt b)^2; zero variances and low ranks included."""
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(20, 20)))
    a, b = random.random(20) * 3, random.random(20)
    a[:5], b[3:9] = 0, 0
    means = random.normal(size=(2, 20))
    covariances = [rotation @ np.diag(values) @ rotation.T for values in (a, b)]
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    ours = distances.frechet_distance(means[0], covariances[0], means[1], covariances[1])
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    zero = np.zeros((20, 20))
    assert distances.frechet_distance(means[0], zero, means[0], zero) == 0
    with pytest.raises(UserError, match="at least 2"):
        _ = distances.gaussian(means[:1]).covariance


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_do_not_cancel(offset):
    x = np.random.default_rng(0).normal(size=(500, 6)) + offset
    streamed = distances.empty(6)
    for start in range(0, 500, 33):
        streamed = distances.merge(streamed, distances.gaussian(x[start : start + 33]))
    np.testing.assert_allclose(streamed.covariance, np.cov(x - offset, rowvar=False), rtol=1e-6, atol=1e-9)


def test_kernel_distance_equals_published():
    kid, stored = figures("kid"), reference.arrays(GROUP)
    x, y = stored["feat/gen"], stored["feat/real"]
    np.testing.assert_allclose(distances.mmd2(x, y), kid["full_unbiased_f64"], rtol=1e-11)
    np.testing.assert_allclose(distances.mmd2(x, y, unbiased=False), kid["full_biased_f64"], rtol=1e-11)
    small = distances.mmd2(stored["feat/gen40"], stored["feat/real40"])
    np.testing.assert_allclose(small, kid["full_unbiased_f64_gen40_real40"], rtol=1e-11)
    other = distances.mmd2(x, y, degree=2, gamma=0.1, coef0=0.5)
    np.testing.assert_allclose(other, kid["full_unbiased_f64_degree2_gamma0.1_coef0_0.5"], rtol=1e-11)
    cases = [name for name in kid if "subset_size" in (kid[name] if isinstance(kid[name], dict) else ())]
    assert cases
    for name in cases:
        options = {key: kid[name][key] for key in ("subsets", "subset_size", "seed")}
        values = distances.kernel_distance(x, y, **options)
        np.testing.assert_allclose(values, stored[f"kid/{name}/mmd2_f64"], rtol=1e-11)
        np.testing.assert_allclose([values.mean(), values.std()], kid[name]["own_f64"], rtol=1e-11)
        np.testing.assert_allclose([values.mean(), values.std()], kid[name]["torch_fidelity_f64"], rtol=1e-11)
    blocks = kid["contiguous_4_blocks_own_f64"]
    found = distances.block_kernel_distance(x, y, len(blocks["values"]))
    np.testing.assert_allclose(found, [blocks["mean"], blocks["std_error_ddof1"]], rtol=1e-10)


def test_kernel_distance_is_unbiased():
    """Between sets of one distribution it is zero on average, where the biased form is not."""
    random = np.random.default_rng(0)
    pairs = random.normal(size=(400, 2, 12, 5))
    values = np.array([distances.mmd2(*pair) for pair in pairs])
    biased = np.array([distances.mmd2(*pair, unbiased=False) for pair in pairs])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error < 0.3 * biased.mean()
    with pytest.raises(UserError, match="subsets of 1000"):
        distances.kernel_distance(pairs[0, 0], pairs[0, 1])


def logits_of(name: str) -> np.ndarray:
    if name == "503x50":
        return reference.arrays(GROUP)["isc/logits_503x50"]
    return np.float32(3) * reference.normal("fixI/logits/c", tuple(int(n) for n in name.split("x")))


@pytest.mark.parametrize("case", [name for name in figures("isc") if "splits" in name])
def test_inception_score_equals_published(case):
    size, splits, shuffle = case.split("/")
    seed = int(shuffle.removeprefix("shuffle_seed")) if shuffle.startswith("shuffle") else None
    scores = distances.inception_score(logits_of(size), splits=int(splits.removeprefix("splits")), seed=seed)
    for source, expected in figures("isc")[case].items():
        np.testing.assert_allclose([scores.mean(), scores.std()], expected, rtol=1e-11, atol=1e-14, err_msg=source)


def test_inception_score_bounds():
    """One for equal logits; the number of classes for certain and balanced ones, even if p underflows."""
    np.testing.assert_allclose(distances.inception_score(np.ones((20, 7)), splits=2), 1.0, rtol=1e-12)
    certain = 1e4 * np.tile(np.eye(5), (4, 1))
    np.testing.assert_allclose(distances.inception_score(certain, splits=4), 5.0, rtol=1e-12)
    with pytest.raises(UserError, match="10 splits"):
        distances.inception_score(np.ones((9, 3)))


@pytest.mark.parametrize("case", list(figures("prc")))
def test_precision_recall_equals_published(case):
    expected = figures("prc")[case]
    name, k = case.split("/k")
    found = distances.precision_recall(*features_of(name), k=int(k))
    counts = found.generated_inside.sum(), found.real_inside.sum()
    assert counts == (expected["n_gen_inside"], expected["n_real_inside"])
    np.testing.assert_allclose((found.precision, found.recall), expected["own_f64"], rtol=1e-12)
    stored = reference.arrays(GROUP)
    if f"prc/{case}/gen_inside" in stored:
        np.testing.assert_array_equal(found.generated_inside, stored[f"prc/{case}/gen_inside"])
        np.testing.assert_array_equal(found.real_inside, stored[f"prc/{case}/real_inside"])
        for side, x in zip(("gen", "real"), features_of(name), strict=True):
            radius = np.sqrt(distances.radii2(x.astype(np.float64), int(k)))
            np.testing.assert_allclose(radius, stored[f"prc/{case}/radius_{side}"], rtol=1e-10)


def test_precision_recall_limits(monkeypatch):
    """A set within itself, sets far apart, duplicates whose balls have no extent; and blocks change nothing."""
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 8)) + 100
    same = distances.precision_recall(x, x)
    apart = distances.precision_recall(x, x + 50)
    assert (same.precision, same.recall, apart.precision, apart.recall) == (1, 1, 0, 0)
    twins = np.repeat(x[:10], 2, axis=0)
    found = distances.precision_recall(twins, x, k=1)
    assert found.precision == 1
    np.testing.assert_array_equal(found.real_inside, np.arange(50) < 10)
    y = random.normal(size=(40, 8)) * 0.8 + 100
    whole = distances.precision_recall(y, x)
    monkeypatch.setattr(distances, "BLOCK", 7)
    for a, b in zip(whole, distances.precision_recall(y, x), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0 < whole.recall < 1


# -- Feature networks, measurement, statistics files --


def small_network(tmp_path, name="toy", seed=0, image_shape=(8, 8, 1)) -> features.FeatureNetwork:
    """A local network of random weights."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(resnet.ResNet20(10).init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), shapes)
    path = tmp_path / f"resnet20_{name}.npz"
    resnet.save(path, params, dict(image_shape=image_shape, num_classes=10))
    return features.local(path)


def random_images(n: int, shape=(8, 8, 1)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, *shape), np.uint8)


def test_local_network_file(tmp_path):
    """Weights of at most 1 MB survive in half precision; other files are refused in one line."""
    network = small_network(tmp_path)
    path = tmp_path / "resnet20_toy.npz"
    assert path.stat().st_size < 2**20
    assert (network.name, network.distance, network.dimension) == ("resnet20-toy", "FD-resnet20-toy", 64)
    with np.load(path) as file:
        arrays = dict(file)
    for bad in (arrays | {"extra": np.zeros(1)}, {"mu": np.zeros(3)}, arrays | {"Dense_0/bias": np.zeros(3)}):
        np.savez(path, **bad)
        with pytest.raises(UserError, match="no weights of a ResNet-20"):
            features.local(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="no weights of a ResNet-20"):
        features.local(path)


def test_networks_in_the_box():
    """Every committed network says what it was trained on and how well it classifies."""
    for name, path in features.local_networks().items():
        network = features.local(path)
        _, provenance, _ = resnet.load(path)
        assert network.name == name
        assert path.stat().st_size <= 2**20
        assert provenance["test_accuracy"] > 0.8
        assert {"data", "epochs", "command", "num_train"} <= provenance.keys()


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_extraction_is_independent_of_batches(tmp_path, shape):
    network = small_network(tmp_path, image_shape=shape)
    images = random_images(11, shape)
    whole = next(features.extract(network, [images]))
    assert [a.shape for a in whole] == [(11, 64), (11, 10)]
    parts = list(features.extract(network, [images[:4], images[4:8], images[8:]]))
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_allclose(np.concatenate(pieces), array, rtol=1e-4, atol=1e-5)


def test_images_that_do_not_fit(tmp_path):
    network = small_network(tmp_path)
    for images, told in (
        (random_images(2, (9, 9, 1)), "8x8x1"),
        (random_images(2, (8, 8, 3)), "1 channels"),
        (random_images(2).astype(np.float32), "uint8"),
    ):
        with pytest.raises(UserError, match=told):
            next(features.extract(network, [images]))
    colour = features.as_channels(random_images(2), network._replace(channels=3))
    np.testing.assert_array_equal(colour, random_images(2).repeat(3, axis=3))


def test_measurement_resumes_and_counts(tmp_path):
    """Exactly n images whatever the batch; finished batches are read back and not made again; memory is bounded."""
    network, images, asked = small_network(tmp_path), random_images(23), []

    def images_of(start, stop):
        if len(asked) == 2 and not resumed:
            raise KeyboardInterrupt
        asked.append((start, stop))
        return images[start:stop]

    resumed, folder = False, tmp_path / "batches"
    with pytest.raises(KeyboardInterrupt):
        features.measure(network, images_of, 23, batch_size=5, folder=folder)
    resumed = True
    found = features.measure(network, images_of, 23, batch_size=5, folder=folder)
    assert asked == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    again = features.measure(network, images_of, 23, batch_size=5, folder=folder)
    assert len(asked) == 5
    whole = features.measure(network, lambda start, stop: images[start:stop], 23, batch_size=23)
    for other in (found, again):
        assert other.moments.n == len(other.features) == len(other.logits) == 23
        np.testing.assert_allclose(other.moments.covariance, whole.moments.covariance, rtol=1e-3, atol=1e-6)


def test_only_the_first_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "KEPT", 7)
    images = random_images(23)
    found = features.measure(small_network(tmp_path), lambda a, b: images[a:b], 23, batch_size=5)
    assert (found.moments.n, len(found.features), len(found.logits)) == (23, 7, 23)


def test_statistics_files(tmp_path):
    """What is saved is found again; other tools' files are taken; another network's are refused."""
    network, images = small_network(tmp_path), random_images(90)
    found = features.measure(network, lambda a, b: images[a:b], 90, batch_size=30)
    path = tmp_path / "statistics.npz"
    features.save(path, features.statistics(found, dict(data="noise") | network.identity()))
    loaded = features.load(path, network)
    np.testing.assert_array_equal(loaded.covariance, found.moments.covariance)
    np.testing.assert_array_equal(loaded.features, found.features)
    assert (loaded.n, loaded.provenance["weights_sha256"]) == (90, network.sha256)
    assert abs(features.frechet(found, loaded)) < 1e-9
    result = features.compare(found, loaded, subsets=3)
    assert (result["precision"], result["recall"], result["kernel_subset_size"]) == (1, 1, 90)
    np.testing.assert_allclose(result["kernel"], distances.mmd2(found.features, found.features))

    with pytest.raises(UserError, match="made with network"):
        features.load(path, small_network(tmp_path, "other"))
    with pytest.raises(UserError, match="made with weights_sha256"):
        features.load(path, network._replace(sha256="0"))
    with pytest.raises(UserError, match="another network"):
        features.load(path, network._replace(dimension=2048))
    foreign = tmp_path / "fid_stats.npz"
    np.savez(foreign, mu=loaded.mean, sigma=loaded.covariance)
    taken = features.load(foreign, network)
    assert (taken.n, taken.features, taken.provenance) == (None, None, {})
    assert "kernel" not in features.compare(found, taken)
    for bad in (dict(mu=loaded.mean), dict(mu=loaded.mean * np.nan, sigma=loaded.covariance)):
        np.savez(foreign, **bad)
        with pytest.raises(UserError, match=r"mu and sigma|not finite"):
            features.load(foreign, network)


# -- Programs --


@pytest.fixture(scope="module")
def run_and_network(tmp_path_factory):
    """A folder with an untrained run of the digits and a feature network trained on them for one epoch."""
    folder = tmp_path_factory.mktemp("quality")
    trained = program(
        "metrics", "--dataset=digits", "--name=digits", "--image_size=8", "--num_channels=1",
        "--epochs=1", "--folder=.", folder=folder
    )  # fmt: skip
    assert "test accuracy" in ok(trained)
    config = digits.get_config()
    with config.unlocked():
        config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    workdir = folder / "run"
    runs.claim_workdir(workdir, config)
    init = build.diffusion_of(config).init
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
    checkpoints.save(training.init_state(init(jax.random.key(0)), training.make_optimizer(**config.optim)), {})
    checkpoints.wait()
    return folder


@pytest.mark.slow
def test_samples_of_a_run(run_and_network):
    """Sample, measure, report; more samples reuse the finished batches."""
    folder = run_and_network
    arguments = ["--workdir=run", "--metrics=fid", "--network=resnet20_digits.npz", "--solver=ddim", "--steps=2"]
    kept = lambda: {path: path.stat().st_mtime_ns for path in (folder / "run/eval").glob("step0-ddim-2-*/*.npz")}
    for n, devices in ((70, 2), (130, 1)):
        before = kept()
        out = ok(program("evaluate", *arguments, f"--num_samples={n}", devices=devices, folder=folder))
        *_, report = json.loads((folder / "run/eval/report.json").read_text())["fid"]
        assert "FD-resnet20-digits" in out
        assert report["weights_sha256"][:8] in out
        assert (report["num_samples"], report["num_reference"]) == (n, 1500)
        assert 0 < report["floor"] < report["frechet"]
    assert len(before) == 2  # 64 + 6
    assert before.items() < kept().items()
    assert len(kept()) == 4  # 64 + 64 + 2
    assert len(list((folder / "runs/statistics").glob("digits-train-1500-*.npz"))) == 1

    # several solvers and numbers of evaluations in one call: a row each, and a table of all
    arguments[-2:] = ["--solver=ddim,dpmpp", "--steps=2,3"]
    before = kept()
    ok(program("evaluate", *arguments, "--num_samples=70", folder=folder))
    assert kept() == before
    rows = json.loads((folder / "run/eval/report.json").read_text())["fid"]
    ways = [(solver, steps) for solver in ("ddim", "dpmpp") for steps in (2, 3)]
    assert {(row["solver"], row["steps"]) for row in rows if row["num_samples"] == 70} == set(ways)
    assert "| evaluations | 2 | 3 |" in (folder / "run/eval/report.md").read_text()


@pytest.mark.slow
def test_images_of_others(run_and_network):
    """A folder that holds the test images is as far from the data as the floor says; a mistake is one line."""
    folder = run_and_network
    images = sources.load("digits", "test", image_size=8, num_channels=1)
    (folder / "theirs").mkdir()
    for i, image in enumerate(images.take(np.arange(images.size))["image"]):
        Image.fromarray(image[..., 0]).save(folder / "theirs" / f"{i:03d}.png")
    arguments = [f"--config={ROOT}/configs/digits.py", "--samples=theirs", "--network=resnet20_digits.npz"]
    ok(program("evaluate", *arguments, folder=folder))
    report = json.loads((folder / "runs/evaluated/theirs-FD-resnet20-digits.json").read_text())
    np.testing.assert_allclose(report["frechet"], report["floor"], rtol=1e-6)
    np.savez(folder / "statistics.npz", mu=np.zeros(2048))
    result = program("evaluate", *arguments, "--reference=statistics.npz", folder=folder)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: statistics.npz is no file of statistics")
