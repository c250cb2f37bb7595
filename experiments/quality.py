"""How near images are to a data set: samples of a model or anyone's, in the features of a network.

What `evaluate.py --metrics=fid`, `--samples` and `--statistics` do. The mathematics is in score_sde/metrics/.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ems.statistics import EMS
from experiments import build, program, runs, samplers
from score_sde import data, files, parallel, sources
from score_sde.errors import UserError
from score_sde.metrics import distances, features, inception
from score_sde.space import Space
from solvers.learned import Corrections
from solvers.tableau import Tableau


def feature_network(
    config,
    name: str | None = None,
    *,
    inception_weights: str | None = None,
    inception_mode: str = "tf",
    any_inception_weights: bool = False,
) -> features.FeatureNetwork:
    """The network of that name, or the local one trained on the config's data set; says which.

    name: "inception", one of `features.local_networks()`, or an .npz of python -m tools.train_features.
    """
    name = name or ("inception" if inception_weights else features.local_name(config.data.dataset))
    known = features.local_networks()
    if name != "inception" and name not in known and not name.endswith(".npz"):
        raise UserError(
            f"no feature network {name!r}: choose --network={' or --network='.join(['inception', *known])}, "
            "or train one, python -m tools.train_features"
        )
    if name == "inception":
        path = inception_weights or inception.download(pathlib.Path(program.CACHE))
        network = features.standard(path, mode=inception_mode, any_weights=any_inception_weights)
    else:
        network = features.local(known.get(name, name))
    gray = ", gray images as RGB of three equal channels" if config.data.num_channels < network.channels else ""
    print(f"features: {network.name}, weights {network.sha256[:8]}, {network.preprocessing}{gray}")
    return network


def differentiable_features(network: features.FeatureNetwork, space: Space) -> Callable:
    """x (B, H, W, C) of pixels -> the network's features (B, D) of unrounded levels, which have a derivative by x."""

    def apply(x):
        levels = 255 * (jnp.clip(x, space.low, space.high) - space.low) / (space.high - space.low)
        repeats = network.channels if x.shape[-1] == 1 else 1
        return network.apply(network.params, jnp.repeat(levels, repeats, -1))[0]

    return apply


