"""Trainers of the stages. What differs from transformers' own is which samples come in what order, that a training whose loss is
not finite ends, and what a validation adds to the loss: retrieval for the dual encoder, written answers for the vision-language
model. A language model alone has neither."""

import contextlib
import json
import math
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import CONFIG_NAME, logging

from ..modeling_med3dvlm.modeling_med3dvlm import next_labels
from .answering import answer_samples
from .checkpoints import is_distributed
from .data.dataset import EpochSampler, StudyDataset
from .files import write_json_lines
from .prompts import format_answer, format_question
from .recipe import SAMPLING_STRATEGIES
from .scoring import chance_recall, one_vector_per_text, retrieval_recall


logger = logging.get_logger(__name__)

AGAINST_DIVERGENCE = (
    "Begin anew in another training.output_dir, with a smaller training.learning_rate, a longer training.warmup_steps or a "
    "training.max_grad_norm such as 1.0."
)
# What retrieval among validation pairs measures: which way, and with which matches.
DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = ("recall_at_1", "deduplicated_recall_at_1")
# Outputs of the dual encoder that make no sense across batches.
OUTPUTS_OF_A_BATCH = ["logits_per_image", "logits_per_text", "text_model_output", "vision_model_output"]


class TellEpoch(TrainerCallback):
    """
    Tells which epoch begins, or is gone on with where a run is resumed.

    accelerate tells it to samplers and data sets too, but through so many layers that, depending on the number of processes and
    on where a run is resumed, some never hear of it.

    Args:
        listener (`Callable[[int], None]`):
            Called with the number of the epoch, from 0.
    """

    def __init__(self, listener: Callable[[int], None]):
        self.listener = listener

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.listener(int(state.epoch or 0))


