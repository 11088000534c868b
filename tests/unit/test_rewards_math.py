"""DAPO's rule and math-verify's equivalence on answers of AIME24, AMC23, GSM8K, Minerva, and on hard forms."""

import csv
from pathlib import Path

import pytest

from megatron_fipo.rewards import dapo, equivalence
from megatron_fipo.rewards.final_answer import final_answer, last_answer_line, last_boxed
from megatron_fipo.rewards.response import Response
from megatron_fipo.rewards.verify import score

with open(Path(__file__).with_name("answer_pairs.tsv"), newline="") as file:
    PAIRS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
# Where the rules are wrong, each for a reason that the documentation gives: percent signs, units in letters that may be
# variables, i and indices that math-verify reads as other symbols; text without commas and spaces in DAPO's rule.
TOO_LENIENT = {"math_verify": 4, "dapo": 3}
TOO_STRICT = {"math_verify": 3}


def test_the_table_is_large_and_its_rules_differ_where_it_says_so():
    assert len(PAIRS) >= 300
    assert len({(p["reference"], p["answer"]) for p in PAIRS if p["math_verify"] != p["dapo"]}) >= 100
    for rule, count in TOO_LENIENT.items():
        assert sum(p[rule] > p["equal"] for p in PAIRS) == count
    for rule, count in TOO_STRICT.items():
        assert sum(p[rule] < p["equal"] for p in PAIRS) == count


@pytest.mark.parametrize("rule", ["math_verify", "dapo"])
def test_every_pair_has_the_stated_verdict(rule):
    source = {"math_verify": "MATH-500", "dapo": "math_dapo"}[rule]
    texts = ["So it is \\boxed{%s}.", "Thinking.\nAnswer: %s", "Answer: 0 no,\nAnswer: $%s$\n"]
    wrong = [
        (text, pair["reference"], pair["answer"])
        for i, pair in enumerate(PAIRS)
        for text in [texts[i % 3] if "$" not in pair["answer"] else texts[1]]
        if pair["answer"].strip()
        and score(Response("", text % pair["answer"], pair["reference"], source)) != float(pair[rule])
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "line", "boxed", "final"),
    [
        ("", None, None, None),
        ("the answer is 5", None, None, None),
        ("Answer: 5", "5", None, "5"),
        ("answer : 5\nmore", "5", None, "5"),
        ("ANSWER:5 \n\n", "5", None, "5"),
        ("Answer: 5\nAnswer: 6", "6", None, "6"),
        (r"\boxed{5} then Answer: 6", "6", "5", "6"),
        (r"Answer: 6, that is \boxed{7}", r"6, that is \boxed{7}", "7", "7"),
        ("Answer: 6\nNo: \\boxed{7}", "6", "7", "7"),
        (r"\boxed{\frac{1}{2}}", None, r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{5} and \boxed{6}", None, "6", "6"),
        (r"\boxed{5} and \boxed{6", None, "5", "5"),
        (r"\boxed {\{1,2\}}", None, r"\{1,2\}", r"\{1,2\}"),
        (r"\boxed{a\}b}", None, r"a\}b", r"a\}b"),
        (r"\boxed{}", None, "", ""),
        ("12 + 6 = 18\n#### 18", None, None, "18"),
        ("#### 18\nAnswer: 19", "19", None, "19"),
    ],
)
def test_the_final_answer_is_the_last_one(text, line, boxed, final):
    assert (last_answer_line(text), last_boxed(text), final_answer(text)) == (line, boxed, final)


def test_dapo_reads_the_end_of_a_response_only():
    assert dapo.score("Answer: 5" + " " * (dapo.WINDOW - 9), "5") == 1.0
    assert dapo.score("Answer: 5" + " " * dapo.WINDOW, "5") == 0.0


def test_an_answer_line_goes_before_a_box_in_daposs_rule():
    assert dapo.score("Answer: 5\n\\boxed{6}", "5") == 1.0
    assert dapo.score("So \\boxed{6}", "6") == 1.0


def test_model_output_is_never_evaluated(tmp_path):
    target = tmp_path / "written"
    for code in (f"__import__('pathlib').Path('{target}').touch()", f"open('{target}', 'w')", "exit()"):
        for text in (rf"\boxed{{{code}}}", f"Answer: {code}", f"Answer: ${code}$", f"#### {code}"):
            assert score(Response("", text, "5", "gsm8k")) == 0.0
    assert not target.exists()


def test_a_long_answer_is_wrong_and_costs_nothing():
    assert not equivalence.equivalent("5", "5+" * 100_000 + "0")
