"""The report: one file, everything escaped, the right cases, and slices the right way round."""

import base64
import io
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from m3d_layout import write_volume
from PIL import Image

from med3dvlm.train.data.prepare import prepare_m3d_cap
from med3dvlm.train.evaluation.html_report import (
    AnsweredTask,
    case_score,
    choose_cases,
    draw_slices,
    group_by_case,
    write_html_report,
)
from med3dvlm.train.evaluation.predictions import Reference
from med3dvlm.train.evaluation.scores import Score


NUM_CASES = 9


def closed_task(num_cases=NUM_CASES, prediction="A. <script>alert(1)</script>", **options):
    """Two closed questions about each case; those about case `i` have `i / num_cases` as their score."""
    references, values = [], []
    for row in range(2 * num_cases):
        case = row // 2
        references.append(
            Reference(
                f"closed_vqa/{row:06d}", f"doe-{case}", f"{case}.nii.gz", "closed_vqa", 3, "Which & what?", "x", "B"
            )
        )
        values.append(case / num_cases)
    return AnsweredTask(references, [prediction] * len(references), {"accuracy": values}, **options)


def report_task(value, prediction="A cyst."):
    reference = Reference("report/000000", "doe-0", "0.nii.gz", "report", 0, "Describe.", "A cyst.", "")
    return AnsweredTask([reference], [prediction], {"rouge_1": [0.4], "exact": [value]})


class Volumes:
    def __init__(self):
        self.loaded = []

    def load(self, path):
        self.loaded.append(path)
        return torch.rand(8, 12, 20, generator=torch.Generator().manual_seed(0))


def write(tmp_path, *answered, **options):
    return write_html_report(tmp_path / "report.html", "A <title>", answered, **options).read_text(encoding="utf-8")


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path):
    page = write(
        tmp_path,
        closed_task(blind_predictions=["<b>blind</b>"] * 2 * NUM_CASES),
        summary=["<i>settings</i>"],
        scores=[Score("closed_vqa", "accuracy", "<organ>", 0.5, 0.4, float("nan"), 1200, blind=0.2, chance=0.25)],
    )
    assert not re.search(r"<(script|b|i|organ)>", page)
    assert "<title>A &lt;title&gt;</title>" in page and "<h1>A &lt;title&gt;</h1>" in page
    assert "A. &lt;script&gt;alert(1)&lt;/script&gt;" in page and "Which &amp; what?" in page
    assert "&lt;b&gt;blind&lt;/b&gt;" in page and "<p>&lt;i&gt;settings&lt;/i&gt;</p>" in page
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!data:)", page)
    assert (
        '<td>&lt;organ&gt;</td><td class="number">50.00</td><td class="number">40.00</td><td class="number"></td>'
        in page
    )
    assert '<td class="number">20.00</td><td class="number">25.00</td><td class="number">1,200</td>' in page
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_texts_that_are_no_unicode_are_written_all_the_same(tmp_path):
    assert "\\ud800" in write(tmp_path, closed_task(prediction="\ud800"))


def test_best_worst_and_random_cases_are_shown_once():
    cases = group_by_case([closed_task()])
    chosen = choose_cases(cases, 2, seed=0)
    assert chosen["Best"] == ["doe-8", "doe-7"] and chosen["Worst"] == ["doe-0", "doe-1"]
    assert len(chosen["Random"]) == 2 and set(chosen["Random"]) <= {f"doe-{case}" for case in range(2, 7)}
    assert chosen == choose_cases(cases, 2, seed=0)
    draws = {tuple(choose_cases(cases, 2, seed)["Random"]) for seed in range(5)}
    assert len(draws) > 1


@pytest.mark.parametrize("number, counts", [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (7, [2, 2, 2]), (30, [5, 5, 5])])
def test_of_few_cases_fewer_are_shown(number, counts):
    chosen = choose_cases(group_by_case([closed_task(number)]), 5, seed=0)
    assert [len(names) for names in chosen.values()] == counts
    names = [name for names in chosen.values() for name in names]
    assert len(set(names)) == len(names)


