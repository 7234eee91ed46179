import base64
import json
import warnings
from inspect import signature
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from tiny import build_tiny_model
from transformers import AutoProcessor

from med3dvlm import Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.processing import processing_med3dvlm
from med3dvlm.processing.processing_med3dvlm import PROCESSOR_ARGUMENTS
from med3dvlm.train.tokenizers import build_tiny_tokenizer


SCAN = Path(data_path) / "anatomical.nii"
SEQUENCE = 8  # placeholders of the tiny model: 5 low-level and 3 high-level tokens


@pytest.fixture(scope="module")
def processor():
    return build_tiny_model()[1]


def volume(seed=0):
    return np.random.default_rng(seed).random((12, 14, 16), dtype=np.float32)


def image(source):
    return {"type": "image", "image": source}


def text(content):
    return {"type": "text", "text": content}


def render(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, **kwargs)


def tokenize(processor, messages, **kwargs):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(messages, **settings)


def test_placeholder_is_expanded_to_the_models_tokens(processor):
    inputs = processor(images=volume(), text="<image>\nWhat?", return_tensors="pt")
    placeholders = inputs["input_ids"] == processor.image_token_id
    assert placeholders.sum() == SEQUENCE and placeholders[0, :SEQUENCE].all()
    assert inputs["pixel_values"].shape == (1, 1, 32, 64, 96)
    assert processor.tokenizer.decode(inputs["input_ids"][0, SEQUENCE:]) == "\nWhat?"


def test_volumes_go_to_the_placeholders_in_order(processor):
    inputs = processor(images=[volume(0), volume(1)], text=["<image>A<image>"], return_tensors="pt")
    for index in range(2):
        expected = processor.image_processor(volume(index))["pixel_values"][0]
        assert torch.equal(inputs["pixel_values"][index], expected)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * SEQUENCE


def test_padding_stands_on_the_left_for_generation_and_where_asked_for_training(processor):
    texts = ["<image>A", "<image>A longer one"]
    left = processor(images=[volume(), volume()], text=texts, padding=True, return_tensors="pt")
    assert left["attention_mask"][0, 0] == 0 and left["attention_mask"][:, -1].all()
    right = processor(images=[volume(), volume()], text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][0, -1] == 0 and right["attention_mask"][:, 0].all()


def test_padding_stands_on_its_side_and_tells_where_the_tokenizers_was_changed(processor, monkeypatch):
    said = []
    monkeypatch.setattr(processing_med3dvlm.logger, "warning_once", said.append)
    tokenizer, texts = build_tiny_tokenizer(), ["<image>A", "<image>A longer one"]
    ours = Med3DVLMProcessor(processor.image_processor, tokenizer, image_seq_length=SEQUENCE)
    texts_alone = {"text": texts[0].removeprefix("<image>"), "padding": True}
    ours(**texts_alone)
    assert not said
    dual = Med3DVLMProcessor(processor.image_processor, tokenizer)

    def mask_of(own, **options):
        images = None if own is dual else [volume(), volume()]
        return own(images=images, text=texts, padding=True, return_tensors="pt", **options)["attention_mask"]

    assert tokenizer.padding_side == "right"
    assert mask_of(ours)[0, 0] == 0 and mask_of(ours)[:, -1].all()
    assert "changed to 'right'; this processor pads on its own, 'left'" in said[0]
    assert "pass `padding_side='right'` in the call" in said[0]
    said.clear()
    for options in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        assert mask_of(ours, **options)[0, -1] == 0
    assert not said
    tokenizer.padding_side = "left"
    assert mask_of(dual)[0, -1] == 0 and mask_of(dual)[:, 0].all()
    assert "changed to 'left'; this processor pads on its own, 'right'" in said[0]


