import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny import IMAGE_SIZE, build_tiny_model, tiny_siglip

from med3dvlm.train.answering import Answer, answer_samples, embed_samples
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.evaluation import image_dependence
from med3dvlm.train.evaluation.image_dependence import (
    ANSWERS_CHANGED,
    CHANGES,
    COSINE,
    OTHER_CASE,
    SIDES_CHANGED,
    ChangedVolumes,
    check_image_dependence,
    compare_answers,
    compare_embeddings,
    format_dependence,
)
from med3dvlm.train.scoring import retrieval_recall, with_volume_of_another_case
from med3dvlm.train.tokenizers import build_tiny_tokenizer


class Noise:
    """Another volume for each number."""

    def __init__(self, size=IMAGE_SIZE):
        self.size = size

    def load(self, path):
        return torch.rand(self.size, generator=torch.Generator().manual_seed(int(path)))


class Blocks:
    """A bright block in another place for each number: more than noise, the tiny model tells these apart."""

    def load(self, path):
        volume = torch.zeros(32, 64, 96)
        volume[:, :, 32 * int(path) : 32 * int(path) + 32] = 1 - int(path) / 4
        return volume


def make_samples(number, task="open_vqa"):
    """Of a case each; the second half has another answer, so that none is that of the case half-way round."""
    answers = ["left lung" if 2 * case < number else "left kidney" for case in range(number)]
    rows = [
        {
            "image": str(case),
            "case": f"case {case}",
            "task": task,
            "question": "" if task == "report" else "Where?",
            "choices": [],
            "answer": f"{answers[case]} {case}" if task == "report" else answers[case],
            "answer_choice": "",
            "question_type": 0 if task == "report" else 5,
        }
        for case in range(number)
    ]
    return datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)


def find(rows, change, metric):
    (row,) = [row for row in rows if (row.change, row.metric) == (change, metric)]
    return row


def test_changes_do_what_they_say():
    true = Noise((2, 3, 4)).load("5")
    changed = {name: ChangedVolumes(Noise((2, 3, 4)), name).load("5") for name in CHANGES}
    assert not changed["blank"].any() and changed["blank"].shape == true.shape
    assert not changed["shuffled"].equal(true)
    assert changed["shuffled"].flatten().sort().values.equal(true.flatten().sort().values)
    assert changed["mirrored"][1, 2].tolist() == true[1, 2].tolist()[::-1]
    assert changed["shifted"][1:, 1:, 1:].equal(true[:-1, :-1, :-1])
    assert changed["shifted"][0, 0, 0] == true[0, 0, 0] and changed["shifted"][0, 2, 3] == true[0, 1, 2]


@pytest.mark.parametrize("orientation, axis", [("LPS", 2), ("RAS", 2), ("PLS", 1), ("ASR", 0), ("none", 2)])
def test_mirroring_swaps_right_and_left_wherever_they_are(orientation, axis):
    true = Noise((2, 3, 4)).load("5")
    assert ChangedVolumes(Noise((2, 3, 4)), "mirrored", orientation=orientation).load("5").equal(true.flip(axis))


def test_without_known_directions_nothing_can_be_said_of_mirroring():
    samples, left, right = make_samples(4), ["left lung"] * 4, ["right lung"] * 4
    changed = {OTHER_CASE: right, "mirrored": right}
    assert find(compare_answers(samples, left, changed), "mirrored", SIDES_CHANGED).holds is True
    row = find(compare_answers(samples, left, changed, orientation="none"), "mirrored", SIDES_CHANGED)
    assert row.holds is None and row.changed == 1
    assert "cannot be said (100% of 4 do; which axis runs between right and left is not known" in format_dependence(
        [row]
    )


def test_the_image_processor_says_what_is_mirrored():
    model, processor = build_tiny_model((32, 64, 96))
    processor.image_processor.orientation = "PLS"
    samples, volumes = make_samples(2), Blocks()
    rows = check_image_dependence(model, processor, samples, volumes, ["mirrored"], max_new_tokens=8)
    mirrored = answer_samples(model, processor, samples, ChangedVolumes(volumes, "mirrored", orientation="PLS"), 8)
    original = answer_samples(model, processor, samples, volumes, 8)
    share = sum(one != other for one, other in zip(mirrored, original)) / 2
    assert find(rows, "mirrored", ANSWERS_CHANGED).changed == share
    processor.image_processor.orientation = "none"
    rows = check_image_dependence(model, processor, samples, volumes, ["mirrored"], max_new_tokens=8)
    assert "the orientation is 'none'" in find(rows, "mirrored", SIDES_CHANGED).remark


