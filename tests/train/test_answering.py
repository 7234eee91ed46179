import datasets
import pytest
import torch

from med3dvlm.train.answering import ConfidenceRecorder, answer_samples, batch_by_volume, iterate_answers
from med3dvlm.train.data.collate import PROCESSED
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
        processor_kwargs={**PROCESSED},
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


def test_a_volume_goes_through_the_language_model_once_for_all_its_questions():
    model, processor = build_tiny_model((32, 64, 96))
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    answer_samples(model, processor, samples(), Blocks(), max_new_tokens=2, batch_size=6)
    prefixes, questions = seen[:2]
    assert prefixes[0] == 3 and questions[0] == 6  # a prefix for each volume, then all questions without it
    assert prefixes[1] > processor.image_seq_length
    assert all(shape == (6, 1) for shape in seen[2:])


def test_decoding_is_greedy_whatever_the_generation_config_says():
    model, processor = build_tiny_model((32, 64, 96))
    expected = answer_samples(model, processor, samples(), Blocks(), max_new_tokens=12)
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 2}
    for option, value in options.items():
        model, processor = build_tiny_model((32, 64, 96))
        model.generation_config.update(**{option: value})
        assert answer_samples(model, processor, samples(), Blocks(), max_new_tokens=12) == expected, option


def test_confidence_is_the_geometric_mean_of_the_probabilities_of_the_answer():
    model, processor = build_tiny_model((32, 64, 96))
    (row, *_) = samples()
    (((_,), (answer,)),) = iterate_answers(model, processor, [row], Blocks(), max_new_tokens=5)
    inputs = processor.apply_chat_template(
        build_messages(Blocks().load(row["image"]), format_question(row)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={**PROCESSED},
    )
    output = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    probabilities = torch.stack([scores.softmax(-1).max() for scores in output.scores])
    assert answer.confidence == pytest.approx(float(probabilities.log().mean().exp()), rel=1e-4)


def test_confidence_does_not_count_what_follows_the_end():
    recorder = ConfidenceRecorder()
    for probability in (0.9, 0.5, 0.6):
        rest = (1 - probability) / 2
        recorder(None, torch.tensor([[probability, rest, rest]] * 2).log())
    values = recorder.confidences(torch.tensor([[4, 7, 0], [4, 5, 6]]), end_ids=[7])
    assert values == pytest.approx([(0.9 * 0.5) ** 0.5, (0.9 * 0.5 * 0.6) ** (1 / 3)], rel=1e-5)


def test_questions_about_one_volume_stay_together():
    rows = [{"image": image} for image in "aabbbcddddd"]
    batches = [[row["image"] for row in batch] for batch in batch_by_volume(rows, 4)]
    assert batches == [list("aa"), list("bbbc"), list("dddd"), list("d")]
    assert [len(batch) for batch in batch_by_volume(rows, 1)] == [1] * 11
    assert list(batch_by_volume([], 4)) == []
    with pytest.raises(ValueError, match="at least 1 question"):
        next(iterate_answers(*build_tiny_model((32, 64, 96)), rows, Blocks(), batch_size=0))
