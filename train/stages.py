"""The stages: from a recipe to a published folder. Each starts from the result of the one before."""

import copy
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import safe_open
from transformers import TrainingArguments, set_seed
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from ..hub_cards.files import sha256_of
from ..hub_cards.model_card import OF_PICTURES
from ..hub_cards.publish import publish, replaced_when_complete
from ..hub_cards.training_record import TRAINING_NAME, describe_training, read_training_record
from ..modeling_med3dvlm.fused_dcformer import multiplies_bfloat16
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..processing.processing_med3dvlm import Med3DVLMProcessor, forget_last_call
from .checkpoints import (
    CheckpointGuard,
    StopOnSignal,
    done_by_first_process,
    fewest_checkpoints,
    only_run_in,
    prepare_resume,
    train_or_finish,
    with_defaults,
)
from .curves import save_curves
from .data.augmentation import AUGMENTATIONS
from .data.cache import volume_loader
from .data.collate import ConversationCollator, PairCollator
from .data.dataset import (
    ConversationBuilder,
    ItemBuilder,
    PairBuilder,
    StudyDataset,
    TextDataset,
    VolumeLoader,
)
from .data.layout import vqa_file
from .data.m3d import read_m3d_cap, read_m3d_vqa
from .data.manifest import SPLIT_HINTS, find_manifest, read_manifest
from .data.preparation_record import is_of_slices, read_preparation_record
from .data.reading import find_broken
from .data.samples import Split
from .data.similarity import SimilarReports
from .files import differing_keys, without_nan, write_json_atomically, write_json_lines
from .memory import keep_freed_memory
from .merge import publish_adapter
from .models import (
    add_lora,
    build_dual_encoder,
    build_language_model,
    build_vision_language_model,
    choose_trained_parts,
    made_whole,
)
from .prompts import REPORT_PROMPTS, format_answer, format_question
from .recipe import (
    FREE_DEEPSPEED_SETTINGS,
    FREE_SETTINGS,
    FREE_ZERO_SETTINGS,
    PLACES,
    DataRecipe,
    Recipe,
    check_packages,
    check_places,
    save_recipe,
    trackers_of,
)
from .run_files import PUBLISHED, RECIPE, SKIPPED, SUMMARY, folder_of
from .trainers import (
    AGAINST_DIVERGENCE,
    DIRECTIONS,
    RECALLS,
    ContrastiveTrainer,
    GenerationTrainer,
    StudyTrainer,
    uses_deepspeed_autocast,
)


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Volumes of a study whose records say for all of them what they were made of.
NUM_LOOKED_AT = 5

# Rates of learning that depend on the scores of validations.
RATES_BY_SCORE = ("reduce_lr_on_plateau", "greedy")


def run_recipe(recipe: Recipe) -> Path:
    """
    Trains what a recipe says, or goes on with it where an earlier start was ended.

    The output folder holds `published/`, the result, which the next stage starts from; `recipe.yaml`, the whole recipe;
    `summary.json`, speed, memory and final scores, null where one is not known; `curves.png` and `curves.csv`; `answers/` of the
    validations; `runs/` for TensorBoard; `skipped.jsonl`, if cases were skipped; and the last checkpoints.

    Args:
        recipe ([`Recipe`]):
            See [`load_recipe`].

    Returns:
        `Path`: the published folder.

    Raises:
        FileNotFoundError: the data, or what the run starts from, is not there.
        ImportError: the recipe needs DeepSpeed or the package of a tracker, which is not installed.
        ValueError: data, models and recipe do not fit each other, the output folder holds another run, the record of a
            training beside a model is damaged, or the loss or a trained weight is not finite.
        RuntimeError: training ended before its last step, and not because of a signal.
        BlockingIOError: another run is at work in the output folder.
        SystemExit: the run was asked to stop by a signal; its state is saved.
    """
    check_best_metric(recipe)
    check_places(recipe)
    check_packages(recipe)
    for name in PLACES:
        if isinstance(place := getattr(recipe.model, name), str):
            read_training_record(place)  # a damaged one is to be known now, not when the result is published
    stated, recipe = recipe, choose_precision(recipe)
    arguments = build_training_arguments(recipe)
    if arguments.device.type == "cpu":
        keep_freed_memory()
    output_dir = Path(str(arguments.output_dir))
    left_out: list[dict[str, str]] = []
    samples = {split: read_samples(recipe.data, split, left_out) for split in splits_of(arguments)}
    settings = done_by_first_process(
        lambda: without_places({**fixed_settings(recipe), "content": describe_content(recipe, samples)})
    )
    if is_finished(output_dir, settings):
        logger.warning(f"{output_dir}: this run is finished; its result is {output_dir / PUBLISHED}.")
        return output_dir / PUBLISHED
    set_seed(arguments.seed)
    with only_run_in(output_dir):
        return train_and_publish(recipe, stated, arguments, samples, settings, left_out)


