import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny import build_tiny_model, tiny_siglip

from med3dvlm.train.answering import (
    ProbabilityRecorder,
    answer_samples,
    batch_by_volume,
    check_finite_answers,
    embed_samples,
    end_token_ids,
    iterate_answers,
)
from med3dvlm.train.data.collate import PROCESSED
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.data.text import keep_whole_sentences
from med3dvlm.train.evaluation.plots import calibration_bins, expected_calibration_error
from med3dvlm.train.prompts import build_messages, format_question
from med3dvlm.train.tokenizers import build_tiny_tokenizer


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


def test_probability_is_the_product_over_the_tokens_of_the_answer():
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
    assert answer.probability == pytest.approx(float(probabilities.prod()), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_without_a_probability_is_refused(value):
    check_finite_answers({"report/000000": 0.0, "report/000001": 1.0})
    with pytest.raises(ValueError, match="^report/000001: the model's logits are NaN.* --dtype bfloat16 or float32"):
        check_finite_answers({"report/000000": 0.5, "report/000001": value})


def test_probability_of_an_answer_whose_end_is_sure_is_that_of_its_first_token():
    recorder = ProbabilityRecorder()
    recorder.log_probabilities = [torch.tensor([value]).log() for value in (0.4, 1.0, 1.0, 1.0)]
    assert recorder.probabilities(torch.tensor([[4, 5, 6, 7]]), end_ids=[7]) == pytest.approx([0.4])


def test_a_calibrated_model_is_found_to_be_one():
    generator = torch.Generator().manual_seed(0)
    recorder, num_answers = ProbabilityRecorder(), 20_000
    recorder.log_probabilities = [torch.rand(num_answers, generator=generator).pow(0.3).log() for _ in range(4)]
    probabilities = recorder.probabilities(torch.full((num_answers, 4), 5), end_ids=[7])
    hits = torch.bernoulli(torch.tensor(probabilities), generator=generator).tolist()
    assert expected_calibration_error(calibration_bins(probabilities, hits)) < 0.02


def test_probability_does_not_count_what_follows_the_end():
    recorder = ProbabilityRecorder()
    for probability in (0.9, 0.5, 0.6):
        rest = (1 - probability) / 2
        recorder(None, torch.tensor([[probability, rest, rest]] * 2).log())
    values = recorder.probabilities(torch.tensor([[4, 7, 0], [4, 5, 6]]), end_ids=[7])
    assert values == pytest.approx([0.9 * 0.5, 0.9 * 0.5 * 0.6], rel=1e-5)
    recorder.log_probabilities[2][0] = torch.nan  # of what stands after an end, nothing is known
    assert recorder.probabilities(torch.tensor([[4, 7, 0], [4, 5, 6]]), end_ids=[7]) == pytest.approx(values)


@pytest.mark.parametrize("eos, expected", [("<|endoftext|>", [5, 3]), ("<|im_end|>", [3]), (None, [3])])
def test_an_answer_ends_with_its_turn_and_with_the_text(eos, expected):
    class Tokenizer:
        eos_token_id = None if eos is None else {"<|im_end|>": 3, "<|endoftext|>": 5}[eos]

        def get_vocab(self):
            return {"a": 0, "<|im_end|>": 3, "<|endoftext|>": 5}

    assert end_token_ids(Tokenizer()) == expected


def test_questions_about_one_volume_stay_together():
    rows = [{"image": image} for image in "aabbbcddddd"]
    batches = [[row["image"] for row in batch] for batch in batch_by_volume(rows, 4)]
    assert batches == [list("aa"), list("bbbc"), list("dddd"), list("d")]
    assert [len(batch) for batch in batch_by_volume(rows, 1)] == [1] * 11
    assert list(batch_by_volume([], 4)) == []
    with pytest.raises(ValueError, match="at least 1 question"):
        next(iterate_answers(*build_tiny_model((32, 64, 96)), rows, Blocks(), batch_size=0))


@torch.no_grad()
@pytest.mark.parametrize("is_long", [False, True])
def test_vectors_are_those_of_each_volume_and_report_alone(is_long):
    """Padding, batches, the mode of the model, and how a long report is cut, change none."""
    tokenizer = build_tiny_tokenizer()
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text_config = {"model_type": "bert", "vocab_size": len(tokenizer), "max_position_embeddings": 128, **text}
    model = tiny_siglip(text_config=text_config)
    reports = [f"Cyst {number}. " + "One mass. Two stones. " * (2 * is_long + number) for number in range(3)]
    rows = [
        {**row, "task": "report", "question": "", "answer": report}
        for row, report in zip(samples().select([0, 2, 4]), reports)
    ]
    asked = datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)
    limit = 40 if is_long else 512

    def unit(features):
        return torch.nn.functional.normalize(features.pooler_output, dim=-1)[0]

    processor = SimpleNamespace(tokenizer=tokenizer)
    images, texts = embed_samples(model.train(), processor, asked, Blocks(), limit, batch_size=3)
    assert model.training
    model.eval()
    for row, sample in enumerate(asked):
        kept = keep_whole_sentences(sample["answer"], tokenizer, limit)
        assert (kept != sample["answer"]) == is_long
        ids = torch.tensor([tokenizer(kept)["input_ids"]])
        expected = unit(model.get_text_features(ids, torch.ones_like(ids), return_dict=True))
        torch.testing.assert_close(texts[row], expected, atol=1e-5, rtol=1e-4)
        volume = Blocks().load(sample["image"])[None, None]
        expected = unit(model.get_image_features(volume, return_dict=True))
        torch.testing.assert_close(images[row], expected, atol=1e-5, rtol=1e-4)
