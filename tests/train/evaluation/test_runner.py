import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import torch
from m3d_layout import vqa_row, write_cap, write_vqa
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from med3dvlm.hub_cards.publish import load_model
from med3dvlm.processing.processing_med3dvlm import Med3DVLMProcessor
from med3dvlm.train.answering import Answer, answer_samples
from med3dvlm.train.cli import app
from med3dvlm.train.data import cache
from med3dvlm.train.data.dataset import ProcessedVolumes
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.data.study import read_task
from med3dvlm.train.evaluation import asked as asked_module
from med3dvlm.train.evaluation import notes, runner
from med3dvlm.train.evaluation.asked import questions_of, read_asked, read_samples
from med3dvlm.train.evaluation.folders import LOCK, describe_source, read_scores
from med3dvlm.train.evaluation.journal import Journal
from med3dvlm.train.evaluation.predictions import Reference, read_json_lines
from med3dvlm.train.evaluation.presentation import present
from med3dvlm.train.evaluation.runner import evaluate_answers, evaluate_retrieval
from med3dvlm.train.evaluation.settings import EvaluationSettings, MetricOptions, Work
from med3dvlm.train.files import only_one_at


TASKS = ("closed_vqa", "open_vqa", "report")
METRICS = MetricOptions(("bleu_1", "rouge_1"))


def asked(study, tasks=TASKS, **fields):
    return EvaluationSettings(str(study), tasks, max_new_tokens=6, **fields)


def lines_of(folder):
    return [row for _, row in read_json_lines(folder / "predictions.jsonl")]


