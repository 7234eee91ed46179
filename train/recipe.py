"""Recipes: what a training run is made of, as YAML files that are checked before anything is loaded."""

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..hub_cards.places import is_repository
from ..hub_cards.training_record import without_absolute_paths
from .files import write_atomically


# Before the paper's three stages, `language` makes a small language model where none can be downloaded.
STAGES = ("language", "contrastive", "projector", "finetune")
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
# Of those that transformers has: the order depends on seed, epoch and sample alone, not on lengths.
SAMPLING_STRATEGIES = ("random", "sequential")
# Of the weights that `model.dtype` says how to load.
PRECISIONS = ("float32", "bfloat16", "float16")

# Fields of `model` that may be a folder or a repository on the Hub.
PLACES = ("start_from", "vision", "text_encoder", "language_model")
# What may differ between a run and its continuation, because no weight depends on it.
FREE_SETTINGS = (
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "disable_tqdm",
    "eval_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "log_level",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "torch_empty_cache_steps",
)
# Fields of a DeepSpeed configuration that change how fast, with how much memory or with what reports it trains, but no number.
FREE_DEEPSPEED_SETTINGS = (
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
FREE_ZERO_SETTINGS = (
    "allgather_bucket_size",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
)
# What a run may have of its own and still have the numbers of a recipe's description: places, and what is validated and
# written down.
NOT_OF_DESCRIPTION = (
    "description",
    "begun_from",
    "changed",
    "num_devices",
    "num_answers",
    "data.root",
    "data.cache",
    "data.volumes",
    "model.start_from",
    "training.output_dir",
    "training.eval_steps",
    "training.per_device_eval_batch_size",
    *(f"training.{name}" for name in FREE_SETTINGS),
    *(f"training.deepspeed.{name}" for name in FREE_DEEPSPEED_SETTINGS),
    *(f"training.deepspeed.zero_optimization.{name}" for name in FREE_ZERO_SETTINGS),
)


@dataclass
class ModelRecipe:
    """
    What is trained, and what it starts from. Folders of published models and names of Hub repositories are both fine.

    Args:
        start_from (`str`, *optional*):
            Result of the stage before: for `projector` the dual encoder whose volume encoder is taken, for `finetune` the
            vision-language model. For `contrastive`, a dual encoder to go on with.
        vision (`str` or `dict`):
            Volume encoder of a new dual encoder: a published one, or that of a published dual encoder, by name, which brings
            its image processor; or fields of its configuration with `model_type`, or `variant` for one of the published
            sizes of DCFormer, to start from random weights.
        text_encoder (`str` or `dict`):
            Text encoder of a new dual encoder: a pretrained one by name, or the fields of a configuration to start one from
            random weights.
        dual_encoder (`dict`):
            Further fields of `DCFormerSiglipConfig`, such as `loss_type`.
        whiten_text (`bool`, *optional*, defaults to `False`):
            Whether the vectors of the training reports are whitened by a new dual encoder's text projection, so that
            different reports start with different vectors, see [`~train.whitening.whiten_text_projection`].
        language_model (`str` or `dict`):
            Language model of a new vision-language model: a pretrained one by name, or the fields of a configuration.
        projector (`dict`):
            Further fields of `Med3DVLMConfig`, such as `projector_type`.
        tokenizer_size (`int`, *optional*):
            Where the text model starts from random weights: size of the tokenizer that is trained on the training texts.
        image_processor (`dict`):
            Options of `Med3DVLMImageProcessor`; beside a published model, those that shall differ from its own.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which a pretrained language model is loaded: `"float32"`, `"bfloat16"` or `"float16"`.
    """

    start_from: str | None = None
    vision: Any = field(default_factory=dict)
    text_encoder: Any = None
    dual_encoder: dict[str, Any] = field(default_factory=dict)
    whiten_text: bool = False
    language_model: Any = None
    projector: dict[str, Any] = field(default_factory=dict)
    tokenizer_size: int | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass
class DataRecipe:
    """
    What it learns from.

    Args:
        root (`str`):
            Folder in the layout of M3D, with `M3D_Cap_npy` and `M3D-VQA`, or a manifest file of one's own.
        tasks (`list[str]`):
            Of "report", "closed_vqa", "open_vqa", "yes_no_vqa"; what is named twice is learnt from twice as often.
        volumes (`str`, *optional*, defaults to `"scans"`):
            `"scans"` go through the image processor; `"prepared"` ones, as `med3dvlm prepare m3d-cap` writes them, are in
            [0, 1], cropped and of the model's size already.
        cache (`str`, *optional*):
            Folder that keeps processed volumes for the next epoch and the next run.
        cache_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"`, `"uint8"` or `"float32"`.
        max_text_length (`int`, *optional*, defaults to 512):
            Tokens of a report in `contrastive`, of a whole conversation in the other stages. Texts that are too long are
            shortened to whole sentences.
        augmentation (`str`, *optional*, defaults to `"laterality_safe"`):
            `"laterality_safe"`, `"original"` or `"none"`.
        identical_reports (`str`, *optional*, defaults to `"distinct"`):
            In `contrastive`: whether a volume counts the identical report of another volume as a negative
            (`"distinct"`, as in the paper) or as a positive (`"match"`).
        similar_reports (`int`, *optional*, defaults to 0):
            In `contrastive`: so many similar reports of other cases come as texts without a volume into the batch with each
            volume, drawn anew every time, and are negatives in the loss (hard negatives), so that what tells them apart is
            learnt too. Not in the paper. The text encoder has `1 + similar_reports` times the work, and
            `model.dual_encoder.logit_bias_init_value` is best near -log of the texts in a batch. Validation does without
            them, so its loss is smaller than that of training. Reports that say the same in other words become negatives
            as well.
        questions_per_volume (`int`, *optional*, defaults to 1):
            So many samples of a volume share its encoding in a training step of `projector` and `finetune`, and the
            description of a case in `language`; a batch counts volumes then. Loss and gradients are those of the samples one
            by one with the same augmentation, but for dropout and a volume encoder in training. It needs a language model
            with PyTorch's attention ("sdpa") in all layers.
        num_train (`int`, *optional*):
            So many training samples, drawn once; all by default.
        num_validation (`int`, *optional*, defaults to 512):
            Only the first so many validation samples of each task.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether volumes that are missing or cannot be read, and rows without a report or a complete question, are left out,
            and listed in `skipped.jsonl` with their reasons. Otherwise they stop the run.
    """

    root: str = ""
    tasks: list[str] = field(default_factory=list)
    volumes: str = "scans"
    cache: str | None = None
    cache_dtype: str = "float16"
    max_text_length: int = 512
    augmentation: str = "laterality_safe"
    identical_reports: str = "distinct"
    similar_reports: int = 0
    questions_per_volume: int = 1
    num_train: int | None = None
    num_validation: int = 512
    skip_broken: bool = False


@dataclass
class Recipe:
    """
    One training run.

    Args:
        stage (`str`):
            `"contrastive"`, `"projector"` or `"finetune"`; or `"language"`, which trains a language model on the texts of
            a study alone, for `model.language_model` of the stage `projector`.
        description (`str`):
            What it is, and where its numbers come from. A model card has it where `changed` is empty and the global
            batch is that of the recipe, on `num_devices` if it names them; else the card says what differs.
        begun_from (`str`):
            Name of the recipe that `description` is of; set by [`load_recipe`].
        changed (`dict[str, str]`):
            What has another value there, places aside, by its key with dots between levels; set by [`load_recipe`].
        num_devices (`int`, *optional*):
            Devices that the numbers of `training` are for, together with the batch size of each.
        model ([`ModelRecipe`]), data ([`DataRecipe`]):
            What is trained on what.
        trained (`list[str]`):
            Parts of a vision-language model whose weights are trained: of "vision_tower", "multi_modal_projector" and
            "language_model".
        lora (`dict`):
            Fields of `peft.LoraConfig`; empty for none. The projector is then trained beside the adapters if `trained`
            has it.
        text_learning_rate (`float`, *optional*):
            Highest learning rate of the text encoder and its projection in `contrastive`; that of all else,
            `training.learning_rate`, if not given.
        num_answers (`int`, *optional*, defaults to 4):
            Answers to write down at each validation of `projector` and `finetune`.
        training (`dict`):
            Fields of `transformers.TrainingArguments`, with their own names. `bf16` may be `auto`: where the hardware
            multiplies bfloat16.
    """

    stage: str = ""
    description: str = ""
    begun_from: str = ""
    changed: dict[str, str] = field(default_factory=dict)
    num_devices: int | None = None
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    trained: list[str] = field(default_factory=list)
    lora: dict[str, Any] = field(default_factory=dict)
    text_learning_rate: float | None = None
    num_answers: int = 4
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """
    Reads a recipe and checks it.

    Args:
        source (`str` or `Path`):
            A YAML file, or the name of a recipe of this package, such as `"paper/contrastive"`. Its key `base` names
            another recipe, beside it or of this package, whose values it replaces.
        overrides (`list[str]`, *optional*):
            `key=value` with dots between levels, such as `"training.learning_rate=2e-4"`; the value is read as YAML.

    Returns:
        [`Recipe`]

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a key is not known, a value is not of its type or cannot be; the message says what to write.
    """
    described: Any
    merged: Any
    merged, described, origin, layers = _read_with_base(find_recipe(source), ())
    try:
        merged = _apply_overrides(merged, overrides or [])
        _check_epochs_count([*layers, OmegaConf.from_dotlist(overrides or [])], merged)
        _check_keys(OmegaConf.to_container(merged), Recipe, "")
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]} (at `{error.full_key}`)") from error
    assert isinstance(recipe, Recipe)
    _note_origin(recipe, merged, described, origin)
    for name in PLACES:
        place = getattr(recipe.model, name)
        if isinstance(place, str) and place.startswith("~"):  # which no shell expands behind `model.start_from=`
            setattr(recipe.model, name, str(Path(place).expanduser()))
    check_recipe(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the whole recipe, every default included, so that the file alone repeats the run."""
    write_atomically(OmegaConf.to_yaml(OmegaConf.structured(recipe)).encode(), path)


def find_recipe(source: str | Path) -> Path:
    """
    Raises:
        FileNotFoundError: `source` is neither a file nor the name of a recipe of this package; the message lists those.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    packaged = packaged_recipes()
    name = str(source).removesuffix(".yaml")
    if name in packaged:
        return packaged[name]
    near = difflib.get_close_matches(name, packaged, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"{source}: there is no such file, and no such recipe in this package.{hint} It has: {', '.join(packaged)}."
    )


def packaged_recipes() -> dict[str, Path]:
    """The recipes of this package by name, such as `"paper/contrastive"`."""
    folder = Path(str(resources.files(__package__))) / "recipes"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
        if "launch" not in path.parts
    }


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: a value cannot be, or two contradict each other.
    """
    _check_choice("stage", recipe.stage, STAGES)
    for part in recipe.trained:
        _check_choice("trained", part, PARTS)
    _check_data(recipe)
    _check_model(recipe)
    _check_stage(recipe)
    _check_training(recipe.training)
    _check_configurations(recipe)


def _check_data(recipe: Recipe) -> None:
    # Here, so that a mistyped recipe is refused without importing torch first.
    from .data.augmentation import AUGMENTATIONS
    from .data.samples import TASKS

    _check_choice("data.volumes", recipe.data.volumes, ("scans", "prepared"))
    _check_choice("data.augmentation", recipe.data.augmentation, AUGMENTATIONS)
    _check_choice("data.identical_reports", recipe.data.identical_reports, ("distinct", "match"))
    _check_choice("data.cache_dtype", recipe.data.cache_dtype, ("float16", "uint8", "float32"))
    if recipe.data.similar_reports < 0:
        raise ValueError(f"`data.similar_reports` must be 0 or more, got {recipe.data.similar_reports}.")
    if recipe.data.similar_reports and recipe.stage != "contrastive":
        raise ValueError(
            f"`data.similar_reports` is for the stage 'contrastive': leave it out in {recipe.stage!r}, or set it to 0."
        )
    if recipe.data.similar_reports and recipe.data.identical_reports != "match":
        raise ValueError(
            "`data.similar_reports` needs `data.identical_reports: match`: what is similar to one volume's report may be the "
            "very report of another volume in the batch."
        )
    if recipe.data.questions_per_volume < 1:
        raise ValueError(f"`data.questions_per_volume` must be 1 or more, got {recipe.data.questions_per_volume}.")
    for task in recipe.data.tasks:
        _check_choice("data.tasks", task, TASKS)
    if not recipe.data.root:
        raise ValueError("`data.root` is empty: give the folder of the study set or the manifest, data.root=FOLDER.")
    if not recipe.data.tasks:
        raise ValueError("`data.tasks` is empty: name what to learn, such as [report].")


def _check_model(recipe: Recipe) -> None:
    _check_choice("model.dtype", recipe.model.dtype, PRECISIONS)
    if not isinstance(recipe.model.vision, (str, dict)) or recipe.model.vision == "":
        raise ValueError(
            f"`model.vision` must be the name of a published volume encoder or the fields of a configuration, got "
            f"{recipe.model.vision!r}."
        )
    if isinstance(recipe.model.vision, str) and (recipe.model.start_from or recipe.stage != "contrastive"):
        raise ValueError(
            f"`model.vision` {recipe.model.vision!r} is for a new dual encoder, in the stage 'contrastive' without "
            "`model.start_from`: leave one of them out, `model.vision={}` or `model.start_from=null`."
        )
    if recipe.text_learning_rate is not None:
        if recipe.stage != "contrastive":
            raise ValueError(
                f"`text_learning_rate` is that of a dual encoder's text encoder: the stage {recipe.stage!r} has none."
            )
        if recipe.text_learning_rate < 0:
            raise ValueError(f"`text_learning_rate` must not be negative, got {recipe.text_learning_rate}.")


def _check_stage(recipe: Recipe) -> None:
    if recipe.stage == "language":
        if not recipe.model.language_model:
            raise ValueError(
                "The stage 'language' needs `model.language_model`: the fields of a configuration, such as "
                "{model_type: qwen2, hidden_size: 128, ...}, or a pretrained one by name."
            )
        if recipe.model.start_from or recipe.trained or recipe.lora:
            raise ValueError(
                "The stage 'language' trains all of `model.language_model`: leave out `model.start_from`, `trained` and `lora`."
            )
    elif recipe.stage == "contrastive":
        if recipe.data.tasks != ["report"]:
            raise ValueError(
                f"The stage 'contrastive' learns from reports: `data.tasks` must be [report], got {recipe.data.tasks}."
            )
        if recipe.data.questions_per_volume > 1:
            raise ValueError(
                "The stage 'contrastive' asks nothing: leave out `data.questions_per_volume`, or set it to 1."
            )
        if recipe.trained or recipe.lora:
            raise ValueError("The stage 'contrastive' trains the whole dual encoder: leave out `trained` and `lora`.")
        if recipe.training.get("label_smoothing_factor"):
            raise ValueError(
                "The stage 'contrastive' has no labels to smooth: leave out `training.label_smoothing_factor`, or set "
                "it to 0."
            )
    else:
        if not recipe.model.start_from:
            raise ValueError(
                f"The stage {recipe.stage!r} starts from the result of the stage before: give its folder, model.start_from=FOLDER."
            )
        if not recipe.trained and not recipe.lora:
            raise ValueError("Nothing is to be trained: name parts in `trained`, or give `lora`.")
        if recipe.lora and "language_model" in recipe.trained:
            raise ValueError(
                "`lora` and 'language_model' in `trained` exclude each other: adapters replace its training."
            )


def _check_training(training: Mapping[str, Any]) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    if not training.get("output_dir"):
        raise ValueError("`training.output_dir` is empty: say where the run is kept, training.output_dir=FOLDER.")
    training_fields = _training_fields()
    for name, value in training.items():
        if name not in training_fields:
            near = difflib.get_close_matches(str(name), training_fields, n=1)
            hint = f" Did you mean `training.{near[0]}`?" if near else ""
            raise ValueError(f"`training.{name}` is not a field of transformers.TrainingArguments.{hint}")
        if (name, value) != ("bf16", "auto"):
            _check_type(f"training.{name}", value, training_fields[name])
    if uploads := [name for name in training if name.startswith(("push_to_hub", "hub_")) and training[name]]:
        raise ValueError(
            f"{', '.join(f'`training.{name}`' for name in uploads)}: a run is not uploaded while it trains, expected none of these "
            "fields. Trainer would upload the whole output folder, with reports of patients in `answers/`, and to a public "
            "repository unless told otherwise. Leave them out, and publish the result: med3dvlm publish FOLDER org/name --push "
            "--license LICENCE."
        )
    if training.get("resume_from_checkpoint"):
        raise ValueError(
            "`training.resume_from_checkpoint`: leave it out, a run goes on by itself in its `training.output_dir`; to "
            "begin from other weights, name them in `model.start_from`."
        )
    if training.get("auto_find_batch_size"):
        raise ValueError(
            "`training.auto_find_batch_size`: out of memory, Trainer would begin again with weights that have been "
            "trained, in a batch other than the recipe says. Leave it out, and set a smaller "
            "`training.per_device_train_batch_size`, or training.activation_checkpointing=true."
        )
    if training.get("fsdp") and training.get("deepspeed"):
        raise ValueError(
            "`training.fsdp` and `training.deepspeed` exclude each other: leave out `training.fsdp`, since DeepSpeed "
            "shares out the weights with training.deepspeed=zero3; or set training.deepspeed=null."
        )
    if training.get("dataloader_prefetch_factor") is not None and not training.get("dataloader_num_workers"):
        raise ValueError(
            "`training.dataloader_prefetch_factor` is for workers, and `training.dataloader_num_workers` is 0: set "
            "training.dataloader_prefetch_factor=null."
        )
    trackers = trackers_of(training)
    choices = [*INTEGRATION_TO_CALLBACK] if len(trackers) > 1 else [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for tracker in trackers:
        _check_choice("training.report_to", tracker, choices)
    strategy = training.get("train_sampling_strategy", SAMPLING_STRATEGIES[0])
    _check_choice("training.train_sampling_strategy", strategy, SAMPLING_STRATEGIES)


def _check_configurations(recipe: Recipe) -> None:
    """Builds what the recipe says of a configuration, before a pretrained model is loaded, beside the defaults of all else."""
    from huggingface_hub.errors import StrictDataclassError

    from ..configuration.configuration_dcformer_siglip import DCFormerSiglipConfig, build_vision_config
    from ..configuration.configuration_med3dvlm import Med3DVLMConfig
    from .models import LORA_TARGETS, vision_config_fields

    model = recipe.model
    builders: dict[str, Any] = {}
    if recipe.lora:
        from peft import LoraConfig

        builders["lora"] = lambda: LoraConfig(**{"target_modules": LORA_TARGETS, **recipe.lora})
    if recipe.stage == "contrastive":
        if isinstance(model.vision, dict):
            builders["model.vision"] = lambda: build_vision_config(vision_config_fields(model.vision))
        builders["model.dual_encoder"] = lambda: DCFormerSiglipConfig(**model.dual_encoder)
    elif recipe.stage != "language":
        # Which layers there are, the volume encoder says, which is not known yet.
        fields = {name: value for name, value in model.projector.items() if name != "vision_feature_layers"}
        builders["model.projector"] = lambda: Med3DVLMConfig(**fields)
    for name, build in builders.items():
        try:
            build()
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ValueError(f"`{name}`: {error.__cause__ or error}") from error


def check_places(recipe: Recipe) -> None:
    """
    Raises:
        FileNotFoundError: the data, or a folder that the run starts from, is not there.
    """
    root = Path(recipe.data.root).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"`data.root` {recipe.data.root}: there is no such folder or manifest; a relative path starts at {Path.cwd()}."
        )
    for name in PLACES:
        place = getattr(recipe.model, name)
        if isinstance(place, str) and not Path(place).exists() and not is_repository(place):
            raise FileNotFoundError(
                f"`model.{name}` {place}: expected a published folder or a Hub repository `org/name`; there is no such folder. "
                f"Is the stage before finished, or lies elsewhere? Then name its place, model.{name}=FOLDER; a relative path starts "
                f"at {Path.cwd()}."
            )


def check_packages(recipe: Recipe) -> None:
    """
    Raises:
        ImportError: the recipe needs DeepSpeed or the package of a tracker, which is not installed.
    """
    if recipe.training.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"`training.deepspeed` {recipe.training['deepspeed']!r} needs the package deepspeed, which is not installed. On Linux "
            'install it, pip install ".[train]"; elsewhere train without it: training.deepspeed=null training.bf16=auto.'
        )
    for name in trackers_of(recipe.training):
        if not _is_tracker_found(name):
            elsewhere = "none" if name == "tensorboard" else "tensorboard"
            raise ImportError(
                f"`training.report_to` names {name!r}, which transformers does not find here: install its package (of "
                "dagshub, mlflow too; kubeflow needs KUBEFLOW_TRAINER_SERVER_URL), or report elsewhere, "
                f"training.report_to={elsewhere}."
            )


def _is_tracker_found(name: str) -> bool:
    from transformers.integrations import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
        is_tensorboard_available,
    )

    if name in ("all", "none", "azure_ml", "flyte"):  # of the last two, transformers does not tell
        return True
    if name == "comet_ml":  # which transformers finds with a key alone; its callback does without one
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except RuntimeError:  # it is not installed, or too old
            return False
        return True
    # Apart from the others, some of which are imported when all are looked for.
    return is_tensorboard_available() if name == "tensorboard" else name in get_available_reporting_integrations()


def trackers_of(training: Mapping[str, Any]) -> list[str]:
    """What a run reports to, by the names of transformers: TensorBoard, unless `training.report_to` says otherwise."""
    names = training.get("report_to", "tensorboard") or "none"
    return list(names) if isinstance(names, (list, tuple)) else [names]


def _training_fields() -> dict[str, Any]:
    """The fields of `TrainingArguments`, with their types."""
    from transformers import TrainingArguments

    return {field.name: field.type for field in dataclasses.fields(TrainingArguments) if field.init}


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> tuple[DictConfig, DictConfig, str, list[DictConfig]]:
    """
    The file merged over its `base`; of the recipe that its `description` is of, itself or one that it is based on, the
    values and the name; and what each file says alone, the first base before the others.
    """
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path}: the recipe is its own `base`, by way of {[str(step) for step in seen]}.")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # the YAML library has its own family of errors; whatever it is, the file is at fault
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected a mapping of keys to values.")
    base = content.pop("base", None)
    name = next((name for name, place in packaged_recipes().items() if place.resolve() == path), path.name)
    if base is None:
        return content, content, name, [content]
    beside = path.parent / base
    base_path = beside if beside.is_file() else find_recipe(base)
    values, described, origin, layers = _read_with_base(base_path, (*seen, path))
    if "description" in content:  # its own: what the base was begun from is no part of it
        values.pop("begun_from", None)
        values.pop("changed", None)
        values.pop("num_devices", None)
    merged = OmegaConf.merge(values, content)
    assert isinstance(merged, DictConfig)
    if "description" in content:
        described, origin = merged, name
    return merged, described, origin, [*layers, content]


def _apply_overrides(merged: Any, overrides: list[str]) -> Any:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"Expected an override `key=value`, such as training.seed=1, got {override!r}.")
        parent = key.strip().rpartition(".")[0]
        name = OmegaConf.select(merged, parent) if parent else None
        if isinstance(name, str):
            raise ValueError(
                f"`{key.strip()}`: `{parent}` is the name {name!r}, which has no fields; to replace it, give all "
                f"fields, {parent}={{...}}."
            )
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
    return merged


def _check_epochs_count(layers: Sequence[DictConfig], merged: DictConfig) -> None:
    """Refuses epochs in a file or the overrides, the last of `layers`, where steps of a file below count instead."""
    trainings = [OmegaConf.select(layer, "training") for layer in layers]

    def last(name: str) -> int:
        places = (n for n, values in enumerate(trainings) if isinstance(values, DictConfig) and name in values)
        return max(places, default=-1)

    max_steps = OmegaConf.select(merged, "training.max_steps")
    if last("num_train_epochs") > last("max_steps") and isinstance(max_steps, int) and max_steps > 0:
        raise ValueError(
            f"`training.num_train_epochs` has no effect beside the recipe's `training.max_steps` {max_steps}: add "
            f"training.max_steps=-1; or training.max_steps={max_steps} to keep the steps, as a run begun with both before must."
        )


def _note_origin(recipe: Recipe, merged: DictConfig, described: DictConfig, origin: str) -> None:
    """Sets `begun_from` and `changed`, and `num_devices` where it follows from the recipe of the description."""
    packaged = packaged_recipes()
    recipe.begun_from = recipe.begun_from or (origin if origin in packaged else _packaged_recipe_of(merged) or origin)
    if recipe.begun_from in packaged:  # whatever a saved recipe says of itself
        described, recipe.changed = _read_with_base(packaged[recipe.begun_from], ())[0], {}
    if merged.get("description") == described.get("description"):
        recipe.changed = {**recipe.changed, **_changes(described, merged)}
        if "num_devices" not in merged:
            recipe.num_devices = described.get("num_devices")
    else:  # given with its other values, and the devices of the others are not its own
        recipe.changed = {}
        if merged.get("num_devices") == described.get("num_devices"):
            recipe.num_devices = None


def _packaged_recipe_of(values: DictConfig) -> str:
    """The recipe of this package whose stage and description these are, as in a file that an earlier version saved; or none."""
    for name, path in packaged_recipes().items():
        recipe, _, origin, _ = _read_with_base(path, ())
        if origin == name and all(recipe.get(key) == values.get(key) for key in ("description", "stage")):
            return name
    return ""


def _changes(described: DictConfig, merged: DictConfig) -> dict[str, str]:
    """What `merged` has of its own beside the recipe whose description it has, places aside; as a card writes it."""
    defaults = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Recipe())))
    before = dict(_leaves(OmegaConf.to_container(OmegaConf.merge(defaults, described))))
    changes = {
        key: without_absolute_paths(value)
        for key, value in _leaves(OmegaConf.to_container(merged))
        if not f"{key}.".startswith(tuple(f"{name}." for name in NOT_OF_DESCRIPTION))
        and (key not in before or before[key] != value)
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values at all levels that are no mapping, by their keys with dots between levels."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_keys(values: Any, structure: Any, prefix: str) -> None:
    """Refuses a key that the dataclass `structure` does not have, naming the nearest one."""
    known = {entry.name: entry for entry in dataclasses.fields(structure)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean `{prefix}{near[0]}`?" if near else ""
            raise ValueError(f"`{prefix}{key}` is not a recipe key.{hint} There are: {', '.join(known)}.")
        nested = known[key].default_factory
        if dataclasses.is_dataclass(nested) and isinstance(value, dict):
            _check_keys(value, nested, f"{prefix}{key}.")


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuses a value of another type where the annotation is of truth values and numbers alone, or None."""
    kinds = set(get_args(annotation)) or {annotation}
    words = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}
    # Its very type, since to Python True is a number too.
    if kinds <= words.keys() and type(value) not in (kinds | {int} if float in kinds else kinds):
        raise ValueError(f"`{name}` must be {' or '.join(words[k] for k in words if k in kinds)}; got {value!r}.")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), list(choices), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}{hint}.")


__all__ = [
    "FREE_SETTINGS",
    "PARTS",
    "PLACES",
    "SAMPLING_STRATEGIES",
    "STAGES",
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "check_packages",
    "check_places",
    "check_recipe",
    "find_recipe",
    "load_recipe",
    "packaged_recipes",
    "save_recipe",
    "trackers_of",
]
