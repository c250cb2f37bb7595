"""Imports run one way, and flags and configs stay where values are made of them: read from the sources, by ast."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Each imports itself and those before it; the programs are everything else at the root, and tools/.
ORDER = ("score_sde", "ems", "solvers", "experiments", "programs")
DOOR = "ems.__main__"  # the one that opens upward
SHARED = "experiments.program"  # the one place of the flags that every program has, read by mains through it
ASIDE = ("benchmarks", "tests", "docs")  # they import anything, and nothing of ORDER imports them


def sources() -> dict[str, str]:
    """Every module by its dotted name."""
    paths = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "runs"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}


def imports(source: str) -> set[str]:
    """Dotted names that a module imports anywhere in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder(module: str, modules) -> str | None:
    """The member of ORDER that a module belongs to, "configs", a member of ASIDE, or None for a stranger's."""
    top = module.partition(".")[0]
    if top in (*ORDER, *ASIDE, "configs"):
        return top
    return "programs" if top == "tools" or module in modules else None


def wrong(modules: dict[str, str]) -> list[str]:
    """What runs against the order, in words."""
    found = []
    graph = {name: sorted(imports(source)) for name, source in modules.items()}
    for name, imported in graph.items():
        ours = folder(name, modules)
        if ours in ASIDE:
            continue
        for other in imported:
            theirs = folder(other, modules)
            if theirs in ASIDE or (theirs == "configs" and ours not in ("configs", "experiments")):
                found.append(f"{name} imports {other}")
            if ours == "configs" and theirs not in ("configs", None):
                found.append(f"{name} imports {other}")
            upward = ours in ORDER and theirs in ORDER and ORDER.index(theirs) > ORDER.index(ours)
            if upward and not (name == DOOR and theirs == "experiments"):
                found.append(f"{name} imports {other}, which stands above it")
            if re.match(r"absl\.flags|absl\.app", other) and ours in ORDER[:4] and name not in (DOOR, SHARED):
                found.append(f"{name} imports {other}: flags are the programs'")
            if other.startswith("ml_collections") and ours not in ("configs", "experiments"):
                found.append(f"{name} imports {other}: configs end in experiments/")
            if ours == "solvers" and theirs == "ems" and name != "solvers.dpm_solver_v3":
                found.append(f"{name} imports {other}: of the solvers, DPM-Solver-v3 alone knows EMS")
        found += [f"{name} reads a flag below main: {line}" for line in below_main(modules[name])]
    # of `from package import module` the package itself is no edge inside it
    within = lambda name, other: f"{name}.".startswith(f"{other}.")
    return found + circles({n: [o for o in graph[n] if o in modules and not within(n, o)] for n in modules})


def below_main(source: str) -> list[str]:
    """Where a module's flag, `X = ...DEFINE_...` or `X = ...config_flag()`, is named in another function than main."""
    tree, flags = ast.parse(source), set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if ".DEFINE_" in called or called.endswith("config_flag"):
                flags |= {target.id for target in node.targets}
    others = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    inner = [node for other in others for node in ast.walk(other)]
    reads = [node for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return [f"{node.id} in line {node.lineno}" for node in reads if node.id in flags]


def circles(graph: dict[str, list[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    found, done = [], set()

    def follow(name: str, path: tuple[str, ...]):
        if name in path:
            found.append("a circle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in graph[name]:
                follow(other, (*path, name))
            done.add(name)

    for name in graph:
        follow(name, ())
    return found


FLAG = "from absl import flags\nX = flags.DEFINE_bool('x', False, '')\n"


def test_imports_run_one_way():
    assert wrong(sources()) == []


@pytest.mark.parametrize(
    "name, source, what",
    [
        ("score_sde.bad", "import ems.statistics", "score_sde.bad imports ems.statistics, which stands above it"),
        ("ems.bad", "def f():\n    from solvers import tableau", "ems.bad imports solvers, which stands above it"),
        ("solvers.bad", "from experiments import runs", "solvers.bad imports experiments, which stands above it"),
        ("solvers.bad", "from ems.statistics import EMS", "solvers.bad imports ems.statistics: of the solvers"),
        ("experiments.bad", "import sample", "experiments.bad imports sample, which stands above it"),
        ("experiments.bad", "from tools import pack", "experiments.bad imports tools, which stands above it"),
        ("solvers.bad", "from absl import flags", "solvers.bad imports absl.flags: flags are the programs'"),
        ("experiments.bad", "from absl import flags", "experiments.bad imports absl.flags: flags are the programs'"),
        ("ems.bad", "from ml_collections import ConfigDict", "ems.bad imports ml_collections: configs end"),
        ("tools.bad", "from configs import base", "tools.bad imports configs"),
        ("tools.bad", FLAG + "def f():\n    return X.value", "tools.bad reads a flag below main: X in line 4"),
        ("score_sde.bad", "from configs import base", "score_sde.bad imports configs"),
        ("configs.bad", "from score_sde import sde", "configs.bad imports score_sde"),
        ("experiments.bad", "from tests import programs", "experiments.bad imports tests"),
    ],
)
def test_the_checker_sees(name, source, what):
    assert any(line.startswith(what) for line in wrong(sources() | {name: source}))


def test_the_checker_sees_a_circle_of_two():
    pair = {"score_sde.one": "from score_sde import two", "score_sde.two": "def f():\n    import score_sde.one"}
    assert wrong(pair) == ["a circle: score_sde.one -> score_sde.two -> score_sde.one"]
