"""Publishing: one folder with weights, code, processor, tokenizer and card, on a disk or on the Hub."""

import copy
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CONFIG_NAME, logging
from typing_extensions import Unpack

from ..modeling_med3dvlm.modeling_dcformer import DCFormerBackbone
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..processing.processing_med3dvlm import Med3DVLMProcessor
from .files import sha256_of, write_json_atomically
from .model_card import (
    CARD_KINDS,
    CONVERSION_BEGINS,
    CardFields,
    OldCard,
    card_kind,
    check_fields,
    create_model_card,
    read_old_card,
    renew_fields,
    stated_fields,
)
from .model_index import CARD_NAME, MODEL_INDEX, carry_over
from .places import has_form_of_owned_repository, is_repository
from .training_record import TRAINING_NAME, read_training_record


logger = logging.get_logger(__name__)

# At the end of a card: the files that it was written for, see `digest_of_files`.
FILES_LINE = "<!-- Written for files with the SHA-256 {digest}. -->"
FILES_PATTERN = re.compile(re.escape(FILES_LINE).replace(re.escape("{digest}"), "([0-9a-f]{64})"))
# Settings of a generation config that sampling reads and greedy decoding refuses.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Those that keep decoding from taking the most probable token. Qwen2.5-7B-Instruct comes with a repetition penalty of 1.05.
PENALTY_OPTIONS = ("repetition_penalty", "no_repeat_ngram_size", "num_beams")
END_OF_TURN = "<|im_end|>"
# Where a converted model's weights come from, written by `convert`.
CONVERSION_NAME = "conversion.json"
# Where weights come from; no answer depends on it.
RECORDS = (CONVERSION_NAME, TRAINING_NAME)
# Files that an earlier version of a repository may hold and this one may not.
STALE_ON_HUB = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.py"]
# Settings too: beside another kind of model, an old `processor_config.json` or `adapter_config.json` would be read first.
REPLACED_ON_HUB = [
    *STALE_ON_HUB,
    "*config.json",
    "tokenizer.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    *RECORDS,
]


