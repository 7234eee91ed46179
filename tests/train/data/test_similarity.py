import itertools

import pytest
import torch

from med3dvlm.train.data import similarity
from med3dvlm.train.data.dataset import EpochSampler
from med3dvlm.train.data.similarity import SimilarReportSampler, vectors_of_reports


ORGANS = ("liver", "spleen", "kidney", "lung")
REPORTS = [
    f"{size} {kind} of the {part} {organ}."
    for size, kind, part, organ in itertools.product(
        ("Large", "Small"), ("cyst", "mass", "nodule"), ("upper", "lower"), ORGANS
    )
] * 2


def order(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


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


@pytest.mark.parametrize(("pool_size", "num_nearest"), [(4096, 64), (40, 64), (4096, 4)])
def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own(monkeypatch, pool_size, num_nearest):
    monkeypatch.setattr(similarity, "POOL_SIZE", pool_size)
    monkeypatch.setattr(similarity, "NUM_NEAREST", num_nearest)
    sampler = SimilarReportSampler(REPORTS, seed=3, group_size=4)
    first, second = order(sampler), order(sampler, epoch=1)
    assert sorted(first) == list(range(len(REPORTS))) and len(sampler) == len(REPORTS)
    assert sorted(second) == list(range(len(REPORTS), 2 * len(REPORTS)))
    assert first != [draw - len(REPORTS) for draw in second]
    assert order(SimilarReportSampler(REPORTS, seed=3, group_size=4)) == first
    assert order(SimilarReportSampler(REPORTS, seed=4, group_size=4)) != first


def words_in_which_neighbours_differ(draws, group_size):
    differences = []
    for start in range(0, len(draws), group_size):
        texts = [set(REPORTS[row].lower().split()) for row in draws[start : start + group_size]]
        differences += [len(one ^ other) / 2 for one, other in itertools.combinations(texts, 2)]
    return sum(differences) / len(differences), differences


def test_groups_are_of_reports_that_differ_in_little():
    mean, differences = words_in_which_neighbours_differ(order(SimilarReportSampler(REPORTS, 0, 4)), 4)
    by_chance, _ = words_in_which_neighbours_differ(order(EpochSampler(len(REPORTS), 0)), 4)
    assert mean < 0.7 * by_chance
    assert differences.count(0) <= 2  # identical reports meet only where nothing else is left


def test_what_is_left_makes_a_smaller_group():
    draws = order(SimilarReportSampler(REPORTS[:10], 0, 4))
    assert sorted(draws) == list(range(10))
    assert order(SimilarReportSampler(["one"], 0, 4)) == [0]
