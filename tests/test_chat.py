"""Rows through chat templates: TRL's own tokenised rows are the oracle; what a template leaves out, refuses or dates is counted and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import curate
from curate.console import Progress
from curate.errors import ModelError, UsageError
from curate.passes.chat import DATE, as_chat, template_of
from curate.passes.tokens import Limits, encode, encode_prompt
from curate.recipe.load import load_recipe
from curate.rows import Example, Pair
from curate.workflow.run import make_plan
from tests.test_tokens import make_tokenizer, messages, words
from tests.tiny_models import make_llama
from tests.tiny_models import make_tokenizer as make_characters

TURNS = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] END }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TEMPLATES = {
    "eos": TURNS.replace("END", "+ eos_token + '\n'"),
    "no end": TURNS.replace("END", "+ '\n'"),
    "no end, no newline": TURNS.replace("END", ""),
    "strips": TURNS.replace("m['content']", "m['content'] | trim").replace("END", "+ eos_token"),
    "own think": TURNS.replace("END", "+ eos_token").replace("assistant: '", "assistant: a.'"),
}


def first_trained(row: dict) -> int:
    return next(i for i, label in enumerate(row["labels"]) if label != -100)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_very_ids_of_trl(name, tmp_path):
    """TRL's `_prepare_dataset` on preference, implicit prompts, prompt/completion and messages, for SFT and DPO."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = make_characters()
    tokenizer.chat_template = TEMPLATES[name]
    asked, good, bad = messages("user: who is lily"), messages("assistant: a girl "), messages("assistant: a cat.")

    class Bare:
        _tokenizer, chat_template, completion_only_loss = tokenizer, None, True
        _is_vision_dataset = False

    class Args:
        dataset_num_proc, max_length, truncation_mode, dataset_text_field = None, None, "keep_start", "text"
        assistant_only_loss, packing, eval_packing, shuffle_dataset = False, False, False, False

    def dpo(row):
        return DPOTrainer._prepare_dataset(Bare(), Dataset.from_list([row]), tokenizer, Args(), "train")[0]

    pair = encode(Pair(asked, good, bad), tokenizer)
    for row in (
        {"prompt": list(asked), "chosen": list(good), "rejected": list(bad)},
        {"chosen": list(asked + good), "rejected": list(asked + bad)},
    ):
        theirs = dpo(row)
        for side in ("chosen", "rejected"):
            ours = getattr(pair, side)
            assert ours.ids.tolist() == theirs["prompt_ids"] + theirs[f"{side}_ids"]
            assert ours.start == len(theirs["prompt_ids"])
    text = encode(Pair("who", " a girl", " a cat</s>"), tokenizer)
    theirs = dpo({"prompt": "who", "chosen": " a girl", "rejected": " a cat</s>"})
    assert text.chosen.ids.tolist() == theirs["prompt_ids"] + theirs["chosen_ids"]
    assert text.rejected.ids.tolist() == theirs["prompt_ids"] + theirs["rejected_ids"]

    def sft(row):
        prepare = SFTTrainer._prepare_dataset
        return prepare(Bare(), Dataset.from_list([row]), tokenizer, Args(), False, None, "train")[0]

    ours = encode(Example(asked, good), tokenizer)
    theirs = sft({"prompt": list(asked), "completion": list(good)})
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.start == first_trained(theirs)
    assert ours.ids.tolist() == sft({"messages": list(asked + good)})["input_ids"]
    ours, theirs = encode(Example("who", " a girl"), tokenizer), sft({"prompt": "who", "completion": " a girl"})
    assert ours.ids.tolist() == theirs["input_ids"] and ours.start == first_trained(theirs)


def test_what_is_known_of_a_template():
    tokenizer = make_characters()
    assert template_of(tokenizer) is None
    tokenizer.chat_template = TEMPLATES["no end"]
    found = template_of(tokenizer, [1])
    assert (found.end, found.eos, found.stops) == (None, "</s>", ("</s>", "<s>"))
    tokenizer.chat_template = TEMPLATES["eos"]
    assert template_of(tokenizer).end == "</s>" and template_of(tokenizer).keeps_reasoning
    assert template_of(make_tokenizer()).end == "<end>"


