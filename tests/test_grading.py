"""Graders: hand tables, the real right and wrong answers of GSM8K, and comparisons that would never end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import polars as pl
import pytest

from curate.errors import UsageError
from curate.measurements.grading import grader
from curate.measurements.grading_answers import as_number, boxed, final_answer, last_number
from curate.measurements.grading_math import MathEquality
from curate.rows import Example


@pytest.mark.parametrize(
    "text, last, alone",
    [
        ("10-5", "5", None),
        ("x - 3", "3", None),
        ("so -3", "-3", None),
        ("$1,234.50.", "1234.50", 1234.5),
        ("1,2", "2", None),
        ("1,2345", "2345", None),
        ("-$5", "-5", -5),
        ("$-5", "-5", -5),
        ("−7", "-7", -7),
        ("f(-4)", "-4", None),
        (".5", ".5", 0.5),
        ("1{,}000", "1000", 1000),
        ("1,000,000", "1000000", 1000000),
        ("\\$18", "18", 18),
        ("1 2", "2", None),
        ("none", None, None),
        ("", None, None),
        ("-", None, None),
    ],
)
def test_numbers(text, last, alone):
    assert last_number(text) == last
    found = as_number(text)
    assert found is None if alone is None else float(found) == alone


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("The answer is 42.", "42", True),
        ("The answer is $1,234.", "1234", True),
        ("The answer is 42.0", "42", True),
        ("The answer is 42 dollars.", "42", True),
        ("The answer is 3 * 5 = 15.", "15", True),
        ("The answer is 3.\nThe answer is 4.", "4", True),  # the last one
        ("The answer is 3.\nThe answer is 4.", "3", False),
        ("The answer is 7.\n#### 8", "7", True),  # words before hashes
        ("6*7\n#### 42", "6*7 = 42\n#### 42", True),  # the reference as the dataset has it
        ("#### 1,000", "1000", True),
        ("The answer is:\n42", "42", True),
        ("The answer is blue.", "blue", True),
        ("It is 42", "42", False),  # no mark, no answer
        ("The answer is ", "42", False),
        ("", "42", False),
        ("The answer is 420", "42", False),
        ("The answer is -42", "42", False),
    ],
)
def test_gsm8k(text, answer, right):
    assert grader("gsm8k").grade(text, answer) is right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("#### 1/2", "1/2", True),
        ("#### (1, 2)", "(1, 2)", True),
        ("#### (1, 2)", "(1 2)", True),  # a reference whose commas were taken out
        ("#### 12:30", "12:30", True),
        ("#### 06:30", "6:30", True),
        ("#### 12:30 pm", "12:30 am", False),
        ("#### 3 1/2", "3 1/2", True),
        ("#### 3½", "3.5", True),
        ("#### 5/2", "1/2", False),
        (r"The answer is $\frac{1}{2}$.", "0.5", True),
        ("#### 50%", "50", True),
        ("#### 0.5", "50%", True),
        ("#### −7", "-7", True),
        ("#### 1\u202f000", "1000", True),
        ("#### 1,234 dollars", "1234", True),
        ("42", "42", True),  # nothing but the answer
        ("The answer is 15 since 12 + 4 = 16", "15", True),  # declared before what is said of it
        ("The answer is 42, because 6*7 is 43.", "42", True),
        ("The answer is 6. The answer is not 5.", "6", True),
        ("The answer is (1, 2), not (2, 1).", "(1, 2)", True),
        ("The answer is 5.\n\nQuestion: next?\nThe answer is 7.", "5", True),
        ("The answer is 5 apples * 3 = 15 apples", "15", True),
        ("#### 2 and 3", "2 and 3", True),  # no one value: compared as a text
        ("#### 2", "2 and 3", False),
        ("#### 10", "10-5", False),
        ("#### 10-5", "10-5", True),
        ("#### Room 5", "Room 5", True),
        ("#### 5 apples", "5 apples and 3 pears", False),
        ("The answer is Blue.", "blue", True),
        ("#### " + "9" * 5000, "9", False),  # Python reads no number of so many digits
    ],
)
def test_gsm8k_reads_text_and_reference_alike(text, answer, right):
    assert grader("gsm8k").grade(text, answer) is right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("so it is 5/2", "1/2", False),
        ("so 1/2", "0.5", True),
        ("10-5", "5", True),
        ("It is 3 1/2 feet", "3.5", True),
        ("at 12:30", "12:30", True),
        ("the point (1, 2)", "(1, 2)", True),
        ("-3", "3", False),
        ("50 percent", "50%", True),
        ("none", "5", False),
        ("word 5 " * 200 + "and no more", "5", True),
        ("1" * 400 + " words" * 100, "1", False),
    ],
)
def test_number_reads_text_and_reference_alike(text, answer, right):
    assert grader("number").grade(text, answer) is right


def test_what_gsm8k_reads():
    assert final_answer("a\n#### 5\n#### 6") == "6"
    assert final_answer("no mark") is None


def test_real_answers_are_graded_as_their_authors_did(shared):
    """2,640 sampled solutions of four models, 989 of them right. They end in "A: 90,000", which for gsm8k is written as it is marked."""
    rows = pl.read_parquet(shared / "data" / "gsm8k" / "model_solutions.parquet")
    number, gsm8k = grader("number"), grader("gsm8k")
    agree = {"number": 0, "####": 0, "The answer is": 0}
    for solution, truth, correct in rows.select("solution", "ground_truth", "is_correct").iter_rows():
        agree["number"] += number.grade(solution, truth) == correct
        for mark in ("####", "The answer is"):
            agree[mark] += (
                gsm8k.grade(solution.replace("\nA:", f"\n{mark}"), truth.replace("\nA:", "\n####")) == correct
            )
    assert rows.height == 2640 and rows["is_correct"].sum() == 989
    assert agree == {"number": 2640, "####": 2640, "The answer is": 2640}


def test_real_references_grade_themselves(shared):
    """Every reference solution of the train half is right by gsm8k and by number, and equals its own final answer."""
    rows = pl.read_parquet(shared / "data" / "gsm8k" / "train_half.parquet").head(1000)
    for answer, final in rows.select("answer", "final_answer").iter_rows():
        assert grader("gsm8k").grade(answer, str(final)) and grader("number").grade(answer, str(final))


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7", "7"),
        (r"\boxed\pi", r"\pi"),
        (r"\boxed{3} and \boxed{unclosed", "3"),
        (r"\fbox{x}", "x"),
        ("nothing", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.fixture(scope="module")
def math_grader():
    g = grader({"math": {"timeout": 2}})
    yield g
    g.close()


@pytest.mark.parametrize(
    "text, answer, right",
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(1,2)}", "(1, 2)", True),
        (r"\boxed{(1,2)}", "(2, 1)", False),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", True),
        (r"\boxed{\text{Saturday}}", r"\text{Saturday}", True),
        (r"I get $\sqrt{8}$.", r"2\sqrt{2}", True),
        ("final answer: 1/3", r"\frac13", True),
        ("Half the answer is: 33\n#### 66", "66", True),  # the last mark
        ("Answer: 4, because 5 is odd", "4", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{3}", r"We find that \boxed{3}.", True),
        (r"\boxed{3}", "4", False),
        (r"\boxed{}", "4", False),
        ("", "4", False),
        (r"\boxed{\frac{1}{", "4", False),
    ],
)
def test_math(math_grader, text, answer, right):
    assert math_grader.grade(text, answer) is right


def test_math_ends_what_would_never_end(math_grader):
    """A power larger than memory: wrong within the deadline, and the next comparison works."""
    start = time.monotonic()
    assert math_grader.grade(r"\boxed{9^{9^{9^{9}}}}", "7") is False
    assert time.monotonic() - start < 30
    assert math_grader.grade(r"\boxed{0.25}", r"\frac{1}{4}") is True


def test_a_comparing_process_that_hangs_or_dies():
    """One that does not answer is ended and counted, one that died is replaced; either way the next comparison works."""
    equality = MathEquality(timeout=0.5)
    try:
        assert equality("0.5", r"\frac{1}{2}") and equality.timed_out == 0
        os.kill(equality._child.pid, signal.SIGSTOP)
        assert equality("x+1", "1+x") is False and equality.timed_out == 1
        assert equality("y+1", "1+y") is True
        os.kill(equality._child.pid, signal.SIGKILL)
        equality._child.wait()
        assert equality("z+1", "1+z") is True and equality.timed_out == 1
    finally:
        equality.close()


def test_math_outside_the_main_thread(math_grader):
    """math-verify's own time limit is a signal, which only the main thread can set."""
    found = []
    threads = [
        threading.Thread(
            target=lambda k=k: found.append((k, math_grader.grade(rf"\boxed{{\frac{{{k}}}{{7}}}}", f"{2 * k}/14")))
        )
        for k in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(1, True), (2, True), (3, True)]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("b", "B"),
        ("(B)", "B"),
        ("Answer: B", "B"),
        ("The answer is (C).", "C"),
        ("A train leaves. The answer is D", "D"),
        (r"I think \boxed{\text{B}}", "B"),
        ("B. Paris", "B"),
        ("**C**", "C"),
        ("the answer is A, because B is wrong", "A"),
        ("So it must be C.", "C"),
        ("(A) fails, so (D)", "D"),
        ("A dog", None),
        ("Answer: Berlin", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice(text, letter):
    assert grader("choice").extract(text) == letter


INLINE = Example("Which is a colour? A red B blue cat C dog D sea.", None, "B")
LINES = Example("The capital of France?\nA) Rome\nB) Paris\nC) Berlin\nD) Oslo", None, "B")


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B\n\nWhy not option C? Because snow is cold.",
        "The correct answer is (B). Option A is wrong, for red is no cat.",
        "The answer is B. I did not choose A because a stone sinks.",
        "I would not choose A; B it is",
        "**B**",
        "answer: b",
        "the answer is b.",
        "A is wrong. B is right. C is wrong.",
        "Option B is correct, A and C are not.",
        "It isn't A or C, so B.",
        "The answer is not A but B.",
        "(B). Note (A) is wrong and (C) too.",
        "(A) is wrong, (B) fits, (C) is wrong. So the answer is B",
        "Answer: A\nWait, no. Answer: B",
        "The best choice is B because A is cold",
        "B because A is cold",
        "Answer: B\n\nQuestion: next?\nAnswer: C",
        "the answer is I think B",
        "Rather than A, I'd go with B.",
        "The answer cannot be A. It must be B.",
        "B) is my answer, C) came close",
        "I'd eliminate A and C. Therefore B.",
        "Final Answer: **B**. (A is a distractor.)",
        "D is tempting, but the answer is B. D would be hot.",
        "A: no. B: yes.",
    ],
)
def test_the_declared_choice_beats_later_letters(text):
    assert grader("choice").extract(text) == "B"


