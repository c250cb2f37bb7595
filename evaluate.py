"""Evaluate a trained model: samples, test loss, and how near few-step solvers come to the exact ODE.

    python evaluate.py [--workdir=runs/digits] [--metrics=loss,convergence,samples]
    python evaluate.py --checkpoint=all                     every checkpoint of a run in turn, and a table of them
    python evaluate.py --metrics=bpd,encoding               bits/dim of test images; how well the ODE brings them back
    python evaluate.py --metrics=fid --num_samples=10000 [--solver=dpmv3 --steps=10] [--network=resnet20-fashion_mnist]
    python evaluate.py --metrics=fid --solver=ddim,dpmpp,unipc,dpmv3 --steps=5,6,8,10,12,15,20      the paper's table
    python evaluate.py --metrics=samples,fid --tableau=FILE  of python -m tools.search, searched or learned
    python evaluate.py --metrics=latent_mse --prompts=FILE --guidance=7.5 --solver=dpmpp,unipc,dpmv3 --steps=5,6,8,10
    python evaluate.py --metrics=samples,fid --guidance=2 [--classifier=WORKDIR | --autoguidance=STEP]   as it is guided
    python evaluate.py --samples=FOLDER --config=configs/fashion_mnist.py       anyone's images against a data set
    python evaluate.py --statistics --config=configs/fashion_mnist.py           of a data set, kept in runs/statistics/

The convergence study starts the few-step solvers of STUDY from the same noise and measures the RMS distance,
over pixels and samples in the data range, to a finely solved ODE; latent_mse, of latents, is the paper's mean square.

Writes report.json, report.md and figures to <workdir>/eval/, for checkpoints named by --checkpoint to eval/step<N>/.
What several calls measure of one checkpoint adds up in its report; `fid` adds a row for each solver, number of
evaluations, of samples, and seed. The report also shows the loss curve and the EMS, if the run has them.
"""

import functools
import pathlib

from absl import flags

from experiments import build, evaluation, guides, program, quality, runs, samplers
from experiments import prompts as prompting
from experiments import report as reports
from score_sde import checkpoint, files
from score_sde.errors import UserError
from score_sde.guidance import THRESHOLDS

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Step of the checkpoint, or all; the last if absent.")
METRICS = flags.DEFINE_list("metrics", ["loss", "convergence", "samples"], "What to evaluate.")
EMS = program.path_flag("ems", None, "EMS file for dpmv3; the run's own if absent.")
SEED = program.seed_flag("Seed of all noise.")

CONFIG = program.config_flag()
STATISTICS = flags.DEFINE_bool("statistics", False, "Measure the features of a config's training images, and no more.")
SAMPLES = program.path_flag("samples", None, "Evaluate these images, a folder or an .npz, instead of a model's.")
REFERENCE = program.path_flag("reference", None, "Statistics to compare with (.npz of mu and sigma), not our own.")
NETWORK = program.path_flag("network", None, "inception, resnet20-NAME or its .npz; that of the data set if absent.")
INCEPTION_WEIGHTS = program.path_flag("inception_weights", None, "pytorch-fid's file; downloaded if absent.")
INCEPTION_MODE = flags.DEFINE_string("inception_mode", "tf", "Preprocessing: tf (TensorFlow's) or pf (pytorch-fid's).")
ANY_INCEPTION_WEIGHTS = flags.DEFINE_bool("any_inception_weights", False, "Accept weights of another hash.")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 10_000, "Samples of fid (published: 50000), latent_mse.", lower_bound=2
)
SOLVER = flags.DEFINE_list("solver", None, "Solvers for fid, the first also for samples; the config's if absent.")
TABLEAU = program.path_flag("tableau", None, "File of python -m tools.search, for samples and fid.")
GRID = flags.DEFINE_string("grid", None, "Times of samples and fid: a named grid or gits; each solver's if absent.")
STEPS = flags.DEFINE_list("steps", None, "Network evaluations, likewise; with each solver. The config's if absent.")

GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of guidance of samples, fid and convergence.")
GUIDANCE_INTERVAL = flags.DEFINE_string("guidance_interval", None, "Times low,high outside which there is no guidance.")
THRESHOLD = flags.DEFINE_enum("threshold", None, list(THRESHOLDS), "Keeps data predictions in the data range.")
CLASSIFIER = program.path_flag("classifier", None, "The run folder of a classifier that guides them.")
AUTOGUIDANCE = program.path_flag("autoguidance", None, "An earlier step, or the run folder of a weaker model.")
LABEL = flags.DEFINE_integer("label", None, "Class of their samples; all classes by turns if absent.", lower_bound=0)
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts, one a line; sample i shows the i-th, by turns.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; nothing if absent.")


def main():
    # ------------------------------------------------------------------------------ flags become values
    network = functools.partial(
        quality.feature_network,
        name=NETWORK.value,
        inception_weights=INCEPTION_WEIGHTS.value,
        inception_mode=INCEPTION_MODE.value,
        any_inception_weights=ANY_INCEPTION_WEIGHTS.value,
    )
    opened = functools.partial(runs.open_model, dataset=program.dataset_at())
    folder = lambda: runs.newest_run() if WORKDIR.value is None else pathlib.Path(WORKDIR.value)
    if STATISTICS.value or SAMPLES.value is not None:
        config = program.config_of(CONFIG) if CONFIG.value is not None else runs.read_config(folder())
        if CONFIG.value is None and program.dataset_at() is not None:
            config.data.dataset = program.dataset_at()
        build.trainable(config)  # which names mistakes in it
        given = dict(of_data=STATISTICS.value, samples=SAMPLES.value, reference=REFERENCE.value)
        evaluation.images_and_data(config, network(config), **given)
        return
    for name in METRICS.value or [""]:
        if name not in evaluation.METRICS:
            raise UserError(f"unknown metric {name!r}: use one of {', '.join(evaluation.METRICS)}")
    for text in STEPS.value or []:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"--steps={text}: expected numbers of network evaluations, as in --steps=5,10")
    for name in SOLVER.value or []:
        samplers.check_solver(name)  # before the others have worked for hours
    for flag in (SOLVER, STEPS, GRID):
        if TABLEAU.value is not None and flag.value is not None:
            raise UserError(f"--tableau brings its own solver, steps and grid: leave out --{flag.name}")
    told = prompting.read(None, PROMPTS.value, NEGATIVE_PROMPT.value, GUIDANCE.value)
    options = evaluation.Options(
        seed=SEED.value,
        ems=EMS.value,
        solvers=SOLVER.value,
        steps=[int(text) for text in STEPS.value or []],
        grid=GRID.value,
        tableau=TABLEAU.value,
        num_samples=NUM_SAMPLES.value,
        network=network,
        reference=REFERENCE.value,
        guidance=samplers.guidance_of(GUIDANCE.value, GUIDANCE_INTERVAL.value, THRESHOLD.value),
        label=LABEL.value,
        prompts=told,
    )

    # ------------------------------------------------------------------------------ one call a checkpoint
    def evaluate(model, name="."):
        model = prompting.prompted(model, told)
        beside = guides.guide_of(model, classifier=CLASSIFIER.value, autoguidance=AUTOGUIDANCE.value)
        return evaluation.evaluate(model, METRICS.value, options._replace(beside=beside), name)

    if CHECKPOINT.value is None:
        evaluate(opened(WORKDIR.value))
        return
    if not CHECKPOINT.value.isdecimal() and CHECKPOINT.value != "all":
        raise UserError(f"--checkpoint={CHECKPOINT.value}: expected a step, or all")
    run = folder()
    steps = checkpoint.Checkpoints(run).steps() if CHECKPOINT.value == "all" else [int(CHECKPOINT.value)]
    if not steps:
        raise UserError(f"{run} has no finished checkpoints: leave out --checkpoint, or train first")
    measured = {step: evaluate(opened(run, step), f"step{step}") for step in steps}
    if len(measured) > 1:
        links = [f"- [step {k}](step{k}/report.md)" for k in measured]
        lines = [f"# {run}", "", *reports.compared(measured), "", *links]
        files.write(run / "eval" / "checkpoints.md", "\n".join([*lines, ""]))
        print("\n".join(["", *lines[:-1]]) + f"\nwrote {run}/eval/checkpoints.md")


if __name__ == "__main__":
    program.run(main)