def test_a_date_is_the_same_on_every_day():
    tokenizer = make_characters()
    tokenizer.chat_template = "{{ strftime_now('%d %m %Y') + ' ' }}" + TEMPLATES["eos"]
    assert template_of(tokenizer).dated
    assert encode_prompt(Example(messages("user: hi")), tokenizer).text.startswith(f"{DATE:%d %m %Y} <s>user")


STRIPPING = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}{{ m['role'] + ' ' + c + '</s>' }}{% endfor %}"
)


def test_replies_that_become_the_same_tokens_have_no_gap_of_0():
    tokenizer = make_characters()
    tokenizer.chat_template = STRIPPING
    ask = messages("user: how many")
    said = [({"role": "assistant", "content": f"<think>{why}</think>two."},) for why in ("a and b", "b and c")]
    pair = encode(Pair(ask, *said), tokenizer)
    assert pair.left_out == ("reply",)
    assert "same tokens" in pair.problem and "chat template leaves out" in pair.problem
    other = encode(Pair(ask, said[0], messages("assistant: ten.")), tokenizer)
    assert (other.problem, other.left_out) == (None, ("reply",))
    assert encode(Pair("how many", " two", "  two"), make_tokenizer()).problem.endswith(
        "tokenizer leaves out what tells them apart"
    )
    cut = encode(Pair("hi", " you good", " you bad"), make_tokenizer(), Limits(3))
    assert (cut.problem, cut.cut_alike) == (None, True)


def test_plain_rows_as_a_chat():
    tokenizer = make_tokenizer()
    encoded = encode(Example("hi", "good"), tokenizer, Limits(chat=True))
    assert words(encoded.ids) == "<s> <user> hi <end> <assistant> good <end>"
    assert words(encoded.ids[encoded.start :]) == "good <end>"
    prompt = encode_prompt(
        Example("hi", answer="4"), tokenizer, system="be kind", few_shot="you ", limits=Limits(chat=True)
    )
    assert [m["role"] for m in prompt.messages] == ["system", "user"] and prompt.messages[1]["content"] == "you hi"
    assert as_chat(Example(messages("user: hi"), None)) == Example(messages("user: hi"), None)
    with pytest.raises(ModelError, match="chat template"):
        encode(Example("hi", "good"), make_tokenizer(None), Limits(chat=True))


# ---- the whole line -------------------------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"what is {i} plus 1?", "answer": str(i + 1)} for i in range(6)]
TEXTS = [{"prompt": f"what is {i} plus 1?", "completion": f" it is {i + 1}."} for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("chat") / "model", seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATES["eos"])
    return folder


def recipe(folder: Path, model: Path, rows: list[dict], **more):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "kind": "sft",
        "source": str(folder / "rows.jsonl"),
        "store": str(folder / "store"),
        "models": {"reference": str(model)},
    }
    given |= {"scores": ["target_nll"], "select": {}, "export": {"to": str(folder / "out")}}
    return given | more


def planned(given) -> str:
    return make_plan(load_recipe(given), progress=Progress(quiet=True)).text()


def exported(folder: Path) -> dict:
    import pyarrow.parquet as parquet

    return parquet.read_table(folder / "out" / "data" / "train-00000.parquet").to_pylist()[0]


