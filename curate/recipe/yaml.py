"""A recipe's YAML, read as its writer means it: `no` is text, `1e-6` a number, a name keeps its zeros.

PyYAML reads YAML 1.1, where `no` and `on` are booleans, `012` is ten, `12:30` is 750, `1e-6` is text, and of two keys of one name the last one
counts without a word. Here, as in YAML 1.2, `true` and `false` alone are booleans, dates and times are text, and every key is text as it is
written. A value that is a number where the recipe wants text (`split: 1.10`) is taken as written: `read_yaml` tells the words, too.

A few lines of YAML can stand for more than a memory holds (an alias of aliases of aliases), or for nothing that ends (an alias inside what it
names): a recipe is of at most VALUES values, DEPTH deep, and its tags are those of JSON's kinds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from curate.errors import UsageError
from curate.recipe.bounds import DEPTH

Path = tuple[Any, ...]
NUMBER = re.compile(
    r"(?P<int>[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+)|"
    r"(?P<float>[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
PLAIN = "!plain"
VALUES = 100_000  # an alias counts as what it stands for
TAGS = {
    PLAIN,
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")),
}
WORDS = {"null": None, "true": True, "false": False}


class Shallow(yaml.SafeLoader):
    """SafeLoader, of nodes that are not too deep in each other."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The parser goes into itself with every list in a list: it is stopped before Python does."""
        self.depth += 1
        if self.depth > DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"lists and mappings stand more than {DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Loader(Shallow):
    """With YAML 1.2's scalars."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """What a value's own reader finds wrong (`!!int x`, a number of thousands of digits) is wrong YAML."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            shown = f"{node.value[:40]!r}" if isinstance(node.value, str) else "this"
            kind = "a number" if node.tag == PLAIN else node.tag.rpartition(":")[2]
            message = f"{shown} cannot be read as {kind} ({str(error).partition(';')[0][:80]})"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Scalars without quotes or a tag of their own are told apart in `plain`."""
        if kind is yaml.ScalarNode and implicit[0]:
            return PLAIN
        return super().resolve(kind, value, implicit)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """`<<: *base` stands for the keys of base. A key that stands twice is an error."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a word, not a list or a mapping", key.start_mark
                )
            if key.value in seen and key.value != "<<":
                first = seen[key.value]
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key.value!r} stands twice, in lines {first} and {line}; only one of them can count",
                    key.start_mark,
                )
            seen[key.value] = line
            key.tag = "tag:yaml.org,2002:" + ("merge" if key.value == "<<" and key.tag == PLAIN else "str")
        super().flatten_mapping(node)


Loader.add_constructor(PLAIN, lambda loader, node: plain_scalar(node.value))


def plain_scalar(text: str) -> Any:
    """What a scalar without quotes means."""
    if text.lower() in WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return WORDS[text.lower()]
    if text in ("", "~"):
        return None
    number = NUMBER.fullmatch(text)
    if number is None or (number["float"] and re.match(r"[-+]?0[0-9]", text)):  # 012, 00.5: a name
        return text
    bare = text.replace("_", "")
    if number["int"]:
        return int(bare, 0)
    return float(bare.lower().replace(".inf", "inf").replace(".nan", "nan"))


def compose(text: str) -> yaml.Node | None:
    """The nodes of a text, within bounds; None of an empty one. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    if node is not None:
        check_tags(node, set())
        check_size(node)
    return node


def check_tags(node: yaml.Node, seen: set[int]) -> None:
    """Raises yaml.YAMLError for a tag that is none of JSON's kinds."""
    if node.tag not in TAGS:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _wrong(node, f"the tag {shown} is not taken here; write the value without it")
    if isinstance(node, yaml.CollectionNode) and id(node) not in seen:
        seen.add(id(node))
        for part in _parts(node):
            check_tags(part, seen)


def check_size(node: yaml.Node) -> None:
    """Raises yaml.YAMLError where a node stands for too many values, for values too deep in each other, or in itself."""
    _measure(node, {}, set())


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they stand, looked at once a node. Raises yaml.YAMLError where either is too much."""
    if id(node) in above:
        raise _wrong(node, "an alias stands inside of what it is an alias of")
    if id(node) not in known:
        above.add(id(node))
        inside = [_measure(part, known, above) for part in _parts(node)]
        above.discard(id(node))
        values, depth = 1 + sum(n for n, _ in inside), 1 + max((d for _, d in inside), default=0)
        if values > VALUES:
            raise _wrong(node, f"{values:,} values, its aliases written out: no recipe has more than {VALUES:,}")
        if depth > DEPTH:
            raise _wrong(node, f"lists and mappings stand more than {DEPTH} deep, its aliases written out")
        known[id(node)] = values, depth
    return known[id(node)]


def _wrong(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def read_yaml(text: str) -> tuple[Any, dict[Path, str]]:
    """(the value, (key, key, …) -> the words of every number, boolean and null in it). Raises yaml.YAMLError."""
    node = compose(text)
    if node is None:
        return None, {}
    loader = Loader("")
    try:
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    return value, dict(_written(node, ()))


def _written(node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _written(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _written(value, (*path, i))
    elif node.tag == PLAIN and not isinstance(plain_scalar(node.value), str):
        yield path, node.value


def as_written(raw: Any, place: Path, written: dict[Path, str]) -> bool:
    """Put the words into `raw` for the number or boolean that stands at a place. False where it was not written without quotes.

    place: as pydantic names it, with the names of union members in it, which are no keys.
    """
    path: Path = ()
    here = above = raw
    for part in place:
        inside = (
            part in here
            if isinstance(here, dict)
            else isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if inside:
            path, above, here = (*path, part), here, here[part]
    if path not in written:
        return False
    above[path[-1]] = written.pop(path)
    return True


def is_text_wanted(error: Any) -> bool:
    """Whether pydantic wanted text and found a number or a boolean."""
    return error["type"] == "string_type" and isinstance(error["input"], int | float)


def overriding(entry: str) -> tuple[str, Any, dict[Path, str]]:
    """key, value, and the words of the numbers in it, of a `--set key=value`. A value that is no YAML, or a mapping by accident, is text."""
    key, sign, value = entry.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {entry}: expected key=value, such as --set select.keep.share=0.5.")
    try:
        values, written = read_yaml(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {entry}: {value!r} is not a YAML value; quote it.") from None
    return key.strip(), values, written
