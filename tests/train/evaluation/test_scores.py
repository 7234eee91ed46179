import pytest

from med3dvlm.train.evaluation.predictions import Reference
from med3dvlm.train.evaluation.scores import (
    Score,
    answers_of_another_case,
    has_same_words,
    is_read,
    most_frequent_answers,
    score_samples,
    summarise,
)


def references(task, *types, answer="liver", letter=""):
    return [
        Reference(f"{task}/{row:06d}", f"case{row // 2}", "x.nii.gz", task, question_type, "?", answer, letter)
        for row, question_type in enumerate(types)
    ]


def test_closed_answers_by_the_strict_and_by_the_original_rule():
    answers = ["B. liver", "b", "(B) liver", "A. spleen", "A. B. C. D.", "It is B.", "liver", ""]
    scores = score_samples(references("closed_vqa", *[3] * 8, letter="B"), answers, {})
    assert scores["accuracy"] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert scores["original_accuracy"] == [1, 0, 0, 0, 1, 1, 0, 0]


def test_yes_and_no_are_words_whatever_their_case():
    answers = ["yes", "Yes.", "No", "Yes it is", ""]
    assert score_samples(references("yes_no_vqa", *[1] * 5, answer="Yes"), answers, {}) == {
        "accuracy": [1, 1, 0, 0, 0]
    }


def test_open_answers_and_reports_get_the_text_metrics():
    metrics = {"length": lambda predictions, texts: [float(len(a) - len(b)) for a, b in zip(predictions, texts)]}
    scores = score_samples(references("open_vqa", 3, 3), ["Liver.", "a"], metrics)
    assert scores == {"length": [1, -4], "exact": [1, 0]}


def test_means_by_type_over_types_and_over_all():
    asked = references("closed_vqa", 3, 3, 3, 1, letter="B")
    lines = summarise(asked, {"accuracy": [1, 1, 0, 0]}, {"accuracy": [1, 0, 0, 0]})
    values = {line.group: (round(line.value, 4), round(line.blind, 4), line.count) for line in lines}
    assert values == {
        "plane": (0, 0, 1),
        "organ": (0.6667, 0.3333, 3),
        "mean of types": (0.3333, 0.1667, 4),
        "all": (0.5, 0.25, 4),
    }
    assert [line.group for line in lines] == ["plane", "organ", "mean of types", "all"]
    assert {line.chance for line in lines} == {0.25}
    whole = lines[-1]
    assert whole.low == 0 and whole.high == 1 and lines[2].low == 0 < lines[2].value < lines[2].high == 1


def test_chance_of_a_choice_is_that_of_both_rules():
    asked = references("closed_vqa", 3, 3, 1, letter="B")
    scores = score_samples(asked, ["B.", "C.", "A."], {})
    assert {(line.metric, line.chance) for line in summarise(asked, scores)} == {
        ("accuracy", 0.25),
        ("original_accuracy", 0.25),
    }


def test_reports_have_no_types_and_no_chance():
    (line,) = summarise(references("report", 0, 0, 0, 0), {"rouge_1": [0.5, 0.7] * 2})  # of two cases
    assert line == Score("report", "rouge_1", "all", 0.6, line.low, line.high, 4) and line.low == pytest.approx(0.6)


def answered(*entries):
    """References to open questions, of a case, a type and an answer each."""
    return [
        Reference(f"open_vqa/{row:06d}", case, "x.nii.gz", "open_vqa", question_type, "?", answer, "")
        for row, (case, question_type, answer) in enumerate(entries)
    ]


def test_chance_of_texts_is_the_answer_of_another_case():
    asked = answered(*[("a", 3, f"a{row}") for row in range(3)], ("b", 3, "b0"), ("b", 4, "b1"), ("c", 4, "c1"))
    guesses = answers_of_another_case(asked)
    assert guesses == ["b0", "b0", "b0", "a0", "c1", "b1"]
    one_each = answered(*[(case, 3, case) for case in "abcde"])
    assert answers_of_another_case(one_each) == list("cdeab")  # half-way round


def test_no_chance_where_a_type_has_one_case():
    asked = answered(("a", 3, "liver"), ("b", 3, "liver"), ("a", 5, "left lung"), ("a", 5, "left lung"))
    guesses = answers_of_another_case(asked)
    assert guesses == ["liver", "liver", "", ""]
    scores = score_samples(asked, ["x"] * 4, {})
    lines = summarise(asked, scores, None, score_samples(asked, guesses, {}))
    assert {line.group: line.chance for line in lines} == {
        "organ": 1,
        "location": None,
        "mean of types": None,
        "all": None,
    }


def test_answers_of_a_form_that_cannot_be_right_are_known():
    (closed,), (yes_no,), (open_one,) = (references(task, 3) for task in ("closed_vqa", "yes_no_vqa", "open_vqa"))
    assert [is_read(closed, text) for text in ("B spleen", "**C**", "A large cyst", "spleen")] == [1, 1, 0, 0]
    assert [is_read(yes_no, text) for text in ("Yes.", "no", "Liver", "Yes it is", "Maybe")] == [1, 1, 1, 0, 0]
    assert is_read(open_one, "anything")


def test_the_most_frequent_answers_are_those_of_each_group():
    asked = [*references("yes_no_vqa", *[4] * 17, answer="No."), *references("yes_no_vqa", 4, 4, 3, answer="Yes")]
    assert most_frequent_answers(asked) == {
        "organ": ("yes", 1.0, 1),
        "abnormality": ("no", 17 / 19, 19),
        "all": ("no", 0.85, 20),
    }


@pytest.mark.parametrize("text", ["Yes.\n", "yes\n", " Yes .\t", "YES"])
def test_white_space_is_no_word(text):
    assert has_same_words(text, "Yes") and has_same_words("Yes.", text) and not has_same_words(text, "No")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a prediction for each of at least one reference, got 1 for 2"):
        score_samples(references("report", 0, 0), ["a"], {})
    with pytest.raises(ValueError, match="got 0 for 0"):
        score_samples([], [], {})
    with pytest.raises(ValueError, match="of one task, got open_vqa, report"):
        score_samples([*references("report", 0), *references("open_vqa", 1)], ["a", "b"], {})
