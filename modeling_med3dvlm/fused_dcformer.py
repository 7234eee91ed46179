"""
DCFormer's forward pass at inference, rearranged: the same numbers as the modules give, up to rounding, in a fraction of
the time and the memory.

- Batch normalisations with running statistics are affine, so each becomes part of its convolution, and the layer scale
  part of the second MLP weight. Weights are folded anew in every call: it costs little beside a volume, and follows
  whatever was loaded, moved or changed.
- A dense decomposed convolution of the stem is one cross of taps. Its three middle taps are one, and it is computed as
  matrix products over blocks of positions that stay in the cache.
- The stem's first layer maps the few voxels under its cross to many channels, and no activation follows. The second
  layer therefore takes these voxels, and a one for the bias, instead of the channels.
- Channels are the last axis throughout: nothing is permuted between the convolutions and the MLP, which runs over blocks
  of positions as well.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


# Bytes of the operands of one matrix product, which fit a core's cache.
BLOCK_BYTES = 2**20
STEM_STRIDE = 4
# In float16, the layer scale times a weight would underflow.
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def compute_dtype(values: torch.Tensor) -> torch.dtype:
    """The type in which convolutions and matrix products of float parameters like `values` run: autocast may choose."""
    if torch.is_autocast_enabled(values.device.type) and values.dtype != torch.float64:
        return torch.get_autocast_dtype(values.device.type)
    return values.dtype


@functools.cache
def multiplies_bfloat16(device_type: str) -> bool:
    """
    Whether matrix products of bfloat16 are worth having on a device. A CPU without instructions for them (on x86: AVX-512)
    computes element by element, some hundred times slower than in float32, and GPUs older than Ampere emulate them.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return True
    # Builds without oneDNN, such as those for macOS, do not have the question; nor need a later torch, where its name is private.
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and torch.backends.mkldnn.is_available() and is_supported()


class FoldedConv:
    """
    A decomposed convolution and its batch normalisations as one affine map.

    Attributes:
        weights (`list[torch.Tensor]` of shape `(out_channels, in_channels / groups, kernel_size)`):
            One-dimensional kernels along depth, height and width, at least in float32.
        bias (`torch.Tensor` of shape `(out_channels,)`):
            Of their sum.
    """

    def __init__(self, conv: Any):
        self.weights, biases = [], []
        for axis in ("depth", "height", "width"):
            one, norm = getattr(conv, f"conv_{axis}"), getattr(conv, f"norm_{axis}")
            dtype = torch.promote_types(one.weight.dtype, torch.float32)
            factor = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
            self.weights.append(one.weight.to(dtype).flatten(2) * factor.view(-1, 1, 1))
            biases.append((one.bias.to(dtype) - norm.running_mean.to(dtype)) * factor + norm.bias.to(dtype))
        self.bias = biases[0] + biases[1] + biases[2]

    def taps(self) -> torch.Tensor:
        """The cross of taps as matrices, `(taps, in_channels, out_channels)`, in the order of [`cross_of_taps`]."""
        middle = self.weights[0].shape[-1] // 2
        center = sum(weight[..., middle] for weight in self.weights)
        arms = [weight[..., place] for weight in self.weights for place in range(weight.shape[-1]) if place != middle]
        return torch.stack([center, *arms]).transpose(1, 2)


