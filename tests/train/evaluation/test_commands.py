import csv
import json
import shutil
import sys
from html import unescape
from types import SimpleNamespace

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from med3dvlm.train import evaluation
from med3dvlm.train.cli import app
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.evaluation import commands, loading, one_process
from med3dvlm.train.evaluation.folders import LOCK
from med3dvlm.train.evaluation.presentation import is_m3d
from med3dvlm.train.evaluation.settings import TEXT_METRICS
from med3dvlm.train.files import only_one_at
from med3dvlm.train.phantoms.study import write_labels


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_all_makes_three_folders_with_tables_plots_and_reports(study, vlm, dual_encoder, tmp_path):
    arguments = ["all", "-m", vlm, "--dual-encoder", dual_encoder, "-d", study, "--output", tmp_path / "out"]
    arguments += [
        "--cases",
        "3",
        "--max-new-tokens",
        "4",
        "--metrics",
        "bleu_1",
        "--cache",
        tmp_path / "cache",
        "--json",
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    parts = json.loads(result.stdout)
    assert list(parts) == ["retrieval", "report", "vqa"]
    for part in parts:
        text = (tmp_path / "out" / part / "README.md").read_text()
        assert ("greedy decoding" in text) == (part != "retrieval")
        assert "blind" in text and "Only the first 3 cases" in text and "published" not in text
    for name in (
        "vqa/report.html",
        "vqa/plots/closed_vqa.png",
        "report/tables/report.csv",
        "retrieval/plots/recall.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0
    page = unescape((tmp_path / "out" / "vqa" / "report.html").read_text())
    assert "the patient's right is on the left, anterior above" in page  # by the model's image processor
    scored = parts["vqa"]["scores"]
    assert {score["task"] for score in scored} == {"closed_vqa", "open_vqa", "yes_no_vqa"}


def test_another_system_answers_the_references(study, tmp_path):
    references = tmp_path / "references.jsonl"
    assert run("references", references, "-d", study, "--tasks", "closed_vqa").exit_code == 0
    rows = [json.loads(line) for line in references.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"id": row["id"], "prediction": row["answer_choice"] + "."}) + "\n" for row in rows)
    )
    arguments = ["vqa", "-d", study, "-o", tmp_path / "out", "--predictions", answers, "--tasks", "closed_vqa"]
    result = run(*arguments, "--name", "Oracle")
    assert result.exit_code == 0, result.output
    assert "greedy" not in result.stdout  # how another system decoded is not known
    assert "| accuracy | Oracle | measured here | 100.0 [54.1, 100.0] |" in result.stdout  # of 6 cases

    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    result = run(*arguments[:4], tmp_path / "less", *arguments[5:])
    assert result.exit_code == 2
    assert f"1 of {len(rows)} have no prediction: closed_vqa/000000" in result.stderr


def test_one_file_of_answers_serves_reports_and_all_questions(study, tmp_path):
    references = tmp_path / "references.jsonl"
    assert run("references", references, "-d", study).exit_code == 0
    rows = [json.loads(line) for line in references.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"report", "closed_vqa", "open_vqa", "yes_no_vqa"}
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": row["id"], "prediction": row["reference"]}) + "\n" for row in rows))
    for command in ("report", "vqa"):
        arguments = [command, "-d", study, "-o", tmp_path / command, "--predictions", answers, "--metrics", "bleu_1"]
        result = run(*arguments)
        assert result.exit_code == 0, result.output


def test_a_study_without_questions_is_evaluated_without_them(vlm, tmp_path):
    manifest = write_example_manifest(tmp_path / "study")
    rows = list(csv.DictReader(manifest.open(newline="")))
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "case", "split", "report"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "split": "test"} for row in rows if row["report"])
    options = ["-m", vlm, "-d", manifest, "--cases", "2", "--max-new-tokens", "2"]
    result = run("all", *options, "-o", tmp_path / "all", "--metrics", "bleu_1")
    assert result.exit_code == 0 and "no questions in the split 'test'" in result.stderr, result.output
    result = run("vqa", *options, "-o", tmp_path / "vqa")
    assert result.exit_code == 2 and "no questions in the split 'test'. `med3dvlm evaluate report`" in result.stderr


