"""The shipped recipes on real data: HH dialogues, the published GSM8K logs, GSM8K text. Skipped where ../shared is absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import curate
from curate.console import Progress
from curate.report.explain import explain_row
from curate.report.summary import summarise
from curate.store.importing.importing import import_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_hh_dialogues_through_the_preference_line(shared, tmp_path, capsys):
    """Raw dialogues in, a dataset out, with a real model; the whole file is `curate run configs/hh_stories260k.yaml`."""
    over = {"source.limit": 160, "export.to": str(tmp_path / "curated")}
    result = curate.run(CONFIGS / "hh_stories260k.yaml", set=over, store=tmp_path / "store", progress=Progress())
    said = capsys.readouterr().err
    frame = result.store.sql("SELECT * FROM scored")
    assert len(frame) == 160 and frame["style"].unique().to_list() == ["standard"]
    assert f"{int(frame['truncated'].sum())} of 160 rows" in said and 0.2 < frame["truncated"].mean() < 0.4
    unknown = frame.filter(frame["ches_ln"].is_null())
    assert len(unknown) > 0 and unknown["token_problem"].null_count() == 0  # every NULL says why
    assert f"{len(unknown)} rows cannot be measured" in said
    known = frame.filter(frame["ches_ln"].is_not_null())
    flip = np.logaddexp(0, -0.1 * (known["rejected_logp"] - known["chosen_logp"]).to_numpy())
    np.testing.assert_allclose(known["flip_loss"].to_numpy(), flip, rtol=1e-9)
    import datasets

    kept = datasets.load_from_disk(str(tmp_path / "curated"))["train"]
    assert len(kept) == result.selection.counts["kept"]
    assert all(p.endswith("\n\nAssistant:") for p in kept["prompt"]) and all(c.startswith(" ") for c in kept["chosen"])
    dropped = datasets.load_dataset("parquet", data_files=str(tmp_path / "curated/dropped/*.parquet"), split="train")
    assert len(dropped) + len(kept) == 160 and all(dropped["reason"])
    row = dropped[0]
    assert row["reason"].startswith(
        explain_row(result.store, row["row_id"]).decision["reason"]
    )  # the row's numbers follow


def test_the_threshold_calibrated_on_published_logs(shared, tmp_path):
    """13 runs of Llama-3-8B on GSM8K: what README's results table says comes from these commands."""
    data, store = shared / "data" / "premem_gsm8k", tmp_path / "store"
    mapping = "row=example_id run=run checkpoint=step samples=n_samples correct=n_correct perplexity=perplexity trained=in_train"
    imported = import_file(store, data / "train.parquet", dict(pair.split("=") for pair in mapping.split()))
    assert (imported.lines, imported.rows, imported.runs, imported.checkpoints) == (381_123, 7_473, 13, 51)
    import_file(store, data / "test.parquet", {"run": "run", "checkpoint": "step", "test_accuracy": "test_accuracy"})
    curate.run(CONFIGS / "premem_gsm8k.yaml", store=store)
    found = summarise(curate.Store(store))
    fit = found.calibration
    assert fit.given.r2 == pytest.approx(0.9349, abs=2e-4)  # the published threshold, fixed beforehand
    assert fit.in_sample.r2 == pytest.approx(0.9354, abs=5e-4) and fit.threshold == pytest.approx(0.0983, abs=2e-3)
    assert fit.leave_one_run_out.r2 == pytest.approx(0.919, abs=6e-3)
    assert fit.baselines["train accuracy"].r2 < 0 < fit.baselines["first checkpoint's train accuracy"].r2 < 0.6
    premem = [v for v in found.values if v["name"] == "premem_accuracy"]
    assert len(premem) == 51 and {v["run"] for v in premem} == {
        v["run"] for v in found.values if v["name"] == "test_accuracy"
    }
    quarter = [v for v in premem if "quarter" in v["run"]]
    assert quarter and all(v["n"] < 2_000 for v in quarter)  # only the rows that this run trained on
    assert "best τ in-sample" in found.text()


def test_the_flip_table_of_a_published_dpo_run(shared, tmp_path):
    """Pythia-410m: what README's flip table says comes from these commands. Two SFT runs beside it are series of their own."""
    data, store = shared / "data" / "ld_llm_dpo_dynamics", curate.Store(tmp_path / "store", create=True)
    places = {"row": "idx", "checkpoint": "eval_step"}
    pairs = {"chosen_logp": "logp_chosen", "rejected_logp": "logp_rejected"}
    import_file(store, data / "prob_pythia410m_dpo.parquet", {**places, **pairs})
    for name in ("pythia410_baseline_sft_verify_argmax_bug", "qwen05_baseline_sft_checkbug"):
        import_file(store, data / f"{name}.parquet", {**places, "logp": "logp_chosen"})
    (flips,) = summarise(store).flips  # before any recipe
    assert [(c.before, c.now, c.n) for c in flips.cells] == [
        ("right", "right", 99), ("right", "wrong", 0), ("wrong", "right", 92), ("wrong", "wrong", 59),
    ]  # fmt: skip
    assert flips.cells[3].dpo_loss < 0.001  # a loss of nearly nothing, and still ranked wrong
    assert (flips.wrong, len(flips.path)) == (151, 50) and "61% (53% to 68%) are ranked right" in summarise(
        store
    ).text()
    (half,) = summarise(store, between=(0, 25)).flips
    assert [c.n for c in half.cells] == [99, 0, 50, 101]
    result = curate.run(CONFIGS / "dpo_dynamics.yaml", store=store.folder)
    assert {v.run for v in result.values} == {"prob_pythia410m_dpo"}
    found = {(v.name, v.step): v.value for v in result.values}
    assert found["flips_wrong_right", 49] == 92 / 250 and found["ranking_accuracy", 0] == 99 / 250
    counted = store.sql(
        "SELECT flipped, count(*) AS n, count(flip_step) AS known FROM scored WHERE kind = 'preference' GROUP BY 1 ORDER BY 1"
    )
    assert counted.rows() == [(0.0, 158, 0), (1.0, 92, 92)]
    per_run = store.sql(
        "SELECT run, count(DISTINCT step) AS k FROM trajectories WHERE target_logp IS NOT NULL GROUP BY 1"
    )
    assert per_run["k"].to_list() == [40, 40]


def test_gsm8k_text_through_sampling(shared, tmp_path, capsys):
    """A story model solves nothing; that the line holds, and says why it does not sample with vLLM, is the point."""
    over = {
        "source.limit": 12,
        "sampling.max_new_tokens": 16,
        "export.to": str(tmp_path / "easiest"),
        "select.keep": {"rows": 5},
    }
    result = curate.run(CONFIGS / "gsm8k_stories260k.yaml", set=over, store=tmp_path / "store", progress=Progress())
    assert "head size 8 is not supported by vLLM's CPU attention" in capsys.readouterr().err
    frame = result.store.sql("SELECT accuracy, target_nll, difficulty, n_samples FROM scored")
    assert frame["n_samples"].to_list() == [2.0] * 12 and frame["accuracy"].max() == 0
    assert frame["target_nll"].drop_nulls().min() > 3
    assert len(result.store.sql("SELECT * FROM samples")) == 24
    assert result.selection.counts["kept"] == 5 and len(result.dataset) == 5
