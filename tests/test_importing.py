"""Imports by hand tables, their errors, and the published logs."""

from __future__ import annotations

import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

import curate
from curate.console import Progress
from curate.errors import UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.report.summary import summarise
from curate.rows import Example, foreign_id
from curate.store import Store
from curate.store.importing.importing import import_file
from curate.workflow.run import run_steps

LOGS = {
    "id": [7, 7, 8],
    "run": ["r", "r", "r"],
    "step": [10, 20, 10],
    "k": [1, 4, 0],
    "n": [4, 4, 0],
    "ppl": [1.0000026, math.e, None],
    "seen": [True, False, True],
}
MAP = {
    "row": "id",
    "run": "run",
    "checkpoint": "step",
    "correct": "k",
    "samples": "n",
    "perplexity": "ppl",
    "trained": "seen",
}


def written(path, data=LOGS):
    frame = pl.DataFrame(data)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".csv":
        frame.write_csv(path)
    else:
        lines = "\n".join(json.dumps(line) for line in frame.to_dicts())
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["logs.parquet", "logs.csv", "logs.jsonl", "logs.jsonl.gz"])
def test_by_hand(tmp_path, name):
    store = tmp_path / "store"
    for _ in range(2):  # again is the same as once
        found = import_file(store, written(tmp_path / name), MAP)
    assert (found.lines, found.rows, found.new_rows, found.runs, found.checkpoints) == (3, 2, 0, 1, 2)
    store = Store(store)
    picked = "o.key, t.checkpoint, t.step, n_samples, n_correct, accuracy, trained"
    assert store.sql(f"SELECT {picked} FROM trajectories t JOIN occurrences o USING (row_id) ORDER BY 1, 3").rows() == [
        ("7", "10", 10, 4.0, 1.0, 0.25, True),
        ("7", "20", 20, 4.0, 4.0, 1.0, False),
        ("8", "10", 10, 0.0, 0.0, None, True),
    ]
    nll = store.sql("SELECT target_nll FROM trajectories ORDER BY row_id = ?, step", [foreign_id(found.source, 7)])[
        "target_nll"
    ].to_list()
    assert nll[0] is None
    assert nll[1:] == pytest.approx([math.log(1.0000026), 1.0], rel=1e-12)
    assert store.sql("SELECT DISTINCT kind, prompt FROM rows").rows() == [("sft", None)]
    assert store.missing("anything") == []  # nothing can be measured on rows without text


def test_single_precision_perplexities_keep_their_nll(tmp_path):
    path = tmp_path / "x.parquet"
    pl.DataFrame({"id": [0], "ppl": np.array([1.0000026], np.float32)}).write_parquet(path)
    import_file(tmp_path / "s", path, {"row": "id", "perplexity": "ppl"})
    found = Store(tmp_path / "s").sql("SELECT target_nll FROM trajectories").item()
    assert found == math.log(float(np.float32(1.0000026)))
    assert (
        Store(tmp_path / "s").sql("SELECT target_nll FROM scored").item() == found
    )  # measured once: there is no choice which it shows


def test_corrected_values_replace_and_other_columns_stay(tmp_path):
    store = Store(tmp_path / "s", create=True)
    path = tmp_path / "a.csv"
    import_file(store, written(path, {"id": [1, 2], "a": [0.1, 0.2], "b": [1, 2]}), {"row": "id", "a": "a", "b": "b"})
    import_file(store, written(path, {"id": [2, 3], "a": [0.9, float("inf")]}), {"row": "id", "a": "a"})
    assert store.sql("SELECT key, a, b FROM trajectories JOIN occurrences USING (row_id) ORDER BY 1").rows() == [
        ("1", 0.1, 1.0),
        ("2", 0.9, 2.0),
        ("3", None, None),
    ]


