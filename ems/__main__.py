"""Measure the empirical model statistics (EMS) of a trained model, for DPM-Solver-v3.

    python -m ems [--workdir=runs/digits] [--preset=quick] [--nodes=120] [--num_data=1024]
    python -m ems --num_data=2048 --first_image=2048      another machine's share of the images
    python -m ems merge FILE FILE ...                     all shares together, from their .moments files
    python -m ems --guidance=2.0                          of a class-conditional model that is sampled with guidance
    python -m ems --guidance=2.0 --classifier=WORKDIR     of a model that a classifier guides
    python -m ems --guidance=2.0 --autoguidance=WORKDIR   of a model that a weaker one guides, or an earlier step
    python -m ems --data=samples                          without the training images, on the model's own samples
    python -m ems --data=FILE.npz                         on latents, as they are: `latents`, (K, H, W, C) of floats
    python -m ems --prompts=FILE --guidance=7.5           of a model with a text encoder, on what it draws of prompts
    python -m ems published FOLDER --t_end=1e-3           take over the published l.npz and sb.npz, of --guidance

Writes <workdir>/ems/step..._nodes..._data....npz and a picture of the curves, prints their standard errors and whether
the number of images suffices. A stopped measurement goes on. The presets, which other flags override:
quick, 120 nodes and 1024 images; paper, 1200 nodes and 4096 images.
"""

from absl import flags

from experiments import guides, measuring, program, runs
from experiments import prompts as prompting
from score_sde.errors import UserError
from score_sde.guidance import Guidance

PRESETS = {"quick": dict(nodes=120, num_data=1024), "paper": dict(nodes=1200, num_data=4096)}

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "Nodes and images; the config's if absent.")
NODES = flags.DEFINE_integer("nodes", None, "Intervals of the lam grid.", lower_bound=2)
NUM_DATA = flags.DEFINE_integer("num_data", None, "Images.", lower_bound=1)
FIRST_IMAGE = flags.DEFINE_integer("first_image", 0, "Where they begin; a machine takes its share.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time; the config's if absent.", lower_bound=1)
DATA = program.path_flag("data", None, "samples, or an .npz of latents; the training images if absent.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Measure the model guided with this scale.")
CLASSIFIER = program.path_flag("classifier", None, "The run folder of a classifier that guides it.")
AUTOGUIDANCE = program.path_flag("autoguidance", None, "An earlier step, or the run folder of a weaker model.")
PROMPTS = program.path_flag("prompts", None, "File of prompts, one a line; image i belongs to the i-th, by turns.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; nothing if absent.")
HEIGHT = flags.DEFINE_integer("height", None, "Height of images of a latent model, in pixels; the config's if absent.")
WIDTH = flags.DEFINE_integer("width", None, "Width of these images, in pixels; the config's if absent.")
T_END = flags.DEFINE_float("t_end", None, "Where the nodes end; the config's, else the SDE's t_min if absent.")
SEED = program.seed_flag("Seed of noise and probes.")


def main(arguments):
    command, *files = arguments or ["measure"]
    least = {"measure": 0, "merge": 2, "published": 1}
    if command not in least:
        raise UserError(f"unexpected argument {command!r}: expected merge, published, or options written --name=value")
    if len(files) < least[command] or (command != "merge" and len(files) > least[command]):
        raise UserError(f"python -m ems {command} takes {least[command]} file(s) (merge: or more), got {len(files)}")
    model = runs.open_model(WORKDIR.value, CHECKPOINT.value, dataset=program.dataset_at())
    model = runs.with_size(model, HEIGHT.value, WIDTH.value)
    beside = guides.guide_of(model, classifier=CLASSIFIER.value, autoguidance=AUTOGUIDANCE.value)
    guidance = dict(guidance=Guidance(GUIDANCE.value), beside=beside)
    if command == "merge":
        measuring.merge(model, files, beside)
    elif command == "published":
        t_end = model.diffusion.sde.t_min if T_END.value is None else T_END.value
        measuring.take_published(model, *files, t_end=t_end, **guidance)
    else:
        given = dict(nodes=NODES.value, num_data=NUM_DATA.value, batch_size=BATCH_SIZE.value, t_end=T_END.value)
        given = {name: value for name, value in given.items() if value is not None}
        budget = dict(model.config.ems) | PRESETS.get(PRESET.value, {}) | given
        told = prompting.read(None, PROMPTS.value, NEGATIVE_PROMPT.value, GUIDANCE.value)
        measuring.measure(
            prompting.prompted(model, told),
            **budget,
            seed=SEED.value,
            first_image=FIRST_IMAGE.value,
            source=DATA.value,
            **guidance,
            prompts=told,
        )


if __name__ == "__main__":
    program.run(main, files=True)