@pytest.fixture(scope="module")
def evaluated(study, vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    result = evaluate_answers(folder, asked(study), vlm, metrics=METRICS, work=Work(batch_size=5))
    return folder, result


def test_answers_are_those_of_single_questions_and_every_one_is_kept(study, vlm, evaluated):
    folder, result = evaluated
    lines = lines_of(folder)
    assert [line["id"] for line in lines[:2]] == ["closed_vqa/000000", "closed_vqa/000001"]
    assert len({line["id"] for line in lines}) == len(lines) == 6 * 11 == result["num_samples"]
    model, processor = load_model(vlm), Med3DVLMProcessor.from_pretrained(vlm)
    samples = read_task(study, "test", "open_vqa")
    alone = answer_samples(
        model, processor, samples, ProcessedVolumes(processor.image_processor), max_new_tokens=6, batch_size=1
    )
    assert [line["prediction"] for line in lines if line["task"] == "open_vqa"] == alone
    assert any(line["prediction"] != line["blind_prediction"] for line in lines)
    assert all(0 <= line["probability"] <= 1 for line in lines)
    calibration = result["details"]["closed_vqa"]["calibration"]
    assert (
        sum(entry["count"] for entry in calibration["bins"]) == 30 and "calibration" not in result["details"]["report"]
    )
    assert result["num_cases"] == 6 and set(result["details"]) == set(TASKS)
    assert all("begin with no letter of a choice, and count as wrong" in note for note in result["notes"])


def test_scores_are_means_of_the_samples_scores(evaluated):
    folder, _ = evaluated
    lines, scores = lines_of(folder), read_scores(folder / "scores.json")
    for score in scores:
        if score.group == "all" and score.metric != "corpus_bleu_4":
            values = [line["scores"][score.metric] for line in lines if line["task"] == score.task]
            assert score.value == pytest.approx(sum(values) / len(values)) and score.count == len(values)
            assert score.low <= score.value <= score.high and score.blind is not None
    assert {score.task for score in scores} == set(TASKS)


def test_another_system_is_scored_by_its_predictions(study, evaluated, tmp_path):
    folder, result = evaluated
    again = evaluate_answers(
        tmp_path / "again",
        asked(study),
        predictions=folder / "predictions.jsonl",
        system="another",
        metrics=METRICS,
    )
    assert again["system"] == "another"
    without_blind = [{**score, "blind": None} for score in result["scores"]]
    assert again["scores"] == without_blind
    blind = tmp_path / "blind.jsonl"
    rows = [{"id": line["id"], "prediction": line["blind_prediction"]} for line in lines_of(folder)]
    blind.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = evaluate_answers(
        tmp_path / "both",
        asked(study),
        predictions=folder / "predictions.jsonl",
        blind_predictions=blind,
        metrics=METRICS,
    )
    assert both["scores"] == result["scores"]


def test_an_evaluation_that_was_ended_goes_on_where_it_was(study, vlm, evaluated, tmp_path, monkeypatch):
    folder, _ = evaluated
    loads = []

    class Failing(ProcessedVolumes):
        def load(self, path):
            loads.append(path)
            if len(loads) == 5:
                raise OSError("the power fails")
            return super().load(path)

    monkeypatch.setattr(cache, "ProcessedVolumes", Failing)
    with pytest.raises(OSError, match="power"):
        evaluate_answers(tmp_path / "out", asked(study), vlm, metrics=METRICS, work=Work(batch_size=11))
    assert not (tmp_path / "out" / "scores.json").exists()
    answered = sum(len(file.read_text().splitlines()) for file in (tmp_path / "out" / "journal").iterdir())
    assert 0 < answered <= 44
    evaluate_answers(tmp_path / "out", asked(study), vlm, metrics=METRICS, work=Work(batch_size=11))
    assert lines_of(tmp_path / "out") == [
        {**line, "probability": pytest.approx(line["probability"], rel=1e-4)} for line in lines_of(folder)
    ]
    total = sum(len(file.read_text().splitlines()) for file in (tmp_path / "out" / "journal").iterdir())
    assert total == 2 * 66  # nothing was answered twice
    ended, last = json.loads((tmp_path / "out" / "scores.json").read_text())["calls"]
    assert ended["num_new"] == last["num_before"] == {"given": answered, "blind": 0} and ended["seconds"] is None
    assert last["num_new"] == {"given": 66 - answered, "blind": 66} and last["seconds"]["blind"] > 0


def test_two_processes_give_what_one_gives(study, vlm, evaluated, tmp_path, monkeypatch, capfd):
    folder, _ = evaluated
    command = ["evaluate", "vqa", "--model", vlm, "--data", str(study), "--out", str(tmp_path / "two")]
    command += ["--tasks", "closed_vqa", "--max-new-tokens", "6"]
    command += ["--processes", "2", "--device", "cpu", "--batch-size", "5"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["med3dvlm", *command])  # what the processes are started with
    code = CliRunner().invoke(app, command).exit_code
    printed = capfd.readouterr()
    assert code == 0, printed.err
    two = lines_of(tmp_path / "two")
    one = lines_of(folder)[: len(two)]
    assert [line["id"] for line in two] == [f"closed_vqa/{row:06d}" for row in range(30)]
    assert [line["prediction"] for line in two] == [line["prediction"] for line in one]
    assert [line["blind_prediction"] for line in two] == [line["blind_prediction"] for line in one]
    assert len(list((tmp_path / "two" / "journal").glob("given.*"))) == 2  # both did a share
    assert (tmp_path / "two" / "report.html").exists() and "closed" in printed.out.lower()
    scores = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert scores["work"]["num_processes"] == 2 and scores["samples_per_second"] > 0
    (call,) = scores["calls"]
    assert call["num_new"] == {"given": len(two), "blind": len(two)}


def test_a_folder_of_something_else_is_refused(study, vlm, evaluated, tmp_path):
    folder, _ = evaluated
    with pytest.raises(ValueError, match=r"other settings \(blind, split\)"):
        evaluate_answers(folder, asked(study, split="validation", blind=False), vlm, metrics=METRICS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        evaluate_answers(tmp_path, asked(study), vlm, metrics=METRICS)


@pytest.mark.parametrize("kind", ["vlm", "dual_encoder"])
def test_answers_to_other_data_are_not_taken_for_answers(kind, request, tmp_path):
    manifest = write_example_manifest(tmp_path / "example")
    wanted = EvaluationSettings(str(manifest), ("report",), "train", max_new_tokens=2, blind=False)

    def evaluate():
        if kind == "vlm":
            return evaluate_answers(tmp_path / "out", wanted, request.getfixturevalue(kind), metrics=METRICS)
        return evaluate_retrieval(tmp_path / "out", wanted, request.getfixturevalue(kind))

    first = evaluate()
    assert evaluate()["scores"] == first["scores"]
    asked = (tmp_path / "out" / "references.jsonl").read_bytes()
    head, *rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([head, *rows[::-1]]))
    with pytest.raises(ValueError, match=r"4 of its 4 .* report/000000 \(case, image, reference\).*restore the data"):
        evaluate()
    manifest.write_text("".join([head, *rows, rows[0].replace("scan_1", "scan_5")]))
    with pytest.raises(ValueError, match="asks for 4 questions and reports, the data have 5 now"):
        evaluate()
    assert (tmp_path / "out" / "references.jsonl").read_bytes() == asked
    manifest.write_text("".join([head, *rows]))
    assert evaluate()["scores"] == first["scores"]


def test_the_blind_control_of_one_case_is_refused_before_anything_is_written(study, vlm, dual_encoder, tmp_path):
    with pytest.raises(ValueError, match="at least two cases, got 1: .*--no-blind"):
        evaluate_answers(tmp_path / "out", asked(study, num_cases=1), vlm, metrics=METRICS)
    with pytest.raises(ValueError, match="at least two cases, got 1: .*--no-blind"):
        evaluate_retrieval(tmp_path / "out", asked(study, ("report",), num_cases=1), dual_encoder)
    assert not (tmp_path / "out").exists()
    evaluate_answers(tmp_path / "out", asked(study, ("report",), num_cases=1, blind=False), vlm, metrics=METRICS)


def test_repositories_are_their_names_revisions_and_files(vlm, on_the_hub):
    first = on_the_hub(vlm, "org/Med3DVLM-Qwen-2.5-7B", "a" * 40)
    described = describe_source("org/Med3DVLM-Qwen-2.5-7B")
    assert described == {
        "name": "org/Med3DVLM-Qwen-2.5-7B",
        "revision": "a" * 40,
        "sha256": describe_source(vlm)["sha256"],
    }
    on_the_hub(vlm, "org/Med3DVLM-Qwen-2.5-7B", "b" * 40)
    assert describe_source("org/Med3DVLM-Qwen-2.5-7B")["revision"] == "b" * 40
    assert describe_source("org/Med3DVLM-Qwen-2.5-7B", first) == described  # what was found is not looked for again
    with pytest.raises(OSError):
        describe_source("org/not-there")


def test_a_repository_is_evaluated_in_one_revision(study, vlm, evaluated, on_the_hub, tmp_path):
    wanted, options = asked(study, ("closed_vqa",), num_cases=2), {"metrics": METRICS, "work": Work(batch_size=5)}
    on_the_hub(vlm, "org/med3dvlm", "a" * 40)
    result = evaluate_answers(tmp_path / "out", wanted, "org/med3dvlm", **options)
    assert result["system"] == "org/med3dvlm" and result["settings"]["model"]["revision"] == "a" * 40
    of_folder = {line["id"]: line["prediction"] for line in lines_of(evaluated[0])}
    assert all(line["prediction"] == of_folder[line["id"]] for line in lines_of(tmp_path / "out"))
    assert present(tmp_path / "out", model="org/med3dvlm").startswith("# org/med3dvlm")
    changed = on_the_hub(vlm, "org/med3dvlm", "b" * 40)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "another": 1}))
    with pytest.raises(ValueError, match=r"other settings \(model.revision, model.sha256.config.json\)"):
        evaluate_answers(tmp_path / "out", wanted, "org/med3dvlm", **options)


