"""Imports about the user's own rows: by a column of theirs, taken back whole, and columns like any other in a recipe."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from curate.cli import app
from curate.console import Progress
from curate.errors import UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.report.summary import summarise
from curate.rows import Example
from curate.store import Store
from curate.store.importing.importing import import_file
from curate.workflow.run import run_steps

ROWS = [
    {"prompt": f"q{i}", "completion": "a", "prompt_id": f"p{i}", "group": "gh"[i % 2], "number": i} for i in range(4)
]


@pytest.fixture
def store(tmp_path):
    """Four rows with ids of the user's, read by a recipe that scores nothing yet."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store = Store(tmp_path / "store", create=True)
    records = [
        SimpleNamespace(
            index=i, row=Example(r["prompt"], "a"), columns={k: r[k] for k in ("prompt_id", "group", "number")}
        )
        for i, r in enumerate(ROWS)
    ]
    store.add_source("rows.jsonl", "1", records)
    return store


def lines(path, *text):
    path.write_text("\n".join(text) + "\n")
    return path


def judged(tmp_path, name="judge.csv"):
    return lines(
        tmp_path / name,
        "prompt_id,score,verdict,ok",
        "p2,0.2,bad,false",
        "p0,0.9,good,true",
        "p9,0.5,good,true",
        "p1,,poor,",
    )


MAP = {"judge": "score", "verdict": "verdict", "ok": "ok"}
SHOWN = "SELECT prompt, judge, verdict, ok FROM scored ORDER BY prompt"
JUDGED = [("q0", 0.9, "good", True), ("q1", None, "poor", None), ("q2", 0.2, "bad", False), ("q3", None, None, None)]


@pytest.mark.parametrize("on, header", [("prompt_id", "prompt_id"), ("prompt_id=who", "who"), ("who=prompt_id", "who")])
def test_rows_are_joined_by_a_column_of_the_user_s(store, tmp_path, on, header):
    path = judged(tmp_path)
    path.write_text(path.read_text().replace("prompt_id", header))
    found = import_file(store, path, MAP, on=on)
    assert (found.rows, found.new_rows, found.lines) == (3, 0, 4)
    assert (
        "1 of 4 lines are about no row" in str(found)
        and "'p9'" in str(found)
        and "judge.csv, row 3, line 4" in str(found)
    )
    assert "1 of the rows that have a 'prompt_id' are not in the file" in str(found)
    assert "judge in 1 of 4 lines, ok in 1 of 4 lines" in str(found)
    assert store.sql(SHOWN).rows() == JUDGED and store.status()["rows"] == 4


def test_ids_of_the_user_s_own_are_no_new_rows(store, tmp_path):
    with pytest.raises(
        UsageError, match=r"none of the 4 values of 'prompt_id' \('p2', .*say `--on prompt_id`.*`--new-rows`"
    ):
        import_file(store, judged(tmp_path), {"row": "prompt_id", **MAP})
    both = r"the file's 'prompt_id' is 'p2', 'p0', 'p9', …, the rows' 'group' is 'g', 'h'.*`--on prompt_id`"
    with pytest.raises(UsageError, match=both):
        import_file(store, judged(tmp_path), {"judge": "score"}, on="group=prompt_id")
    with pytest.raises(UsageError, match=r"have no column 'promptid'. Did you mean --on prompt_id"):
        import_file(store, judged(tmp_path), {"judge": "score"}, on="promptid=prompt_id")
    assert store.status()["rows"] == 4 and store.imports() == []


@pytest.mark.parametrize("written", ["2", "2.0", '"2"'])
def test_numbers_are_the_same_ids_however_they_are_written(store, tmp_path, written):
    import_file(store, lines(tmp_path / "n.csv", "number,judge", f"{written},0.5"), {"judge": "judge"}, on="number")
    assert store.sql("SELECT prompt FROM scored WHERE judge = 0.5").rows() == [("q2",)]


def test_leading_zeros_are_another_id(store, tmp_path):
    with pytest.raises(UsageError, match=r"the file's 'number' is '002', the rows' 'number' is '0', '1', '2'"):
        import_file(store, lines(tmp_path / "n.csv", "number,judge", "002,0.5"), {"judge": "judge"}, on="number")


def test_one_id_of_several_rows_gives_each_the_value(store, tmp_path):
    found = import_file(store, lines(tmp_path / "g.csv", "group,hard", "g,1", "h,0"), {"hard": "hard"}, on="group")
    assert "2 values of 'group' stand for several rows" in str(found) and found.rows == 4
    assert store.sql("SELECT hard FROM scored ORDER BY prompt")["hard"].to_list() == [1, 0, 1, 0]


