"""The cheapest EMS that serve DPM-Solver-v3 as the paper's do.

    python -m benchmarks.ems_budget [--workdir=runs/digits] [--nodes=15,30,60,120,1200] [--seeds=3] [--num_samples=256]

The last of --nodes, with as many images as there are up to the paper's 4096, is the reference: `--preset=paper` of
python -m ems. Smaller budgets are measured with noise of their own for each seed, on a fourth, a half, three fourths
and all of the images. A budget holds where its samples' RMS distance to the fine solution is within 2 % of the
reference's at every number of evaluations. Twenty minutes on two free cores for digits, nine tenths of them the
reference; what was stopped goes on.
"""

import numpy as np
from absl import flags

from benchmarks import study
from ems import estimate, moments, statistics
from experiments import measuring, program, samplers

NODES = flags.DEFINE_list("nodes", ["15", "30", "60", "120", "1200"], "Intervals of lam; the last for the reference.")
STEPS = (5, 6, 8, 10)  # evaluations
MOST_IMAGES = 4096  # the paper's
TOLERANCE = 0.02


def main():
    record, lines = {}, []
    for model in study.models():
        n, seeds = study.NUM_SAMPLES.value, study.SEEDS.value
        largest, reference, found = compared(model, [int(text) for text in NODES.value], seeds, n)
        ratios = {budget: np.array(values) / reference for budget, values in found.items()}
        cells = {name(largest): [*(f"{value:.4f}" for value in reference), "", f"{np.prod(largest):.0f}"]}
        for budget, values in ratios.items():
            pairs = zip(values.mean(0), np.ptp(values, 0) / 2, strict=True)
            holds = "yes" if (values.mean(0) <= 1 + TOLERANCE).all() else "no"
            cells[name(budget)] = [*(f"{a - 1:+.1%} +- {b:.1%}" for a, b in pairs), holds, f"{np.prod(budget):.0f}"]
        new = [
            f"## {model.name}",
            "",
            f"RMS distance of DPM-Solver-v3 to the fine solution, {n} noises, by its EMS. First row: the distance; "
            f"others: relative to it, mean and half range of {seeds} measurements; they hold if the mean is within "
            f"{TOLERANCE:.0%} at every number of evaluations.",
            "",
            *study.rows("EMS", [*(f"{k} evaluations" for k in STEPS), "holds", "evaluations measured"], cells),
        ]
        listed = {name(budget): values.tolist() for budget, values in ratios.items()}
        record[str(model.workdir)] = dict(steps=STEPS, reference=reference, of=name(largest), ratios=listed)
        lines += new
        study.write("ems_budget", lines, new, record)


def name(budget) -> str:
    return f"{budget[0]} nodes x {budget[1]} images"


def compared(model, nodes: list[int], seeds: int, n: int):
    """(largest budget, its distances at STEPS, (nodes, images): distances of each seed's measurement)."""
    *smaller, finest = nodes
    solve = study.from_noises(model, 0, n)
    fine = solve(study.fine_solution(model))

    def distances(ems) -> list[float]:
        tables = (samplers.build_tableau(model.diffusion.sde, "dpmv3", k, ems)[0] for k in STEPS)
        return [samplers.rms(solve(table) - fine) for table in tables]

    found: dict[tuple[int, int], list] = {}
    for seed in range(1, seeds + 1):
        blocks = measured(model, max(smaller), seed)
        for intervals in smaller:
            for shares in range(1, moments.BLOCKS + 1):
                ems = part(model, blocks, intervals, shares)
                found.setdefault((intervals, ems.origin["num_data"]), []).append(distances(ems))
    ems = part(model, measured(model, finest, 0), finest, moments.BLOCKS)
    return (finest, ems.origin["num_data"]), distances(ems), found


def measured(model, nodes: int, seed: int) -> moments.Moments:
    """Moments in blocks at the nodes of a grid, on all training images up to MOST_IMAGES; goes on where stopped."""
    diffusion, source = model.diffusion, measuring.training_images(model)
    batch_size = model.config.ems.batch_size
    images = range(min(MOST_IMAGES, source.size) // batch_size * batch_size)
    with program.progress(desc=f"EMS, {nodes} nodes x {len(images)} images, seed {seed}") as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        study.FOLDER.mkdir(parents=True, exist_ok=True)
        return estimate.accumulate(
            measuring.on_devices(diffusion, model.params, seed),
            estimate.nodes(diffusion.sde, nodes),
            source.take,
            images,
            diffusion.space.shape,
            batch_size=batch_size,
            partial=study.FOLDER / f"ems_budget_{model.identity}_nodes{nodes}_seed{seed}.partial.npz",
            identity=f"{model.identity} seed {seed}",
            progress=progress,
        )


def part(model, blocks: moments.Moments, nodes: int, shares: int) -> statistics.EMS:
    """The statistics of the first blocks at every so many of the nodes measured."""
    sde, finest = model.diffusion.sde, blocks.n.shape[1] - 1
    stride = finest // nodes
    node = estimate.nodes(sde, finest)
    node = estimate.nodes_at(sde, node.t[::stride], node.lam[::stride])
    chosen = moments.union(moments.Moments(*(field[:, ::stride] for field in blocks)), range(shares))
    return estimate.statistics(node, chosen, dict(sde=statistics.describe_sde(sde), num_data=int(chosen.n[0])))


if __name__ == "__main__":
    program.run(main)
