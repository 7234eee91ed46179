"""What readers look at beside tables and plots: links, and what calibration is of."""

from pathlib import PureWindowsPath

from med3dvlm.train.evaluation import presentation
from med3dvlm.train.evaluation.html_report import AnsweredTask
from med3dvlm.train.evaluation.predictions import Reference
from med3dvlm.train.evaluation.presentation import draw_answers, format_readme
from med3dvlm.train.evaluation.scores import Score


def test_links_to_plots_have_slashes_on_every_system():
    folder = PureWindowsPath("C:/out")
    result = {"system": "ours", "notes": [], "num_samples": 2, "num_cases": 2, "details": {}}
    result["settings"] = {"split": "test", "tasks": ["report"]}
    text = format_readme(result, [], {"Recall": folder / "plots" / "recall.png"}, folder)
    assert "![Recall](plots/recall.png)" in text


def test_calibration_of_closed_questions_is_of_letter_and_text(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(presentation, "draw_type_bars", lambda *arguments: tmp_path / "bars.png")
    monkeypatch.setattr(presentation, "draw_calibration", lambda *values, title: drawn.update({title: values[:2]}))
    answered = [
        (
            AnsweredTask(
                [Reference(f"{task}/000000", "a", "a.nii.gz", task, 3, "?", "spleen", letter)],
                [prediction],
                {"accuracy": [1.0]},
            ),
            [0.9],
        )
        for task, letter, prediction in (
            ("closed_vqa", "B", "B. liver"),
            ("open_vqa", "", "Spleen."),
            ("report", "", "spleen"),
        )
    ]
    scores = [Score("closed_vqa", "accuracy", "all", 1.0, 1.0, 1.0, 1)]
    draw_answers(scores, answered, tmp_path)
    assert drawn == {
        "Calibration, closed_vqa, letter and text right": ([0.9], [0.0]),
        "Calibration, open_vqa": ([0.9], [1.0]),
    }
