"""Random changes to prepared volumes in training, drawn from a generator of the sample's own."""

from collections.abc import Callable

import torch
from torch import nn


Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def augment_laterality_safe(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Changes that leave left, right, up, down and the plane what the report says they are: a shift by up to 4 % of each
    axis (p 0.5), brightness scaled by 1 ± 0.1 (p 0.5) and moved by ± 0.05 (p 0.5), and the result clipped to [0, 1].

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`):
            Prepared volume in [0, 1].
        generator (`torch.Generator`):
            Source of all random numbers.

    Returns:
        `torch.Tensor` of the same shape.
    """
    if _happens(0.5, generator):
        shifts = [round(_uniform(-0.04, 0.04, generator) * size) for size in volume.shape]
        volume = shift(volume, shifts)
    volume = _scale_and_move(volume, generator, largest_move=0.05)
    return volume.clamp(0.0, 1.0)


def augment_as_original(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    The changes of the original implementation, in its order: a rotation by 90, 180 or 270 degrees in the
    (height, width) plane (p 0.5), flips of depth, height and width (p 0.1 each), brightness scaled by 1 ± 0.1 (p 0.5) and
    moved by ± 0.1 (p 0.5), not clipped. Rotations and flips change what left, right and plane mean while the report
    stays, so a model cannot learn them from it.

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`):
            Prepared volume in [0, 1].
        generator (`torch.Generator`):
            Source of all random numbers.

    Returns:
        `torch.Tensor`, height and width swapped after a quarter turn.
    """
    if _happens(0.5, generator):
        turns = int(torch.randint(1, 4, (), generator=generator))
        volume = volume.rot90(turns, dims=(1, 2))  # (D, H, W) -> (D, W, H) for an odd number of turns
    axes = [axis for axis in range(3) if _happens(0.1, generator)]
    return _scale_and_move(volume.flip(axes), generator, largest_move=0.1)


def shift(volume: torch.Tensor, shifts: list[int]) -> torch.Tensor:
    """Moves a volume by whole voxels along (depth, height, width); what comes in from outside is 0."""
    padding: list[int] = []
    for voxels in reversed(shifts):  # `pad` counts axes from the last one
        padding += [voxels, -voxels]
    return nn.functional.pad(volume, padding)


def _scale_and_move(volume: torch.Tensor, generator: torch.Generator, largest_move: float) -> torch.Tensor:
    if _happens(0.5, generator):
        volume = volume * (1 + _uniform(-0.1, 0.1, generator))
    if _happens(0.5, generator):
        volume = volume + _uniform(-largest_move, largest_move, generator)
    return volume


def _happens(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "laterality_safe": augment_laterality_safe,
    "original": augment_as_original,
}


__all__ = ["AUGMENTATIONS", "Augmentation", "augment_as_original", "augment_laterality_safe", "shift"]
