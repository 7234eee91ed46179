"""What Trainer makes of the models: the step it takes is the gradient of the mean loss."""

import copy

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments


def siglip_samples(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(8, 99, (5,), generator=generator),
            "pixel_values": tiny.random_volumes(1, seed=index)[0],
        }
        for index in range(count)
    ]


def vlm_samples(count):
    config = tiny.tiny_vlm_config()
    samples = []
    for index in range(count):
        input_ids = tiny.text_with_volumes(config, [10], 1, [20 + index, 30, 40])[0]
        labels = input_ids.clone()
        labels[: -2 + index % 2] = -100  # two tokens to learn in one sample, one in the next
        samples.append(
            {"input_ids": input_ids, "labels": labels, "pixel_values": tiny.random_volumes(1, seed=index)[0]}
        )
    return samples


def collate(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def collate_pairs(samples):
    return {**collate(samples), "return_loss": True}


def take_one_step(model, samples, collator, folder):
    """Plain gradient descent with rate 1 over two accumulated batches of two: the weights move by the gradient."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1.0,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def frozen_statistics(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.train = lambda mode=True, module=module: module  # stays in evaluation mode, so that losses compare
    return model


@pytest.mark.parametrize("kind", ["dual encoder", "vision-language model"])
def test_trainer_accumulates_to_the_gradient_of_the_mean_loss(kind, tmp_path):
    if kind == "dual encoder":
        model, samples, collator = tiny.tiny_siglip(text_type="distilbert"), siglip_samples(4), collate_pairs
        model.text_model.config.dropout = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    else:
        model, samples, collator = tiny.tiny_vlm(), vlm_samples(4), collate
    before = copy.deepcopy(model)
    logged = take_one_step(frozen_statistics(model), samples, collator, tmp_path)

    batches = [collator(samples[:2]), collator(samples[2:])]
    if kind == "dual encoder":
        loss = sum(before(**batch).loss for batch in batches) / 2
    else:  # over all tokens to learn, whichever batch they are in
        num_tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss = sum(before(**batch, num_items_in_batch=num_tokens).loss for batch in batches)
    loss.backward()
    assert logged == pytest.approx(loss.item(), rel=1e-3)
    for (name, old), new in zip(before.named_parameters(), model.parameters()):
        expected = torch.zeros_like(old) if old.grad is None else old.grad
        torch.testing.assert_close(
            old.detach() - new.detach(), expected, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