def publish(
    model: PreTrainedModel | str | os.PathLike,
    destination: str | os.PathLike,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    push_to_hub: bool = False,
    private: bool | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    training_record: Mapping[str, Any] | None = None,
    **card_fields: Unpack[CardFields],
) -> str:
    """
    Publishes a model so that it loads anywhere with `trust_remote_code=True`: safetensors, our code, the processor and
    tokenizer, a generation config that decodes greedily, and a model card. The same input gives the same files, bit for
    bit.

    A folder that was published before is published with what its card says, see [`read_current_card`]: all of `card_fields`
    that is not given anew, further metadata, and the results of evaluations. Results are left out where a processor or
    tokenizer is given anew, since it may prepare other inputs than those that were scored. The record of a conversion,
    `conversion.json`, goes along, and so does what the card says of it, below training data that are given anew; so does that of
    a training, `training.json`. The card of a model in memory, or of a folder whose files have changed since, starts empty:
    what the weights went through is not known.

    Args:
        model (`PreTrainedModel`, `str` or `os.PathLike`):
            One of our models, or a folder or repository that holds one.
        destination (`str` or `os.PathLike`):
            A folder, which appears whole or not at all; with `push_to_hub`, the name of a repository.
        processor ([`Med3DVLMProcessor`], [`Med3DVLMImageProcessor`], `str` or `os.PathLike`, *optional*):
            What prepares the model's inputs, or where it lies; by default what lies beside `model`. An image processor
            is all that an encoder needs, and with `tokenizer` all that the others need.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, where `processor` has none.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload to the Hub.
        private (`bool`, *optional*):
            Whether the repository must be private; a new one is as the owner's settings say by default.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model that `destination` holds, once the new one is complete; on the Hub also needed where a
            repository has a card alone.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Largest file of weights.
        training_record (`Mapping`, *optional*):
            What the weights were trained with, for `training.json`, see [`~hub_cards.training_record.describe_training`]; by
            default the record beside `model`.
        card_fields (*optional*):
            What the card says beyond the model itself, see [`CardFields`]. An empty text takes away what an older card says.

    Returns:
        `str`: the folder's path or the repository's address.

    Raises:
        TypeError: `model` or `processor` is none of ours.
        FileExistsError: `destination` holds files, and `overwrite` is not set or they are no model; on the Hub, it holds
            a model or a card, and `overwrite` is not set.
        OSError: `model` is a path or a name where there is nothing, or nobody is logged in at the Hub.
        ValueError: model and processor do not fit each other, one of them is missing, the weights of the model at a
            path do not fit its configuration, its card cannot be read, the Hub refuses what the card is to say, a model for the
            Hub has no licence, or the repository for a `private` one exists and is public.

    Example:

    ```python
    >>> from med3dvlm import publish

    >>> publish(model, "published", processor=processor, notes="Random weights, to try things out.")  # doctest: +SKIP
    ```"""
    source = Path(model) if isinstance(model, (str, os.PathLike)) else None
    old_card = None if source is None else read_current_card(source)
    fields = merge_fields(old_card, stated_fields(card_fields), source)
    check_fields(fields)
    if training_record is None and old_card is not None and source is not None:
        training_record = read_training_record(source)
    if push_to_hub and not fields.get("license"):
        raise ValueError(
            "A model on the Hub needs a licence: pass `license`, the identifier that the Hub uses, and mind the licences of "
            "the language model and of the training data."
        )
    if push_to_hub and not has_form_of_owned_repository(str(destination)):
        raise ValueError(
            f"Expected the name of a repository on the Hub with its owner, such as org/med3dvlm, got {str(destination)!r}."
        )
    api = HfApi()
    # All of it before a large model is loaded.
    if not push_to_hub:
        check_destination(Path(destination), overwrite)
    else:
        api.whoami()  # raises where nobody is logged in
        if api.repo_exists(str(destination)):
            check_repository(api, str(destination), private, overwrite)
    is_as_scored = processor is None and tokenizer is None
    if isinstance(model, (str, os.PathLike)):
        place = os.fspath(model)
        model = load_model(place)
        processor = place if is_as_scored else processor
    card_kind(model)  # refuses foreign models, before anything is written
    processor = assemble_processor(model, processor, tokenizer)
    check_fit(model.config, processor)
    if push_to_hub:
        fields.setdefault("repo_id", str(destination))
    card = create_model_card(model, processor, has_training_record=training_record is not None, **fields)

    def write(folder: Path) -> None:
        # The installed classes write their code themselves, beside what they save: see `remote_code.carry_code`.
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_companions(folder, model, processor, card)
        if old_card is not None:
            metadata = kept_metadata(old_card, is_as_scored)
            carry_over(folder / CARD_NAME, metadata, old_card.results if is_as_scored else "")
        if old_card is not None and source is not None and (source / CONVERSION_NAME).is_file():
            shutil.copyfile(source / CONVERSION_NAME, folder / CONVERSION_NAME)
        if training_record is not None:
            write_json_atomically(training_record, folder / TRAINING_NAME)

    if not push_to_hub:
        with replaced_when_complete(Path(destination)) as folder:
            write(folder)
        return os.fspath(destination)
    card.validate()  # by the Hub
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        if old_card is not None:  # whose further metadata have been carried over
            ModelCard.load(Path(temporary) / CARD_NAME).validate()
        url = api.create_repo(str(destination), private=private, exist_ok=True)
        check_repository(api, url.repo_id, private, overwrite)  # another may have made it meanwhile
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=temporary,
            commit_message=f"Publish {type(model).__name__}",
            delete_patterns=REPLACED_ON_HUB,
        )
    return str(url)


