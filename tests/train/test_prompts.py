import json
from pathlib import Path

import pytest
import torch

from med3dvlm.train.prompts import (
    REPORT_PROMPTS,
    build_messages,
    build_text_messages,
    describe_case,
    format_answer,
    format_question,
    parse_choice,
    text_after_choice,
)


GOLDENS = Path(__file__).parents[1] / "goldens"


def sample(**fields):
    base = {"task": "closed_vqa", "question": "Where is it?", "choices": ["a", "b", "c", "d"], "answer": "c"}
    return {**base, "answer_choice": "C", **fields}


def test_questions_and_answers_have_the_words_of_the_original():
    golden = json.loads((GOLDENS / "dataset.json").read_text())
    for row, values in enumerate(golden["inputs"]["csv_rows"]):
        for task in ("closed", "open"):
            item = golden["items"][f"pad_not_eos/vqa_{task}/{row}"]
            question = sample(
                task=f"{task}_vqa",
                question=values["Question"],
                choices=[values[f"Choice {letter}"] for letter in "ABCD"],
                answer=values["Answer"],
                answer_choice=values["Answer Choice"],
            )
            assert format_question(question) == item["question"].rpartition("<im_patch>")[2].strip()
            assert format_answer(question) == item["answer"]


def test_report_prompts_are_different_and_the_first_is_used_without_a_generator():
    assert len(set(REPORT_PROMPTS)) == len(REPORT_PROMPTS) >= 20
    assert format_question(sample(task="report")) == REPORT_PROMPTS[0]
    drawn = {format_question(sample(task="report"), torch.Generator().manual_seed(seed)) for seed in range(60)}
    assert len(drawn) > 15
    first, second = (format_question(sample(task="report"), torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second


def test_a_closed_question_needs_four_choices():
    with pytest.raises(ValueError, match=r"needs 4 choices, got 3 for 'Where is it\?'"):
        format_question(sample(choices=["a", "b", "c"]))


def test_messages_have_the_volume_before_the_question():
    messages = build_messages("scan.nii.gz", "Why?", "So.", system="You are a radiologist.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [part["type"] for part in messages[1]["content"]] == ["image", "text"]
    assert [message["role"] for message in build_messages("scan.nii.gz", "Why?")] == ["user"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B. spleen", "B"),
        (" (c) liver", "C"),
        ("D", "D"),
        ("a, because", "A"),
        ("A", "A"),
        ("A)", "A"),
        ("A:", "A"),
        ("A - spleen", "A"),
        ("B spleen", "B"),
        ("B - spleen", "B"),
        ("B- spleen", "B"),
        ("B \u2013spleen", "B"),
        ("D\nliver", "D"),
        ("A\n\nThe scan shows it.", "A"),
        ("A \r\nliver", "A"),
        ("A\tliver", "A"),
        ("(A) (liver)", "A"),
        ("B (spleen)", "B"),
        ("**B. spleen**", "B"),
        ("**B** spleen", "B"),
        ("[B]", "B"),
        ("B.spleen", "B"),
        ("A large cyst", None),
        ("(A large cyst)", None),
        ("A (small) cyst in the liver", None),
        ("A (liver)", None),
        ("A  large cyst", None),
        ("A\xa0large cyst", None),
        ("a.m.", None),
        ("C.T. shows a cyst", None),
        ("B-cell lymphoma", None),
        ("C-spine fracture", None),
        ("D-dimer elevated", None),
        ("A-P view", None),
        ("Dense", None),
        ("Answer: B", None),
        ("Because of vitamin A.", None),
        ("Axial", None),
        ("", None),
    ],
)
def test_choice_is_the_letter_an_answer_begins_with(text, expected):
    assert parse_choice(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(b) spleen", "spleen"),
        ("**B. spleen**", "spleen"),
        ("B", ""),
        ("[B].", ""),
        ("B: -5 HU", "-5 HU"),
        ("Dense", None),
    ],
)
def test_the_text_of_a_choice_is_what_follows_its_letter(text, expected):
    assert text_after_choice(text) == expected


CASE = [
    sample(task="report", question="", choices=[], answer="Small cyst of the liver, upper part.", answer_choice=""),
    sample(task="open_vqa", question="Which plane?", choices=[], answer="axial", answer_choice=""),
    sample(task="open_vqa", question="Where?", choices=[], answer="Upper part of the liver", answer_choice=""),
    sample(task="closed_vqa", question="Which organ?", choices=["spleen", "liver", "heart", "lung"], answer="liver"),
    sample(task="yes_no_vqa", question="Is it a mass?", choices=[], answer="No", answer_choice=""),
]


def test_a_case_is_described_by_its_report_and_what_that_leaves_out():
    assert describe_case(CASE) == "Small cyst of the liver, upper part. Which plane? axial."
    assert describe_case(CASE[1:3]) == "Which plane? axial. Where? Upper part of the liver."
    assert describe_case(CASE[3:]) == ""
    assert describe_case([*CASE, CASE[0], CASE[1]]) == describe_case(CASE)


def test_a_conversation_in_words_differs_from_one_about_a_volume_in_its_place_alone():
    question, answer = format_question(CASE[3]), format_answer(CASE[3])
    told, shown = build_text_messages("A cyst.", question, answer), build_messages("volume", question, answer)
    assert told[0]["content"][0] == {"type": "text", "text": "A cyst.\n"}
    assert told[0]["content"][1:] == shown[0]["content"][1:] and told[1:] == shown[1:]
