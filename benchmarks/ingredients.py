"""What each ingredient of DPM-Solver-v3 brings.

    python -m benchmarks.ingredients [--workdir=runs/digits,runs/digits_ve] [--num_samples=256]
        [--steps=5,6,8,10,12,15,20]

RMS distance to the fine solution from the same noises, as the parts of Zheng et al. 2023 are put in one after the
other: the parameterization l instead of a fixed one, then s and b, the corrector, pseudo-order, order; a table, and a
picture of its first rows. All uniform in lam, to the end of the EMS. Two minutes a digits model on two free cores.
"""

import numpy as np

from benchmarks import study
from ems.statistics import EMS
from experiments import figures, measuring, program, samplers

PLAIN = dict(order=3, corrector="off", pseudo=False, corrector_pseudo=False, lower_order_final=True)
CORRECTED = PLAIN | {"corrector": "on"}
# row: (l, s and b; None: as measured), options
ROWS = {
    "order 1: DDIM": ((1.0, 0.0), PLAIN | {"order": 1}),
    "order 3, l = 0: noise prediction": ((0.0, 0.0), PLAIN),
    "order 3, l = 1: data prediction": ((1.0, 0.0), PLAIN),
    "order 3, l": ((None, 0.0), PLAIN),
    "order 3, l, s, b": ((None, None), PLAIN),
    "order 3, l, s, b, corrector": ((None, None), CORRECTED),
    "the same, pseudo-order predictor": ((None, None), CORRECTED | {"pseudo": True}),
    "the same, pseudo-order corrector": ((None, None), CORRECTED | {"corrector_pseudo": True}),
    "the same, no lower order at the end": ((None, None), CORRECTED | {"lower_order_final": False}),
    "the same, both pseudo-order and no lower order": (
        (None, None),
        CORRECTED | dict(pseudo=True, corrector_pseudo=True, lower_order_final=False),
    ),
    "order 2, l, s, b, corrector": ((None, None), CORRECTED | {"order": 2}),
    "order 1, l, s, b, corrector": ((None, None), CORRECTED | {"order": 1}),
    "published options for the number of evaluations": ((None, None), {}),
}
PICTURED = 7  # the first rows: a fixed l, the measured, then one ingredient after the other


def main():
    record, lines = {}, []
    for model in study.models():
        steps, n = study.steps(), study.NUM_SAMPLES.value
        found = compared(model, measuring.ems_of(model), steps, n)
        record[str(model.workdir)] = dict(steps=steps, rms=found)
        title = f"{model.name}, {n} noises"
        new = [f"## {title}", "", *study.rows("evaluations", steps, found)]
        lines += new
        study.write("ingredients", lines, new, record)
        picture = study.FOLDER / f"ingredients_{model.workdir.name}.png"
        figures.save_convergence(picture, steps, {name: found[name] for name in list(ROWS)[:PICTURED]}, title)


def compared(model, ems, steps: list[int], n: int) -> dict[str, list[float]]:
    """RMS distance of n samples to the fine solution, by row and number of evaluations."""
    solve = study.from_noises(model, 0, n)
    fine = solve(study.fine_solution(model))
    found = {name: [] for name in ROWS}
    for name, k in program.progress([(name, k) for k in steps for name in ROWS], desc=model.workdir.name):
        (l, s_and_b), options = ROWS[name]
        table, _ = samplers.build_tableau(model.diffusion.sde, "dpmv3", k, with_fixed(ems, l, s_and_b), **options)
        found[name].append(samplers.rms(solve(table) - fine))
    return found


def with_fixed(ems: EMS, l: float | None, s_and_b: float | None) -> EMS:
    """Statistics with l, or s and b, fixed where a number is given."""
    fixed = dict(l=l, s=s_and_b, b=s_and_b)
    return ems._replace(**{key: np.full_like(ems.l, value) for key, value in fixed.items() if value is not None})


if __name__ == "__main__":
    program.run(main)