@pytest.mark.parametrize("kind", ["slices", "prepared by the original"])
def test_of_slices_it_is_not_known_what_is_mirrored(tmp_path, kind):
    class Named:
        def load(self, path):
            return Blocks().load(Path(path).name[0])

    images = [tmp_path / "0", tmp_path / "1.nii.gz"]
    if kind == "slices":
        images[0].mkdir()
    model, processor = build_tiny_model((32, 64, 96))
    samples = make_samples(2).map(lambda row, place: {"image": str(images[place])}, with_indices=True)
    options = {"max_new_tokens": 2, "prepared": kind != "slices"}
    rows = check_image_dependence(model, processor, samples, Named(), ["mirrored"], **options)
    row = find(rows, "mirrored", SIDES_CHANGED)
    assert row.holds is None and row.remark.endswith("the orientation is 'none' or there are stacks of slices")


def test_shuffling_depends_on_seed_and_path_alone():
    class Same:
        def load(self, path):
            return torch.arange(60.0).reshape(3, 4, 5)

    first = ChangedVolumes(Same(), "shuffled").load("a")
    assert ChangedVolumes(Same(), "shuffled").load("a").equal(first)
    assert not ChangedVolumes(Same(), "shuffled").load("b").equal(first)
    assert not ChangedVolumes(Same(), "shuffled", seed=1).load("a").equal(first)


def test_answers_are_those_with_the_changed_volumes():
    model, processor = build_tiny_model((32, 64, 96))
    samples, volumes = make_samples(3), Blocks()
    metrics = {"length": lambda predictions, texts: [float(len(text)) for text in predictions]}

    def zero_the_left(volume, generator):
        half = volume.clone()
        half[:, :, 48:] = 0
        return half

    rows = check_image_dependence(
        model,
        processor,
        samples,
        volumes,
        {"blank": CHANGES["blank"], "half": zero_the_left},
        metrics,
        max_new_tokens=8,
    )
    original = answer_samples(model, processor, samples, volumes, 8)
    for change, version, loader in (
        ("blank", samples, ChangedVolumes(volumes, "blank")),
        ("half", samples, ChangedVolumes(volumes, zero_the_left)),
        (OTHER_CASE, with_volume_of_another_case(samples), volumes),
    ):
        answers = answer_samples(model, processor, version, loader, 8)
        row = find(rows, change, "length")
        assert row.original == pytest.approx(sum(map(len, original)) / 3)
        assert row.changed == pytest.approx(sum(map(len, answers)) / 3)
        share = sum(" ".join(a.lower().split()) != " ".join(b.lower().split()) for a, b in zip(answers, original)) / 3
        assert find(rows, change, ANSWERS_CHANGED).changed == pytest.approx(share)
    assert find(rows, "half", "length").expectation == ""
    assert find(rows, OTHER_CASE, ANSWERS_CHANGED).changed > 0  # the tiny model does look at its volume


def test_a_system_that_uses_its_volume_meets_every_expectation():
    samples = make_samples(20)
    wrong = ["right lung"] * 20
    changed = {OTHER_CASE: wrong, "blank": ["liver"] * 20, "shuffled": wrong, "mirrored": wrong}
    changed["shifted"] = [f"{answer}." for answer in samples["answer"][:19]] + ["liver"]
    rows = compare_answers(samples, [answer.capitalize() for answer in samples["answer"]], changed)
    assert [row.holds for row in rows if row.expectation] == [True] * 6
    row = find(rows, "blank", "exact")
    assert (row.original, row.changed, row.low, row.high, row.count) == (1, 0, -1, -1, 20)
    assert find(rows, "shifted", ANSWERS_CHANGED).changed == pytest.approx(0.05)
    assert find(rows, "mirrored", SIDES_CHANGED).changed == 1
    text = format_dependence(rows)
    assert "| open_vqa | blank | every word right | 100.0 | 0.0 | -100.0 to -100.0 | 20 |" in text
    assert "6 hold, 0 do not hold, and 0 cannot be said" in text


