from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from tiny import build_tiny_model
from transformers import pipeline
from transformers.utils import logging

from med3dvlm import Med3DVLMPipeline


SCAN = Path(data_path) / "anatomical.nii"
SETTINGS = {"return_full_text": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def parts():
    return build_tiny_model()


@pytest.fixture(scope="module")
def pipe(parts):
    model, processor = parts
    return pipeline("image-text-to-text", model=model, processor=processor, pipeline_class=Med3DVLMPipeline)


def expected_answer(parts, text, *sources):
    """What the model generates when it is called by hand."""
    model, processor = parts
    inputs = processor(images=list(sources), text=text, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6)
    return processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def volume(seed=0):
    return np.random.default_rng(seed).random((12, 14, 16), dtype=np.float32)


def chat(source, question="What?"):
    return [{"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": question}]}]


def test_the_pipeline_does_not_say_that_its_own_model_is_not_supported(parts, caplog):
    model, processor = parts
    logging.enable_propagation()
    try:
        pipeline("image-text-to-text", model=model, processor=processor, pipeline_class=Med3DVLMPipeline)
    finally:
        logging.disable_propagation()
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    "source",
    [str(SCAN), SCAN, SCAN.read_bytes(), nibabel.load(SCAN), volume(), volume()[None], torch.from_numpy(volume())],
    ids=["str", "path", "bytes", "nibabel", "array", "channel", "tensor"],
)
def test_every_form_of_a_volume_is_answered_plainly_and_in_a_chat(pipe, parts, source):
    plain = pipe(images=source, text="<image>\nWhat?", **SETTINGS)
    assert plain[0]["generated_text"] == expected_answer(parts, "<image>\nWhat?", source)
    prompt = parts[1].apply_chat_template(chat(source), add_generation_prompt=True)
    answer = pipe(text=chat(source), **SETTINGS)
    assert answer[0]["generated_text"] == expected_answer(parts, prompt, source)


def test_answers_depend_on_the_volume_and_on_the_question(pipe):
    ramp = np.linspace(0, 1, 12 * 14 * 16, dtype=np.float32).reshape(12, 14, 16)
    first, other_volume, other_question = (
        pipe(text=chat(source, question), return_full_text=False, max_new_tokens=24)[0]["generated_text"]
        for source, question in ((volume(), "What?"), (ramp, "What?"), (volume(), "Where?"))
    )
    assert first != other_volume and first != other_question


def test_plain_batch_gives_the_answers_of_single_calls(pipe, parts):
    texts = ["<image> A?", "<image> A longer one?"]
    together = pipe(images=[volume(0), volume(1)], text=texts, **SETTINGS)
    alone = [expected_answer(parts, text, volume(seed)) for seed, text in enumerate(texts)]
    assert [entry["generated_text"] for entry in together] == alone


def test_batch_of_chats_gives_the_answers_of_single_chats(pipe):
    chats = [chat(volume(0)), chat(SCAN, "A longer question?"), chat(volume(1))]
    together = pipe(text=chats, batch_size=2, **SETTINGS)
    alone = [pipe(text=entry, **SETTINGS)[0]["generated_text"] for entry in chats]
    assert [entry[0]["generated_text"] for entry in together] == alone


def test_text_alone_and_several_volumes_are_answered(pipe, parts):
    assert isinstance(pipe(text=[{"role": "user", "content": "Hello?"}], **SETTINGS)[0]["generated_text"], str)
    answer = pipe(images=[volume(0), volume(1)], text="<image><image>?", **SETTINGS)
    assert answer[0]["generated_text"] == expected_answer(parts, "<image><image>?", volume(0), volume(1))


def test_options_reach_the_image_processor(pipe):
    with pytest.raises(ValueError, match="none.*expects values"):
        pipe(images=volume() * 5, text="<image>?", processor_kwargs={"intensity_mode": "none"}, **SETTINGS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": "missing.nii.gz", "text": "<image>?"}, "missing.nii.gz"),
        ({"images": volume(), "text": "What?"}, "1 volumes and 0 placeholders"),
        ({"images": {"images": volume()}}, r"`images` and `text`, \['text'\] missing"),
        ({"images": str(SCAN)}, "Expected a text beside the volumes"),
        ({"images": [SCAN, SCAN]}, "Expected a text beside the volumes"),
        ({"images": nibabel.load(SCAN)}, "Expected a text beside the volumes"),
        ({"images": SCAN, "text": "<image>?", "processor_kwargs": {"return_report": True}}, "call the processor"),
        ({"text": chat(SCAN), "processor_kwargs": {"return_report": True}}, "call the processor"),
    ],
)
def test_bad_input_is_refused_clearly(pipe, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipe(**arguments, **SETTINGS)