@pytest.mark.parametrize("device, is_one", [("cuda:1", True), ("cpu", True), ("cuda", False), ("", False)])
def test_a_named_device_has_one_process(device, is_one, monkeypatch):
    monkeypatch.setattr(commands, "check_device", lambda name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(commands, "launch", lambda processes, command: 5)
    if is_one:
        commands.start_processes_if_needed(None, device)
    else:
        with pytest.raises(typer.Exit):
            commands.start_processes_if_needed(None, device)


def test_metrics_that_are_not_there_are_known_before_retrieval(study, vlm, dual_encoder, tmp_path, monkeypatch):
    for package in ("RaTEScore", "radeval"):
        monkeypatch.setitem(sys.modules, package, None)
    arguments = ["all", "-m", vlm, "--dual-encoder", dual_encoder, "-d", study, "-o", tmp_path / "out"]
    result = run(*arguments, "--cases", "2", "--max-new-tokens", "2", "--metrics", "bleu_1,ratescore")
    assert result.exit_code == 2 and "pip install RaTEScore" in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_published_figures_stand_beside_scores_on_m3d_alone(study, tmp_path):
    m3d = tmp_path / "m3d"
    m3d.mkdir()
    for name in ("M3D_Cap_npy", "M3D-VQA"):
        (m3d / name).symlink_to(study / name)
    answers = tmp_path / "answers.jsonl"
    assert run("references", answers, "-d", m3d, "--tasks", "closed_vqa").exit_code == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({"id": row["id"], "prediction": "A."}) + "\n" for row in rows))
    arguments = ["vqa", "-d", m3d, "-o", tmp_path / "out", "--predictions", answers, "--tasks", "closed_vqa"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "| Med3DVLM | published [1] |" in result.stdout and "arXiv 2503.20047" in result.stdout
    assert "closed questions. Accuracy by type of question" in result.stdout  # what the file does not have
    note = "Published figures are of M3D's official test split; it was not checked whether these data are that."
    assert note in result.stdout and note in (tmp_path / "out" / "tables" / "closed_vqa.md").read_text()
    # Nor beside data in splits that `med3dvlm prepare` drew, whatever they are called; those of an index may be M3D's, and so may
    # those of which an earlier version kept no record.
    own = tmp_path / "own"
    (own / "M3D_Cap_npy").mkdir(parents=True)
    for entry in (study / "M3D_Cap_npy").iterdir():
        (own / "M3D_Cap_npy" / entry.name).symlink_to(entry)
    (own / "M3D-VQA").symlink_to(study / "M3D-VQA")
    for splits, is_comparable in ({"index": "ab"}, True), ({"fractions": {}, "seed": 0}, False), (None, True):
        (own / "M3D_Cap_npy" / "preparation_report.json").write_text(json.dumps({"splits": splits}))
        assert is_m3d(str(own)) is is_comparable
        (own / "preparation_report.json").write_text(json.dumps({"splits": splits}))  # of volumes elsewhere
        assert is_m3d(str(own)) is is_comparable
        (own / "preparation_report.json").unlink()
    drawn = {"splits": {"fractions": {}, "seed": 0}}
    (own / "M3D_Cap_npy" / "preparation_report.json").write_text(json.dumps(drawn))
    result = run(*arguments[:2], own, "-o", tmp_path / "drawn", *arguments[5:])
    assert result.exit_code == 0 and "published" not in result.stdout, result.output
    # They are of the test, and stand beside nothing else.
    assert run("references", answers, "-d", m3d, "--tasks", "closed_vqa", "--split", "validation").exit_code == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({**row, "prediction": "A."}) + "\n" for row in rows))
    result = run(*arguments[:4], tmp_path / "validation", *arguments[5:], "--split", "validation")
    assert result.exit_code == 0 and "published" not in result.stdout, result.output


