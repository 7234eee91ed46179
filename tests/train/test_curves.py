"""Curves of a run: what is drawn together, what the table holds, and logs that are not perfect."""

import csv
import math
import os

import pytest

from med3dvlm.train import curves
from med3dvlm.train.curves import arrange_panels, find_chance, read_series, running_mean, save_curves


def train_entry(step, loss=1.0):
    return {"loss": loss, "grad_norm": 2.0, "learning_rate": 1e-4, "epoch": step / 10, "step": step}


def read_table(folder):
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_picture_and_table_of_a_run_with_evaluation(tmp_path):
    log = [train_entry(step, 3 / step) for step in range(1, 81)]  # enough for the running mean
    log.insert(4, {"eval_loss": 0.9, "eval_plane_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 0.4, "step": 4})
    log.append({"train_runtime": 3.0, "train_loss": 1.2, "step": 80})
    written = save_curves(log, tmp_path / "new" / "folder", "A run")
    assert written == [tmp_path / "new" / "folder" / name for name in ("curves.png", "curves.csv")]
    assert sorted(written[0].parent.iterdir()) == sorted(written)  # no temporary file is left
    width, height = read_png_size(written[0])
    assert width > height > 700  # two rows of panels
    table = read_table(written[0].parent)
    assert [int(row["step"]) for row in table] == list(range(1, 81))
    assert float(table[3]["eval_plane_accuracy"]) == 0.5 and table[2]["eval_plane_accuracy"] == ""
    assert [float(row["loss"]) for row in table] == [3 / step for step in range(1, 81)]  # to the last bit
    assert "train_loss" not in table[0]


def test_panels_hold_what_belongs_together():
    values = {1: 0.5}
    names = ["loss", "eval_loss", "eval_real_loss", "learning_rate", "grad_norm", "eval_plane_accuracy", "eval_chance"]
    names += ["eval_organ_accuracy", "eval_text_to_image_recall_at_1", "eval_bleu1", "eval_runtime", "epoch"]
    assert arrange_panels(dict.fromkeys(names, values)) == {
        "loss": ["loss", "eval_loss", "eval_real_loss"],
        "learning rate": ["learning_rate"],
        "gradient norm": ["grad_norm"],
        "accuracy (%)": ["eval_plane_accuracy", "eval_organ_accuracy"],
        "recall (%)": ["eval_text_to_image_recall_at_1"],
        "bleu1": ["eval_bleu1"],
    }


def test_a_value_above_one_is_not_taken_for_a_share():
    assert arrange_panels({"eval_accuracy": {1: 0.5, 2: 3.0}}) == {"accuracy": ["eval_accuracy"]}


def test_chance_is_that_of_the_metric_before_that_of_all():
    series = {"eval_chance": {1: 0.25}, "eval_yes_no_accuracy_chance": {1: 0.4, 2: 0.5}}
    assert find_chance("eval_yes_no_accuracy", series) == 0.5
    assert find_chance("eval_plane_accuracy", series) == 0.25
    assert find_chance("eval_recall_at_1", series) is None
    series["eval_chance_recall_at_1_of_16"] = {1: 0.07}
    assert find_chance("eval_text_to_image_recall_at_1_of_16", series) == 0.07
    assert find_chance("eval_text_to_image_recall_at_1_of_160", series) is None
    assert "eval_chance_recall_at_1_of_16" not in str(arrange_panels(series))
    series["eval_chance_deduplicated_recall_at_1_of_16"] = {1: 0.09}
    assert find_chance("eval_text_to_image_deduplicated_recall_at_1_of_16", series) == 0.09
    assert find_chance("eval_text_to_image_recall_at_1_of_16", series) == 0.07


def test_a_share_and_its_chance_are_drawn_in_percent():
    from matplotlib.figure import Figure

    series = {"eval_plane_accuracy": {1: 0.3, 2: 0.75}, "eval_chance": {1: 0.25, 2: 0.25}}
    axes = Figure().add_subplot()
    curves.draw_panel(axes, "accuracy (%)", ["eval_plane_accuracy"], series)
    drawn, chance = axes.get_lines()
    assert list(drawn.get_ydata()) == [30, 75] and set(chance.get_ydata()) == {25}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["plane accuracy", "chance 25 %"]


def test_of_a_repeated_step_the_later_entry_counts_and_steps_are_in_order(tmp_path):
    log = [train_entry(1), train_entry(2), train_entry(3, 9.0), train_entry(2, 0.5)]
    assert read_series(log)["loss"] == {1: 1.0, 2: 0.5, 3: 9.0}
    save_curves(log, tmp_path, "Resumed")
    assert [(row["step"], row["loss"]) for row in read_table(tmp_path)] == [("1", "1.0"), ("2", "0.5"), ("3", "9.0")]


def test_of_two_validations_at_one_step_the_first_counts():
    log = [train_entry(4), {"eval_loss": 0.9, "epoch": 0.4, "step": 4}, {"eval_loss": 0.5, "epoch": 0.4, "step": 4}]
    assert read_series(log)["eval_loss"] == {4: 0.9}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_no_number_are_gaps_in_the_picture_and_named(bad, tmp_path):
    from matplotlib.figure import Figure

    log = [train_entry(1), train_entry(2, bad), train_entry(3)]
    axes = Figure().add_subplot()
    curves.draw_panel(axes, "loss", ["loss"], read_series(log))
    assert math.isnan(axes.get_lines()[0].get_ydata()[1])
    assert [text.get_text() for text in axes.texts] == ["loss: NaN or infinite 1 times, first at step 2"]
    save_curves(log, tmp_path, "Broken")
    assert read_table(tmp_path)[1]["loss"] == str(bad)


def test_a_log_with_evaluation_alone_or_a_single_step_is_drawn(tmp_path):
    assert save_curves([{"eval_bleu1": 0.2, "step": 5}], tmp_path / "evaluation", "Evaluation")
    assert save_curves([train_entry(1)], tmp_path / "training", "Training")


@pytest.mark.parametrize(
    "log", [[], [{"train_runtime": 3.0, "train_loss": 1.2, "step": 80}], [{"epoch": 1, "step": 2}]]
)
def test_an_empty_log_writes_nothing(log, tmp_path):
    assert save_curves(log, tmp_path / "curves", "Nothing") == []
    assert not (tmp_path / "curves").exists()


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    save_curves([train_entry(1)], tmp_path, "Old")
    before = (tmp_path / "curves.csv").read_text()

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_curves([train_entry(1), train_entry(2)], tmp_path, "New")
    assert (tmp_path / "curves.csv").read_text() == before


def test_the_running_mean_leaves_out_what_is_no_number():
    assert running_mean([0, 2, 4, math.nan], 2) == [0, 1, 3, 4]