def read_current_card(folder: Path) -> OldCard | None:
    """
    The card of a published folder, if it was written for the files that are there now.

    Returns:
        [`OldCard`]; `None` where there is no card of ours, or the files have changed since, of which a warning tells.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    try:
        found = FILES_PATTERN.search((folder / CARD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if found is None:
        return None
    if found[1] != digest_of_files(folder):
        logger.warning(
            f"{folder}: weights or settings have changed since its card was written, so nothing that the card says is taken from it: "
            "give licence, training data and notes anew, and evaluate again."
        )
        return None
    return read_old_card(folder)


def hashes_of_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model's weights and settings, by name, in order; not of records of where they come from."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".jinja"))
    return {file.name: sha256_of(file) for file in files if file.name not in RECORDS}


def digest_of_files(folder: Path) -> str:
    """The SHA-256 of the names and contents of a model's weights and settings."""
    lines = (f"{name} {value}\n" for name, value in hashes_of_files(folder).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def merge_fields(old_card: OldCard | None, given: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """
    The fields of a card: what is given, and of the older card what is not, see [`renew_fields`]. Training data that are given
    anew are followed by what the older card says of a conversion, if there is a record of one.
    """
    old = {} if old_card is None else old_card.fields
    fields = renew_fields(old, given)
    _, begin, rest = old.get("training_data", "").partition(CONVERSION_BEGINS)
    if "training_data" in given and begin and source is not None and (source / CONVERSION_NAME).is_file():
        fields["training_data"] = "\n\n".join(part for part in (given["training_data"], begin + rest) if part)
    return fields


def kept_metadata(old_card: OldCard, is_as_scored: bool) -> dict[str, Any]:
    """Further metadata of an older card that hold still: no scores of other inputs."""
    return {name: value for name, value in old_card.metadata.items() if is_as_scored or name != MODEL_INDEX}


def write_companions(folder: Path, model: PreTrainedModel, processor: Any, card: ModelCard) -> None:
    """
    Writes what a published folder holds beside the weights and the configuration, which are there.

    Args:
        folder (`Path`):
            The folder.
        model (`PreTrainedModel`):
            The model; its weights may be on the meta device.
        processor ([`Med3DVLMProcessor`] or [`Med3DVLMImageProcessor`]):
            What prepares its inputs.
        card ([`~huggingface_hub.ModelCard`]):
            Its card.
    """
    processor.save_pretrained(folder)
    if model.can_generate():
        greedy_generation_config(model, processor.tokenizer).save_pretrained(folder)
    text = f"{str(card).rstrip()}\n\n{FILES_LINE.format(digest=digest_of_files(folder))}\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG_NAME, weights)  # written for the owner's eyes only, unlike all else


def load_model(source: str, dtype: str = "auto", device_map: dict[str, str] | None = None) -> PreTrainedModel:
    """
    Loads the model of a folder or repository with the class it was saved from.

    Args:
        source (`str`):
            The folder or repository.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights, such as `"bfloat16"`; `"auto"` is the one they were saved in.
        device_map (`dict`, *optional*):
            As for `from_pretrained`: `{"": "cuda:0"}` brings the weights there without a copy of the whole in the CPU's memory,
            for which accelerate is needed. On the CPU by default.

    Raises:
        OSError: there is no such folder or repository, or no configuration in it.
        ValueError: the model is none of ours, or its weights do not fit; the message lists the tensors.
    """
    check_whole(source)
    config, _ = PreTrainedConfig.get_config_dict(source)
    if not config:  # transformers gives an empty one where there is no file
        raise FileNotFoundError(
            f"{source!r} has no {CONFIG_NAME}, so it holds no whole model. Merge an adapter into its base first."
        )
    architecture = next(iter(config.get("architectures") or ()), None)
    classes = {known.__name__: known for known in (*CARD_KINDS, DCFormerBackbone)}
    if architecture not in classes:
        raise ValueError(
            f"Expected {source!r} to hold one of {sorted(classes)}, got `architectures` {config.get('architectures')} "
            f"and `model_type` {config.get('model_type')!r}."
        )
    return classes[architecture].from_pretrained(source, dtype=dtype, device_map=device_map)


def check_whole(source: str) -> None:
    """
    Raises:
        FileNotFoundError: `source` is neither a folder nor the name of a repository, or a folder with an adapter alone.
    """
    check_source(source)
    if (Path(source) / "adapter_config.json").exists() and not (Path(source) / CONFIG_NAME).exists():
        raise FileNotFoundError(
            f"{source}: an adapter, not a whole model. Merge it first: `med3dvlm merge {source} FOLDER` publishes the whole."
        )


def check_source(source: str) -> None:
    """
    Raises:
        FileNotFoundError: `source` is neither a folder nor the name of a repository.
    """
    if not Path(source).is_dir() and not is_repository(source):
        raise FileNotFoundError(
            f"Expected a folder or a Hub repository `org/name`, got {source!r}: there is no such folder."
        )


def assemble_processor(model: PreTrainedModel, processor: Any, tokenizer: Any = None) -> Any:
    """
    The processor to publish with a model: an image processor for an encoder, a [`Med3DVLMProcessor`] for the others.

    Args:
        model (`PreTrainedModel`):
            One of our models.
        processor ([`Med3DVLMProcessor`], [`Med3DVLMImageProcessor`], `str` or `os.PathLike`):
            What there is, or where it lies.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer to go with an image processor.

    Raises:
        TypeError: `processor` is none of ours.
        ValueError: a part is missing, or there are two tokenizers.
    """
    kind, _, _ = card_kind(model)
    processor_class = Med3DVLMImageProcessor if kind == "encoder" else Med3DVLMProcessor
    if processor is None:
        raise ValueError(
            f"A published {type(model).__name__} needs the preprocessing it was trained with: pass `processor`, a "
            f"{processor_class.__name__}."
        )
    if isinstance(processor, (str, os.PathLike)):
        try:
            check_source(os.fspath(processor))
            processor = processor_class.from_pretrained(os.fspath(processor))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"No {processor_class.__name__} can be loaded from {os.fspath(processor)!r}: pass `processor`. {error}"
            ) from error
    if isinstance(processor, ProcessorMixin):
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            raise ValueError("Expected `tokenizer` beside an image processor only: `processor` has its own tokenizer.")
        processor = processor.image_processor if kind == "encoder" else processor
    elif kind != "encoder" and isinstance(processor, Med3DVLMImageProcessor):
        if tokenizer is None:
            raise ValueError(
                f"A published {type(model).__name__} needs a tokenizer: pass `tokenizer` beside the image processor."
            )
        processor = Med3DVLMProcessor(
            image_processor=processor,
            tokenizer=tokenizer,
            image_seq_length=getattr(model.config, "image_seq_length", None),
        )
    if not isinstance(processor, processor_class):
        raise TypeError(
            f"Expected `processor` to be a {processor_class.__name__}, got {type(processor).__name__}: others do not "
            "prepare volumes as the model needs them."
        )
    return processor


def check_fit(config: Any, processor: Any) -> None:
    """
    Checks that the processor prepares what the model takes, so that the first reader of a card is not the first to try.

    Raises:
        ValueError: a size, a count or an id differs; the message names it and both values.
    """
    image_processor = getattr(processor, "image_processor", processor)
    pairs = {"image_size": (tuple(config.image_size), tuple(image_processor.image_size))}
    if hasattr(config, "image_token_id"):
        pairs["image_seq_length"] = (config.image_seq_length, processor.image_seq_length)
        pairs["image_token_id"] = (config.image_token_id, processor.image_token_id)
    for name, (expected, found) in pairs.items():
        if expected != found:
            raise ValueError(
                f"The model's `{name}` is {expected}, the processor's is {found}: build the processor with the "
                "model's value."
            )
    num_tokens = len(processor.tokenizer) if hasattr(config, "text_config") else 0
    if num_tokens and num_tokens > (vocab_size := config.text_config.get_text_config().vocab_size):
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens, the text model {vocab_size}: call `model.resize_token_embeddings`, "
            "or take the model's own tokenizer."
        )


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: that of the end of a text, and that of the end of a turn, which training teaches."""
    ids = (tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN))
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def greedy_generation_config(model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """
    A copy of the model's generation config that decodes greedily, without penalties, and ends where the tokenizer says.

    Args:
        model (`PreTrainedModel`):
            A generating model; it is left as it is.
        tokenizer (`PreTrainedTokenizerBase`):
            Gives the ids of the end of a text, of the end of a turn if it knows one, and of padding.

    Raises:
        ValueError: the tokenizer knows no end, and generation would never stop.
    """
    end_ids = end_token_ids(tokenizer)
    if not end_ids:
        raise ValueError("The tokenizer has no `eos_token`: set it, or generation never stops.")
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids[0] if len(end_ids) == 1 else end_ids,
        pad_token_id=end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **dict.fromkeys((*SAMPLING_OPTIONS, *PENALTY_OPTIONS)),
    )
    config._from_model_config = False  # it is a decision now, which loading must not derive anew
    return config


def check_destination(destination: Path, overwrite: bool) -> None:
    """
    Raises:
        FileExistsError: `destination` is a file, or a folder that holds something and must not be replaced.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise FileExistsError(f"{destination} is not a folder: choose another destination.")
    if not destination.exists() or not any(destination.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{destination} is not empty: choose another folder, or pass `overwrite=True`.")
    if not (destination / CONFIG_NAME).is_file():
        raise FileExistsError(
            f"{destination} holds files but no {CONFIG_NAME}, so it is no published model and is not replaced: choose "
            "another folder, or empty it."
        )


def check_repository(api: HfApi, repo_id: str, private: bool | None, overwrite: bool) -> None:
    """
    Checks a repository before an upload: creating one that exists already changes nothing about it.

    Raises:
        FileExistsError: it holds files of a model, or a card, and they must not be replaced.
        ValueError: it is public, and must be private.
    """
    info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private first, in its settings on the Hub, or choose another name."
        )
    names = [sibling.rfilename for sibling in info.siblings or ()]
    replaced = next(iter(filter_repo_objects(names, allow_patterns=[CONFIG_NAME, CARD_NAME, *STALE_ON_HUB])), None)
    if replaced is not None and not overwrite:
        raise FileExistsError(
            f"{repo_id} holds {replaced}, which publishing would replace: choose another name, or pass `overwrite=True`."
        )


