import math

import datasets
import pytest
import torch
from tiny import build_tiny_model, tiny_siglip

from med3dvlm.train.answering import embed_texts
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.phantoms import scores
from med3dvlm.train.phantoms.scores import exchange, score_answers, score_retrieval
from med3dvlm.train.prompts import format_answer


REPORTS = [
    "Axial scan. Small cyst of the liver, upper part.",
    "Axial scan. Large cyst of the liver, upper part.",
    "Axial scan. Small cyst of the left kidney, lower part.",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cyst of the left lung, right of the spine.", "Cyst of the right lung, left of the spine."),
        ("Cyst of the liver.", None),
        ("left", "right"),
    ],
)
def test_words_are_exchanged_for_each_other(text, expected):
    assert exchange(text, "left", "right") == expected


def test_texts_have_the_vectors_of_the_model():
    processor = build_tiny_model()[1]
    model = tiny_siglip().eval()
    model.text_model.resize_token_embeddings(len(processor.tokenizer))
    together = embed_texts(model, processor, REPORTS)
    assert together.shape[0] == 3
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embed_texts(model, processor, REPORTS[1:2])[0], together[1], atol=1e-5, rtol=1e-4)


def sample_of(case, task, answer, question_type=0):
    """Of a closed question the answer is the letter of the right choice."""
    is_closed = task == "closed_vqa"
    return {
        "image": f"{case}.nii.gz", "case": f"case {case}", "task": task, "question": "" if task == "report" else "What?",
        "choices": ["liver", "spleen", "kidney", "lung"] if is_closed else [], "answer": "organ" if is_closed else answer,
        "answer_choice": answer if is_closed else "", "question_type": question_type,
    }  # fmt: skip


def read_from(rows):
    def read_task(study, split, task):
        assert (study, split) == ("study", "test")
        return datasets.Dataset.from_list([row for row in rows if row["task"] == task], features=SAMPLE_FEATURES)

    return read_task


def test_a_model_that_reads_the_image_alone_is_right_and_the_control_and_chance_are_not(monkeypatch):
    pytest.importorskip("evaluate", reason="needs the extra `eval`")
    reports = ["Small cyst.", "Large mass.", "Small cyst.", "Clear."]
    rows = [
        *(sample_of(case, "closed_vqa", letter, 3) for case, letter in enumerate("ABCB")),
        *(sample_of(case, "yes_no_vqa", word, 4) for case, word in enumerate(["yes", "yes", "no", "yes"])),
        *(sample_of(case, "open_vqa", word, 3) for case, word in enumerate(["liver", "lung", "liver", "spleen"])),
        *(sample_of(case, "open_vqa", word, 2) for case, word in enumerate(["arterial", "venous"])),
        *(sample_of(case, "report", report) for case, report in enumerate(reports)),
    ]
    known = {(row["image"], row["task"], row["question_type"]): format_answer(row) for row in rows}
    known |= {("2.nii.gz", "open_vqa", 2): "arterial", ("3.nii.gz", "open_vqa", 2): "arterial"}  # are not asked

    def answer_samples(model, processor, samples, volumes, **options):
        assert (model, processor, volumes) == ("model", "processor", "volumes")
        return [known[row["image"], row["task"], row["question_type"]] for row in samples]

    monkeypatch.setattr(scores, "read_task", read_from(rows))
    monkeypatch.setattr(scores, "answer_samples", answer_samples)
    found, records = score_answers("model", "processor", "study", "volumes")
    # In the control the cases 0 and 2, and 1 and 3, have each other's volumes; by the order of cases, so have the answers of
    # chance, but for the phase, which only the cases 0 and 1 are asked: there the control has volumes of its own.
    # Of BLEU the full stop is one of 3 tokens, and one of 2 in a text that is too short.
    bleu = (2 + 1 / 3 + math.exp(1 - 3 / 2) / 2) / 4
    expected = {
        "closed VQA, organ": (0.5, 0.25),
        "closed VQA, mean": (0.5, 0.25),
        "yes/no VQA, abnormality": (0.5, 0.5),
        "yes/no VQA, mean": (0.5, 0.5),
        "open VQA, phase": (0.5, 0.0),
        "open VQA, organ": (0.5, 0.5),
        "open VQA, mean": (0.5, 0.25),
        "report, BLEU-1": (bleu, bleu),
        "report, ROUGE-1": (0.5, 0.5),
        "report, every word right": (0.5, 0.5),
    }
    assert {row["score"] for row in found} == set(expected)
    for row in found:
        assert row["value"] == pytest.approx(1), row
        assert (row["blind"], row["chance"]) == pytest.approx(expected[row["score"]]), row
    first, last = records[0], records[-1]
    assert (first["case"], first["task"], first["expected"]) == ("case 0", "closed_vqa", "A. organ")
    assert (first["answer"], first["blind_answer"]) == ("A. organ", "C. organ")
    assert (last["expected"], last["answer"], last["blind_answer"]) == ("Clear.", "Clear.", "Large mass.")
    _, records = score_answers("model", "processor", "study", "volumes", num_cases=2)
    assert {record["case"] for record in records} == {"case 0", "case 1"}


def test_galleries_count_identical_reports_and_the_control_has_other_volumes(monkeypatch):
    # The third volume looks like the second.
    reports, seen = ["Clear.", "A mass.", "Clear.", "A nodule."], ["Clear.", "A mass.", "A mass.", "A nodule."]
    words = sorted(set(reports))

    def vectors(texts):
        return torch.eye(len(words))[[words.index(text) for text in texts]]

    rows = [sample_of(case, "report", report) for case, report in enumerate(reports)]
    monkeypatch.setattr(scores, "read_task", read_from(rows))
    monkeypatch.setattr(scores, "embed_samples", lambda *_: (vectors(seen), vectors(reports)))
    monkeypatch.setattr(scores, "embed_texts", lambda *_: pytest.fail("there is nothing to exchange"))
    found = {row["score"]: row for row in score_retrieval(None, None, "study", None)}
    expected = {  # value, blind, chance; a tie counts as the chance of the right one to be first
        "deduplicated R@1 of 4, volume to report": (3 / 4, 1 / 4, 3 / 8),
        "R@1 of 4, volume to report": (2.5 / 4, 0.5 / 4, 1 / 4),
        "deduplicated R@1 of 4, report to volume": (3.5 / 4, 2 / 4, 3 / 8),
        "R@1 of 4, report to volume": (2.5 / 4, 1 / 4, 1 / 4),
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert (found[name]["value"], found[name]["blind"], found[name]["chance"]) == pytest.approx(values), name


def test_an_encoder_that_sees_the_size_alone_is_right_about_the_size_alone(monkeypatch, tmp_path):
    rows = [sample_of(case, "report", report) for case, report in enumerate(REPORTS)]

    def vectors(model, processor, texts):
        return torch.tensor([[1.0, 0.0] if "Small" in text else [0.0, 1.0] for text in texts])

    def pairs(model, processor, samples, volumes):
        return vectors(model, processor, samples["answer"]), vectors(model, processor, samples["answer"])

    monkeypatch.setattr(scores, "read_task", lambda *_: datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES))
    monkeypatch.setattr(scores, "embed_samples", pairs)
    monkeypatch.setattr(scores, "embed_texts", vectors)
    found = {row["score"]: row for row in score_retrieval(None, None, tmp_path, None)}
    size = found["the right one of two reports, small or large"]
    assert size["value"] == 1.0 and size["blind"] < 1.0 and size["chance"] == 0.5
    assert found["the right one of two reports, upper or lower part"]["value"] == 0.5
    assert found["the right one of two reports, left or right"]["value"] == 0.5
