"""The EMS of a trained model: measured, merged, taken over, found and loaded.

What `python -m ems` does, and what the samplers ask of a run folder. The mathematics is in ems/.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ems import estimate, moments, statistics
from ems.statistics import EMS
from experiments import build, figures, guides, program, runs, samplers, upsampling
from experiments.prompts import Prompts
from score_sde import VERSION, data, files, parallel, seeds
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from score_sde.metrics import features
from solvers.dpm_solver import dpm_solver_pp

NONE = Guidance()


def path_of(model: runs.Model, origin: dict) -> pathlib.Path:
    """Where the statistics of that origin belong; whatever tells measurements of one size apart is in the name."""
    name = f"step{model.step}_nodes{origin['nodes']}_data{origin['num_data']}"
    first, sde = origin["images"][0][0], model.diffusion.sde
    apart = {
        "_first": first or None,
        "_end": None if origin["t_end"] == sde.t_min else origin["t_end"],
        "_guidance": origin["guidance_scale"],
        "_seed": origin["seed"] or None,
    }
    name += "".join(f"{key}{all_digits(value)}" for key, value in apart.items() if value is not None)
    name += "" if origin.get("guided_by") is None else f"_by_{origin['guided_by']}"
    name += "".join(f"_{value}" for value in (origin.get("size"), origin.get("prompts")) if value is not None)
    name += "" if origin["data"] == model.config.data.dataset else f"_{pathlib.Path(origin['data']).stem}"
    return of_its_own(model.results / "ems" / f"{name.replace(' ', '_')}.npz", origin)


def all_digits(number: float) -> str:
    """A number in a file's name, with all its digits."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


# What tells one measurement from another; `first_images`, a hash of the first of them, is not in files of before.
ORIGIN = ("checkpoint", "sde", "t_end", "data", "first_images", "images", "nodes", "seed", "guidance_scale")
ORIGIN += ("guided_by", "size", "prompts", "negative_prompt")


def of_its_own(path: pathlib.Path, origin: dict) -> pathlib.Path:
    """The path, or one beside it if statistics of another origin are there, which are kept."""
    if not path.exists():
        return path
    there, ours = statistics.load_origin(path), json.loads(json.dumps(origin))
    if all(there[key] == ours[key] for key in ORIGIN if key in there and key in ours):
        return path
    apart = features.fingerprint(*(ours.get(key) for key in ORIGIN))
    return path.with_name(f"{path.stem}_{apart}{path.suffix}")


def size_of(diffusion: Diffusion) -> str | None:
    """Height and width of latents, which a model may have of any size; None for pixels, of which it has one."""
    height, width, _ = diffusion.space.shape
    return None if np.isfinite(diffusion.space.high) else f"{height}x{width}"


def find(model: runs.Model, guidance_scale: float | None = None, guided_by: str | None = None) -> pathlib.Path | None:
    """The run's statistics of this checkpoint and guidance: on data before own samples, on most images, then nodes."""
    measured = sorted((model.results / "ems").glob(f"step{model.step}_*.npz"))
    found = {
        path: statistics.load_origin(path)
        for path in [*measured, *model.workdir.glob("ems.npz")]  # the latter of a packed model
        if not path.name.endswith(".partial.npz")
    }
    rank = lambda path: (
        found[path]["data"] != OWN_SAMPLES,
        found[path]["num_data"],
        found[path]["nodes"],
        -found[path].get("t_end", np.inf),
    )
    size = size_of(model.diffusion)
    fits = lambda origin: (
        (origin["checkpoint"], origin["guidance_scale"], origin.get("guided_by"))
        == (model.identity, guidance_scale, guided_by)
        and origin.get("size") in (None, size)
    )
    return max((path for path, origin in found.items() if fits(origin)), key=rank, default=None)