def test_a_system_that_answers_from_the_question_is_found_out():
    same = ["left lung"] * 20
    rows = compare_answers(make_samples(20), same, dict.fromkeys((OTHER_CASE, *CHANGES), same))
    outcomes = {row.change: row.holds for row in rows if row.expectation}
    assert outcomes == {OTHER_CASE: False, "blank": False, "shuffled": False, "mirrored": False, "shifted": True}
    text = format_dependence(rows)
    assert (
        "open_vqa, mirrored, answers whose sides change: most answers that name a side name another: DOES NOT HOLD"
        in text
    )
    assert "with another case's volume the score is not lower" in text
    assert "2 hold, 4 do not hold" in text


def test_a_score_that_stays_high_without_anything_to_see_does_not_hold():
    right, wrong = list(make_samples(20)["answer"]), ["liver"] * 20
    half = right[:10] + wrong[10:]
    rows = compare_answers(make_samples(20), right, {OTHER_CASE: wrong, "blank": half, "shifted": half})
    assert find(rows, OTHER_CASE, "exact").holds
    row = find(rows, "blank", "exact")
    assert row.holds is False and row.remark == "50.0% is above the 0.0% of another case"
    assert find(rows, "shifted", ANSWERS_CHANGED).holds is False and find(rows, "shifted", "exact").holds is False
    reports = compare_answers(make_samples(20, "report"), right, {OTHER_CASE: wrong, "shifted": wrong})
    assert find(reports, "shifted", ANSWERS_CHANGED).holds is None  # a report may differ in a word
    rows = compare_answers(make_samples(20), right, {OTHER_CASE: half, "blank": wrong[:10] + right[10:]})
    assert find(rows, "blank", "exact").holds  # no better than another case


def test_a_score_at_chance_has_fallen_far_enough():
    closed = make_samples(20, "closed_vqa").map(
        lambda row: {"choices": ["left lung", "right lung", "liver", "spleen"], "answer_choice": "A"},
        load_from_cache_file=False,
    )
    for number, holds in ((5, True), (8, False)):  # a quarter, and more
        blank = ["A. left lung"] * number + ["B. right lung"] * (20 - number)
        rows = compare_answers(closed, ["A. left lung"] * 20, {OTHER_CASE: ["C. liver"] * 20, "blank": blank})
        assert find(rows, "blank", "accuracy").holds is holds


def test_a_score_with_nothing_to_fall_from_says_nothing():
    samples = make_samples(20, "report")
    shared = {
        "shared": lambda texts, references: [len({*a.split()} & {*b.split()}) / 9 for a, b in zip(texts, references)]
    }
    true, other = ["a left lung"] * 20, ["a right kidney"] * 20
    changed = {OTHER_CASE: other, "blank": other, "shifted": true}
    rows = compare_answers(samples, true, changed, shared)  # no report is right in every word
    for change in changed:
        row = find(rows, change, "exact")
        assert row.expectation and row.holds is None
        assert row.remark == "nothing to fall from: 0.0% is not above chance, 0.0%, beyond its interval"
        assert find(rows, change, "shared").holds is True
    text = format_dependence(rows)
    assert "3 hold, 0 do not hold, and 3 cannot be said" in text
    closed = make_samples(20, "closed_vqa").map(
        lambda row: {"choices": ["left lung", "right lung", "liver", "spleen"], "answer_choice": "A"},
        load_from_cache_file=False,
    )
    guesses = ["A. left lung"] * 6 + ["B. right lung"] * 14  # of 20, hardly more than a quarter
    rows = compare_answers(closed, guesses, {OTHER_CASE: guesses, "shifted": guesses})
    assert find(rows, OTHER_CASE, "accuracy").holds is None


