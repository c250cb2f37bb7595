"""The tasks of sample.py: by which solvers each is done, and which flags belong to it."""

from experiments import inverse_problems
from score_sde.errors import UserError
from solvers import SOLVERS

TASKS = (*inverse_problems.TASKS, "class", "interpolate")
# Solver of a task where none is given; for a class not dpmv3, which would measure EMS of the guided model first.
SOLVERS_OF = {"inpaint": "pc", "colorize": "pc", "class": "dpmpp", "interpolate": "ode"}
# Tasks that take a flag.
TAKEN_BY = {
    "image": inverse_problems.TASKS,
    "mask": ("inpaint",),
    "classifier": ("class",),
    "factor": ("super_resolve",),
    "blur": ("deblur",),
    "operator": ("custom",),
    "method": inverse_problems.TASKS,
    "measurement_noise": inverse_problems.TASKS,
}


def check(task: str | None, solver: str, given: dict):
    """Refuse flags that do not go together; given: those of TAKEN_BY that have a value."""
    for flag in given:
        if task not in TAKEN_BY[flag]:
            other = ", or --strength" if flag == "image" else ""
            raise UserError(f"--{flag} needs --task={' or --task='.join(TAKEN_BY[flag])}{other}")
        if flag in ("method", "measurement_noise") and solver == "pc":
            raise UserError(f"--{flag} is for few-step solvers, pc has its own way: --solver=dpmv3, or leave it out")
    if task == "class" and "classifier" not in given:
        raise UserError(
            "--task=class needs --classifier=WORKDIR: train one, python train.py --config=configs/classifier/digits.py"
        )
    if task == "interpolate" and solver != "ode":
        raise UserError(f"--task=interpolate is done by the ODE alone, not by {solver}: --solver=ode")
    if task in inverse_problems.TASKS and solver not in (SOLVERS if task not in SOLVERS_OF else [*SOLVERS, "pc"]):
        raise UserError(f"--task={task} is done by few-step solvers, not by {solver}: --solver=dpmv3 --steps=20")