def test_dataset_values(tmp_path):
    path = written(tmp_path / "test.csv", {"run": ["r", "r"], "step": [1, 2], "acc": [0.25, None], "size": [100, 100]})
    for _ in range(2):
        found = import_file(
            tmp_path / "s", path, {"run": "run", "checkpoint": "step", "test_accuracy": "acc", "n": "size"}
        )
    assert str(found).splitlines()[1:] == ["It replaces import 1."] and found.number == 2
    assert (
        str(found).splitlines()[0]
        == f"{path.as_posix()}: 2 dataset values (test_accuracy, n) over 2 checkpoints of 1 run."
    )
    assert Store(tmp_path / "s").sql(
        "SELECT name, run, checkpoint, value, low, n FROM dataset_values ORDER BY step"
    ).rows() == [
        ("test_accuracy", "r", "1", 0.25, None, 100),
        ("test_accuracy", "r", "2", None, None, 100),
    ]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", create=True)
    store.add_source(
        "data/x.jsonl",
        "1",
        [SimpleNamespace(index=i, row=Example(f"q{i}", "a") if i != 1 else None, columns={}) for i in range(4)],
    )
    return store


def test_rows_by_number_and_by_our_id(store, tmp_path):
    q2, q3 = Example("q2", "a").row_id, Example("q3", "a").row_id
    import_file(store, written(tmp_path / "i.csv", {"i": [2, 3], "v": [0.2, 0.3]}), {"index": "i", "v": "v"})
    import_file(
        store,
        written(tmp_path / "j.csv", {"i": [3.0, 2.0], "w": [0.3, 0.2]}),
        {"row": "i", "w": "w"},
        source="data/x.jsonl",
    )
    import_file(store, written(tmp_path / "k.csv", {"i": [q3], "u": [0.5]}), {"row": "i", "u": "u"})
    picked = "SELECT row_id, max(v), max(w), max(u) FROM trajectories GROUP BY 1 ORDER BY 2"
    assert store.sql(picked).rows() == [(q2, 0.2, 0.2, None), (q3, 0.3, 0.3, 0.5)]
    assert len(store.row_ids_of()) == 3
    with pytest.raises(ValidationError, match=r"'i' is 1, expected the number of a good row of data/x\.jsonl"):
        import_file(store, written(tmp_path / "bad.csv", {"i": [2, 1], "v": [0.2, 0.3]}), {"index": "i", "v": "v"})
    with pytest.raises(UsageError, match=r"Did you mean --source data/x\.jsonl"):
        import_file(store, tmp_path / "i.csv", {"index": "i", "v": "v"}, source="x.jsonl")
    with pytest.raises(ValidationError, match="names row 00000000000000000000"):
        import_file(store, written(tmp_path / "u.csv", {"i": [q3, "0" * 20], "v": [1, 2]}), {"row": "i", "v": "v"})


@pytest.mark.parametrize("mapping, data, error, told", [
    ({"row": "idd", "a": "k"}, LOGS, UsageError, "no column 'idd' .wanted for row.. Did you mean row=id"),
    ({"row": "id", "run": "run", "checkpoint": "step", "perplexty": "ppl"}, LOGS, UsageError, "did you mean perplexity="),
    ({"row": "id", "correct": "k"}, LOGS, UsageError, "correct= and samples= go together"),
    ({"row": "id", "run": "run"}, LOGS, UsageError, "no column to import"),
    ({"row": "id", "index": "id", "a": "k"}, LOGS, UsageError, "named twice"),
    ({"row": "id", "a": "k"}, LOGS, ValidationError, "row 1, line 2 and row 2, line 3 are about the same row, run and checkpoint"),
    ({"row": "id", "a": "x"}, {"id": [1, 2], "x": ["0.5", "abc"]}, ValidationError, "line 3: 'x' is abc, expected a number.* say `--text a`"),
    ({"row": "id", "a": "x"}, {"id": [1, None], "x": [1, 2]}, ValidationError, "line 3: 'id' is empty"),
    ({"row": "id", "correct": "k", "samples": "n"}, {"id": [1], "k": [5], "n": [4]}, ValidationError, "line 2: 'k' is 5, expected a count"),
    ({"row": "id", "perplexity": "x"}, {"id": [1], "x": [0.5]}, ValidationError, "line 2: 'x' is 0.5"),
    ({"row": "id", "trained": "x"}, {"id": [1], "x": [2]}, ValidationError, "expected true or false"),
])  # fmt: skip
def test_errors(tmp_path, mapping, data, error, told):
    path = written(tmp_path / "logs.csv", data)
    with pytest.raises(error, match=told):
        import_file(tmp_path / "s", path, mapping)


