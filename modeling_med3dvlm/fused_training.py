"""
DCFormer's decomposed convolutions in training on CPUs, rearranged: the gradients that the modules give, up to rounding, in
a fraction of the time.

- Channels are the last axis in memory throughout, so that nothing is moved between the convolutions and the MLPs.
- A dense convolution of the stem, and each of its gradients, is a matrix product over blocks of positions whose
  neighbours are gathered side by side, in the cache.
- A depthwise convolution along an axis is one of pictures, whose other axis is what lies around it.
- The three batch normalisations and their sum are one operation, forward and backward. The biases of the convolutions,
  which they remove again, move the running means only; their gradients are exactly 0.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .fused_dcformer import STEM_STRIDE, convolve_each_axis, cross_of_taps, fill_with_voxels, rows_in_block


# Bytes of a block: few enough for the last level of the cache, and enough to be shared by the threads.
BLOCK_BYTES = 2**23
# Rows whose mean and variance are taken in one go.
ROWS_OF_STATISTICS = 4096
AXES = ("depth", "height", "width")
# The gathered neighbours of a position, as (axis, offset). The three of each axis lie side by side: a middle can serve two.
CROSS = [(0, -1), (0, 1), (0, 0), (1, -1), (1, 1), (2, -1), (2, 1), (2, 0)]
# Where those of each axis start, and in which order they stand.
CROSS_OF_AXIS = [(0, (-1, 1, 0)), (2, (0, -1, 1)), (5, (-1, 1, 0))]


def split_into_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(N, C) -> blocks of (n, C)."""
    return rows.split(rows_in_block(rows, BLOCK_BYTES // 4))


def refuse_second_order() -> None:
    """
    Raises:
        NotImplementedError: called in a backward pass whose own gradients are asked for.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "The shorter training step of DCFormer has no gradients of gradients (`create_graph=True`). Set "
            "`DCFormerDecomposedConv.fused_training = False` before the forward pass to call the modules."
        )


def gather_neighbours(
    grids: Sequence[torch.Tensor], neighbours: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Blocks of positions with the neighbours of each as one row.

    Args:
        grids (`Sequence[torch.Tensor]` of shape `(B, D, H, W, C)`):
            Values, contiguous.
        neighbours (`Sequence[tuple[int, int, int]]`):
            Which of the grids, along which axis (0 to 2), and how far away: -1, 0 or 1.

    Yields:
        `slice` and `torch.Tensor`: positions, counted through all grids, and their neighbours, `(positions, neighbours *
        C)`, 0 where there is none. The memory is used again for the next block.
    """
    batch_size, depth, height, width, channels = grids[0].shape
    rows = [grid.flatten(0, 3) for grid in grids]
    num_lines = max(1, BLOCK_BYTES // (width * channels * len(neighbours) * rows[0].itemsize))
    # Whole planes, or some lines of one.
    num_planes, num_lines = max(1, num_lines // height), min(num_lines, height)
    memory = rows[0].new_empty(num_planes * num_lines * width, len(neighbours) * channels)
    strides = (height * width, width, 1)
    for plane, line in itertools.product(range(0, batch_size * depth, num_planes), range(0, height, num_lines)):
        shape = min(num_planes, batch_size * depth - plane), min(num_lines, height - line), width
        start, count = (plane * height + line) * width, math.prod(shape)
        columns = memory[:count]
        for number, (source, axis, offset) in enumerate(neighbours):
            target, shift = columns[:, number * channels : (number + 1) * channels], start + offset * strides[axis]
            low, high = max(0, -shift), min(count, len(rows[source]) - shift)
            if low < high:
                target[low:high].copy_(rows[source][shift + low : shift + high])
            # What was copied from the other side of an edge is not a neighbour.
            edge = {0: 0, -1: 0, 1: (depth, height, width)[axis] - 1}[offset]
            first = (plane % depth, line, 0)[axis]
            if offset and axis == 0:
                for outside in range((edge - first) % depth, shape[0], depth):
                    target[outside * height * width :][: shape[1] * width].zero_()
            elif offset and first <= edge < first + shape[axis]:
                target.view(*shape, channels).select(axis, edge - first).zero_()
        yield slice(start, start + count), columns


class DenseConvolutions(torch.autograd.Function):
    """Dense convolutions of 3 taps along depth, height and width, without biases."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, D, H, W, C) and three (C', C, 3) -> three (B, D, H, W, C')."""
        channels = values.shape[-1]
        matrices = [
            torch.cat([weight[..., 1 + offset].t() for offset in offsets])  # (3 * C, C')
            for weight, (_, offsets) in zip(weights, CROSS_OF_AXIS)
        ]
        outputs = tuple(values.new_empty(*values.shape[:4], len(weight)) for weight in weights)
        rows = [output.flatten(0, 3) for output in outputs]
        for block, columns in gather_neighbours([values], [(0, *place) for place in CROSS]):
            for result, matrix, (first, _) in zip(rows, matrices, CROSS_OF_AXIS):
                torch.mm(columns[:, first * channels : (first + 3) * channels], matrix, out=result[block])
        ctx.save_for_backward(values, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order()
        values, *weights = ctx.saved_tensors
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        channels, out_channels = values.shape[-1], gradients[0].shape[-1]
        rows = [gradient.flatten(0, 3) for gradient in gradients]

        of_matrices = [values.new_zeros(out_channels, 3 * channels) for _ in AXES]
        for block, columns in gather_neighbours([values], [(0, *place) for place in CROSS]):
            for row, of_matrix, (first, _) in zip(rows, of_matrices, CROSS_OF_AXIS):
                of_matrix.addmm_(row[block].t(), columns[:, first * channels : (first + 3) * channels])
        of_weights = []
        for of_matrix, (_, offsets) in zip(of_matrices, CROSS_OF_AXIS):
            taps = of_matrix.view(out_channels, 3, channels)
            of_weights.append(torch.stack([taps[:, offsets.index(tap - 1)] for tap in range(3)], dim=-1))
        if not ctx.needs_input_grad[0]:
            return None, *of_weights

        # A position's gradient comes from the outputs it is a neighbour of: the taps in reverse.
        matrix = torch.cat([weight[..., 1 - offset] for weight in weights for offset in (-1, 0, 1)])  # (9 * C', C)
        of_values = torch.empty_like(values)
        result = of_values.flatten(0, 3)
        neighbours = [(axis, axis, offset) for axis in range(3) for offset in (-1, 0, 1)]
        for block, columns in gather_neighbours(gradients, neighbours):
            torch.mm(columns, matrix, out=result[block])
        return of_values, *of_weights


class NormalisedSum(torch.autograd.Function):
    """
    The sum of three batch normalisations with the statistics of the batch (Ioffe and Szegedy 2015, algorithm 1, and its
    gradients). What the convolutions before would add to all values of a channel is taken too: it changes nothing, and has
    a gradient, 0, like every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means: Sequence[torch.Tensor],
        variances: Sequence[torch.Tensor],
        eps: Sequence[float],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Statistics (C,), three (N, C) values, three weights, biases and biases of convolutions (C,) -> (N, C)."""
        values, weights, biases = tensors[:3], tensors[3:6], tensors[6:9]
        inverses = [torch.rsqrt(variance + own_eps) for variance, own_eps in zip(variances, eps)]
        factors = [weight * inverse for weight, inverse in zip(weights, inverses)]
        constants = [bias - mean * factor for bias, mean, factor in zip(biases, means, factors)]
        constant = constants[0] + constants[1] + constants[2]
        result = torch.empty_like(values[0])
        for target, *own in zip(*map(split_into_blocks, (result, *values))):
            torch.addcmul(constant, own[0], factors[0], out=target)
            target.addcmul_(own[1], factors[1]).addcmul_(own[2], factors[2])
        ctx.save_for_backward(*values, *weights, *means, *inverses)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order()
        saved = ctx.saved_tensors
        values, weights, means, inverses = saved[:3], saved[3:6], saved[6:9], saved[9:]
        gradient, count = gradient.contiguous(), len(gradient)
        total = gradient.sum(dim=0)
        products = [torch.zeros_like(total) for _ in values]
        for own, *parts in zip(*map(split_into_blocks, (gradient, *values))):
            for product, part, mean in zip(products, parts, means):
                product += (part - mean).mul_(own).sum(dim=0)

        of_values = []
        for value, weight, mean, inverse, product in zip(values, weights, means, inverses, products):
            factor = weight * inverse
            slope = -factor * inverse.square() * product / count
            constant = -factor * total / count - slope * mean
            result = torch.empty_like(value)
            for target, own, part in zip(*map(split_into_blocks, (result, gradient, value))):
                torch.addcmul(constant, part, slope, out=target).addcmul_(own, factor)
            of_values.append(result)
        of_weights = [product * inverse for product, inverse in zip(products, inverses)]
        of_biases = [total.clone() for _ in values]
        return None, None, None, *of_values, *of_weights, *of_biases, *[torch.zeros_like(total) for _ in values]


def strided_convolutions(pixel_values: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of the stem's first layer, (B, C, D, H, W) and three (C', C, taps) -> three (B, D / 4, H / 4, W / 4, C')."""
    size, channels = weights[0].shape[-1], pixel_values.shape[1]
    cross = list(cross_of_taps(size))
    shape = (len(pixel_values), *(math.ceil(length / STEM_STRIDE) for length in pixel_values.shape[2:]))
    voxels = pixel_values.new_zeros(*shape, len(cross) * channels + 1)
    fill_with_voxels(voxels, pixel_values, size)
    rows, middle, results = voxels.flatten(0, 3), size // 2, []
    for axis, weight in enumerate(weights):
        # The cross has the middle first, then the other taps of each axis.
        others = [tap for tap in range(size) if tap != middle]
        first = 1 + axis * len(others)
        own = torch.cat([rows[:, :channels], rows[:, first * channels : (first + len(others)) * channels]], dim=1)
        matrix = weight[..., [middle, *others]].permute(2, 1, 0).flatten(0, 1)  # (C', C, taps) -> (taps * C, C')
        results.append((own @ matrix).view(*shape, -1))
    return results


def decomposed_conv_in_training(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    A decomposed convolution with the statistics of the batch, which move the running ones.

    Args:
        layer ([`DCFormerDecomposedConv`]):
            Dense with 3 taps, dense of stride 4, or depthwise, in training.
        hidden_states (`torch.Tensor` of shape `(B, C, D, H, W)`):
            Best with channels last in memory.

    Returns:
        `torch.Tensor` of shape `(B, C', D', H', W')`, a view with channels last in memory.
    """
    convs = [getattr(layer, f"conv_{axis}") for axis in AXES]
    norms = [getattr(layer, f"norm_{axis}") for axis in AXES]
    weights = [conv.weight.flatten(2) for conv in convs]
    if convs[0].stride[0] == STEM_STRIDE:
        branches: Sequence[torch.Tensor] = strided_convolutions(hidden_states, weights)
    else:
        values = hidden_states.permute(0, 2, 3, 4, 1).contiguous()  # (B, C, D, H, W) -> (B, D, H, W, C)
        if convs[0].groups == 1 and weights[0].shape[-1] == 3:
            branches = DenseConvolutions.apply(values, *weights)
        else:
            branches = convolve_each_axis(values, weights, groups=convs[0].groups)
    shape = branches[0].shape
    rows = [branch.flatten(0, 3) for branch in branches]
    statistics = [
        statistics_of_batch(own.detach(), norm, conv.bias.detach()) for own, norm, conv in zip(rows, norms, convs)
    ]
    means, variances = zip(*statistics)
    result = NormalisedSum.apply(
        means,
        variances,
        [norm.eps for norm in norms],
        *rows,
        *(norm.weight for norm in norms),
        *(norm.bias for norm in norms),
        *(conv.bias for conv in convs),
    )
    return result.view(shape).permute(0, 4, 1, 2, 3)  # (B, D, H, W, C) -> (B, C, D, H, W)


@torch.no_grad()
def statistics_of_batch(rows: torch.Tensor, norm: Any, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and variance (C,) of (N, C) values; moves the running statistics of the normalisation by those of the values plus
    `bias`.
    """
    # PyTorch adds up row by row, which loses digits over many rows: parts of them are put together in float64.
    parts = rows.split(ROWS_OF_STATISTICS)
    statistics = [torch.batch_norm_update_stats(part.view(*part.shape, 1, 1), None, None, 0.0) for part in parts]
    means, variances = (torch.stack(values).double() for values in zip(*statistics))
    shares = torch.tensor([len(part) for part in parts], dtype=torch.float64) / len(rows)
    mean = shares @ means
    variance = shares @ (variances + (means - mean).square())
    norm.move_running_statistics(mean + bias, variance * (len(rows) / (len(rows) - 1)))
    return mean.to(rows.dtype), variance.to(rows.dtype)
