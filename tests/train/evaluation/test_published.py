import json

import pytest
import torch

from med3dvlm.train.evaluation.clinical import CLINICAL_METRICS
from med3dvlm.train.evaluation.predictions import Reference
from med3dvlm.train.evaluation.published import (
    METRICS_OF_TASK,
    PUBLISHED_RESULTS,
    PublishedScore,
    list_sources,
    read_missing,
    read_published,
)
from med3dvlm.train.evaluation.retrieval import score_retrieval
from med3dvlm.train.evaluation.runner import corpus_score
from med3dvlm.train.evaluation.scores import score_samples
from med3dvlm.train.evaluation.settings import TEXT_METRICS


ROW = {
    "table": "Table 1",
    "task": "closed_vqa",
    "system": "A",
    "metric": "accuracy",
    "group": "plane",
    "value": 0.5,
    "source": "a",
}


def write(folder, *rows, **content):
    path = folder / "results.json"
    path.write_text(json.dumps({"sources": {"a": "A 2025"}, "scores": list(rows), **content}))
    return path


def test_the_figures_of_the_abstract_are_there_with_their_source():
    scores = {(score.system, score.task, score.metric, score.group): score for score in read_published()}
    for key, value in {
        ("Med3DVLM", "retrieval", "recall_at_1", "direction not stated, 2000"): 0.61,
        ("M3D-LaMed", "retrieval", "recall_at_1", "direction not stated, 2000"): 0.191,
        ("Med3DVLM", "report", "meteor", "all"): 0.3642,
        ("M3D-LaMed", "report", "meteor", "all"): 0.1438,
        ("Med3DVLM", "open_vqa", "meteor", "mean of types"): 0.3676,
        ("M3D-LaMed", "open_vqa", "meteor", "mean of types"): 0.3358,
        ("Med3DVLM", "closed_vqa", "original_accuracy", "mean of types"): 0.7995,
        ("M3D-LaMed", "closed_vqa", "original_accuracy", "mean of types"): 0.7578,
    }.items():
        assert scores[key].value == value
    assert all("2503.20047" in score.source or "MedM-VL" in score.source for score in scores.values())


def test_what_was_not_found_is_listed_with_where_it_was_looked_for():
    missing = read_missing()
    for about in ("retrieval", "reports", "closed questions", "open questions", "ablations"):
        assert any(entry.table.endswith(about) and entry.tried for entry in missing)


def test_a_file_of_ones_own_is_read_in_its_order(tmp_path):
    path = write(tmp_path, ROW, {**ROW, "group": "all", "value": 1, "note": "as quoted"})
    scores = read_published(path)
    assert scores == [
        PublishedScore("Table 1", "closed_vqa", "A", "accuracy", "plane", 0.5, "A 2025"),
        PublishedScore("Table 1", "closed_vqa", "A", "accuracy", "all", 1.0, "A 2025", "as quoted"),
    ]
    assert read_missing(path) == []
    assert list_sources(scores) == ["Table 1: A 2025. as quoted"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": 61.0}, "score 1: expected a value in .0, 1., got 61.0. Divide percentages by 100"),
        ({"value": True}, "got True"),
        ({"value": "0.5"}, "got '0.5'"),
        ({"task": "vqa"}, "the task 'vqa' is not one of report, open_vqa"),
        ({"metric": "meteor"}, "the metric 'meteor' of closed_vqa is not one of accuracy, original_accuracy"),
        ({"group": "Plane"}, "the group 'Plane' is not one of plane, phase"),
        ({"task": "retrieval", "metric": "recall_at_1"}, "a group such as 'volume to report, 2000'"),
        ({"source": "b"}, "the source 'b' is not one of 'a'"),
        ({"system": ""}, "expected a text as 'system', got ''"),
        ({"page": 3}, "unknown: page"),
    ],
)
def test_a_row_that_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_published(write(tmp_path, {**ROW, **change}))


def test_a_file_of_another_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent: group, system"):
        read_published(write(tmp_path, {key: ROW[key] for key in ROW if key not in ("group", "system")}))
    with pytest.raises(ValueError, match="score 2: the same figure as score 1"):
        read_published(write(tmp_path, ROW, {**ROW, "value": 0.6}))
    with pytest.raises(ValueError, match="missing 1: expected the fields about, table, tried; absent: tried"):
        read_missing(write(tmp_path, missing=[{"table": "2", "about": "all"}]))
    with pytest.raises(ValueError, match="an object with 'sources', 'scores'"):
        read_published(write(tmp_path, extra=1))
    with pytest.raises(ValueError, match="expected a list as 'missing', got dict"):
        read_missing(write(tmp_path, missing={}))
    with pytest.raises(ValueError, match="a text for each key"):
        read_published(write(tmp_path, sources={"a": ""}))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        read_published(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError, match="no such file of published results"):
        read_published(tmp_path / "none.json")


def test_the_file_of_the_package_is_among_its_data():
    project = (PUBLISHED_RESULTS.parents[2] / "pyproject.toml").read_text()
    assert '"med3dvlm.train.evaluation" = ["published_results.json", "prompts/*.yaml"]' in project


def test_figures_of_the_abstract_say_how_the_original_asks():
    notes = {score.task: score.note for score in read_published() if score.system == "Med3DVLM"}
    assert "first 1,000 reports" in notes["report"] and "request drawn at random" in notes["report"]
    for task in ("report", "open_vqa", "closed_vqa"):
        assert "sample" in notes[task] and "decoded greedily" in notes[task]


@pytest.mark.parametrize("task", METRICS_OF_TASK)
def test_every_metric_that_may_be_published_can_be_measured(task):
    if task == "retrieval":
        scores, _ = score_retrieval(torch.eye(10), torch.eye(10), torch.arange(10), list(range(10)))
        measured = {score.metric for score in scores}
    else:
        asked = [Reference(f"{task}/000000", "a", "a.nii.gz", task, 0, "?", "A cyst.", "A")]
        names = (*TEXT_METRICS, *CLINICAL_METRICS)
        measured = set(score_samples(asked, ["A."], dict.fromkeys(names, lambda *pairs: [1.0])))
        if task in ("report", "open_vqa"):
            measured.add(corpus_score(asked, {"given": ["A cyst."]}, [""]).metric)
    assert set(METRICS_OF_TASK[task]) <= measured
