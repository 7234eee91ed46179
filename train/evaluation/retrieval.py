"""Retrieval as in the paper: recall in galleries of the first N pairs, in both directions."""

from collections.abc import Sequence

import torch

from ..scoring import RECALL_RANKS, chance_recall, retrieval_hits
from .scores import Score
from .statistics import bootstrap_interval


GALLERY_SIZES = (100, 500, 1000, 2000)
# Query -> gallery.
DIRECTIONS = ("volume to report", "report to volume")
TASK = "retrieval"


def num_scored(num_pairs: int, gallery_sizes: Sequence[int] = GALLERY_SIZES) -> int:
    """
    How many of the first pairs any gallery has: the largest size that there are pairs for, or all pairs if there are fewer than
    the smallest. The others need not be embedded.
    """
    return max((size for size in gallery_sizes if size <= num_pairs), default=num_pairs)


def score_retrieval(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    group_ids: torch.Tensor,
    cases: Sequence[str],
    blind_order: Sequence[int] | None = None,
    gallery_sizes: Sequence[int] = GALLERY_SIZES,
    ranks: Sequence[int] = RECALL_RANKS,
) -> tuple[list[Score], dict[str, dict[str, list[float]]]]:
    """
    Recall at `k` in galleries of the first N pairs, for each N that there are pairs for, and for all of them if there are fewer
    than the smallest.

    `recall_at_k` is the paper's: only the pair's own report, or volume, is a match. In `deduplicated_recall_at_k` any with the
    identical report is: the 120,000 volumes of M3D-Cap share 42,000 texts, and nobody could tell.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(num_pairs, projection_dim)`):
            Unit vectors.
        group_ids (`torch.Tensor` of shape `(num_pairs,)`):
            Equal for identical reports.
        cases (`Sequence[str]`):
            Case of each pair; intervals resample cases.
        blind_order (`Sequence[int]`, *optional*):
            For each pair the place of another case's volume, for the blind control.
        gallery_sizes, ranks (`Sequence[int]`, *optional*):
            Values of N and k.

    Returns:
        The scores, with groups such as "volume to report, 100"; and for each group curves over k from 1 to N: `recall`, and with
        `blind_order` also `blind`.
    """
    sizes = [size for size in gallery_sizes if size <= len(cases)] or [len(cases)]
    scores: list[Score] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        for direction in DIRECTIONS:
            group = f"{direction}, {size}"

            def hits_of(images: torch.Tensor, ks: Sequence[int], direction: str = direction, size: int = size):
                pair = (images[:size], text_embeds[:size])
                queries, gallery = pair if direction == DIRECTIONS[0] else pair[::-1]
                return retrieval_hits(queries, gallery, group_ids[:size], ks)

            blind_images = None if blind_order is None else image_embeds[torch.as_tensor(blind_order)]
            hits = hits_of(image_embeds, ranks)
            blind_hits = None if blind_images is None else hits_of(blind_images, ranks)
            for rank in ranks:
                for metric, ids in (
                    (f"recall_at_{rank}", torch.arange(size)),
                    (f"deduplicated_recall_at_{rank}", group_ids[:size]),
                ):
                    low, high = bootstrap_interval(hits[metric].tolist(), cases[:size])
                    scores.append(
                        Score(
                            task=TASK,
                            metric=metric,
                            group=group,
                            value=float(hits[metric].mean()),
                            low=low,
                            high=high,
                            count=size,
                            blind=None if blind_hits is None else float(blind_hits[metric].mean()),
                            chance=chance_recall(ids, size, rank),
                        )
                    )
            all_ranks = range(1, size + 1)
            curve = hits_of(image_embeds, all_ranks)
            curves[group] = {"recall": [float(curve[f"recall_at_{rank}"].mean()) for rank in all_ranks]}
            if blind_images is not None:
                curve = hits_of(blind_images, all_ranks)
                curves[group]["blind"] = [float(curve[f"recall_at_{rank}"].mean()) for rank in all_ranks]
    return scores, curves


__all__ = ["DIRECTIONS", "GALLERY_SIZES", "TASK", "num_scored", "score_retrieval"]
