from dataclasses import replace

import pytest

from med3dvlm.train.evaluation.predictions import Reference
from med3dvlm.train.evaluation.scores import (
    Score,
    answers_of_another_case,
    calibration_hits,
    has_same_words,
    is_read,
    most_frequent_answers,
    score_samples,
    summarise,
    types_of_one_case,
)


def references(task, *types, answer="liver", letter="", question="?"):
    return [
        Reference(f"{task}/{row:06d}", f"case{row // 2}", "x.nii.gz", task, question_type, question, answer, letter)
        for row, question_type in enumerate(types)
    ]


def test_closed_answers_by_the_strict_and_by_the_original_rule():
    answers = ["B. liver", "b", "(B) liver", "A. spleen", "A. B. C. D.", "It is B.", "liver", ""]
    scores = score_samples(references("closed_vqa", *[3] * 8, letter="B"), answers, {})
    assert scores["accuracy"] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert scores["original_accuracy"] == [1, 0, 0, 0, 1, 1, 0, 0]


def test_a_choice_after_its_letter_is_read_whichever_letter_it_is():
    question = "Which organ?? Choices: A. liver B. spleen C. left kidney D. large cyst"
    for answer, letter, text in (
        ("liver", "A", "A liver"),
        ("spleen", "B", "B spleen"),
        ("left kidney", "C", "c Left  kidney."),
    ):
        (asked,) = references("closed_vqa", 3, answer=answer, letter=letter, question=question)
        assert score_samples([asked], [text], {})["accuracy"] == [1] and is_read(asked, text)
        assert score_samples([asked], ["A Liver."], {})["accuracy"] == [float(letter == "A")] and is_read(
            asked, "A Liver."
        )
        for phrase in ("A large cyst", "A (small) cyst in the liver"):
            assert score_samples([asked], [phrase], {})["accuracy"] == [0] and not is_read(asked, phrase)
        assert score_samples([asked], ["A (liver)"], {})["accuracy"] == [float(letter == "A")]


def test_calibration_holds_the_probability_against_the_whole_answer():
    closed = references("closed_vqa", *[3] * 3, letter="B")
    answers = ["B. spleen", "b. Liver", "A. liver"]
    assert calibration_hits(closed, answers) == [0, 1, 0]
    assert score_samples(closed, answers, {})["accuracy"] == [1, 1, 0]  # by the letter alone
    right = [
        "B",
        "b",
        "(b) liver",
        "B) liver",
        "B: liver",
        "**B** liver",
        "B liver",
        "**B. liver**",
        "B (liver)",
        "B - liver",
    ]
    wrong = ["B. spleen", "(b) spleen", "A. liver", "B. liver, I think", "liver", ""]
    asked = references("closed_vqa", *[3] * (len(right) + len(wrong)), letter="B")
    assert calibration_hits(asked, [*right, *wrong]) == [1] * len(right) + [0] * len(wrong)
    question = "Which organ? Choices: A. liver B. spleen C. left kidney D. large cyst"
    first = references("closed_vqa", *[3] * 4, letter="A", question=question)
    assert calibration_hits(first, ["A liver", "A (liver)", "A. Liver.", "A large cyst"]) == [1, 1, 1, 0]
    assert calibration_hits(references("closed_vqa", 3, 3, answer="(-5 HU)", letter="B"), ["b: -5 HU", "b: 5 HU"]) == [
        1,
        0,
    ]
    yes_no = references("yes_no_vqa", 1, 1, answer="Yes")
    assert calibration_hits(yes_no, ["yes.", "No"]) == score_samples(yes_no, ["yes.", "No"], {})["accuracy"] == [1, 0]


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
        Reference(f"open_vqa/{row:06d}", case, f"{case}.nii.gz", "open_vqa", question_type, "?", answer, "")
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


def test_chance_is_no_answer_about_the_same_volume():
    asked = answered(*[(case, 3, case) for case in "abcde"])
    listed_twice = [replace(entry, image="c.nii.gz") if entry.case in "ce" else entry for entry in asked]
    assert answers_of_another_case(listed_twice) == list("cdaab")  # half-way round from c is e, with its volume
    assert types_of_one_case(listed_twice) == set()
    same = [replace(entry, image="x.nii.gz") for entry in asked[:2]]
    assert answers_of_another_case(same) == ["", ""] and types_of_one_case(same) == {3}


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
