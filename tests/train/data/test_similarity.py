import itertools

import pytest
import torch

from med3dvlm.train.data import similarity
from med3dvlm.train.data.similarity import SimilarReports, vectors_of_reports


ORGANS = ("liver", "spleen", "kidney", "lung")
REPORTS = [
    f"{size} {kind} of the {part} {organ}."
    for size, kind, part, organ in itertools.product(
        ("Large", "Small"), ("cyst", "mass", "nodule"), ("upper", "lower"), ORGANS
    )
] * 2


def test_vectors_are_words_weighted_by_their_rarity():
    vectors = vectors_of_reports(["Cyst of liver", "cyst of SPLEEN, cyst", "of lung"])
    assert vectors.shape == (3, 5)
    rare, common, everywhere = (1 + torch.log(torch.tensor(value)) for value in (3.0, 1.5, 1.0))
    product = common**2 + everywhere**2
    lengths = (rare**2 + common**2 + everywhere**2).sqrt(), (rare**2 + everywhere**2).sqrt()
    torch.testing.assert_close(vectors[0] @ vectors[1], product / lengths[0] ** 2)
    torch.testing.assert_close(vectors[0] @ vectors[2], everywhere**2 / (lengths[0] * lengths[1]))


def test_many_words_are_projected_and_keep_their_angles(monkeypatch):
    exact = vectors_of_reports(REPORTS)
    monkeypatch.setattr(similarity, "NUM_FEATURES", exact.shape[1] - 1)
    monkeypatch.setattr(torch, "randn", lambda rows, columns, generator: torch.eye(rows)[:, :columns])
    assert vectors_of_reports(REPORTS).shape == (len(REPORTS), exact.shape[1] - 1)


def words_in_which_they_differ(one, other):
    return len(set(one.lower().split()) ^ set(other.lower().split())) / 2


def test_the_most_similar_other_reports_are_drawn():
    draw, generator = SimilarReports(REPORTS, count=3), torch.Generator().manual_seed(0)
    drawn = [draw(report, generator) for report in REPORTS]
    for report, others in zip(REPORTS, drawn):
        assert len(set(others)) == 3 and report not in others
        assert all(words_in_which_they_differ(report, other) == 1 for other in others)


def test_draws_depend_on_the_generator_alone():
    draw = SimilarReports(REPORTS, count=3)
    first, again, other = (draw(REPORTS[5], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_what_differs_in_white_space_alone_is_one_report():
    draw = SimilarReports(["One cyst.", "One  cyst.\n", "One mass."], count=1)
    assert draw("One\ncyst.", torch.Generator()) == ["One mass."]


def test_as_many_as_there_are_can_be_drawn_and_more_are_refused():
    assert sorted(SimilarReports(["a", "b", "c"], 2)("b", torch.Generator())) == ["a", "c"]
    with pytest.raises(ValueError, match="more than 3 different reports, to draw 3 similar ones, got 3"):
        SimilarReports(["a", "b", "c", "a"], 3)
