"""World size 1 equals 2 in both kinds of stages, plain and with DeepSpeed, and the order of data is exact."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch.utils.data import BatchSampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from med3dvlm import contrastive_loss
from med3dvlm.train import trainers
from med3dvlm.train.answering import embed_samples
from med3dvlm.train.data.collate import PairCollator
from med3dvlm.train.data.dataset import EpochSampler, PairBuilder, StudyDataset, text_group_id
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.evaluation.retrieval import score_retrieval
from med3dvlm.train.scoring import one_vector_per_text
from med3dvlm.train.trainers import ContrastiveTrainer, GenerationTrainer, StudyTrainer


ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "train" / "stage_program.py"
sys.path.insert(0, str(PROGRAM.parent))
import stage_program


KINDS = ("contrastive", "generation")


def losses_of_two_processes(kinds, folder, deepspeed=""):
    """Runs the stages' trainers in two processes and returns the logged losses of each kind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(PROGRAM), ",".join(kinds), str(folder), deepspeed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    outputs = {kind: folder / kind / "losses.json" for kind in kinds}
    assert all(output.exists() for output in outputs.values()), result.stderr[-3000:]
    return {kind: json.loads(output.read_text()) for kind, output in outputs.items()}


def test_two_processes_lose_what_one_loses(tmp_path):
    two = losses_of_two_processes(KINDS, tmp_path / "two")
    for kind in KINDS:
        one = stage_program.train(kind, tmp_path / "one" / kind)
        assert len(one) == 6 and two[kind] == pytest.approx(one, abs=2e-5), kind