def test_chat_template_writes_system_turns_and_volumes_in_any_order(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("First "), image(volume()), text("then "), image(volume()), text("?")]},
        {"role": "assistant", "content": [text("Stable.")]},
        {"role": "user", "content": "Why?"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nFirst <image>\nthen <image>\n?<|im_end|>\n"
        "<|im_start|>assistant\nStable.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert render(processor, messages) == expected
    assert render(processor, messages, add_generation_prompt=True) == f"{expected}<|im_start|>assistant\n"
    inputs = tokenize(processor, messages)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * SEQUENCE
    assert len(inputs["pixel_values"]) == 2


@pytest.mark.parametrize("key", ["path", "image", "url"])
def test_chat_message_takes_a_nifti_path(processor, key):
    inputs = tokenize(processor, [{"role": "user", "content": [{"type": "image", key: str(SCAN)}, text("?")]}])
    assert torch.equal(inputs["pixel_values"], processor.image_processor(SCAN)["pixel_values"])


def test_chat_message_takes_images_arrays_and_tensors(processor):
    for source in (nibabel.load(SCAN), volume(), torch.from_numpy(volume()), SCAN.read_bytes()):
        inputs = tokenize(processor, [{"role": "user", "content": [image(source), text("?")]}])
        assert torch.equal(inputs["pixel_values"], processor.image_processor(source)["pixel_values"])


def test_chat_message_takes_the_content_of_a_file_as_a_data_address(processor):
    address = f"data:application/octet-stream;base64,{base64.b64encode(SCAN.read_bytes()).decode()}"
    part = {"type": "image_url", "image_url": {"url": address}}
    inputs = tokenize(processor, [{"role": "user", "content": [part, text("?")]}])
    assert torch.equal(inputs["pixel_values"], processor.image_processor(SCAN)["pixel_values"])


def test_assistant_masks_mark_the_answers_and_their_end(processor):
    messages = [
        {"role": "user", "content": [image(volume()), text("One?")]},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": [image(volume(1)), text("Two?")]},
        {"role": "assistant", "content": "Second."},
    ]
    inputs = tokenize(processor, messages, return_assistant_tokens_mask=True)
    mask = inputs["assistant_masks"][0].bool()
    assert processor.tokenizer.decode(inputs["input_ids"][0, mask]) == "First.<|im_end|>Second.<|im_end|>"


def test_batch_of_conversations_may_mix_numbers_of_volumes(processor):
    conversations = [
        [{"role": "user", "content": [image(volume(0)), text("A?")]}],
        [{"role": "user", "content": [text("B?")]}],
        [{"role": "user", "content": [image(volume(1)), image(volume(2)), text("C?")]}],
    ]
    inputs = tokenize(processor, conversations, processor_kwargs={"padding": True})
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [SEQUENCE, 0, 2 * SEQUENCE]
    assert len(inputs["pixel_values"]) == 3


def test_report_and_options_of_a_scan_pass_through(processor):
    inputs = processor(
        images=volume(), text="<image>?", intensity_mode="percentile", return_report=True, return_tensors="pt"
    )
    assert inputs["preprocessing_report"][0]["intensity_mode"] == "percentile"
    assert "preprocessing_report" not in processor(images=volume(), text="<image>?", return_tensors="pt")


def test_post_processing_gives_the_words(processor):
    ids = processor.tokenizer("Stable.<|im_end|>", return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["Stable."]


def test_save_and_load_gives_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Med3DVLMProcessor)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    messages = [{"role": "user", "content": [image(volume()), text("?")]}]
    ours, theirs = tokenize(processor, messages), tokenize(loaded, messages)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saved_tokenizer_does_not_keep_the_length_of_the_last_batch(processor, tmp_path):
    volumes = [volume(0), volume(1)]
    processor(images=volumes, text=["<image>a"] * 2, padding=True, truncation=True, max_length=SEQUENCE + 4)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    loaded = AutoProcessor.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "`max_length` is ignored ..."
        inputs = loaded(images=volumes, text=["<image>" + "a" * 30, "<image>a"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, SEQUENCE + 30)


def test_options_given_to_the_loader_are_the_image_processors_alone(processor, tmp_path):
    processor.save_pretrained(tmp_path / "plain")
    loaded = AutoProcessor.from_pretrained(tmp_path / "plain", hu_range="soft_tissue", do_crop_foreground=False)
    loaded.save_pretrained(tmp_path / "again")
    assert "hu_range" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    ct = np.random.default_rng(0).integers(-1000, 900, (12, 14, 16)).astype(np.int16)
    for ours in (loaded, AutoProcessor.from_pretrained(tmp_path / "again")):
        assert not {"hu_range", "do_crop_foreground"} & ours.tokenizer.init_kwargs.keys()
        assert ours.image_processor.hu_range == "soft_tissue" and ours.image_processor.do_crop_foreground is False
        for window, expected in (("soft_tissue", [-160, 240]), ("lung", [-1350, 150])):
            ours.image_processor.hu_range = window
            report = ours(images=ct, text="<image>?", return_report=True)["preprocessing_report"][0]
            assert report["intensity_range"] == expected and report["crop_box"] == [[0, 12], [0, 14], [0, 16]]


def test_dual_encoders_texts_have_no_placeholders(tmp_path):
    processor = Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=[8, 9, 10]), build_tiny_tokenizer())
    assert build_tiny_tokenizer().padding_side == "left"
    processor.save_pretrained(tmp_path)
    for ours in (processor, AutoProcessor.from_pretrained(tmp_path)):
        padded = ours(text=["Normal, but longer.", "Stable."], padding=True, return_tensors="pt")["attention_mask"]
        assert padded[:, 0].all() and not padded[1, -1]  # the pooling reads the first token
        assert ours.image_token is None and ours.image_seq_length is None
        inputs = ours(images=[volume()], text=["Normal.", "Stable."], padding=True, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 1, 8, 9, 10) and len(inputs["input_ids"]) == 2


