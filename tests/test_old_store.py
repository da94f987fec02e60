"""A store that an earlier curate made (commit 9a495b9): what it measured stays, and its scores are the same to the last digit."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

import curate
from curate.console import Progress
from curate.jobs.demo.model import BASE
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.old_store.models import make_models

HERE = Path(__file__).parent / "old_store"
TORCH = "2.13.0"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    import torch

    if torch.__version__.split("+")[0] != TORCH:
        pytest.skip(
            f"the old store was measured with torch {TORCH}; another version is another engine, and measures anew"
        )
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(HERE / "store.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    make_models(folder, BASE)
    for recipe in HERE.glob("*.yaml"):
        shutil.copy(recipe, folder)
    return folder


def test_old_selections_can_be_read(old):
    """Before anything is written: what an earlier curate decided has its reasons, and no rule, value or cut."""
    store = curate.Store(load_recipe(old / "pairs.yaml").store)
    found = store.sql("SELECT DISTINCT rule, value, cut, reason IS NULL FROM selections WHERE selection = 'pairs'")
    assert found.rows() == [(None, None, None, False)]
    assert len(list(store.selection("pairs").dropped())) + len(list(store.selection("pairs").kept())) == len(
        store.selection("pairs").table()
    )


@pytest.mark.parametrize("name", ["pairs", "sft"])
def test_an_old_store_goes_on(old, name):
    expected = json.loads((old / "expected.json").read_text())[name]
    text = make_plan(load_recipe(old / f"{name}.yaml"), progress=Progress(quiet=True)).text()
    result = curate.run(old / f"{name}.yaml")
    if name == "sft":  # its grader reads more than it did: the answers are kept, and graded anew
        assert "none has to be sampled" in text and "Everything is sampled and measured already." in text
        assert list(result.measured) == ["kept answers graded anew"]
    else:
        assert "Everything is measured already." in text and result.measured == {}
    assert {view for view, before in expected.items() if not before} <= ({"samples"} if name == "pairs" else set())
    views_are(result.store, expected, recipe=name)


# Stores of earlier shapes, each made by the code of its commit over eight pairs: c4397c9, before there was a command; bea2e9a, a run with a
# selection; 3913958, a run when imports were numbered.
EARLIER = {
    "c4397c9": "",
    "bea2e9a": "select: {drop_worst: {ches_ln: 0.1}, order_by: ranking_gap desc, keep: {share: 0.5}}",
    "3913958": "",
}


@pytest.fixture(params=EARLIER)
def earlier(request, old, tmp_path) -> Path:
    with tarfile.open(HERE / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "runs").symlink_to(old / "runs")
    scores = "scores: [ranking_gap, ranking_correct, ches_ln]"
    head = "kind: preference\nstore: store\nsource: pairs.jsonl\nmodels: {reference: runs/sft/checkpoint-10}\ntokens: {max_length: 256}\n"
    (tmp_path / "pairs.yaml").write_text(f"{head}engine: {{device: cpu}}\n{scores}\n{EARLIER[request.param]}\n")
    return tmp_path


def views_are(store: curate.Store, expected: dict[str, list[dict]], **about: str) -> None:
    """Reasons have become sentences without the rows' numbers; what was decided stays."""
    for view, before in expected.items():
        lost = {"reason"} if view == "selections" else set()
        before = [{key: value for key, value in line.items() if key not in lost} for line in before]
        columns = ", ".join(f'"{column}"' for column in before[0]) if before else "*"
        now = store.sql(f"SELECT {columns} FROM {view} ORDER BY ALL", **about).to_dicts()
        assert json.loads(json.dumps(now, default=str)) == before, view


def test_stores_of_earlier_shapes_open_and_go_on(earlier):
    expected = json.loads((earlier / "expected.json").read_text())
    views_are(curate.Store(earlier / "store"), expected)
    if not (earlier / "pairs.jsonl").exists():  # its values are made up
        return
    assert (
        "Everything is measured already."
        in make_plan(load_recipe(earlier / "pairs.yaml"), progress=Progress(quiet=True)).text()
    )
    result = curate.run(earlier / "pairs.yaml")
    assert result.measured == {}
    del expected["dataset_values"]  # there are more of them
    views_are(result.store, expected, recipe="pairs")