def test_a_case_is_ranked_by_all_its_questions_over_tasks():
    questions = group_by_case([closed_task(3), report_task(1.0)])["doe-0"]
    assert len(questions) == 3 and case_score(questions) == pytest.approx((0 + 0 + 0.4) / 3)


def test_names_of_cases_appear_only_if_wanted(tmp_path):
    page = write(tmp_path, closed_task())
    assert "doe-" not in page and ".nii" not in page
    assert re.search(r"<h3>case 1 \(closed_vqa/000016 and 1 more\): 88.89 %</h3>", page)
    page = write(tmp_path, closed_task(), show_case_names=True)
    assert "<h3>doe-8 (closed_vqa/000016" in page and "names of cases" in page


def test_the_head_says_what_the_report_contains(tmp_path):
    page = write(tmp_path, closed_task())
    assert "image data of cases" not in page and "<img" not in page and "answers about cases" in page
    volumes = Volumes()
    page = write(tmp_path, closed_task(), volumes=volumes, num_cases=1)
    assert "contains image data of cases" in page and page.index("image data") < page.index("<h2>")
    assert sorted(volumes.loaded[:2]) == ["0.nii.gz", "8.nii.gz"] and len(volumes.loaded) == 3
    assert page.count("<img") == 3 * 3


def test_right_and_wrong_answers_are_marked_and_degrees_are_not(tmp_path):
    task = closed_task(1)
    task.scores["accuracy"][:] = [1.0, 0.0]
    page = write(tmp_path, task)
    assert page.count("<strong>right</strong>") == page.count("<strong>wrong</strong>") == 1
    assert "<strong>right</strong>" in write(tmp_path, report_task(1.0))
    page = write(tmp_path, report_task(0.0))
    assert (
        "<strong>right" not in page
        and "<strong>wrong" not in page
        and "ROUGE-1: 40.00 %" in page
        and "every word right: " in page
    )


def test_slices_are_in_radiological_display():
    volume = np.zeros((8, 12, 20), dtype=np.float32)
    volume[:, :, 10:] = 0.25  # the patient's left
    volume[:, 6:] += 0.25  # posterior
    volume[4:] += 0.5  # superior
    axial, coronal, sagittal = (
        np.array(Image.open(io.BytesIO(png))) for png in draw_slices(volume, 40, "LPS").values()
    )
    assert axial.shape == coronal.shape == sagittal.shape == (40, 3 * 40 + 2 * 4)

    def corners(picture):
        return [round(float(picture[row, column]) / 255, 2) for row in (2, 37) for column in (2, 37)]

    assert corners(axial) == [0, 0.25, 0.25, 0.5]  # anterior above, the patient's right on the left
    assert corners(coronal) == [0.5, 0.75, 0, 0.25]  # superior above, the patient's right on the left
    assert corners(sagittal) == [0.5, 0.75, 0, 0.25]  # superior above, anterior on the left
    # The third slice lies farther along: superior, posterior, left.
    assert [picture[37, 90] / 255 for picture in (axial, coronal, sagittal)] == pytest.approx(
        [0.75, 0.25, 0.25], abs=0.01
    )


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (
            "LPS",
            [
                "axial, from inferior to superior; the patient's right is on the left, anterior above",
                "coronal, from anterior to posterior; the patient's right is on the left, superior above",
                "sagittal, from the patient's right to the patient's left; anterior is on the left, superior above",
            ],
        ),
        (
            "RAS",
            [
                "axial, from inferior to superior; the patient's left is on the left, posterior above",
                "coronal, from posterior to anterior; the patient's left is on the left, superior above",
                "sagittal, from the patient's left to the patient's right; posterior is on the left, superior above",
            ],
        ),
        (
            "PLI",
            [
                "axial, from superior to inferior; anterior is on the left, the patient's right above",
                "sagittal, from the patient's right to the patient's left; anterior is on the left, superior above",
                "coronal, from anterior to posterior; the patient's right is on the left, superior above",
            ],
        ),
        (
            "none",
            [
                "across the depth, with height down and width to the right; directions are not known",
                "across the height, with depth down and width to the right; directions are not known",
                "across the width, with depth down and height to the right; directions are not known",
            ],
        ),
    ],
)
def test_captions_name_the_directions_of_the_image_processor(tmp_path, orientation, expected):
    page = unescape(write(tmp_path, closed_task(1), volumes=Volumes(), orientation=orientation))
    assert re.findall("<figcaption>(.+?)</figcaption>", page) == expected


