"""The report of a model: what was measured, by name, as one JSON file, and the same to read, as markdown.

A report is {"model": {workdir, step, identity}, metric: result, ...}. A result holds, besides what its metric measured,
seed, seconds, command and versions of the call that did. LISTS are lists of results, one for each way of sampling;
"training" and "ems" describe the run's files.
"""

import json
import pathlib

from score_sde import files
from score_sde.metrics import features

LISTS = ("fid", "latent_mse")
# What a result may tell of what bends a model.
BENDING = ("guidance", "interval", "threshold", "label", "classifier", "guided_by", "prompts", "negative_prompt")
# What tells two results of LISTS apart; a result that agrees in all takes the place of the earlier one.
ROW = ("solver", "steps", "options", "num_samples", "seed", "reference", "network", "weights_sha256", "preprocessing")
ROW += (*BENDING, "samples", "table")
# What tells two results of another metric apart; an earlier one that differs in any is kept among "others".
APART = ("seed", "dataset", "ems_file", "solver", "steps", "options", *BENDING)


def beside(path: pathlib.Path, record: dict, keys: tuple[str, ...]) -> pathlib.Path:
    """The path for a record, a JSON file, or one beside it if a record is there that differs in any of these keys."""
    try:
        there = json.loads(path.read_text())
        own = all(there.get(key) == record[key] for key in keys)
    except FileNotFoundError:
        own = True
    except (OSError, ValueError, AttributeError):
        own = False
    apart = features.fingerprint(*(record[key] for key in keys))
    return path if own else path.with_name(f"{path.stem}-{apart}.json")


def read(folder: pathlib.Path) -> dict | None:
    """The report in a folder, if there is one."""
    path = folder / "report.json"
    if not path.exists():
        return None
    with files.reading(path, "is no report", "delete it"):
        report = json.loads(path.read_text())
        report["model"]["identity"], report["model"]["step"]
    # before results told of the call that made them, they did not add up
    return report if "command" not in report else {"model": report["model"]}


def add(report: dict, metric: str, result: dict) -> dict:
    """A report with a result in the place of the metric's earlier one; of LISTS, of that made in the same way."""
    result = {key: value for key, value in json.loads(json.dumps(result)).items() if key != "metric"}
    if metric in LISTS:
        others = [row for row in report.get(metric, []) if any(row.get(key) != result.get(key) for key in ROW)]
        return report | {metric: [*others, result]}
    earlier, others = report.get(metric), report.get("others", [])
    same = lambda one, two: all(one.get(key) == two.get(key) for key in APART if key in one or key in two)
    if isinstance(earlier, dict) and "seed" in earlier and not same(earlier, result):
        others = [*others, earlier | dict(metric=metric)]
    others = [row for row in others if row["metric"] != metric or not same(row, result)]
    return report | {metric: result} | ({"others": others} if others or "others" in report else {})


def joined(report: dict, later: dict) -> dict:
    """A report with the results of a later one added."""
    for metric, found in sorted(later.items(), key=lambda item: item[0] != "others"):
        for result in found if metric in (*LISTS, "others") else [found]:
            report = add(report, result.get("metric", metric), result)
    return report


# ------------------------------------------------------------------------------------------------ lines of a result