def listed(folder):
    return [json.loads(line)["image"] for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_scans_that_cannot_be_read_are_left_out_if_that_is_asked_for(with_broken_scans, vlm, tmp_path):
    wanted = EvaluationSettings(str(with_broken_scans), ("report", "open_vqa"), max_new_tokens=2)
    out, way_on = tmp_path / "out", r"scan_2.*Mend it, or go on without such scans: --skip-broken\."
    with pytest.raises(ValueError, match=way_on):
        evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=1))
    journal = [json.loads(line) for file in (out / "journal").iterdir() for line in file.read_text().splitlines()]
    assert [row["id"] for row in journal] == ["report/000000"]

    # The only open question is about one of them.
    with pytest.raises(ValueError, match=r"Not one volume of the task 'open_vqa' can be read: .*skipped.jsonl lists"):
        evaluate_answers(tmp_path / "none", wanted, vlm, metrics=METRICS, work=Work(skip_broken=True))
    assert listed(tmp_path / "none") == ["scan_2.nii.gz", "scan_4.nii.gz"]

    wanted = EvaluationSettings(str(with_broken_scans), ("report",), max_new_tokens=2)
    out = tmp_path / "reports"
    with pytest.raises(ValueError, match=way_on):
        evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=1))
    result = evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=1, skip_broken=True))
    assert listed(out) == ["scan_2.nii.gz", "scan_4.nii.gz"]
    note = "2 volumes (2 cases) cannot be read and were left out; skipped.jsonl lists them: 2 of 5 samples were not scored."
    assert note in result["notes"] and result["part_of_split"] and result["num_skipped"] == 2
    assert result["num_samples"] == result["num_cases"] == 3
    assert [line["id"] for line in lines_of(out)] == ["report/000000", "report/000002", "report/000004"]
    assert len((out / "references.jsonl").read_text().splitlines()) == 5
    answered = {
        row["id"]: row["prediction"]
        for file in (out / "journal").glob("given.*")
        for row in map(json.loads, file.read_text().splitlines())
    }
    assert {line["id"]: line["prediction"] for line in lines_of(out)} == answered  # that of the first call among them
    assert note in present(out)

    # A listing that is there holds, and the answers of another system are scored all the same.
    (out / "skipped.jsonl").write_text('{"image": "scan_2.nii.gz", "reason": ""}\n')
    with pytest.raises(ValueError, match="scan_4"):
        evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=1, skip_broken=True))
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": f"report/{row:06d}", "prediction": "x"}) + "\n" for row in range(5)))
    result = evaluate_answers(
        tmp_path / "file", wanted, predictions=answers, metrics=METRICS, work=Work(skip_broken=True)
    )
    assert (result["num_samples"], result["num_skipped"], result["work"]) == (5, 0, None)


def test_retrieval_leaves_scans_out_that_cannot_be_read(with_broken_scans, dual_encoder, tmp_path):
    wanted = EvaluationSettings(str(with_broken_scans), ("report",))
    with pytest.raises(ValueError, match="scan_2.*--skip-broken"):
        evaluate_retrieval(tmp_path / "out", wanted, dual_encoder, work=Work(batch_size=1))
    result = evaluate_retrieval(tmp_path / "out", wanted, dual_encoder, work=Work(batch_size=1, skip_broken=True))
    assert (result["num_samples"], result["num_skipped"], result["part_of_split"]) == (3, 2, True)
    assert any(note.startswith("2 volumes (2 cases) cannot be read") for note in result["notes"])
    images = load_file(tmp_path / "out" / "embeddings.safetensors")["image_embeds"]
    assert images.shape == (3, 8)
    # Of cases 1 to 5 another is two further on, or, where that is broken, the next one that is not: 3, 5, 3.
    texts = load_file(tmp_path / "out" / "embeddings.safetensors")["text_embeds"]
    blind = images[[1, 2, 1]] @ texts.T
    hits = (blind.argmax(dim=1) == torch.arange(3)).float().mean()
    assert result["scores"][0]["blind"] == pytest.approx(float(hits))