def test_the_model_is_loaded_in_the_precision_that_is_asked_for(study, vlm, tmp_path, monkeypatch):
    from med3dvlm.train.evaluation import runner

    load, loaded = runner.load_for_evaluation, []
    monkeypatch.setattr(runner, "load_for_evaluation", lambda *args: loaded.append(load(*args)) or loaded[-1])
    arguments = ["vqa", "-m", vlm, "-d", study, "-o", tmp_path / "out", "--tasks", "closed_vqa", "--no-blind"]
    arguments += ["--cases", "2", "--max-new-tokens", "2", "--device", "cpu"]
    result = run(*arguments, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    ((model, _),) = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["work"]["dtype"] == "bfloat16"


def test_files_of_answers_come_with_the_control_published_figures_and_no_names(study, tmp_path):
    references = tmp_path / "references.jsonl"
    assert run("references", references, "-d", study, "--tasks", "closed_vqa").exit_code == 0
    rows = [json.loads(line) for line in references.read_text().splitlines()]
    assert {row["answer_choice"] for row in rows} > {"A"}
    for name in ("right", "blind"):
        answers = [{"id": row["id"], "prediction": row["answer_choice"] if name == "right" else "A."} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    figure = {"table": "Table 7", "task": "closed_vqa", "system": "Somebody", "metric": "accuracy", "group": "plane"}
    figures = {"sources": {"a": "A 2025"}, "scores": [{**figure, "value": 0.431, "source": "a"}]}
    (tmp_path / "published.json").write_text(json.dumps(figures))
    arguments = ["vqa", "-d", study, "--tasks", "closed_vqa", "--predictions", tmp_path / "right.jsonl", "-o"]
    options = ["--blind-predictions", tmp_path / "blind.jsonl", "--published", tmp_path / "published.json"]
    result = run(*arguments, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    (accuracy,) = (
        score
        for score in json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
        if (score["metric"], score["group"]) == ("accuracy", "all")
    )
    share = sum(row["answer_choice"] == "A" for row in rows) / len(rows)
    assert accuracy["value"] == 1 and accuracy["blind"] == pytest.approx(share)
    assert "Somebody" in result.stdout and "43.1" in result.stdout and "A 2025" in result.stdout

    page = (tmp_path / "out" / "report.html").read_text()
    cases = {row["case"] for row in rows}
    assert cases and not any(case in page for case in cases) and "names of cases" not in page
    result = run(*arguments, tmp_path / "out", *options, "--show-case-names")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert any(case in page for case in cases) and "names of cases" in page


def test_the_encoder_of_bertscore_can_be_chosen(study, tmp_path, monkeypatch):
    asked = []

    class Scorer:
        _tokenizer = SimpleNamespace(model_max_length=512)

        def __init__(self, **settings):
            asked.append((settings["model_type"], settings["num_layers"]))

        def score(self, candidates, references, batch_size):
            return None, None, torch.full((len(candidates),), 0.25)

    monkeypatch.setattr("bert_score.BERTScorer", Scorer)
    answers = tmp_path / "answers.jsonl"
    assert run("references", answers, "-d", study, "--tasks", "report").exit_code == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({"id": row["id"], "prediction": "A cyst."}) + "\n" for row in rows))
    arguments = ["report", "-d", study, "-o", tmp_path / "out", "--predictions", answers, "--metrics", "bertscore"]
    result = run(*arguments, "--bertscore-model", "bert-base-uncased", "--bertscore-layers", "7")
    assert result.exit_code == 0, result.output
    assert asked == [("bert-base-uncased", 7)]
    assert "BERTScore's encoder: bert-base-uncased, layer 7; not comparable with figures of roberta-large." in (
        result.stdout
    )


def test_a_study_with_reports_alone_has_no_part_of_questions(study, vlm, tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()
    (reports / "M3D_Cap_npy").symlink_to(study / "M3D_Cap_npy")
    assert run("references", tmp_path / "references.jsonl", "-d", reports).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "references.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"report"}
    options = ["--cases", "2", "--max-new-tokens", "2", "--metrics", "bleu_1"]
    result = run("all", "-m", vlm, "-d", reports, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0 and "no questions in the split 'test'" in result.stderr, result.output


def test_a_data_set_has_the_name_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "lung study").mkdir()
    monkeypatch.chdir(tmp_path / "lung study")
    for data in (".", "manifest.csv", tmp_path / "lung study", "../lung study/manifest.jsonl", "../lung study/"):
        assert commands.name_of_data(str(data)) == "lung study"


def test_wrong_settings_are_known_before_processes_are_started(study, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "launch", lambda *_: pytest.fail("processes were started"))
    for part, source in (("retrieval", "--embeddings"), ("report", "--predictions"), ("vqa", "--predictions")):
        for wrong, message in (
            (["-d", tmp_path / "nowhere"], "nowhere: there is no such study"),
            (["-d", study, "--dtype", "int8"], "--dtype: expected one of auto"),
        ):
            result = run(part, source, "p", "-o", tmp_path / "out", "--processes", "2", "--device", "cpu", *wrong)
            assert result.exit_code == 2 and message in result.stderr, result.output


def test_results_go_into_the_card(study, vlm, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(vlm, model)
    options = ["-m", model, "-d", study, "--cases", "2", "--max-new-tokens", "2"]
    assert run("vqa", *options, "-o", tmp_path / "vqa", "--tasks", "closed_vqa").exit_code == 0
    assert run("report", *options, "-o", tmp_path / "report", "--metrics", "bleu_1").exit_code == 0
    result = run("card", model, tmp_path / "vqa", tmp_path / "report", "--dataset-name", "Drawn phantoms")
    assert result.exit_code == 0, result.output
    results = ModelCard.load(model / "README.md").data.eval_results
    assert {entry.dataset_type for entry in results} == {"Drawn-phantoms"}
    assert {entry.metric_type for entry in results} == {"accuracy", "bleu", "exact_match"}
    names = {entry.metric_name for entry in results if entry.metric_type == "bleu"}
    assert names == {"BLEU-1 (all)", "BLEU-4 of the corpus (all)"}
    assert all(entry.dataset_args == {"num_cases": 2} for entry in results)
    text = (model / "README.md").read_text()
    assert "| Accuracy | all |" in text and "| BLEU-1 | all |" in text
    assert text.count("**Only the first 2 cases of the split 'test' were scored.**") == 2
    result = run("card", model, tmp_path / "vqa", "--dataset-name", "Drawn phantoms", "--dataset", "org/phantoms")
    assert result.exit_code == 0, result.output
    results = ModelCard.load(model / "README.md").data.eval_results
    assert {(entry.dataset_name, entry.dataset_type) for entry in results} >= {("Drawn phantoms", "org/phantoms")}
    old = run("card", model, tmp_path / "vqa", "--dataset-id", "org/phantoms")
    assert old.exit_code == 2 and "No such option" in old.stderr and "--dataset-name" in old.stderr
    missing = run("card", model, tmp_path / "nowhere")
    assert missing.exit_code == 2 and "there are no scores" in missing.stderr


def test_scores_of_other_weights_are_kept_out_of_the_card(study, vlm, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(vlm, model)
    (model / "conversion.json").write_text("{}")
    options = ["-d", study, "--tasks", "closed_vqa", "--cases", "2", "--max-new-tokens", "2", "--no-blind"]
    assert run("vqa", "-m", model, *options, "-o", tmp_path / "vqa").exit_code == 0
    card = (model / "README.md").read_bytes()
    weights = load_file(model / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in weights.items()}

    def refuse(evaluation, message):
        result = run("card", model, tmp_path / "vqa", evaluation)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
        assert f"Evaluate the folder (--model {model})" in result.stderr and (model / "README.md").read_bytes() == card

    (model / "conversion.json").unlink()  # no answer depends on it
    assert run("card", model, tmp_path / "vqa").exit_code == 0
    (model / "README.md").write_bytes(card)
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})  # as after `merge --overwrite`
    refuse(tmp_path / "vqa", f"{tmp_path / 'vqa'}: its scores are of another model than the one in {model}: ")
    refuse(tmp_path / "vqa", ": model.safetensors differs.")
    shutil.copy(model / "model.safetensors", model / "model-2.safetensors")
    refuse(tmp_path / "vqa", ": model-2.safetensors, model.safetensors differ.")
    (model / "model-2.safetensors").unlink()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    # What another system answered, and what a repository did.
    arguments = ["vqa", *options, "-o", tmp_path / "file", "--predictions", tmp_path / "vqa" / "predictions.jsonl"]
    assert run(*arguments).exit_code == 0
    refuse(tmp_path / "file", f"its scores are of the file predictions.jsonl, not of the model in {model}.")
    scores = json.loads((tmp_path / "vqa" / "scores.json").read_text())
    scores["settings"]["model"] = {"name": "org/med3dvlm", "sha256": {}}  # as earlier versions wrote it
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "scores.json").write_text(json.dumps(scores))
    refuse(tmp_path / "hub", "its scores are of the repository org/med3dvlm, of whose files they say nothing")
    missing = run("card", tmp_path / "nowhere", tmp_path / "vqa")
    assert missing.exit_code == 2 and "nowhere: expected the folder of a published model" in missing.stderr


def test_adapters_and_other_kinds_are_refused_before_any_work(study, vlm, dual_encoder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for model, encoder, message in (
        (adapter, dual_encoder, f"Merge it first: `med3dvlm merge {adapter} FOLDER`"),
        (vlm, adapter, f"Merge it first: `med3dvlm merge {adapter} FOLDER`"),
        (dual_encoder, dual_encoder, "expected a Med3DVLMForConditionalGeneration, got a model of the type"),
        (vlm, vlm, "expected a DCFormerSiglipModel, got a model of the type 'med3dvlm'"),
    ):
        result = run("all", "-m", model, "--dual-encoder", encoder, "-d", study, "-o", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr, result.output
    labels = study / "labels.csv"
    for arguments in (
        ["vqa", "-d", study],
        ["retrieval", "-d", study],
        ["dependence", "-d", study],
        ["zero-shot", "--labels", labels],
    ):
        result = run(*arguments, "-m", adapter, "-o", tmp_path / "out")
        assert result.exit_code == 2 and "Merge it first: `med3dvlm merge" in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_scores_of_texts_in_another_language_say_what_they_are_worth(tmp_path):
    manifest = write_example_manifest(tmp_path / "study")
    rows = list(csv.DictReader(manifest.open(newline="")))
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "case", "split", "report"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "split": "test", "report": "Ödem der Füße."} for row in rows if row["report"])
    answers = tmp_path / "answers.jsonl"
    study = manifest.parent  # of a user: no published figure is on it
    assert run("references", answers, "-d", study).exit_code == 0
    asked = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({"id": row["id"], "prediction": row["reference"]}) + "\n" for row in asked))
    out = tmp_path / "out"
    result = run("report", "-d", study, "-o", out, "--predictions", answers, "--metrics", "rouge_1")
    assert result.exit_code == 0 and "published" not in result.stdout, result.output
    (note,) = json.loads((out / "scores.json").read_text())["notes"]
    assert note.startswith("27.3 % of the letters of the true texts are none of A to Z")
    assert 'ROUGE takes all but a to z and digits for spaces, so that "Ödem" counts as "dem"' in note
    assert "BLEU splits" in note and "METEOR" not in note and "BERTScore" not in note
    assert f"**{note}**" in result.stdout and f"**{note}**" in (out / "README.md").read_text()


