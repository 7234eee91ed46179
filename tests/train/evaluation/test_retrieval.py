import itertools

import pytest
import torch

from med3dvlm.train.evaluation.retrieval import num_scored, score_retrieval
from med3dvlm.train.evaluation.statistics import bootstrap_interval


def test_galleries_of_the_first_pairs_against_a_plain_count():
    generator = torch.Generator().manual_seed(4)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    groups, blind_order = torch.tensor([7, 8, 7, 9, 8]), [2, 3, 4, 0, 1]
    cases = ["a", "b", "c", "d", "e"]
    scores, curves = score_retrieval(images, texts, groups, cases, blind_order, gallery_sizes=(2, 4), ranks=(1, 2))

    def count(volumes, size, is_to_report, rank, any_identical):
        hits = 0
        for query in range(size):
            own = [
                float(volumes[query] @ texts[place] if is_to_report else texts[query] @ volumes[place])
                for place in range(size)
            ]
            nearest = sorted(range(size), key=lambda place: -own[place])[:rank]
            hits += any(place == query or (any_identical and groups[place] == groups[query]) for place in nearest)
        return hits / size

    assert len(scores) == 2 * 2 * 2 * 2
    other = images[blind_order]  # of all pairs: the volume of another case may be one beyond the gallery
    for score in scores:
        direction, size = score.group.split(", ")
        arguments = (
            int(size),
            direction == "volume to report",
            int(score.metric[-1]),
            score.metric.startswith("deduplicated"),
        )
        assert score.value == pytest.approx(count(images, *arguments)), score
        assert score.blind == pytest.approx(count(other, *arguments)), score
        assert score.count == int(size) and score.chance >= arguments[2] / int(size) - 1e-9
    assert {score.group for score in scores} == set(curves)
    assert curves["volume to report, 4"]["blind"] == [count(other, 4, True, rank, False) for rank in (1, 2, 3, 4)]
    assert {round(score.value, 3) for score in scores} - {0.0, 1.0}  # there is something to count


def test_intervals_resample_cases_and_chances_are_those_of_all_orders():
    generator = torch.Generator().manual_seed(11)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    groups, cases = [7, 8, 7, 9, 8], ["a", "a", "b", "c", "c"]
    scores, _ = score_retrieval(images, texts, torch.tensor(groups), cases, gallery_sizes=(4, 5), ranks=(1, 2))
    for score in scores:
        direction, size, rank = *score.group.split(", "), int(score.metric[-1])
        places = range(int(size))
        queries, gallery = (images, texts) if direction == "volume to report" else (texts, images)

        def is_match(query, place, score=score):
            return place == query or (score.metric.startswith("deduplicated") and groups[place] == groups[query])

        def is_hit(query, order, rank=rank, is_match=is_match):
            return any(is_match(query, place) for place in order[:rank])

        similarities = queries @ gallery.T
        hits = [
            float(is_hit(query, sorted(places, key=lambda place: -similarities[query, place]))) for query in places
        ]
        assert (score.low, score.high) == bootstrap_interval(hits, cases[: len(hits)]), score
        orders = list(itertools.permutations(places))
        chance = sum(is_hit(query, order) for query in places for order in orders) / (len(places) * len(orders))
        assert score.chance == pytest.approx(chance), score
    # Cases are wider than pairs, and there is something to tell the two recalls apart by.
    assert all(score.low <= score.value <= score.high for score in scores)
    assert len({(score.low, score.high) for score in scores if score.low < score.high}) > 2


@pytest.mark.parametrize("num_pairs, expected", [(450, 100), (500, 500), (9000, 2000), (40, 40), (0, 0)])
def test_pairs_beyond_the_largest_gallery_are_not_scored(num_pairs, expected):
    assert num_scored(num_pairs) == expected


def test_fewer_pairs_than_the_smallest_gallery_are_one_gallery():
    scores, curves = score_retrieval(torch.eye(3), torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert set(curves) == {"volume to report, 3", "report to volume, 3"}
    assert all(score.value == 1 and score.blind is None for score in scores)
