import itertools

import datasets
import pytest
import torch

from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.scoring import (
    chance_recall,
    from_half_way_round,
    one_vector_per_text,
    retrieval_hits,
    retrieval_recall,
    with_volume_of_another_case,
)


def unit(vectors):
    return torch.nn.functional.normalize(torch.tensor(vectors), dim=1)


def test_recall_against_a_plain_count():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (
        torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=1) for _ in range(2)
    )
    groups = torch.randint(0, 12, (30,), generator=generator)
    recalls = retrieval_recall(queries, gallery, groups)
    for rank in (1, 5, 10):
        nearest = (queries @ gallery.T).topk(rank).indices
        plain = [index in row for index, row in enumerate(nearest)]
        matching = [bool((groups[row] == groups[index]).any()) for index, row in enumerate(nearest)]
        assert recalls[f"recall_at_{rank}"] == pytest.approx(sum(plain) / 30)
        assert recalls[f"deduplicated_recall_at_{rank}"] == pytest.approx(sum(matching) / 30)


def test_ties_count_as_if_their_order_were_drawn():
    gallery = unit([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    apart = retrieval_recall(gallery, gallery, torch.arange(4), ranks=(1, 2))
    assert apart["recall_at_1"] == 0.5 and apart["deduplicated_recall_at_1"] == 0.5 and apart["recall_at_2"] == 1
    same = retrieval_recall(gallery, gallery, torch.tensor([0, 0, 1, 1]), ranks=(1,))
    assert same["deduplicated_recall_at_1"] == 1 and same["recall_at_1"] == 0.5
    constant = retrieval_recall(torch.ones(8, 3), torch.ones(8, 3), torch.arange(8), ranks=(1,))
    assert constant["deduplicated_recall_at_1"] == pytest.approx(1 / 8)  # a collapsed model scores chance


def test_ties_of_identical_reports_against_every_order():
    generator = torch.Generator().manual_seed(0)
    similarities = torch.randint(0, 2, (6, 6), generator=generator).float()
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    orders = list(itertools.permutations(range(6)))
    hits = retrieval_hits(similarities, torch.eye(6), groups, ranks=(1, 2, 3, 4))
    for rank in (1, 2, 3, 4):
        for query, row in enumerate(similarities.tolist()):
            nearest = [sorted(range(6), key=lambda place: (-row[place], order[place]))[:rank] for order in orders]
            matching = sum(any(groups[place] == groups[query] for place in places) for places in nearest)
            assert float(hits[f"deduplicated_recall_at_{rank}"][query]) == pytest.approx(matching / len(orders))
            own = sum(query in places for places in nearest)
            assert float(hits[f"recall_at_{rank}"][query]) == pytest.approx(own / len(orders))


def test_a_collapsed_model_scores_chance_whatever_reports_are_identical():
    constant, groups = torch.ones(12, 3), torch.arange(12) % 4
    recalls = retrieval_recall(constant, constant, groups)
    for rank in (1, 5, 10):
        assert recalls[f"deduplicated_recall_at_{rank}"] == pytest.approx(chance_recall(groups, 12, rank))


def test_equal_entries_tie_wherever_they_stand():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (
        torch.nn.functional.normalize(torch.randn(9, 64, generator=generator), dim=1) for _ in range(2)
    )
    gallery[[4, 8]] = gallery[0].clone()  # a matrix product may sum the last column in another order than the first
    queries[[4, 8]] = queries[0].clone()
    hits = retrieval_hits(queries, gallery, torch.arange(9), ranks=(1, 9))
    own = hits["recall_at_1"][[0, 4, 8]]
    assert own.tolist() in ([0, 0, 0], [pytest.approx(1 / 3)] * 3)
    queries[:] = gallery[0]  # nearest to all: three entries tie for each
    hits = retrieval_hits(queries, gallery, torch.arange(9), ranks=(1,))["recall_at_1"]
    assert hits.tolist() == [pytest.approx(1 / 3) if place in (0, 4, 8) else 0 for place in range(9)]


def test_identical_reports_have_one_vector():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-7], [0.6, 0.8]])
    assert one_vector_per_text(vectors, torch.tensor([5, 2, 5, 3])).equal(vectors[[0, 1, 0, 3]])


