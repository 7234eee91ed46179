"""Training learns from what is in the volumes: an aligned pair of encoders finds the reports of phantoms it has never seen, and
one that was trained with the volumes of other cases does not."""

import json

import pytest

from med3dvlm import DCFormerSiglipModel, Med3DVLMProcessor
from med3dvlm.train.data.cache import VolumeCache
from med3dvlm.train.demo import QUICK
from med3dvlm.train.phantoms.scores import score_retrieval
from med3dvlm.train.phantoms.study import write_study
from med3dvlm.train.recipe import load_recipe
from med3dvlm.train.stages import run_recipe


# Two thirds of the demonstration's cases and 120 instead of 161 steps of 32 pairs.
NUM_TRAIN, NUM_TEST, NUM_EPOCHS = 500, 100, 8


def recalls(study, output, num_epochs=NUM_EPOCHS):
    """Trains stage 1 of the demonstration; R@1 of the held-out phantoms and its blind control, both ways."""
    places = [f"data.root={study}", f"data.cache={study.parent / 'cache'}", f"training.output_dir={output}"]
    shorter = [f"training.num_train_epochs={num_epochs}", "training.save_strategy=no", "training.report_to=none"]
    published = run_recipe(load_recipe("phantom/contrastive", [*places, *QUICK["contrastive"], *shorter]))
    processor = Med3DVLMProcessor.from_pretrained(published)
    volumes = VolumeCache(study.parent / "cache", processor.image_processor)
    rows = score_retrieval(DCFormerSiglipModel.from_pretrained(published), processor, study, volumes)
    rows = [row for row in rows if row["score"].startswith(f"deduplicated R@1 of {NUM_TEST},")]
    assert len(rows) == 2
    return tuple(sum(row[key] for row in rows) / 2 for key in ("value", "blind", "chance"))


def mismatch(study):
    """Gives each report of the training the volume of another case."""
    index = study / "M3D_Cap_npy" / "M3D_Cap.json"
    entries = json.loads(index.read_text())
    texts = [entry["text"] for entry in entries["train"]]
    for entry, text in zip(entries["train"], [*texts[1:], texts[0]]):
        entry["text"] = text
    index.write_text(json.dumps(entries))


@pytest.mark.slow
def test_reports_are_found_by_what_the_volumes_show_and_not_without(tmp_path):
    study = tmp_path / "phantoms"
    write_study(study, NUM_TRAIN + NUM_TEST, num_validation=0, num_test=NUM_TEST, progress=False)
    found, blind, chance = recalls(study, tmp_path / "run")
    mismatch(study)
    mismatched, *_ = recalls(study, tmp_path / "mismatched")
    print(f"R@1 of {NUM_TEST}: {found:.3f}, blind {blind:.3f}, mismatched {mismatched:.3f}, chance {chance:.3f}")
    # The four planes and four phases, which are learnt first, alone find 16 reports of 100.
    assert found > 0.10
    assert max(blind, mismatched) < 0.05 and chance < 0.02