HEDGED = r"""A or B|A/B|A / B|Either A or B.|A and C|A & B|A, B|A B|(A) (B)|(A), (B)|A or maybe B|A possibly B|B. Or C|a or b
B) Paris or C) Berlin|Answer: A or B|Answer: A/B|Answer: (A) or (B)|The answer is either (A) or (B).|Answer: A and B|Answer: A, C
Answer: A, B, C|Answer: A, maybe B|Answer: A (or B)|Answer: A; B|Answer: A. Or B.|Answer: A, but it could be B
the answer is A, or perhaps B|Answer: B. Paris or C. Berlin|Answer: A or E|Answer: A and/or B|#### A or B|Answer: A. Answer: B
The answer is A. The answer is B.|Either A or B is correct|A is correct and B is correct|I'd say B or C fits|So it must be B or C.
I choose A or B|Option A or option B|It could be A, it could be B|(A) Rome, (B) Paris|\boxed{A,B}|\boxed{A} or \boxed{B}
\boxed{A} \boxed{B}|\boxed{A \text{ or } B}"""


@pytest.mark.parametrize("text", HEDGED.replace("\n", "|").split("|"))
def test_a_hedged_choice_is_none(text):
    choice = grader("choice")
    assert choice.extract(text) is None and not any(choice.grade(text, letter) for letter in "ABCD")
    assert not choice.readable(text)


