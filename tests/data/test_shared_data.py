"""Every folder of shared/data that holds rows: format, counts and defects, checked by hand against the files."""

from __future__ import annotations

import gzip
import json

import pytest

from curate.data import load, read, validate
from curate.errors import ValidationError
from curate.rows import Example

PANDALM = {"chosen": "response1", "rejected": "response2"}
SVAMP = {"question": "{Body} {Question}", "answer": "Answer"}

# file, columns, format, rows, bad rows, duplicates (rows that repeat an earlier good one)
FOLDERS = [
    ("hh_rlhf_harmless/pairs.parquet", None, "preference", 1156, 2, 0),
    ("hh_rlhf_harmless/raw_full_dialogues.jsonl.gz", None, "hh", 1156, 2, 0),
    ("pandalm_human_pairs/testset_v1.jsonl.gz", PANDALM, "alpaca_preference", 999, 61, 72),
    ("llmbar/pairs.parquet", None, "preference", 419, 0, 0),
    ("anthropic_persona/pairs.parquet", None, "preference", 7000, 0, 0),
    ("llamafactory_dpo_demo/dpo_en_demo.json", None, "sharegpt_preference", 300, 0, 5),
    ("llamafactory_dpo_demo/kto_en_demo.json", None, "kto", 300, 0, 0),
    ("gsm8k/train_half.parquet", None, "question_answer", 3737, 0, 0),
    ("gsm8k/test_half.parquet", None, "question_answer", 660, 0, 0),
    ("gsm8k/correct_vs_wrong_pairs.parquet", None, "preference", 1157, 0, 2),
    ("gsm8k/model_solutions.parquet", {"completion": "solution"}, "prompt_completion", 2640, 0, 2),
    ("svamp/svamp.parquet", SVAMP, "question_answer", 1000, 0, 0),
    ("knights_knaves/kk_half.parquet", None, "question_answer", 2500, 0, 0),
    ("knights_knaves/kk_half.parquet", {"completion": "cot"}, "prompt_completion", 2500, 0, 0),
    ("self_instruct_seed/sft.parquet", None, "alpaca", 427, 0, 0),
    ("gpteacher_codegen/codegen_half.parquet", None, "alpaca", 2268, 0, 0),
    ("ld_llm_probes/hh_helpful_formal_train.jsonl.gz", None, "preference", 500, 1, 0),
    (
        "ld_llm_probes/ultrafeedback_train_prompt_chosen.jsonl.gz",
        {"completion": "chosen"},
        "prompt_completion",
        500,
        0,
        0,
    ),
]


@pytest.mark.parametrize(("file", "columns", "format", "n_rows", "n_bad", "duplicates"), FOLDERS)
def test_a_real_file(shared, file, columns, format, n_rows, n_bad, duplicates):
    found = validate(shared / "data" / file, columns=columns)
    assert (found.format, found.n_rows, found.n_bad, found.duplicates) == (format, n_rows, n_bad, duplicates)


def test_raw_dialogues_split_as_published_pairs(shared):
    """All 1,156: the raw dialogues give the prompt, chosen and rejected of pairs.parquet, whose two blank replies are told of both."""
    folder = shared / "data" / "hh_rlhf_harmless"
    raw = list(read(folder / "raw_full_dialogues.jsonl.gz"))
    split = list(read(folder / "pairs.parquet"))
    assert [record.row for record in raw] == [record.row for record in split]
    assert [record.index for record in raw if record.row is None] == [258, 459]
    several = [record.index for record in raw if record.row and "\n\nAssistant:" in record.row.chosen]
    assert several == [627, 837, 1016]  # these dialogues part before their last reply
    assert validate(folder / "raw_full_dialogues.jsonl.gz").notes == (
        "3 rows have a reply of several turns; all of it counts as the reply.",
    )


def test_replies_that_begin_alike_are_not_cut(shared):
    """A plain character prefix would take the common beginning of two replies into the prompt: 231 of the raw rows have more than a space."""
    folder = shared / "data" / "hh_rlhf_harmless"
    with gzip.open(folder / "raw_full_dialogues.jsonl.gz", "rt") as file:
        dialogues = [json.loads(line) for line in file]
    longer = 0
    for record, dialogue in zip(read(folder / "raw_full_dialogues.jsonl.gz"), dialogues, strict=True):
        if record.row:
            assert record.row.prompt + record.row.chosen == dialogue["chosen"]
            assert record.row.prompt + record.row.rejected == dialogue["rejected"]
            longer += record.row.chosen[:2] == record.row.rejected[:2]
    assert longer == 231


def test_pandalm_names_its_defects(shared):
    found = validate(shared / "data" / "pandalm_human_pairs" / "testset_v1.jsonl.gz", columns=PANDALM)
    wrong_type = [(d.index, d.column, d.found) for d in found.defects if d.found != "blank"]
    assert wrong_type == [
        (row, f"response{response}", "true (bool)")
        for row, response in ((157, 1), (158, 1), (159, 1), (161, 2), (162, 2), (164, 1))
    ]
    assert [d.index for d in found.defects if d.column == "instruction"] == [466]


def test_real_unpaired_rows(shared):
    path = shared / "data" / "llamafactory_dpo_demo" / "kto_en_demo.json"
    rows = load(path)
    assert sum(row.label for row in rows) == 150
    assert all(len(row.completion) == 1 for row in rows)
    assert "300 rows are unpaired" in validate(path).notes[0]
    with pytest.raises(ValidationError, match="unpaired"):
        read(path, kind="preference")


def test_real_answers(shared):
    records = list(read(shared / "data" / "gsm8k" / "train_half.parquet"))
    assert [record.row.answer for record in records] == [record.columns["final_answer"] for record in records]
    svamp = load(shared / "data" / "svamp" / "svamp.parquet", columns=SVAMP)
    assert svamp[0] == Example(
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack How much do you have to pay to buy each pack?",
        "51",
        answer="51",
    )


def test_real_prompts_repeat(shared):
    notes = validate(shared / "data" / "gsm8k" / "correct_vs_wrong_pairs.parquet").notes
    assert notes[0] == "350 prompts occur in more than one row: 1155 of 1155 distinct rows, the commonest in 4 of them."


def test_real_sharegpt_pairs(shared):
    rows = load(shared / "data" / "llamafactory_dpo_demo" / "dpo_en_demo.json")
    assert sum(row.prompt[0]["role"] == "system" for row in rows) == 80
    assert {row.prompt[-1]["role"] for row in rows} == {"user"}
    assert {turn["role"] for row in rows for turn in (*row.chosen, *row.rejected)} == {"assistant"}


def test_tables_that_are_no_rows(shared):
    for file in ("premem_gsm8k/runs.csv", "ld_llm_dpo_dynamics/prob_pythia410m_dpo.parquet"):
        with pytest.raises(ValidationError, match="no known format has the columns"):
            read(shared / "data" / file)