class LogLastStep(TrainerCallback):
    """Logs the last step too, so that no step is without a loss in log and curves, however short the training is."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class StudyTrainer(Trainer):
    """
    Trainer whose order of samples, prompts and augmentations depends on seed, epoch and sample alone.

    Raises:
        ValueError: `metric_for_best_model` names nothing that a validation measures.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampler: EpochSampler | None = None
        self.num_steps_since_log = self.num_lost_since_log = 0
        self.add_callback(TellEpoch(self._set_epoch))
        self.add_callback(LogLastStep())
        if self.args.metric_for_best_model is not None and self.eval_dataset is not None:
            measured = self.metric_names()
            if (
                measured is not None
                and f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}" not in measured
            ):
                raise ValueError(
                    f"`training.metric_for_best_model` must be one of {', '.join(measured)}, with or without `eval_`, got "
                    f"{self.args.metric_for_best_model!r}, which no validation of this run measures."
                )

    def metric_names(self) -> list[str] | None:
        """
        What a validation measures, by the names that are logged, chance aside. `None` where it is not known: with a function for
        metrics of the caller's, or several sets to validate on, whose names become part of these.
        """
        is_known = self.compute_metrics is None and not isinstance(self.eval_dataset, dict)
        return ["eval_loss"] if is_known else None

    def _set_epoch(self, epoch: int) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """
        Raises:
            ValueError: `train_sampling_strategy` is one that groups samples by their length.
        """
        if self.args.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise ValueError(
                f"`training.train_sampling_strategy` must be one of {', '.join(map(repr, SAMPLING_STRATEGIES))}, got "
                f"{self.args.train_sampling_strategy!r}: the order of samples depends on seed, epoch and sample alone."
            )
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = EpochSampler(len(dataset), seed, shuffle=self.args.train_sampling_strategy != "sequential")
        return self.sampler

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """
        The autocast of training, also in a validation under DeepSpeed, whose own is that of training steps alone, and for
        written answers. Trainer's context does nothing: it relies on wrapped models.
        """
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        if not (self.args.fp16 or self.args.bf16 or uses_deepspeed_autocast(self.args.deepspeed)):
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype, cache_enabled=cache_enabled)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Trainer's step. In float16 it counts the losses that are not finite, since with `logging_nan_inf_filter` Trainer puts a
        mean of the others in their places.
        """
        loss = super().training_step(*args, **kwargs)
        if self.args.fp16:
            self.num_steps_since_log += 1
            self.num_lost_since_log += not math.isfinite(loss.item())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """
        Logs as Trainer does.

        Raises:
            ValueError: in all processes, that the loss of training is not finite: no step after it could mend the weights. In
                float16, whose scaler leaves out the steps that overflow, that no loss since the row before is.
        """
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if self.args.fp16 and self.num_steps_since_log:
            counts = torch.tensor([self.num_lost_since_log, self.num_steps_since_log], device=self.args.device)
            lost, steps = self.accelerator.reduce(counts, "sum").tolist()
            self.num_steps_since_log = self.num_lost_since_log = 0
            if lost == steps:
                loss = math.nan
            elif lost:
                logger.warning(
                    f"{lost} of {steps} losses before step {self.state.global_step} overflowed in float16; nothing is learnt from "
                    "them."
                )
        if not math.isfinite(loss):
            raise ValueError(
                f"{self.args.output_dir}: training diverged at step {self.state.global_step} or shortly before: the loss is "
                f"{loss}, not finite. {AGAINST_DIVERGENCE} If the first loss is lost already, look for NaN in the weights that "
                "the run starts from and in the volumes."
            )

    def get_train_dataloader(self) -> DataLoader:
        """
        Raises:
            ValueError: with `dataloader_drop_last` not one batch is left; Trainer would end at step 0 as if all were done.
        """
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            size, processes, found = self._train_batch_size, self.args.world_size, len(self.train_dataset)  # type: ignore[arg-type]
            raise ValueError(
                f"Expected at least {size * processes} training samples (batch size {size}, number of processes {processes}), "
                f"got {found}: `dataloader_drop_last` would leave nothing to train on. Make `per_device_train_batch_size` "
                "smaller, use fewer processes, or set `dataloader_drop_last` to false. Questions that share a volume count as "
                "one sample."
            )
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Validates; training goes on with the random numbers that it had: it is the same however often it is validated. All
        processes validate with the statistics of batches that the first one has, which are those that are saved: under
        DeepSpeed, without `sync_batch_norm`, each has its own.
        """
        if is_distributed():
            share_buffers(self.accelerator.unwrap_model(self.model), self.args.device)
        filters, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False  # no loss is passed over
        try:
            with torch.random.fork_rng(devices=[]):
                return super().evaluate(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = filters

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """
        The loader of all validation samples: `dataloader_drop_last` is for training, whose batches must be equal. It warns where
        several processes would count samples repeatedly.
        """
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader = super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        if self.args.world_size > 1 and self.is_world_process_zero():
            num_samples = len(cast(Sized, loader.dataset))
            warn_of_copies(num_samples, self.args.eval_batch_size, self.args.world_size)
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves as Trainer does. Under DeepSpeed below ZeRO-3 every process holds all weights, and only the one that writes copies
        them into the machine's memory, where Trainer has all of them do so.
        """
        plugin = self.args.deepspeed_plugin
        if plugin is not None and not self.args.should_save:
            config = plugin.hf_ds_config
            is_split = config.is_zero3() or (config.get_value("tensor_parallel.autotp_size") or 0) > 1
            if not is_split:  # else all take part in putting the weights together
                return
        super().save_model(output_dir, _internal_call)


def warn_of_copies(num_samples: int, batch_size: int, num_processes: int) -> None:
    """
    Says so where accelerate repeats samples of a validation, so that all processes get whole batches: the loss then counts them,
    whereas scores are made without them.
    """
    copies = -num_samples % (batch_size * num_processes)
    if not copies:
        return
    size = largest_batch_without_copies(num_samples, batch_size, num_processes)
    remedy = f"training.per_device_eval_batch_size={size}"
    if size is None:
        remedy = f"a number of samples, data.num_validation, that is a multiple of {num_processes}"
    logger.warning_once(
        f"`eval_loss` counts {copies} samples repeatedly: {num_samples} are no multiple of batch size {batch_size} times "
        f"{num_processes} processes, and the last batches are filled up with the first samples, in a contrastive loss as false "
        f"negatives. Recalls are right. Without copies: {remedy}."
    )


def largest_batch_without_copies(num_samples: int, batch_size: int, num_processes: int) -> int | None:
    """The largest batch size up to `batch_size` with which all processes get whole batches; None if there is none."""
    sizes = range(batch_size, 0, -1)
    return next((size for size in sizes if num_samples % (size * num_processes) == 0), None)


def share_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Gives all processes the floating-point buffers that the first one has, where they are on the device of the run."""
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.device.type == device.type:
            dist.broadcast(buffer, src=0)


def uses_deepspeed_autocast(config: Any) -> bool:
    """Whether a DeepSpeed configuration has `torch_autocast`, as [`~train.stages.read_deepspeed_config`] writes it."""
    return isinstance(config, dict) and bool((config.get("torch_autocast") or {}).get("enabled"))


class ContrastiveTrainer(StudyTrainer):
    """
    Trains [`DCFormerSiglipModel`], and validates it by its loss and by retrieval among all validation pairs.

    Args:
        identical_reports_match (`bool`, *optional*, defaults to `False`):
            Whether the loss counts pairs with the identical report as positives.
        gallery_sizes (`tuple[int, ...]`, *optional*, defaults to `(100,)`):
            Sizes at which retrieval is validated, where there are as many pairs; all pairs are always one gallery more.
        text_learning_rate (`float`, *optional*):
            Highest learning rate of the text encoder and its projection, instead of `args.learning_rate`.
    """

    def __init__(
        self,
        *args: Any,
        identical_reports_match: bool = False,
        gallery_sizes: tuple[int, ...] = (100,),
        text_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        self.identical_reports_match, self.gallery_sizes = identical_reports_match, gallery_sizes
        self.text_learning_rate = text_learning_rate
        super().__init__(*args, **{"compute_metrics": self._retrieval, **kwargs})
        # Gathered beside the vectors, to know which reports are identical.
        self.label_names = ["text_group_ids"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer; parameters of the text encoder get groups of their own where their rate differs."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.text_learning_rate is None:
            return optimizer
        model = self.accelerator.unwrap_model(self.model)
        of_text = {id(entry) for part in (model.text_model, model.text_projection) for entry in part.parameters()}
        for group in list(optimizer.param_groups):
            members = [entry for entry in group["params"] if id(entry) in of_text]
            group["params"] = [entry for entry in group["params"] if id(entry) not in of_text]
            optimizer.add_param_group({**group, "params": members, "lr": self.text_learning_rate})
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        The model's own loss; the groups of identical reports reach it only where they are to match.

        Raises:
            ValueError: the batch would be shared out by rows to several devices of one process, where no pair is compared with
                those of another device.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Expected one device for each process, got {self.args.n_gpu}: a contrastive loss compares all pairs of a batch. "
                "Start one process for each device, with torchrun or accelerate, or make one visible, CUDA_VISIBLE_DEVICES=0."
            )
        if not self.identical_reports_match:
            inputs = {name: value for name, value in inputs.items() if name != "text_group_ids"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates; of the model's outputs only the two vectors are kept."""
        kwargs["ignore_keys"] = kwargs.get("ignore_keys") or OUTPUTS_OF_A_BATCH  # `train` passes None
        return super().evaluate(*args, **kwargs)

    def metric_names(self) -> list[str] | None:
        """The loss, and both recalls in both directions for each gallery; see [`StudyTrainer.metric_names`]."""
        if self.compute_metrics != self._retrieval or isinstance(self.eval_dataset, dict):
            return None
        galleries = self._galleries(len(cast(Sized, self.eval_dataset)))
        recalls = [f"{direction}_{recall}" for direction in DIRECTIONS for recall in RECALLS]
        return ["eval_loss", *(f"eval_{name}_of_{size}" for size in galleries for name in recalls)]

    def _galleries(self, num_pairs: int) -> list[int]:
        return [size for size in self.gallery_sizes if size < num_pairs] + [num_pairs]

    def _retrieval(self, prediction: EvalPrediction) -> dict[str, float]:
        text_embeds, image_embeds = (torch.from_numpy(vectors) for vectors in prediction.predictions)
        group_ids = torch.from_numpy(prediction.label_ids)
        text_embeds = one_vector_per_text(text_embeds, group_ids)
        scores: dict[str, float] = {}
        for size in self._galleries(len(group_ids)):
            for name, pair in zip(DIRECTIONS, ((image_embeds, text_embeds), (text_embeds, image_embeds))):
                recalls = retrieval_recall(*pair, group_ids, gallery_size=size)
                # By the names of `med3dvlm evaluate`: in the paper's recall only the pair's own report is a match.
                scores |= {f"{name}_{recall}_of_{size}": recalls[recall] for recall in RECALLS}
            scores[f"chance_recall_at_1_of_{size}"] = chance_recall(torch.arange(size), size)
            scores[f"chance_deduplicated_recall_at_1_of_{size}"] = chance_recall(group_ids, size)
        return scores


class GenerationTrainer(StudyTrainer):
    """
    Trains [`Med3DVLMForConditionalGeneration`] or a PEFT model of it, and validates it by its loss; at each validation a few
    answers are written to `answers/step-N.jsonl` of the output folder.

    Args:
        num_answers (`int`, *optional*, defaults to 4):
            Answers to write, spread over the validation samples.
    """

    def __init__(self, *args: Any, num_answers: int = 4, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_answers = num_answers

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        The model's own loss. Only the positions before what is to be learnt are scored, a small part of a conversation: the
        logits of all positions take a large share of time and memory where the vocabulary is large.
        """
        upcoming = next_labels(inputs["labels"])
        if self.label_smoother is not None:  # which shifts labels itself only for models on a list of transformers
            inputs = {**inputs, "labels": upcoming}
        elif self.compute_loss_func is None and self.compute_metrics is None:
            inputs = {**inputs, "logits_to_keep": upcoming != -100}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """
        Saves as Trainer does, and names the precision of the language model in the configuration. transformers names that of
        the first weight, here one of the volume encoder's, which is float32, and `dtype="auto"` loads all parts in it: a language
        model in bfloat16 would take twice its size.
        """
        super()._save(output_dir, state_dict)
        path = Path(output_dir or str(self.args.output_dir)) / CONFIG_NAME
        if self.args.should_save and path.exists():  # beside adapters there is none
            config, model = json.loads(path.read_text(encoding="utf-8")), self.accelerator.unwrap_model(self.model)
            config["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates, and writes answers."""
        metrics = super().evaluate(*args, **kwargs)
        dataset = kwargs.get("eval_dataset") or (args[0] if args else None) or self.eval_dataset
        if self.num_answers and isinstance(dataset, StudyDataset):
            self.write_answers(dataset)
        return metrics

    def write_answers(self, dataset: StudyDataset) -> Path:
        """
        Answers a few samples, in batches no larger than those of the validation; every process takes part, as sharded weights
        need it, and the first one writes.
        """
        count = min(self.num_answers, len(dataset))
        samples = dataset.samples.select([place * len(dataset) // count for place in range(count)])
        with self.autocast_smart_context_manager():
            answers = answer_samples(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                samples,
                dataset.volumes,
                batch_size=min(count, self.args.per_device_eval_batch_size),
            )
        path = Path(str(self.args.output_dir)) / "answers" / f"step-{self.state.global_step:08d}.jsonl"
        if self.is_world_process_zero():
            rows = [
                {
                    "task": sample["task"],
                    "question": format_question(sample),
                    "expected": format_answer(sample),
                    "answer": answer,
                }
                for sample, answer in zip(samples, answers)
            ]
            write_json_lines(rows, path)
            logger.info(f"{count} answers written to {path}")
        return path


__all__ = ["ContrastiveTrainer", "GenerationTrainer", "StudyTrainer", "TellEpoch"]
