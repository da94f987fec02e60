"""Boundaries, BOS and EOS, shared prefixes and truncation, by hand tables; what TRL makes of the same rows is the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from curate.errors import ModelError, ValidationError
from curate.passes.tokenizer import context_length, load_tokenizer, tokenizer_fingerprint
from curate.passes.tokens import Encoded, EncodedPair, Limits, common_prefix, encode, encode_prompt
from curate.rows import Example, Pair

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<user>",
    "<assistant>",
    "<end>",
    "hi",
    "there",
    "you",
    "good",
    "bad",
    "be",
    "kind",
    "\n",
]
TEMPLATE = (  # <s> once, each turn closed by <end>, as most templates do
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
OPEN_TEMPLATE = TEMPLATE.replace(" + ' <end>'", "")  # closes nothing


def make_tokenizer(template: str | None = TEMPLATE):
    """One token per word; <s> in front of plain text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(w, special=True) for w in ("<user>", "<assistant>", "<end>")]}
    )
    return tokenizer


def words(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def messages(*turns: str):
    return tuple({"role": role, "content": text} for role, text in (turn.split(": ") for turn in turns))


def test_plain_pair():
    pair = encode(Pair("hi there", " good you", " bad"), make_tokenizer())
    assert isinstance(pair, EncodedPair)
    assert words(pair.chosen.ids) == "<s> hi there good you </s>"
    assert words(pair.rejected.ids) == "<s> hi there bad </s>"
    assert (pair.chosen.start, pair.rejected.start, pair.shared) == (3, 3, 3)
    assert (pair.chosen.n_response, pair.rejected.n_response) == (3, 2)
    assert not pair.truncated
    assert pair.problem is None


def test_shared_prefix_reaches_into_the_responses():
    pair = encode(Pair("hi", " you good", " you bad"), make_tokenizer())
    assert (pair.chosen.start, pair.shared) == (2, 3)


@pytest.mark.parametrize(
    "completion, wanted",
    [
        (" good", "<s> hi good </s>"),
        (" good </s>", "<s> hi good </s>"),  # the row brings its EOS: not a second one
        (" ", "<s> hi </s>"),  # blank: only the end is predicted
    ],
)
def test_eos_is_appended_once(completion, wanted):
    assert words(encode(Example("hi", completion), make_tokenizer()).ids) == wanted


def test_one_bos_at_most():
    encoded = encode(Example("<s> hi", " good"), make_tokenizer())
    assert words(encoded.ids) == "<s> hi good </s>"
    assert encoded.start == 2


def test_tokenizer_that_appends_eos_by_itself():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoded = encode(Example("hi", " good"), tokenizer)
    assert (words(encoded.ids), encoded.start) == ("<s> hi good </s>", 2)


def test_template_that_closes_its_turns():
    row = Pair(messages("user: hi"), messages("assistant: good"), messages("assistant: bad you"))
    pair = encode(row, make_tokenizer())
    assert words(pair.chosen.ids) == "<s> <user> hi <end> <assistant> good <end>"
    assert (pair.chosen.start, pair.shared) == (5, 5)
    assert words(pair.rejected.ids[5:]) == "bad you <end>"


def test_template_that_closes_nothing_gets_no_eos_of_ours():
    """TRL trains none there, so none is measured (it was, until 2026-11)."""
    row = Example(messages("user: hi", "assistant: you", "user: there"), messages("assistant: good"))
    encoded = encode(row, make_tokenizer(OPEN_TEMPLATE))
    assert words(encoded.ids) == "<s> <user> hi <assistant> you <user> there <assistant> good"
    assert words(encoded.ids[encoded.start :]) == "good"


def test_system_turn_stays_in_the_prompt():
    row = Example(messages("user: be kind", "user: hi"), messages("assistant: good"))
    encoded = encode(row, make_tokenizer())
    assert words(encoded.ids[: encoded.start]) == "<s> <user> be kind <end> <user> hi <end> <assistant>"


def test_no_template_is_said_with_the_next_step():
    with pytest.raises(ModelError, match="chat template") as error:
        encode(Example(messages("user: hi"), messages("assistant: good")), make_tokenizer(None))
    assert "plain text" in str(error.value)


def test_template_that_refuses_is_the_rows_problem():
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    assert (
        "roles must alternate" in encode(Example(messages("user: hi"), messages("assistant: good")), tokenizer).problem
    )
    row = Pair(messages("user: hi"), messages("assistant: good"), messages("assistant: bad"))
    assert "roles must alternate" in encode(row, tokenizer).problem


def test_no_completion():
    encoded = encode(Example("hi there", None, answer="4"), make_tokenizer())
    assert encoded.problem == "the row has no completion"
    assert (words(encoded.ids), encoded.start, encoded.n_response) == ("<s> hi there", 3, 0)


@pytest.mark.parametrize(
    "prompt, limits, wanted",
    [
        ("hi there", Limits(), "hi there"),
        (messages("user: hi there"), Limits(), "hi there"),
        (messages("system: be kind", "user: hi there you"), Limits(), "hi there you"),
        (messages("user: hi", "assistant: good", "user: you"), Limits(), "you"),
        (messages("user: hi hi"), Limits(), "hi hi"),  # what is left out may begin and end alike
        (messages("assistant: hi"), Limits(), None),
        (messages("user: hi there you"), Limits(5, "keep_end"), "you"),  # you <end> <assistant> good <end>
    ],
)
def test_question(prompt, limits, wanted):
    response = " good" if isinstance(prompt, str) else messages("assistant: good")
    encoded = encode(Example(prompt, response), make_tokenizer(), limits)
    found = encoded.question and words(encoded.ids[slice(*encoded.question)])
    assert found == wanted


LONG = Pair("hi there", " good you be", " bad")  # 7 and 5 tokens, start 3


@pytest.mark.parametrize(
    "limits, chosen, rejected, start, problem",
    [
        (Limits(7), "<s> hi there good you be </s>", "<s> hi there bad </s>", 3, None),
        (Limits(5), "<s> hi there good you", "<s> hi there bad </s>", 3, None),
        (Limits(4), "<s> hi there good", "<s> hi there bad", 3, None),
        (Limits(3), "<s> hi there", "<s> hi there", 3, "the prompt alone has 3 tokens, max_length is 3"),
        (Limits(5, "keep_end"), "there good you be </s>", "<s> hi there bad </s>", 1, None),
        (Limits(3, "keep_end"), "you be </s>", "there bad </s>", 1, None),  # first response token has nothing before it
        (Limits(6, "drop"), "<s> hi there good you be </s>", "<s> hi there bad </s>", 3, "7 tokens, max_length is 6"),
    ],
)
def test_truncation(limits, chosen, rejected, start, problem):
    pair = encode(LONG, make_tokenizer(), limits)
    assert (words(pair.chosen.ids), words(pair.rejected.ids)) == (chosen, rejected)
    assert pair.chosen.start == start
    assert pair.shared == common_prefix(pair.chosen.ids, pair.rejected.ids)
    assert pair.truncated == (limits.max_length < 7)
    if problem is None:
        assert pair.problem is None
    else:
        assert problem in pair.problem
        assert pair.chosen.problem
        assert pair.rejected.problem


def test_truncation_error_names_the_row():
    with pytest.raises(ValidationError, match=LONG.row_id):
        encode(LONG, make_tokenizer(), Limits(6, "error"))


def test_merge_across_the_boundary(shared):
    """stories260K merges 'Once' + ' upon': whatever the prompt's end merges with belongs to the response."""
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    encoded = encode(Example("Once upon a ti", "me"), tokenizer)
    whole = [1, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"], 2]
    assert encoded.ids.tolist() == whole
    prompt = tokenizer("Once upon a ti")["input_ids"]
    assert encoded.start == common_prefix(prompt, whole) < len(prompt)


def test_characters(shared):
    """babyllama105 has one token per character: boundaries can be counted by hand (a leading space is the tokenizer's own)."""
    tokenizer = load_tokenizer(shared / "models" / "babyllama105")
    pair = encode(Pair("Tom had", " a cat", " a car"), tokenizer)
    assert len(pair.chosen.ids) == 1 + len(" Tom had a cat") + 1
    assert pair.chosen.start == 1 + len(" Tom had")
    assert pair.shared == 1 + len(" Tom had a ca")
    assert pair.chosen.ids[0] == 1
    assert pair.chosen.ids[-1] == 2
    assert context_length(shared / "models" / "babyllama105") == 256


def test_padding_side_of_the_tokenizer_does_not_matter():
    left, right = make_tokenizer(), make_tokenizer()
    left.padding_side, right.padding_side = "left", "right"
    a, b = encode(LONG, left), encode(LONG, right)
    np.testing.assert_array_equal(a.chosen.ids, b.chosen.ids)


def test_rows_longer_than_the_context(shared):
    """About 30% of the harmless HH pairs do not fit into the 512 tokens of stories260K; the exact count is pinned."""
    import pyarrow.parquet as parquet

    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    table = parquet.read_table(shared / "data" / "hh_rlhf_harmless" / "pairs.parquet").to_pylist()
    pairs = [encode(Pair(r["prompt"], r["chosen"], r["rejected"]), tokenizer, Limits(512)) for r in table]
    counts = (len(pairs), sum(p.truncated for p in pairs), sum(p.problem is not None for p in pairs))
    assert counts == (1156, 346, 177)  # 29.9% cut, of which 177 keep nothing of a response


def test_fingerprint_covers_template_and_vocabulary():
    one = tokenizer_fingerprint(make_tokenizer())
    assert one == tokenizer_fingerprint(make_tokenizer())
    assert one != tokenizer_fingerprint(make_tokenizer(OPEN_TEMPLATE))
    other = make_tokenizer()
    other.add_tokens(["new"])
    assert one != tokenizer_fingerprint(other)
    used = make_tokenizer()
    used("hi there", truncation=True, max_length=1)
    assert one == tokenizer_fingerprint(used)


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelError, match=r"a folder with notes\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        context_length(tmp_path / "gone")


def test_prompt_for_sampling():
    tokenizer = make_tokenizer()
    plain = encode_prompt(Example("hi there", answer="4"), tokenizer)
    assert (plain.text, words(plain.ids), plain.messages) == ("hi there", "<s> hi there", None)
    chat = encode_prompt(Example(messages("user: hi"), answer="4"), tokenizer)
    assert words(chat.ids) == "<s> <user> hi <end> <assistant>"
    assert chat.text == "<s><user> hi <end><assistant> "


def test_few_shot_and_system():
    tokenizer = make_tokenizer()
    shots = [Example("hi", " good")]
    assert (
        encode_prompt(Example("you"), tokenizer, system="be kind", few_shot=shots).text == "be kind\n\nhi good\n\nyou"
    )
    assert encode_prompt(Example("you"), tokenizer, few_shot="hi good\n").text == "hi good\nyou"
    chat = encode_prompt(Example(messages("user: you")), tokenizer, system="be kind", few_shot=shots)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("policy, wanted", [("keep_end", "there you"), ("keep_start", None), ("drop", None)])
def test_prompt_without_room_for_an_answer(policy, wanted):
    prompt = encode_prompt(Example("hi there you"), make_tokenizer(), limits=Limits(3, policy))
    if wanted:
        assert (words(prompt.ids), prompt.problem, prompt.truncated) == (wanted, None, True)
    else:
        assert "no room for an answer" in prompt.problem


def test_encoded_counts():
    assert Encoded(np.arange(5), 3).n_response == 2
    assert Encoded(np.zeros(0, np.int32), 0, problem="x").n_response == 0
