"""The YAML head of a card, changed key by key: what a person wrote stays byte for byte, since YAML's readers do not agree on what it means.

`language: no` is Norwegian to its author and `false` to YAML 1.1; `version: 1.10` is no number. So the head is never read and written anew: its
nodes say where our keys stand in the text, and only those places are changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from curate.recipe.yaml import Shallow, check_size

HEAD = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
OURS = re.compile(r"data/[^/]+-\*\.(parquet|jsonl)")  # paths of an export's split


class NotYaml(ValueError):
    """A head that no change can be made to: it is not YAML, or no mapping."""


def split_head(text: str) -> tuple[str, str]:
    """(the head's YAML, the body). "" and the whole text where a card has no head."""
    head = HEAD.match(text)
    return (head[2], text[head.end() :]) if head else ("", text)


def merged_head(
    head: str,
    *,
    tags: Sequence[str],
    size: str,
    split: str,
    more: Mapping[str, Any] | None = None,
    end: str = "parquet",
) -> str:
    """The head with our tags among the person's, our size category, our split in the default configuration, and what of `more` has no value yet.

    `dataset_info` goes: it tells sizes and features of what was there before. NotYaml says where and why the head cannot be read.
    """
    root = _root(head)
    if root is not None and root.flow_style:  # {language: no}: a key on a line, so that ours can stand beside it
        head = "".join(f"{key.value}: {_serialized(value)}\n" for key, value in root.value)
    for key, value in (more or {}).items():
        head = _change(head, key, lambda text, node: text, f"{key}: {_flow(value)}\n")
    head = _change(head, "tags", lambda text, node: _with_tags(text, node, tags), _listed("tags", tags))
    head = _change(
        head, "size_categories", lambda text, node: _only(text, node, size), _listed("size_categories", [size])
    )
    path = f"data/{split}-*.{end}"
    ours = _configuration(split, path)
    head = _change(head, "configs", lambda text, node: _with_split(text, node, split, path), "configs:\n" + ours)
    head = _change(head, "dataset_info", lambda text, node: "", "")
    _root(head)
    return head


def _change(head: str, key: str, change: Callable[[str, yaml.Node], str], missing: str) -> str:
    """The head with one key's text changed; `missing` is added at the end where there is no such key. The text starts and ends with a line."""
    root = _root(head)
    for at, value in root.value if root else ():
        if at.value != key:
            continue
        start, end = at.start_mark.index, _end(head, value)
        if end <= start or any(isinstance(t, yaml.AliasToken | yaml.AnchorToken) for t in yaml.scan(head[start:end])):
            raise NotYaml(
                f"line {at.start_mark.line + 2}: `{key}` has an anchor or stands for one; write its value out"
            )
        own = _root(head[start:end])
        assert own is not None
        return head[:start] + change(head[start:end], own.value[0][1]) + head[end:]
    if head and missing and not head.endswith("\n"):
        head += "\n"
    return head + missing


def _root(text: str) -> yaml.MappingNode | None:
    """The nodes of a head; None of an empty one."""
    try:
        node = yaml.compose(text, Loader=Shallow)
        if node is not None:
            check_size(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 2}: " if mark else ""
        raise NotYaml(where + str(getattr(error, "problem", None) or error).splitlines()[0]) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise NotYaml("it holds no `key: value`")
    if node is not None and not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise NotYaml("a key is a list or a mapping")
    return node


def _end(text: str, node: yaml.Node) -> int:
    """Where the lines of a value end: after its last character and a comment on the same line, not after comments on lines of their own."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    at: int = node.end_mark.index
    if at and text[at - 1] == "\n":
        return at
    line = text.find("\n", at)
    return len(text) if line < 0 else line + 1


def _with_tags(text: str, node: yaml.Node, tags: Sequence[str]) -> str:
    """The key `tags` with those of `tags` that it lacks: after the last line of a block, before the bracket of a list in brackets."""
    if not isinstance(node, yaml.SequenceNode):
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith("null"):
            return _listed("tags", tags)
        if isinstance(node, yaml.ScalarNode) and node.style not in ("|", ">"):  # tags: medical
            written = text[node.start_mark.index : node.end_mark.index]
            return f"tags:\n- {written}\n" + _items([t for t in tags if t != node.value], "")
        return _listed("tags", tags)
    missing = [tag for tag in tags if all(tag != item.value for item in node.value)]
    if not missing:
        return text
    if node.flow_style:
        at = text.rindex("]", 0, node.end_mark.index)
        before = text[:at].rstrip()
        sign = " " if before.endswith(",") else ", " if node.value else ""
        return before + sign + ", ".join(missing) + text[at:]
    indent = " " * node.value[0].start_mark.column
    return _whole(text) + _items(missing, indent[: _dash(text, node.value[0])])


def _only(text: str, node: yaml.Node, size: str) -> str:
    """The key `size_categories` as it is where it says this size and no other."""
    values = [item.value for item in node.value] if isinstance(node, yaml.SequenceNode) else [node.value]
    return text if values == [size] else _listed("size_categories", [size])


def _with_split(text: str, node: yaml.Node, split: str, path: str) -> str:
    """The key `configs` with our split in the configuration `default`; its other configurations, splits and keys stay as they are."""
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        return "configs:\n" + _configuration(split, path)
    if node.flow_style or not all(isinstance(item, yaml.MappingNode) for item in node.value):
        return (
            "configs:\n"
            + _configuration(split, path)
            + "".join(
                f"- {_serialized(item)}\n"
                for item in node.value
                if _value(item, "config_name") not in (None, "default")
            )
        )
    dash = " " * _dash(text, node.value[0])
    default = next((item for item in node.value if _value(item, "config_name") in (None, "default")), None)
    if default is None:
        return _whole(text) + _configuration(split, path, dash)
    if _is_ours(default, split, path):
        return text
    start = text.rindex("-", 0, default.start_mark.index) - len(dash)
    end = _end(text, default)
    return text[:start] + _configuration(split, path, dash, default) + text[end:]


def _is_ours(config: yaml.Node, split: str, path: str) -> bool:
    """Whether a configuration has our split, and no other of an export."""
    files = _files(config)
    listed = [(_value(f, "split"), _value(f, "path")) for f in files]
    return [(s, p) for s, p in listed if p and OURS.fullmatch(p)] == [(split, path)]


def _configuration(split: str, path: str, dash: str = "", default: yaml.Node | None = None) -> str:
    """Our configuration as text; of the one before, its keys and the splits that are no export's come along."""
    lines = [f"{dash}- config_name: default"]
    for key, value in default.value if isinstance(default, yaml.MappingNode) else ():
        if key.value not in ("config_name", "data_files"):
            lines.append(f"{dash}  {key.value}: {_serialized(value)}")
    lines += [f"{dash}  data_files:", f"{dash}  - split: {split}", f"{dash}    path: {path}"]
    for one in _files(default):
        if _value(one, "split") != split and not OURS.fullmatch(_value(one, "path") or ""):
            lines.append(f"{dash}  - {_serialized(one)}")
    return "\n".join(lines) + "\n"


def _files(config: yaml.Node | None) -> list[yaml.Node]:
    """The entries of `data_files`, where they are a list of {split, path}."""
    pairs = config.value if isinstance(config, yaml.MappingNode) else ()
    files = next((value for key, value in pairs if key.value == "data_files"), None)
    listed = files.value if isinstance(files, yaml.SequenceNode) else []
    return [one for one in listed if isinstance(one, yaml.MappingNode)]


def _value(node: yaml.Node, key: str) -> str | None:
    """A mapping's text under a key, as it is written."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    first = next((value for at, value in pairs if at.value == key), None)
    return first.value if isinstance(first, yaml.ScalarNode) else None


def _serialized(node: yaml.Node) -> str:
    """A node on one line; its scalars and their quotes stay as they are."""
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True
        parts = [
            _serialized(v) if not isinstance(v, tuple) else f"{_serialized(v[0])}: {_serialized(v[1])}"
            for v in node.value
        ]
        inside = ", ".join(parts)
        return f"{{{inside}}}" if isinstance(node, yaml.MappingNode) else f"[{inside}]"
    text = str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.style in ('"', "'", "|", ">"):
        return json.dumps(text, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[\[\]{},]|: | #", text) else text


def _dash(text: str, item: yaml.Node) -> int:
    """The column of the dash before an item of a block list."""
    at = text.rindex("-", 0, item.start_mark.index)
    return at - (text.rfind("\n", 0, at) + 1)


def _whole(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _items(items: Sequence[str], indent: str) -> str:
    return "".join(f"{indent}- {item}\n" for item in items)


def _listed(key: str, items: Sequence[str]) -> str:
    return f"{key}:\n{_items(items, '')}"


def _flow(value: Any) -> str:
    """A value on one line, quoted where YAML 1.1 would read something else."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