@contextmanager
def replaced_when_complete(destination: Path) -> Iterator[Path]:
    """
    Gives an empty folder beside `destination`, which takes its place when the block has ended without an error. Until
    then `destination` stays as it is.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, because only within one file system can a folder be moved in one step.
    workplace = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    new, old = workplace / "new", workplace / "old"
    try:
        new.mkdir()
        yield new
        put_in_place(new, destination, old)
    finally:
        if old.exists() and not destination.exists():
            logger.error(f"{destination} could not be put back: what was there lies in {old}. Move it back by hand.")
        else:
            shutil.rmtree(workplace)


def put_in_place(new: Path, destination: Path, old: Path) -> None:
    """Moves the folder `new` to `destination`, and what is there to `old`; whatever ends it in between, that is undone."""
    try:
        if destination.exists():
            destination.rename(old)
        new.rename(destination)
    except BaseException:  # an interrupt too
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise


__all__ = [
    "CONVERSION_NAME",
    "assemble_processor",
    "check_destination",
    "check_fit",
    "check_repository",
    "check_source",
    "check_whole",
    "digest_of_files",
    "end_token_ids",
    "greedy_generation_config",
    "hashes_of_files",
    "load_model",
    "publish",
    "put_in_place",
    "read_current_card",
    "replaced_when_complete",
    "write_companions",
]
