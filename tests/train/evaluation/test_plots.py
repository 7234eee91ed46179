"""Pictures of an evaluation: what they show, and what they refuse."""

import random

import pytest

from med3dvlm.train.evaluation import plots
from med3dvlm.train.evaluation.plots import (
    CalibrationBin,
    RecallCurve,
    calibration_bins,
    draw_calibration,
    draw_recall_curves,
    draw_type_bars,
    expected_calibration_error,
)
from med3dvlm.train.evaluation.scores import Score


NAN = float("nan")
SCORES = [
    Score("closed_vqa", "accuracy", "plane", 0.9, 0.8, 0.95, 40, blind=0.3, chance=0.25),
    Score("closed_vqa", "accuracy", "organ", 0.5, 0.4, 0.6, 60, blind=0.28, chance=0.25),
    Score("closed_vqa", "accuracy", "mean of types", 0.7, NAN, NAN, 100, blind=0.29, chance=0.25),
    Score("closed_vqa", "original_accuracy", "plane", 0.02, 0.0, 0.05, 40),
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look into."""
    saved = []
    save = plots.save_png

    def keep(figure, path):
        saved.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_png", keep)
    return saved


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bars_show_scores_intervals_blind_chance_and_published_figures(tmp_path, figures):
    path = draw_type_bars(SCORES, tmp_path / "new" / "bars.png", {"accuracy": {"organ": 0.61}})
    assert is_png(path) and list(path.parent.iterdir()) == [path]  # no temporary file is left
    first, second = figures[0].axes
    heights = [patch.get_height() for patch in first.patches]
    assert heights == pytest.approx([90, 30, 50, 28, 70, 29])
    assert sorted(legend_of(first)) == ["blind control", "chance", "model", "published"]
    (whiskers,) = [entry for entry in first.containers if entry.__class__.__name__ == "ErrorbarContainer"][:1]
    assert whiskers[2][0].get_segments()[0][:, 1] == pytest.approx([80, 95])
    drawn = [entry for entry in first.containers if entry.__class__.__name__ == "ErrorbarContainer"]
    assert len(drawn) == 2  # none where the ends are NaN
    (marker,) = [line for line in first.lines if line.get_marker() == "D"]
    assert marker.get_ydata() == pytest.approx([61])
    assert [label.get_text() for label in first.get_xticklabels()] == [
        "plane\nn = 40",
        "organ\nn = 60",
        "mean of types\nn = 100",
    ]
    assert legend_of(second) == ["model"]
    assert (first.get_title(), second.get_title()) == ("accuracy", "accuracy, original rule")
    for axes in (first, second):
        assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "score (%)" and axes.get_xlabel()


def test_bars_below_zero_are_not_cut_off(tmp_path, figures):
    draw_type_bars([Score("report", "bertscore", "all", -0.1, -0.2, 0.0, 3)], tmp_path / "bars.png")
    assert figures[0].axes[0].get_ylim()[0] == pytest.approx(-22)


@pytest.mark.parametrize(
    "scores, published, message",
    [
        ([], None, "of one task to draw, got none"),
        ([SCORES[0], Score("report", "meteor", "all", 0.5, NAN, NAN, 1)], None, "got closed_vqa, report"),
        ([SCORES[0], SCORES[0]], None, "accuracy of plane occurs twice"),
        ([Score("report", "meteor", "all", 50.0, NAN, NAN, 1)], None, r"within \[-1, 1\], got 50.0 for meteor of all"),
        ([Score("report", "meteor", "all", NAN, NAN, NAN, 1)], None, "got nan"),
        (SCORES, {"accuracy": {"phase": 0.5}}, "for phase, but scores only for plane, organ"),
        (SCORES, {"meteor": {"plane": 0.5}}, "'meteor' for plane, but scores only for other metrics"),
    ],
)
def test_bars_refuse_what_cannot_be_drawn(tmp_path, scores, published, message):
    with pytest.raises(ValueError, match=message):
        draw_type_bars(scores, tmp_path / "bars.png", published)
    assert not list(tmp_path.iterdir())


def test_recall_curves_show_each_direction_and_size_with_blind_and_chance(tmp_path, figures):
    curves = [
        RecallCurve("image_to_text", 4, {4: 1.0, 1: 0.5, 2: 0.75}, blind={1: 0.2, 4: 1.0}),
        RecallCurve("image_to_text", 100, {1: 0.1, 100: 1.0}),
        RecallCurve("text_to_image", 4, {1: 0.4}),
    ]
    path = draw_recall_curves(curves, tmp_path / "recall.png")
    assert is_png(path)
    first, second = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in first.lines}
    assert lines["gallery of 4"] == [[1, 50], [2, 75], [4, 100]]
    assert lines["gallery of 4, blind"] == [[1, 20], [4, 100]]
    assert lines["gallery of 4, chance"] == [[1, 25], [2, 50], [3, 75], [4, 100]]
    assert lines["gallery of 100, chance"] == [pytest.approx([rank, rank]) for rank in range(1, 101)]
    assert "gallery of 100, blind" not in lines
    colors = {line.get_label(): line.get_color() for line in [*first.lines, *second.lines]}
    assert colors["gallery of 4"] == colors["gallery of 4, blind"] != colors["gallery of 100"]
    assert (first.get_title(), second.get_title()) == ("image to text", "text to image")
    assert first.get_ylim()[0] == 0 and "%" in first.get_ylabel() and "rank k" in first.get_xlabel()


@pytest.mark.parametrize("recalls", [{0: 0.5}, {5: 0.5}, {1: 1.5}, {1: NAN}])
def test_recall_curves_refuse_ranks_and_shares_that_cannot_be(recalls):
    with pytest.raises(ValueError, match=r"ranks from 1 to the size of the gallery, 4, got"):
        RecallCurve("image_to_text", 4, recalls)


def test_recall_curves_refuse_none_and_repeated_ones(tmp_path):
    with pytest.raises(ValueError, match="at least one recall curve"):
        draw_recall_curves([], tmp_path / "recall.png")
    with pytest.raises(ValueError, match="image_to_text with a gallery of 4 occurs twice"):
        draw_recall_curves([RecallCurve("image_to_text", 4, {1: 0.5})] * 2, tmp_path / "recall.png")
    with pytest.raises(ValueError, match="gallery of 4 is empty"):
        RecallCurve("image_to_text", 4, {})


def test_bins_equal_the_plain_formula():
    generator = random.Random(0)
    trust = [generator.random() for _ in range(103)]
    hits = [float(generator.random() < value) for value in trust]
    bins = calibration_bins(trust, hits, 10)
    order = sorted(range(103), key=lambda place: trust[place])
    expected: dict[int, list[int]] = {}
    for rank, place in enumerate(order):
        expected.setdefault(rank * 10 // 103, []).append(place)
    assert [entry.count for entry in bins] == [len(places) for places in expected.values()]
    assert {entry.count for entry in bins} == {10, 11}
    error = 0.0
    for entry, places in zip(bins, expected.values()):
        confidence, accuracy = (sum(values[place] for place in places) / len(places) for values in (trust, hits))
        assert (entry.confidence, entry.accuracy) == pytest.approx((confidence, accuracy))
        error += len(places) / 103 * abs(accuracy - confidence)
    assert expected_calibration_error(bins) == pytest.approx(error)
    assert 0 < error < 0.2


def test_order_of_answers_does_not_matter_where_confidences_are_equal():
    trust, hits = [0.5] * 6 + [0.9, 1.0], [1, 1, 1, 0, 0, 0, 1, 1]
    bins = calibration_bins(trust, hits, 4)
    assert bins == calibration_bins(trust[::-1], hits[::-1], 4)
    assert bins[0] == CalibrationBin(0.5, 0.5, 6) and sum(entry.count for entry in bins) == 8
    assert calibration_bins([1.0, 1.0], [0, 1], 10) == [CalibrationBin(1.0, 0.5, 2)]


def test_a_calibrated_and_an_overconfident_model():
    assert expected_calibration_error([CalibrationBin(0.5, 0.5, 10), CalibrationBin(1.0, 1.0, 5)]) == 0
    assert expected_calibration_error([CalibrationBin(0.9, 0.5, 1), CalibrationBin(0.8, 1.0, 3)]) == pytest.approx(
        (0.4 + 3 * 0.2) / 4
    )


def test_calibration_shows_bins_counts_and_error(tmp_path, figures):
    trust, hits = [0.2, 0.4, 0.6, 0.8], [0, 1, 0, 1]
    path = draw_calibration(trust, hits, tmp_path / "calibration.png", title="Closed questions")
    assert is_png(path)
    upper, lower = figures[0].axes
    title = figures[0]._suptitle.get_text()
    assert title == "Closed questions\nexpected calibration error 40.0 % (4 answers)"
    (model,) = [line for line in upper.lines if line.get_label() == "model"]
    assert model.get_xydata().tolist() == [[pytest.approx(100 * x), 100 * y] for x, y in zip(trust, hits)]
    assert [text.get_text() for text in upper.texts] == ["1"] * 4
    assert sum(patch.get_height() for patch in lower.patches) == 4
    assert upper.get_ylim()[0] == 0 and lower.get_ylim()[0] == 0
    assert lower.get_xlabel() == "probability of the answer (%)"


@pytest.mark.parametrize(
    "confidences, hits, num_bins, message",
    [
        ([], [], 10, "at least one confidence"),
        ([0.5], [1, 0], 10, r"got \(2,\) for \(1,\)"),
        ([1.2], [1], 10, r"within \[0, 1\], got values from 1.2"),
        ([NAN], [1], 10, r"within \[0, 1\]"),
        ([0.5], [0.5], 10, "0 or 1, got others"),
        ([0.5], [1], 0, "at least one bin, got 0"),
    ],
)
def test_calibration_refuses_what_is_no_confidence(confidences, hits, num_bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_bins(confidences, hits, num_bins)
    with pytest.raises(ValueError, match="at least one bin, got none"):
        expected_calibration_error([])
