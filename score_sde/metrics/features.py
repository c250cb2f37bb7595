"""Feature networks behind one interface, and the statistics file that stands for a data set.

network = local("fashion_mnist")
for features, logits in extract(network, batches): ...
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from score_sde import files, parallel
from score_sde.errors import UserError
from score_sde.metrics import distances, inception, resnet
from score_sde.metrics.distances import Gaussian


class FeatureNetwork(NamedTuple):
    """What features are measured with.

    name: such as "inception-2015-12-05 (tf)" or "resnet20-fashion_mnist"
    distance: what the Frechet distance in these features is called; "FID" for the standard network alone
    sha256: of the weights file
    preprocessing: what happens to levels 0..255 first
    channels, dimension: of images and of features
    apply: (params, uint8 (B, H, W, channels)) -> features (B, dimension), logits (B, classes)
    """

    name: str
    distance: str
    sha256: str
    preprocessing: str
    channels: int
    dimension: int
    params: Any
    apply: Callable

    def identity(self) -> dict[str, str]:
        """What statistics must agree in to be compared."""
        return dict(network=self.name, weights_sha256=self.sha256, preprocessing=self.preprocessing)


def standard(path: str | os.PathLike, *, mode: str = "tf", any_weights: bool = False) -> FeatureNetwork:
    """The Inception network of the FID, from pytorch-fid's file, with a preprocessing of `inception.MODES`.

    Its logits are those without bias, of which torch-fidelity computes the Inception Score. Weights of another file,
    which any_weights allows, are named for their hash.
    """
    if mode not in inception.MODES:
        raise UserError(f"unknown Inception preprocessing {mode!r}: use one of {', '.join(inception.MODES)}")
    params, sha256 = inception.load(path, any_weights=any_weights)
    grid, zero = inception.MODES[mode]

    def apply(params, images):
        features, logits, _ = inception.Inception().apply({"params": params}, inception.preprocess(images, grid, zero))
        return features, logits - params["fc"]["bias"][None]

    official = sha256 == inception.SHA256
    name = f"inception-2015-12-05 ({mode})" if official else f"inception-{sha256[:8]} ({mode})"
    preprocessing = f"uint8, {grid} bilinear to 299, (x - {zero:g}) / {zero:g}, gray repeated"
    return FeatureNetwork(name, "FID" if official else f"FD-{name}", sha256, preprocessing, 3, 2048, params, apply)


def local(path: str | os.PathLike) -> FeatureNetwork:
    """A ResNet-20 by python -m tools.train_features, for images of the size it was trained on."""
    params, provenance, sha256 = resnet.load(path)
    height, width, channels = provenance["image_shape"]

    name = pathlib.Path(path).stem.replace("_", "-", 1)

    def apply(params, images):
        if images.shape[1:] != (height, width, channels):
            raise UserError(
                f"{name} takes images of {height}x{width}x{channels}, found {images.shape[1:]}: use another network"
            )
        network = resnet.ResNet20(provenance["num_classes"])
        return network.apply({"params": params}, images.astype(jnp.float32))

    preprocessing = f"uint8 {height}x{width}x{channels}, (x - 127.5) / 127.5"
    return FeatureNetwork(name, f"FD-{name}", sha256, preprocessing, channels, 64, params, apply)


def local_name(dataset: str) -> str:
    """What the local network of a data set is called."""
    return f"resnet20-{pathlib.Path(dataset).stem}"


def local_networks() -> dict[str, pathlib.Path]:
    """The weights of this package's own networks, by name."""
    return {path.stem.replace("_", "-", 1): path for path in sorted(resnet.WEIGHTS.glob("resnet20_*.npz"))}


def extract(network: FeatureNetwork, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features, logits), float32, of each batch of uint8 images (B, H, W, C), over all devices.

    Every batch is filled up to the size of the first, so that one program is compiled, and cut again.
    """
    on_devices = parallel.full_precision(parallel.pmap(network.apply))
    params, size = parallel.replicate(network.params), None
    for images in batches:
        images = as_channels(images, network)
        size = size or parallel.round_up(len(images))
        if len(images) > size:
            raise ValueError(f"a batch of {len(images)} came after one of {size}")
        padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))
        features, logits = parallel.gather(on_devices(params, parallel.shard(padded)))
        yield features[: len(images)], logits[: len(images)]


def as_channels(images: np.ndarray, network: FeatureNetwork) -> np.ndarray:
    """uint8 images with the network's channels: gray is repeated to RGB, anything else refused."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{network.name} takes uint8 images (B, H, W, C), found {images.dtype} {images.shape}")
    if images.shape[3] == 1 and network.channels == 3:
        return images.repeat(3, axis=3)
    if images.shape[3] != network.channels:
        raise UserError(f"{network.name} takes {network.channels} channels, found {images.shape[3]}")
    return images


# ------------------------------------------------------------------------------------------------------ measurement

KEPT = 10_000  # images whose features stay in memory, for the distances that compare pairs


class Measured(NamedTuple):
    """Measure n images: moments of all features, features of the first KEPT (float32), logits of all (float32)."""

    moments: Gaussian
    features: np.ndarray
    logits: np.ndarray