def check_best_metric(recipe: Recipe) -> None:
    """
    Checks the name of the score that the best checkpoint is chosen by, before anything is read. Whether there is a gallery of
    its size is known to the trainer.

    Raises:
        ValueError: no validation of the stage measures such a score.
    """
    name, known = recipe.training.get("metric_for_best_model"), ["eval_loss"]
    if recipe.stage == "contrastive":
        known += [f"eval_{direction}_{recall}_of_N" for direction in DIRECTIONS for recall in RECALLS]
    if name is not None and f"eval_{re.sub('[0-9]+$', 'N', str(name)).removeprefix('eval_')}" not in known:
        raise ValueError(
            f"`training.metric_for_best_model`: expected one of {', '.join(known)}, with or without `eval_`"
            f"{', N being a number of pairs' if len(known) > 1 else ''}, got {name!r}, which no validation measures."
        )


def train_and_publish(
    recipe: Recipe,
    stated: Recipe,
    arguments: TrainingArguments,
    samples: Mapping[Split, datasets.Dataset],
    settings: dict[str, Any],
    left_out: Sequence[Mapping[str, str]],
) -> Path:
    """
    What [`run_recipe`] does once all that it needs is read, and the output folder is its own. `stated` is the recipe as it was
    given, with what depends on the machine left open; it is saved, so that another machine may choose.
    """
    output_dir = Path(str(arguments.output_dir))
    # Before anything is loaded: another run's folder is refused here.
    resume_from = prepare_resume(arguments, settings, lambda before: bring_up_to_date(before, settings))
    if arguments.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(stated, output_dir / RECIPE)

    stop, guard = StopOnSignal(), CheckpointGuard(settings)
    trainer = build_trainer(recipe, arguments, samples, [stop, guard], resume_from is not None, left_out)
    try:
        output = train_or_finish(trainer, resume_from)
    finally:
        stop.restore()
    if stop.was_stopped:
        logger.warning(
            f"{output_dir}: stopped by a signal at step {trainer.state.global_step}; start it again to go on."
        )
        sys.exit(stop.exit_code)
    if trainer.state.global_step < trainer.state.max_steps:
        raise RuntimeError(
            f"{output_dir}: training ended at step {trainer.state.global_step} of {trainer.state.max_steps}, so nothing is "
            "published. Its log should say why; start it again to go on."
        )

    summary = {"stage": recipe.stage, "train": output.metrics, **describe_resources(trainer, output.metrics)}
    if trainer.state.best_global_step:  # where `metric_for_best_model` was best
        summary["best_step"] = trainer.state.best_global_step
    published = publish_result(recipe, trainer, settings)
    if trainer.eval_dataset is not None:  # afterwards: with `bf16_full_eval` it rounds the model's weights
        summary["validation"] = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_curves(trainer.state.log_history, output_dir, title=f"{recipe.stage}: {output_dir.name}")
        # Last, because it says that the run is finished.
        write_json_atomically({**without_nan(summary), "settings": settings}, output_dir / SUMMARY)
    trainer.accelerator.wait_for_everyone()
    return published


