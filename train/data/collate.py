"""From items to batches for the two kinds of models."""

from typing import Any

import torch

from .packing import share_beginnings


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
            Tokens a conversation may have; what is beyond, the end of the answer, is cut off.

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
        truncation = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        batch = self.processor.apply_chat_template(
            [messages for group in groups for messages in group],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={**PREPARED, "padding": True, "padding_side": "right", **truncation},
        )
        is_answer = torch.as_tensor(batch["assistant_masks"]).bool() & batch["attention_mask"].bool()
        if not bool(is_answer.any(dim=1).all()):
            raise ValueError(
                f"A conversation has no token to learn within {self.max_length} tokens: its question fills them, or its "
                "answer is empty. Raise `max_text_length`, and check the data with `med3dvlm prepare check`."
            )
        tokens = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(~is_answer, -100),
        }
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


# Options of the image processor for volumes that went through it before.
PREPARED: dict[str, Any] = {"intensity_mode": "none", "do_crop_foreground": False, "do_resize": False}


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


__all__ = ["PREPARED", "ConversationCollator", "PairCollator", "stack_volumes"]