@pytest.mark.parametrize("rate", [None, 0.0, 1e-4])
def test_the_text_encoder_has_its_own_learning_rate(rate, tmp_path):
    arguments = TrainingArguments(
        output_dir=tmp_path, learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to="none"
    )
    model = tiny.tiny_siglip()
    groups = ContrastiveTrainer(model=model, args=arguments, text_learning_rate=rate).create_optimizer().param_groups
    rates = {id(entry): group["lr"] for group in groups for entry in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_text = name.startswith(("text_model.", "text_projection."))
        assert rates[id(parameter)] == (rate if is_text and rate is not None else 1e-3), name
    decayed = {id(entry) for group in groups if group["weight_decay"] for entry in group["params"]}
    assert id(model.text_projection.weight) in decayed and id(model.text_projection.bias) not in decayed


def test_a_contrastive_batch_is_not_shared_out_by_rows(tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    trainer = ContrastiveTrainer(model=tiny.tiny_siglip(), args=arguments)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one device for each process, got 2: .*with torchrun"):
        trainer.compute_loss(trainer.model, {})


@pytest.mark.parametrize("is_match", [False, True])
def test_identical_reports_match_in_the_loss_where_they_are_to(is_match, tmp_path):
    model, group_ids = tiny.tiny_siglip(), torch.tensor([5, 9, 5])
    inputs = {
        "input_ids": torch.tensor([[2, 11, 3], [2, 12, 3], [2, 11, 3]]),
        "attention_mask": torch.ones(3, 3, dtype=torch.long),
        "pixel_values": tiny.random_volumes(3),
    }
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    trainer = ContrastiveTrainer(model=model, args=arguments, identical_reports_match=is_match)
    with torch.no_grad():
        outputs = model(**inputs)
        pairs = (outputs.image_embeds, outputs.text_embeds, model.logit_scale, model.logit_bias)
        matched, distinct = (contrastive_loss(*pairs, text_group_ids=ids) for ids in (group_ids, None))
        loss = trainer.compute_loss(model, {**inputs, "text_group_ids": group_ids, "return_loss": True})
    assert matched - distinct > 1  # with the first bias, -10, two more positives cost much
    torch.testing.assert_close(loss, matched if is_match else distinct)


def one_conversation(model):
    """14 tokens, of which the last 5 are to be learnt, and a volume."""
    input_ids = tiny.text_with_volumes(model.config, [10], 1, [11, 12, 13, 14, 15])
    labels = input_ids.masked_fill(torch.arange(14) < 9, -100)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": tiny.random_volumes(1)}


def test_only_the_positions_before_what_is_learnt_are_scored(tmp_path):
    model = tiny.tiny_vlm()
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    (loss, outputs), (plain_loss, plain_outputs) = (
        trainer(model=model, args=arguments).compute_loss(model, one_conversation(model), return_outputs=True)
        for trainer in (GenerationTrainer, Trainer)
    )
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(outputs.logits, plain_outputs.logits[0, 8:13])


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path):
    model = tiny.tiny_vlm()
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    inputs = one_conversation(model)
    logits = model(**inputs).logits[0, 8:13]
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"][0, 9:], label_smoothing=0.1)
    loss = GenerationTrainer(model=model, args=arguments).compute_loss(model, inputs)
    torch.testing.assert_close(loss, expected)


def test_a_validation_of_pairs_scores_retrieval_in_both_directions(tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    trainer = ContrastiveTrainer(model=tiny.tiny_siglip(), args=arguments, gallery_sizes=(2,))
    # By their angles volumes 0 and 1 find their reports, 2 finds that of 1; of the reports only 0 finds its volume.
    texts, images = (
        np.stack([np.cos(angles), np.sin(angles)], axis=1) for angles in np.radians([[0, 40, 80], [0, 55, 50]])
    )
    scores = trainer._retrieval(EvalPrediction((texts, images), np.array([7, 8, 9])))
    assert scores["image_to_text_recall_at_1_of_3"] == pytest.approx(2 / 3)
    assert scores["text_to_image_recall_at_1_of_3"] == pytest.approx(1 / 3)
    assert scores["chance_recall_at_1_of_3"] == pytest.approx(1 / 3)
    assert scores["image_to_text_recall_at_1_of_2"] == scores["text_to_image_recall_at_1_of_2"] == 1.0
    same = trainer._retrieval(EvalPrediction((texts, images), np.array([7, 8, 8])))
    assert same["image_to_text_deduplicated_recall_at_1_of_3"] == 1.0
    assert same["image_to_text_recall_at_1_of_3"] == pytest.approx(2 / 3)


def test_a_validation_has_the_scores_of_the_evaluation_under_their_names(tmp_path):
    """Of reports that repeat, and whose vectors differ by rounding: of two volumes each finds the one that is its own."""
    trainer = ContrastiveTrainer(
        model=tiny.tiny_siglip(), args=TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    )
    texts, images = (
        np.stack([np.cos(angles), np.sin(angles)], axis=1)
        for angles in np.radians([[0, 40.001, 40, 90, 0], [10, 55, 30, 50, 95]])
    )
    group_ids = [7, 8, 8, 9, 7]
    found = trainer._retrieval(EvalPrediction((texts, images), np.array(group_ids)))
    texts, images, ids = torch.from_numpy(texts), torch.from_numpy(images), torch.tensor(group_ids)
    expected, _ = score_retrieval(images, one_vector_per_text(texts, ids), ids, list("abcde"), None, (5,), (1,))
    assert len(expected) == 4
    for score in expected:
        direction = "image_to_text" if score.group == "volume to report, 5" else "text_to_image"
        assert found[f"{direction}_{score.metric}_of_5"] == pytest.approx(score.value), (direction, score.metric)
        assert found[f"chance_{score.metric}_of_5"] == pytest.approx(score.chance)
    assert score_retrieval(images, texts, ids, list("abcde"), None, (5,), (1,))[0][0].value > expected[0].value


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * 0 + x).mean()}