def test_source_and_index_name_a_row(store, tmp_path):
    import_file(store, lines(tmp_path / "p.csv", "at,judge", "rows.jsonl:3,0.5"), {"row": "at", "judge": "judge"})
    import_file(store, lines(tmp_path / "p.csv", "at,judge", "rows.jsonl#3,0.25"), {"row": "at", "judge": "judge"})
    assert store.sql("SELECT prompt FROM scored WHERE judge > 0 ORDER BY 1").rows() == [("q2",), ("q3",)]
    with pytest.raises(ValidationError, match=r"line 2: 'at' is rows\.jsonl:9, expected source:index"):
        import_file(store, lines(tmp_path / "p.csv", "at,judge", "rows.jsonl:9,0.5"), {"row": "at", "judge": "judge"})


def test_an_import_is_taken_back_whole(store, tmp_path):
    """Own rows keep what others brought, rows that only the file knew go, and dry-run changes nothing."""
    before = store.sql("SELECT * FROM scored ORDER BY position").rows()
    import_file(store, judged(tmp_path), MAP, on="prompt_id")
    again = lines(tmp_path / "judge2.csv", "prompt_id,score", "p0,0.1", "p3,0.3")
    found = import_file(store, again, {"judge": "score"}, on="prompt_id")
    assert "judge came with import 1 (" in str(found)
    logs = lines(tmp_path / "log.csv", "id,step,nll", "x,1,2.0", "y,1,3.0")
    import_file(store, logs, {"row": "id", "step": "step", "nll": "nll"}, new_rows=True)
    import_file(store, lines(tmp_path / "t.csv", "step,acc", "1,0.5"), {"step": "step", "test_accuracy": "acc"})
    assert [one.number for one in store.imports()] == [1, 2, 3, 4]
    assert store.sql(SHOWN).rows()[:4] == [("q0", 0.1, "good", True), *JUDGED[1:3], ("q3", 0.3, None, None)]
    assert store.forget_import(3, dry_run=True).rows == 2 and store.status()["rows"] == 6
    gone = store.forget_import(3)
    assert gone.rows == 2 and gone.values == 2 and store.status()["rows"] == 4
    assert "2 rows that only this file's ids knew" in str(gone)
    assert store.forget_import(2).shown_again == () and store.sql(SHOWN).rows() == JUDGED
    store.forget_import(1)
    assert store.forget_import(4).dataset_values == 1
    assert store.sql("SELECT * FROM scored ORDER BY position").rows() == before
    assert store.imports() == [] and store.measured() == [] and len(store.sql("SELECT * FROM dataset_values")) == 0
    with pytest.raises(UsageError, match="no import 3 in this store. There are: none"):
        store.forget_import(3)


def test_what_an_import_had_overwritten_is_there_again(store, tmp_path):
    first = lines(tmp_path / "a.csv", "number,judge", "0,0.1", "1,0.2")
    import_file(store, first, {"judge": "judge"}, on="number")
    lines(tmp_path / "a.csv", "number,judge", "1,0.9")
    import_file(store, first, {"judge": "judge"}, on="number")
    judges = lambda: store.sql("SELECT judge FROM scored ORDER BY prompt LIMIT 2")["judge"].to_list()  # noqa: E731
    assert judges() == [0.1, 0.9]
    assert store.forget_import(2).shown_again == (1,) and judges() == [0.1, 0.2]
    import_file(store, lines(tmp_path / "a.csv", "number,judge", "0,5", "1,6"), {"judge": "judge"}, on="number")
    assert [one.number for one in store.imports()] == [2] and judges() == [5, 6]


