"""Token ids and what of them is trained are TRL's, row by row, under templates with the habits of today's models: DPO, SFT on the last turn and on
all of them (`assistant_only_loss`), both truncations, with tools and reasoning. What cannot be TRL's is refused with its reason.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import curate
from curate.data import read
from curate.errors import UsageError
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import backward
from curate.passes.loading.model import load_model
from curate.passes.tokens import Encoded, Limits, encode
from curate.plan.rendered_rows import ENDS, look, lost_text
from curate.rows import Example
from tests.tiny_models import make_bytes_tokenizer, make_llama, make_tokenizer

CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% if tools %}# Tools {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\nSAYS<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("SAYS", "{{ m.content or '' }}" + CALLS)
MARKED = CHATML.replace(
    "{{ m.role }}\n{{ m.content or '' }}" + CALLS + "<|im_end|>\n",
    "{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}" + CALLS + "<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content or '' }}<|im_end|>{% endif %}\n",
)  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "llama3": (  # header ids, BOS in the template, text trimmed
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if loop.first and tools %}Tools: {{ tools | tojson }}{% endif %}{{ (m.content or '') | trim }}" + CALLS + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (  # turns alternate, the system's text is put into the last user turn
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{{ bos_token }}"
        "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{% if loop.last and tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST] "
        "{% if system and (loop.last or loop.index == turns | length - 1) %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content or '' }}" + CALLS + "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (  # no system turn, turns alternate, its own role
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ (m.content or '') | trim }}<end_of_turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "qwen3": (  # reasoning is left out of all turns but the last, whose block is there even when empty
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
        "{{ (m.content or '').split('</think>')[-1] }}" + CALLS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "opens thinking": (  # the prompt ends with a text that the whole does not have there
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}" + CALLS + "</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, AGAIN = turn("user", "Is it cold in Oslo?"), turn("user", " And tomorrow, then? ")
FIRST = turn("assistant", "Yes, very.", reasoning_content="It is winter.")
LAST, OTHER = turn("assistant", " Colder still.", reasoning_content="A front comes."), turn("assistant", "Who knows.")
CONVERSATIONS = {
    "plain": {"prompt": [ASKED, FIRST, AGAIN]},
    "tools": {"prompt": [ASKED], "last": turn("assistant", None, tool_calls=[CALL]), "tools": [TOOL]},
    "settings": {"prompt": [ASKED, FIRST, AGAIN], "chat_template_kwargs": {"enable_thinking": False}},
    "system": {"prompt": [turn("system", "Be short."), ASKED, FIRST, AGAIN]},
    "in a row": {"prompt": [ASKED, AGAIN]},
}
REFUSED = {("gemma", "system"): "System role not supported", ("mistral", "in a row"): "roles must alternate"}


def rows_of(folder, kind, names=CONVERSATIONS):
    """(rows as they are trained on, as we read them)."""
    given = []
    for name in names:
        row = dict(CONVERSATIONS[name])
        last = [row.pop("last", LAST)]
        given.append({**row, "completion": last} if kind == "sft" else {**row, "chosen": last, "rejected": [OTHER]})
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return given, [record.row for record in read(folder / f"{kind}.jsonl").good("error")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_bytes_tokenizer()


class Bare:
    """What `_prepare_dataset` reads of a trainer."""

    _is_vision_dataset, chat_template = False, None

    def __init__(self, tokenizer, completion_only=True):
        self._tokenizer, self.completion_only_loss = tokenizer, completion_only


class Settings:
    dataset_num_proc, dataset_text_field = None, "text"
    packing = eval_packing = shuffle_dataset = False

    def __init__(self, limits):
        self.max_length, self.truncation_mode = limits.max_length, limits.truncation
        self.assistant_only_loss = limits.turns == "all"


def lazy(rows):
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter(rows))  # whose rows keep the keys that they have


def trls_examples(rows, tokenizer, limits):
    """(ids, positions that are trained) of each row that SFTTrainer keeps."""
    from trl.trainer.sft_trainer import SFTTrainer

    me, settings = Bare(tokenizer, completion_only=limits.turns == "last"), Settings(limits)
    made = SFTTrainer._prepare_dataset(me, lazy(rows), tokenizer, settings, False, None, "train")
    for row in made:
        labels = np.array(row["labels"])
        yield (
            row["input_ids"],
            [i for i in np.flatnonzero(labels != -100).tolist() if i],
        )  # nothing predicts a first token


def trls_pairs(rows, tokenizer, limits):
    """[(ids, positions that are trained) of chosen and rejected] of each row that DPOTrainer keeps."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    collate = DataCollatorForPreference(0, max_length=limits.max_length, truncation_mode=limits.truncation)
    for row in DPOTrainer._prepare_dataset(Bare(tokenizer), lazy(rows), tokenizer, Settings(limits), "train"):
        batch = collate([row])
        sides = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
        yield [
            (ids[there == 1].tolist(), [i for i in torch.nonzero(trained[there == 1])[:, 0].tolist() if i])
            for ids, there, trained in sides
        ]


def ours(encoded):
    at = np.arange(encoded.start, len(encoded.ids)) if encoded.counted is None else encoded.counted
    return encoded.ids.tolist(), at.tolist()


