"""What is published or saved works where our package is not installed, and gives the same to the bit."""

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, random_volumes, tiny_vlm
from transformers import Trainer, TrainingArguments

from med3dvlm import Med3DVLMForConditionalGeneration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vlm):
    """A checkpoint of Trainer after two steps, the inputs of the steps and the logits of the trained model."""
    model, volumes = tiny_vlm(seed=1), random_volumes(2)
    ids = torch.tensor([IMAGE_TOKEN_ID] * model.config.image_seq_length + [8, 9, 10])
    labels = torch.where(ids == IMAGE_TOKEN_ID, -100, ids)
    examples = [{"input_ids": ids, "labels": labels, "pixel_values": volume} for volume in volumes]
    output = tmp_path_factory.mktemp("run")
    arguments = TrainingArguments(
        output,
        max_steps=2,
        per_device_train_batch_size=1,
        save_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=examples, processing_class=vlm.processor).train()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids[None], pixel_values=volumes[:1]).logits
    return output / "checkpoint-2", ids[None], volumes[:1], logits


def test_a_checkpoint_of_trainer_is_the_trained_model(checkpoint):
    folder, input_ids, pixel_values, logits = checkpoint
    model = Med3DVLMForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids, pixel_values=pixel_values).logits, logits)


def test_a_stranger_gets_the_same_outputs_from_all_that_was_saved(
    published, checkpoint, scan, run_installed, run_clean, tmp_path
):
    folders = [*published.values(), checkpoint[0]]
    run_installed(*folders, scan, "--save", tmp_path / "expected.pt")
    output = run_clean(*folders, scan, "--expect", tmp_path / "expected.pt", "--resave", tmp_path / "resaved")
    assert output.count("equal to the bit") == 8 + 3 + 4 + 3 + 8
    assert "FAIL" not in output and "all of it, with the network blocked" in output

    # What a stranger loads and saves again, another stranger can load.
    resaved = [tmp_path / "resaved" / folder.name for folder in folders]
    output = run_clean(*resaved, scan, "--expect", tmp_path / "expected.pt")
    assert output.count("equal to the bit") == 8 + 3 + 4 + 3 + 8 and "FAIL" not in output


def test_the_examples_of_the_cards_run(published, scan, run_clean):
    output = run_clean(*published.values(), scan, "--cards")
    assert output.count("the card's example runs") == len(published)


def test_the_check_itself_notices_a_difference(published, scan, run_python, tmp_path):
    script = __file__.replace("test_clean_process", "clean_environment")
    torch.save({"encoder": {"pixel_values": torch.zeros(1)}}, tmp_path / "wrong.pt")
    arguments = (published["encoder"], scan, "--hide", "med3dvlm", "--expect", tmp_path / "wrong.pt")
    output = run_python(script, *arguments, check=False)
    assert "FAIL" in output