def test_missing_volumes_and_samples_without_a_text_are_left_out_and_the_others_keep_their_ids(vlm, tmp_path):
    root, out = tmp_path / "m3d", tmp_path / "out"
    write_cap(root, {"test": ["1", "2", "3", "4"]})
    images = [f"M3D_Cap_npy/ct_case/{case}/Axial.nii.gz" for case in range(1, 5)]
    rows = [vqa_row(Image_Path=image, **({"Choice_C": ""} if image == images[1] else {})) for image in images]
    write_vqa(root, "M3D_VQA_test.csv", rows)
    (root / images[2]).unlink()
    wanted = EvaluationSettings(str(root), ("closed_vqa", "open_vqa"), prepared=True, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"1 empty texts.* in an evaluation --skip-broken"):
        evaluate_answers(out, wanted, vlm, metrics=METRICS)
    with pytest.raises(FileNotFoundError, match=r"missing.*to evaluate without them, give --skip-broken"):
        evaluate_answers(out, replace(wanted, tasks=("open_vqa",)), vlm, metrics=METRICS)

    result = evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(skip_broken=True))
    kept = ["closed_vqa/000000", "closed_vqa/000003", "open_vqa/000000", "open_vqa/000001", "open_vqa/000003"]
    assert [line["id"] for line in lines_of(out)] == kept
    empty, missing = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert empty == {"id": "closed_vqa/000001", "case": "ct_case/2", "column": "choices", "reason": "empty text"}
    assert missing["image"] == images[2]
    assert (result["num_samples"], result["num_skipped"], result["part_of_split"]) == (5, 3, True)
    assert "1 of 8 samples lack a text and were left out; skipped.jsonl lists them." in result["notes"]

    # Answers of another system are scored for what can be asked.
    answers, command = tmp_path / "answers.jsonl", ["evaluate", "references", str(tmp_path / "asked.jsonl")]
    command += ["-d", str(root), "--tasks", ",".join(wanted.tasks)]
    assert CliRunner().invoke(app, command).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--skip-broken"]).exit_code == 0
    ids = [row["id"] for _, row in read_json_lines(tmp_path / "asked.jsonl")]
    assert len(ids) == 7 and "closed_vqa/000001" not in ids
    answers.write_text("".join(json.dumps({"id": name, "prediction": "x"}) + "\n" for name in ids))
    options = {"predictions": answers, "metrics": METRICS, "work": Work(skip_broken=True)}
    result = evaluate_answers(tmp_path / "file", wanted, **options)
    assert (result["num_samples"], result["num_skipped"]) == (7, 1)
    assert json.loads((tmp_path / "file/skipped.jsonl").read_text()) == empty

    (root / "M3D_Cap_npy/ct_case/1/text.txt").unlink()
    found = read_asked(replace(wanted, tasks=("report",)), Work(skip_broken=True))
    assert [reference.id for reference in found.references] == [f"report/{row:06d}" for row in range(2, 8)]
    assert len(found.samples) == 6 and (found.num_all, found.num_skipped) == (8, 2)
    assert found.empty[1]["id"] == "report/000001" and found.empty[1]["column"] == "report"
    for path in root.rglob("text.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="every sample of the task 'report' lacks a text"):
        read_asked(replace(wanted, tasks=("report",)), Work(skip_broken=True))


def test_questions_of_a_manifest_are_known_though_scans_are_missing(with_broken_scans):
    (with_broken_scans.parent / "scan_2.nii.gz").unlink()
    with pytest.raises(FileNotFoundError):
        questions_of(str(with_broken_scans), "test")
    assert "open_vqa" in questions_of(str(with_broken_scans), "test", keep_broken=True)


def test_a_first_call_that_was_wrong_does_not_stand_in_the_way(study, vlm, evaluated, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "load_for_evaluation", fail)
    with pytest.raises(RuntimeError, match="memory"):
        evaluate_answers(tmp_path / "out", asked(study, ("report",)), vlm, metrics=METRICS)
    monkeypatch.undo()
    wanted = asked(study, ("closed_vqa",), num_cases=2)
    result = evaluate_answers(tmp_path / "out", wanted, vlm, metrics=METRICS, work=Work(batch_size=5))
    assert result["settings"]["tasks"] == ("closed_vqa",) and result["settings"]["num_cases"] == 2
    ids = [json.loads(line)["id"] for line in (tmp_path / "out" / "references.jsonl").read_text().splitlines()]
    assert ids == [f"closed_vqa/{row:06d}" for row in range(10)]
    with pytest.raises(ValueError, match=r"other settings \(num_cases\)"):
        evaluate_answers(tmp_path / "out", asked(study, ("closed_vqa",), num_cases=3), vlm, metrics=METRICS)


@pytest.mark.parametrize("kind", ["vlm", "dual_encoder"])
def test_prepared_volumes_are_known_before_the_folder_is_begun(kind, request, with_prepared_scans, tmp_path):
    wanted = EvaluationSettings(str(with_prepared_scans), ("report",), "train")
    model, options = request.getfixturevalue(kind), {"metrics": METRICS} if kind == "vlm" else {}
    evaluate = evaluate_answers if kind == "vlm" else evaluate_retrieval
    with pytest.raises(ValueError, match="--prepared in an evaluation"):
        evaluate(tmp_path / "out", wanted, model, **options)
    assert not (tmp_path / "out").exists()


def test_no_side_is_named_of_volumes_that_the_original_prepared(vlm, tmp_path):
    write_cap(tmp_path, {"test": ["1", "2"]})
    answers, wanted = tmp_path / "answers.jsonl", EvaluationSettings(str(tmp_path), ("report",), prepared=True)
    answers.write_text("".join(json.dumps({"id": f"report/{row:06d}", "prediction": "x"}) + "\n" for row in range(4)))
    evaluate_answers(tmp_path / "out", wanted, predictions=answers, metrics=METRICS)
    present(tmp_path / "out", model=vlm)
    page = (tmp_path / "out/report.html").read_text()
    assert "directions are not known" in page and "patient" not in page


def test_what_answers_depend_on_beside_the_settings_is_kept(study, vlm, evaluated, tmp_path, monkeypatch):
    folder, result = evaluated
    assert result["work"]["batch_size"] == 5 and result["work"]["dtype"] == "float32"
    assert result["work"]["num_processes"] == 1 and result["work"]["device"].startswith("cpu")
    begun = json.loads((folder / "run.json").read_text())
    assert begun["versions"] == result["versions"] and "versions" not in result["settings"]
    wanted, out = asked(study, ("closed_vqa",), num_cases=2), tmp_path / "out"
    first = evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=5))
    begun = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**begun, "versions": {**begun["versions"], "torch": "1.0"}}))
    said = []
    monkeypatch.setattr("med3dvlm.train.evaluation.folders.logger.warning", said.append)
    again = evaluate_answers(out, wanted, vlm, metrics=METRICS, work=Work(batch_size=1))
    assert len(said) == 1 and "begun with other versions (torch)" in said[0]
    # A call that answers nothing changes nothing of what the answers were made with.
    (call,) = first["calls"]
    assert again["calls"] == [call] and call["num_new"] == {"given": 10, "blind": 10}
    assert again["work"] == first["work"] and again["work"]["batch_size"] == 5
    assert again["samples_per_second"] == first["samples_per_second"] == pytest.approx(10 / call["seconds"]["given"])
    assert set(call["versions"]) == {"torch", "transformers", "med3dvlm"}
    assert json.loads((out / "run.json").read_text())["versions"]["torch"] == "1.0"  # that of the first call


