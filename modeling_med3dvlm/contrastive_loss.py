"""The contrastive losses of the dual encoder, the same in one process and in many.

Sigmoid: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), Algorithm 1. Softmax: Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision" (2021), Figure 3.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint


LOSS_TYPES = ("sigmoid", "softmax")
EXCHANGES = ("gather", "ring")


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    loss_type: str = "sigmoid",
    exchange: str = "gather",
    chunk_size: int | None = None,
    text_group_ids: torch.Tensor | None = None,
    num_unpaired_texts: int = 0,
) -> torch.Tensor:
    r"""
    Contrastive loss of matching pairs, over the batches of all processes where `torch.distributed` is initialised.

    With logits `z_ij = exp(logit_scale) * <image_i, text_j> + logit_bias` over the global batch of `B` pairs:

    - `"sigmoid"`: `1/B * sum_ij softplus(-y_ij * z_ij)`, where `y_ij` is 1 for a pair and -1 otherwise;
    - `"softmax"`: the mean of the cross-entropies of the rows and of the columns, the pair being the class.

    With `text_group_ids`, the texts of a group are one and the same report, and `y_ij` is 1 for all of them: a volume is
    not pushed away from a text that is also its own. In the softmax loss the target is spread evenly over them.

    Texts may be more than volumes: `num_unpaired_texts` of them belong to none, and every volume is pushed away from them,
    unless they are of its own text's group (Yuksekgonul et al., "When and why vision-language models behave like bags-of-words"
    (2023), NegCLIP). They are further columns `j` of the sum above, and further classes of the rows' cross-entropy; they have
    no row of their own.

    Each process compares its own rows with everybody's columns, so none holds the `B x B` matrix. It returns its share
    times the number of processes: the mean over processes, which is what data parallelism logs and applies to
    gradients, is the loss of the global batch. Processes may hold different numbers of pairs.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            This process's volumes, of unit length.
        text_embeds (`torch.Tensor` of shape `(batch_size + num_unpaired_texts, projection_dim)`):
            Their reports in the same order, then the texts that belong to no volume, of unit length.
        logit_scale (`torch.Tensor` of shape `(1,)`):
            Logarithm of the temperature.
        logit_bias (`torch.Tensor` of shape `(1,)`, *optional*):
            Offset of the logits.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` or `"softmax"`.
        exchange (`str`, *optional*, defaults to `"gather"`):
            `"gather"` brings all processes' columns here at once; `"ring"` passes one process's columns on at a time.
        chunk_size (`int`, *optional*):
            Columns compared at a time; their logits are computed again in the backward pass instead of kept.
        text_group_ids (`torch.LongTensor` of shape `(batch_size + num_unpaired_texts,)`, *optional*):
            Equal for identical reports, whichever process holds them; given on all processes or on none. By default every
            text is a group of its own.
        num_unpaired_texts (`int`, *optional*, defaults to 0):
            How many of the texts belong to no volume; processes may differ in it.

    Returns:
        `torch.Tensor` of shape `()`, in float32.

    Raises:
        ValueError: the numbers of volumes, texts, unpaired texts and group ids do not fit together, or there is no loss or
            exchange of that name.
    """
    for name, value, known in (("loss_type", loss_type, LOSS_TYPES), ("exchange", exchange, EXCHANGES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
    if num_unpaired_texts < 0 or len(image_embeds) + num_unpaired_texts != len(text_embeds):
        unpaired = f", {num_unpaired_texts} of them unpaired" if num_unpaired_texts else ""
        raise ValueError(
            f"The contrastive loss needs pairs, got {len(image_embeds)} volumes and {len(text_embeds)} texts{unpaired}: pass "
            "one text for each volume, say with `num_unpaired_texts` how many more there are, or leave out `return_loss`."
        )
    if text_group_ids is not None and text_group_ids.shape != (len(text_embeds),):
        raise ValueError(
            f"Expected `text_group_ids` of shape ({len(text_embeds)},), got {tuple(text_group_ids.shape)}: pass one id for "
            "each text."
        )
    # float32, and no autocast: the logits of a large batch lose the negatives' small terms in half precision.
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = image_embeds.float(), text_embeds.float()
        paired_texts = texts[: len(images)]
        scale = logit_scale.float().exp()
        bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.float()
        batch_sizes, text_sizes = gather_batch_sizes(images, texts)

        way: dict[str, Any] = {"exchange": exchange, "chunk_size": chunk_size}
        blocks_of_texts = partial(iterate_column_blocks, batch_sizes=text_sizes, **way)
        blocks_of_images = partial(iterate_column_blocks, batch_sizes=batch_sizes, **way)
        matching_texts = matching_images = (scale * (images * paired_texts).sum(dim=1) + bias).sum()
        text_blocks: Iterable[torch.Tensor] = blocks_of_texts(texts)
        image_blocks: Iterable[torch.Tensor] = blocks_of_images(images) if loss_type == "softmax" else []
        if text_group_ids is not None:
            ids = text_group_ids.to(images.device)
            paired_ids = ids[: len(images)]
            # Ids travel as the columns do, and so come in the same order. They stay integers: hashes need all their bits.
            text_ids = torch.cat(list(blocks_of_texts(ids[:, None]))).flatten()
            text_blocks = list(text_blocks)
            sums, sizes = sum_by_group(paired_ids, text_ids, torch.cat(text_blocks))
            if loss_type == "softmax":
                matching_texts = (scale * (images * sums).sum(dim=1) / sizes + bias).sum()
                image_ids = torch.cat(list(blocks_of_images(paired_ids[:, None]))).flatten()
                image_blocks = list(image_blocks)
                sums, sizes = sum_by_group(paired_ids, image_ids, torch.cat(image_blocks))
                matching_images = (scale * (paired_texts * sums).sum(dim=1) / sizes + bias).sum()
            else:
                matching_texts = (scale * (images * sums).sum(dim=1) + bias * sizes).sum()

        if loss_type == "sigmoid":
            # softplus(-z) = softplus(z) - z: every pair as a negative, then the matching ones set right.
            share = sum_of_softplus(images, text_blocks, scale, bias, chunk_size) - matching_texts
        else:
            share = sum_of_logsumexp(images, text_blocks, scale, bias, chunk_size) - matching_texts
            share = (
                share + sum_of_logsumexp(paired_texts, image_blocks, scale, bias, chunk_size) - matching_images
            ) / 2
        return share * len(batch_sizes) / sum(batch_sizes)


def sum_by_group(ids: torch.Tensor, all_ids: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each of the (n,) `ids`, the sum of the columns of its group, (n, C), and their number, (n,). A logit is linear in the
    column, so that the sum of the matching logits follows without a matrix of who matches whom.
    """
    groups, places, sizes = all_ids.unique(return_inverse=True, return_counts=True)
    sums = columns.new_zeros(len(groups), columns.shape[1]).index_add(0, places, columns)
    own = torch.searchsorted(groups, ids)  # `groups` is sorted, and holds every id of this process
    return sums[own], sizes[own].to(columns.dtype)


def sum_of_softplus(
    rows: torch.Tensor, blocks: Iterable[torch.Tensor], scale: torch.Tensor, bias: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    """Sum of `softplus(scale * rows @ columns.T + bias)` over all column blocks."""

    def block_sum(columns: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(scale * rows @ columns.T + bias).sum()

    total = rows.new_zeros(())
    for columns in blocks:
        total = total + (block_sum(columns) if chunk_size is None else recomputed(block_sum, columns))
    return total


def sum_of_logsumexp(
    rows: torch.Tensor, blocks: Iterable[torch.Tensor], scale: torch.Tensor, bias: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    """Sum over rows of `log sum_j exp(scale * <row, column_j> + bias)` over all column blocks."""

    def block_logsumexp(columns: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(scale * rows @ columns.T + bias, dim=1)

    total: torch.Tensor | None = None
    for columns in blocks:
        part = block_logsumexp(columns) if chunk_size is None else recomputed(block_logsumexp, columns)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None  # there is always the process's own block
    return total.sum()


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """`function(columns)`, whose intermediate tensors are computed again in the backward pass instead of kept."""
    return checkpoint(function, columns, use_reentrant=False)


def iterate_column_blocks(
    columns: torch.Tensor, batch_sizes: list[int], exchange: str, chunk_size: int | None
) -> Iterator[torch.Tensor]:
    """The columns of every process, in blocks of at most `chunk_size`; the last block of a split may be smaller."""
    if len(batch_sizes) == 1:
        everybodys = iter([columns])
    elif exchange == "gather":
        everybodys = iter([gather_columns(columns, batch_sizes)])
    else:
        everybodys = pass_columns_around(columns, batch_sizes)
    for block in everybodys:
        yield from [block] if chunk_size is None else block.split(chunk_size)


def gather_batch_sizes(images: torch.Tensor, texts: torch.Tensor) -> tuple[list[int], list[int]]:
    """Number of rows of `images`, and of `texts`, on every process; one entry each without `torch.distributed`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [len(images)], [len(texts)]
    own = torch.tensor([len(images), len(texts)], device=images.device)
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, own)
    sizes = torch.stack(everybodys).tolist()
    return [images for images, _ in sizes], [texts for _, texts in sizes]


def pad_rows(columns: torch.Tensor, size: int) -> torch.Tensor:
    """`columns` with rows of zeros appended up to `size`: collectives need equal shapes."""
    return nn.functional.pad(columns, (0, 0, 0, size - len(columns)))


def gather_columns(columns: torch.Tensor, batch_sizes: list[int]) -> torch.Tensor:
    """(n, C) here -> (B, C): everybody's columns in order of rank, with gradients to everybody."""
    gathered = _AllGather.apply(pad_rows(columns, max(batch_sizes)))
    return torch.cat([block[:size] for block, size in zip(gathered, batch_sizes)])


def pass_columns_around(columns: torch.Tensor, batch_sizes: list[int]) -> Iterator[torch.Tensor]:
    """(n, C) here -> one (n_r, C) for each rank r: each process hands the block it has to the next one."""
    rank, world_size = dist.get_rank(), len(batch_sizes)
    block = pad_rows(columns, max(batch_sizes))
    for hop in range(world_size):
        if hop:
            block = _PassToNext.apply(block, 1)
        yield block[: batch_sizes[(rank - hop) % world_size]]


class _AllGather(torch.autograd.Function):
    """(n, C) -> (world_size, n, C). Backward sums the gradients that all processes have for this one's columns."""

    @staticmethod
    def forward(ctx, columns: torch.Tensor) -> torch.Tensor:
        blocks = [torch.empty_like(columns) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, columns.contiguous())
        return torch.stack(blocks)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


class _PassToNext(torch.autograd.Function):
    """Sends a block `step` ranks on and receives one from as many ranks before; backward goes the other way."""

    @staticmethod
    def forward(ctx, block: torch.Tensor, step: int) -> torch.Tensor:
        ctx.step = step
        rank, world_size = dist.get_rank(), dist.get_world_size()
        received = torch.empty_like(block)
        transfers = [
            dist.P2POp(dist.isend, block.contiguous(), (rank + step) % world_size),
            dist.P2POp(dist.irecv, received, (rank - step) % world_size),
        ]
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        return received

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _PassToNext.apply(gradient, -ctx.step), None


__all__ = ["contrastive_loss"]
