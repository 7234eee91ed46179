"""Several conversations about one volume as one sequence, so that the volume is encoded and read once for all of them."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


# What a padding token belongs to; 0 is the shared beginning, and the conversations count from 1.
PADDING = -1


def share_beginnings(
    batch: Mapping[str, torch.Tensor], group_sizes: Sequence[int], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """
    Puts the conversations of each group one after the other behind the tokens that all of them begin with.

    Every token keeps its position, and sees what it saw in its own conversation: the beginning, and its own part up to
    itself. So logits, loss and gradients are those of the conversations one by one, up to rounding, as long as nothing is
    drawn per conversation, such as dropout, and no batch statistics are taken, as a volume encoder in training does.

    Args:
        batch (`Mapping`):
            `input_ids`, `attention_mask` and `labels` of shape `(num_conversations, sequence_length)`, padded on the right.
        group_sizes (`Sequence[int]`):
            How many conversations in a row make each group.
        pad_token_id (`int`):
            Token that pads shorter groups.

    Returns:
        `dict` with `input_ids`, `labels` and `position_ids` of shape `(num_groups, packed_length)`, and `attention_mask`, a
        `torch.BoolTensor` of shape `(num_groups, 1, packed_length, packed_length)`: whether a token (second last axis) sees
        another.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    packed: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
    first = 0
    for size in group_sizes:
        rows = range(first, first + size)
        shared = count_shared_tokens({name: values[first : first + size] for name, values in batch.items()})
        spans = [(first, 0, shared), *((row, shared, lengths[row]) for row in rows)]
        for name in ("input_ids", "labels"):
            packed[name].append(torch.cat([batch[name][row, start:stop] for row, start, stop in spans]))
        packed["position_ids"].append(torch.cat([torch.arange(start, stop) for _, start, stop in spans]))
        packed["segments"].append(
            torch.cat([torch.full((stop - start,), segment) for segment, (_, start, stop) in enumerate(spans)])
        )
        first += size
    fillers = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0, "segments": PADDING}
    result = {
        name: pad_sequence(values, batch_first=True, padding_value=fillers[name]) for name, values in packed.items()
    }
    segments = result.pop("segments")
    is_beginning = segments[:, None, :] == 0
    is_own = segments[:, :, None] == segments[:, None, :]
    return {**result, "attention_mask": (is_beginning | is_own).tril().unsqueeze(1)}  # (B, L, L) -> (B, 1, L, L)


def count_shared_tokens(group: Mapping[str, torch.Tensor]) -> int:
    """
    How many tokens all conversations of a group begin with. Neither answers nor the token before an answer count, even if
    they are the same: what predicts the first token of an answer has to stand right before it.
    """
    input_ids, is_answer = group["input_ids"], group["labels"] != -100
    predicts_answer = is_answer.roll(-1, dims=1)
    predicts_answer[:, -1] = False
    is_shared = (input_ids == input_ids[:1]) & group["attention_mask"].bool() & ~is_answer & ~predicts_answer
    return int(is_shared.all(dim=0).cumprod(dim=0).sum())


__all__ = ["count_shared_tokens", "share_beginnings"]