def test_imported_columns_are_columns_in_a_recipe(store, tmp_path):
    """where, order_by, per, drop_worst with a stated end, export: after the recipe was scored, too."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: sft\nstore: store\nsource: rows.jsonl\n")
    full = lines(
        tmp_path / "full.csv", "prompt_id,score,verdict", *(f"p{i},0.{9 - i},{'xy'[i // 2]}" for i in range(4))
    )

    def kept(*set):
        loaded = load_recipe(recipe, set=["select.unknown=error", *set])
        result = run_steps(loaded, ["score", "select", "export"], progress=Progress(quiet=True))
        return result.selection.to_dataset()["prompt"] if not loaded.recipe.export else result.dataset

    import_file(store, full, {"judge": "score", "verdict": "verdict"}, on="prompt_id")
    assert kept("select.where=judge > 0.75") == ["q0", "q1"]
    assert kept("select.order_by=judge", "select.keep.rows=1") == ["q3"]
    assert kept("select.per=verdict", "select.order_by=judge", "select.keep.rows=1") == ["q1", "q3"]
    with pytest.raises(UsageError, match=r"which end of 'judge' is bad\? .*\{judge: \{share: 0.1, worst: low\}\}"):
        kept("select.drop_worst={judge: 0.25}")
    assert kept("select.drop_worst={judge: {share: 0.25, worst: low}}") == ["q0", "q1", "q2"]
    assert kept("select.drop_worst={judge: {share: 0.25, worst: high}}") == ["q1", "q2", "q3"]
    with pytest.raises(UsageError, match="'verdict' is text"):
        kept("select.drop_worst={verdict: {share: 0.25, worst: high}}")
    found = kept("select.where=judge > 0.75", "export={to: out, columns: [judge, verdict]}")
    assert found["judge"] == [0.9, 0.8] and found["verdict"] == ["x", "x"]
    store.forget_import(1)
    with pytest.raises(UsageError, match="nothing was imported into its store"):
        kept("select.where=judge > 0.75")
    import_file(store, full, {"judge": "score"}, on="prompt_id", worst={"judge": "low"})
    assert kept("select.drop_worst={judge: 0.25}") == ["q0", "q1", "q2"]
    loaded = load_recipe(recipe, set=["select.drop_worst={judge: 0.25}", "export.to=out"])
    lines(tmp_path / "full.csv", "prompt_id,score", *(f"p{i},0.{i}" for i in range(4)))
    import_file(store, full, {"judge": "score"}, on="prompt_id", worst={"judge": "low"})
    with pytest.raises(UsageError, match="what is there as selection of 'r' comes from other"):
        run_steps(loaded, ["export"], progress=Progress(quiet=True))


def test_a_score_does_not_take_an_imported_column_s_name(store, tmp_path):
    import_file(store, judged(tmp_path), {"judge": "score"}, on="prompt_id")
    loaded = load_recipe({"kind": "sft", "scores": [{"accuracy": {"as": "judge"}}]}, store=store.folder)
    with pytest.raises(UsageError, match=r"'judge' is an imported column of this store \(import 1"):
        run_steps(loaded, ["score"], progress=Progress(quiet=True))


@pytest.mark.parametrize("ours, says", [
    ("source", "every row has a column 'source' of ours"),
    ("Group", "your data has a column 'group' already"),
    ("confidence", "'confidence' is a score that curate computes"),
])  # fmt: skip
def test_names_that_mean_something_else_are_refused(store, tmp_path, ours, says):
    with pytest.raises(UsageError, match=f"{says}; give it another name, such as `--map imported_{ours}="):
        import_file(store, judged(tmp_path), {ours: "score"}, on="prompt_id")


def test_a_column_keeps_its_type(store, tmp_path):
    import_file(store, judged(tmp_path), {"judge": "score"}, on="prompt_id")
    with pytest.raises(UsageError, match=r"it is text here and was numbers before \(import 1\)"):
        import_file(store, judged(tmp_path), {"judge": "verdict"}, on="prompt_id")


def test_the_commands(store, tmp_path):
    from typer.testing import CliRunner

    call = lambda *words: CliRunner().invoke(app, [str(w) for w in words])  # noqa: E731
    path = judged(tmp_path)
    done = call(
        "import",
        store.folder,
        path,
        "--on",
        "prompt_id",
        "--map",
        "judge=score",
        "verdict=verdict",
        "--worst",
        "judge=low",
    )
    assert done.exit_code == 0 and "`curate forget" in done.output and "--import 1` takes it back" in done.output
    assert "prompt_id = prompt_id" in call("forget", store.folder, "--list").output
    assert "judge, verdict" in call("status", store.folder).output
    assert "would be removed" in call("forget", store.folder, "--import", 1, "--dry-run").output
    assert "2 values" not in call("forget", store.folder, "--import", 1, "--dry-run").output
    assert call("forget", store.folder, "--import", 1).output.startswith("Import 1 (")
    assert "Nothing was imported" in call("forget", store.folder, "--list").output
    with pytest.raises(UsageError, match="judge= is given twice"):
        raise call("import", store.folder, path, "--map", "judge=score judge=ok").exception


def test_a_summary_shows_imported_columns(store, tmp_path):
    import_file(store, judged(tmp_path), MAP, on="prompt_id", source="rows.jsonl")
    found = summarise(store)
    by_name = {c["name"]: c for c in found.to_json()["imported"]}
    judge = by_name["judge"]
    assert (judge["rows"], judge["min"], judge["median"], judge["max"]) == (2, 0.2, pytest.approx(0.55), 0.9)
    assert (by_name["verdict"]["rows"], by_name["verdict"]["distinct"], by_name["verdict"]["min"]) == (3, 3, None)
    assert by_name["ok"]["distinct"] == 2
    text = found.text()
    assert text.index("Imported columns:") < text.index("judge") and "different values" in text
    lines(tmp_path / "steps.csv", "prompt_id,run,step,acc", "p0,r,1,0.5", "p0,r,2,1.0", "p1,r,1,0.0")
    import_file(
        store,
        tmp_path / "steps.csv",
        {"run": "run", "checkpoint": "step", "accuracy": "acc"},
        on="prompt_id",
        source="rows.jsonl",
    )
    (series,) = [c for c in summarise(store).imported if c["over"] == "trajectories"]
    assert (series["name"], series["rows"], series["min"], series["max"]) == ("accuracy", 2, 0.0, 1.0)
