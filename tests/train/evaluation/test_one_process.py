import csv
import json

import pytest
from m3d_layout import write_cap

from med3dvlm import DCFormerConfig
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.evaluation import one_process
from med3dvlm.train.evaluation.one_process import evaluate_dependence, evaluate_zero_shot
from med3dvlm.train.evaluation.settings import EvaluationSettings, Work


def listed(folder):
    return [json.loads(line).get("image") for line in (folder / "skipped.jsonl").read_text().splitlines()]


def write_labels_of(manifest, path):
    """`cyst` of every other scan of the manifest."""
    rows = list(csv.DictReader(manifest.open(newline="")))
    images = list(dict.fromkeys(row["image"] for row in rows))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "cyst"], *([name, place % 2] for place, name in enumerate(images))])
    return images


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"cyst": {"positive": ["Small cyst."], "negative": ["No cyst."]}}))
    return path


def test_zero_shot_leaves_scans_out_that_cannot_be_read(with_broken_scans, dual_encoder, prompts, tmp_path):
    labels = with_broken_scans.parent / "labels.csv"
    images = write_labels_of(with_broken_scans, labels)
    assert len(images) == 5
    wanted = EvaluationSettings("", ("report",))
    with pytest.raises(ValueError, match=r"scan_2.*Mend it, or go on without such scans: --skip-broken\."):
        evaluate_zero_shot(tmp_path / "out", wanted, dual_encoder, labels, prompts, work=Work(batch_size=1))
    result = evaluate_zero_shot(
        tmp_path / "out", wanted, dual_encoder, labels, prompts, work=Work(batch_size=1, skip_broken=True)
    )
    assert listed(tmp_path / "out") == ["scan_2.nii.gz", "scan_4.nii.gz"]
    (score, _) = result["scores"]
    assert (score["num_positive"], score["num_negative"], score["num_unknown"]) == (0, 3, 0)
    note = "2 of 5 volumes cannot be read and were left out; skipped.jsonl lists them."
    assert note in result["notes"] and note in (tmp_path / "out" / "README.md").read_text()
    assert json.loads(json.dumps(result)) == json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert result["work"]["batch_size"] == 1 and result["work"]["dtype"] == "float32"
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Zero-shot classification, dual\n")

    for number in (1, 3, 5):
        (labels.parent / f"scan_{number}.nii.gz").write_bytes(b"no volume")
    with pytest.raises(ValueError, match=r"labels\.csv: not one of its 5 volumes can be read; skipped\.jsonl lists"):
        evaluate_zero_shot(tmp_path / "none", wanted, dual_encoder, labels, prompts, work=Work(skip_broken=True))


def test_thresholds_are_chosen_without_scans_that_cannot_be_read(with_broken_scans, dual_encoder, prompts, tmp_path):
    labels = with_broken_scans.parent / "labels.csv"
    write_labels_of(with_broken_scans, labels)
    others = write_example_manifest(tmp_path / "others")
    validation = others.parent / "validation.csv"
    write_labels_of(others, validation)
    (others.parent / "scan_1.nii.gz").unlink()  # missing counts as one that cannot be read
    work = Work(skip_broken=True)
    wanted = EvaluationSettings("", ("report",))
    result = evaluate_zero_shot(tmp_path / "out", wanted, dual_encoder, labels, prompts, validation, work=work)
    assert result["scores"][0]["threshold"] is not None
    assert "3 of 10 volumes cannot be read and were left out; skipped.jsonl lists them." in result["notes"]