def test_vectors_that_are_not_finite_are_refused():
    vectors = unit([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    broken = vectors.clone()
    broken[1:] = torch.tensor([[float("nan"), 0.0], [0.0, 1.0], [0.0, float("inf")]])
    with pytest.raises(ValueError, match=r"queries: 2 of 4 vectors are not finite \(rows 1, 3\)"):
        retrieval_hits(broken, vectors, torch.arange(4))
    with pytest.raises(ValueError, match=r"gallery: 4 of 4 vectors are not finite \(rows 0, 1, 2, \.\.\.\)"):
        retrieval_recall(vectors, torch.full((4, 2), float("nan")), torch.arange(4))
    with pytest.raises(ValueError, match=r"queries: 2 of 4 vectors are not finite \(rows 1, 3\)"):
        retrieval_recall(broken, vectors, torch.arange(4), gallery_size=2)  # rows of all pairs, not of a gallery


def test_galleries_are_scored_one_by_one():
    queries = unit([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    recalls = retrieval_recall(queries, queries, torch.arange(5), gallery_size=2, ranks=(1,))
    assert recalls["recall_at_1"] == 1  # among all five, equal vectors would tie; the incomplete gallery is left out
    with pytest.raises(ValueError, match="A gallery of 9 needs as many pairs, got 5"):
        retrieval_recall(queries, queries, torch.arange(5), gallery_size=9)


def test_chance_of_a_recall():
    assert chance_recall(torch.arange(100), 100) == pytest.approx(0.01)
    assert chance_recall(torch.arange(100), 100, rank=5) == pytest.approx(0.05)
    assert chance_recall(torch.tensor([0, 0, 1, 2]), 4) == pytest.approx((2 + 2 + 1 + 1) / 16)


def rows(cases):
    return datasets.Dataset.from_list(
        [
            {
                "image": f"{case}.nii.gz",
                "case": case,
                "task": "closed_vqa",
                "question": "?",
                "choices": ["a", "b", "c", "d"],
                "answer": "b",
                "answer_choice": "B",
                "question_type": 1 + place % 2,
            }
            for place, case in enumerate(cases)
        ],
        features=SAMPLE_FEATURES,
    )


def test_blind_control_gives_every_case_the_volume_of_another():
    samples = rows(["x", "x", "y", "z", "z"])
    blind = with_volume_of_another_case(samples)
    assert blind.features == samples.features and blind["case"][:] == samples["case"][:]
    pairs = {(case, image) for case, image in zip(samples["case"], blind["image"])}
    assert len(pairs) == 3 and all(image != f"{case}.nii.gz" for case, image in pairs)
    with pytest.raises(ValueError, match="at least two cases, got 1"):
        with_volume_of_another_case(rows(["x", "x"]))


def test_other_cases_begin_half_way_round():
    assert list(from_half_way_round("abcde", 0)) == list("cdeab")
    assert list(from_half_way_round("abcd", 3)) == list("bcda")


def test_blind_control_passes_over_volumes_that_cannot_be_read():
    samples = rows(["v", "w", "w", "x", "y", "z"])
    plain = with_volume_of_another_case(samples)["image"][:]
    assert plain == [f"{case}.nii.gz" for case in "xyyzvw"]
    images = with_volume_of_another_case(samples, {"y.nii.gz"})["image"][:]
    assert images == [f"{case}.nii.gz" for case in "xzzzvw"]  # all but those of the broken one stay
    with pytest.raises(ValueError, match="sound volumes of at least two cases, and there is none beside those of one"):
        with_volume_of_another_case(samples, {f"{case}.nii.gz" for case in "vwyz"})


def test_a_volume_that_two_cases_share_is_no_control():
    samples = rows(["v", "w", "x"]).map(lambda row: {"image": row["image"].replace("w", "v")})
    assert with_volume_of_another_case(samples)["image"][:] == ["x.nii.gz", "x.nii.gz", "v.nii.gz"]