def test_questions_are_asked_as_a_chat_and_exported_as_messages(tmp_path, model):
    given = recipe(tmp_path, model, QUESTIONS)
    assert "asked and measured as messages, through the chat template of model (tokens.chat: auto)" in planned(given)
    found = curate.run(given)
    auto = found.store.scored()["target_nll"].to_list()
    row = exported(tmp_path)
    assert row["prompt"] == [{"role": "user", "content": "what is 0 plus 1?"}]
    assert row["completion"] == [{"role": "assistant", "content": "1"}]
    assert "measured as messages" in (tmp_path / "out" / "README.md").read_text()
    as_messages = [
        {"messages": as_chat(Example(q["question"], q["answer"])).prompt + as_chat(Example("", q["answer"])).completion}
        for q in QUESTIONS
    ]
    (tmp_path / "m").mkdir()
    plain = curate.run(recipe(tmp_path / "m", model, [{"messages": list(r["messages"])} for r in as_messages]))
    assert plain.store.scored()["target_nll"].to_list() == pytest.approx(auto)  # the same rows given as messages
    never = {**given, "tokens": {"chat": "never"}}
    assert "chat template" not in planned(never)
    again = curate.run(never)
    assert again.measured and again.store.scored()["target_nll"].to_list() != pytest.approx(auto)
    assert exported(tmp_path)["prompt"] == "what is 0 plus 1?"
    assert "without a chat template (tokens.chat: never)" in (tmp_path / "out" / "README.md").read_text()
    assert "Everything is measured already" in planned(given)


def test_prompt_and_completion_text_stays_plain_and_both_ways_out_are_named(tmp_path, model):
    given = recipe(tmp_path, model, TEXTS)
    told = planned(given)
    assert "plain text, as TRL trains them" in told and "tokens.chat=always" in told and "tokens.chat=never" in told
    curate.run(given)
    assert exported(tmp_path)["completion"] == " it is 1."
    always = curate.run({**given, "tokens": {"chat": "always"}})
    assert always.measured and exported(tmp_path)["prompt"][0]["role"] == "user"


def test_always_needs_a_template_and_mixed_sources_a_decision(tmp_path, model):
    bare = make_llama(tmp_path / "bare", seed=0)
    with pytest.raises(ModelError, match="tokens.chat is always, but the tokenizer of bare has no chat template"):
        planned(recipe(tmp_path, bare, TEXTS, tokens={"chat": "always"}))
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    given = recipe(tmp_path, model, TEXTS)
    given["source"] = [given["source"], str(tmp_path / "more.jsonl")]
    with pytest.raises(UsageError, match="prompt_completion, question_answer"):
        planned(given)


def test_fingerprints_change_only_where_values_were_wrong(tmp_path, model):
    """Prompt/completion text, and questions on a model without a template, keep the parameters of earlier versions."""
    bare = make_llama(tmp_path / "bare", seed=0)
    for where, rows, wanted in ((model, TEXTS, {}), (bare, QUESTIONS, {}), (model, QUESTIONS, {"chat": True})):
        folder = tmp_path / f"{where.name}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        plan = make_plan(load_recipe(recipe(folder, where, rows)), progress=Progress(quiet=True))
        for step in plan.steps:
            for task in step.tasks:
                kept = {
                    k: v for k, v in task.measured.params.items() if k not in ("tokenizer", "max_length", "truncation")
                }
                assert kept == wanted


def test_a_template_without_an_end_is_said(tmp_path, model):
    no_end = make_llama(tmp_path / "open", seed=0, template=True)
    rows = [
        {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": f"lily {i}"}]}
        for i in range(3)
    ]
    given = recipe(tmp_path, no_end, rows)
    assert "ends a reply with no special token" in planned(given)
    found = curate.run(given)
    assert found.store.scored()["completion_tokens"].to_list() == [len(" lily 0\n")] * 3
    assert {m.params.get("template_end") for m in found.store.measured()} == {"none"}
    assert "ends a reply with no special token" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_template_drops_or_refuses_is_counted_before_anything_runs(tmp_path):
    dropping = make_llama(tmp_path / "model", seed=0)
    template = TEMPLATES["eos"].replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    (dropping / "chat_template.jinja").write_text(refusing + template)
    user, reply = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "lily"}
    rows = [{"messages": [{"role": "system", "content": "be kind"}, user, reply]}, {"messages": [user, reply]}]
    rows += [{"messages": [{**user, "content": "no"}, reply]}]
    told = planned(recipe(tmp_path, dropping, rows))
    assert "leaves out text of a system turn in 1 of 3 rows" in told
    assert "1 of 3 rows cannot be measured: the chat template refuses these messages" in told and "not that" in told
    assert "The first is" in told and "rows.jsonl, row 3." in told


