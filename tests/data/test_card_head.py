"""The card's head: what a person wrote stays byte for byte, whatever YAML 1.1 would read in it; only our own keys change."""

from __future__ import annotations

import pytest
import yaml

from curate.data import Card, ExportRow, export
from curate.data.card import BEGIN, END, card_text
from curate.data.card_head import NotYaml, merged_head
from curate.errors import ValidationError
from curate.rows import Example

SPLIT = "- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
OURS = "tags:\n- curate\n- trl\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT

WRITTEN = (
    """\
# Mein Datensatz
language: [no, nn]   # Norwegian
version: 1.10
code: 012
big: 1_000
born: 2026-01-01
at: 12:30
nothing: ~
also: Null
answers: {on: yes, off: no}
quotes: 'it''s'
double: "tab\\there"
long: """
    + "word " * 60
    + """
block: |
  no
    kept

folded: >-
  a
  b
base: &base {a: 1}
again: *base
pretty_name: Ærlig 🦆

zebra: 1
alpha: 2
"""
)


def merged(head, **more):
    return merged_head(head, tags=["curate", "trl"], size="n<1K", split="train", **more)


def test_what_a_person_wrote_stays_byte_for_byte():
    once = merged(WRITTEN)
    assert once == WRITTEN + OURS
    assert merged(once) == once
    assert merged("") == OURS


#    (the person's head, the head afterwards)
CHANGED = [
    # tags: after the last one, as they are listed there
    ("tags:\n  - no\n  - 1.10  # mine\n\n# about the next\nlicense: mit\n",
     "tags:\n  - no\n  - 1.10  # mine\n  - curate\n  - trl\n\n# about the next\nlicense: mit\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    ("tags: [no, trl]  # mine\n", "tags: [no, trl, curate]  # mine\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    ("tags: [\n  no,\n  on,\n]\n", "tags: [\n  no,\n  on, curate, trl]\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    ("tags: []\n", "tags: [curate, trl]\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    ("tags:\nlicense: no\n", "tags:\n- curate\n- trl\nlicense: no\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    ("tags: no\n", "tags:\n- no\n- curate\n- trl\nsize_categories:\n- n<1K\nconfigs:\n" + SPLIT),
    # the size is ours to say, and what `datasets` wrote of other files goes
    ("size_categories:\n- 1M<n<10M\ndataset_info:\n  features:\n  - name: no\n  splits:\n  - name: train\nversion: 1.10\n",
     "size_categories:\n- n<1K\nversion: 1.10\ntags:\n- curate\n- trl\nconfigs:\n" + SPLIT),
    # configurations: the person's own stay, and so do their splits beside ours
    ("configs:\n- config_name: no\n  data_files: raw/*  # kept\n",
     "configs:\n- config_name: no\n  data_files: raw/*  # kept\n" + SPLIT + "tags:\n- curate\n- trl\nsize_categories:\n- n<1K\n"),
    ("configs:\n  - config_name: default\n    version: 1.10\n    data_files:\n      - split: test\n        path: no/*.parquet\n      - split: old\n"
     "        path: data/old-*.parquet\n  - config_name: on\n    data_files: raw/*\n",
     "configs:\n  - config_name: default\n    version: 1.10\n    data_files:\n    - split: train\n      path: data/train-*.parquet\n"
     "    - {split: test, path: no/*.parquet}\n  - config_name: on\n    data_files: raw/*\ntags:\n- curate\n- trl\nsize_categories:\n- n<1K\n"),
    ("{language: no, version: 1.10, names: ['1.10', \"no\"]}\n", 'language: no\nversion: 1.10\nnames: ["1.10", "no"]\n' + OURS),
    ("language: no", "language: no\n" + OURS),  # without an end of line
]  # fmt: skip


@pytest.mark.parametrize(("head", "wanted"), CHANGED)
def test_only_our_own_keys_change(head, wanted):
    assert merged(head) == wanted
    assert merged(wanted) == wanted
    yaml.compose(wanted)


def test_more_keys_are_added_where_there_are_none():
    assert merged("license: no\n", more={"license": "mit", "language": "no", "version": "1.10"}).startswith(
        "license: no\nlanguage: 'no'\nversion: '1.10'\n"
    )


@pytest.mark.parametrize(
    ("head", "said"),
    [("a: [\n", "line 3"), ("- a\n- b\n", "it holds no"), ("mine: &t [a]\ntags: *t\n", "line 3: `tags` has an anchor")],
)
def test_a_head_that_cannot_be_changed_is_said(head, said):
    with pytest.raises(NotYaml, match=said):
        merged(head)
    text = card(f"---\n{head}---\n\nmine\n")
    assert f"---\n{head}---\n\nmine\n" in text and "The head that README.md had is no YAML" in text


def card(existing):
    return card_text(Card(), existing=existing, split="train", n_rows=1, n_dropped=0, kind="sft", layout="sft")


def test_the_text_around_stays_as_it_is():
    mine = f"\ufeff---\r\nlanguage: no\r\n---\r\n\r\n\r\n# Mine  \r\n\r\n{BEGIN}\r\nold\r\n{END}\r\nafter\r\n\r\n"
    text = card(mine)
    assert text.startswith("\ufeff---\r\nlanguage: no\r\ntags:\r\n") and "\r\n\r\n\r\n# Mine  \r\n\r\n" + BEGIN in text
    assert text.endswith(END + "\r\nafter\r\n\r\n") and "\n" not in text.replace("\r\n", "")
    assert card(text) == text


def test_without_the_mark_of_our_sections_end_nothing_is_lost():
    assert "years of work" in card(f"---\na: no\n---\n\n{BEGIN}\n\nours\n\nyears of work\n")


def test_a_card_of_other_bytes_is_refused_and_stays(tmp_path):
    export(tmp_path / "out", [ExportRow(Example("p", " c"), "r")])
    (tmp_path / "out" / "README.md").write_bytes("---\nname: Ærlig\n---\n".encode("latin-1"))
    with pytest.raises(ValidationError, match="README.md: not UTF-8 text"):
        export(tmp_path / "out", [ExportRow(Example("p", " c"), "r")])
    assert (tmp_path / "out" / "README.md").read_bytes().startswith(b"---\nname: \xc6rlig")
