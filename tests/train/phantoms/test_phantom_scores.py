import datasets
import pytest
import torch
from tiny import tiny_siglip

from med3dvlm.train.answering import embed_texts
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.demo import build_tiny_model
from med3dvlm.train.phantoms import scores
from med3dvlm.train.phantoms.scores import exchange, score_retrieval


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


def test_an_encoder_that_sees_the_size_alone_is_right_about_the_size_alone(monkeypatch, tmp_path):
    rows = [
        {
            "image": str(row), "case": str(row), "task": "report", "question": "", "choices": [], "answer": report,
            "answer_choice": "", "question_type": 0,
        }
        for row, report in enumerate(REPORTS)
    ]  # fmt: skip

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
