"""Scores of embeddings and answers, each to be read beside chance and beside the blind control.

The blind control gives every question the volume of another case. A model that scores there what it scores with the right
volume has not used the volume.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

import datasets
import torch


RECALL_RANKS = (1, 5, 10)

Case = TypeVar("Case")


def retrieval_recall(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    group_ids: torch.Tensor,
    gallery_size: int | None = None,
    ranks: Sequence[int] = RECALL_RANKS,
) -> dict[str, float]:
    """
    Share of queries whose match is among the `k` nearest of the gallery. Query `i` belongs to entry `i`.

    Equal similarities are counted as if their order were drawn: an entry that ties with others gets its expected share. Equal
    entries always tie.

    Args:
        queries (`torch.Tensor` of shape `(num_pairs, projection_dim)`):
            Unit vectors.
        gallery (`torch.Tensor` of shape `(num_pairs, projection_dim)`):
            Unit vectors, in the same order.
        group_ids (`torch.Tensor` of shape `(num_pairs,)`):
            Equal for pairs with the identical report.
        gallery_size (`int`, *optional*):
            Pairs compared with each other at a time: the recall is the mean over the whole galleries of that size, one after
            the other. By default all pairs are one gallery.
        ranks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`):
            Values of `k`.

    Returns:
        `dict` with `recall_at_k`, where only the pair's own report or volume is a match, as in the paper, and
        `deduplicated_recall_at_k`, where any with the identical report is, both in [0, 1].

    Raises:
        ValueError: there are fewer pairs than one gallery needs, or a vector is not finite.
    """
    check_finite("queries", queries)
    check_finite("gallery", gallery)
    size = gallery_size or len(queries)
    if size > len(queries) or size < 1:
        raise ValueError(
            f"A gallery of {size} needs as many pairs, got {len(queries)}: choose a smaller `gallery_size`."
        )
    sums: dict[str, float] = {}
    starts = range(0, len(queries) - size + 1, size)
    for start in starts:
        block = slice(start, start + size)
        for key, hits in retrieval_hits(queries[block], gallery[block], group_ids[block], ranks).items():
            sums[key] = sums.get(key, 0.0) + float(hits.mean())
    return {key: value / len(starts) for key, value in sums.items()}


def retrieval_hits(
    queries: torch.Tensor, gallery: torch.Tensor, group_ids: torch.Tensor, ranks: Sequence[int] = RECALL_RANKS
) -> dict[str, torch.Tensor]:
    """
    Whether the match of each query is among the `k` nearest of one gallery; where it ties with others, the chance that it is.

    Args:
        queries, gallery, group_ids (`torch.Tensor`), ranks (`Sequence[int]`):
            As for [`retrieval_recall`].

    Returns:
        `dict` from `recall_at_k` and `deduplicated_recall_at_k` to a `torch.Tensor` of shape `(num_pairs,)`, in [0, 1].

    Raises:
        ValueError: a vector is not finite; no comparison with it would be true, and it would count as the nearest.
    """
    check_finite("queries", queries)
    check_finite("gallery", gallery)
    # Equal entries are compared once: in a large product, their similarities may differ in the last bit by where they stand.
    entries, places = torch.unique(gallery.float(), dim=0, return_inverse=True)
    similarities = (queries.float() @ entries.T)[:, places]
    same = group_ids[:, None] == group_ids[None]
    own = similarities.diagonal().unsqueeze(1)
    best = similarities.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
    nearer, ties = (similarities > own).sum(dim=1), (similarities == own).sum(dim=1)
    # An identical report is as good as the own one, so only others stand in its way.
    before = (~same & (similarities > best)).sum(dim=1)
    matches_at_best = (same & (similarities == best)).sum(dim=1)
    others_at_best = (~same & (similarities == best)).sum(dim=1)
    hits = {}
    for rank in ranks:
        hits[f"recall_at_{rank}"] = ((rank - nearer) / ties).clamp(0, 1)
        hits[f"deduplicated_recall_at_{rank}"] = _chance_of_a_match(rank - before, matches_at_best, others_at_best)
    return hits


def one_vector_per_text(text_embeds: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    The vectors of reports with one for all that are identical, that of the first: made in other batches they differ by
    rounding, which would decide between reports that nobody can tell apart.

    Args:
        text_embeds (`torch.Tensor` of shape `(num_pairs, projection_dim)`):
            Vectors of the reports.
        group_ids (`torch.Tensor` of shape `(num_pairs,)`):
            Equal for identical reports.

    Returns:
        `torch.Tensor` of shape `(num_pairs, projection_dim)`.
    """
    first: dict[int, int] = {}
    return text_embeds[[first.setdefault(group, place) for place, group in enumerate(group_ids.tolist())]]


def check_finite(name: str, vectors: torch.Tensor) -> None:
    """
    Raises:
        ValueError: some of `vectors`, of shape `(num_vectors, dim)` and called `name`, have a NaN or infinite value.
    """
    rows = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
        raise ValueError(
            f"{name}: {len(rows)} of {len(vectors)} vectors are not finite (rows {shown}), so nothing can be ranked by them. Look for "
            "NaN in the model's weights and in the volumes; float16 may have overflowed."
        )


def _chance_of_a_match(places: torch.Tensor, num_matches: torch.Tensor, num_others: torch.Tensor) -> torch.Tensor:
    """
    The chance that at least one of the matches is among the first `places` of matches and others in random order:
    1 - C(others, places) / C(matches + others, places). All arguments are integers of shape `(num_pairs,)`.
    """
    drawn = places.clamp(min=0).minimum(num_others)  # with more places than others, a match has one for certain
    total = num_matches + num_others

    def log_factorial(number: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(number.double() + 1)

    miss = log_factorial(num_others) - log_factorial(num_others - drawn)
    miss = miss - log_factorial(total) + log_factorial(total - drawn)
    return torch.where(places > num_others, 1.0, 1 - miss.exp()).clamp(0, 1).float()


def chance_recall(group_ids: torch.Tensor, gallery_size: int, rank: int = 1) -> float:
    """
    What a random order of the gallery gives: the mean over queries of the chance that one of the `m` identical reports in its
    gallery is among the first `rank`.
    """
    chances = []
    for start in range(0, len(group_ids) - gallery_size + 1, gallery_size):
        block = group_ids[start : start + gallery_size]
        for matches in (block[:, None] == block[None]).sum(dim=1).tolist():
            miss = 1.0
            for place in range(min(rank, gallery_size)):
                miss *= max(gallery_size - matches - place, 0) / (gallery_size - place)
            chances.append(1 - miss)
    return sum(chances) / len(chances)


def from_half_way_round(cases: Sequence[Case], place: int) -> Iterator[Case]:
    """All of `cases`, once each, from the one that is half-way round the list from `place`: neighbours in a list are often alike."""
    start = place + len(cases) // 2
    return (cases[(start + turn) % len(cases)] for turn in range(len(cases)))


def with_volume_of_another_case(samples: datasets.Dataset, broken: Collection[str] = ()) -> datasets.Dataset:
    """
    The samples with the volume of another case each, for the blind control: all samples of a case get that of one other.

    Args:
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`.
        broken (`Collection[str]`, *optional*):
            Images that cannot be read. No sample gets one of them; a case whose other one is sound keeps it.

    Raises:
        ValueError: all samples are of one case, or there is no sound volume of another one.
    """
    # Of each case the images, and the one that stands for it elsewhere.
    images: dict[str, set[str]] = {}
    sound: dict[str, str] = {}
    for case, image in zip(samples["case"], samples["image"]):
        images.setdefault(case, set()).add(image)
        if image not in broken:
            sound.setdefault(case, image)
    cases = list(images)
    if len(cases) < 2:
        raise ValueError(f"The blind control needs samples of at least two cases, got {len(cases)}.")
    other: dict[str, str] = {}
    for place, case in enumerate(cases):
        others = from_half_way_round(cases, place)
        found = next((sound[name] for name in others if name in sound and sound[name] not in images[case]), None)
        if found is None and case in sound:
            raise ValueError(
                "The blind control needs sound volumes of at least two cases, and there is none beside those of one case: take "
                "more cases, or leave the control out."
            )
        other[case] = found or ""  # nothing of a case that is left out itself
    replaced = [other[case] for case in samples["case"]]
    return samples.remove_columns("image").add_column("image", replaced).cast(samples.features)


__all__ = [
    "RECALL_RANKS",
    "chance_recall",
    "check_finite",
    "from_half_way_round",
    "one_vector_per_text",
    "retrieval_hits",
    "retrieval_recall",
    "with_volume_of_another_case",
]
