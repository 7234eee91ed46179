import itertools
import pickle

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
    # 100 words that all reports have, and of 288 others 60 each: reports share the fewer, the further apart they are.
    common = " ".join(f"common{number}" for number in range(100))
    reports = [
        " ".join(f"word{(6 * row + number) % 288}" for number in range(60)) + f" {common}." for row in range(48)
    ]
    exact = vectors_of_reports(reports)
    assert exact.shape == (48, 388)
    monkeypatch.setattr(similarity, "NUM_FEATURES", 256)
    torch.manual_seed(0)
    projected = vectors_of_reports(reports)
    torch.manual_seed(1)
    assert projected.shape == (48, 256) and torch.equal(vectors_of_reports(reports), projected)
    row, column = torch.triu_indices(48, 48, 1)
    cosines = torch.stack([(vectors @ vectors.T)[row, column] for vectors in (exact, projected)])
    # Of random projections onto 256 axes a cosine has a deviation of at most 1 / 16.
    assert (cosines[0] - cosines[1]).abs().max() < 0.25 and torch.corrcoef(cosines)[0, 1] > 0.9


CASES = [str(row % (len(REPORTS) // 2)) for row in range(len(REPORTS))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def words_in_which_they_differ(one, other):
    return len(set(one.lower().split()) ^ set(other.lower().split())) / 2


def test_the_most_similar_other_reports_are_drawn():
    draw = SimilarReports(REPORTS, CASES, count=2)
    for report in REPORTS:
        drawn = {other for seed in range(30) for other in draw(report, generator(seed))}
        assert len(drawn) == 4 and report not in drawn
        assert all(words_in_which_they_differ(report, other) == 1 for other in drawn)
        # Size and part are in half of all reports, so their words say the least.
        swapped = {"Large": "Small", "Small": "Large"}
        size = " ".join(swapped.get(word, word) for word in report.split())
        assert size in drawn
    assert len(set(draw(REPORTS[0], generator()))) == 2


def test_draws_depend_on_the_generator_alone(monkeypatch):
    drawn = [SimilarReports(REPORTS, CASES, count=3)(REPORTS[5], generator(seed)) for seed in range(9)]
    assert len(set(map(tuple, drawn))) > 4
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(similarity, "PAIRS_AT_ONCE", 7 * len(REPORTS) // 2)
    torch.set_num_threads(3 - min(num_threads, 2))
    try:
        draw = pickle.loads(pickle.dumps(SimilarReports(REPORTS, CASES, count=3)))
        assert [draw(REPORTS[5], generator(seed)) for seed in range(9)] == drawn
    finally:
        torch.set_num_threads(num_threads)


def test_reports_of_the_same_case_are_not_drawn():
    reports = ["One cyst.", "One mass.", "One nodule.", "Clear."]
    assert SimilarReports(reports, ["a", "a", "b", "c"], 1).neighbours.tolist() == [[2, 3], [2, 3], [0, 1], [0, 1]]
    # A report of two cases may be true beside all that is said of either.
    cases = ["a", "a", "b", "b", "c"]
    draw = SimilarReports([*reports[:2], reports[1], reports[2], "Clear."], cases, 1)
    assert draw.neighbours.tolist() == [[2, 3], [3, -1], [0, 3], [0, 1]]
    assert [draw("One mass.", generator(seed)) for seed in range(3)] == [["Clear."]] * 3


def test_what_has_the_same_words_is_not_drawn():
    reports = ["One cyst. No mass.", "No  mass.\nOne cyst", "One cyst. No  mass.", "One cyst."]
    draw = SimilarReports(reports, "abcd", 1)
    assert draw("One cyst.\nNo mass.", generator()) == ["One cyst."]
    assert draw("No mass. One cyst", generator()) == ["One cyst."]


def test_as_many_as_there_are_can_be_drawn_and_more_are_refused():
    assert sorted(SimilarReports(["a", "b", "c"], "123", 2)("b", generator())) == ["a", "c"]
    with pytest.raises(ValueError, match="at least 3 reports .* got 2 for one of 3 different reports"):
        SimilarReports(["a", "b", "c", "a"], "1234", 3)
