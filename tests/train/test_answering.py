import datasets
import torch

from med3dvlm.train.answering import answer_samples
from med3dvlm.train.data.collate import PREPARED
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.demo import build_tiny_model
from med3dvlm.train.prompts import build_messages, format_question


class Blocks:
    """A bright block in another place for each number."""

    def load(self, path):
        volume = torch.zeros(32, 64, 96)
        volume[:, :, 32 * int(path) : 32 * int(path) + 32] = 1 - int(path) / 4
        return volume


def samples():
    rows = [
        {
            "image": str(image),
            "case": str(image),
            "task": "open_vqa",
            "question": question,
            "choices": [],
            "answer": "?",
            "answer_choice": "",
            "question_type": 3,
        }
        for image in range(3)
        for question in ("Where?", "Which organ is abnormal in this scan?")
    ]
    return datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)


def answer_alone(model, processor, row):
    """Without a batch, and with the volume in the conversation, as a user asks."""
    inputs = processor.apply_chat_template(
        build_messages(Blocks().load(row["image"]), format_question(row)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=PREPARED,
    )
    new_tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


def test_batches_give_the_answers_of_single_questions_and_encode_each_volume_once():
    model, processor = build_tiny_model((32, 64, 96))
    asked = samples()
    expected = [answer_alone(model, processor, row) for row in asked]
    assert len(set(expected)) > 2  # volume and question both matter

    encoded = []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    model.train()
    assert answer_samples(model, processor, asked, Blocks(), max_new_tokens=8, batch_size=4) == expected
    assert encoded == [2, 1] and model.training