def test_zero_shot_and_dependence_write_folders(study, dual_encoder, tmp_path):
    labels = study / "labels.csv"
    result = run("zero-shot", "-m", dual_encoder, "--labels", labels, "-o", tmp_path / "zero", "--json")
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "zero" / "zero_shot.json").read_text())
    assert saved == json.loads(result.stdout) and "AUROC" in (tmp_path / "zero" / "README.md").read_text()
    settings = saved["settings"]
    assert settings["model"]["sha256"] and settings["labels"]["sha256"] and len(settings["prompts"]) > 1
    assert settings["split"] == "test" and settings["dtype"] == "auto" and "torch" in saved["versions"]
    again = run("zero-shot", "-m", dual_encoder, "--labels", labels, "-o", tmp_path / "zero", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == saved, again.output
    other = ["--rule", "against negatives"]
    result = run("zero-shot", "-m", dual_encoder, "--labels", labels, "-o", tmp_path / "zero", *other)
    assert result.exit_code == 2 and "holds an evaluation with other settings (rule)" in result.stderr
    result = run("dependence", "-m", dual_encoder, "-d", study, "-o", tmp_path / "dependence", "--cases", "40")
    assert result.exit_code == 0, result.output
    assert {
        row["change"] for row in json.loads((tmp_path / "dependence" / "dependence.json").read_text())["rows"]
    } == {
        "other case",
        "blank",
        "shuffled",
        "mirrored",
        "shifted",
    }
    content = json.loads((tmp_path / "dependence" / "dependence.json").read_text())
    settings = content["settings"]
    assert (settings["num_cases"], settings["seed"], settings["data"]) == (40, 0, str(study))
    assert content["num_cases"] == 6  # the split has no more
    result = run("card", dual_encoder, tmp_path / "zero")
    assert result.exit_code == 2 and "zero_shot.json does not go into cards" in result.stderr

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    for arguments in (["zero-shot", "--labels", labels], ["dependence", "-d", study]):
        result = run(*arguments, "-m", dual_encoder, "-o", notes)
        assert result.exit_code == 2 and "it holds something else" in result.stderr, result.output
    assert (notes / "README.md").read_text() == "mine" and len(list(notes.iterdir())) == 1
    for folder, arguments in (
        ("zero", ["zero-shot", "--labels", labels]),
        ("dependence", ["dependence", "-d", study]),
    ):
        begun = (tmp_path / folder / "run.json").read_bytes()
        with only_one_at(tmp_path / folder / LOCK, "held"):
            result = run(*arguments, "-m", dual_encoder, "-o", tmp_path / folder)
        assert result.exit_code == 2 and "another call is evaluating into this folder" in result.stderr, result.output
        assert (tmp_path / folder / "run.json").read_bytes() == begun


def test_a_mistyped_rule_is_known_before_the_folder_is_begun(study, dual_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(one_process, "load_for_evaluation", lambda *arguments: pytest.fail("loaded"))
    labels = study / "labels.csv"
    arguments = ["zero-shot", "-m", dual_encoder, "--labels", labels, "-o", tmp_path / "out"]
    result = run(*arguments, "--rule", "softmax")
    assert result.exit_code == 2 and "Expected a rule out of 'sigmoid', " in result.stderr, result.output
    assert "got 'softmax'" in result.stderr and not (tmp_path / "out").exists()


def test_what_cannot_be_split_refuses_several_processes(study, dual_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "start_processes", lambda work: SimpleNamespace(num_processes=2))
    labels = study / "labels.csv"
    for arguments in (["zero-shot", "--labels", labels], ["dependence", "-d", study]):
        result = run(*arguments, "-m", dual_encoder, "-o", tmp_path / "out")
        assert (
            result.exit_code == 2
            and "Expected one process, got 2: this evaluation cannot be split between processes" in result.stderr
        ), result.output
        assert "without torchrun or accelerate" in result.stderr and not (tmp_path / "out").exists()


def test_dependence_compares_the_texts_of_reports(study, vlm, tmp_path):
    arguments = ["dependence", "-m", vlm, "-d", study, "-o", tmp_path / "out", "--cases", "2", "--max-new-tokens", "3"]
    result = run(*arguments, "--tasks", "report")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "dependence.json").read_text())
    assert {"bleu_1", "rouge_1", "exact"} <= {row["metric"] for row in content["rows"]}
    assert content["settings"]["max_new_tokens"] == 3
    result = run(*arguments, "--tasks", "report", "--seed", "1")
    assert result.exit_code == 2 and "other settings (seed)" in result.stderr