def test_template_follows_another_placeholder():
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<scan>"], special_tokens=True)
    processor = Med3DVLMProcessor(Med3DVLMImageProcessor(), tokenizer, image_seq_length=2, image_token="<scan>")
    rendered = render(processor, [{"role": "user", "content": [image(volume())]}])
    assert rendered == "<|im_start|>user\n<scan>\n<|im_end|>\n"


@pytest.mark.parametrize(
    "images, texts, message",
    [
        ([0], "What?", "got 1 volumes and 0 placeholders.*Write '<image>' where"),
        (None, "<image>What?", "got 0 volumes and 1 placeholders"),
        ([0], "<image><image>", "got 1 volumes and 2 placeholders"),
        ([[0, 1], []], ["<image>", "<image>"], r"have \[1, 1\] placeholders, but .*\[2, 0\]"),
        (None, None, "got neither"),
        ([0], [["<image>"]], "a string or a list of strings"),
    ],
)
def test_placeholders_and_volumes_must_match(processor, images, texts, message):
    def load(entry):
        return [load(inner) for inner in entry] if isinstance(entry, list) else volume(entry)

    with pytest.raises(ValueError, match=message):
        processor(images=None if images is None else load(images), text=texts)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"role": "doctor", "content": "?"}], 'must be "system", "user" or "assistant", got "doctor"'),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], 'type "image" or "text", got video'),
    ],
)
def test_unknown_parts_of_a_conversation_are_refused(processor, messages, message):
    with pytest.raises(Exception, match=message):
        render(processor, messages)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_other_media_are_refused(processor, name):
    with pytest.raises(
        ValueError, match=f"Got `{name}`, but Med3DVLM reads volumes and texts: pass a volume as `images`"
    ):
        processor(text="What?", **{name: [volume()]})


def test_mistyped_option_is_refused(processor):
    with pytest.raises(ValueError, match="no option `hu_rnge`; did you mean `hu_range`"):
        processor(images=volume(), text="<image>?", hu_rnge="lung")
    with pytest.raises(ValueError, match="did you mean `hu_range`"):
        tokenize(processor, [{"role": "user", "content": [image(volume())]}], processor_kwargs={"hu_rnge": "lung"})


def test_mistyped_argument_is_refused():
    assert set(PROCESSOR_ARGUMENTS) == set(signature(Med3DVLMProcessor).parameters) - {"kwargs"}
    with pytest.raises(ValueError, match="no option `image_seq_len`; did you mean `image_seq_length`"):
        Med3DVLMProcessor(Med3DVLMImageProcessor(), build_tiny_tokenizer(), image_seq_len=256)


def test_placeholders_need_a_tokenizer():
    with pytest.raises(ValueError, match="Expected a `tokenizer` with `image_seq_length` 256.*got none"):
        Med3DVLMProcessor(Med3DVLMImageProcessor(), image_seq_length=256)


def processor_of_the_original():
    image_processor = Med3DVLMImageProcessor(image_size=[8, 9, 10])
    return Med3DVLMProcessor(image_processor, build_tiny_tokenizer(), image_seq_length=4, prompt_format="original")


@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_the_originals_last_placeholder_counts_as_one_of_the_volume(return_tensors):
    texts = ["<image> What is it?", "<image> Where?"]
    inputs = processor_of_the_original()(
        [volume(), volume(1)], texts, padding=True, return_mm_token_type_ids=True, return_tensors=return_tensors
    )
    ids, types = (torch.as_tensor(inputs[name]) for name in ("input_ids", "mm_token_type_ids"))
    assert (ids == processor_of_the_original().image_token_id).sum(1).tolist() == [4, 4]
    assert torch.equal(types == 1, ids == processor_of_the_original().image_token_id)


def test_a_text_cut_off_behind_the_originals_placeholders_is_refused():
    with pytest.raises(
        ValueError, match="behind the 4 placeholders.*of 3 tokens that was cut off.*raise `max_length`"
    ):
        processor_of_the_original()(volume(), "<image> What is it?", truncation=True, max_length=3)


def test_tokenizer_must_know_the_placeholder():
    with pytest.raises(ValueError, match="does not know the placeholder '<scan>': add it first"):
        Med3DVLMProcessor(Med3DVLMImageProcessor(), build_tiny_tokenizer(), image_seq_length=2, image_token="<scan>")


def test_truncation_that_cuts_placeholders_is_refused(processor):
    with pytest.raises(ValueError, match="[Mm]ismatch"):
        processor(images=volume(), text="<image>What?", truncation=True, max_length=4)