def test_answers_of_the_blind_control_are_part_of_the_settings(study, evaluated, tmp_path):
    predictions, blind = evaluated[0] / "predictions.jsonl", tmp_path / "blind.jsonl"
    blind.write_text(predictions.read_text())
    wanted = asked(study)
    result = evaluate_answers(
        tmp_path / "out", wanted, predictions=predictions, blind_predictions=blind, metrics=METRICS
    )
    assert result["settings"]["blind_predictions"] == describe_source(str(blind))
    blind.write_text(predictions.read_text() + "\n")
    with pytest.raises(ValueError, match=r"other settings \(blind_predictions.sha256.blind.jsonl\)"):
        evaluate_answers(tmp_path / "out", wanted, predictions=predictions, blind_predictions=blind, metrics=METRICS)


def test_the_encoder_of_bertscore_is_loaded_once_on_the_device_and_named(study, evaluated, tmp_path, monkeypatch):
    made = []

    class Encoder:
        def __init__(self, model, num_layers, device):
            self.device, self.is_loaded = device, False
            made.append(self)

        @property
        def scorer(self):
            self.is_loaded = True

        def score_samples(self, predictions, references):
            return [0.5] * len(predictions)

    monkeypatch.setattr(runner, "BertScore", Encoder)
    options = MetricOptions(("bertscore",), str(tmp_path / "minilm"), 6)
    result = evaluate_answers(
        tmp_path / "out",
        asked(study),
        predictions=evaluated[0] / "predictions.jsonl",
        metrics=options,
        work=Work(device="cpu"),
    )
    assert made[0].is_loaded and made[0].device == "cpu"
    assert any(note.startswith("BERTScore's encoder: minilm, layer 6; not comparable") for note in result["notes"])
    runner.build_text_metrics(options, ("report",), "cpu", is_first=False)
    assert not made[1].is_loaded
    with pytest.raises(ValueError, match="got bleu_7"):
        runner.build_text_metrics(MetricOptions(("bleu_7",)), ("report",), "cpu", is_first=False)


def test_identical_reports_get_one_vector_whatever_batch_they_were_in(study, tmp_path, monkeypatch):
    texts, given = ["a", "b", "a", "c", "b", "d"], {}
    samples = read_task(study, "test", "report").remove_columns("answer").add_column("answer", texts)
    monkeypatch.setattr(asked_module, "read_samples", lambda *_: (samples, False))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    save_file({"image_embeds": vectors, "text_embeds": vectors.roll(1, 0)}, tmp_path / "embeddings.safetensors")
    score = runner.score_retrieval

    def keep(images, texts, *arguments):
        given["texts"] = texts
        return score(images, texts, *arguments)

    monkeypatch.setattr(runner, "score_retrieval", keep)
    evaluate_retrieval(tmp_path / "out", asked(study, ("report",)), embeddings=tmp_path / "embeddings.safetensors")
    assert torch.allclose(given["texts"], vectors.roll(1, 0)[[0, 1, 0, 3, 1, 5]])


def test_bad_input_is_named(study, vlm, dual_encoder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="exactly one of a model and a file of predictions"):
        evaluate_answers(out, asked(study), vlm, predictions=tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="got bleu_7"):
        evaluate_answers(out, asked(study), vlm, metrics=MetricOptions(("bleu_7",)))
    with pytest.raises(FileNotFoundError, match="no such study"):
        evaluate_answers(out, asked(tmp_path / "nowhere"), vlm, metrics=METRICS)
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl: there is no such file"):
        evaluate_answers(out, asked(study), predictions=tmp_path / "x.jsonl", metrics=METRICS)
    with pytest.raises(
        ValueError, match="expected a Med3DVLMForConditionalGeneration, got a model of the type 'dcformer_siglip'"
    ):
        evaluate_answers(out, asked(study), dual_encoder, metrics=METRICS)
    with pytest.raises(ValueError, match="expected a DCFormerSiglipModel, got a model of the type 'med3dvlm'"):
        evaluate_retrieval(out, asked(study, ("report",)), vlm)
    assert not out.exists()  # nothing stands in the way of the next try


def test_fewer_cases_and_empty_answers_are_said(study, vlm, tmp_path):
    result = evaluate_answers(
        tmp_path / "some", asked(study, ("closed_vqa",), num_cases=2), vlm, work=Work(batch_size=7)
    )
    assert result["num_cases"] == 2 and result["num_samples"] == 10 and result["part_of_split"]
    assert result["notes"][0] == "Only the first 2 cases of the split 'test' were scored."
    predictions = tmp_path / "some" / "predictions.jsonl"
    fewer = asked(study, ("closed_vqa",), num_cases=2)
    of_given = [note for note in result["notes"] if "(blind)" not in note]
    assert evaluate_answers(tmp_path / "file", fewer, predictions=predictions)["notes"] == of_given
    empty = tmp_path / "empty.jsonl"
    rows = [{"id": f"closed_vqa/{row:06d}", "prediction": "A." if row else " "} for row in range(30)]
    empty.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = asked(study, ("closed_vqa",), num_cases=6)  # the split has no more
    result = evaluate_answers(tmp_path / "empty", every, predictions=empty)
    assert not result["part_of_split"]
    assert result["notes"] == ["1 of 30 answers (given) are empty and score 0: closed_vqa/000000."]


def test_questions_of_a_study(study, tmp_path):
    assert questions_of(str(study), "test") == ("closed_vqa", "open_vqa", "yes_no_vqa")
    folder = tmp_path / "M3D-VQA"
    assert questions_of(str(tmp_path), "test") == ()  # reports alone
    folder.mkdir()
    (folder / "M3D_VQA_yn_test.csv").touch()
    assert questions_of(str(tmp_path), "test") == ("yes_no_vqa",) and questions_of(str(tmp_path), "train") == ()
    (folder / "M3D_VQA_val.csv").touch()
    assert questions_of(str(tmp_path), "validation") == ("closed_vqa", "open_vqa")
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such study"):
        questions_of(str(tmp_path / "nowhere"), "test")


