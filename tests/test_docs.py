"""What the README and docs/ say is so: recipes load, Python works, commands and options exist, links lead somewhere, references are up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    str(file.relative_to(REPOSITORY)): file.read_text()
    for file in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
REFERENCES = ("docs/cli.md", "docs/recipe.md")


def blocks(language: str) -> list:
    """Every fenced block of a language, with its page and number as the test's name."""
    return [
        pytest.param(page, block, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M))
    ]


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_every_recipe_is_one(page, block, tmp_path):
    """A block with a `kind` is a whole recipe; one without is sections of one, under either kind."""
    from curate.errors import UsageError
    from curate.recipe.load import load_recipe

    recipe = tmp_path / "recipe.yaml"
    if re.search(r"^kind:", block, re.M):
        recipe.write_text(block)
        assert load_recipe(recipe).recipe.kind
        return
    problems = []
    for kind in ("preference", "sft"):
        recipe.write_text(f"kind: {kind}\n{block}")
        try:
            load_recipe(recipe)
            return
        except UsageError as error:
            problems.append(str(error))
    pytest.fail(f"{page}: {problems}")


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_every_snippet_is_python_and_names_what_exists(page, block):
    import ast
    from importlib import import_module

    import curate

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "curate":
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "curate":
            assert node.attr in dir(curate)


def test_the_score_of_ones_own_works(tmp_path):
    import numpy as np

    from curate.scores import resolve

    (block,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGES["docs/own-score.md"], re.S) if "@score" in block
    ]
    (tmp_path / "novelty_of_the_docs.py").write_text(block)
    found = resolve("novelty_of_the_docs:surprise", folder=tmp_path)
    assert found.worst == "high"
    got = found.function(np.array([-6.0, -2.0, np.nan]), np.array([3.0, 4.0, 2.0]), floor=1.0)
    np.testing.assert_equal(got, [2.0, 1.0, np.nan])


def commands() -> dict:
    import typer.main

    from curate.cli import app

    return typer.main.get_command(app).commands


def called() -> list[tuple[str, str]]:
    """(page, line) of every `curate ...` in a console block or in inline code."""
    found = []
    for page, text in PAGES.items():
        if page in REFERENCES:
            continue
        for block in re.findall(r"^```(?:console|bash|sh|text)?\n(.*?)^```", text, re.S | re.M):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [(page, m[1]) for line in lines for m in re.finditer(r"(?:^\$ |&& )(curate .*?)(?= && |$)", line)]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        found += [(page, code) for code in re.findall(r"`(curate [^`\n]+)`", prose)]
    return found


@pytest.mark.parametrize(("page", "line"), called())
def test_every_command_line_names_a_command_and_its_options(page, line):
    words = shlex.split(line, comments=True)
    name = words[1]
    if name.startswith("-"):
        return
    assert name in commands(), f"{page}: {line}"
    options = {o for p in commands()[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    used = {word.partition("=")[0] for word in words[2:] if re.match(r"-{1,2}[a-z]", word)}
    assert used <= options, f"{page}: {line}"


def test_every_command_is_documented():
    assert set(commands()) == set(re.findall(r"^## `curate ([a-z]+)", PAGES["docs/cli.md"], re.M))


@pytest.mark.parametrize("page", REFERENCES)
def test_the_references_say_what_the_code_says(page, tmp_path):
    """`python scripts/write_reference.py` writes both."""
    code = "import sys; sys.path.insert(0, 'scripts'); import write_reference as w; sys.stdout.write(getattr(w, sys.argv[1])())"
    done = subprocess.run([sys.executable, "-c", code, Path(page).stem], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGES[page], "run `python scripts/write_reference.py`"


@pytest.mark.parametrize(
    ("page", "path"),
    sorted({(page, path) for page, text in PAGES.items() for path in re.findall(r"\]\(([^):]+)\)", text)}),
)
def test_every_link_leads_somewhere(page, path):
    if not path.startswith("#"):
        assert (REPOSITORY / page).parent.joinpath(path.partition("#")[0]).exists()


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 7000


def test_every_key_of_a_recipe_says_what_it_is():
    assert not re.findall(r"^\|.*\|\s*\|$", PAGES["docs/recipe.md"].replace("| key | takes | default | |", ""), re.M)