LIMITS = [Limits(), Limits(150, "keep_start"), Limits(60, "keep_end")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_what_is_trained_are_trls(tmp_path, tokenizer, name):
    pytest.importorskip("trl")
    tokenizer.chat_template = TEMPLATES[name]
    cut = 0
    for kind, trls in (("sft", trls_examples), ("preference", trls_pairs)):
        for raw, row, called in zip(*rows_of(tmp_path, kind), CONVERSATIONS, strict=True):
            for limits in LIMITS:
                encoded = encode(row, tokenizer, limits)
                if (name, called) in REFUSED:
                    assert (
                        f"the chat template refuses these messages (TemplateError: {REFUSED[name, called]}"
                        in encoded.problem
                    )
                    continue
                theirs = list(trls([raw], tokenizer, limits))
                if encoded.problem is not None:  # TRL leaves the row out too
                    assert theirs == [] and "nothing of the response is left" in encoded.problem
                    continue
                mine = ours(encoded) if kind == "sft" else [ours(encoded.chosen), ours(encoded.rejected)]
                assert mine == theirs[0]
                cut += encoded.truncated
    assert cut > 4


def test_all_turns_are_those_of_assistant_only_loss(tmp_path, tokenizer):
    pytest.importorskip("trl")
    tokenizer.chat_template = MARKED
    for raw, row, called in zip(*rows_of(tmp_path, "sft"), CONVERSATIONS, strict=True):
        for limits in (Limits(limit.max_length, limit.truncation, turns="all") for limit in LIMITS):
            encoded = encode(row, tokenizer, limits)
            theirs = list(trls_examples([raw], tokenizer, limits))
            if encoded.problem is not None:
                assert theirs == [] and encoded.problem == "no token of an assistant turn is left within max_length"
                continue
            assert ours(encoded) == theirs[0], called
    _, (plain, *_) = rows_of(tmp_path, "sft")
    counted = encode(plain, tokenizer, Limits(turns="all"))
    said = tokenizer.decode(counted.ids[counted.counted])
    assert said == "Yes, very.<|im_end|> Colder still.<|im_end|>" and counted.n_response == len(counted.counted)
    assert MEASUREMENTS["completion_length"].function(counted)["prompt_tokens"] == len(counted.ids) - len(said)


def test_turns_without_markers_are_found_by_rendering_or_refused(tmp_path, tokenizer):
    """The last turn is what `last` measures; a turn that is rendered otherwise once others follow it stands nowhere that is known."""
    _, rows = rows_of(tmp_path, "sft", ["plain", "tools", "system"])
    for name in ("chatml", "llama3"):
        tokenizer.chat_template = TEMPLATES[name]
        for row in rows:
            every, last = encode(row, tokenizer, Limits(turns="all")), encode(row, tokenizer)
            text = tokenizer.decode(every.ids[every.counted])
            assert every.ids.tolist() == last.ids.tolist() and text.endswith(tokenizer.decode(last.ids[last.start :]))
            assert text.startswith("Yes, very.") == (len(row.prompt) > 1) and "cold in" not in text
    tokenizer.chat_template = TEMPLATES["qwen3"]
    thinking, called, _ = (encode(row, tokenizer, Limits(turns="all")) for row in rows)
    assert (
        "renders turn 2 otherwise once other turns follow it" in thinking.problem
        and "{% generation %}" in thinking.problem
    )
    assert called.problem is None
    greeted = Example(
        (OTHER, ASKED), (OTHER,)
    )  # its first turn stands behind the template's words for it, which do not count
    for name, end in (("chatml", "<|im_end|>\n"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>\n")):
        tokenizer.chat_template = TEMPLATES[name]
        every = encode(greeted, tokenizer, Limits(turns="all"))
        assert tokenizer.decode(every.ids[every.counted]) == f"Who knows.{end}" * 2
    tokenizer.chat_template = TEMPLATES["opens thinking"]
    assert "begins with a turn of the assistant's" in encode(greeted, tokenizer, Limits(turns="all")).problem
    tokenizer.chat_template = TEMPLATES["mistral"]
    assert "renders turn 3 otherwise" in encode(rows[2], tokenizer, Limits(turns="all")).problem


def test_a_prompt_that_ends_otherwise_before_an_answer_is_said(tmp_path, tokenizer):
    """Its boundary is TRL's; what the model is asked with and is not trained after is counted."""
    _, rows = rows_of(tmp_path, "sft", ["plain", "tools"])
    tokenizer.chat_template = TEMPLATES["opens thinking"]
    counts = look(rows, tokenizer, chat=False)
    assert counts["the prompt ends with '<|assistant|><think>\\n'"] == 2
    told = " ".join(lost_text(counts, 2, 2, "R1"))
    assert (
        "ends the prompt with '<|assistant|><think>\\n' where an answer is to come" in told and "in 2 of 2 rows" in told
    )
    for name in ("chatml", "llama3", "gemma"):
        tokenizer.chat_template = TEMPLATES[name]
        assert not any(what.startswith(ENDS) for what in look(rows, tokenizer, chat=False))


def test_every_pass_counts_the_turns_alone(tmp_path):
    """Log-probability, error and entropy against plain transformers; the gradient against autograd's, of the same tokens."""
    folder = make_llama(tmp_path / "model", seed=0)
    rng = np.random.default_rng(0)
    rows = [
        Encoded(rng.integers(3, 40, n).astype(np.int32), start, counted=np.array(at))
        for n, start, at in ((30, 20, [4, 5, 6, 20, 21, 29]), (24, 22, [1, 22, 23]))
    ]
    names = ("target_likelihood", "target_error", "loss_gradient")
    with load_model(folder, dtype="float64", device="cpu") as model:
        found = backward.measure(model, rows, [MEASUREMENTS[name] for name in names])
        alone = forward.measure(model, rows, [MEASUREMENTS["target_likelihood"]])
        assert np.allclose(alone["target_logp"], found["target_logp"], rtol=1e-10)
        for i, row in enumerate(rows):
            ids = torch.from_numpy(row.ids.astype(np.int64))[None]
            parameters = [p.requires_grad_() for p in model.module.parameters()]
            logp = model.module(input_ids=ids).logits[0].log_softmax(-1)[row.counted - 1]  # (n, V)
            own = logp.gather(1, ids[0, row.counted, None])[:, 0]
            gradient = torch.autograd.grad(-own.mean(), parameters)
            norm = sum(float(g.square().sum()) for g in gradient) ** 0.5
            error = (logp.exp() - torch.nn.functional.one_hot(ids[0, row.counted], logp.shape[1])).norm(dim=1).mean()
            assert np.isclose(found["target_logp"][i], float(own.sum().detach()), rtol=1e-9)
            assert np.isclose(found["target_nll"][i], float(-own.mean().detach()), rtol=1e-9)
            assert np.isclose(found["target_error"][i], float(error.detach()), rtol=1e-9)
            assert np.isclose(found["loss_gradient"][i], norm, rtol=1e-7)


def recipe(tmp_path, **more):
    raw = {
        "kind": "sft",
        "source": "sft.jsonl",
        "models": {"reference": "model"},
        "engine": {"device": "cpu"},
        "scores": ["target_nll"],
        "select": {},
        "export": {"to": "out"},
    }
    return {**raw, **more}


def test_the_line_measures_all_turns_and_exports_them_as_they_train(tmp_path, monkeypatch):
    """In the fingerprint only where it is set; said in the plan and the card; what cannot count turns is refused before anything runs."""
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    rows_of(tmp_path, "sft", ["plain", "system"])
    tokenizer = make_tokenizer()
    make_llama(tmp_path / "model", seed=0, context=512)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(tmp_path / "model")
    every = curate.run(recipe(tmp_path, tokens={"turns": "all"}))
    assert all(m.params["turns"] == "all" for m in every.store.measured())
    by_turns = every.store.sql("SELECT target_nll, prompt_tokens, completion_tokens FROM scored ORDER BY position")
    encoded = [
        encode(row, tokenizer, Limits(1024, turns="all")) for row in rows_of(tmp_path, "sft", ["plain", "system"])[1]
    ]
    with load_model(tmp_path / "model", device="cpu") as model:
        nll = forward.measure(model, encoded, [MEASUREMENTS["target_likelihood"]])["target_nll"]
    assert np.allclose(by_turns["target_nll"], nll, rtol=1e-5)
    assert by_turns["completion_tokens"].to_list() == [len(one.counted) for one in encoded]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Every assistant turn of a row counts" in card and "assistant_only_loss=True" in card
    args = json.loads((tmp_path / "out" / "trainer_args.json").read_text())
    config = trl.SFTConfig(output_dir=str(tmp_path / "trained"), use_cpu=True, bf16=False, report_to="none", **args)
    assert config.assistant_only_loss and config.completion_only_loss is False
    for kind, tokens, scores, words in (
        ("sft", "all", ["ifd"], "alone_nll, which is of one completion after its prompt, and tokens.turns: all"),
        ("sft", "all", ["neighbour_excess"], "neighbour_nll, which is of one completion"),
        ("preference", "all", [], "tokens.turns: all is for kind: sft"),
    ):
        with pytest.raises(UsageError, match="tokens.turns=last") as error:
            curate.run(recipe(tmp_path, kind=kind, tokens={"turns": tokens}, scores=scores))
        assert words in str(error.value)
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "who", "completion": " a girl"}) + "\n")
    with pytest.raises(UsageError, match="rows of plain text, which have none"):
        curate.run(recipe(tmp_path, source="text.jsonl", tokens={"turns": "all"}, store="other"))
    from curate.passes.chat import template_of
    from curate.plan.rendering import Rendering

    tokenizer.chat_template = CHATML
    unmarked = Rendering(False, False, True, template_of(tokenizer), turns="all")
    assert unmarked.params(MEASUREMENTS["target_likelihood"])["turns"] == "all, by rendering"
    assert "turns" not in replace(unmarked, turns="last").params(MEASUREMENTS["likelihood"])
    assert "has no {% generation %}" in "".join(unmarked.notes("model", "auto"))
