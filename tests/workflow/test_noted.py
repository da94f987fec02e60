"""What was found when a source was read in is said by every later plan and run, and stands in the card."""

from __future__ import annotations

import curate
from curate.console import Progress
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan, run_steps
from tests.workflow.pairs import pairs, write_rows


def test_notes_about_a_source_are_said_every_time(recipe, tmp_path, capsys):
    rows = [r | {"context": "a map", "prompt_of": r["prompt"]} for r in pairs(4)]
    rows[1]["chosen"] = rows[1]["prompt"] + " again"
    write_rows(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "chosen": None}])
    given = recipe(
        scores=["edit_distance"],
        select={},
        export={"to": "out"},
        source={"path": "pairs.jsonl", "on_bad_row": "drop", "columns": {"prompt": "prompt_of"}},
    )
    wanted = (
        "rows have something in `context`",
        "Column `prompt` is called `source_prompt` here",
        "with the whole prompt",
        "ad rows left out: 1 (`curate validate` names them)",
    )
    for step in ("plan", "run", "plan", "run", "score"):
        if step == "plan":
            make_plan(load_recipe(given), progress=Progress())
        elif step == "run":
            curate.run(given, progress=Progress())
        else:
            (tmp_path / "pairs.jsonl").rename(tmp_path / "elsewhere.jsonl")
            run_steps(load_recipe(given), ["score"], progress=Progress(), command="score")
        said = " ".join(capsys.readouterr().err.split())
        assert all(said.count(text) == 1 for text in wanted), (step, said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(text in card for text in wanted)
    write_rows(tmp_path / "pairs.jsonl", pairs(4))  # another content: nothing of the old one is said
    make_plan(load_recipe(given, set=["source.columns={}"]), progress=Progress())
    said = capsys.readouterr().err
    assert not any(text in said for text in wanted)
