"""Draw samples from a trained model.

    python sample.py --solver=dpmv3 [--steps=10] [--num_samples=64] [--seed=0] [--workdir=runs/digits]
    python sample.py --solver=dpmpp --option order=3 [--option grid=gits]       times along the model's own trajectories
    python sample.py --solver=auto --steps=5         the best file of tools.search, or the best named solver, measured
    python sample.py --solver=pc --steps=1000
    python sample.py --label=3 --guidance=2.0       of a class-conditional model; without --label, classes by turns
    python sample.py --task=class --label=3 --classifier=runs/classifier_digits      any model, guided by a classifier
    python sample.py --guidance=2.0 --autoguidance=STEP           guided by an earlier step, or a run of a smaller model
    python sample.py --task=inpaint [--image=FILE.png] [--mask=FILE.png]      white is known; absent: the upper half is
    python sample.py --task=colorize [--image=FILE.png]
    python sample.py --workdir=runs/sd --prompt="a cat" [--negative_prompt="..."] [--prompts=FILE] --guidance=7.5
                     [--height=768 --width=512]     of a latent model with a text encoder (docs/latent.md)
    python sample.py --workdir=runs/upsampler --base_samples=runs/base/samples/NAME/samples.npz [--label=3]
    python sample.py --image=FILE.png --strength=0.6 --solver=dpmpp         begins at a noisy image
    python sample.py --task=inpaint|colorize|super_resolve|deblur --solver=dpmv3 --steps=20 [--method=pigdm|dps|ddnm]
    python sample.py --task=custom --operator=MODULE:FUNCTION [--image=FILE.png|MEASURED.npy]    of your own, in Python
    python sample.py --solver=ode [--option rtol=1e-5 --option atol=1e-5 --option temperature=0.9]
    python sample.py --task=interpolate                          between the latents of pairs of test images

Solvers: those of solvers/__init__.py (dpmv3, DPM-Solver-v3, measures EMS first if the run has none; sde_dpmpp and
stochastic_heun draw noise), pc (predictor-corrector), and ode (adaptive, to a stated tolerance). Writes samples.npz,
grid.png and run.json to <workdir>/samples/<name>/; a stopped run goes on after its last batch. A sample depends on its
index and the seed alone, not on the batch size or the number of devices and hosts (pc with a corrector: also on its
batch; ode: to within its tolerance).

The tasks inpaint and colorize are done by pc, or as inverse problems (score_sde/inverse.py), like the three after them,
by any few-step solver; class by any solver (dpmpp if absent), best with --guidance=3. Without --image they take test
images, four samples each; grid.png then shows, in a row, an image, what was known of it, and its samples.
"""

from absl import flags

