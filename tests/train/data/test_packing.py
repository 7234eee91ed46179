import copy

import pytest
import torch
from tiny import build_tiny_model

from med3dvlm.train.data.collate import ConversationCollator
from med3dvlm.train.data.dataset import ConversationBuilder
from med3dvlm.train.data.packing import count_shared_tokens, share_beginnings


SHAPE = (32, 64, 96)
QUESTIONS = [
    [("Which organ?", "spleen"), ("Which organ is abnormal?", "the left kidney"), ("Is it large?", "Yes")],
    [("Where?", "upper part")],
]


def conversation(question, answer, volume):
    sample = {
        "task": "open_vqa", "question": question, "answer": answer, "choices": [], "question_type": 0, "answer_choice": "",
    }  # fmt: skip
    return ConversationBuilder()(sample, volume, torch.Generator())


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_model(SHAPE)


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(0)
    volumes = [torch.rand(SHAPE, generator=generator) for _ in QUESTIONS]
    return [
        [conversation(question, answer, volume) for question, answer in pairs]
        for pairs, volume in zip(QUESTIONS, volumes)
    ]


def grouped(items):
    return [{"conversations": [one["messages"] for one in group], "volume": group[0]["volume"]} for group in items]


def gradients(model, batch):
    """In float64 but for the loss, which transformers takes in float32."""
    model.zero_grad()
    loss = model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss
    loss.backward()
    return loss, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_loss_and_gradients_are_those_of_the_conversations_one_by_one(tiny, items):
    model, processor = copy.deepcopy(tiny[0]).double(), tiny[1]
    collator = ConversationCollator(processor)
    loss, expected = gradients(model, collator([one for group in items for one in group]))
    packed_loss, found = gradients(model, collator(grouped(items)))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    assert expected.keys() == found.keys() and any("vision_tower" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_each_answer_has_the_logits_of_its_own_conversation(tiny, items):
    model, processor = tiny
    collator = ConversationCollator(processor)
    packed = collator(grouped(items))
    with torch.no_grad():
        of_packed = model(**packed).logits
        learnt = packed["labels"][0] != -100
        predicting = of_packed[0][learnt.roll(-1)]
        expected = []
        for one in items[0]:
            batch = collator([one])
            logits = model(**batch).logits[0]
            expected.append(logits[(batch["labels"][0] != -100).roll(-1)])
    torch.testing.assert_close(predicting, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_volume_stands_once_and_parts_do_not_see_each_other(tiny, items):
    _, processor = tiny
    batch = ConversationCollator(processor)(grouped(items))
    assert batch["pixel_values"].shape == (2, 1, *SHAPE)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [processor.image_seq_length] * 2
    length = batch["input_ids"].shape[1]
    assert batch["attention_mask"].shape == (2, 1, length, length) and batch["attention_mask"].dtype == torch.bool
    # Where positions go back, a conversation ends and the next begins.
    positions, sees = batch["position_ids"][0], batch["attention_mask"][0, 0]
    starts = [place for place in range(1, length) if positions[place] <= positions[place - 1]]
    assert len(starts) == len(QUESTIONS[0]) - 1
    shared = int(positions[starts[0]])
    for start in starts:
        assert bool(sees[start:, :shared].all()) and not bool(sees[start:, shared:start].any())
    assert not bool(sees.triu(1).any())


def rows(*conversations):
    """Conversations of numbers; negative ones are answers."""
    length = max(map(len, conversations))
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in conversations])
    return {
        "input_ids": padded.abs(),
        "attention_mask": (padded != 0).long(),
        "labels": torch.where(padded < 0, padded.abs(), -100),
    }


@pytest.mark.parametrize(
    ("conversations", "expected"),
    [
        ([(1, 2, 3, 4, -5), (1, 2, 7, -5)], 2),
        ([(1, 2, 3, -4), (1, 2, 3, -4)], 2),  # the 3 predicts the answer
        ([(1, 2, 3, -4), (1, 2, 3, -5)], 2),
        ([(1, 2, 3, 4, -4)], 3),
        ([(1, 2), (1, 2, 3, 4, -4)], 2),  # padding is not shared
        ([(-1, 2), (-1, 3)], 0),
    ],
)
def test_what_is_shared_ends_before_the_first_difference_and_before_answers(conversations, expected):
    assert count_shared_tokens(rows(*conversations)) == expected


def test_parts_follow_the_beginning_and_groups_are_padded():
    batch = share_beginnings(rows((1, 2, 3, -4, 9), (1, 2, 5, -6), (7, 8, -9)), [2, 1], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9, 5, 6], [7, 8, 9, 99, 99, 99, 99]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 4, -100, -100, 6],
        [-100, -100, 9, -100, -100, -100, -100],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 0, 0, 0]]
    assert batch["attention_mask"][0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]


def test_a_volume_behind_the_question_is_refused(tiny):
    _, processor = tiny
    volume = torch.rand(SHAPE)
    turned = []
    for question in ("Which organ?", "Is it large?"):
        messages = conversation(question, "spleen", volume)["messages"]
        turned.append([{**messages[0], "content": messages[0]["content"][::-1]}, *messages[1:]])
    with pytest.raises(ValueError, match="begins with the volume"):
        ConversationCollator(processor)([{"conversations": turned, "volume": volume}])
