"""Who may import whom, and what an import costs: the house's walls.

Read from the source (ast), so an import inside a function counts too; only `if TYPE_CHECKING:` does not, since it never runs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = [
    "torch",
    "vllm",
    "transformers",
    "datasets",
    "duckdb",
    "polars",
    "pyarrow",
    "pandas",
    "trl",
    "peft",
    "sklearn",
    "scipy",
    "openai",
]

# What a file may import besides the standard library: (files, the house's modules, other packages). The first line that fits a file rules it.
WITH_TRANSFORMERS = ["safetensors", "huggingface_hub", "tokenizers"]  # it cannot be installed without them
PASSES = ["rows", "errors", "recipe.bounds", "passes"]
MAY_IMPORT = [
    (["errors", "rows"], [], []),
    (["recipe.bounds"], ["errors"], []),
    (["recipe.objects"], ["errors"], []),
    (["scores", "scores.*"], ["scores", "errors", "recipe.objects"], ["numpy", "polars"]),
    (["passes.nearest"], ["rows"], ["numpy"]),
    (["passes.chat"], ["passes.thinking", "rows", "errors", "recipe.bounds"], ["transformers"]),
    (["passes.tokens"], ["passes", "rows", "errors"], ["numpy", "transformers"]),
    (
        ["measurements.grading", "measurements.grading_*"],
        ["rows", "errors", "recipe.objects", "measurements"],
        ["math_verify"],
    ),
    (["passes.sampling.vllm*"], PASSES, ["numpy", "torch", "transformers", "vllm"]),
    (["passes.sampling.openai*"], PASSES, ["numpy", "openai", "httpx"]),
    (["passes", "passes.*"], PASSES, ["numpy", "torch", "transformers", *WITH_TRANSFORMERS]),
    (
        ["measurements", "measurements.*"],
        [*PASSES, "measurements", "recipe.objects"],
        ["numpy", "torch", "transformers"],
    ),
    (["jobs.polca.decomposition"], PASSES, ["numpy"]),
    (["jobs.polca.clusters"], ["errors"], ["numpy", "sklearn"]),
]

# The rooms, from the ground up: nobody imports a higher one, not even for typing.
FLOORS = [
    "errors",
    "rows",
    "console",
    "recipe",
    "data",
    "passes",
    "measurements",
    "models",
    "scores",
    "store",
    "plan",
    "workflow",
    "report",
    "jobs",
    "cli",
]

# The only homes of a package, and the only importers of a step that knows all the others.
ONLY_IN = {
    "vllm": ["passes.sampling.vllm*"],
    "openai": ["passes.sampling.openai*"],
    "duckdb": ["store.*", "workflow.select_query"],
    "datasets": ["data", "data.*", "jobs.demo.*", "jobs.prove.*"],
    "trl": ["jobs.demo.*", "jobs.prove.*", "workflow.recorder"],
    "peft": ["jobs.demo.*", "jobs.prove.*", "passes.*"],
    "math_verify": ["measurements.grading_math"],
    "apscheduler": ["cli.schedule", "cli.cron"],
    "sklearn": ["jobs.polca.*"],
    "typer": ["cli.*"],
    "pandas": [],
    "curate.workflow.run": ["", "cli.*", "jobs.*"],
    "curate.cli.schedule": ["cli.*"],
    "curate.cli": ["__main__", "cli", "cli.*"],
    "pipelines": [],
    "tests": [],
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package: its dotted name without `curate.` ("" is the package itself) -> its file."""
    found = {}
    for file in sorted((REPOSITORY / "curate").rglob("*.py")):
        parts = file.relative_to(REPOSITORY / "curate").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one that can run: not the body of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running(other)
        else:
            yield child
            yield from running(child)


@cache
def imports(name: str, *, typing_too: bool = False) -> frozenset[str]:
    """The dotted modules that a module imports: `from a import b` is a.b where that is a module of the house, else a."""
    file = modules()[name]
    package = ["curate", *file.relative_to(REPOSITORY / "curate").parent.parts]
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if typing_too else running(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole.removeprefix("curate.") in modules() else source)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return frozenset(found)


def fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def inside(module: str) -> str | None:
    """An imported module without `curate.`, None for those of others."""
    head, _, rest = module.partition(".")
    return rest if head == "curate" else None


@pytest.mark.parametrize(
    ("files", "of_the_house", "packages"), MAY_IMPORT, ids=lambda value: ",".join(value) or "nothing"
)
def test_who_may_import_whom(files, of_the_house, packages):
    wrong = []
    for name in modules():
        if next((rule[0] for rule in MAY_IMPORT if fits(name, rule[0])), None) is not files:
            continue
        for module in sorted(imports(name)):
            top, ours = module.partition(".")[0], inside(module)
            if ours is not None:
                allowed = any(ours == part or ours.startswith(part + ".") for part in of_the_house)
            else:
                allowed = top in sys.stdlib_module_names or top in packages
            if not allowed:
                wrong.append(f"curate.{name} imports {module}")
    assert not wrong, wrong