def test_retrieval_of_a_model_and_of_its_embeddings(study, dual_encoder, tmp_path):
    wanted = asked(study, ("report",))
    result = evaluate_retrieval(tmp_path / "model", wanted, dual_encoder, work=Work(batch_size=4))
    tensors = load_file(tmp_path / "model" / "embeddings.safetensors")
    assert tensors["image_embeds"].shape == (6, 8)
    assert torch.allclose(tensors["image_embeds"].norm(dim=1), torch.ones(6))
    similarities = tensors["image_embeds"] @ tensors["text_embeds"].T
    plain = (similarities.argmax(dim=1) == torch.arange(6)).float().mean()
    first = result["scores"][0]
    assert (first["metric"], first["group"], first["count"]) == ("recall_at_1", "volume to report, 6", 6)
    assert first["value"] == pytest.approx(float(plain)) and first["chance"] == pytest.approx(1 / 6)
    assert result["details"]["recall_curves"]["report to volume, 6"]["recall"][-1] == 1
    assert "only 6 pairs" in " ".join(result["notes"])

    other = tmp_path / "other.safetensors"
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, other)  # of any length
    again = evaluate_retrieval(tmp_path / "file", wanted, embeddings=other)
    assert [score["value"] for score in again["scores"]] == pytest.approx(
        [score["value"] for score in result["scores"]]
    )
    save_file({name: tensor[:4] for name, tensor in tensors.items()}, other)
    with pytest.raises(ValueError, match="expected 6 embeddings, one for each report, got 4"):
        evaluate_retrieval(tmp_path / "less", wanted, embeddings=other)
    tensors["text_embeds"][2, 1] = float("nan")
    save_file(tensors, other)
    with pytest.raises(ValueError, match=r"other.safetensors, text_embeds: 1 of 6 vectors are not finite \(rows 2\)"):
        evaluate_retrieval(tmp_path / "broken", wanted, embeddings=other)
    assert not (tmp_path / "broken").exists()


def test_embeddings_that_are_there_are_kept(study, dual_encoder, tmp_path, monkeypatch):
    wanted = asked(study, ("report",))
    whole = evaluate_retrieval(tmp_path / "whole", wanted, dual_encoder, work=Work(batch_size=2))
    shards = sorted((tmp_path / "whole" / "journal").iterdir())
    assert len(shards) == 3
    (tmp_path / "whole" / "scores.json").unlink()
    shards[1].unlink()
    counts = []
    embed = runner.embed_all

    def counting(*arguments):
        counts.append(embed(*arguments))
        return counts[-1]

    monkeypatch.setattr(runner, "embed_all", counting)
    again = evaluate_retrieval(tmp_path / "whole", wanted, dual_encoder, work=Work(batch_size=2))
    assert [count for count, _ in counts] == [2] and again["scores"] == whole["scores"]
    assert [call["num_new"] for call in again["calls"]] == [{"given": 6}, {"given": 2}]
    last = evaluate_retrieval(tmp_path / "whole", wanted, dual_encoder, work=Work(batch_size=1))
    assert last["calls"] == again["calls"] and last["work"] == again["work"] and last["samples_per_second"] > 0


def questions(task, *answers):
    """References to questions of a case each, closed ones with an answer's letter."""
    return [
        Reference(
            f"{task}/{row:06d}", f"case {row}", "x.nii.gz", task, 3, "?", answer, answer * (task == "closed_vqa")
        )
        for row, answer in enumerate(answers)
    ]


def said(*answers, **fields):
    return {"given": [{"prediction": answer, **fields} for answer in answers]}


def test_answers_without_their_probability_have_no_calibration():
    asked = questions("closed_vqa", "A", "B")
    for fields, has_calibration in (({"probability": 0.5}, True), ({"confidence": 0.5}, False), ({}, False)):
        _, details, _ = runner.score_all(asked, said("A.", "A.", **fields), {})
        assert ("calibration" in details["closed_vqa"]) is has_calibration


def test_calibration_of_closed_questions_is_that_of_the_whole_answer():
    (asked,) = questions("closed_vqa", "spleen")
    asked = replace(asked, answer_choice="B")
    for answer, hit in (("B. liver", 0), ("B. spleen", 1)):
        scores, details, _ = runner.score_all([asked], said(answer, probability=0.9), {})
        assert next(score.value for score in scores if score.metric == "accuracy") == 1  # the letter counts
        calibration = details["closed_vqa"]["calibration"]
        (entry,) = (entry for entry in calibration["bins"] if entry["count"])
        assert entry["accuracy"] == hit
        assert calibration["expected_calibration_error"] == pytest.approx(abs(hit - 0.9))


def test_logits_that_are_nan_end_the_evaluation_and_leave_nothing_behind(study, vlm, tmp_path, monkeypatch):
    answers = [Answer("A.", 0.5), Answer("!!!", float("nan"))]
    monkeypatch.setattr(runner, "iterate_answers", lambda model, processor, rows, *_: iter([(rows[:2], answers)]))
    wanted = asked(study, ("closed_vqa",), num_cases=2, blind=False)
    with pytest.raises(
        ValueError, match=r"closed_vqa/000001: the model's logits are NaN.* --dtype bfloat16 or float32"
    ):
        evaluate_answers(tmp_path / "out", wanted, vlm, work=Work(batch_size=2))
    assert not (tmp_path / "out" / "journal").exists()