def table(header: list, rows: list[list]) -> list[str]:
    """Lines of a markdown table."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return [line(header), "|---" * len(header) + "|", *map(line, rows)]


def way(result) -> str:
    """The solver of a result, whether its table was searched or learned, and what bends the model."""
    solver = result["solver"] + (f" ({result['table']})" if result.get("table") else "")
    return solver + "".join(f", {key} {result[key]}" for key in BENDING if result.get(key) is not None)


def samples_lines(result) -> list[str]:
    n, steps, seed = (result[key] for key in ("num_samples", "steps", "seed"))
    return [
        f"{n} samples by {way(result)}, {steps} evaluations, seed {seed}",
        "",
        f"![samples]({result.get('picture', 'samples.png')})",
    ]


def training_lines(result) -> list[str]:
    line = f"Trained {result['steps']} steps in {result['hours']:.2f} hours; training loss {result['loss']:.5f}"
    line += f" (mean of the last {result['loss_values']} logged)"
    if result["held_out_loss"] is not None:
        line += f", test loss of averaged parameters {result['held_out_loss']:.5f} (last batch logged)"
    return [line, "", "![loss](loss.png)"]


def loss_lines(result) -> list[str]:
    return [f"Test loss {result['mean']:.5f} +- {result['standard_error']:.5f} ({result['images']} images)"]


def bpd_lines(result) -> list[str]:
    given = ", given their classes" if result["conditional"] else ""
    evaluations = sum(result["evaluations"]) / len(result["evaluations"])
    lines = [
        f"Bits/dim {result['mean']:.4f} +- {result['standard_error']:.4f} ({result['num_data']} images{given}, "
        f"{result['repeats']} repeats of {result['num_probes']} {result['probe']} probes, "
        f"{evaluations:.0f} evaluations)",
    ]
    if not result["trained_on_dequantized"]:
        lines += [
            "",
            "Of levels dequantized here, (level + u) / 256; this model was trained on levels alone "
            "(data.uniform_dequantization is off), so the bound is valid but looser than after training for it.",
        ]
    return lines


def encoding_lines(result) -> list[str]:
    there, back = (sum(column) / len(column) for column in zip(*result["evaluations"], strict=True))
    return [
        f"Data to latent and back: RMS error {result['rms']:.1e}, largest {result['largest']:.1e} in the data range "
        f"({result['images']} images, rtol {result['rtol']:g}, {there:.0f} + {back:.0f} evaluations)"
    ]


def convergence_lines(result) -> list[str]:
    return [
        f"RMS distance to the fine solution over {result['noises']} noises (DPM-Solver++ 2M in {result['fine_steps']} "
        f"evaluations, itself known to {result['fine_uncertainty']:.1e})",
        "",
        *table(
            ["evaluations", *result["steps"]],
            [[name, *(f"{value:.4f}" for value in values)] for name, values in result["rms"].items()],
        ),
        "",
        f"![convergence]({result.get('picture', 'convergence.png')})",
    ]


def quality_lines(result) -> list[str]:
    """Distances of one set of images to the data, with the floor: what as many test images have."""
    distance, n = result["distance"], result["num_samples"]
    kernel, score = quality_names(result)
    lines = [
        f"{result['title']}, against {result['against']}; weights {result['weights_sha256'][:8]}, "
        f"{result['preprocessing']}",
        "",
        *table(
            [distance, f"floor: {result['floor_num_samples']} test images"],
            [[f"{result['frechet']:.4g}", f"{result['floor']:.4g}"]],
        ),
        "",
        f"{score} {result['inception_score']:.3f} +- {result['inception_score_std']:.3f} "
        f"({result['inception_score_splits']} splits)",
    ]
    if "kernel" in result:
        lines += [
            "",
            f"{kernel} {result['kernel']:.6f} +- {result['kernel_std']:.6f} (standard deviation over "
            f"{result['kernel_subsets']} subsets of {result['kernel_subset_size']})",
            "",
            f"Precision {result['precision']:.4f}, recall {result['recall']:.4f} (k = 3, {result['pairs_samples']} "
            f"images among {result['pairs_reference']})",
        ]
    return [*lines, *too_few(result)] if n <= result["dimension"] else lines


def too_few(result) -> list[str]:
    return [
        "",
        f"Warning: {result['num_samples']} images do not determine a covariance of {result['dimension']} features: "
        f"{result['distance']} is too large by an amount that depends on the number; compare it at equal numbers only",
    ]


def quality_names(result) -> tuple[str, str]:
    """What the kernel distance and the score of the classes are called."""
    if result["distance"] == "FID":
        return "KID", "Inception Score"
    return f"KD-{result['network']}", f"score of the classes of {result['network']}"


def by_evaluations(results) -> list[str]:
    """Where several solvers took several numbers of evaluations: the distances, a row a solver, as papers show them."""
    lines = []
    group = lambda result: (result["num_samples"], result["seed"])
    for n, seed in dict.fromkeys(map(group, results)):
        cells = {(way(r), r["steps"]): f"{r['frechet']:.4g}" for r in results if group(r) == (n, seed)}
        solvers, steps = list(dict.fromkeys(solver for solver, _ in cells)), sorted({steps for _, steps in cells})
        if len(solvers) > 1 and len(steps) > 1:
            rows = [[solver, *(cells.get((solver, k), "") for k in steps)] for solver in solvers]
            lines += [f"By evaluations, {n} samples from the same noises (seed {seed}):", ""]
            lines += [*table(["evaluations", *steps], rows), ""]
    return lines


def fid_lines(results) -> list[str]:
    """A table for each network, preprocessing and reference, one row a way of sampling."""
    group = lambda result: tuple(result[key] for key in ("distance", "weights_sha256", "preprocessing", "against"))
    lines = []
    for key in dict.fromkeys(map(group, results)):
        rows = sorted(
            (result for result in results if group(result) == key),
            key=lambda result: (result["num_samples"], result["solver"], result["steps"], result["seed"]),
        )
        distance, weights, preprocessing, against = key
        kernel, score = quality_names(rows[0])
        pairs = lambda row: [
            f"{row['kernel']:.6f} +- {row['kernel_std']:.6f}",
            *map("{:.4f}".format, (row["precision"], row["recall"])),
        ]
        lines += [
            f"{distance} of samples against {against}; weights {weights[:8]}, {preprocessing}. The floor is that of as "
            f"many test images, or of all where there are fewer. Score: {score}, +- its deviation over splits; "
            f"{kernel}: +- its deviation over subsets.",
            "",
            *by_evaluations(rows),
            *table(
                ["solver", "evaluations", "samples", "seed", distance, "floor", "score", kernel, "precision", "recall"],
                [
                    [
                        way(row),
                        row["steps"],
                        row["num_samples"],
                        row["seed"],
                        f"{row['frechet']:.4g}",
                        f"{row['floor']:.4g} ({row['floor_num_samples']})",
                        f"{row['inception_score']:.3f} +- {row['inception_score_std']:.3f}",
                        *(pairs(row) if "kernel" in row else ["", "", ""]),
                    ]
                    for row in rows
                ],
            ),
        ]
        for row in rows:
            if row["num_samples"] <= row["dimension"]:
                lines += too_few(row)
        lines.append("")
    return lines[:-1]


def latent_mse_lines(results) -> list[str]:
    """A table for each number of samples and way of bending, one row a solver."""
    group = lambda row: (row["num_samples"], row["seed"], *(row.get(key) for key in BENDING))
    lines = []
    for key in dict.fromkeys(map(group, results)):
        rows = [row for row in results if group(row) == key]
        n, fine, steps = rows[0]["num_samples"], rows[0]["reference"], sorted({row["steps"] for row in rows})
        said = lambda row: f"{row['mse']:.4g}" + (f" +- {row['standard_error']:.2g}" if row["standard_error"] else "")
        cells = {(way(row), row["steps"]): said(row) for row in rows}
        lines += [
            f"Mean squared distance to {fine['steps']} evaluations of DPM-Solver++ (order {fine['order']}, times "
            f"uniform) over the {rows[0]['dimension']} numbers of a latent and {n} samples, seed {key[1]}",
            "",
            *table(
                ["evaluations", *steps],
                [
                    [name, *(cells.get((name, k), "") for k in steps)]
                    for name in dict.fromkeys(name for name, _ in cells)
                ],
            ),
            "",
        ]
    return lines[:-1]


def ems_lines(result) -> list[str]:
    guidance = f", guidance {result['guidance_scale']:g}" if result["guidance_scale"] else ""
    guidance += f" by {result['guided_by']}" if result.get("guided_by") else ""
    return [
        f"EMS at {result['nodes'] + 1} nodes, of {result['num_data']} images of {result['data']}{guidance}",
        "",
        "![EMS](ems.png)",
    ]


# section: its heading and what makes its lines, in the order of a report
SECTIONS = {
    "samples": ("Samples", samples_lines),
    "training": ("Training", training_lines),
    "loss": ("Loss", loss_lines),
    "bpd": ("Likelihood", bpd_lines),
    "encoding": ("Encoding", encoding_lines),
    "fid": ("Quality of samples", fid_lines),
    "convergence": ("Convergence of solvers", convergence_lines),
    "latent_mse": ("Distance to the fine solution in latents", latent_mse_lines),
    "ems": ("Empirical model statistics", ems_lines),
}


def lines(metric: str, result: dict) -> list[str]:
    """What one result says."""
    if metric == "fid":
        return quality_lines(result)
    return SECTIONS[metric][1]([result] if metric in LISTS else result)


def render(report: dict) -> str:
    """The report to read; its pictures are beside it."""
    model = report["model"]
    lines = [f"# {model['workdir']} at step {model['step']} ({model['identity']})", ""]
    for name, (heading, section) in SECTIONS.items():
        if name in report:
            lines += [f"## {heading}", "", *section(report[name]), ""]
    if others := report.get("others"):
        lines += ["## Earlier, with other options", ""]
        for row in others:
            lines += [*SECTIONS[row["metric"]][1](row), ""]
    made = [
        (name, result)
        for name in SECTIONS
        for result in (report.get(name) if name in LISTS else [report.get(name)]) or []
        if result and "command" in result
    ]
    lines += ["## How", ""]
    lines += table(
        ["metric", "seconds", "command"], [[n, f"{r['seconds']:.1f}", f"`python {r['command']}`"] for n, r in made]
    )
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in result["versions"].items()) for _, result in made)
    return "\n".join([*lines, "", *versions, ""])


def headline(report: dict) -> dict[str, str]:
    """The figures of a report by name, for a table of several reports."""
    found = {}
    for name, what in (("loss", "test loss"), ("bpd", "bits/dim")):
        if name in report:
            found[what] = f"{report[name]['mean']:.5f} +- {report[name]['standard_error']:.5f}"
    if "encoding" in report:
        found["RMS there and back"] = f"{report['encoding']['rms']:.1e}"
    for row in report.get("fid", []):
        what = f"{row['distance']} of {row['num_samples']} by {way(row)} {row['steps']}"
        found[what] = f"{row['frechet']:.4g} (floor {row['floor']:.4g})"
    if "convergence" in report:
        study = report["convergence"]
        for name, values in list(study["rms"].items())[-1:]:
            found[f"RMS of {name} in {study['steps'][0]}"] = f"{values[0]:.4f}"
    return found


def compared(reports: dict[int, dict]) -> list[str]:
    """A table of several reports' figures, one row a step."""
    figures = {step: headline(report) for step, report in reports.items()}
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    return table(
        ["step", *names], [[step, *(found.get(name, "") for name in names)] for step, found in figures.items()]
    )
