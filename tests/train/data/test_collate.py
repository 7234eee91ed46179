"""The exact labels of every task, and batches that the models take."""

import pytest
import torch
from tiny import build_tiny_model

from med3dvlm.train.data.collate import ConversationCollator, PairCollator
from med3dvlm.train.data.dataset import ConversationBuilder, PairBuilder


SHAPE = (32, 64, 96)


@pytest.fixture(scope="module")
def processor():
    return build_tiny_model(SHAPE)[1]


def item(task, question="", answer="", choices=(), answer_choice=""):
    sample = {"task": task, "question": question, "answer": answer, "choices": list(choices), "question_type": 0}
    return ConversationBuilder()({**sample, "answer_choice": answer_choice}, torch.rand(SHAPE), torch.Generator())


ITEMS = {
    "report": (item("report", answer="No effusion."), "No effusion."),
    "closed_vqa": (item("closed_vqa", "Where?", "spleen", ("liver", "spleen", "lung", "aorta"), "B"), "B. spleen"),
    "open_vqa": (item("open_vqa", "Which organ?", "spleen"), "spleen"),
    "yes_no_vqa": (item("yes_no_vqa", "Is it large?", "No"), "No"),
}


@pytest.mark.parametrize("task", ITEMS)
def test_labels_are_the_answer_and_its_end_token_and_nothing_else(task, processor):
    conversation, answer = ITEMS[task]
    longer = item("report", answer="A longer report, so that there is padding on the right of the other one." * 2)
    batch = ConversationCollator(processor)([conversation, longer])
    tokenizer = processor.tokenizer
    row, labels = batch["input_ids"][0], batch["labels"][0]
    learnt = labels != -100
    assert tokenizer.decode(labels[learnt]) == f"{answer}<|im_end|>"
    assert torch.equal(row[learnt], labels[learnt])
    # One piece, after the question and before the newline that ends the turn and the padding.
    places = learnt.nonzero().flatten()
    assert torch.equal(places, torch.arange(int(places[0]), int(places[-1]) + 1))
    assert tokenizer.decode(row[: places[0]]).endswith("<|im_start|>assistant\n")
    end = int(batch["attention_mask"][0].sum())
    assert tokenizer.decode(row[places[-1] + 1 : end]) == "\n"
    assert bool((batch["attention_mask"][0][end:] == 0).all()) and end < len(row)
    assert bool((row[end:] == tokenizer.pad_token_id).all())


def test_batch_has_the_placeholders_and_volumes_of_the_model(processor):
    conversations = [conversation for conversation, _ in ITEMS.values()]
    batch = ConversationCollator(processor)(conversations)
    assert ((batch["input_ids"] == processor.image_token_id).sum(dim=1) == processor.image_seq_length).all()
    assert batch["pixel_values"].shape == (4, 1, *SHAPE)
    assert torch.equal(batch["pixel_values"][1, 0], conversations[1]["volume"])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}


def test_tokens_are_those_that_the_processor_gives_at_inference(processor):
    conversation, _ = ITEMS["open_vqa"]
    batch = ConversationCollator(processor)([conversation])
    prompt = processor.apply_chat_template(
        conversation["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"intensity_mode": "none", "do_crop_foreground": False},
    )["input_ids"][0]  # fmt: skip
    assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt)
    assert bool((batch["labels"][0, : len(prompt)] == -100).all()) and batch["labels"][0, len(prompt)] != -100


def test_what_is_too_long_loses_the_end_of_its_answer_but_never_all_of_it(processor):
    conversation = item("report", answer="finding " * 40)
    whole = ConversationCollator(processor)([conversation])["input_ids"].shape[1]
    batch = ConversationCollator(processor, max_length=whole - 100)([conversation])
    assert batch["input_ids"].shape[1] == whole - 100 and bool((batch["labels"] != -100).any())
    with pytest.raises(ValueError, match="no token to learn within 60 tokens"):
        ConversationCollator(processor, max_length=60)([conversation])


SENTENCES = ("A cyst of 3.5 cm in the liver.", "The spleen is normal, and so are both of the kidneys.", "No stone.")
REPORT = " ".join(SENTENCES)


def length_of(conversation, processor):
    """Tokens of a conversation without the newline behind its end token."""
    return ConversationCollator(processor)([conversation])["input_ids"].shape[1] - 1


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (0, (0, 1, 2)),  # the newline that ends the turn may be missing
        (1, (0, 1)),
        (len(SENTENCES[2]) + 1, (0, 1)),
        (len(SENTENCES[2]) + 2, (0, 2)),
        (len(SENTENCES[1]) + 1, (0, 2)),
        (len(SENTENCES[1]) + 2, (0,)),
    ],
)
def test_of_a_report_that_is_too_long_whole_sentences_and_the_end_token_are_learnt(room, kept, processor):
    long, answer = item("report", answer=REPORT), " ".join(SENTENCES[index] for index in kept)
    max_length = length_of(long, processor) - room  # one token a byte
    batch = ConversationCollator(processor, max_length)([long])
    (labels,) = batch["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == f"{answer}<|im_end|>"
    # Token for token, what the shorter report gives.
    expected = ConversationCollator(processor)([item("report", answer=answer)])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected[name][:, :max_length])


