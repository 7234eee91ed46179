"""
In as many processes as there are: trains a tiny model of each kind with the trainers of the stages, and writes its losses into a
folder of the kind's name (`KIND[,KIND] FOLDER [DEEPSPEED]`); or runs a recipe (`recipe FILE`).
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


sys.modules["torchvision"] = None  # type: ignore[assignment]

import datasets
import tiny
import torch
from tiny import build_tiny_model
from transformers import TrainingArguments, set_seed

from med3dvlm.train.data.augmentation import augment_laterality_safe
from med3dvlm.train.data.collate import ConversationCollator, PairCollator
from med3dvlm.train.data.dataset import ConversationBuilder, PairBuilder, StudyDataset
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.data.similarity import SimilarReports
from med3dvlm.train.models import choose_trained_parts, made_whole
from med3dvlm.train.recipe import load_recipe
from med3dvlm.train.stages import read_deepspeed_config, run_recipe
from med3dvlm.train.trainers import ContrastiveTrainer, GenerationTrainer


class RandomVolumes:
    """A volume of its own for each number."""

    def load(self, path: str) -> torch.Tensor:
        return tiny.random_volumes(1, seed=int(path))[0, 0]


def make_samples(count: int) -> datasets.Dataset:
    rows = [
        {
            "image": str(index),
            "case": str(index),
            "task": "report",
            "question": "",
            "choices": [],
            "answer": f"Finding number {index % 5}, {'large' if index % 2 else 'small'}.",
            "answer_choice": "",
            "question_type": 0,
        }
        for index in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)


def train(kind: str, folder: Path, deepspeed: str = "") -> list[float]:
    """The losses of all steps, which the first process writes as well."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = read_deepspeed_config(deepspeed, bf16=False) if deepspeed else None
    if deepspeed == "zero3":  # the smallest weights are shared out too
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // world_size,
        max_steps=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_drop_last=True,
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=config,
    )
    set_seed(0)
    samples = make_samples(10)
    with made_whole(arguments):
        model, processor = build_tiny_model(tiny.IMAGE_SIZE)
        if kind == "contrastive":
            vision_config = tiny.tiny_dcformer_config(sync_batch_norm=True)
            model = tiny.tiny_siglip(vision_config=vision_config)
            model.text_model.resize_token_embeddings(len(processor.tokenizer))
    if kind == "contrastive":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        draw_similar = SimilarReports(samples["answer"][:], samples["case"][:], 2)
        builder = PairBuilder(processor.tokenizer, 60, draw_similar=draw_similar)
        collator = PairCollator(processor, 60)
        trainer_class, options = ContrastiveTrainer, {"identical_reports_match": True}
    else:
        choose_trained_parts(model, ["multi_modal_projector", "language_model"])
        builder, collator = ConversationBuilder(), ConversationCollator(processor)
        trainer_class, options = GenerationTrainer, {}
    dataset = StudyDataset(samples, RandomVolumes(), builder, augment_laterality_safe, seed=0)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        **options,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses))
    return losses


def main(kinds: str, place: Path, deepspeed: str) -> None:
    if importlib.util.find_spec("deepspeed"):
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo: nothing is compiled
    if kinds == "recipe":
        run_recipe(load_recipe(place))
    else:
        for kind in kinds.split(","):
            train(kind, place / kind, deepspeed)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
