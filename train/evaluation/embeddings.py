"""Embeddings of volumes and reports for retrieval, kept as they are made."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers.utils import logging

from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ..answering import embed_samples
from ..files import write_atomically
from ..scoring import check_finite
from .folders import JOURNAL
from .loading import broken_scans_have_a_way_out, build_volumes, load_for_evaluation
from .predictions import Reference
from .settings import EvaluationSettings, Work


logger = logging.get_logger(__name__)


def embed_all(
    output: Path,
    settings: EvaluationSettings,
    model_name: str,
    samples: datasets.Dataset,
    references: Sequence[Reference],
    work: Work,
    state: PartialState,
) -> tuple[int, float]:
    """
    Embeds the pairs that are not embedded yet.

    Returns:
        How many this process embedded, and the seconds that took, without those of loading the model.
    """
    journal = output / JOURNAL
    done = set(read_shards(journal)[0])
    left = [place for place, reference in enumerate(references) if reference.id not in done]
    if done and left and state.is_main_process:
        logger.warning(f"{output}: {len(done)} of {len(references)} pairs are embedded already.")
    mine = left[state.process_index :: state.num_processes]
    state.wait_for_everyone()
    seconds = 0.0
    if mine:
        model, processor = load_for_evaluation(model_name, DCFormerSiglipModel, settings, work)
        volumes = build_volumes(processor, settings, work)
        start_time = time.perf_counter()
        starts = range(0, len(mine), work.batch_size)
        for start in tqdm(starts, desc="embedding", disable=not work.progress):
            places = mine[start : start + work.batch_size]
            with broken_scans_have_a_way_out(work):
                image_embeds, text_embeds = embed_samples(
                    model, processor, samples.select(places), volumes, settings.max_text_length, work.batch_size
                )
            ids = [references[place].id for place in places]
            content = save({"image_embeds": image_embeds, "text_embeds": text_embeds}, {"ids": json.dumps(ids)})
            name = hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()
            write_atomically(content, journal / f"embeddings.{name}.safetensors")
        seconds = time.perf_counter() - start_time
    state.wait_for_everyone()
    return len(mine), seconds


def read_shards(folder: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids and embeddings that are there so far."""
    ids: list[str] = []
    images, texts = [torch.zeros(0)], [torch.zeros(0)]
    for path in sorted(folder.glob("embeddings.*.safetensors")):
        with safe_open(path, framework="pt") as content:
            ids += json.loads(content.metadata()["ids"])
            images.append(content.get_tensor("image_embeds"))
            texts.append(content.get_tensor("text_embeds"))
    return ids, torch.cat(images[1:] or images), torch.cat(texts[1:] or texts)


def gather_embeddings(output: Path, references: Sequence[Reference]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of all references, in their order."""
    ids, images, texts = read_shards(output / JOURNAL)
    place_of = {name: place for place, name in enumerate(ids)}
    order = torch.tensor([place_of[reference.id] for reference in references])
    return images[order], texts[order]


def write_embeddings(
    path: Path, references: Sequence[Reference], image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> None:
    """Writes embeddings of shape `(num_references, dim)` with the ids of their references, for [`read_embeddings`]."""
    ids = json.dumps([reference.id for reference in references])
    write_atomically(save({"image_embeds": image_embeds, "text_embeds": text_embeds}, {"ids": ids}), path)


def read_embeddings(path: Path, references: Sequence[Reference], num_used: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embeddings of any system, made unit vectors.

    Args:
        path (`Path`):
            A safetensors file with `image_embeds` and `text_embeds` of shape `(num_rows, dim)`, and, if it is of
            [`write_embeddings`], the ids of the rows.
        references (`Sequence[Reference]`):
            All that the rows can be of, in their order.
        num_used (`int`):
            How many of the first of them galleries have; rows of these alone are enough.

    Returns:
        Two `torch.Tensor` of shape `(num_rows, dim)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has not the two tensors of one shape, with finite values and a row for each of the references or of
            the first `num_used`, or its rows are of others.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of embeddings.")
    tensors = load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"image_embeds", "text_embeds"}
    if set(shapes) != expected or len(set(shapes.values())) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(
            f"{path}: expected image_embeds and text_embeds of one shape (num_samples, dim), got {shapes}."
        )
    number, found = len(references), len(tensors["image_embeds"])
    if found not in (number, num_used):
        fewer = f", or {num_used}, of the first, which are all that galleries have" if num_used < number else ""
        raise ValueError(f"{path}: expected {number} embeddings, one for each report{fewer}, got {found}.")
    with safe_open(path, framework="pt") as content:
        ids = (content.metadata() or {}).get("ids")
    if ids is not None and json.loads(ids) != [reference.id for reference in references[:found]]:
        raise ValueError(
            f"{path}: its {found} embeddings are of others than the first {found} of the {number} reports, as where scans were "
            "left out (--skip-broken). Embed those of the data, or evaluate the model itself (--model)."
        )
    for name, tensor in tensors.items():
        check_finite(f"{path}, {name}", tensor)
    image_embeds, text_embeds = (normalize(tensors[name].float(), dim=1) for name in ("image_embeds", "text_embeds"))
    return image_embeds, text_embeds


__all__ = ["embed_all", "gather_embeddings", "read_embeddings", "read_shards", "write_embeddings"]
