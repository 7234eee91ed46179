"""Whitening of report vectors before stage 1, so that different reports start with different vectors."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def whiten_text_projection(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 512,
    smallest_ratio: float = 0.05,
    batch_size: int = 256,
) -> int:
    """
    Changes the text projection of a dual encoder so that the vectors of `texts` have mean zero, and unit variance along each
    of their principal axes, with no correlation between them.

    Text encoders map all texts into a narrow cone: the vectors of two reports that differ in the one word that matters
    are nearly the same, and a contrastive loss takes long to part them. Whitening after Su et al. 2021 (BERT-whitening,
    arXiv:2103.15316), here folded into the weights of the projection: `W x + b` becomes `A (W x + b - mean)`, where the
    rows of `A` are the principal axes, each divided by its standard deviation. Axes along which the vectors hardly differ
    would only amplify noise, and are dropped.

    Args:
        model ([`DCFormerSiglipModel`]):
            Changed in place.
        tokenizer (`PreTrainedTokenizerBase`):
            Of its text encoder.
        texts (`Sequence[str]`):
            Reports; repetitions count once.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of a report; what is beyond is cut off.
        smallest_ratio (`float`, *optional*, defaults to 0.05):
            Smallest standard deviation along an axis that is kept, relative to the largest.
        batch_size (`int`, *optional*, defaults to 256):
            Reports at a time.

    Returns:
        `int`: number of axes kept, at most `projection_dim`.

    Raises:
        ValueError: the texts, or their vectors, do not differ.
    """
    different = sorted(set(texts))
    was_training = model.training
    model.eval()
    vectors = []
    for start in range(0, len(different), batch_size):
        inputs = tokenizer(
            different[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=True)
        vectors.append(features.pooler_output.double())
    model.train(was_training)

    features = torch.cat(vectors) if vectors else torch.empty(0, 1, dtype=torch.float64)
    mean = features.mean(dim=0)
    _, deviations, axes = torch.linalg.svd((features - mean) / max(1, len(features)) ** 0.5, full_matrices=False)
    if len(different) < 2 or deviations[0] <= 1e-6 * mean.norm():
        raise ValueError(
            f"Whitening needs reports with different vectors, got {len(different)} different reports: leave out "
            "`model.whiten_text`, or check the reports with `med3dvlm prepare check`."
        )
    kept = int((deviations >= smallest_ratio * deviations[0]).sum())
    whitening = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    whitening[:kept] = axes[:kept] / deviations[:kept, None]

    projection = model.text_projection
    weight, bias = projection.weight.double(), projection.bias.double()
    projection.weight.copy_(whitening @ weight)
    projection.bias.copy_(whitening @ (bias - mean))
    return kept


__all__ = ["whiten_text_projection"]