def test_files_that_are_not_there_or_not_readable(tmp_path):
    written(tmp_path / "logs.csv")
    with pytest.raises(UsageError, match=r"Did you mean .*logs\.csv"):
        import_file(tmp_path / "s", tmp_path / "log.csv", MAP)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(ValidationError, match="not readable as parquet"):
        import_file(tmp_path / "s", tmp_path / "x.parquet", MAP)
    (tmp_path / "x.xls").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"expected \.jsonl, .*\.csv"):
        import_file(tmp_path / "s", tmp_path / "x.xls", MAP)
    assert not (tmp_path / "s").exists()


def test_the_published_logs_of_llama_3_on_gsm8k(shared, tmp_path):
    store, folder = Store(tmp_path / "s", create=True), shared / "data" / "premem_gsm8k"
    names = {"row": "example_id", "run": "run", "checkpoint": "step", "correct": "n_correct", "samples": "n_samples"}
    found = import_file(store, folder / "train.parquet", {**names, "perplexity": "perplexity", "trained": "in_train"})
    import_file(
        store,
        folder / "test.parquet",
        {"run": "run", "checkpoint": "step", "test_accuracy": "test_accuracy", "n": "n_examples"},
    )
    assert (found.rows, found.runs, found.checkpoints, found.lines) == (7473, 13, 51, 381_123)
    raw = pl.read_parquet(folder / "train.parquet").group_by(pl.col("run").cast(pl.String), "step", maintain_order=False).agg(
        (pl.col("n_correct").cast(float) / pl.col("n_samples")).mean().alias("accuracy"), pl.col("perplexity").cast(float).log().mean().alias("nll")
    )  # fmt: skip
    ours = store.sql(
        "SELECT run, step, avg(accuracy) AS ours, avg(target_nll) AS our_nll, count(*) AS n FROM trajectories GROUP BY ALL"
    )
    both = raw.with_columns(pl.col("step").cast(pl.Int64)).join(ours, on=["run", "step"])
    assert len(both) == 51
    np.testing.assert_allclose(both["accuracy"], both["ours"], rtol=1e-12)
    np.testing.assert_allclose(both["nll"], both["our_nll"], rtol=1e-12)
    values = store.sql(
        "SELECT count(*), count(DISTINCT run) FROM dataset_values JOIN (SELECT DISTINCT run, step FROM trajectories) USING (run, step)"
    )
    assert values.row(0) == (51, 13)


def test_the_published_logs_of_dpo(shared, tmp_path):
    path = shared / "data" / "ld_llm_dpo_dynamics" / "prob_pythia410m_dpo.parquet"
    names = {
        "row": "idx",
        "checkpoint": "eval_step",
        "chosen_logp": "logp_chosen",
        "rejected_logp": "logp_rejected",
        "other": "except_argmax_prob_logits",
    }
    found = import_file(tmp_path / "s", path, names)
    assert (found.rows, found.checkpoints, found.runs) == (250, 50, 1)
    store = Store(tmp_path / "s")
    first, last = store.sql("SELECT avg(rejected_logp) FROM trajectories GROUP BY step ORDER BY step")[
        "avg(rejected_logp)"
    ].to_list()[::49]
    assert last < first - 50  # the squeezing that the data's own description tells of
    assert store.sql("SELECT DISTINCT kind, source FROM rows").rows() == [
        ("preference", "ld_llm_dpo_dynamics/prob_pythia410m_dpo.parquet")
    ]
    assert store.sql("SELECT count(*) FROM trajectories WHERE isnan(other)").item() == 0