def test_the_house_has_these_rooms():
    """`ls curate` reads as the line; a new room is a decision, taken here and in CONTRIBUTING.md."""
    found = {p.stem for p in (REPOSITORY / "curate").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} == set(FLOORS)
    tree = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [
        tree.find(f"| `{room}.py` |") + tree.find(f"| `{room}/` |") for room in FLOORS
    ]  # one of the two is not there: -1
    assert -2 not in places and places == sorted(places)


def test_nobody_imports_a_higher_room():
    wrong = []
    for name in modules():
        room = name.partition(".")[0]
        for module in sorted(imports(name, typing_too=True)) if room in FLOORS else ():
            other = (inside(module) or "").partition(".")[0]
            if other and (other not in FLOORS or FLOORS.index(other) > FLOORS.index(room)):
                wrong.append(f"curate.{name} imports {module}")
    assert not wrong, wrong


def test_imports_run_in_no_circle():
    """Between modules, imports for typing and late ones too."""
    left = {
        name: {inside(m) for m in imports(name, typing_too=True)} & modules().keys() - {name, ""} for name in modules()
    }
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    circle = []  # from any of those that are left: whoever only imports a circle is in none
    name = next(iter(left), "")
    while name and name not in circle:
        circle.append(name)
        name = next(iter(sorted(left[name] & left.keys())))
    assert not left, " -> ".join(circle[circle.index(name) :] + [name])


@pytest.mark.parametrize("package", ONLY_IN)
def test_what_has_one_home(package):
    wrong = [
        f"curate.{name} imports {module}"
        for name in modules()
        for module in imports(name)
        if (module == package or module.startswith(package + ".")) and not fits(name, ONLY_IN[package])
    ]
    assert not wrong, wrong


def test_the_rules_see_what_they_should(tmp_path):
    """The reader itself: nested, relative and late imports count, type-checking ones do not."""
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import duckdb
else:
    import polars
def late():
    from . import tables
    import vllm.engine
    import_module("trl")
"""
    tree = ast.parse(source)
    names = {alias.name for node in running(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"polars", "vllm.engine"}
    assert "curate.rows" in imports("recipe.schema")
    assert "curate.rows" in imports("passes.tokens")


def loaded_after(code: str) -> set[str]:
    """The top-level modules in sys.modules after `code` ran in a fresh interpreter."""
    report = "import sys, json; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


CALL = "import sys; sys.argv = ['curate', {arguments}]\nfrom curate.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e.code"


@pytest.mark.parametrize(
    "code",
    [
        "import curate; curate.__version__; dir(curate)",
        CALL.format(arguments="'--help'"),
        CALL.format(arguments="'--version'"),
        CALL.format(arguments="'run', '--help'"),
        CALL.format(arguments="'schedule', '--help'"),
        "import curate.cli.schedule, curate.recipe.schema, curate.errors, curate.rows",
    ],
    ids=["import curate", "--help", "--version", "run --help", "schedule --help", "recipe and schedule"],
)
def test_what_is_not_needed_yet_is_not_loaded(code):
    heavy = loaded_after(code) & set(HEAVY)
    assert not heavy


# A box with a GPU that has torch, transformers and numpy, and nothing else of ours.
BARE_BOX = """
import importlib, importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    names = set(json.loads(sys.argv[1]))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (this box has none)", name=name)

sys.meta_path.insert(0, Absent())
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name}: {error}")
print(sorted(set(sys.modules) & Absent.names))
"""
NOT_ON_A_BARE_BOX = [
    "vllm",
    "datasets",
    "duckdb",
    "polars",
    "pyarrow",
    "pandas",
    "trl",
    "peft",
    "openai",
    "math_verify",
    "pydantic",
    "apscheduler",
    "ray",
]


def test_passes_measurements_and_scores_run_where_only_torch_and_transformers_are():
    parts = ("passes", "measurements", "scores")
    wanted = [f"curate.{name}" for name in modules() if name.partition(".")[0] in parts]
    wanted += ["curate.passes.tokens", "curate.passes.chat", "curate.rows", "curate.errors"]
    command = [sys.executable, "-c", BARE_BOX, json.dumps(NOT_ON_A_BARE_BOX), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def committed() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in listing.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def test_no_file_knows_this_machine():
    """No absolute path of somebody's machine and no package registry's host, in any file that is committed."""
    never = [
        "/" + "work/",
        "/" + "root/",
        "/" + "opt/wheels",
        "/" + "opt/pypi",
        "/tmp/" + "build",
        "pypi." + "org",
        "python" + "hosted",
        "download.py" + "torch",
    ]
    never.append(str(Path.home()) + "/")
    wrong = []
    for file in committed():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{file.relative_to(REPOSITORY)}: {needle}" for needle in never if needle in text]
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["utils", "constants", "helpers", "common", "misc", "experimental"])
def test_what_must_not_exist(name):
    assert not [file for file in (REPOSITORY / "curate").rglob("*") if file.stem == name]
