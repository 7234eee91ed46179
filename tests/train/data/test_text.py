"""Whole-sentence truncation: what ends a sentence, exact token counts, seeded choice."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from med3dvlm.train.data.text import keep_whole_sentences, split_sentences


GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each word and each sign, [CLS] before and [SEP] after, as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("A cyst of 3.5 cm. No stone.", ["A cyst of 3.5 cm.", "No stone."]),
        ("Seen by Dr. Who. Normal, e.g. the liver.", ["Seen by Dr. Who.", "Normal, e.g. the liver."]),
        ("It is approx. 3 mm vs. 4 mm (cf. image). Stable.", ["It is approx. 3 mm vs. 4 mm (cf. image).", "Stable."]),
        ("See Fig. 2 and No. 3. Is there air? No. The liver is fine.",
         ["See Fig. 2 and No. 3.", "Is there air?", "No.", "The liver is fine."]),
        ("1. Liver: normal. 2. Spleen: large. 10. Kidneys.", ["1. Liver: normal.", "2. Spleen: large.", "10. Kidneys."]),
        ("a. Liver b. Spleen. It measures 3. Done.", ["a. Liver b.", "Spleen.", "It measures 3.", "Done."]),
        ("Liver normal.Spleen large.", ["Liver normal.", "Spleen large."]),
        ("FINDINGS\nLiver normal\n\nSpleen large", ["FINDINGS", "Liver normal", "Spleen large"]),
        ("A cyst of\n3 cm and\nmore.\n2. Spleen\n- small", ["A cyst of\n3 cm and\nmore.", "2. Spleen", "- small"]),
        ('He said "normal." Then left (late.) End', ['He said "normal."', "Then left (late.)", "End"]),
        ("  \n Leading. space", ["Leading.", "space"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(text, expected):
    sentences = split_sentences(text)
    assert [sentence.strip() for sentence in sentences] == expected
    assert "".join(sentences) == text


def test_a_text_that_fits_is_unchanged(tokenizer):
    text = " Liver  normal.\nSpleen normal. "
    assert keep_whole_sentences(text, tokenizer, 8) == text  # 6 tokens and the two special ones


def test_sentences_are_kept_whole_in_order_and_as_many_as_fit(tokenizer):
    text = "Liver normal. The spleen is very, very large. Kidneys normal. No stone."
    assert keep_whole_sentences(text, tokenizer, 11) == "Liver normal. Kidneys normal. No stone."
    assert keep_whole_sentences(text, tokenizer, 10) == "Liver normal. Kidneys normal."
    assert keep_whole_sentences(text, tokenizer, 5) == "Liver normal."


def test_sentences_without_space_between_them_do_not_run_together(tokenizer):
    assert keep_whole_sentences("One a.Two b c d e f g.Three h.", tokenizer, 8) == "One a. Three h."


def test_choice_follows_the_seed_and_keeps_the_first_sentence_and_the_order(tokenizer):
    text = " ".join(f"Word{index} here." for index in range(12))

    def draw(seed):
        return keep_whole_sentences(text, tokenizer, 14, torch.Generator().manual_seed(seed))

    results = [draw(seed) for seed in range(80)]
    assert results == [draw(seed) for seed in range(80)]
    assert len(set(results)) > 10
    for result in results:
        numbers = [int(word.removeprefix("Word")) for word in result.split() if word.startswith("Word")]
        assert numbers[0] == 0 and numbers == sorted(numbers) and len(numbers) == 4
    assert {f"Word{index}" for index in range(12)} <= set(" ".join(results).split())


def test_a_first_sentence_that_is_too_long_is_cut_after_a_word(tokenizer):
    text = "A very long sentence without an end in sight. Short."
    assert keep_whole_sentences(text, tokenizer, 6) == "A very long sentence"
    assert keep_whole_sentences("3.5 cm. End", tokenizer, 4) == "3."  # a word of three tokens, two of which fit


def test_no_room_for_a_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`max_length` 2 leaves no room for a text beside the tokenizer's special"):
        keep_whole_sentences("Liver normal.", tokenizer, 2)


@pytest.mark.parametrize("max_length", range(3, 80, 7))
def test_the_limit_holds_for_the_reference_tokenizer(max_length):
    import json

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(GOLDENS / "tiny_tokenizer.json"))
    report = json.loads((GOLDENS / "dataset.json").read_text())["inputs"]["reports"][1]
    text = f"{report} {report[:40]}. {report[40:70]}."
    for generator in (None, torch.Generator().manual_seed(0)):
        kept = keep_whole_sentences(text, tokenizer, max_length, generator)
        assert 0 < len(tokenizer(kept)["input_ids"]) <= max_length
        assert not text.startswith(kept) or len(kept) == len(text) or text[len(kept)].isspace()
