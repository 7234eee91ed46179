import pytest
import torch

from med3dvlm.train.evaluation.retrieval import score_retrieval


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


def test_fewer_pairs_than_the_smallest_gallery_are_one_gallery():
    scores, curves = score_retrieval(torch.eye(3), torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert set(curves) == {"volume to report, 3", "report to volume, 3"}
    assert all(score.value == 1 and score.blind is None for score in scores)