WANTS_A_SYSTEM_TURN = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with a system turn') }}{% endif %}"
    + TEMPLATES["eos"]
)
WANTS_A_TOOL = (
    "{% if messages[0]['role'] != 'tool' %}{{ raise_exception('begin with a tool') }}{% endif %}" + TEMPLATES["eos"]
)


def test_a_template_that_refuses_a_question_is_not_one_without_an_end(tmp_path):
    """Asked as it wants to be asked, it ends replies; where no conversation of ours suits it, its own words are said."""
    tokenizer = make_characters()
    tokenizer.chat_template = WANTS_A_SYSTEM_TURN
    assert (template_of(tokenizer).end, template_of(tokenizer).refuses) == ("</s>", None)
    tokenizer.chat_template = WANTS_A_TOOL
    found = template_of(tokenizer)
    assert found.end is None and "begin with a tool" in found.refuses
    refusing = make_llama(tmp_path / "model", seed=0)
    (refusing / "chat_template.jinja").write_text(WANTS_A_TOOL)
    user, reply = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "lily"}
    rows = [{"messages": [{"role": "tool", "content": f"t{i}"}, user, reply]} for i in range(2)] + [
        {"messages": [user, reply]}
    ]
    told = planned(recipe(tmp_path, refusing, rows))
    assert "no special token" not in told and "begin with a tool" in told
    assert "1 of 3 rows cannot be measured" in told and "rows.jsonl, row 3." in told
    curate.run(recipe(tmp_path, refusing, rows))
    assert "no special token" not in (tmp_path / "out" / "README.md").read_text()


# ---- a tokenizer that does not fit ----------------------------------------------------------------------------------------------------------


def more_tokens(model: Path, *tokens: str, special: dict | None = None) -> Path:
    tokenizer = make_characters(template=True)
    tokenizer.add_tokens(list(tokens))
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(model)
    return model


def test_tokens_without_an_embedding(tmp_path):
    model = more_tokens(make_llama(tmp_path / "model", seed=0), "[think]")
    n = len(make_characters())
    with pytest.raises(
        ModelError, match=rf"'\[think\]' has id {n}, but the model has {n} embeddings \(ids 0 to {n - 1}\)"
    ) as error:
        planned(recipe(tmp_path, model, [*TEXTS, {"prompt": "hm", "completion": "[think] yes"}]))
    assert "1 of the rows use" in str(error.value) and "resize_token_embeddings" in str(error.value)
    (tmp_path / "b").mkdir()
    given = recipe(tmp_path / "b", model, TEXTS)
    assert "No row uses it" in planned(given)
    assert curate.run(given).store.scored()["target_nll"].null_count() == 0
    more_tokens(model, special={"eos_token": "[end]"})
    with pytest.raises(ModelError, match="is its end or another special token"):
        planned(given | {"store": str(tmp_path / "b" / "other")})


def test_a_tokenizer_of_another_model(tmp_path):
    from tests.test_tokens import WORDS

    model = make_llama(tmp_path / "model", seed=0)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"{word}{i}": len(vocabulary) + i for i, word in enumerate(WORDS)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="the tokenizer in model is another model's"):
        planned(recipe(tmp_path, model, TEXTS))


def test_padding_beyond_the_table_and_quantised_weights(tmp_path):
    model = make_llama(tmp_path / "model", seed=0)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 4000}))
    with pytest.raises(ModelError, match="pad_token_id 4000"):
        planned(recipe(tmp_path, model, TEXTS))
    (model / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        planned(recipe(tmp_path, model, TEXTS))