def test_a_second_call_on_a_folder_waits_for_its_turn(study, evaluated, tmp_path):
    out, wanted = tmp_path / "out", asked(study)
    options = {"predictions": evaluated[0] / "predictions.jsonl", "metrics": METRICS}
    with only_one_at(out / LOCK, "held"):
        with pytest.raises(BlockingIOError, match="out: another call is evaluating into this folder. Wait for it, or"):
            evaluate_answers(out, wanted, **options)
        assert [path.name for path in out.iterdir()] == [LOCK]
    first = evaluate_answers(out, wanted, **options)  # a lock that stayed behind is no other content
    begun = (out / "run.json").read_bytes()
    with only_one_at(out / LOCK, "held"), pytest.raises(BlockingIOError, match="another call"):
        evaluate_answers(out, replace(wanted, blind=False), **options)
    assert (out / "run.json").read_bytes() == begun
    assert evaluate_answers(out, wanted, **options)["scores"] == first["scores"]


def test_answers_that_cannot_be_read_are_counted():
    asked = [*questions("closed_vqa", *"ABC"), *questions("yes_no_vqa", "Yes", "No", "Ja")]
    answers = said("A large cyst", "B spleen", "", "Yes, it is", "no", "ja")
    assert notes.notes_on_unread(asked, answers) == [
        "1 of 3 answers (given) begin with no letter of a choice, and count as wrong: closed_vqa/000000.",
        "1 of 3 answers (given) are neither yes nor no alone, and count as wrong: yes_no_vqa/000000.",
    ]
    assert notes.notes_on_unread(asked, said("A", "B", "C", "yes", "No.", "Ja")) == []


def test_an_answer_that_is_right_too_often_is_said():
    asked = questions("yes_no_vqa", *["No"] * 17, *["Yes"] * 3)
    _, details, _ = runner.score_all(asked, said(*["no"] * 20), {})
    assert details["yes_no_vqa"]["most_frequent_answers"]["all"] == {"answer": "no", "share": 0.85, "count": 20}
    assert notes.notes_on_balance(details) == [
        "Yes/no questions, organ: 85.0% of the true answers are no, all: 85.0% of the true answers are no; always saying so "
        "scores that, more than the 50% of chance."
    ]
    for number_no, number_yes in ((12, 8), (19, 0)):  # not that often, and of too few questions
        answers = [*["No"] * number_no, *["Yes"] * number_yes]
        _, details, _ = runner.score_all(questions("yes_no_vqa", *answers), said(*answers), {})
        assert notes.notes_on_balance(details) == [], answers
    assert notes.notes_on_balance({"report": {}}) == []


def test_retrieval_takes_no_more_pairs_than_the_largest_gallery_has(study, dual_encoder, tmp_path, monkeypatch):
    for module in (runner, notes):
        monkeypatch.setattr(module, "GALLERY_SIZES", (2, 4))
    wanted = asked(study, ("report",))
    result = evaluate_retrieval(tmp_path / "model", wanted, dual_encoder, work=Work(batch_size=4))
    tensors = load_file(tmp_path / "model" / "embeddings.safetensors")
    assert tensors["image_embeds"].shape == (4, 8)
    save_file(
        {name: torch.cat([tensor, -tensor[:2]]) for name, tensor in tensors.items()}, tmp_path / "other.safetensors"
    )
    again = evaluate_retrieval(tmp_path / "file", wanted, embeddings=tmp_path / "other.safetensors")
    for found in (result, again):
        assert (found["num_samples"], found["num_cases"], found["num_skipped"]) == (4, 4, 0) and found["part_of_split"]
        assert "Only the first 4 of 6 pairs were scored: galleries have 2, 4 pairs." in found["notes"]
    assert again["scores"] == result["scores"]


def test_embeddings_that_are_written_can_be_given_for_the_same_data_alone(study, dual_encoder, tmp_path, monkeypatch):
    for module in (runner, notes):
        monkeypatch.setattr(module, "GALLERY_SIZES", (2, 4))
    wanted, written = asked(study, ("report",)), tmp_path / "model" / "embeddings.safetensors"
    result = evaluate_retrieval(tmp_path / "model", wanted, dual_encoder, work=Work(batch_size=4))
    again = evaluate_retrieval(tmp_path / "file", wanted, embeddings=written)
    assert again["scores"] == result["scores"] and again["num_samples"] == 4
    tensors = load_file(written)
    save_file({name: tensor[:3] for name, tensor in tensors.items()}, tmp_path / "three.safetensors")
    message = (
        "expected 6 embeddings, one for each report, or 4, of the first, which are all that galleries have, got 3"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(tmp_path / "three", wanted, embeddings=tmp_path / "three.safetensors")
    # As many, but not the first: scans were left out.
    others = [replace(entry, id=f"report/{place + 1:06d}") for place, entry in enumerate(questions("report", *"abcd"))]
    runner.write_embeddings(tmp_path / "others.safetensors", others, tensors["image_embeds"], tensors["text_embeds"])
    with pytest.raises(ValueError, match=r"its 4 embeddings are of others than the first 4 of the 6 reports.*--skip-"):
        evaluate_retrieval(tmp_path / "others", wanted, embeddings=tmp_path / "others.safetensors")
    assert not (tmp_path / "others").exists()


def test_all_processes_gather_whatever_each_has_left(study, vlm, tmp_path, monkeypatch):
    wanted, gathered = asked(study, ("open_vqa",), num_cases=2, blind=False), []
    found = read_asked(wanted, Work())
    answers = [{"id": entry.id, "prediction": "x", "probability": 0.5} for entry in found.references]
    Journal(tmp_path / "journal", "given").append(answers)
    monkeypatch.setattr(runner, "gather_object", lambda parts: gathered.append(parts) or parts)
    for is_first in (True, False):
        state = SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=is_first, wait_for_everyone=lambda: None
        )
        rows = runner.answer_all(tmp_path, wanted, vlm, found, Work(), state)
        assert rows == ({"given": answers} if is_first else {})
    assert gathered == [[{"given": (0, 0.0)}]] * 2 and not (tmp_path / "calls.json").exists()


