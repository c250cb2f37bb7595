"""What guides a model with parameters of its own: a classifier, or a weaker model of its kind (autoguidance)."""

import pathlib

from experiments import packed, runs
from experiments.runs import Guide, Model
from score_sde.errors import UserError
from score_sde.guidance import Guidance


def guide_of(model: Model, *, classifier: str | None = None, autoguidance: str | None = None) -> Guide | None:
    """The guide that flags name; None where they name none.

    classifier: a run folder. autoguidance: a run folder or a packed model, or a step of the model's own run.
    """
    if classifier is not None and autoguidance is not None:
        raise UserError("--classifier and --autoguidance: one of them guides, leave the other out")
    if classifier is not None:
        trained = runs.open_classifier(classifier, model)
        part = dict(classifier=trained.values)
        flag = f"--classifier={classifier}"
        return Guide(f"classifier {trained.identity}", trained.name, flag, part, trained.params)
    return None if autoguidance is None else _weaker(model, autoguidance)


def _weaker(model: Model, given: str) -> Guide:
    """A weaker model, refused if it is the model itself."""
    if given.isdecimal() and packed.is_packed(model.workdir):
        raise UserError(f"--autoguidance={given}: {model.workdir} has one checkpoint alone: give the folder of a run")
    if not given.isdecimal() and not pathlib.Path(given).exists():
        raise UserError(
            f"--autoguidance={given}: expected an earlier step of {model.workdir}, a whole number, or the folder of a "
            "run or of a packed model, and there is no such folder"
        )
    weaker = runs.open_model(model.workdir, int(given)) if given.isdecimal() else runs.open_model(given)
    if weaker.identity == model.identity:
        raise UserError(f"--autoguidance={given} is the model itself: give an earlier step or a smaller model")
    part, flag = dict(weaker=weaker.diffusion), f"--autoguidance={given}"
    return Guide(f"weaker {weaker.identity}", weaker.name, flag, part, weaker.params)


def bent_by(guidance: Guidance, beside: Guide | None = None) -> tuple[float | None, str | None]:
    """(scale, identity of the guide) of what bends a model's statistics; (None, None) for the model alone.

    A classifier guides with scale 1 if none is given, and not at all with 0; a weaker model does not with 1.
    """
    if beside is None:
        return guidance.own_scale, None
    scale = 1.0 if guidance.scale is None else guidance.scale
    idle = 0.0 if "classifier" in beside.part else 1.0
    return (None, None) if scale == idle else (scale, beside.identity)