def load(
    model: runs.Model, path: pathlib.Path, guidance_scale: float | None = None, beside: runs.Guide | None = None
) -> EMS:
    """Statistics from a file, refused unless they were measured on this very model, guided in this very way."""
    ems = statistics.load(path)
    origin = ems.origin
    if origin.get("checkpoint") != model.identity:
        raise UserError(
            f"{path} was measured on checkpoint {origin.get('checkpoint')} (step {origin.get('step')}), "
            f"this is {model.identity} (step {model.step}): measure again with python -m ems --workdir={model.workdir}"
        )
    if ems.l.shape[1:] != model.diffusion.space.shape:
        raise UserError(
            f"{path} is for x of shape {ems.l.shape[1:]}, this model's is {model.diffusion.space.shape}: "
            "measure again, python -m ems, for images of the size that is drawn"
        )
    measured = (origin.get("guidance_scale"), origin.get("guided_by"))
    wanted = (guidance_scale, beside and beside.identity)
    if measured != wanted:
        theirs, ours = (
            "without guidance" if scale is None else f"with guidance {scale:g}" + (f" by {guide}" if guide else "")
            for scale, guide in (measured, wanted)
        )
        flag = "" if guidance_scale is None else f" --guidance={guidance_scale:g}"
        flag += "" if beside is None else f" {beside.flag}"
        raise UserError(
            f"{path} was measured {theirs}, sampling is {ours}: measure again with "
            f"python -m ems --workdir={model.workdir}{flag}"
        )
    statistics.check_sde(ems, model.diffusion.sde)
    return ems


OWN_SAMPLES = "own samples"


class Source(NamedTuple):
    """What EMS are measured on."""

    name: str
    size: float  # number of images
    take: Callable  # indices (b,) -> x0 (b, H, W, C), and its condition: a tree of (b, ...), or None
    first: str  # a hash of the first of them, which tells data sets of one name apart
    steps: int = 0  # evaluations that each of them takes to be had


def conditions_of(diffusion: Diffusion, index, labels: Callable):
    """The conditions of data numbered `index`: their labels, called where the model has classes, else the model's."""
    if diffusion.num_classes:
        return labels()
    return jax.tree.map(np.asarray, diffusion.conditions(np.asarray(index, np.int32)))


def training_images(model: runs.Model) -> Source:
    """The training images, unflipped, in a fixed random order: a stored order may be one class after the other.

    model: as it is measured, with the classes of what guides it.
    """
    enlarges = model.config.model.get("low_res")
    try:
        images = build.images_of(model.config, "train")
        if model.diffusion.num_classes and "label" not in images.take(np.arange(1)):
            raise UserError(f"{images.name} has no labels, towards which a classifier guides")
        if model.diffusion.num_classes:
            images = build.checked_labels(images, model.diffusion.num_classes, "the number of classes")
    except UserError as error:
        remedy = "without the images, python -m ems --data=samples measures on own samples"
        if enlarges:
            remedy = "EMS of a model that enlarges images need the data set: say where it is by --dataset_at"
        raise UserError(f"{error}; {remedy}") from None
    order = data.permutation(0, 0, images.size)
    encode = jax.jit(jax.vmap(model.diffusion.space.encode))

    def take(index):
        batch = images.take(order[index])
        x0 = np.asarray(encode(samplers.sample_keys(0, index), batch["image"]))
        condition = conditions_of(model.diffusion, order[index], lambda: batch["label"])
        return x0, upsampling.of_data(batch["image"], condition) if enlarges else condition

    first = features.hash_of(images.take(np.arange(min(64, images.size)))["image"])
    return Source(model.config.data.dataset, images.size, take, first)


def latents(diffusion: Diffusion, path: str) -> Source:
    """x0 as it is, from an .npz: `latents` (K, H, W, C) of floats, and `labels` (K,) if the model has classes.

    Where it is told prompts, the k-th of them belongs to the k-th.
    """
    keys = ["latents", "labels"] if diffusion.num_classes else ["latents"]
    expected = f"expected samples, or an .npz with {' and '.join(keys)}"
    with files.reading(f"--data={path}", "holds no latents", expected):
        found = files.load_npz(path, keys)
        arrays = {key: found[key] for key in keys}
    x0, shape = arrays["latents"], diffusion.space.shape
    if x0.shape[1:] != shape or x0.dtype.kind != "f" or not np.isfinite(x0).all():
        raise UserError(f"{path}: latents are {x0.dtype} {x0.shape}, expected finite floats (K, *{shape}), NHWC")
    x0, y = x0.astype(np.float32), np.asarray(arrays["labels"], np.int32) if diffusion.num_classes else None
    take = lambda index: (x0[index], conditions_of(diffusion, index, lambda: y[index]))
    return Source(path, len(x0), take, features.hash_of(x0))