def test_dependence_needs_no_package_of_zero_shot_alone(study, dual_encoder, tmp_path, monkeypatch):
    for name in ("omegaconf", "sklearn", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("one_process", "zero_shot"):
        monkeypatch.delitem(sys.modules, f"{evaluation.__name__}.{name}")
        monkeypatch.setattr(evaluation, name, None, raising=False)  # put back with the module
    arguments = ["-m", dual_encoder, "-o", tmp_path / "out"]
    result = run("dependence", *arguments, "-d", study, "--cases", "2")
    assert result.exit_code == 0, result.output
    result = run("zero-shot", *arguments, "--labels", study / "labels.csv")
    assert result.exit_code == 2 and "Missing packages: omegaconf" in result.stderr, result.output


def test_labels_of_ones_own_need_prompts_of_ones_own(dual_encoder, tmp_path):
    (tmp_path / "labels.csv").write_text("image,nodule\na.nii.gz,1\n")
    result = run("zero-shot", "-m", dual_encoder, "--labels", tmp_path / "labels.csv", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "no column for " in result.stderr, result.output
    assert "Add the column, or give prompts for those that it has (--prompts)" in " ".join(result.stderr.split())


def test_blanks_between_names_do_not_count():
    assert commands.read_names("--tasks", "closed_vqa, open_vqa ,report") == ("closed_vqa", "open_vqa", "report")
    for text, problem in (("a, b,a", "'a' stands there twice"), ("a,,b", "one is empty"), ("", "one is empty")):
        with pytest.raises(
            ValueError, match=f"--metrics: expected names with commas between them, got '{text}': {problem}"
        ):
            commands.read_names("--metrics", text)


def test_thresholds_are_chosen_on_cases_of_the_validation(study, dual_encoder, tmp_path):
    def labels(split):
        path = tmp_path / f"{split}.csv"
        write_labels([json.loads(line) for line in (study / "phantoms.jsonl").open()], path, split)
        header, *rows = list(csv.reader(path.open(newline="")))
        with path.open("w", newline="") as file:  # by case alone
            csv.writer(file).writerows([header[1:], *(row[1:] for row in rows)])
        return path

    arguments = ["zero-shot", "-m", dual_encoder, "-d", study, "--labels", labels("test")]
    result = run(*arguments, "--validation", labels("validation"), "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["validation"]["name"] == "validation.csv"
    result = run(*arguments, "--validation", labels("test"), "-o", tmp_path / "other")
    assert result.exit_code == 2 and "is not among the 1 cases of the data" in result.stderr, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqa"], "Expected either --model or --predictions."),
        (["vqa", "-m", "nowhere/at/all"], "there is no such folder"),
        (["vqa", "--predictions", "p", "--tasks", "guess"], "task: expected one of report, closed_vqa"),
        (
            ["report", "--predictions", "p", "--split", "val"],
            "--split: expected one of train, validation, test, got 'val'",
        ),
        (
            ["vqa", "--predictions", "p", "--split", "val"],
            "--split: expected one of train, validation, test, got 'val'",
        ),
        (["report", "--predictions", "p", "--dtype", "int8"], "--dtype: expected one of auto"),
        (["retrieval", "--embeddings", "p", "--device", "abacus"], "--device abacus: it cannot be used here"),
        (["all", "--dual-encoder", "x"], "Expected --model"),
        (["vqa", "--predictions", "p", "--tasks", "closed_vqa,report"], "`evaluate vqa` asks questions, got report."),
        (["vqa", "--predictions", "p", "--tasks", "open_vqa,open_vqa"], "--tasks: expected names with commas"),
        (["report", "--predictions", "p", "--metrics", "bleu_1,bleu_1"], "--metrics: expected names with commas"),
    ],
)
def test_wrong_use_is_one_line(study, tmp_path, arguments, message):
    result = run(*arguments, "-d", study, "-o", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output


@pytest.mark.parametrize("arguments", [["all", "-m"], ["vqa", "-m"], ["report", "-m"]])
def test_mistyped_metrics_are_known_before_processes_are_started(study, vlm, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(commands, "start_processes_if_needed", lambda *_: pytest.fail("started"))
    result = run(*arguments, vlm, "-d", study, "-o", tmp_path / "out", "--metrics", "bleu_1,,meteor")
    assert result.exit_code == 2 and "'bleu_1,,meteor': one is empty" in result.stderr, result.output


def options_of(name):
    """The options of a command of `evaluate`, by their names in Python."""
    return {option.name: option for option in typer.main.get_command(app).commands["evaluate"].commands[name].params}


def test_options_say_what_they_are_of():
    for name, lengths, batches in (
        ("zero-shot", "Most tokens of a prompt.", "Volumes, or prompts, at a time."),
        ("dependence", "Most tokens of a report, for a dual encoder.", "Questions, or pairs, at a time."),
        ("retrieval", "Tokens of a report in retrieval.", "Questions, or pairs, at a time."),
    ):
        options = options_of(name)
        assert (options["max_text_length"].help, options["batch_size"].help) == (lengths, batches)
        assert options["out"].opts == ["--output", "--out", "-o"]
    for name in ("report", "vqa", "all"):
        assert options_of(name)["metrics"].default == ",".join(TEXT_METRICS)


@pytest.mark.parametrize("command", [["card", "model", "evaluation"], ["references", "out.jsonl", "-d", "study"]])
def test_missing_packages_are_named_with_what_installs_them(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = run(*command)
    assert result.exit_code == 2 and "accelerate" in result.stderr and "pip install" in result.stderr, result.output


def test_references_are_written_without_the_packages_of_metrics(study, tmp_path, monkeypatch):
    for name in ("bert_score", "evaluate", "nltk", "rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    command = ["-d", study, "--tasks", "closed_vqa"]
    result = run("references", tmp_path / "references.jsonl", *command)
    assert result.exit_code == 0 and result.stdout.endswith("30 lines\n"), result.output
    result = run("vqa", *command, "-o", tmp_path / "out", "--predictions", "p")
    assert result.exit_code == 2 and "bert_score" in result.stderr, result.output