def test_answers_that_another_volume_leaves_as_they_are_are_counted():
    blind = said("a", "b", "c")["given"]
    _, details, _ = runner.score_all(questions("open_vqa", *"aab"), {**said("a", "a", "b"), "blind": blind}, {})
    assert details["open_vqa"]["unchanged_by_another_volume"] == pytest.approx(1 / 3)


def test_pairs_that_no_gallery_takes_are_told(tmp_path, monkeypatch):
    rows = [
        {
            "image": f"/{row}.nii.gz",
            "case": str(row),
            "task": "report",
            "question": "",
            "choices": [],
            "answer": f"Report {row}.",
        }
        for row in range(130)
    ]
    rows = [{**row, "answer_choice": "", "question_type": 0} for row in rows]
    samples = datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)
    monkeypatch.setattr(asked_module, "read_samples", lambda settings, _: (samples, settings.num_cases is not None))
    vectors = torch.randn(130, 4, generator=torch.Generator().manual_seed(0))
    save_file({"image_embeds": vectors, "text_embeds": vectors.clone()}, tmp_path / "embeddings.safetensors")
    wanted = EvaluationSettings("study", ("report",))
    result = evaluate_retrieval(tmp_path / "out", wanted, embeddings=tmp_path / "embeddings.safetensors")
    assert (result["num_samples"], result["num_skipped"], result["part_of_split"]) == (100, 0, True)
    assert {score["count"] for score in result["scores"]} == {100}
    assert result["notes"] == [
        "Only the first 100 of 130 pairs were scored: galleries have 100, 500, 1000, 2000 pairs.",
        "No gallery of 500, 1000, 2000: there are only 130 pairs.",
    ]
    assert (result["work"], result["calls"], result["samples_per_second"]) == (None, [], None)
    some = evaluate_retrieval(
        tmp_path / "some", replace(wanted, num_cases=130), embeddings=tmp_path / "embeddings.safetensors"
    )
    assert some["notes"] == ["Only the first 130 cases of the split 'test' were taken.", *result["notes"]]


def test_a_labeller_that_fails_costs_its_own_figures_alone(study, evaluated, tmp_path, monkeypatch):
    module, out = ModuleType("labellers"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "labellers", module)
    rows = lines_of(evaluated[0])
    true = [row["reference"] for row in rows if row["task"] == "report"]

    def label(texts):
        calls.append(list(texts))
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return [{"cyst": int("cyst" in text.lower())} for text in texts]

    module.label = label
    options = {
        "predictions": evaluated[0] / "predictions.jsonl",
        "metrics": MetricOptions(("bleu_1",), labeller="labellers:label"),
    }
    calls, fails_at = [], 1
    with pytest.raises(RuntimeError, match="memory"):
        evaluate_answers(out, asked(study, ("report",)), **options)
    assert calls == [true] and not (out / "predictions.jsonl").exists()  # before any answer
    with only_one_at(out / LOCK, "held"), pytest.raises(BlockingIOError):
        evaluate_answers(out, asked(study, ("report",)), **options)
    assert calls == [true]  # nor does a second call label what the first one does
    calls, fails_at = [], 2
    result = evaluate_answers(out, asked(study, ("report",)), **options)
    assert result["scores"] and "labels" not in result["details"]["report"] and len(lines_of(out)) == len(true)
    note = "Labels of reports failed (RuntimeError), and there are none; the log has the place."
    assert json.loads((out / "scores.json").read_text())["notes"] == result["notes"] and result["notes"][-1] == note
    assert note in present(out) and (out / "report.html").exists()
    calls, fails_at = [], None
    result = evaluate_answers(out, asked(study, ("report",)), **options)
    assert len(calls) == 2 and result["details"]["report"]["labels"]["given"][0]["label"] == "cyst"
    assert note not in result["notes"]
    assert json.loads((out / "scores.json").read_text())["details"] == result["details"]


def test_ids_of_the_first_cases_do_not_depend_on_what_else_is_asked(tmp_path):
    write_cap(tmp_path, {"test": ["1", "2", "3", "4"]})
    images = [f"M3D_Cap_npy/ct_case/{case}/Axial.nii.gz" for case in (4, 3, 2, 1)]
    write_vqa(tmp_path, "M3D_VQA_test.csv", [vqa_row(Image_Path=image) for image in images])
    wanted = EvaluationSettings(str(tmp_path), ("report", "closed_vqa"), num_cases=2)
    both = read_asked(wanted, Work())
    assert both.is_part and list(dict.fromkeys(zip(both.samples["task"], both.samples["case"]))) == [
        *(("report", f"ct_case/{case}") for case in (1, 2)),
        *(("closed_vqa", f"ct_case/{case}") for case in (4, 3)),
    ]
    alone = [read_asked(replace(wanted, tasks=(task,)), Work()).references for task in wanted.tasks]
    assert both.references == [reference for part in alone for reference in part]
    assert notes.notes_on(wanted, True, [], {}) == [
        "Only the first 2 cases of each task of the split 'test' were scored."
    ]
    assert read_samples(replace(wanted, num_cases=4))[1] is False


def test_nan_that_an_earlier_version_kept_is_named_before_any_answer(study, vlm, tmp_path, monkeypatch):
    wanted, out = asked(study, ("closed_vqa",), num_cases=2, blind=False), tmp_path / "out"
    monkeypatch.setattr(runner, "load_for_evaluation", lambda *_: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        evaluate_answers(out, wanted, vlm)
    (out / "journal").mkdir()
    row = {"id": "closed_vqa/000001", "prediction": "!!!", "confidence": float("nan")}
    (out / "journal" / "given.1.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"closed_vqa/000001: the model's logits are NaN.* in another folder"):
        evaluate_answers(out, wanted, vlm)