def measure(
    network: FeatureNetwork,
    images_of: Callable[[int, int], np.ndarray],
    n: int,
    *,
    batch_size: int,
    folder: pathlib.Path | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Measured:
    """Features of exactly the n images images_of(start, stop), uint8 (stop - start, H, W, C), batch by batch.

    folder: keeps finished batches, so that a measurement that was stopped goes on where it was; its name must identify
        the images and the network.
    progress: wraps the batches, as tqdm does
    """
    moments, features, logits = distances.empty(network.dimension), [], []
    ranges = [(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    path_of = lambda first, last: folder / f"features_{first:07d}_{last:07d}.npz"
    missing = [bounds for bounds in ranges if folder is None or not path_of(*bounds).exists()]
    measured = extract(network, (images_of(*bounds) for bounds in missing))
    for bounds in progress(ranges):
        if bounds not in missing:
            arrays = files.load_npz(path_of(*bounds))
            found = arrays["features"], arrays["logits"]
        else:
            found = next(measured)
            if folder is not None:
                files.save_npz(path_of(*bounds), dict(features=found[0], logits=found[1]))
        moments = distances.merge(moments, distances.gaussian(found[0]))
        features.append(found[0][: max(0, KEPT - bounds[0])])
        logits.append(found[1])
    return Measured(moments, np.concatenate(features), np.concatenate(logits))


# ------------------------------------------------------------------------------------------------------- statistics


class Statistics(NamedTuple):
    """Features of a data set: mean (D,) and covariance (D, D) of all, features (M, D) of the first ones or None.

    n: images; None in files of other tools
    provenance: data, split and the network's identity; empty in files of other tools
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None
    features: np.ndarray | None
    provenance: dict


def statistics(found: Measured, provenance: dict) -> Statistics:
    """The statistics of a data set's images; the network's identity belongs into the provenance."""
    return Statistics(found.moments.mean, found.moments.covariance, found.moments.n, found.features, provenance)


def save(path: pathlib.Path, found: Statistics) -> None:
    """As .npz of mu, sigma (the names that other tools read), n, features, and provenance as JSON."""
    provenance = json.dumps(found.provenance, sort_keys=True)
    arrays = dict(mu=found.mean, sigma=found.covariance, n=found.n, features=found.features, provenance=provenance)
    files.save_npz(path, arrays)


def load(path: str | os.PathLike, network: FeatureNetwork) -> Statistics:
    """A file by `save`, refused unless it was made with this network; or one of others, which tells of no network.

    Other tools write mu and sigma (pytorch-fid, TTUR), or the features themselves as `pool_3` (Score-SDE's code).
    """
    with files.reading(path, "is no file of statistics", "expected an .npz with mu and sigma, or with pool_3"):
        arrays = files.load_npz(path, ("mu", "sigma", "n", "features", "provenance", "pool_3"))
        if "pool_3" in arrays and "mu" not in arrays:
            arrays = _of_pool(arrays["pool_3"])
        if not {"mu", "sigma"} <= arrays.keys():
            raise ValueError("no mu and sigma")
        provenance = dict(json.loads(str(arrays.get("provenance", "{}"))))
        mean, covariance = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
        n = int(arrays["n"]) if "n" in arrays else None
        features = np.asarray(arrays["features"], np.float32) if "features" in arrays else None
    size = (network.dimension,)
    if mean.shape != size or covariance.shape != size * 2:
        raise UserError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}, but {network.name} has {size[0]} features: "
            "it was made with another network"
        )
    if features is not None and features.shape[1:] != size:
        raise UserError(f"{path} has features {features.shape}, expected (images, {size[0]}): make it again")
    if not all(np.isfinite(array).all() for array in (mean, covariance, *([] if features is None else [features]))):
        raise UserError(f"{path} holds numbers that are not finite: make it again")
    for key, ours in network.identity().items():
        if provenance and provenance.get(key) != ours:
            raise UserError(
                f"{path} was made with {key} {provenance.get(key)!r}, this is {ours!r}: "
                "make it again, python evaluate.py --statistics"
            )
    return Statistics(mean, covariance, n, features, provenance)


def _of_pool(pool: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that `save` writes, of features (n, D)."""
    if pool.ndim != 2 or len(pool) < 2:
        raise ValueError(f"pool_3 is {pool.shape}, expected (images, features)")
    whole = functools.reduce(distances.merge, map(distances.gaussian, np.array_split(pool, -(-len(pool) // 4096))))
    return dict(mu=whole.mean, sigma=whole.covariance, n=np.int64(len(pool)), features=pool[:KEPT])


def fingerprint(*parts: object) -> str:
    """Eight digits of a hash of what identifies a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def hash_of(*arrays: np.ndarray) -> str:
    """Eight digits of a hash of arrays."""
    return fingerprint(*(hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays))


def frechet(found: Measured, reference: Statistics) -> float:
    """The Frechet distance of images to a data set."""
    moments = found.moments
    return distances.frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)


def compare(found: Measured, reference: Statistics, *, splits: int = 10, subsets: int = 100) -> dict:
    """Every distance of this package between images and a data set, and the numbers of images behind each.

    "frechet"; "inception_score" with its spread over splits; and, if the reference holds features: "kernel" (mmd2) with
    its spread over random subsets, "precision", "recall" (k = 3). Few images make smaller subsets and splits.
    """
    n = found.moments.n
    result = dict(num_samples=n, num_reference=reference.n, frechet=frechet(found, reference))
    scores = distances.inception_score(found.logits, splits=min(splits, n))
    result |= dict(inception_score=scores.mean(), inception_score_std=scores.std(), inception_score_splits=len(scores))
    if reference.features is not None:
        size = min(1000, len(found.features), len(reference.features))
        kernel = distances.kernel_distance(found.features, reference.features, subsets=subsets, subset_size=size)
        manifolds = distances.precision_recall(found.features, reference.features)
        result |= dict(kernel=kernel.mean(), kernel_std=kernel.std(), kernel_subsets=subsets, kernel_subset_size=size)
        result |= dict(precision=manifolds.precision, recall=manifolds.recall)
        result |= dict(pairs_samples=len(found.features), pairs_reference=len(reference.features))
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in result.items()}