def test_two_runs_of_pairs_are_told_apart_and_between_is_checked(tmp_path):
    logs = {
        "id": [1, 2, 3, 1, 2, 3, 1, 2],
        "run": ["a"] * 6 + ["b"] * 2,
        "step": [0, 0, 0, 5, 5, 5, 9, 9],
        "plus": [-4.0, -2.0, -2.0, -3.0, -5.0, None, -1.0, -1.0],
        "minus": [-3.0, -3.0, -1.0, -6.0, -4.0, -9.0, -2.0, -2.0],
    }
    mapping = {"row": "id", "run": "run", "checkpoint": "step", "chosen_logp": "plus", "rejected_logp": "minus"}
    import_file(tmp_path / "s", written(tmp_path / "x.csv", logs), mapping)
    store = Store(tmp_path / "s")
    (flips,) = summarise(store).flips  # run b has one checkpoint: nothing to compare
    assert flips.run == "a" and [(c.before, c.now, c.n) for c in flips.cells] == [
        ("right", "right", 0), ("right", "wrong", 1), ("wrong", "right", 1), ("wrong", "wrong", 0),
    ]  # fmt: skip
    assert flips.cells[2].reward_margin == pytest.approx(0.1 * (1 + 3))  # pair 1: c from 1 to −3
    assert flips.path[0]["chosen_logp"] == -3.0  # pair 3 is unknown at the end: in no mean
    raw = {"kind": "preference", "scores": ["ranking_gap", "flipped"]}
    scored = curate.run(raw, store=store.folder).store.sql("SELECT ranking_gap, flipped FROM scored ORDER BY index")
    # a run's first checkpoint is the reference: c = 1, −1, 1 in run a, and −1, −1 in run b; a row's score is the mean over its runs
    assert scored.rows() == [(0.0, 1.0), (-1.0, -1.0), (1.0, None)]
    (back,) = summarise(store, between=(5, 0)).flips
    assert back.cells[2].n == 1 and (back.first, back.last) == ("5", "0")
    with pytest.raises(UsageError, match="no run has pairs measured at both steps. There are: a: 0, 5; b: 9"):
        summarise(store, between=(0, 7))


def test_no_selection_of_scores_that_an_import_has_overtaken(tmp_path):
    """The same log again with other numbers: its values are replaced, and what was made of the old ones is refused."""
    store, recipe = tmp_path / "store", tmp_path / "log.yaml"
    recipe.write_text(
        "kind: sft\nstore: store\nscores: [confidence]\nselect: {order_by: confidence, keep: {rows: 1}}\n"
    )
    step = lambda *steps: run_steps(load_recipe(recipe), steps, progress=Progress(quiet=True))  # noqa: E731
    log = {"id": [1, 2], "run": ["r", "r"], "step": [9, 9], "nll": [0.5, 1.0]}
    names = {"row": "id", "run": "run", "checkpoint": "step", "target_nll": "nll"}
    import_file(store, written(tmp_path / "log.csv", log), names)
    kept = step("score", "select").selection.counts["kept"]
    again = import_file(store, written(tmp_path / "log.csv", log | {"nll": [2.0, 1.0]}), names)
    assert kept == 1 and "target_nll for 2 rows over 1 checkpoint of 1 run, 2 lines." in str(again)
    with pytest.raises(UsageError, match="as scores of 'log' comes from other .* measurements"):
        step("select")
    assert step("score", "select").selection.counts["kept"] == 1


def test_logs_about_other_rows_than_the_recipe_s_are_no_scores_of_nothing(tmp_path):
    """Row numbers taken for somebody else's ids: said when they come in, refused when they are scored, right with --source."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(2))
    )
    recipe = tmp_path / "log.yaml"
    recipe.write_text("kind: sft\nstore: store\nsource: data/rows.jsonl\nscores: [confidence]\n")
    step = lambda: run_steps(load_recipe(recipe), ["score"], progress=Progress(quiet=True))  # noqa: E731
    with pytest.raises(UsageError, match=r"curate import .*store FILE --source data/rows\.jsonl --map"):
        step()
    log = written(tmp_path / "log.csv", {"i": [0, 1, 0, 1], "step": [1, 1, 2, 2], "x": [0.0, 1.0, 0.0, math.log(2)]})
    names = {"row": "i", "checkpoint": "step", "nll": "x"}
    with pytest.raises(UsageError, match=r"none of the 2 values of 'i' .*`--source data/rows\.jsonl`.*`--new-rows`"):
        import_file(tmp_path / "store", log, names)
    assert import_file(tmp_path / "store", log, names, new_rows=True).new_rows == 2
    with pytest.raises(
        UsageError, match=r"about other rows than those of data/rows\.jsonl.*`--source data/rows\.jsonl`"
    ):
        step()
    with pytest.raises(UsageError, match=r"Say --source data/rows\.jsonl"):
        import_file(tmp_path / "store", log, names, source="rows.jsonl")
    found = import_file(tmp_path / "store", log, names, source="data/rows.jsonl")
    assert found.new_rows == 0 and found.hint == ""
    values = step().store.sql("SELECT confidence FROM scored ORDER BY index", source="data/rows.jsonl")["confidence"]
    assert values.to_list() == pytest.approx([1.0, (math.exp(-1) + 0.5) / 2])
