"""From items to batches for the two kinds of models."""

from typing import Any

import torch
from transformers.utils import logging

from .packing import share_beginnings
from .text import keep_whole_sentences, split_sentences


logger = logging.get_logger(__name__)


class ConversationCollator:
    """
    Batches of conversations for [`Med3DVLMForConditionalGeneration`], with labels on what the model is to say.

    The labels are the tokens of the answers and the end token of each answer, as the generation block of the chat template
    marks them; -100 stands on all else: the system and user turns, the placeholders of the volumes, the newline after the
    end token, and the padding, which is on the right.

    Args:
        processor ([`Med3DVLMProcessor`]):
            The model's processor, with a chat template that has a generation block.
        max_length (`int`, *optional*):
            Tokens a conversation may have. Of an answer that is too long those whole sentences are kept that fit, as
            [`~train.data.text.keep_whole_sentences`] chooses them, and its end token after them. If the first one alone is
            too long, what is beyond is cut off, end token and all. A warning says so the first time.

    Raises:
        ValueError: the chat template marks no answers.
    """

    def __init__(self, processor: Any, max_length: int | None = None):
        template = getattr(processor, "chat_template", None)
        if not template or "generation" not in template:
            raise ValueError(
                "Expected a processor whose chat template has a generation block around what the assistant says: labels "
                "are made from it. Leave out `chat_template` when the processor is built, or add "
                "`{% generation %}...{% endgeneration %}` to it."
            )
        self.processor, self.max_length = processor, max_length
        self._has_warned = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            items (`list`):
                Dictionaries with `messages`, or `conversations`, a list of such messages that begin with the same volume;
                and `volume`: a prepared volume of shape `(depth, height, width)`, or all without one, for conversations
                in words alone.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`, and, if there are
            volumes, `pixel_values` of shape `(batch_size, 1, depth, height, width)`. Items with `conversations` come as
            [`~train.data.packing.share_beginnings`] puts them together.

        Raises:
            ValueError: the whole answer of a conversation was cut off by `max_length`, so there is nothing to learn from it;
                or conversations that are to share a volume do not begin with it.
        """
        groups = [item.get("conversations") or [item["messages"]] for item in items]
        tokens = self._fit([messages for group in groups for messages in group])
        if not bool((tokens["labels"] != -100).any(dim=1).all()):
            raise ValueError(
                f"A conversation has no token to learn within {self.max_length} tokens: its question fills them, or its "
                "answer is empty. Raise `data.max_text_length` (`max_length` of the collator), and check the data with "
                "`med3dvlm prepare check`."
            )
        volumes = {"pixel_values": stack_volumes(items)} if any("volume" in item for item in items) else {}
        if any("conversations" in item for item in items):
            tokens = share_beginnings(tokens, [len(group) for group in groups], self.processor.tokenizer.pad_token_id)
            num_placeholders = (tokens["input_ids"] == self.processor.image_token_id).sum(dim=1)
            if volumes and not bool((num_placeholders == self.processor.image_seq_length).all()):
                raise ValueError(
                    f"Expected {self.processor.image_seq_length} placeholders of one volume in each group of conversations, got "
                    f"{num_placeholders.tolist()}: the chat template writes something that differs, such as the question, "
                    "before the volume, or nothing at all between volume and answer. Use one that begins with the volume, "
                    "or `data.questions_per_volume: 1`."
                )
        return {**tokens, **volumes}

    def _fit(self, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """What [`_tokenize`] gives, with answers that are too long shortened, of at most `max_length` tokens."""
        tokens = self._tokenize(conversations)
        if self.max_length is None:
            return tokens
        surplus = self._count_surplus(tokens)
        if any(surplus):
            tokens = self._tokenize(
                [self._shorten(messages, count) for messages, count in zip(conversations, surplus)]
            )
            self._warn(len(surplus), sum(map(bool, surplus)), sum(map(bool, self._count_surplus(tokens))))
        # Not by the tokenizer, which does not tell what it cuts. Padding stands on the right, so this takes it too.
        return {name: values[:, : self.max_length].contiguous() for name, values in tokens.items()}

    def _tokenize(self, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` of whole conversations, of shape `(batch_size, sequence_length)`."""
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            # Not verbose: with a length given here, the tokenizer's warning of its own longest one would mislead.
            processor_kwargs={
                **PROCESSED,
                "padding": True,
                "padding_side": "right",
                "verbose": self.max_length is None,
            },
        )
        is_answer = torch.as_tensor(batch["assistant_masks"]).bool() & batch["attention_mask"].bool()
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(~is_answer, -100),
        }

    def _count_surplus(self, tokens: dict[str, torch.Tensor]) -> list[int]:
        """The number of tokens to learn that lie beyond `max_length`, for each conversation."""
        return (tokens["labels"][:, self.max_length :] != -100).sum(dim=1).tolist()

    def _shorten(self, messages: list[dict[str, Any]], surplus: int) -> list[dict[str, Any]]:
        """The messages with an answer of whole sentences, shorter by at least `surplus` tokens; as they are where none fits."""
        tokenizer, answer = self.processor.tokenizer, messages[-1]["content"]
        if not surplus or not isinstance(answer, str) or not answer.strip():
            return messages

        def count(text: str) -> int:
            return len(tokenizer(text, verbose=False)["input_ids"])

        length = count(answer) - surplus
        if count(split_sentences(answer)[0].strip()) > length:
            return messages  # an end token after half a sentence would teach to end there
        return [*messages[:-1], {**messages[-1], "content": keep_whole_sentences(answer, tokenizer, length)}]

    def _warn(self, num_conversations: int, num_long: int, num_cut: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        cut = f"; of {num_cut}, which do not fit even so, the end is cut off and not learnt" if num_cut else ""
        logger.warning(
            f"{num_long} of the {num_conversations} conversations of a batch have more than {self.max_length} tokens: their "
            f"answers are shortened to whole sentences{cut}. To learn them whole, raise `data.max_text_length` (`max_length` of "
            "the collator). Each process says so once."
        )


class PairCollator:
    """
    Batches of volumes and reports for [`DCFormerSiglipModel`].

    Args:
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        max_length (`int`):
            Tokens a report may have.
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor, self.max_length = processor, max_length

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            items (`list`):
                Dictionaries with `text`, `volume`, a prepared volume of shape `(depth, height, width)`, `text_group_id`, and
                maybe `similar_texts` and `similar_group_ids`, as [`PairBuilder`] makes them.

        Returns:
            `input_ids` and `attention_mask` of shape `(num_texts, sequence_length)`, `pixel_values` of shape
            `(batch_size, 1, depth, height, width)`, `text_group_ids` of shape `(num_texts,)`, `num_unpaired_texts` where
            there are similar ones, which come last, and `return_loss`.
        """
        texts, ids = [item["text"] for item in items], [item["text_group_id"] for item in items]
        for item in items:
            texts += item.get("similar_texts", [])
            ids += item.get("similar_group_ids", [])
        batch = self.processor.tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "pixel_values": stack_volumes(items),
            "text_group_ids": torch.tensor(ids),
            **({"num_unpaired_texts": len(texts) - len(items)} if len(texts) > len(items) else {}),
            "return_loss": True,
        }


# Options of the image processor for volumes in memory that went through it before, of the model's size already.
PROCESSED: dict[str, Any] = {"intensity_mode": "none", "do_crop_foreground": False, "do_resize": False}


def stack_volumes(items: list[dict[str, Any]]) -> torch.Tensor:
    """
    Prepared volumes as `pixel_values` of shape `(batch_size, 1, depth, height, width)`.

    Raises:
        ValueError: they are of different sizes.
    """
    shapes = sorted({tuple(item["volume"].shape) for item in items})
    if len(shapes) > 1:
        raise ValueError(
            f"Expected volumes of one size (depth, height, width) in a batch, got {shapes}. The augmentation 'original' "
            "turns volumes about the depth axis and needs equal height and width; prepared data need one size."
        )
    return torch.stack([item["volume"] for item in items]).unsqueeze(1)  # (D, H, W) each -> (B, 1, D, H, W)


__all__ = ["PROCESSED", "ConversationCollator", "PairCollator", "stack_volumes"]