def test_the_same_report_for_all_is_at_chance_and_says_nothing():
    """However often it is right: so would be the true report of another case."""
    samples = make_samples(40, "report").map(
        lambda row, place: {"answer": "No abnormality." if place % 5 else f"Cyst {place}."},
        with_indices=True,
        load_from_cache_file=False,
    )
    same = ["No abnormality."] * 40
    metrics = {"words": lambda texts, others: [float(a.split()[0] == b.split()[0]) for a, b in zip(texts, others)]}
    rows = compare_answers(samples, same, dict.fromkeys((OTHER_CASE, *CHANGES), same), metrics)
    for metric, chance in (("exact", 0.8), ("words", 1.0)):
        said = [row for row in rows if row.metric == metric and row.expectation]
        assert len(said) == 4 and {row.holds for row in said} == {None}
        assert {row.original for row in said} == {0.8} and f"is not above chance, {chance:.1%}" in said[0].remark
    # A type that one case has gives nothing to guess with.
    alone = samples.map(
        lambda row, place: {"question_type": place // 2}, with_indices=True, load_from_cache_file=False
    )
    alone = alone.map(lambda row: {"task": "open_vqa", "question_type": row["question_type"] % 5 + 1}).select(
        [0, 1, 2]
    )
    row = find(compare_answers(alone, ["Cyst 0."] * 3, {OTHER_CASE: ["x"] * 3}), OTHER_CASE, "exact")
    assert "is not above chance, 0.0%" in row.remark


def test_a_type_of_one_case_takes_no_chance_from_the_others():
    samples = make_samples(5).map(lambda row, place: {"question_type": 3 if place == 4 else 5}, with_indices=True)
    metrics = {"kidney": lambda texts, others: [float("kidney" in text) for text in texts]}
    answers = list(samples["answer"])  # of the four with another case, one is given a kidney
    row = find(compare_answers(samples, answers, {OTHER_CASE: answers}, metrics), OTHER_CASE, "kidney")
    assert "is not above chance, 25.0%, beyond" in row.remark


def test_logits_that_are_nan_end_the_check(monkeypatch):
    def answer(model, processor, version, *options):
        yield list(version), [Answer("x", 0.5), Answer("!!!", math.nan)]

    model, processor = build_tiny_model((32, 64, 96))
    monkeypatch.setattr(image_dependence, "iterate_answers", answer)
    with pytest.raises(ValueError, match="^open_vqa/000001: the model's logits are NaN"):
        check_image_dependence(model, processor, make_samples(2), Blocks(), ["blank"])


def test_of_two_cases_nothing_can_be_said():
    closed = make_samples(2, "closed_vqa").map(
        lambda row: {"choices": ["left lung", "right lung", "liver", "spleen"], "answer_choice": "A"},
        load_from_cache_file=False,
    )
    rows = compare_answers(closed, ["A."] * 2, {OTHER_CASE: ["B."] * 2, "shifted": ["A."] * 2})
    assert [row.holds for row in rows if row.metric == "accuracy"] == [None, None]
    assert "the score falls: cannot be said (nothing to fall from: 100.0% is not above chance" in format_dependence(
        rows
    )


def test_only_another_side_counts_for_mirroring():
    samples, other = make_samples(4, "report"), ["y"] * 4
    true = ["Nodule of 8 mm in the left lung, right-sided effusion."] * 4
    for mirrored, share in (
        ("Nodule of 9 mm in the Left lung, effusion on the right.", 0),
        ("Nodule of 8 mm in the right lung, left-sided effusion.", 1),
    ):
        rows = compare_answers(samples, true, {OTHER_CASE: other, "mirrored": [mirrored] * 4})
        row = find(rows, "mirrored", SIDES_CHANGED)
        assert (row.changed, row.holds) == (share, bool(share))
        assert find(rows, "mirrored", ANSWERS_CHANGED).changed == 1


@pytest.mark.parametrize(
    "mirrored, share",
    [
        ("Cyst in the left kidney.", 0),
        ("Cyst in the left kidney. The left lung is clear. Left pleura normal.", 0),
        ("No lesion.", 0),
        ("Cyst in the left kidney. The right lung is clear.", 1),
        ("Cyst in the right kidney.", 1),
    ],
)
def test_naming_a_side_more_or_less_often_is_no_other_side(mirrored, share):
    true = ["Cyst in the left kidney. The left lung is clear."] * 4
    rows = compare_answers(make_samples(4, "report"), true, {OTHER_CASE: ["y"] * 4, "mirrored": [mirrored] * 4})
    row = find(rows, "mirrored", SIDES_CHANGED)
    assert (row.changed, row.count, row.holds) == (share, 4, bool(share))


def test_without_a_side_nothing_can_be_said_of_mirroring():
    rows = compare_answers(make_samples(4), ["liver"] * 4, {OTHER_CASE: ["a"] * 4, "mirrored": ["b"] * 4})
    row = find(rows, "mirrored", SIDES_CHANGED)
    assert row.holds is None and math.isnan(row.changed) and row.count == 0
    assert "cannot be said (no answer names a side)" in format_dependence(rows)
    assert "names a side with the English word left or right" in format_dependence(rows)
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["changed"] is None


def test_a_dual_encoder_is_checked_by_its_vectors():
    tokenizer = build_tiny_tokenizer()
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = tiny_siglip(text_config={"model_type": "bert", "vocab_size": len(tokenizer), **text})
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=SimpleNamespace(orientation="LPS"))
    samples = make_samples(5, "report")
    rows = check_image_dependence(model, processor, samples, Noise(), ["blank", "shifted"])
    images, texts = embed_samples(model, processor, samples, Noise())
    blank, _ = embed_samples(model, processor, samples, ChangedVolumes(Noise(), "blank"))
    row = find(rows, "blank", COSINE)
    assert row.changed == pytest.approx(float((images * blank).sum(dim=1).mean()), abs=1e-6) and row.original is None
    row = find(rows, "blank", "recall_at_1, volume to report")
    ids = torch.arange(5)
    assert row.original == pytest.approx(retrieval_recall(images, texts, ids)["recall_at_1"])
    assert row.changed == pytest.approx(retrieval_recall(blank, texts, ids)["recall_at_1"])
    other = images[[(place + 2) % 5 for place in range(5)]]
    assert find(rows, OTHER_CASE, COSINE).changed == pytest.approx(float((images * other).sum(dim=1).mean()), abs=1e-6)
    assert "| retrieval | shifted | cosine |  |" in format_dependence(rows)