@pytest.mark.parametrize(
    "text",
    [
        "Answer: A. Wait, no, the answer is B.",
        "Answer: B, not C",
        "Answer: B, C is wrong",
        "The answer is B and C is a distractor",
        "The answer is B or a similar one",
        "B because A or C would be cold",
        "A or B? The answer is B.",
        "It is either A or C. Since it is cold, the answer is B.",
        "A and C are wrong. Answer: B",
        "Answer: B (Paris)",
        "Answer: B, which beats A or C",
        "It's not A or C; B",
        "Answer: B. The answer is (B).",
        "The answer is B, A and C are wrong.",
        "The answer is B; A and C are wrong.",
        "The answer is B; A, C, and D do not apply.",
        "The answer is B; A, C, D don't fit",
        "The answer is B, A and C being false",
    ],
)
def test_no_hedge_is_seen_where_none_is(text):
    assert grader("choice").extract(text) == "B"


NOT_FIVE = (
    "5x|5 x|5x3|5k|5i|x5|5*x|5+x|5(x+1)|5²|5^2|5π|5\\pi|5sqrt(2)|5 or 6|5 apples or 6 apples|5, or 6|5 (or 6)|5. Or 6.|5 maybe 6|5, maybe 6|"
    "either 5 or 6|5 6|5 / 6|5 and 6|5 apples and 3 pears|5 hours and 20 minutes|5, 6|5 #### 6"
)
FIVE = (
    "5 apples|5.|$5|5%|5 dollars|5 km|5km|5 cm²|5€|#### 5|**5**|5th|5-year|5 eggs (not 6)|"
    "5 hours or 300 minutes|5 or 5.0|5, because 6 is even|5 for 3 children|5 = 5.0"
)


