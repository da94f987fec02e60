"""A recipe file read: its YAML, what the command line puts over it, and the models of schema.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from curate.errors import CurateError, UsageError, did_you_mean
from curate.recipe.bounds import WHOLE, read_text
from curate.recipe.doors import without_login
from curate.recipe.errors import explained, lines_of, shown_value
from curate.recipe.schema import Recipe
from curate.recipe.yaml import as_written, compose, is_text_wanted, overriding, read_yaml

KEYS = re.compile(r"([a-z_]+(?:\.[\w-]+)+)[:,] ")  # `select.where: ` at the beginning of a message
START = "Start one with `curate init preference recipe.yaml`."


class Loaded:
    """A recipe with where it came from, and the formats of its rows, where a command has opened them.

    recipe: the checked model. text: the YAML after `--set`, as it is kept in the store. name: the file's stem. folder: what relative
    paths are relative to. store: the store's folder.
    """

    def __init__(
        self,
        recipe: Recipe,
        raw: dict[str, Any],
        path: Path | None,
        store: str | Path | None = None,
        lines: Mapping[tuple[Any, ...], int] | None = None,
    ):
        raw = without_login(raw)
        self.lines = lines or {}  # (key, key, …) -> line of the file; keys that --set gave have none
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

    @contextmanager
    def placed(self) -> Iterator[None]:
        """An error that begins with a key of this recipe says its file and line, too."""
        try:
            yield
        except CurateError as error:
            error.args = (self._placed(str(error)), *error.args[1:])
            raise

    def place(self, *key: Any) -> str:
        """`recipe.yaml, line 7` of a key, as far as it is known."""
        line = self.lines.get(key)
        return f"{self.path or 'recipe'}{f', line {line}' if line else ''}"

    def _placed(self, message: str) -> str:
        named = KEYS.match(message)
        key = tuple(named[1].split(".")) if named else ()
        if self.path is None or key[:1] not in self.lines or message.startswith(str(self.path)):
            return message
        known = next((key[:n] for n in range(len(key), 1, -1) if key[:n] in self.lines), ())
        return f"{self.place(*known)}: {message}"


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
            raise UsageError(f"{path} is a folder, expected a recipe (YAML). {START}")
        try:
            text = read_text(file)
        except OSError as error:
            hint = did_you_mean(
                file.name,
                [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else [],
                START,
                sentence=True,
                show=lambda near: str(file.with_name(near)),
            )
            raise UsageError(f"{path}: cannot read this recipe ({error.strerror}). {hint}") from None
        except ValueError as error:
            raise UsageError(f"{path}: {error}; a recipe is a short YAML file. {START}") from None
        try:
            raw, written = read_yaml(text)
            lines = lines_of(compose(text))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
        if not isinstance(raw, dict):
            start = f" {START}" if raw is None else ""
            raise UsageError(
                f"{path}: a recipe is a mapping with `kind: preference` or `kind: sft`; found {shown_value(raw)}.{start}"
            )
    for key, value, words in _overrides(set):
        at = _put(raw, key, value)
        written = {p: w for p, w in written.items() if p[: len(at)] != at} | {(*at, *p): w for p, w in words.items()}
        lines = {p: line for p, line in lines.items() if p[: len(at)] != at}
    while True:
        try:
            recipe = Recipe.model_validate(raw)
            _check_numbers(recipe.model_dump(), (), lines, str(path) if file else "recipe")
            return Loaded(recipe, raw, file, store, lines)
        except ValidationError as error:
            texts = [tuple(e["loc"]) for e in error.errors() if is_text_wanted(e)]
            mended = [as_written(raw, at, written) for at in texts]  # split: 1.10 is a name, as it is written
            if not any(mended):
                raise UsageError(explained(error, Recipe, lines, str(path) if file else "recipe")) from None


def _check_numbers(value: Any, at: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int], file: str) -> None:
    """UsageError for a whole number that no library takes: of more than 64 bits."""
    if isinstance(value, int) and not -WHOLE <= value < WHOLE:
        where = f"{file}, line {lines[at]}" if at in lines else file
        raise UsageError(
            f"{where}: {'.'.join(map(str, at))}: a whole number of {len(str(abs(value)))} digits, wanted at most 18."
        )
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        _check_numbers(part, (*at, key), lines, file)


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
            raise UsageError(f"--set {dotted}: {'.'.join(path[:i])} is {shown_value(here)}, it has no key {key!r}.")
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
    raise UsageError(f"--set {dotted}: {'.'.join(path)} is {shown_value(here)}, it has no key {last!r}.")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list | tuple) else value
