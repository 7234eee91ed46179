import pytest
import torch

from med3dvlm import DCFormerConfig, DCFormerSiglipConfig, DCFormerSiglipModel
from med3dvlm.train.tokenizers import train_word_piece_tokenizer
from med3dvlm.train.whitening import whiten_text_projection


ORGANS = ("liver", "spleen", "right kidney", "left kidney", "right lung")
REPORTS = [
    f"{size} {kind} of the {organ}." for size in ("Small", "Large") for kind in ("cyst", "mass") for organ in ORGANS
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DCFormerSiglipConfig(
        vision_config=DCFormerConfig(image_size=(32, 64, 96), hidden_sizes=(4, 6, 8, 10, 12), depths=(1, 1, 1, 1, 1)),
        text_config={
            "model_type": "bert",
            "vocab_size": 120,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        projection_dim=28,
        text_pooling="mean",
    )
    return DCFormerSiglipModel(config).train()


@pytest.fixture
def tokenizer():
    return train_word_piece_tokenizer(REPORTS, 120)


def vectors_of(model, tokenizer, texts):
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval().get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.double()


def test_vectors_are_centred_and_uncorrelated(model, tokenizer):
    before = vectors_of(model, tokenizer, REPORTS)
    kept = whiten_text_projection(model, tokenizer, [*REPORTS, *REPORTS[:3]], batch_size=7, smallest_ratio=1e-2)
    after = vectors_of(model, tokenizer, REPORTS)
    assert 5 < kept < len(REPORTS)
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(28, dtype=torch.float64), atol=1e-4, rtol=0)
    expected = torch.zeros(28, 28, dtype=torch.float64)
    expected[:kept, :kept] = torch.eye(kept, dtype=torch.float64)
    torch.testing.assert_close(after.T @ after / len(REPORTS), expected, atol=1e-3, rtol=0)
    # The plain formula: principal components, each divided by its standard deviation.
    covariance = torch.cov(before.T, correction=0)
    values, axes = torch.linalg.eigh(covariance)
    values, axes = values.flip(0)[:kept], axes.flip(1)[:, :kept]
    components = (before - before.mean(dim=0)) @ axes / values.sqrt()
    torch.testing.assert_close(after[:, :kept].abs(), components.abs(), atol=1e-3, rtol=0)  # an axis has no sign


def test_reports_differ_more_than_before(model, tokenizer):
    def similarity():
        vectors = torch.nn.functional.normalize(vectors_of(model, tokenizer, REPORTS), dim=1)
        return float((vectors @ vectors.T).fill_diagonal_(0).max())

    before = similarity()
    whiten_text_projection(model, tokenizer, REPORTS)
    assert before > 0.99 > 0.9 > similarity()


def test_only_the_projection_changes_and_the_mode_stays(model, tokenizer):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    whiten_text_projection(model, tokenizer, REPORTS)
    assert model.training
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {"text_projection.weight", "text_projection.bias"}


@pytest.mark.parametrize("texts", [[], ["The same."] * 4])
def test_reports_that_do_not_differ_are_refused(model, tokenizer, texts):
    with pytest.raises(ValueError, match=rf"got {len(set(texts))} different reports: leave out `model.whiten_text`"):
        whiten_text_projection(model, tokenizer, texts)