@pytest.mark.parametrize("mark", ["#### ", "The answer is "])
def test_what_gsm8k_takes_for_a_number(mark):
    gsm8k = grader("gsm8k")
    assert [said for said in NOT_FIVE.split("|") if gsm8k.grade(mark + said, "5")] == []
    assert [said for said in FIVE.split("|") if not gsm8k.grade(mark + said, "5")] == []
    for said in ("5x", "5 or 6", "5 apples and 3 pears", "5²"):  # and a reference that is one is compared as a text
        assert gsm8k.grade(mark + said, said) and not gsm8k.grade(mark + "5", said)


@pytest.mark.parametrize(
    "spec, text, answer, right",
    [
        ("gsm8k", "The answer is 5. The answer is 6.", "6", False),
        ("gsm8k", "The answer is 5. Wait, the answer is 6.", "6", True),
        ("gsm8k", "The answer is 5. The answer is 5.", "5", True),
        ("number", "5 or 6", "6", False),
        ("number", "It is 5, or maybe 6.", "6", False),
        ("number", "Answer: 5 and 6", "6", False),
        ("number", "so it is 5x", "5", False),
        ("number", "5 of 6, or 0.5, is 3", "3", True),
        ("number", "It is 25 cm²", "25", True),
        ("number", "Row 1\n2 7", "7", True),  # numbers of a table are no list
        ("number", "5 or 6", "5 or 6", False),  # a reference that cannot be read
        ({"regex": r"x = (\d+)"}, "x = 5 or x = 6", "6", False),
        ({"regex": r"x = (\d+)"}, "x = 5 or 6", "5", False),
        ({"regex": r"answer: (\w)"}, "answer: A or B", "A", False),
        ({"regex": r"answer: (\w)"}, "answer: A or so", "A", True),
        ({"regex": r"answer: (\w)"}, "answer: A or a combination", "A", True),
    ],
)
def test_hedges_in_every_grader(spec, text, answer, right):
    assert grader(spec).grade(text, answer) is right


