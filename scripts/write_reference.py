"""Writes docs/cli.md and docs/recipe.md from what the code says of itself: `python scripts/write_reference.py`. A test holds both up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

GLOBAL = """Exit codes: 0 done, 1 failed, 2 wrong use or recipe, 130 stopped (143 by SIGTERM). Results go to stdout, progress and notes to stderr;
`--json` prints for machines, `--quiet` leaves progress and notes out. `--set select.keep.share=0.5` puts a value over the recipe's."""


def cli() -> str:
    """Every command with its arguments and options."""
    import typer.main

    from curate.cli import app

    parts = ["# Commands", GLOBAL]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        given = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([f"curate {name}", *((p.metavar or p.name.upper()) for p in given)])
        lines = [f"## `{usage}`", " ".join((command.help or "").split())]
        rows = [(f"`{(p.metavar or p.name.upper())}`", p.help or "") for p in given]
        for option in options:
            names = ", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts))
            rows.append((names, " ".join((option.help or "").split())))
        table = ["| | |", "| --- | --- |", *(f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in rows)]
        parts += [*lines, "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def recipe() -> str:
    """Every key of the recipe, section by section."""
    schema = json.loads((REPOSITORY / "curate" / "recipe" / "recipe.schema.json").read_text())
    known = schema["$defs"]
    parts = [
        "# The recipe, key by key",
        "A recipe is YAML. An unknown key, a misspelt score or a bad type is an error that names the key and the nearest right one. "
        "Paths are relative to the recipe's folder. `curate init preference` writes a commented one; `curate init --schema` prints the "
        "JSON schema for editors.",
        _table(schema["properties"], schema.get("required", []), known),
    ]
    done: set[str] = set()
    for key, entry in schema["properties"].items():
        for name in _names(entry):
            if name in done or known[name].get("type") != "object":
                continue
            done.add(name)
            parts += [
                f"## `{key}`",
                known[name].get("description", ""),
                _table(known[name]["properties"], known[name].get("required", []), known),
            ]
            for inner, below in known[name]["properties"].items():
                for nested in _names(below):
                    if nested not in done and known[nested].get("type") == "object":
                        done.add(nested)
                        parts += [
                            f"### `{key}.{inner}`",
                            known[nested].get("description", ""),
                            _table(known[nested]["properties"], known[nested].get("required", []), known),
                        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _names(entry: Any) -> list[str]:
    """The definitions that an entry refers to, in its order."""
    if isinstance(entry, dict):
        own = [entry["$ref"].rpartition("/")[2]] if "$ref" in entry else []
        return own + [name for value in entry.values() for name in _names(value)]
    if isinstance(entry, list):
        return [name for value in entry for name in _names(value)]
    return []


def _table(properties: dict[str, Any], required: list[str], known: dict[str, Any]) -> str:
    lines = ["| key | takes | default | |", "| --- | --- | --- | --- |"]
    for key, entry in properties.items():
        default = (
            "required"
            if key in required
            else f"`{json.dumps(entry['default'], ensure_ascii=False)}`"
            if "default" in entry
            else ""
        )
        if (names := _names(entry)) and known[names[0]].get("type") == "object" and len(default) > 8:
            default = ""  # its own table has them
        text = entry.get("description") or (known[names[0]].get("description", "") if names else "")
        text = text.split("\n\n")[0].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key}` | {_takes(entry, known)} | {default} | {text} |")
    return "\n".join(lines)


def _takes(entry: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return "a section" if known[name].get("type") == "object" else _takes(known[name], known)
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_takes(one, known) for one in entry["anyOf"]))
    kind = entry.get("type", "anything")
    if kind == "array":
        return f"a list ({_takes(entry.get('items', {}), known)})"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = "".join(f" {sign} {entry[word]}" for word, sign in limits.items() if word in entry)
    words = {
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "object": "a mapping",
        "null": "null",
    }
    return words.get(kind, str(kind)) + bounds


if __name__ == "__main__":
    (REPOSITORY / "docs" / "cli.md").write_text(cli(), encoding="utf-8")
    (REPOSITORY / "docs" / "recipe.md").write_text(recipe(), encoding="utf-8")