def test_dependence_leaves_scans_and_samples_out(with_broken_scans, dual_encoder, tmp_path):
    wanted = EvaluationSettings(str(with_broken_scans), ())
    with pytest.raises(ValueError, match=r"scan_2.*Mend it, or go on without such scans: --skip-broken\."):
        evaluate_dependence(tmp_path / "out", wanted, dual_encoder, work=Work(batch_size=1))
    result = evaluate_dependence(tmp_path / "out", wanted, dual_encoder, work=Work(batch_size=1, skip_broken=True))
    assert listed(tmp_path / "out") == ["scan_2.nii.gz", "scan_4.nii.gz"]
    assert (result["num_cases"], result["num_samples"], result["num_skipped"]) == (3, 3, 2)
    assert result["settings"]["tasks"] == ("report",) and {row["count"] for row in result["rows"]} == {3}
    (note,) = result["notes"]
    assert note.startswith("2 volumes (2 cases) cannot be read") and note in (tmp_path / "out/README.md").read_text()
    assert len((tmp_path / "out" / "references.jsonl").read_text().splitlines()) == 5


def test_dependence_reads_all_scans_though_a_text_is_missing(dual_encoder, tmp_path):
    root, out = tmp_path / "m3d", tmp_path / "out"
    write_cap(root, {"test": ["1", "2", "3", "4"]})  # two volumes of each
    (root / "M3D_Cap_npy/ct_case/1/text.txt").unlink()
    (root / "M3D_Cap_npy/ct_case/3/Axial.nii.gz").unlink()
    wanted = EvaluationSettings(str(root), ("report",), prepared=True)
    result = evaluate_dependence(out, wanted, dual_encoder, work=Work(skip_broken=True))
    assert (result["num_cases"], result["num_samples"], result["num_skipped"]) == (3, 5, 3)
    assert listed(out) == [None, None, "M3D_Cap_npy/ct_case/3/Axial.nii.gz"]
    assert result["notes"][0] == "2 of 8 samples lack a text and were left out; skipped.jsonl lists them."
    assert result["notes"][1].startswith("1 volumes (1 cases) cannot be read")


def test_what_does_not_fit_is_known_before_the_folder_is_begun(with_prepared_scans, dual_encoder, prompts, tmp_path):
    out, encoder, manifest = tmp_path / "out", tmp_path / "encoder", with_prepared_scans
    DCFormerConfig().save_pretrained(encoder)
    with pytest.raises(
        ValueError, match="expected a Med3DVLMForConditionalGeneration, got a model of the type 'dcformer'"
    ):
        evaluate_dependence(out, EvaluationSettings(str(manifest), (), "train"), str(encoder))
    write_labels_of(manifest, manifest.parent / "labels.csv")
    with pytest.raises(ValueError, match="--prepared in an evaluation"):
        evaluate_zero_shot(
            out, EvaluationSettings("", ("report",)), dual_encoder, manifest.parent / "labels.csv", prompts
        )
    assert not out.exists()


def test_dependence_of_other_data_is_refused(study, dual_encoder, tmp_path):
    wanted = EvaluationSettings(str(study), (), num_cases=2)
    first = evaluate_dependence(tmp_path / "out", wanted, dual_encoder)
    (note,) = first["notes"]
    assert note == "Only the first 2 cases of the split 'test' were scored."
    assert note in (tmp_path / "out" / "README.md").read_text() and first["work"]["batch_size"] == 16
    assert first == evaluate_dependence(tmp_path / "out", wanted, dual_encoder)
    path = tmp_path / "out" / "references.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "reference": "another"}) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"the data have changed since this evaluation began: 2 of its 2 .* are others now"
    ):
        evaluate_dependence(tmp_path / "out", wanted, dual_encoder)


def test_without_tasks_a_generating_model_is_asked_for_reports_and_closed_questions(study, vlm, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(one_process, "load_for_evaluation", lambda *arguments: (None, None))
    monkeypatch.setattr(one_process, "build_volumes", lambda *arguments: None)

    def keep(model, processor, samples, volumes, **options):
        asked.append((list(dict.fromkeys(samples["task"])), list(options["text_metrics"])))
        return []

    monkeypatch.setattr(one_process, "check_image_dependence", keep)
    evaluate_dependence(tmp_path / "out", EvaluationSettings(str(study), (), num_cases=2), vlm)
    assert asked == [(["report", "closed_vqa"], ["bleu_1", "rouge_1"])]