from experiments import (
    choosing,
    drawing,
    guides,
    image_to_image,
    inverse_problems,
    measuring,
    program,
    restoration,
    runs,
    samplers,
    tasks,
    times,
    upsampling,
)
from experiments import prompts as prompting
from experiments.config import shown
from score_sde import files, parallel
from score_sde.errors import UserError
from score_sde.guidance import THRESHOLDS
from score_sde.inverse import METHODS
from solvers import SOLVERS

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}, pc, ode or auto; the config's if absent.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Network evaluations (pc: time steps); the config's if absent.", lower_bound=1
)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver, name=value; may be repeated.")
TABLEAU = program.path_flag("tableau", None, "File of python -m tools.search: a solver, its steps and options.")
EMS = program.path_flag("ems", None, "EMS file for dpmv3; the run's own if absent.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many; the config's if absent.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "At a time; the config's if absent.", lower_bound=1)
SEED = program.seed_flag("Seed of the noise.")
LABEL = flags.DEFINE_integer("label", None, "Class of all samples; all classes by turns if absent.", lower_bound=0)
GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of guidance; 1 is the conditional model.")
GUIDANCE_INTERVAL = flags.DEFINE_string("guidance_interval", None, "Times low,high outside which there is no guidance.")
THRESHOLD = flags.DEFINE_enum("threshold", None, list(THRESHOLDS), "Keeps data predictions in the data range.")
TASK = flags.DEFINE_enum("task", None, list(tasks.TASKS), "What is known of samples.")
IMAGE = program.path_flag("image", None, "The image to restore; test images if absent.")
MASK = program.path_flag("mask", None, "Image of what is known, white, to inpaint; the upper half if absent.")
METHOD = flags.DEFINE_enum("method", None, list(METHODS), "How few-step solvers meet what is known; pigdm if absent.")
MEASUREMENT_NOISE = flags.DEFINE_float("measurement_noise", None, "Its standard deviation in what is measured.")
FACTOR = flags.DEFINE_integer("factor", None, f"How much super_resolve enlarges; {inverse_problems.FACTOR} if absent.")
BLUR = flags.DEFINE_float("blur", None, f"Deviation of deblur, in pixels; {inverse_problems.BLUR} if absent.")
OPERATOR = flags.DEFINE_string("operator", None, "MODULE:FUNCTION, x (B, H, W, C) -> y (B, ...), of --task=custom.")
CLASSIFIER = program.path_flag("classifier", None, "The run folder of the classifier of --task=class.")
AUTOGUIDANCE = program.path_flag("autoguidance", None, "An earlier step, or the run folder of a weaker model.")
BASE_SAMPLES = program.path_flag("base_samples", None, "Small images for an upsampler: samples.npz, or any data set.")
PROMPT = flags.DEFINE_string("prompt", None, "What samples of a model with a text encoder show.")
PROMPTS = program.path_flag("prompts", None, "File of prompts, one a line; sample i shows the i-th, by turns.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; nothing if absent.")
STRENGTH = flags.DEFINE_float("strength", None, "How much of --image is drawn anew, from 0, nothing, to 1, all.")
HEIGHT = flags.DEFINE_integer("height", None, "Height of images of a latent model, in pixels; the config's if absent.")
WIDTH = flags.DEFINE_integer("width", None, "Width of these images, in pixels; the config's if absent.")
NAME = program.name_flag("name", None, "Folder under <workdir>/samples/; made from the solver if absent.")


def main():
    # ------------------------------------------------------------------------------ flags become values
    told = prompting.read(PROMPT.value, PROMPTS.value, NEGATIVE_PROMPT.value, GUIDANCE.value)
    plain = runs.open_model(WORKDIR.value, CHECKPOINT.value, dataset=program.dataset_at())
    plain = prompting.prompted(runs.with_size(plain, HEIGHT.value, WIDTH.value), told)
    defaults, task, seed = plain.config.sampling, TASK.value, SEED.value
    solver = SOLVER.value or tasks.SOLVERS_OF.get(task, defaults.solver)
    steps = STEPS.value or (defaults.pc_steps if solver == "pc" else defaults.steps)
    options, corrections = samplers.parse_options(OPTION.value), None
    guidance = samplers.guidance_of(GUIDANCE.value, GUIDANCE_INTERVAL.value, THRESHOLD.value)
    beside = guides.guide_of(plain, classifier=CLASSIFIER.value, autoguidance=AUTOGUIDANCE.value)
    if TABLEAU.value is not None:
        for flag in (SOLVER, STEPS, OPTION):
            if flag.value:
                raise UserError(f"--tableau brings its own solver, steps and options: leave out --{flag.name}")
        bent = guides.bent_by(guidance, beside)
        solver, steps, options, corrections = samplers.read_search(plain, TABLEAU.value, bent)
    base = upsampling.read(plain, BASE_SAMPLES.value, LABEL.value, NUM_SAMPLES.value)
    n = defaults.num_samples if told is None else len(told.texts)
    n = NUM_SAMPLES.value or (n if base is None else len(base.images))
    batch_size = min(BATCH_SIZE.value or defaults.batch_size, parallel.round_up(n))
    parallel.batch_per_device(batch_size)
    own_flags = (IMAGE, MASK, CLASSIFIER, METHOD, MEASUREMENT_NOISE, FACTOR, BLUR, OPERATOR)
    redrawn = STRENGTH.value is not None
    given = {flag.name: flag.value for flag in own_flags if flag.value is not None and not (redrawn and flag is IMAGE)}
    tasks.check(task, solver, given)
    if base is not None and (beside is not None or task is not None or solver == "auto"):
        raise UserError("--base_samples: an upsampler takes no --task, --classifier, --autoguidance and --solver=auto")
    model = upsampling.with_base_samples(runs.with_guidance(plain, guidance, label=LABEL.value, beside=beside), base)
    known = measured = None
    if task in inverse_problems.TASKS and solver == "pc":
        known = restoration.known_of(plain, task, IMAGE.value, MASK.value)
    elif task in inverse_problems.TASKS:
        given = dict(method=METHOD.value or "pigdm", std=MEASUREMENT_NOISE.value or 0.0, operator=OPERATOR.value)
        given |= dict(image=IMAGE.value, mask=MASK.value, factor=FACTOR.value, blur=BLUR.value)
        measured = inverse_problems.measured_of(plain, task, **given)
    bending_flags = (TASK, *own_flags, AUTOGUIDANCE, LABEL, GUIDANCE, GUIDANCE_INTERVAL, THRESHOLD)
    bending_flags += (STRENGTH, HEIGHT, WIDTH, BASE_SAMPLES)
    bending = {flag.name: flag.value for flag in bending_flags if flag.value is not None}
    bending |= {} if measured is None else dict(method=measured.method)

    files.check_writable(plain.results / "samples")
    if solver == "auto":
        for flag in (OPTION, GUIDANCE_INTERVAL, THRESHOLD, STRENGTH):  # it is measured without
            if flag.value:
                raise UserError(f"--solver=auto brings its own options: leave out --{flag.name}")
        given = dict(guidance=guidance, beside=beside, label=LABEL.value, ems_path=EMS.value)
        (solver, steps, options, corrections), path = choosing.best(plain, steps, **given)
        bending["chosen_by"] = str(path)

    # ------------------------------------------------------------------------------ the method
    identities = [value.identity for value in (beside, base) if value is not None]
    if EMS.value is not None and solver != "dpmv3" and SOLVER.value != "auto":
        raise UserError(f"--ems is for dpmv3, the solver is {solver}: leave it out")
    if redrawn and (solver in ("pc", "ode") or task is not None):
        raise UserError("--strength is for few-step solvers and no --task: leave one of them out")
    if solver == "pc":
        method = drawing.pc(model, steps, options, seed=seed, known=known)
    elif solver == "ode":
        if STEPS.value is not None:
            raise UserError(f"--steps={steps}: solver ode chooses its steps: leave it out, or set --option rtol=1e-3")
        if task == "interpolate" and plain.diffusion.num_classes and LABEL.value is None:
            raise UserError(f"--task=interpolate: {model.name} has classes: give one for both images, as in --label=3")
        method = drawing.ode(model, options, seed=seed, pairs=task == "interpolate")
    else:
        ems = measuring.ems_of(plain, EMS.value, guidance, beside) if solver == "dpmv3" else None
        given = dict(ems=ems, corrections=corrections, measured=measured)
        if redrawn:
            beginning = image_to_image.begin(plain, IMAGE.value, STRENGTH.value, steps, options)
            options, given["start"] = beginning.options, beginning.start
            identities.append(beginning.identity)
        options = times.with_times(model, solver, steps, options, ems)
        method = drawing.few_step(model, solver, steps, options, seed=seed, **given)

    # ------------------------------------------------------------------------------ one call, and what is printed
    how = f"{method.evaluations} evaluations each, {shown(method.options | bending)}, seed {seed}"
    how += "" if told is None else f", of {len(told.texts)} prompt(s)"
    print(f"{n} samples by {solver}, {how}")
    given = [text for text in OPTION.value if "/" not in text] + ["searched"] * (TABLEAU.value is not None)
    given += [f"{flag}={value}" for flag, value in bending.items() if "/" not in str(value)]
    given += [] if told is None else [told.name]
    run = [f"step{model.step}", solver] + ([] if method.steps is None else [str(steps)])
    folder = model.results / "samples" / (NAME.value or drawing.name_of([*run, *given, f"seed{seed}"]))
    samples = drawing.draw_and_write(
        model,
        method,
        n,
        folder,
        batch_size=batch_size,
        seed=seed,
        bending=bending | ({} if told is None else told.record()),
        identities=tuple(identities),
        known=measured if known is None else known,
        columns=drawing.PER_PAIR if task == "interpolate" else None,
    )
    if method.steps is None:
        print(f"{max(samples.evaluations)} evaluations at most")
    print(f"wrote {samples.folder}/samples.npz, grid.png and run.json")
    if samples.failure is not None:
        finished = f"the {len(samples.images)} samples finished before it are in {samples.folder}"
        raise UserError(f"{samples.failure}; {finished}")


if __name__ == "__main__":
    program.run(main)
