"""A recipe file read: its YAML, what the command line puts over it, and the models of schema.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from curate.errors import UsageError, did_you_mean
from curate.recipe.doors import without_login
from curate.recipe.errors import explained, found, lines_of
from curate.recipe.schema import Recipe
from curate.recipe.yaml import as_written, is_text_wanted, overriding, read_yaml


class Loaded:
    """A recipe with where it came from, and the formats of its rows, where a command has opened them.

    recipe: the checked model. text: the YAML after `--set`, as it is kept in the store. name: the file's stem. folder: what relative
    paths are relative to. store: the store's folder.
    """

    def __init__(self, recipe: Recipe, raw: dict[str, Any], path: Path | None, store: str | Path | None = None):
        raw = without_login(raw)
        self.recipe, self.raw = recipe, raw
        self.name = path.stem if path else "recipe"
        self.folder = path.resolve().parent if path else Path.cwd()
        self.path = path
        self.text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
        self.store = Path(store) if store else self.folder / (recipe.store or "store")
        self.formats: Callable[[], set[str]] | None = None  # of the rows to select from, once they are opened

    def resolve(self, path: str) -> Path:
        """A path of the recipe, from where the recipe stands."""
        return self.folder / Path(path).expanduser()


def load_recipe(
    path: str | Path | dict[str, Any], *, set: dict[str, Any] | list[str] | None = None, store: str | Path | None = None
) -> Loaded:
    """Read and check a recipe. `set` overrides keys: {"select.keep.share": 0.5} or ["select.keep.share=0.5"].

    Raises UsageError naming file, line, key and the nearest right key.
    """
    lines: dict[tuple[Any, ...], int] = {}
    written: dict[tuple[Any, ...], str] = {}
    if isinstance(path, dict):
        file, raw = None, _copy(path)
    else:
        file = Path(path)
        if file.is_dir():
            raise UsageError(
                f"{path} is a folder, expected a recipe (YAML). Start one with `curate init preference recipe.yaml`."
            )
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            hint = did_you_mean(
                file.name,
                [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else [],
                "Start one with `curate init preference recipe.yaml`.",
                sentence=True,
                show=lambda near: str(file.with_name(near)),
            )
            raise UsageError(f"{path}: cannot read this recipe ({error.strerror}). {hint}") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); a recipe is a YAML file."
            ) from None
        try:
            raw, written = read_yaml(text)
            lines = lines_of(yaml.compose(text))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
        if not isinstance(raw, dict):
            raise UsageError(
                f"{path}: a recipe is a mapping with `kind: preference` or `kind: sft`; found {found(raw)}."
            )
    for key, value, words in _overrides(set):
        at = _put(raw, key, value)
        written = {p: w for p, w in written.items() if p[: len(at)] != at} | {(*at, *p): w for p, w in words.items()}
    while True:
        try:
            return Loaded(Recipe.model_validate(raw), raw, file, store)
        except ValidationError as error:
            texts = [tuple(e["loc"]) for e in error.errors() if is_text_wanted(e)]
            mended = [as_written(raw, at, written) for at in texts]  # split: 1.10 is a name, as it is written
            if not any(mended):
                raise UsageError(explained(error, Recipe, lines, str(path) if file else "recipe")) from None


def _overrides(given: dict[str, Any] | list[str] | None) -> list[tuple[str, Any, dict[Any, str]]]:
    """key, value, and the words of the numbers in it as they were typed."""
    if not given:
        return []
    return [(k, v, {}) for k, v in given.items()] if isinstance(given, dict) else [overriding(entry) for entry in given]


def _put(raw: dict[str, Any], dotted: str, value: Any) -> tuple[Any, ...]:
    """Set raw[a][b][c] for the key a.b.c; a number is an index into a list. Returns the path."""
    *path, last = dotted.split(".")
    here: Any = raw
    at: list[Any] = []
    for i, key in enumerate(path):
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            here = here[int(key)]
            at.append(int(key))
            continue
        if not isinstance(here, dict):
            raise UsageError(f"--set {dotted}: {'.'.join(path[:i])} is {found(here)}, it has no key {key!r}.")
        if key in ("source", "heldout") and isinstance(here.get(key), str | list):
            here[key] = {"path": here[key]}
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        at.append(key)
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
        return (*at, int(last))
    if isinstance(here, dict):
        here[last] = value
        return (*at, last)
    raise UsageError(f"--set {dotted}: {'.'.join(path)} is {found(here)}, it has no key {last!r}.")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list | tuple) else value