def own_samples(diffusion: Diffusion, params, seed: int, steps: int = 50) -> Source:
    """Samples of the model itself by DPM-Solver++ 2M, each a function of its index and the seed."""
    table = dpm_solver_pp(diffusion.sde, steps, order=2)
    sample = samplers.sampler(diffusion, params, seed, purpose=2)
    condition = lambda index: jax.tree.map(np.asarray, diffusion.conditions(index))
    take = lambda index: (sample(table, index), condition(index))
    return Source(OWN_SAMPLES, np.inf, take, OWN_SAMPLES, steps)


def measure(
    model: runs.Model,
    *,
    nodes: int,
    num_data: int,
    batch_size: int,
    t_end: float | None = None,
    seed: int = 0,
    first_image: int = 0,
    source: str | None = None,
    guidance: Guidance = NONE,
    own_steps: int = 50,
    prompts: Prompts | None = None,
    beside: runs.Guide | None = None,
) -> pathlib.Path:
    """Measure l, s, b and their errors; write the statistics, their picture and the moments; return the first's path.

    t_end: where the nodes end, the SDE's t_min by default.
    first_image: where this measurement's images begin; several machines take different ones, and `merge` adds.
    source: the config's training images by default, if any; "samples" for the model's own, or an .npz of latents.
    own_steps: evaluations for each of the model's own samples; prompts: what the model was told, for the record.
    guidance: whose scale bends what is measured; thresholds and intervals have no part in statistics.
    beside: what guides with parameters of its own, if anything.
    """
    guidance_scale, guided_by = guides.bent_by(guidance, beside)
    model = as_measured(model, guidance_scale, beside)
    diffusion = model.diffusion
    sde, shape = diffusion.sde, diffusion.space.shape
    t_end = sde.t_min if t_end is None else t_end
    node = estimate.nodes(sde, nodes, t_end=t_end)
    parallel.batch_per_device(batch_size)
    if source is None and not model.config.data.dataset:
        source = "samples"
    if source is None:
        images = training_images(model)
    elif source == "samples":
        images = own_samples(diffusion, model.params, seed, own_steps)
    else:
        images = latents(diffusion, source)
    if prompts is not None and np.isfinite(images.size) and len(prompts.texts) not in (1, images.size):
        raise UserError(
            f"{images.name} has {images.size} images, but there are {len(prompts.texts)} prompts: give as many, in the "
            "order of the images, or one for all"
        )
    there = max(0, min(num_data, images.size - first_image))
    used = int(there) // batch_size * batch_size
    if not used:
        raise UserError(
            f"EMS in batches of {batch_size} from {there:.0f} images of {images.name}, from image {first_image} on: "
            "use a smaller batch size (--batch_size), or an earlier --first_image"
        )
    origin = dict(
        checkpoint=model.identity,
        step=model.step,
        sde=statistics.describe_sde(sde),
        t_end=t_end,
        data=images.name,
        first_images=images.first,
        latent=source not in (None, "samples") or size_of(diffusion) is not None,
        num_data=used,
        images=[[first_image, first_image + used]],
        nodes=nodes,
        seed=seed,
        guidance_scale=guidance_scale,
        guided_by=guided_by,
        jax=jax.__version__,
        score_sde=VERSION,
    )
    if size_of(diffusion) is not None:
        origin |= dict(size=size_of(diffusion))
    if prompts is not None:
        origin |= dict(prompts=prompts.name, negative_prompt=prompts.negative)
    path = path_of(model, origin)
    if path.exists():
        print(f"EMS: already measured, {path}")
        return path
    if model.config.model.get("low_res"):
        diffusion = upsampling.with_conditions(diffusion, images.take(np.arange(JUDGED_SAMPLES) % images.size)[1])
        model = model._replace(diffusion=diffusion)
    evaluations, megabytes = len(node.t) * used, moments.bytes_needed(len(node.t), shape) / 1e6
    about = "" if guidance_scale is None else f", guidance {guidance_scale:g}"
    about += "" if guided_by is None else f" by {guided_by}"
    print(
        f"EMS: {len(node.t)} nodes x {used} images of {images.name} from image {first_image} on, seed {seed}{about}: "
        f"{evaluations} evaluations of at most 3 forward passes; {megabytes:.0f} MB of memory for any number of images"
    )
    if images.steps:
        print(cost_of(diffusion, model.params, images.steps, 3 * len(node.t), used, batch_size))
    path.parent.mkdir(parents=True, exist_ok=True)
    began = []
    with program.progress(total=1, bar_format="EMS {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)
            began.append(time.monotonic())
            if len(began) == 3:  # the first call compiled, the second did not
                minutes = (began[2] - began[1]) * (total - done) / 60
                bar.write(f"EMS: about {minutes:.1f} minutes, {total} calls of {began[2] - began[1]:.2f} s")

        blocks = estimate.accumulate(
            on_devices(diffusion, model.params, seed),
            node,
            images.take,
            range(first_image, first_image + used),
            shape,
            batch_size=batch_size,
            partial=path.with_suffix(".partial.npz"),
            identity=f"{model.identity} {origin['sde']} {images.name} {images.first} {guidance_scale} seed {seed}"
            + ("" if prompts is None else f" prompts {prompts.fingerprint}")
            + ("" if guided_by is None else f" by {guided_by}"),
            progress=progress,
        )
    write(model, path, moments.Saved(node.t, node.lam, blocks, origin))
    return path


def cost_of(diffusion: Diffusion, params, drawing: int, measuring: int, n: int, batch_size: int) -> str:
    """What n images will take at most, by one evaluation of a device's share: time, and memory of a device."""
    index = np.arange(parallel.batch_per_device(batch_size))

    def evaluation(params, x):
        return diffusion.noise_of(params, diffusion.conditions(index))(x, jax.numpy.float32(diffusion.sde.t_max))

    params, x = jax.tree.map(jax.numpy.asarray, (params, np.zeros((len(index), *diffusion.space.shape), np.float32)))
    compiled = jax.jit(evaluation).lower(params, x).compile()
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(compiled(params, x))
        seconds.append(time.monotonic() - began)
    hours = min(seconds) * -(-n // batch_size) * (drawing + measuring) / 3600
    size, memory = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), compiled.memory_analysis()
    needed = "" if memory is None else f", about {(size + 3 * memory.temp_size_in_bytes) / 1e9:.1f} GB on each device"
    return (
        f"EMS: about {hours:.1f} hours{needed}: {n} samples in batches of {batch_size} take {drawing} evaluations to "
        f"be drawn and at most {measuring} to be measured, of {min(seconds):.3g} s each"
    )


def as_measured(model: runs.Model, guidance_scale: float | None, beside: runs.Guide | None) -> runs.Model:
    """The model that statistics are of: guided with that scale, or alone if it is None."""
    return runs.with_guidance(model, Guidance(guidance_scale), beside=None if guidance_scale is None else beside)


def on_devices(diffusion: Diffusion, params, seed: int) -> Callable:
    """What `estimate.accumulate` calls: moments of images at some nodes, on all devices, for each of them."""
    key, params = seeds.key(seed), parallel.replicate(params)
    mapped = parallel.pmap(
        lambda params, node, node_index, index, x0, y: estimate.measure(
            lambda x, t, y: diffusion.noise_of(params, y)(x, t), node, node_index, key, x0, index, y
        ),
        in_axes=(0, None, None, 0, 0, 0),
    )

    def measured(node, node_index, *arrays):
        node = jax.tree.map(np.float32, node)
        found = parallel.gather(mapped(params, node, node_index, *parallel.shard(arrays)))
        return jax.tree.map(lambda x: x.reshape(-1, len(node_index), *x.shape[1:]), found)

    return measured


def write(model: runs.Model, path: pathlib.Path, saved: moments.Saved):
    """Make statistics of moments; say how exact they are; write both, and a picture. model: as it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    moments.save(path.with_suffix(moments.SUFFIX), saved)
    node = estimate.nodes_at(model.diffusion.sde, saved.t, saved.lam)
    ems, without, sizes = estimate.with_errors(node, saved.blocks, saved.origin)
    if constant := ems.origin["constant_f"]:
        print(f"EMS: f is constant at {constant} of {ems.l.size} nodes and pixels; there s = 0 and b = f'")
    if without:
        ems = print_errors(model, ems, without, sizes)
    else:
        print("EMS: one batch only, so no standard errors: use a smaller --batch_size or a larger --num_data")
    statistics.save(path, ems)
    figures.save_ems(path.with_suffix(".png"), ems.lam, {"l": ems.l, "s": ems.s, "b": ems.b}, f"EMS of {model.name}")
    for_merging = path.with_suffix(moments.SUFFIX)
    megabytes = for_merging.stat().st_size / 1e6
    print(f"EMS: wrote {path}, its .png and, needed for merging alone, {for_merging.name} ({megabytes:.0f} MB)")


JUDGED_STEPS, FINE_STEPS, JUDGED_SAMPLES = 10, 100, 32


def print_errors(model: runs.Model, ems: EMS, without: list[EMS], sizes: list[float]) -> EMS:
    """Print the standard errors and whether the number of images suffices; the statistics, with that in their origin.

    That is told from samples: of all images' statistics, and of those without each block, against a fine solution.
    """
    size = np.stack([np.sqrt(np.square(getattr(ems, key)).mean((1, 2, 3))) for key in "lsb"])
    print("EMS: size +- standard error, root mean square over pixels, at some of the nodes")
    print(f"     lam{'l':>14}{'s':>20}{'b':>20}")
    for j in np.linspace(0, len(ems.lam) - 1, 9).astype(int):
        columns = (f"{size[i, j]:8.3f} +- {ems.errors[i, j]:.1e}" for i in range(3))
        print(f"  {ems.lam[j]:6.2f}" + "  ".join(columns))

    tables = [samplers.build_tableau(model.diffusion.sde, "dpmv3", JUDGED_STEPS, part)[0] for part in (ems, *without)]
    t_end = max(ems.t[-1], model.diffusion.sde.t_min)
    fine = dpm_solver_pp(model.diffusion.sde, FINE_STEPS, order=2, t_end=t_end)
    index = np.arange(parallel.round_up(JUDGED_SAMPLES))
    at_once = parallel.round_up(min(len(index), model.config.ems.batch_size))
    starts = range(0, len(index), at_once)  # no more at a time than are measured
    sampler = samplers.sampler(model.diffusion, model.params, 0, purpose=3)
    sample = lambda table: np.concatenate([sampler(table, start + np.arange(at_once)) for start in starts])
    exact, whole, *parts = map(sample, (fine, *tables))
    distance, error = samplers.rms(whole - exact), samplers.rms(moments.jackknife(whole, parts, sizes))

    num_data = ems.origin["num_data"]
    excess, wanted = estimate.needed(distance, error, num_data)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = ", ".join(
            f"{np.nanmedian(share):.1%} of {key}" for key, share in zip("lsb", ems.errors / size, strict=True)
        )
    verdict = f"exact statistics would bring them {excess:.1%} nearer: K "
    if excess <= estimate.TOLERANCE:
        verdict += f"suffices (below {estimate.TOLERANCE:.0%})"
    else:
        verdict += f"does not suffice (above {estimate.TOLERANCE:.0%}), "
        verdict += f"about {wanted} images would" if wanted else "take many more"
    print(
        f"EMS: K = {num_data} images: standard error {relative} (median over nodes; half of it with {4 * num_data}). "
        f"It moves samples of {JUDGED_STEPS} evaluations by {error:.4f}, which are {distance:.4f} from the exact ODE; "
        + verdict
    )
    judged = dict(evaluations=JUDGED_STEPS, distance=distance, standard_error=error, sufficient_num_data=wanted)
    return ems._replace(origin=ems.origin | {"samples": judged})


def merge(model: runs.Model, paths: list[str], beside: runs.Guide | None = None) -> pathlib.Path:
    """The statistics of this model from several machines' moments (or statistics with their moments beside).

    beside: what guided the model while it was measured, if anything with parameters of its own.
    """
    saved = [moments.load(path) for path in paths]
    for path, part in zip(paths, saved, strict=True):
        if missing := {"nodes", "t_end", "seed"} - {*part.origin}:
            raise UserError(f"{path} does not tell its {', '.join(sorted(missing))}: give what python -m ems wrote")
    if saved[0].origin["checkpoint"] != model.identity:
        raise UserError(
            f"{paths[0]} was measured on checkpoint {saved[0].origin['checkpoint']}, the model is {model.name}: "
            "name its run by --workdir"
        )
    whole, names = saved[0], paths[0]
    for path, part in zip(paths[1:], saved[1:], strict=True):
        whole, names = moments.add(whole, part, (names, path)), f"{names}, {path}"
    whole.origin.setdefault("guided_by", None)
    if whole.origin["guided_by"] != (beside and beside.identity):
        raise UserError(
            f"{paths[0]} was measured guided by {whole.origin['guided_by'] or 'nothing beside the model'}: "
            "give that by --classifier or --autoguidance, or leave them out"
        )
    path = path_of(model, whole.origin)
    print(f"EMS: {len(paths)} measurements, {whole.origin['num_data']} images of {whole.origin['data']}")
    write(as_measured(model, whole.origin["guidance_scale"], beside), path, whole)
    return path


def take_published(
    model: runs.Model,
    folder: str,
    *,
    t_end: float,
    guidance: Guidance = NONE,
    beside: runs.Guide | None = None,
) -> pathlib.Path:
    """Published statistics (l.npz, sb.npz), which tell of no model, taken for this model's, guided in this way."""
    guidance_scale, guided_by = guides.bent_by(guidance, beside)
    origin = dict(
        checkpoint=model.identity,
        step=model.step,
        sde=statistics.describe_sde(model.diffusion.sde),
        t_end=t_end,
        data=f"published {pathlib.Path(folder).name}",
        num_data=0,
        guidance_scale=guidance_scale,
        guided_by=guided_by,
        latent=size_of(model.diffusion) is not None,
        score_sde=VERSION,
    )
    shape = model.diffusion.space.shape
    ems = statistics.load_published(folder, model.diffusion.sde, shape, t_end=t_end, origin=origin)
    ems = ems._replace(origin=origin | dict(nodes=len(ems.t) - 1, first_images=features.hash_of(ems.l, ems.s, ems.b)))
    name = f"step{model.step}_nodes{len(ems.t) - 1}_published_end{all_digits(t_end)}"
    name += "" if guidance_scale is None else f"_guidance{all_digits(guidance_scale)}"
    name += "" if guided_by is None else f"_by_{guided_by}"
    path = of_its_own(model.results / "ems" / f"{name.replace(' ', '_')}.npz", ems.origin)
    statistics.save(path, ems)
    print(f"EMS: wrote {path}; whether they belong to {model.name}, and end at t={t_end:g}, their files do not tell")
    return path


def ems_of(
    model: runs.Model, path: str | None = None, guidance: Guidance = NONE, beside: runs.Guide | None = None
) -> EMS:
    """The statistics that a sampler of the guided model needs: of `path`, or found in the run, or measured now, once.

    model: without its guidance; beside: what guides it with parameters of its own, if anything.
    """
    scale, guided_by = guides.bent_by(guidance, beside)
    found = pathlib.Path(path) if path is not None else find(model, scale, guided_by)
    if found is None and model.config.text:  # a few prompts are no sample of what the model draws
        flag = "" if scale is None else f" --guidance={scale:g}"
        raise UserError(
            f"no EMS of {model.name} at this size and guidance: measure them on many prompts, python -m ems "
            f"--workdir={model.workdir} --prompts=FILE{flag}, or take published ones, python -m ems published FOLDER"
        )
    if found is None:
        guided = "" if scale is None else f" with guidance {scale:g}" + (f" by {guided_by}" if guided_by else "")
        print(f"EMS: none yet for {model.name}{guided}; measuring once")
        found = measure(model, **model.config.ems, guidance=guidance, beside=beside)
        parallel.wait_for_all("statistics are written")
    ems = load(model, found, scale, beside if guided_by else None)
    prompts = ems.origin.get("prompts")
    print(f"EMS: {found}" + (f", measured on prompts {prompts}" if prompts else ""))
    return ems