def test_hedges_in_mathematics(math_grader):
    for text in (
        r"\boxed{5} or \boxed{6}",
        r"\boxed{5} \boxed{6}",
        r"\boxed{5 (\text{or }6)}",
        "Answer: 5; 6",
        r"\boxed{5|6}",
        "Answer: 5, or 6",
    ):
        assert not math_grader.grade(text, "5") and not math_grader.grade(text, "6"), text
    assert math_grader.grade(r"\boxed{5 \text{ or } 6}", "6 or 5") and math_grader.grade(r"\boxed{5,6}", "6, 5")
    assert math_grader.grade(r"\boxed{5}. No, \boxed{6}", "6") and math_grader.grade(r"\boxed{2+2} = \boxed{4}", "4")
    assert math_grader.grade(r"\boxed{5}, so \boxed{5.0}", "5")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{1;2}", "1;2"),
        (r"\boxed{(1;2)}", "(1;2)"),
        (r"\boxed{[1;2]}", "[1;2]"),
        (r"\boxed{5 \text{ or } -5}", "5, -5"),
        (r"\boxed{5 \text{ or } -5}", r"\{5,-5\}"),
        (r"\boxed{x = 5 \text{ or } x = -5}", "x = 5 or x = -5"),
        ("Answer: 2 or 3", "2, 3"),
    ],
)
def test_several_values_are_no_hedge_where_the_reference_has_several(math_grader, text, answer):
    assert math_grader.grade(text, answer)


def test_choices_by_their_texts_and_beyond_the_options():
    choice = grader("choice")
    assert choice.grade("blue cat", "B", INLINE) and choice.grade("The answer is Paris.", "B", LINES)
    assert choice.grade("(B)", "Paris", LINES) and not choice.grade("Rome", "B", LINES)
    assert choice.extract("Answer: E. Not (A)") is None and choice.extract("the answer is a dog") is None
    assert not choice.readable("E") and not choice.readable("2") and not choice.readable("") and choice.readable("(b)")


def test_choice_against_references():
    assert grader("choice").grade("(B)", "B. Paris") and not grader("choice").grade("(B)", "C")
    assert grader({"choice": "ABCDE"}).grade("answer: E", "(E)")
    with pytest.raises(UsageError, match="none of the letters ABCD"):
        grader("choice").grade("(B)", "Paris")


def test_exact():
    assert grader("exact").grade("  a \n b ", "a b") and not grader("exact").grade("A b", "a b")
    assert grader({"exact": {"ignore_case": True}}).grade("A b", "a B")
    assert grader("exact").grade("e\u0301", "\u00e9")  # the same letter, composed or not
    assert not grader("exact").grade("1.0", "1")


def test_regex():
    g = grader({"regex": r"x\s*=\s*(-?\d+)"})
    assert g.grade("x = 1, no: x = 5", "5.0") and not g.grade("x = 1", "5") and not g.grade("y = 5", "5")
    assert grader({"regex": {"pattern": r"(a)(?P<answer>b+)"}}).grade("abb", "bb")
    assert g.grade("x = 5", "so x = 5") and not g.grade(
        "x = 5", "so x = 6"
    )  # a reference solution is read as the text is
    assert not grader({"regex": r"(\d+)"}).grade("4.5", "3.5")  # and never reduced to a part of it