def test_expectations_of_vectors():
    samples, vectors = make_samples(12, "report"), torch.eye(12)
    near = torch.nn.functional.normalize(vectors + 0.01, dim=1)
    changed = {OTHER_CASE: vectors.roll(1, 0), "blank": vectors[:1].expand(12, -1), "shifted": near}
    rows = compare_embeddings(samples, vectors, vectors, changed)
    assert [row.holds for row in rows if row.expectation] == [True] * 7
    row = find(rows, "blank", "recall_at_1, volume to report")
    assert (row.original, row.changed) == (
        1,
        pytest.approx(1 / 12),
    )  # one vector for all: only its own report is nearest
    rows = compare_embeddings(samples, vectors, vectors, {OTHER_CASE: vectors, "shifted": vectors.roll(1, 0)})
    assert [row.holds for row in rows if row.expectation] == [False] * 5


def test_rounding_does_not_decide_between_identical_reports():
    samples = make_samples(4, "report").map(
        lambda row: {"answer": "Clear." if row["image"] in "01" else row["answer"]}
    )
    images, texts = torch.eye(4, 5), torch.eye(4, 5)
    images[0], images[1] = torch.tensor([0.8, 0, 0, 0, -0.6]), torch.tensor([0.8, 0, 0, 0, 0.6])
    texts[1] = texts[0] + 1e-6 * torch.eye(5)[4]  # a little nearer to its own volume than the other report
    rows = compare_embeddings(samples, images, texts, {OTHER_CASE: images.roll(2, 0)})
    for direction in ("volume to report", "report to volume"):
        assert find(rows, OTHER_CASE, f"recall_at_1, {direction}").original == 0.75  # half of each of the two


def test_what_does_not_fit_is_refused():
    model, processor = build_tiny_model((32, 64, 96))
    samples, volumes = make_samples(2), Noise((32, 64, 96))
    with pytest.raises(ValueError, match="Expected a change out of 'blank', 'shuffled'.*got 'upside down'"):
        check_image_dependence(model, processor, samples, volumes, ["upside down"])
    for name in (OTHER_CASE, "blank"):
        with pytest.raises(ValueError, match=f"The name '{name}' stands for another change"):
            check_image_dependence(model, processor, samples, volumes, {name: CHANGES["mirrored"]})
    with pytest.raises(ValueError, match="Expected samples to ask about"):
        check_image_dependence(model, processor, samples.select([]), volumes)
    with pytest.raises(ValueError, match="at least two cases"):
        check_image_dependence(model, processor, samples.select([0]), volumes)
    with pytest.raises(ValueError, match="of the task 'report', got open_vqa"):
        check_image_dependence(tiny_siglip(), processor, samples, volumes)
    with pytest.raises(ValueError, match="answers for 'other case' among the changes, got blank"):
        compare_answers(samples, ["a", "b"], {"blank": ["a", "b"]})
    with pytest.raises(ValueError, match="gave the shape .2, 3. for .2, 3, 4."):
        ChangedVolumes(Noise((2, 3, 4)), lambda volume, generator: volume[..., 0]).load("1")
