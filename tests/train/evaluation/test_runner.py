import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from med3dvlm.hub_cards.publish import load_model
from med3dvlm.processing.processing_med3dvlm import Med3DVLMProcessor
from med3dvlm.train.answering import answer_samples
from med3dvlm.train.data.dataset import ProcessedVolumes
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.data.study import read_task
from med3dvlm.train.evaluation import runner, settings
from med3dvlm.train.evaluation.folders import describe_source, read_scores
from med3dvlm.train.evaluation.predictions import read_json_lines
from med3dvlm.train.evaluation.runner import MetricOptions, evaluate_answers, evaluate_retrieval, questions_of
from med3dvlm.train.evaluation.settings import EvaluationSettings, Work


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
    assert all(0 <= line["confidence"] <= 1 for line in lines)
    calibration = result["details"]["closed_vqa"]["calibration"]
    assert (
        sum(entry["count"] for entry in calibration["bins"]) == 30 and "calibration" not in result["details"]["report"]
    )
    assert result["num_cases"] == 6 and result["notes"] == [] and set(result["details"]) == set(TASKS)


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

    monkeypatch.setattr(settings, "ProcessedVolumes", Failing)
    with pytest.raises(OSError, match="power"):
        evaluate_answers(tmp_path / "out", asked(study), vlm, metrics=METRICS, work=Work(batch_size=11))
    assert not (tmp_path / "out" / "scores.json").exists()
    answered = sum(len(file.read_text().splitlines()) for file in (tmp_path / "out" / "journal").iterdir())
    assert 0 < answered <= 44
    evaluate_answers(tmp_path / "out", asked(study), vlm, metrics=METRICS, work=Work(batch_size=11))
    assert lines_of(tmp_path / "out") == [
        {**line, "confidence": pytest.approx(line["confidence"], rel=1e-4)} for line in lines_of(folder)
    ]
    total = sum(len(file.read_text().splitlines()) for file in (tmp_path / "out" / "journal").iterdir())
    assert total == 2 * 66  # nothing was answered twice


def test_two_processes_give_what_one_gives(study, vlm, evaluated, tmp_path):
    folder, _ = evaluated
    command = [sys.executable, "-m", "med3dvlm.train.cli", "evaluate", "vqa", "--model", vlm, "--data", str(study)]
    command += ["--out", str(tmp_path / "two"), "--tasks", "closed_vqa,open_vqa", "--max-new-tokens", "6"]
    command += ["--metrics", "bleu_1,rouge_1", "--processes", "2", "--device", "cpu", "--batch-size", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    one = [line for line in lines_of(folder) if line["task"] != "report"]
    two = lines_of(tmp_path / "two")
    assert [line["prediction"] for line in two] == [line["prediction"] for line in one]
    assert [line["blind_prediction"] for line in two] == [line["blind_prediction"] for line in one]
    assert len(list((tmp_path / "two" / "journal").glob("given.*"))) == 2  # both did a share
    assert (tmp_path / "two" / "report.html").exists() and "closed" in result.stdout.lower()


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


def test_repositories_are_their_names():
    assert describe_source("org/Med3DVLM-Qwen-2.5-7B") == {"name": "org/Med3DVLM-Qwen-2.5-7B", "sha256": {}}


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
    assert evaluate_answers(tmp_path / "file", fewer, predictions=predictions)["notes"] == result["notes"][:1]
    empty = tmp_path / "empty.jsonl"
    rows = [{"id": f"closed_vqa/{row:06d}", "prediction": "A." if row else " "} for row in range(30)]
    empty.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = asked(study, ("closed_vqa",), num_cases=6)  # the split has no more
    result = evaluate_answers(tmp_path / "empty", every, predictions=empty)
    assert not result["part_of_split"]
    assert result["notes"] == ["1 of 30 answers (given) are empty and score 0: closed_vqa/000000."]


def test_questions_of_a_study(study, tmp_path):
    assert questions_of(str(study), "test") == ("closed_vqa", "open_vqa", "yes_no_vqa")


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
    assert counts == [2] and again["scores"] == whole["scores"]