def choose_precision(recipe: Recipe) -> Recipe:
    """
    The recipe with `training.bf16: auto` replaced by what it means here: bfloat16 autocast where the hardware multiplies it,
    float32 on CPUs that do not, where bfloat16 would take a hundred times as long. A machine without an accelerator trains on
    its CPU then, which transformers wants to be told: `use_cpu`.
    """
    if recipe.training.get("bf16") != "auto":
        return recipe
    on_cpu = recipe.training.get("use_cpu") or not torch.cuda.is_available()
    chosen = multiplies_bfloat16("cpu" if on_cpu else "cuda")
    logger.warning_once(f"`training.bf16: auto` is {str(chosen).lower()} on this machine.")
    training = {**recipe.training, "bf16": chosen}
    if chosen and not torch.accelerator.is_available():
        training["use_cpu"] = True
    return replace(recipe, training=training)


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """
    The recipe's arguments, with what every stage needs.

    Raises:
        FileNotFoundError: see [`read_deepspeed_config`].
        ValueError: transformers refuses a value, the precision is none that DeepSpeed trains in here, or DeepSpeed's own optimizer
            is to have a rate of its own for the text encoder.
    """
    fields = {
        "remove_unused_columns": False,  # the collators need columns that no model takes
        "ddp_find_unused_parameters": False,
        "logging_steps": 10,
        # It logs 0 for a loss that is lost. In float16 single ones may be, see StudyTrainer.
        "logging_nan_inf_filter": bool(recipe.training.get("fp16")),
        "disable_tqdm": not sys.stderr.isatty(),  # in files and pipes a progress bar is noise
        **recipe.training,
        "report_to": trackers_of(recipe.training),
    }
    # YAML reads `no`, the name of a strategy, as False.
    fields = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in fields.items()}
    if fields.get("deepspeed"):
        if refused := [name for name in ("fp16", "fp16_full_eval", "bf16_full_eval") if fields.get(name)]:
            raise ValueError(
                f"`training.deepspeed`: expected `bf16: true` or float32, got `training.{refused[0]}`. DeepSpeed's autocast to "
                "float16 clips gradients before it takes their scale away, and its own modes of 16 bits turn the trained weights "
                f"to them. Set training.{refused[0]}=false and training.bf16=true, or do without DeepSpeed, "
                "training.deepspeed=null."
            )
        fields["deepspeed"] = read_deepspeed_config(fields["deepspeed"], bool(fields.get("bf16")))
        fields["bf16"] = False  # said in the configuration, see there
        if recipe.text_learning_rate is not None and "optimizer" in fields["deepspeed"]:
            raise ValueError(
                "`text_learning_rate` needs the optimizer of `training.optim`, and DeepSpeed builds its own from the `optimizer` in "
                "its configuration, with one rate for all. Leave `optimizer` out of the DeepSpeed configuration, or set "
                "text_learning_rate=null."
            )
    try:
        arguments = TrainingArguments(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training` of the recipe: {error}") from error
    if "save_total_limit" not in fields:
        arguments.save_total_limit = fewest_checkpoints(arguments)
    return arguments


def read_deepspeed_config(source: str | Mapping[str, Any], bf16: bool) -> dict[str, Any]:
    """
    A DeepSpeed configuration. With `bf16` its autocast is switched on: trained weights, batch statistics and what is saved
    stay float32, as without DeepSpeed, whereas its `bf16` mode would turn them all to bfloat16.

    Under its autocast ZeRO sums the gradients of linear and convolutional layers over the processes in bfloat16 (and ZeRO-3
    brings their weights together in it), unless `torch_autocast` has `"lower_precision_safe_modules": []`. The configurations of
    this package have that: gradients are summed in float32, as DDP does it, for twice the traffic of the sums.

    Args:
        source (`str` or `Mapping`):
            A JSON file, the name of a configuration of this package, or the configuration itself.
        bf16 (`bool`):
            Whether to multiply in bfloat16.

    Raises:
        FileNotFoundError: `source` is neither a file nor a configuration of this package.
        ValueError: see [`load_deepspeed_config`]; or with it the trained weights could not be published, or its autocast is not to
            bfloat16.
    """
    name, config = load_deepspeed_config(source)
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"{name}: expected `stage3_gather_16bit_weights_on_model_save: true` in `zero_optimization`, got "
            f"{zero.get('stage3_gather_16bit_weights_on_model_save')!r}: at the end the weights of all processes are to be "
            "put together, and published."
        )
    if bf16:
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"dtype": "bfloat16", **config.get("torch_autocast", {}), "enabled": True}
    if uses_deepspeed_autocast(config) and config["torch_autocast"].get("dtype") != "bfloat16":
        raise ValueError(
            f'{name}: expected the `dtype` "bfloat16" in `torch_autocast`, got {config["torch_autocast"].get("dtype")!r}: to '
            "float16 gradients are clipped before their scale is taken away. Leave `enabled` and `dtype` out of it, and set "
            "training.bf16=true."
        )
    return config


def load_deepspeed_config(source: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """
    What messages call a DeepSpeed configuration, and the configuration as it is written; see [`read_deepspeed_config`].

    Raises:
        FileNotFoundError: `source` is neither a file nor a configuration of this package.
        ValueError: `source` is none of these, the file is not JSON, or a part of the configuration is no mapping.
    """
    if isinstance(source, Mapping):
        name, config = "`training.deepspeed`", copy.deepcopy(dict(source))
    elif isinstance(source, str):
        packaged = packaged_deepspeed_configs()
        path = packaged.get(source, Path(source).expanduser())
        if not path.is_file():
            raise FileNotFoundError(
                f"`training.deepspeed` {source!r}: expected a JSON file, or one of this package: {', '.join(packaged)}."
            )
        name = str(path)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected a DeepSpeed configuration in JSON, got {error}.") from error
    else:
        raise ValueError(
            f"`training.deepspeed`: expected a JSON file, one of {', '.join(packaged_deepspeed_configs())}, or a mapping, got "
            f"{source!r}."
        )
    if not isinstance(config, dict):
        raise ValueError(f"{name}: expected a DeepSpeed configuration, a mapping, got {type(config).__name__}.")
    for part in ("zero_optimization", "torch_autocast", "bf16", "fp16"):
        if not isinstance(config.get(part, {}), dict):
            raise ValueError(f"{name}: expected a mapping as `{part}`, or to be without it, got {config[part]!r}.")
    return name, config


def packaged_deepspeed_configs() -> dict[str, Path]:
    """The DeepSpeed configurations of this package by their names."""
    folder = Path(__file__).parent / "recipes" / "deepspeed"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def splits_of(arguments: TrainingArguments) -> tuple[Split, ...]:
    """The splits that a run reads."""
    return ("train",) if arguments.eval_strategy == "no" else ("train", "validation")


def build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Mapping[Split, datasets.Dataset],
    callbacks: list[Any],
    is_resumed: bool = False,
    left_out: Sequence[Mapping[str, str]] = (),
) -> StudyTrainer:
    """
    The stage's trainer with model, data and collator; `samples` are those of each split, and `left_out` the rows without a
    text, as [`read_samples`] gives them.
    """
    data = recipe.data
    draw_similar = None
    if data.similar_reports:
        draw_similar = SimilarReports(samples["train"]["answer"][:], samples["train"]["case"][:], data.similar_reports)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, arguments, samples["train"])
    if data.questions_per_volume > 1:
        check_attention(model, data.max_text_length)
    if recipe.stage == "language":  # conversations in words alone, no volumes
        if data.skip_broken and arguments.process_index == 0:
            write_json_lines(left_out, Path(str(arguments.output_dir)) / SKIPPED)
        return StudyTrainer(
            model=model,
            args=arguments,
            train_dataset=TextDataset(samples["train"], arguments.seed, data.questions_per_volume),
            eval_dataset=TextDataset(samples["validation"], seed=arguments.seed) if "validation" in samples else None,
            data_collator=ConversationCollator(processor, data.max_text_length),
            processing_class=processor,
            callbacks=callbacks,
        )
    if recipe.stage == "contrastive":
        builder: ItemBuilder = PairBuilder(processor.tokenizer, data.max_text_length, draw_similar=draw_similar)
        validation_builder: ItemBuilder = PairBuilder(processor.tokenizer, data.max_text_length, is_drawn=False)
        collator: Any = PairCollator(processor, data.max_text_length)
        trainer_class: type[StudyTrainer] = ContrastiveTrainer
        options: dict[str, Any] = {
            "identical_reports_match": data.identical_reports == "match",
            "text_learning_rate": recipe.text_learning_rate,
        }
    else:
        builder = validation_builder = ConversationBuilder()
        collator = ConversationCollator(processor, data.max_text_length)
        trainer_class, options = GenerationTrainer, {"num_answers": recipe.num_answers}
    volumes = build_volume_loader(data, processor.image_processor)
    samples = read_ahead(data, arguments, samples, volumes, is_resumed, left_out)
    validation = None
    if "validation" in samples:
        validation = StudyDataset(samples["validation"], volumes, validation_builder, seed=arguments.seed)
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=StudyDataset(
            samples["train"],
            volumes,
            builder,
            AUGMENTATIONS[data.augmentation],
            seed=arguments.seed,
            questions_per_volume=data.questions_per_volume,
        ),
        eval_dataset=validation,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        **options,
    )


def check_attention(model: Any, max_text_length: int) -> None:
    """
    Raises:
        ValueError: not all layers of the language model keep to a mask that says of each token what it sees, so questions
            about one volume would see each other.
    """
    config = model.config.get_text_config(decoder=True)
    # Without a list, a window is one of all layers; with one, of those that it says.
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    is_stateful = any(getattr(module, "_is_stateful", False) for module in model.modules())
    fault = None
    if config._attn_implementation != "sdpa":
        fault = f"the attention {config._attn_implementation!r}, not 'sdpa'"
    elif is_stateful or kinds - {"full_attention", "sliding_attention"}:
        fault = "layers that carry a state from token to token"
    elif window is not None and "sliding_attention" in kinds and window < max_text_length:
        fault = f"a window of {window} tokens, less than `data.max_text_length` {max_text_length}"
    if fault is not None:
        raise ValueError(
            f"`data.questions_per_volume` above 1 needs a language model all of whose layers take a mask for every token; "
            f"{config.model_type!r} has {fault}. Set it to 1."
        )


def build_model(
    recipe: Recipe, arguments: TrainingArguments, samples: datasets.Dataset
) -> tuple[Any, Med3DVLMProcessor]:
    """
    The stage's model, ready for its trainer, and the processor. Under DeepSpeed's ZeRO-3 too each process holds all of the
    model's weights, in the end on its device, until training begins; they are shared out then.
    """
    with made_whole(arguments):
        if recipe.stage == "contrastive":
            model, processor = build_dual_encoder(
                recipe.model, iterate_texts(samples), samples["answer"], recipe.data.max_text_length
            )
        elif recipe.stage == "language":
            model, tokenizer = build_language_model(recipe.model, iterate_texts(samples))
            model.float()  # trained weights are float32 whatever they were loaded as
            # Lays out conversations as for the vision-language model to come.
            processor = Med3DVLMProcessor(Med3DVLMImageProcessor(), tokenizer, image_seq_length=1)
        else:
            model, processor = build_vision_language_model(recipe.model, iterate_texts(samples))
            if recipe.lora:
                model = add_lora(model, recipe.lora, recipe.trained)
            else:
                choose_trained_parts(model, recipe.trained)
            if arguments.activation_checkpointing:
                model.enable_input_require_grads()
    return model, processor


def read_samples(data: DataRecipe, split: Split, left_out: list[dict[str, str]] | None = None) -> datasets.Dataset:
    """
    The samples of a split, of all tasks of the recipe, one task after the other.

    Args:
        data ([`DataRecipe`]):
            With `skip_broken`, samples without a text are left out, and volumes are not looked for: [`read_ahead`] finds which
            are missing.
        split (`str`):
            The split.
        left_out (`list`, *optional*):
            Gets a row for each sample that is left out, see [`SampleTable`].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of its format, or there is no sample.
    """
    root = Path(data.root).expanduser()
    manifest = find_manifest(root)
    # What is named twice is learnt from twice as often, and not validated twice.
    wanted = data.tasks if split == "train" else dict.fromkeys(data.tasks)
    empty: list[dict[str, str]] = []
    options: dict[str, Any] = {"check_files": not data.skip_broken, "skip_empty": data.skip_broken, "left_out": empty}
    if manifest is not None:
        samples = read_manifest(manifest, split, **options)
        tasks = samples["task"][:]
        parts = [samples.select([row for row, name in enumerate(tasks) if name == task]) for task in wanted]
    else:
        parts = []
        for task in wanted:
            if task == "yes_no_vqa" and split == "validation" and not (root / vqa_file(split, task)).exists():
                continue  # M3D publishes yes/no questions for training only
            is_report = task == "report"
            parts.append(
                read_m3d_cap(root, split, **options) if is_report else read_m3d_vqa(root, split, [task], **options)  # type: ignore[list-item]
            )
    if left_out is not None:
        left_out += {tuple(row.values()): row for row in empty}.values()  # once, though each task reads them
    if split == "validation":
        parts = [limited(part, data.num_validation) for part in parts]
    if sum(map(len, parts)) == 0:
        raise ValueError(f"{root}: no sample of {data.tasks} in the split {split!r}.{SPLIT_HINTS.get(split, '')}")
    samples = datasets.concatenate_datasets(parts)
    if split == "train" and data.num_train is not None:
        samples = limited(samples.shuffle(seed=0), data.num_train)
    return samples


def limited(samples: datasets.Dataset, number: int) -> datasets.Dataset:
    """The first `number` samples, or all if there are fewer."""
    return samples.select(range(min(number, len(samples))))


def iterate_texts(samples: datasets.Dataset) -> Iterable[str]:
    """All that a tokenizer trained on these samples must know: questions, answers, and the requests for a report."""
    yield from REPORT_PROMPTS
    for sample in samples.remove_columns("image"):
        if sample["task"] != "report":
            yield format_question(sample)
        yield format_answer(sample)


def build_volume_loader(data: DataRecipe, image_processor: Any) -> VolumeLoader:
    """What brings volumes through the image processor, with the cache of the recipe if it has one."""
    return volume_loader(image_processor, data.volumes == "prepared", data.cache, data.cache_dtype)


def read_ahead(
    data: DataRecipe,
    arguments: TrainingArguments,
    samples: Mapping[Split, datasets.Dataset],
    volumes: VolumeLoader,
    is_resumed: bool = False,
    left_out: Sequence[Mapping[str, str]] = (),
) -> Mapping[Split, datasets.Dataset]:
    """
    Reads the volumes of all splits before the first step where that is of use: to fill a cache, or to leave out what is
    broken or missing. The first process reads, the others wait for what it found. `left_out` is listed beside the volumes.

    Returns:
        `Mapping` from each split to its samples whose volume can be read.

    Raises:
        ValueError: volumes cannot be read, and the recipe does not allow to leave them out; or no volume of a split can.
    """
    if data.cache is None and not data.skip_broken:
        return samples
    images = list(dict.fromkeys(image for part in samples.values() for image in part["image"]))
    listing = Path(str(arguments.output_dir)) / SKIPPED
    broken = set(
        done_by_first_process(
            lambda: find_broken(
                volumes,
                images,
                listing if data.skip_broken else None,
                base=folder_of(data.root),
                reuse_listing=is_resumed,
                progress=not arguments.disable_tqdm,
                left_out=left_out,
            )
        )
    )
    if not broken:
        return samples
    kept = {}
    for split, part in samples.items():
        kept[split] = part.select([row for row, image in enumerate(part["image"]) if image not in broken])
        if len(kept[split]) == 0:
            raise ValueError(f"Not one volume of the split {split!r} can be read: {listing} lists the reasons.")
    return kept


def publish_result(recipe: Recipe, trainer: StudyTrainer, settings: Mapping[str, Any]) -> Path:
    """
    Publishes the trained model beside its checkpoints: the whole model, or the adapter. Sharded weights are put together by
    Trainer first, so this works whatever the run was distributed with. `settings`, those of [`run_recipe`], go into the record
    of the training.

    Raises:
        ValueError: in all processes, see [`check_finite_weights`].
    """
    output_dir = Path(str(trainer.args.output_dir))
    whole, published = output_dir / "_result", output_dir / PUBLISHED
    processor: Any = trainer.processing_class
    trainer.save_model(str(whole))
    done_by_first_process(lambda: check_finite_weights(whole))
    if trainer.is_world_process_zero():
        notes = f"Result of the training stage `{recipe.stage}`. {describe_recipe(recipe, trainer.args)}".strip()
        training_data = f"`{Path(recipe.data.root).name}`, tasks: {', '.join(recipe.data.tasks)}."
        starts = {name: place for name in PLACES if isinstance(place := getattr(recipe.model, name), str)}
        numbers = {"recipe": recipe.begun_from, "batch_size": global_batch_size(trainer.args), **settings}
        record = describe_training(numbers, starts)
        dataset: Any = trainer.train_dataset
        has_prepared = recipe.data.volumes == "prepared" and recipe.stage != "language"
        if has_prepared and are_of_pictures(recipe.data.root, dataset.samples["image"]):
            training_data = f"{training_data} {OF_PICTURES}"
        with made_whole(trainer.args):  # this process is alone here, and loads what was saved to check it
            if recipe.stage == "language":  # a plain model of transformers, for the next stage
                publish_language_model(whole, published, processor.tokenizer, record)
            elif recipe.lora:
                publish_adapter(
                    whole,
                    published,
                    processor,
                    notes=notes,
                    training_data=training_data,
                    training_record=record,
                )
            else:
                publish(
                    str(whole),
                    published,
                    processor=processor,
                    overwrite=True,
                    training_record=record,
                    notes=notes,
                    training_data=training_data,
                )
        shutil.rmtree(whole)
    trainer.accelerator.wait_for_everyone()
    return published


def check_finite_weights(saved: Path) -> None:
    """
    Checks the weights in `saved`, a folder of the output folder. It is removed if they are not to be published.

    Raises:
        ValueError: a weight, or a statistic of batches, is NaN or infinite.
    """
    lost: list[str] = []
    for path in sorted(saved.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            lost += [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    if lost:
        shutil.rmtree(saved)
        raise ValueError(
            f"{saved.parent}: training diverged, {len(lost)} weights or statistics of batches are not finite, such as {lost[0]}, so "
            f"nothing is published. {AGAINST_DIVERGENCE} If the logged losses are finite, look for NaN in the weights that the run "
            "starts from."
        )


def describe_recipe(recipe: Recipe, arguments: TrainingArguments) -> str:
    """
    What a card says of the numbers of a run: the description of its recipe if they are those, else the recipe that it was begun
    from, what was changed, and the samples or volumes in a step of all devices.
    """
    batch_size = stated = global_batch_size(arguments)
    of_a_device = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
    if recipe.num_devices is not None and not any(
        name in recipe.changed for name in of_a_device
    ):  # else it is not known
        per_device = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        stated = per_device * recipe.num_devices
    if not recipe.changed and batch_size == stated:
        return recipe.description
    parts = [f"Begun from the recipe `{recipe.begun_from}`"]
    if recipe.changed:
        parts.append(f"changed: {', '.join(f'`{key}={value}`' for key, value in recipe.changed.items())}")
    parts.append(f"global batch {batch_size}" + (f" instead of {stated}" if batch_size != stated else ""))
    return f"{'; '.join(parts)}."


def global_batch_size(arguments: TrainingArguments) -> int:
    """Samples, or volumes where several questions share one, in a step of all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def are_of_pictures(root: str, images: Iterable[str]) -> bool:
    """
    Whether the prepared volumes of a study were stacks of 8-bit pictures, by the first few: by their records, or, in the layout
    of M3D, without one, as the original's preparation leaves them, which takes nothing but slices.
    """
    is_m3d = find_manifest(Path(root).expanduser()) is None
    records = map(read_preparation_record, list(dict.fromkeys(images))[:NUM_LOOKED_AT])
    return all(is_m3d if record is None else is_of_slices(record) for record in records)


def publish_language_model(whole: Path, published: Path, tokenizer: Any, record: Mapping[str, Any]) -> None:
    """
    Publishes a language model as `AutoModelForCausalLM` and `AutoTokenizer` load it: no code or processor of ours. `record`, of
    its training, lies beside it.
    """
    forget_last_call(tokenizer)
    with replaced_when_complete(published) as folder:
        for file in whole.iterdir():
            if file.name in (CONFIG_NAME, GENERATION_CONFIG_NAME) or file.name.startswith("model"):
                shutil.copy2(file, folder)
        tokenizer.save_pretrained(folder)
        write_json_atomically(record, folder / TRAINING_NAME)


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for a start to go on with an earlier one, in a form that JSON keeps."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(settings, dict)
    for name in ("description", "begun_from", "changed", "num_devices", "num_answers"):
        settings.pop(name)
    # Where a cache lies is free; whether there is one that rounds decides about the last bits of the volumes.
    has_cache = settings["data"].pop("cache") is not None and recipe.stage != "language"
    settings["data"]["is_cached"] = has_cache and recipe.data.cache_dtype != "float32"
    settings["training"] = without_free_settings(settings["training"])
    if source := settings["training"].get("deepspeed"):
        settings["training"]["deepspeed"] = fixed_deepspeed_settings(source)
    return json.loads(json.dumps(settings))


def fixed_deepspeed_settings(source: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """
    What stands for a DeepSpeed configuration in the settings of a run: what it says that changes numbers, wherever the file
    lies, or the name of the configuration of this package that says the same.
    """

    def numbers_of(source: str | Mapping[str, Any]) -> dict[str, Any]:
        config = load_deepspeed_config(source)[1]
        config = {name: value for name, value in config.items() if name not in FREE_DEEPSPEED_SETTINGS}
        if zero := config.get("zero_optimization"):
            config["zero_optimization"] = {key: value for key, value in zero.items() if key not in FREE_ZERO_SETTINGS}
        return config

    config = numbers_of(source)
    return next((name for name in packaged_deepspeed_configs() if numbers_of(name) == config), config)


def without_free_settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """
    `training` of a recipe without what may differ between a run and its continuation. The batch size of validations may, since
    no weight depends on their scores, unless the best checkpoint or the learning rate does.
    """
    free = set(FREE_SETTINGS)
    looks_for_best = training.get("metric_for_best_model") or training.get("load_best_model_at_end")
    if not looks_for_best and training.get("lr_scheduler_type") not in RATES_BY_SCORE:
        free.add("per_device_eval_batch_size")
    return {name: value for name, value in training.items() if name not in free}


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the paths of what they describe the content of, so that a study, a run and a model may be moved."""
    kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    kept["data"].pop("root", None)
    kept["training"].pop("output_dir", None)
    for name in PLACES:
        if f"model.{name}" in kept["content"]:
            kept["model"].pop(name, None)
    return kept


def bring_up_to_date(before: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Settings that an earlier version of this package wrote, in the form of `settings`: fields of the recipe that came since have
    their defaults, those that are free by now are gone, and whether there was a cache, which was not written down, is as it is
    now. So is a DeepSpeed configuration that was written down as the name of a file which is gone or damaged by now.
    """
    defaults = fixed_settings(Recipe())
    defaults["data"]["is_cached"] = settings["data"]["is_cached"]
    before = without_places(with_defaults(before, defaults))
    before.pop("num_answers", None)
    before["training"] = without_free_settings(before["training"])
    if source := before["training"].get("deepspeed"):
        try:
            before["training"]["deepspeed"] = fixed_deepspeed_settings(source)
        except (FileNotFoundError, ValueError):
            before["training"]["deepspeed"] = settings["training"].get("deepspeed") or source
    return before


def describe_content(recipe: Recipe, samples: Mapping[Split, datasets.Dataset]) -> dict[str, Any]:
    """
    What stands behind the paths of a recipe, so that a start on other data or from other weights is no continuation.

    Returns:
        `dict` with a digest of the texts and the relative image paths of each split, voxels not included; and for each folder
        that the model starts from, the SHA-256 of each file of weights. What is no folder is a repository on the Hub, known by
        its name.
    """
    base = folder_of(recipe.data.root)
    content: dict[str, Any] = {"data.root": {split: digest_samples(part, base) for split, part in samples.items()}}
    for name in PLACES:
        place = getattr(recipe.model, name)
        if isinstance(place, str) and Path(place).is_dir():
            files = sorted(Path(place).iterdir())
            weights = [file for file in files if file.suffix in (".safetensors", ".bin")]
            content[f"model.{name}"] = {file.name: sha256_of(file) for file in weights}
    return content


def digest_samples(samples: datasets.Dataset, base: Path) -> str:
    """A digest of all columns, the images by their paths from `base`, so that a study may be moved."""
    digest = hashlib.sha256()
    for columns in samples.iter(batch_size=1000):
        assert isinstance(columns, dict)
        images = [os.path.relpath(image, base) for image in columns["image"]]
        digest.update(json.dumps({**columns, "image": images}, sort_keys=True).encode())
    return digest.hexdigest()


def is_finished(output_dir: Path, settings: dict[str, Any]) -> bool:
    """
    Whether the run was finished before.

    Raises:
        ValueError: another run was finished in this folder.
    """
    summary = output_dir / SUMMARY
    if not summary.exists():
        return False
    finished = bring_up_to_date(json.loads(summary.read_text(encoding="utf-8"))["settings"], settings)
    if finished == settings:
        return True
    different = sorted(differing_keys(finished, settings))
    raise ValueError(
        f"{output_dir}: holds a finished run with other settings ({', '.join(different)}). Choose another "
        "training.output_dir, or remove it."
    )


def describe_resources(trainer: StudyTrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """Speed, memory and versions of a run. Memory is the peak of this process, in GiB; NaN on Windows, which does not tell."""
    arguments, parameters = trainer.args, list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    unit = 1 if sys.platform == "darwin" else 1024  # `ru_maxrss` is in bytes there and in KiB elsewhere
    dataset: Any = trainer.train_dataset
    num_samples = len(dataset.samples)
    resources: dict[str, Any] = {
        # Questions and reports. Trainer's own figure, and the batch, count volumes where several questions share one.
        "samples_per_second": metrics.get("train_samples_per_second", math.nan) * num_samples / len(dataset),
        "num_processes": arguments.world_size,
        "batch_size": global_batch_size(arguments),
        "num_train_samples": num_samples,
        "trained_parameters": sum(map(count_weights, (entry for entry in parameters if entry.requires_grad))),
        "all_parameters": sum(map(count_weights, parameters)),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30 if resource else math.nan,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        resources["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return resources


def count_weights(parameter: torch.nn.Parameter) -> int:
    """Number of weights of a parameter, of all processes together where DeepSpeed shares it out."""
    return getattr(parameter, "ds_numel", parameter.numel())


__all__ = [
    "build_trainer",
    "build_training_arguments",
    "build_volume_loader",
    "fixed_settings",
    "read_samples",
    "run_recipe",
]