def test_slices_are_turned_so_that_superior_is_above():
    volume = np.zeros((8, 12, 20), dtype=np.float32)
    volume[:4] = 1  # the upper half of the patient if depth grows to inferior

    def coronal(orientation):
        return np.array(Image.open(io.BytesIO(list(draw_slices(volume, 40, orientation).values())[1])))

    assert coronal("LPI")[2, 2] == 255 and coronal("LPI")[37, 2] == 0
    assert coronal("LPS")[2, 2] == 0 and coronal("LPS")[37, 2] == 255
    assert coronal("none")[2, 2] == 255  # as stored


@pytest.mark.parametrize("kind", ["slices", "prepared slices", "prepared by the original", "prepared scan"])
def test_no_direction_is_named_of_slices_prepared_or_not(tmp_path, kind):
    raw = tmp_path / "raw/000001"
    if kind == "prepared scan":
        write_volume(raw / "Axial.nii.gz")
    else:
        (raw / "Axial").mkdir(parents=True)
        for number in range(2):
            Image.new("L", (3, 2), 40 * number + 40).save(raw / f"Axial/{number}.png")
    (raw / "text.txt").write_text("study_findings: A cyst.")
    image = raw / "Axial"
    if kind in ("prepared slices", "prepared scan"):
        prepare_m3d_cap(tmp_path / "raw", tmp_path / "M3D_Cap_npy", image_size=(32, 32, 32), num_workers=0)
        (image,) = (tmp_path / "M3D_Cap_npy").rglob("*.nii.gz")
    elif kind == "prepared by the original":  # with an affine, and nothing said of its making
        image = write_volume(tmp_path / "Axial.nii.gz")
    task = closed_task(1)
    task = replace(task, references=[replace(reference, image=str(image)) for reference in task.references])
    options = {"volumes": Volumes(), "orientation": "LPS", "prepared": kind != "slices"}
    page = unescape(write(tmp_path, task, **options))
    if kind == "prepared scan":
        assert page.count("the patient's right is on the left") == 2 * 2  # `alt` and caption of two planes
    else:
        assert "patient's" not in page and page.count("directions are not known") == 3 * 2


@pytest.mark.parametrize("volume", [np.zeros((4, 4)), np.full((2, 2, 2), np.nan)])
def test_what_is_no_volume_is_refused(volume):
    with pytest.raises(ValueError, match=r"\(depth, height, width\) with finite values"):
        draw_slices(volume, 10, "LPS")


def test_plots_are_put_in(tmp_path):
    plot = tmp_path / "bars.png"
    Image.new("L", (3, 2), 7).save(plot)
    page = write(tmp_path, closed_task(), plots={"Bars & more": plot})
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)" alt="Bars &amp; more"', page)
    assert base64.b64decode(data) == plot.read_bytes()
    plot.write_text("<svg>")
    with pytest.raises(ValueError, match="bars.png: expected a PNG"):
        write(tmp_path, closed_task(), plots={"Bars": plot})


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="each answered task once and at least one, got none"):
        write(tmp_path)
    with pytest.raises(ValueError, match="got closed_vqa, closed_vqa"):
        write(tmp_path, closed_task(), closed_task())
    with pytest.raises(ValueError, match="`num_cases` must be at least 1, got 0"):
        write(tmp_path, closed_task(), num_cases=0)
    with pytest.raises(ValueError, match="expected `blind_predictions` for each of 18 references, got 1"):
        closed_task(blind_predictions=["a"])
    with pytest.raises(ValueError, match="closed_vqa: expected scores of at least one metric, .* got none"):
        replace(closed_task(), scores={})
    with pytest.raises(ValueError, match="of one task, got none"):
        AnsweredTask([], [], {})
    assert not list(tmp_path.iterdir())