def build_line_trainer(output_dir, train_values, eval_values=(), **options):
    """Its losses are the values, in their order, one a step."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        report_to="none",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        logging_steps=2,
        train_sampling_strategy="sequential",
        label_names=["x"],
        **options,
    )
    train, validation = ([{"x": value} for value in values] for values in (train_values, eval_values))
    return StudyTrainer(model=Line(), args=arguments, train_dataset=train, eval_dataset=validation or None)


@pytest.mark.parametrize("strategy, logged", [("steps", [2, 3]), ("epoch", [3]), ("no", [])])
def test_the_last_step_is_logged_too(strategy, logged, tmp_path):
    trainer = build_line_trainer(tmp_path, [0.0, 1.0, 2.0], logging_strategy=strategy)
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    means = {"steps": [0.5, 2.0], "epoch": [1.0], "no": []}[strategy]  # of the steps since the row before
    assert losses == pytest.approx(dict(zip(logged, means)))


def test_float16_may_lose_some_losses_but_not_all_of_a_row(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(trainers.logger, "warning", warnings.append)
    trainer = build_line_trainer(tmp_path, [math.nan, 1.0, math.nan, math.inf, 1.0], [math.nan, 1.0])
    trainer.args.fp16 = True  # which accelerate starts on GPUs alone
    with pytest.raises(ValueError, match="training diverged at step 4 or shortly before: the loss is nan"):
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.5
    assert warnings == ["1 of 2 losses before step 2 overflowed in float16; nothing is learnt from them."]
    assert math.isnan(trainer.evaluate()["eval_loss"]) and trainer.args.logging_nan_inf_filter


def test_the_best_checkpoint_is_chosen_by_what_a_validation_measures(tmp_path):
    def build(trainer_class, metric, **options):
        arguments = TrainingArguments(
            output_dir=tmp_path, use_cpu=True, report_to="none", metric_for_best_model=metric
        )
        options = {"eval_dataset": ["a", "b", "c"], **options}
        return trainer_class(model=tiny.tiny_siglip(), args=arguments, **options)

    with pytest.raises(ValueError, match=r"must be one of eval_loss, with or without `eval_`, got 'accuracy'"):
        build(StudyTrainer, "accuracy")
    build(StudyTrainer, "loss")
    with pytest.raises(ValueError, match=r"eval_loss, eval_image_to_text_recall_at_1_of_2, .*, got 'eval_accuracy'"):
        build(ContrastiveTrainer, "eval_accuracy", gallery_sizes=(2, 100))
    trainer = build(ContrastiveTrainer, "text_to_image_recall_at_1_of_3", gallery_sizes=(2, 100))
    vectors = np.eye(3, dtype=np.float32)
    logged = {f"eval_{name}" for name in trainer._retrieval(EvalPrediction((vectors, vectors), np.arange(3)))}
    measured = {name for name in logged if "chance" not in name}
    assert len(measured) == 8 and set(trainer.metric_names()) == {"eval_loss", *measured}
    # What a caller measures besides is not known.
    for trainer_class in (StudyTrainer, ContrastiveTrainer):
        build(trainer_class, "accuracy", compute_metrics=lambda prediction: {"accuracy": 1.0})
        build(trainer_class, "mine_loss", eval_dataset={"mine": ["a"]})


def trainer_of(folder, num_train, num_validation):
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
    )
    rows = [{"text": str(row)} for row in range(max(num_train, num_validation))]
    return StudyTrainer(
        model=tiny.tiny_siglip(),
        args=arguments,
        train_dataset=rows[:num_train],
        eval_dataset=rows[:num_validation],
        data_collator=lambda items: {"labels": [item["text"] for item in items]},
    )


@pytest.mark.parametrize("num_validation", [3, 6])
def test_a_validation_takes_every_sample_where_training_drops_the_last_batch(num_validation, tmp_path):
    trainer = trainer_of(tmp_path, 6, num_validation)
    validated = [label for batch in trainer.get_eval_dataloader() for label in batch["labels"]]
    assert sorted(validated) == [str(row) for row in range(num_validation)]
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [4]


@pytest.mark.parametrize("num_samples", [1, 5, 6, 12])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_copies_in_a_validation_are_counted_as_accelerate_makes_them(num_samples, batch_size, monkeypatch):
    def count(size):
        batches = BatchSampler(range(num_samples), size, False)
        return sum(len(batch) for rank in range(2) for batch in BatchSamplerShard(batches, 2, rank)) - num_samples

    said = []
    monkeypatch.setattr(trainers.logger, "warning_once", said.append)
    trainers.warn_of_copies(num_samples, batch_size, 2)
    without = [size for size in range(1, batch_size + 1) if count(size) == 0]
    if count(batch_size) == 0:
        assert not said
        return
    assert said[0].startswith(f"`eval_loss` counts {count(batch_size)} samples repeatedly: {num_samples} are")
    remedy = (
        f"training.per_device_eval_batch_size={max(without)}" if without else "data.num_validation, .* a multiple of 2"
    )
    assert re.search(rf"Recalls are right\. Without copies: .*{remedy}\.$", said[0])


def test_copies_are_warned_of_where_there_are_several_processes(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trainers.logger, "warning_once", said.append)
    trainer = trainer_of(tmp_path, 4, 6)
    trainer.get_eval_dataloader()
    assert not said
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    trainer.get_eval_dataloader()
    assert "6 are no multiple of batch size 4 times 2 processes" in said[0] and said[0].endswith("eval_batch_size=3.")


@pytest.mark.parametrize(
    "config, is_writer, is_saved",
    [
        ({"zero_optimization": {"stage": 2}}, False, False),
        ({"zero_optimization": {"stage": 2}}, True, True),
        ({"zero_optimization": {"stage": 3}}, False, True),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, False, True),
        (None, False, True),
    ],
)
def test_only_the_process_that_writes_copies_weights_that_all_have(config, is_writer, is_saved, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, 4, 4)
    monkeypatch.setattr(TrainingArguments, "should_save", is_writer)
    trainer.args.deepspeed_plugin = config and SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(config))
    saved = []
    monkeypatch.setattr(Trainer, "save_model", lambda self, *arguments: saved.append(arguments))
    trainer.save_model("folder", _internal_call=True)
    assert saved == ([("folder", True)] if is_saved else [])


def shards_of_an_epoch(trainer, epoch, num_skipped=0):
    """What two processes draw in an epoch, or in what is left of it, as Trainer and accelerate go about it."""
    drawn = []
    for rank in range(2):
        batches = BatchSamplerShard(BatchSampler(trainer._get_train_sampler(range(10)), 1, False), 2, rank)
        loader = DataLoaderShard(range(10**6), batch_sampler=batches, collate_fn=list)
        trainer.state.epoch = epoch + num_skipped / len(loader)
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        if num_skipped:
            loader = skip_first_batches(loader, num_skipped)
        loader.set_epoch(epoch)
        drawn.append([number for batch in loader for number in batch])
    return drawn


def test_processes_share_an_epoch_out_and_go_on_with_it_where_they_are_resumed(tmp_path):
    trainer = trainer_of(tmp_path, num_train=2, num_validation=2)
    whole = shards_of_an_epoch(trainer, 3)
    assert sorted(whole[0] + whole[1]) == list(range(30, 40)) and list(map(len, whole)) == [5, 5]
    assert shards_of_an_epoch(trainer, 3, num_skipped=2) == [drawn[2:] for drawn in whole]


def test_a_validation_leaves_the_random_numbers_of_training_as_they_are(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, num_train=2, num_validation=3)
    # A loader draws a number each time that it starts.
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"batches": len(list(self.get_eval_dataloader()))})
    state = torch.random.get_rng_state()
    assert trainer.evaluate() == {"batches": 1}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_processes_validate_with_the_statistics_of_the_first(tmp_path, monkeypatch):
    """Here as in the second process, to which the first one sends ones."""
    trainer = trainer_of(tmp_path, num_train=2, num_validation=2)
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    monkeypatch.setattr(trainers, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, src: buffer.fill_(1.0 + src))
    monkeypatch.setattr(Trainer, "evaluate", lambda self: dict(self.model.named_buffers()))
    validated = trainer.evaluate()
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics and all((validated[name] == 1).all() for name in statistics)
    counters = [name for name in before if not before[name].is_floating_point()]
    assert counters and all(torch.equal(validated[name], before[name]) for name in counters)


def test_the_order_of_samples_follows_the_seed_of_the_data_or_that_of_the_run(tmp_path):
    trainer = trainer_of(tmp_path, num_train=2, num_validation=2)

    def order(seed, data_seed=None):
        trainer.args.seed, trainer.args.data_seed = seed, data_seed
        return list(trainer._get_train_sampler(range(50)))

    orders = [order(seed) for seed in (0, 1, 2)]
    assert [list(EpochSampler(50, seed)) for seed in (0, 1, 2)] == orders and orders[0] != orders[1] != orders[2]
    assert order(0, data_seed=1) == order(2, data_seed=1) == orders[1] and order(1, data_seed=0) == orders[0]


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_samples_are_ordered_by_no_length(strategy, tmp_path):
    trainer = trainer_of(tmp_path, num_train=4, num_validation=1)
    trainer.args.train_sampling_strategy = strategy
    if strategy == "sequential":
        assert list(trainer._get_train_sampler()) == [0, 1, 2, 3]
        return
    with pytest.raises(ValueError, match="must be one of 'random', 'sequential', got 'group_by_length'"):
        trainer._get_train_sampler()


def test_training_on_less_than_a_batch_is_refused_where_the_last_one_is_dropped(tmp_path):
    message = (
        r"at least 4 training samples \(batch size 4, number of processes 1\), got 3: .*smaller, use fewer processes"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, 3, 3).train()


def test_answers_of_a_validation_are_spread_over_the_samples(tmp_path, monkeypatch):
    tasks = ["report"] * 3 + ["closed_vqa"] * 3 + ["open_vqa"] * 2 + ["yes_no_vqa"] * 2
    row = {
        "image": "a",
        "case": "a",
        "question": "?",
        "choices": list("wxyz"),
        "answer_choice": "B",
        "question_type": 3,
    }
    rows = [{**row, "task": task, "answer": str(place)} for place, task in enumerate(tasks)]
    samples = datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)
    sizes = []

    def answer_samples(model, processor, samples, volumes, batch_size):
        sizes.append(batch_size)
        return samples["answer"][:]

    monkeypatch.setattr(trainers, "answer_samples", answer_samples)
    arguments = TrainingArguments(output_dir=tmp_path, per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    trainer = GenerationTrainer(model=tiny.tiny_vlm(), args=arguments, num_answers=4)
    path = trainer.write_answers(StudyDataset(samples, None, None))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["task"] for row in written] == ["report", "report", "closed_vqa", "open_vqa"]
    assert [row["answer"] for row in written] == ["0", "2", "5", "7"]
    trainer.num_answers = 2
    trainer.write_answers(StudyDataset(samples, None, None))
    assert sizes == [3, 2]  # no larger than the batches of the validation


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_loses_what_plain_training_loses(kind, stage, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    sharded = losses_of_two_processes([kind], tmp_path / "sharded", stage)
    assert sharded[kind] == pytest.approx(stage_program.train(kind, tmp_path / "plain"), abs=2e-5)


@pytest.mark.parametrize(
    "fields, dtype", [({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16), ({}, torch.float32)]
)
def test_autocast_is_in_the_precision_of_training(fields, dtype, tmp_path):
    trainer = trainer_of(tmp_path, 4, 1)
    for name, value in fields.items():
        setattr(trainer.args, name, value)
    with trainer.autocast_smart_context_manager():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_validation_takes_volumes_for_volumes_and_reports_for_reports(tmp_path):
    """Through `evaluate`, which knows the outputs of a model by their places."""
    processor = tiny.build_tiny_model(tiny.IMAGE_SIZE)[1]
    model = tiny.tiny_siglip()
    model.text_model.resize_token_embeddings(len(processor.tokenizer))
    rows = [
        {
            "image": str(n),
            "case": str(n),
            "task": "report",
            "question": "",
            "choices": [],
            "answer": f"Finding {n}.",
            "answer_choice": "",
            "question_type": 0,
        }
        for n in range(6)
    ]
    samples = datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)
    volumes = SimpleNamespace(load=lambda path: tiny.random_volumes(1, seed=int(path))[0, 0])
    arguments = TrainingArguments(
        output_dir=tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False, per_device_eval_batch_size=4
    )
    given = []
    trainer = ContrastiveTrainer(
        model=model,
        args=arguments,
        eval_dataset=StudyDataset(samples, volumes, PairBuilder(processor.tokenizer, 60)),
        data_collator=PairCollator(processor, 60),
        compute_metrics=lambda prediction: given.append(prediction) or {},
    )
    trainer.evaluate()
    images, texts = (vectors.numpy() for vectors in embed_samples(model, processor, samples, volumes))
    text_embeds, image_embeds = given[0].predictions  # as `_retrieval` takes them
    np.testing.assert_allclose(text_embeds, texts, atol=1e-5)
    np.testing.assert_allclose(image_embeds, images, atol=1e-5)
    assert given[0].label_ids.tolist() == [text_group_id(row["answer"]) for row in rows]
    assert np.abs(texts - images).max() > 0.1