def psnr(images: np.ndarray, others: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio of levels 0..255, 10 log10(255^2 / mean square difference), in dB.

    axis: of the mean; all if None. Equal images, which have none, count as a mean square of 0.01.
    """
    square = np.square(images.astype(np.float64) - others).mean(axis)
    return 10 * np.log10(255**2 / np.maximum(square, 1e-2))


class Drawer(NamedTuple):
    """What draws the samples that are measured: a solver's table for a model, guided or not."""

    images_of: Callable  # (start, stop) -> the samples of these numbers as uint8
    table: Tableau
    options: dict
    batch_size: int


def drawer(
    model: runs.Model,
    sample: Callable,
    solver: str,
    steps: int,
    ems: EMS | None = None,
    options: dict | None = None,
    corrections: Corrections | None = None,
) -> Drawer:
    """What draws a model's samples; sample: `samplers.sampler` of it; the rest as for `samplers.build_tableau`.

    corrections: what was learned for its table, if anything.
    """
    table, options = samplers.build_tableau(model.diffusion.sde, solver, steps, ems, **(options or {}))
    if corrections is not None:
        table = samplers.with_corrections(table, model.diffusion.sde, corrections)
    batch_size = parallel.round_up(model.config.sampling.batch_size)

    def images_of(start, stop):
        x = sample(table, np.arange(start, start + batch_size))
        if not np.isfinite(x).all():
            raise UserError(f"samples {start} to {stop} are not all finite: try another solver or more steps")
        return np.asarray(model.diffusion.space.decode(x))[: stop - start]

    return Drawer(images_of, table, options, batch_size)


def of_samples(
    model: runs.Model,
    solver: str,
    steps: int,
    *,
    sample: Callable,
    network,
    n: int,
    seed: int,
    ems: EMS | None = None,
    options: dict | None = None,
    searched: samplers.Searched | None = None,
    reference_path: str | None = None,
    bending: dict | None = None,
    identities: tuple[str, ...] = (),
) -> dict:
    """Distances of the model's first n samples to the training images; finished batches stay in eval/.

    model: guided or not; sample: `samplers.sampler` of it and this seed; bending: what guides it, for the record;
    identities: of what takes part besides the model; searched: where the options are those of a search, its file.
    """
    way = drawer(model, sample, solver, steps, ems, options, searched and searched.corrections)
    bending = bending or {}
    arrays = [hashlib.sha256(np.float32(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(way.table)]
    apart = [bending, *identities] if bending else []
    identity = features.fingerprint(model.identity, solver, arrays, seed, network.identity(), *apart)
    found = features.measure(
        network,
        way.images_of,
        n,
        batch_size=way.batch_size,
        folder=model.results / "eval" / f"step{model.step}-{solver}-{steps}-seed{seed}-{identity}",
        progress=functools.partial(program.progress, desc=f"samples by {solver}", unit="batch"),
    )
    result = compared(model.config, network, found, reference_path) | bending
    title = f"{n} samples by {solver}, {steps} evaluations, seed {seed}"
    title += "".join(f", {name} {value}" for name, value in bending.items())
    about = dict(title=title, solver=solver, steps=steps, options=way.options, samples=identity)
    return result | about | origin_of(searched)


def origin_of(searched: samplers.Searched | None) -> dict:
    """Whether a table was searched or learned, for the record; empty where it is neither."""
    if searched is None:
        return {}
    return dict(table="searched" if searched.corrections is None else "learned")


def of_images(config, network, path: str, reference_path: str | None = None) -> dict:
    """Distances of the images of a folder or an .npz to the training images."""
    images = given_images(config, pathlib.Path(path))
    found = measured_images(network, images, images.size)
    first = np.ascontiguousarray(images.take(np.arange(min(64, images.size)))["image"])
    about = dict(title=f"{images.size} images of {path}", first_images=hashlib.sha256(first.tobytes()).hexdigest())
    return compared(config, network, found, reference_path) | about


def reference_images(config, path: str) -> data.Images | None:
    """The images of a reference, a folder, an archive or arrays of them; None for a file of statistics."""
    file = pathlib.Path(path).expanduser()
    if file.is_dir() or file.suffix.lower() in (".zip", ".npy"):
        return given_images(config, file)
    with files.reading(path, "is no file of statistics", "expected an .npz of mu and sigma, of pool_3, or of images"):
        held = files.names_npz(file)
    return given_images(config, file) if held & {*sources.ARRAY_NAMES} and not held & {"mu", "pool_3"} else None


def check_reference(config, network, path: str):
    """Refuse a reference that `compared` could not take; no features are measured."""
    if reference_images(config, path) is None:
        features.load(path, network)


def given_images(config, path: pathlib.Path) -> data.Images:
    """Anyone's images; of any one size for the Inception network, of the config's for others."""
    fields, path = config.data, path.expanduser()
    place = str(path) if path.is_absolute() else f"./{path}"  # no name of tensorflow-datasets
    if path.suffix in (".npz", ".npy") and path.is_file():
        source = sources.read_source(place)
        raw = sources.choose_split(source.splits, "all", str(path))
        if raw.arrays is None:
            raise UserError(f"{path} holds splits of several sizes: give one of them")
        images = data.Images(str(path), raw.size, functools.partial(data.gather, raw.arrays), notes=source.notes)
    else:
        images = sources.load(place, "all", image_size=fields.image_size, num_channels=fields.num_channels)
    build.say(images)
    if images.size < 2:
        raise UserError(f"{path} holds {images.size} images, which have no covariance: give more")
    return images


def measured_images(network, images, n: int) -> features.Measured:
    """Features of the first n images of a split."""
    return features.measure(
        network,
        lambda start, stop: images.take(np.arange(start, stop))["image"],
        n,
        batch_size=128 if network.dimension < 1000 else 32,
        progress=functools.partial(program.progress, desc=images.name, unit="batch"),
    )


def data_statistics(config, network, split: str, n: int | None = None) -> tuple[features.Statistics, pathlib.Path]:
    """Statistics of the first n (all if None) images of a split, measured once and kept in runs/statistics/."""
    images, fields = build.images_of(config, split, tell=split == "train"), config.data
    n = min(n or images.size, images.size)
    if n < 2:
        raise UserError(f"{images.name} holds {images.size} images, which have no covariance: give more")
    processing = {name: fields[name] for name in ("image_size", "num_channels", "crop", "resize")}
    first = np.ascontiguousarray(images.take(np.arange(min(64, n)))["image"])  # tells data sets of one name apart
    origin = dict(data=fields.dataset, split=split, n=n, first_images=hashlib.sha256(first.tobytes()).hexdigest())
    provenance = origin | processing | network.identity()
    stem = pathlib.Path(fields.dataset).stem
    path = runs.RUNS / "statistics" / f"{stem}-{split}-{n}-{features.fingerprint(provenance)}.npz"
    if not path.exists():
        features.save(path, features.statistics(measured_images(network, images, n), provenance))
        parallel.wait_for_all("statistics are written")
    return features.load(path, network), path


def compared(config, network, found: features.Measured, reference_path: str | None) -> dict:
    """Every distance to the data, with the floor: what as many test images have."""
    images = None if reference_path is None else reference_images(config, reference_path)
    if reference_path is None:
        reference, path = data_statistics(config, network, "train")
    elif images is None:
        reference, path = features.load(reference_path, network), reference_path
    else:
        reference, path = features.statistics(measured_images(network, images, images.size), {}), reference_path
    test, _ = data_statistics(config, network, "test", found.moments.n)
    floor = distances.frechet_distance(test.mean, test.covariance, reference.mean, reference.covariance)
    against = f"{reference.n} training images" if reference.provenance else f"{path}, whose origin is unknown"
    if images is not None:
        against = f"{reference.n} images of {path}"
    about = dict(distance=network.distance, dimension=network.dimension, against=against, reference=str(path))
    floor = dict(floor=floor, floor_num_samples=test.n)
    return features.compare(found, reference) | floor | about | network.identity()