def rows_in_block(rows: torch.Tensor, block_bytes: int) -> int:
    """How many of these rows make a block of so many bytes."""
    return max(1, block_bytes // (rows.shape[1] * rows.itemsize))


def cross_of_taps(kernel_size: int) -> Iterator[tuple[int, int, int]]:
    """Offsets `(depth, height, width)` of the taps of a decomposed convolution, the middle first, then axis by axis."""
    reach = kernel_size // 2
    yield (0, 0, 0)
    for axis, offset in itertools.product(range(3), range(-reach, reach + 1)):
        if offset:
            yield tuple(offset if axis == other else 0 for other in range(3))  # type: ignore[misc]


def strided_slices(offset: int, size: int, grid_size: int) -> tuple[slice, slice]:
    """Along one axis, the grid positions whose voxel `4 * position + offset` exists, and these voxels."""
    first = max(0, -(offset // STEM_STRIDE))
    last = min(grid_size - 1, (size - 1 - offset) // STEM_STRIDE)
    count = max(0, last - first + 1)
    start = STEM_STRIDE * first + offset
    return slice(first, first + count), slice(start, start + STEM_STRIDE * count, STEM_STRIDE)


def fill_with_voxels(grid: torch.Tensor, pixel_values: torch.Tensor, kernel_size: int) -> None:
    """
    Writes what the stem's first layer sees into a grid of zeros.

    Args:
        grid (`torch.Tensor` of shape `(B, D', H', W', taps * C + 1)`):
            To be filled: for each position the voxels under its cross, 0 outside the volume, and a 1.
        pixel_values (`torch.Tensor` of shape `(B, C, D, H, W)`):
            The volumes.
        kernel_size (`int`):
            Of the first layer.
    """
    volumes = pixel_values.movedim(1, -1)  # (B, C, D, H, W) -> (B, D, H, W, C)
    num_channels = volumes.shape[-1]
    for tap, offsets in enumerate(cross_of_taps(kernel_size)):
        places, voxels = zip(*map(strided_slices, offsets, volumes.shape[1:4], grid.shape[1:4]))
        grid[(slice(None), *places, slice(tap * num_channels, (tap + 1) * num_channels))] = volumes[
            (slice(None), *voxels)
        ]
    grid[..., -1] = 1


class PaddedGrid:
    """
    Values on grids with channels last, where the neighbours of all positions along an axis are the same rows, shifted.

    Each grid has one zero more at the end of each axis, which is the zero before the start of the next line as well.

    Args:
        shape (`tuple[int, ...]`):
            Grids and their sizes, `(B, D, H, W)`.
        memory (`torch.Tensor` of shape `(rows, C)`):
            Where the values are, from its first row on; see `rows_needed`.
    """

    def __init__(self, shape: tuple[int, ...], memory: torch.Tensor):
        batch_size, depth, height, width = shape
        self.shape, self.line = shape, width + 1
        self.plane = (height + 1) * self.line
        self.num_rows = (batch_size * (depth + 1) - 1) * self.plane  # without the last plane, which is padding
        self.rows = memory[: self.rows_needed(shape)]

    @staticmethod
    def rows_needed(shape: tuple[int, ...]) -> int:
        """Rows of memory for such grids: with a plane of zeros before the first, and one after each."""
        batch_size, depth, height, width = shape
        return (batch_size * (depth + 1) + 1) * (height + 1) * (width + 1)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Starts and stops of ranges of rows that together hold all positions."""
        length = rows_in_block(self.rows, BLOCK_BYTES)
        for start in range(0, self.num_rows, length):
            yield start, min(start + length, self.num_rows)

    @property
    def padded(self) -> torch.Tensor:
        """`(B, D + 1, H + 1, W + 1, C)`."""
        batch_size, depth, height, width = self.shape
        return self.rows[self.plane :].view(batch_size, depth + 1, height + 1, width + 1, -1)

    @property
    def values(self) -> torch.Tensor:
        """`(B, D, H, W, C)`, without the padding."""
        return self.padded[:, :-1, :-1, :-1]

    def clear_padding(self) -> None:
        self.rows[: self.plane] = 0
        padded = self.padded
        padded[:, -1] = 0
        padded[:, :, -1] = 0
        padded[:, :, :, -1] = 0

    def shifted(self, start: int, stop: int, offsets: tuple[int, int, int]) -> torch.Tensor:
        """The rows `start` to `stop`, each replaced by its neighbour."""
        shift = self.plane * (1 + offsets[0]) + self.line * offsets[1] + offsets[2]
        return self.rows[start + shift : stop + shift]


def stem_in_blocks(stem: Any, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, D, H, W) -> (B, D / 4, H / 4, W / 4, hidden_sizes[0]), rounded up, by matrix products in place."""
    first, second, *others = (FoldedConv(layer) for layer in stem.layers)
    kernel_size, cross = first.weights[0].shape[-1], list(cross_of_taps(3))
    shape = (len(pixel_values), *(-(-size // STEM_STRIDE) for size in pixel_values.shape[2:]))
    weight, bias = compose(first, second).flatten(0, 1).to(dtype), second.bias.to(dtype)

    num_rows, channels = PaddedGrid.rows_needed(shape), weight.shape[1]
    options: dict[str, Any] = {"dtype": dtype, "device": pixel_values.device}
    voxels = PaddedGrid(shape, torch.zeros(num_rows, len(weight) // len(cross), **options))
    fill_with_voxels(voxels.values, pixel_values, kernel_size)
    # A layer's results overwrite its own input, this many rows behind the last that is still to be read.
    lag = voxels.plane + max(1, BLOCK_BYTES // (channels * dtype.itemsize))
    memory = torch.empty(num_rows + lag * len(others), channels, **options)
    grid = PaddedGrid(shape, memory[lag * len(others) :])
    for start, stop in grid.blocks():
        gathered = torch.cat([voxels.shifted(start, stop, offsets) for offsets in cross], dim=1)
        torch.addmm(bias, gathered, weight, out=grid.shifted(start, stop, cross[0]))
    del voxels

    for number, layer in enumerate(others, start=1):
        grid.clear_padding()
        previous, grid = grid, PaddedGrid(shape, memory[lag * (len(others) - number) :])
        weights, bias = layer.taps().to(dtype), layer.bias.to(dtype)
        for start, stop in grid.blocks():
            result = grid.shifted(start, stop, cross[0])
            torch.addmm(bias, previous.shifted(start, stop, cross[0]), weights[0], out=result)
            for offsets, matrix in zip(cross[1:], weights[1:]):
                result.addmm_(previous.shifted(start, stop, offsets), matrix)
    return grid.values


def stem_in_convolutions(stem: Any, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As [`stem_in_blocks`], in a few operations that compilers and exporters can follow and GPUs are made for."""
    first, second, *others = (FoldedConv(layer) for layer in stem.layers)
    kernel_size = first.weights[0].shape[-1]
    shape = (pixel_values.shape[0], *((size + STEM_STRIDE - 1) // STEM_STRIDE for size in pixel_values.shape[2:]))
    reach = kernel_size // 2
    sizes = pixel_values.shape[2:]
    # Enough zeros that every tap of every position is a voxel.
    extra = [STEM_STRIDE * (count - 1) + 2 * reach + 1 - (size + reach) for size, count in zip(sizes, shape[1:])]
    padding = [bound for right in reversed(extra) for bound in (reach, right)]
    padded = nn.functional.pad(pixel_values.to(dtype), padding)
    spans = [STEM_STRIDE * (count - 1) + 1 for count in shape[1:]]
    voxels = [
        padded[(..., *(slice(reach + o, reach + o + span, STEM_STRIDE) for o, span in zip(offsets, spans)))]  # type: ignore[index]
        for offsets in cross_of_taps(kernel_size)
    ]
    ones = torch.ones_like(voxels[0][:, :1])
    values = torch.cat([*voxels, ones], dim=1).movedim(1, -1).contiguous()  # (B, T, D', H', W') -> (B, D', H', W', T)
    inputs = torch.cat([first.taps().flatten(0, 1), first.bias[None]])  # (T, hidden_sizes[0])
    second.weights = [torch.einsum("ti,oik->otk", inputs, weight) for weight in second.weights]
    for layer in (second, *others):
        values = convolve(values, layer, dtype)
    return values


def compose(first: FoldedConv, second: FoldedConv) -> torch.Tensor:
    """The two maps in a row, `(taps of the second, taps of the first * in_channels + 1, out_channels)`."""
    inputs = torch.cat([first.taps().flatten(0, 1), first.bias[None]])  # the last is what a 1 contributes
    return inputs @ second.taps()


def convolve_each_axis(
    values: torch.Tensor, weights: Sequence[torch.Tensor], bias: torch.Tensor | None = None, groups: int = 1
) -> list[torch.Tensor]:
    """
    Convolutions of stride 1 along depth, height and width, (B, D, H, W, C) and three (C', C / groups, taps) -> three (B, D,
    H, W, C'), the first with `bias`. Each axis is one of the two of a picture whose other axis is what lies around it:
    convolutions of pictures with channels last are the quickest there are.
    """
    batch_size, depth, height, width, channels = values.shape
    pictures = (
        (batch_size, depth, height * width, channels),
        (batch_size * depth, height, width, channels),
        (batch_size, depth * height, width, channels),
    )
    results = []
    for axis, (picture, weight) in enumerate(zip(pictures, weights)):
        size = weight.shape[-1]
        kernel, padding = ((1, size), (0, size // 2)) if axis == 2 else ((size, 1), (size // 2, 0))
        result = nn.functional.conv2d(
            values.reshape(picture).permute(0, 3, 1, 2),  # (N, H, W, C) -> (N, C, H, W)
            weight.view(*weight.shape[:2], *kernel),
            bias if axis == 0 else None,
            padding=padding,
            groups=groups,
        )
        results.append(result.permute(0, 2, 3, 1).reshape(*values.shape[:4], -1))  # (N, C, H, W) -> (N, H, W, C)
    return results


def convolve(values: torch.Tensor, conv: FoldedConv, dtype: torch.dtype, groups: int = 1) -> torch.Tensor:
    """A decomposed convolution of stride 1, (B, D, H, W, C) -> (B, D, H, W, C')."""
    weights = [weight.to(dtype) for weight in conv.weights]
    depth, height, width = convolve_each_axis(values, weights, conv.bias.to(dtype), groups)
    return depth + height + width


def max_pool(values: torch.Tensor) -> torch.Tensor:
    """Maxima of 3 x 3 x 3 voxels at every second position, (B, D, H, W, C) -> (B, D / 2, H / 2, W / 2, C), rounded up."""
    for axis in (1, 2, 3):
        size = values.shape[axis]
        length = (size + 1) // 2
        even = values[(slice(None),) * axis + (slice(0, None, 2),)]
        odd = values[(slice(None),) * axis + (slice(1, None, 2),)]
        if size == 1:
            continue
        values = even.clone(memory_format=torch.contiguous_format)
        for target, source in (
            (values.narrow(axis, 0, size // 2), odd),
            (values.narrow(axis, 1, length - 1), odd.narrow(axis, 0, length - 1)),
        ):
            torch.maximum(target, source, out=target)
    return values


def apply_block(layer: Any, hidden_states: torch.Tensor, dtype: torch.dtype, in_blocks: bool) -> torch.Tensor:
    """One block, (B, D, H, W, C) -> (B, D, H, W, C); with `in_blocks` the result replaces `hidden_states`."""
    convolved = convolve(hidden_states.to(dtype), FoldedConv(layer.dwconv), dtype, groups=hidden_states.shape[-1])
    weight1, bias1 = layer.pwconv1.weight.to(dtype), layer.pwconv1.bias.to(dtype)
    weight2, bias2 = layer.pwconv2.weight.to(dtype), layer.pwconv2.bias.to(dtype)
    rows, residual = convolved.flatten(0, 3), hidden_states.flatten(0, 3)
    if not in_blocks:
        branch = nn.functional.linear(layer.act(nn.functional.linear(rows, weight1, bias1)), weight2, bias2)
        return (residual + layer.layer_scale * branch).view(hidden_states.shape)
    length = rows_in_block(rows, BLOCK_BYTES)
    for own, target in zip(rows.split(length), residual.split(length)):
        inner = layer.act(nn.functional.linear(own, weight1, bias1))
        target.addcmul_(nn.functional.linear(inner, weight2, bias2), layer.layer_scale)
    return hidden_states


def fused_hidden_states(model: Any, pixel_values: torch.Tensor, in_blocks: bool) -> list[torch.Tensor]:
    """
    What the stem and every stage of a [`DCFormerModel`] give at inference.

    Args:
        model (`nn.Module`):
            The model, or a backbone.
        pixel_values (`torch.Tensor` of shape `(B, num_channels, D, H, W)`):
            Volumes in [0, 1].
        in_blocks (`bool`):
            Whether to work in place on blocks that fit the cache of a CPU, or in whole operations.

    Returns:
        `list[torch.Tensor]` of shape `(B, hidden_sizes[i], D_i, H_i, W_i)`: views, with channels last in memory.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device.type, compute_dtype(parameter)
    # Under autocast the layer scale, in float32, makes the sums of the blocks float32.
    stem_dtype, stage_dtype = dtype, torch.promote_types(dtype, parameter.dtype)
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        dtype = torch.float32
    with torch.autocast(device, enabled=False):
        stem = stem_in_blocks if in_blocks else stem_in_convolutions
        # The modules round the volumes to the type of the weights first.
        values = stem(model.stem, pixel_values.to(parameter.dtype), dtype)
        all_values = [values]
        for stage in model.stages:
            pooled = max_pool(values) if in_blocks else pool_whole(values)
            values = nn.functional.linear(pooled.to(dtype), stage.downsampling_layer.weight.flatten(1).to(dtype))
            values = values.to(torch.promote_types(dtype, stage_dtype))
            for layer in stage.layers:
                values = apply_block(layer, values, dtype, in_blocks)
            all_values.append(values)
    all_dtypes = [stem_dtype] + [stage_dtype] * len(model.stages)
    # (B, D, H, W, C) -> (B, C, D, H, W)
    return [values.movedim(-1, 1).to(values_dtype) for values, values_dtype in zip(all_values, all_dtypes)]


def pool_whole(values: torch.Tensor) -> torch.Tensor:
    """As [`max_pool`], in one operation."""
    pooled = nn.functional.max_pool3d(values.movedim(-1, 1), kernel_size=3, stride=2, padding=1)
    return pooled.movedim(1, -1)
