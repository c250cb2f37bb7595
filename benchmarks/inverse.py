"""Inverse problems in few evaluations, compared with the predictor-corrector sampler in many.

    python -m benchmarks.inverse --workdir=pretrained/fashion_mnist [--num_samples=256] [--tasks=inpaint,deblur]

One sample of each of the first test images. PSNR is that of the samples to the images, of the mean square
over all of them; a sample of a wide posterior is far from the image, however right it is. The Frechet
distance is that of the samples to the training images, in the features of the local network (benchmarks/few_steps.py);
the images themselves are its floor. The predictor-corrector sampler has published conditions for inpainting and
colorization only. Seconds are those of one image in a batch, after compilation.
"""

from collections.abc import Callable, Iterator

import numpy as np
from absl import flags

from benchmarks import study
from experiments import build, drawing, inverse_problems, measuring, program, quality, restoration, runs
from score_sde import parallel
from score_sde.inverse import METHODS
from score_sde.metrics import features

TASKS = flags.DEFINE_list("tasks", ["inpaint", "super_resolve", "deblur"], "Tasks, as those of sample.py --task.")
EVALUATIONS = flags.DEFINE_integer("evaluations", 20, "Evaluations of the few-step solvers.", lower_bound=2)
PC_STEPS = flags.DEFINE_integer("pc_steps", 1000, "Steps of the predictor-corrector sampler; 0: none.", lower_bound=0)

SOLVERS = ("dpmpp", "dpmv3")


def main():
    record, lines = {}, []
    for model in study.models():
        network = study.feature_network(model)
        found, floor = compared(model, network, TASKS.value, study.NUM_SAMPLES.value, EVALUATIONS.value, PC_STEPS.value)
        record[str(model.workdir)] = dict(found=found, floor=floor)
        new = [
            f"## {model.name}",
            "",
            f"One sample of each of {study.NUM_SAMPLES.value} test images, which have {network.distance} {floor:.3g} "
            "to the training images.",
            "",
        ]
        for task, rows in found.items():
            columns = ("evaluations", "PSNR (dB)", network.distance, "seconds an image")
            new += study.rows(task, columns, {name: list(row) for name, row in rows.items()})
        lines += new
        study.write("inverse", lines, new, record)


def compared(
    model: runs.Model, network: features.FeatureNetwork, tasks: list[str], n: int, evaluations: int, pc_steps: int
) -> tuple[dict, float]:
    """({task: {method: (evaluations, PSNR in dB, Frechet distance, seconds an image)}}, the images' own distance)."""
    reference = study.reference_and_floor(model, network)[0]
    test = build.images_of(model.config, "test")
    images = lambda index: test.take(index % test.size)["image"]
    truth = images(np.arange(n))
    frechet = lambda levels: features.frechet(
        features.measure(network, lambda start, stop: levels[start:stop], n, batch_size=study.BATCH), reference
    )
    found = {}
    for task in tasks:
        rows = found[task] = {}
        for name, method, put_back in methods(model, task, images, evaluations, pc_steps):
            samples = drawing.draw(model, method, n, batch_size=parallel.round_up(min(n, study.BATCH)))
            if samples.failure is not None:
                raise samples.failure
            drawn = put_back(samples.images)
            seconds = np.median(samples.seconds[1:] or samples.seconds) / len(drawn)
            rows[name] = (method.evaluations, float(quality.psnr(drawn, truth)), frechet(drawn), float(seconds))
    return found, frechet(truth)


def methods(
    model: runs.Model, task: str, images: Callable, evaluations: int, pc_steps: int
) -> Iterator[tuple[str, drawing.Method, Callable]]:
    """What can do a task, with the function that puts known pixels back."""
    for solver in SOLVERS:
        ems = measuring.ems_of(model) if solver == "dpmv3" else None
        for bending in METHODS:
            measured = inverse_problems.measured_of(model, task, method=bending)
            measured = measured._replace(known=measured.known._replace(images=images))
            method = drawing.few_step(model, solver, evaluations, ems=ems, measured=measured)
            yield f"{bending}, {solver}", method, measured.put_back
    if pc_steps and task in ("inpaint", "colorize"):
        known = restoration.known_of(model, task)._replace(images=images)
        yield "predictor-corrector", drawing.pc(model, pc_steps, known=known), known.put_back


if __name__ == "__main__":
    program.run(main)