def test_questions_that_share_a_volume_are_shortened_one_by_one(processor):
    volume = torch.rand(SHAPE)
    group = [item("open_vqa", question, answer) for question, answer in (("Why?", REPORT), ("Where?", "liver"))]
    max_length = length_of(group[0], processor) - 1
    batch = ConversationCollator(processor, max_length)(
        [{"conversations": [one["messages"] for one in group], "volume": volume}]
    )
    labels = batch["labels"][0]
    learnt = f"{SENTENCES[0]} {SENTENCES[1]}<|im_end|>liver<|im_end|>"
    assert processor.tokenizer.decode(labels[labels != -100]) == learnt


def test_conversations_that_are_too_long_are_told_of_once(processor, caplog):
    long, endless = item("report", answer=REPORT), item("report", answer=f"finding {'so' * 90} far")
    max_length = length_of(long, processor) - 1
    collator = ConversationCollator(processor, max_length)
    collator([item("report", answer=" ".join(SENTENCES[:2]))])
    assert not caplog.records
    for _ in range(2):
        batch = collator([ITEMS["report"][0], long, endless])
    (record,) = caplog.records
    message = record.getMessage()
    assert f"2 of the 3 conversations of a batch have more than {max_length} tokens" in message
    assert "of 1, which do not fit even so, the end is cut off and not learnt" in message
    assert "`data.max_text_length`" in message and "finding" not in message
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [end in labels.tolist() for labels in batch["labels"]] == [True, True, False]


def test_an_empty_answer_beyond_the_limit_is_refused(processor):
    conversation = item("open_vqa", "Where?", "")
    with pytest.raises(ValueError, match="no token to learn within"):
        ConversationCollator(processor, length_of(conversation, processor) - 1)([conversation])


def test_a_template_without_generation_block_is_refused(processor):
    class Other:
        chat_template = "{{ messages }}"

    with pytest.raises(ValueError, match="generation block"):
        ConversationCollator(Other())


def test_volumes_of_different_sizes_are_refused(processor):
    first, second = ITEMS["report"][0], {**ITEMS["report"][0], "volume": torch.rand(32, 96, 64)}
    with pytest.raises(ValueError, match=r"one size .* \[\(32, 64, 96\), \(32, 96, 64\)\]"):
        ConversationCollator(processor)([first, second])


def test_pairs_have_texts_volumes_and_groups(processor):
    builder = PairBuilder(processor.tokenizer, max_length=40)
    generator = torch.Generator()
    items = [builder({"answer": text}, torch.rand(SHAPE), generator) for text in ("One.", "Two words.", "One.")]
    batch = PairCollator(processor, max_length=40)(items)
    assert batch["return_loss"] is True and batch["pixel_values"].shape == (3, 1, *SHAPE)
    assert batch["text_group_ids"][0] == batch["text_group_ids"][2] != batch["text_group_ids"][1]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 10, 4]  # one token a byte


def test_similar_reports_come_after_all_pairs(processor):
    others = {"One.": ["Two words.", "Three."], "Four.": ["One.", "Five."]}
    builder = PairBuilder(processor.tokenizer, max_length=40, draw_similar=lambda report, generator: others[report])
    items = [builder({"answer": text}, torch.rand(SHAPE), torch.Generator()) for text in others]
    batch = PairCollator(processor, max_length=40)(items)
    ids = batch["text_group_ids"].tolist()
    assert batch["num_unpaired_texts"] == 4 and len(batch["pixel_values"]) == 2
    assert len(ids) == 6 and ids[4] == ids[0] and len(set(ids)) == 5
    assert processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == [
        *others,
        *others["One."],
        *others["Four."],
    ]


def test_similar_reports_are_cut_to_whole_sentences_too(processor):
    long = "One short sentence. " * 5
    builder = PairBuilder(processor.tokenizer, max_length=40, draw_similar=lambda report, generator: [long])
    item = builder({"answer": "One."}, torch.rand(SHAPE), torch.Generator())
    assert item["similar_texts"] == ["One short sentence. One short sentence."] and len(item["similar_group_ids"]) == 1


def test_a_similar_report_that_is_cut_to_the_own_text_is_left_out(processor):
    long = ["One short sentence. " + "Then one so long that it is cut off. " * 2, "Another."]
    builder = PairBuilder(
        processor.tokenizer, max_length=24, is_drawn=False, draw_similar=lambda report, generator: long
    )
    item = builder({"answer": "One short sentence."}, torch.rand(SHAPE), torch.Generator())
    assert item["similar_texts"] == ["Another."] and len(item["similar_group_ids"]) == 1
