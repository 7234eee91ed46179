"""A study of phantoms and two untrained models, small enough for seconds."""

import json
import shutil

import nibabel
import pytest
from tiny import build_tiny_model

from med3dvlm import DCFormerSiglipConfig, DCFormerSiglipModel, Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.hub_cards.publish import publish
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.data.preparation_record import COMMENT, MADE_BY
from med3dvlm.train.phantoms.study import write_study
from med3dvlm.train.tokenizers import train_word_piece_tokenizer


IMAGE_SIZE = (32, 64, 96)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "phantoms"
    write_study(folder, 14, seed=3, num_validation=1, num_test=6, num_workers=1)
    return folder


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vlm"
    model, processor = build_tiny_model(IMAGE_SIZE)
    publish(model, folder, processor=processor)
    return str(folder)


@pytest.fixture
def with_broken_scans(tmp_path):
    """A manifest for a test of five cases with a report each; the scans of two are no volumes."""
    manifest = write_example_manifest(tmp_path / "example")
    text = manifest.read_text().replace(",train,", ",test,").replace(",validation,", ",test,")
    manifest.write_text(text)
    for number in (2, 4):
        (manifest.parent / f"scan_{number}.nii.gz").write_bytes(b"no volume")
    return manifest


@pytest.fixture
def with_prepared_scans(tmp_path):
    """A manifest whose scans say that they were prepared."""
    manifest = write_example_manifest(tmp_path / "example")
    for scan in manifest.parent.glob("*.nii.gz"):
        image = nibabel.load(scan)
        record = nibabel.nifti1.Nifti1Extension(COMMENT, json.dumps({"made_by": MADE_BY}).encode())
        image.header.extensions.append(record)
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine, image.header), scan)
    return manifest


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Puts folders into a cache of the Hub, as downloads of the revision that is current."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, repository, revision):
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / revision, dirs_exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(revision)
        return place / "snapshots" / revision

    return put


@pytest.fixture(scope="session")
def dual_encoder(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("models") / "dual"
    tokenizer = train_word_piece_tokenizer(["Axial scan, arterial phase. Small cyst of the liver, upper part."], 60)
    torch.manual_seed(0)
    config = DCFormerSiglipConfig(
        vision_config={"image_size": IMAGE_SIZE, "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 1, 1)},
        text_config={
            "model_type": "bert",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        projection_dim=8,
    )
    processor = Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE)), tokenizer)
    publish(DCFormerSiglipModel(config), folder, processor=processor)
    return str(folder)
