"""An SFT recipe over checkpoints with real vLLM: one engine for the series, a killed run goes on with the very same answers."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import curate
import curate.plan.missing
from curate.errors import UsageError
from tests.forked import exit_code
from tests.tiny_models import make_llama

pytest.importorskip(
    "vllm", reason="vLLM is not installed here; sampling with transformers is tested in test_real_data.py"
)

RECIPE = """
    kind: sft
    source: rows.jsonl
    heldout: heldout.jsonl
    models: {checkpoints: run}
    tokens: {max_length: 64}
    engine: {sampler: vllm}
    sampling: {samples: 3, temperature: 1.0, top_p: 1.0, max_new_tokens: 6, grader: {regex: "([a-z])"}}
    scores: [accuracy, target_nll, {premem_accuracy: {threshold: 0.5}}, fluent]
"""


def folder(path: Path, runs: Path) -> Path:
    path.mkdir()
    rows = [
        {"prompt": f"{word} says", "completion": f" {word[0]}", "answer": word[0]}
        for word in ["ada", "bea", "cy", "dot", "eve", "fay", "gil", "hal", "ivy", "jo"]
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "heldout.jsonl").write_text(json.dumps({"prompt": "kit says", "completion": " k", "answer": "k"}) + "\n")
    (path / "recipe.yaml").write_text(textwrap.dedent(RECIPE))
    (path / "run").symlink_to(runs)
    return path


def dies(kill_at: int, recipe: Path) -> None:
    """`curate measure`, in a process of its own, which is killed once it has written so many shards of samples."""
    import curate.store.shards as shards
    from curate.cli import main

    curate.plan.missing.SHARD_ROWS.update(sample=4)
    write_parquet, done = shards.write_parquet, []

    def written(table, folder, name):
        path = write_parquet(table, folder, name)
        done.extend(["samples"] if "samples" in table.column_names else [])
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    shards.write_parquet = written
    sys.argv = ["curate", "measure", str(recipe), "--quiet"]
    main()


def test_a_series_is_sampled_by_one_engine_and_a_killed_run_repeats_itself(tmp_path, monkeypatch):
    runs = tmp_path / "run"
    for step in (10, 20):
        make_llama(runs / f"checkpoint-{step}", seed=step)
    killed, whole = folder(tmp_path / "killed", runs), folder(tmp_path / "whole", runs)
    said = tmp_path / "said"
    assert exit_code(dies, 2, killed / "recipe.yaml", said=said) == -signal.SIGKILL, said.read_text()
    # 11 rows in shards of 4: the third shard of the first checkpoint is under way
    monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, "sample", 4)
    result = curate.run(killed / "recipe.yaml")
    assert result.measured["sample"] == 11 * 2 - 8
    curate.run(whole / "recipe.yaml")
    query = "SELECT row_id, checkpoint, sample, text, correct, n_tokens, finished FROM samples ORDER BY ALL"
    first, second = (curate.Store(path / "store").sql(query) for path in (killed, whole))
    assert len(first) == 11 * 2 * 3 and first.equals(second)
    by_checkpoint = first.partition_by("checkpoint")
    assert by_checkpoint[0]["text"].to_list() != by_checkpoint[1]["text"].to_list()  # the weights were really swapped

    assert curate.run(killed / "recipe.yaml").measured == {}
    lines = result.store.sql("SELECT * FROM trajectories ORDER BY row_id, step")
    assert len(lines) == 22 and lines["run"].unique().to_list() == ["run"]
    counted = result.store.sql(
        "SELECT row_id, step, avg(correct::INT) AS a FROM samples s JOIN trajectories t USING (row_id, step) GROUP BY ALL ORDER BY ALL"
    )
    np.testing.assert_allclose(lines["accuracy"].to_numpy(), counted["a"].to_numpy())
    values = result.store.sql("SELECT name, checkpoint, value, n FROM dataset_values WHERE step IS NOT NULL")
    assert set(values["name"]) >= {"accuracy", "premem_accuracy", "target_nll", "heldout_accuracy"}
    assert values.filter(values["name"] == "heldout_accuracy")["n"].to_list() == [1, 1]
    assert len(result.store.sql("SELECT * FROM scored WHERE role = 'train' AND premem_accuracy IS NOT NULL")) == 10


def test_a_server_without_an_address_is_said_before_anything_runs(tmp_path):
    make_llama(tmp_path / "run" / "checkpoint-10", seed=1)
    recipe = folder(tmp_path / "line", tmp_path / "run") / "recipe.yaml"
    with pytest.raises(UsageError, match="--set server.url"):
        curate.run(recipe, set=["engine.sampler=openai"])
    store = curate.Store(recipe.parent / "store")
    assert len(store.sql("SELECT * FROM rows")) == 11 and not list((recipe.parent / "store").rglob("shards/*/*"))