OWN = """
def short(text, answer):
    return len(text) < 3

def share(text, answer):
    return len(text) / 10

def nothing(text, answer):
    return None

def nan(text, answer):
    return float("nan")

def by_row(text, answer, row):
    return row is not None and row.prompt == text

def number(text, answer):
    return 0.7

def broken(text, answer):
    return text[99]

def one(text):
    return True
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_grader_for_test.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_grader_for_test", None)


def test_a_grader_of_ones_own(own):
    row = Example(prompt="p")
    short = grader("own_grader_for_test:short", folder=own)
    assert short.grade("ab", None) is True and short.grade("abc", "x", row) is False
    assert grader("own_grader_for_test:by_row", folder=own).grade("p", None, row) is True
    assert grader({"own_grader_for_test:share": {"threshold": 0.2}}, folder=own).grade("ab", "x") is True
    strict = grader({"own_grader_for_test:share": 0.3}, folder=own)
    assert strict.grade("ab", "x") is False and strict.fingerprint.endswith('{"threshold": 0.3}')
    for name in ("short", "nothing", "nan"):  # no number to compare
        with pytest.raises(UsageError, match="expected a number to compare with its threshold 0.5"):
            grader({f"own_grader_for_test:{name}": {"threshold": 0.5}}, folder=own).grade("ab", "x")
    for settings, words in (({"treshold": 1}, "no setting 'treshold'"), ({"threshold": "high"}, "expected a number")):
        with pytest.raises(UsageError, match=words):
            grader({"own_grader_for_test:share": settings}, folder=own)
    for name, words in (
        ("number", "expected True or False.*threshold: 0.5"),
        ("nan", "returned nan"),
        ("nothing", "returned None"),
        ("broken", "failed on row .*IndexError"),
    ):
        with pytest.raises(UsageError, match=words):
            grader(f"own_grader_for_test:{name}", folder=own).grade("ab", "x", row)
    with pytest.raises(UsageError, match=r"function of \(text, answer\)"):
        grader("own_grader_for_test:one", folder=own)
    before = short.fingerprint
    (own / "own_grader_for_test.py").write_text(OWN.replace("< 3", "< 44"))
    sys.modules.pop("own_grader_for_test")
    assert grader("own_grader_for_test:short", folder=own).fingerprint != before  # its source is its version


@pytest.mark.parametrize(
    "spec, words",
    [
        ("gsm8", "did you mean 'gsm8k'"),
        ("regex", "'pattern' is missing"),
        ({"regex": "("}, "no regular expression"),
        ({"regex": "a"}, "has no group"),
        ({"regex": 3}, "expected a pattern"),
        ({"exact": {"ignorecase": True}}, "did you mean 'ignore_case'"),
        ({"exact": {"ignore_case": 1}}, "expected true or false"),
        ({"gsm8k": 3}, "takes no settings"),
        ({"choice": "abc"}, "capitals"),
        ({"math": {"timeout": -1}}, "seconds above 0"),
        ({"math": {}, "exact": {}}, "one name"),
        ("no_such_module_xyz:f", "no module 'no_such_module_xyz'"),
    ],
)
def test_wrong_graders(spec, words):
    with pytest.raises(UsageError, match=words):
        grader(spec)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer(answer):
    row = Example(prompt="p")
    with pytest.raises(UsageError, match=f"row {row.row_id} has no answer"):
        grader("gsm8k").grade("The answer is 5.", answer, row)


def test_fingerprints():
    specs = ["gsm8k", "number", "math", "choice", "exact", {"exact": {"ignore_case": True}}, {"choice": "ABCDE"}, {"math": {"timeout": 9}},
             {"regex": "(a)"}, {"regex": "(b)"}]  # fmt: skip
    found = [grader(spec).fingerprint for spec in specs]
    assert len(set(found)) == len(specs)
    assert (
        found == [grader(spec).fingerprint for spec in specs]
        and found[0] == "gsm8k/3"
        and found[4].startswith("exact/1")
    )
    assert "math-verify-" in found[2]
