import pytest
import torch

from med3dvlm.train.data.augmentation import AUGMENTATIONS, augment_as_original, augment_laterality_safe, shift


SHAPE = (6, 8, 8)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("augment", [augment_laterality_safe, augment_as_original])
def test_the_generator_alone_decides(augment):
    volume = torch.rand(SHAPE, generator=torch.Generator().manual_seed(9))
    for first, second in zip(generators(20), generators(20)):
        assert torch.equal(augment(volume, first), augment(volume, second))
    assert len({tuple(augment(volume, generator).flatten().tolist()) for generator in generators(20)}) > 10


def test_laterality_safe_changes_keep_every_side():
    """A bright ball on the left stays on the left, at the back at the back, and below below."""
    volume = torch.zeros(40, 50, 60)
    volume[5:10, 40:45, 48:54] = 0.8  # inferior, posterior, left
    for generator in generators(60):
        changed = augment_laterality_safe(volume, generator)
        assert changed.shape == volume.shape and float(changed.min()) >= 0 and float(changed.max()) <= 1
        d, h, w = (changed > 0.5).nonzero().float().mean(dim=0)
        assert abs(d - 7) <= 2 and abs(h - 42) <= 2 and abs(w - 50.5) <= 3


def test_laterality_safe_shifts_go_both_ways_up_to_4_percent_of_each_axis():
    volume = torch.zeros(50, 75, 100)
    volume[20:30, 30:45, 40:60] = 0.8
    moves = []
    for generator in generators(200):
        places = (augment_laterality_safe(volume, generator) > 0.5).nonzero()
        moves.append(places.amin(dim=0) - torch.tensor([20, 30, 40]))
        assert len(places) == 10 * 15 * 20  # moved, not resized
    moves = torch.stack(moves)
    assert moves.amax(dim=0).tolist() == [2, 3, 4] and moves.amin(dim=0).tolist() == [-2, -3, -4]
    assert 0.4 < (moves == 0).all(dim=1).float().mean() < 0.6


def test_laterality_safe_brightness_is_scaled_by_a_tenth_and_moved_by_a_twentieth():
    values = torch.stack(
        [augment_laterality_safe(torch.full(SHAPE, 0.5), generator)[3, 4, 4] for generator in generators(200)]
    )
    # 0.5 * (1 +- 0.1) +- 0.05, each of the two with probability 0.5
    assert 0.4 <= values.min() < 0.44 and 0.56 < values.max() <= 0.6
    assert 0.15 < (values == 0.5).float().mean() < 0.35


def test_the_original_changes_do_not_keep_sides():
    volume = torch.zeros(40, 60, 60)
    volume[5:10, 40:45, 48:54] = 0.8
    places = []
    for generator in generators(200):
        changed = augment_as_original(volume, generator)
        places.append((changed > 0.5 * changed.max()).nonzero().float().mean(dim=0))
    depth, _, width = torch.stack(places).T
    assert 0.02 < (depth > 20).float().mean() < 0.2  # flipped with probability 0.1
    assert 0.2 < (width < 30).float().mean() < 0.6


def test_the_original_changes_are_not_clipped():
    values = torch.stack([augment_as_original(torch.ones(SHAPE), generator).max() for generator in generators(100)])
    assert values.max() > 1.1 and values.max() <= 1.1 + 0.1 and values.min() >= 0.9 - 0.1


def test_shift_moves_whole_voxels_and_fills_with_zero():
    volume = torch.arange(24.0).reshape(2, 3, 4) + 1
    moved = shift(volume, [0, 1, -2])
    assert torch.equal(moved[:, 1:, :2], volume[:, :-1, 2:])
    assert moved[:, 0].abs().sum() == 0 and moved[:, :, 2:].abs().sum() == 0
    assert torch.equal(shift(volume, [0, 0, 0]), volume)


def test_the_names_of_a_recipe():
    assert set(AUGMENTATIONS) == {"none", "laterality_safe", "original"} and AUGMENTATIONS["none"] is None
