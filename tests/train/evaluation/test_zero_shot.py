import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from tiny import IMAGE_SIZE, tiny_siglip

from med3dvlm.train.evaluation.zero_shot import (
    MEAN_OF_CLASSES,
    PHANTOM_PROMPTS,
    ClassPrompts,
    LabelledVolume,
    Labels,
    ZeroShotResult,
    ZeroShotScore,
    _mean_of,
    auroc_interval,
    best_threshold,
    class_probabilities,
    embed_prompts,
    embed_volumes,
    format_zero_shot,
    images_by_case,
    read_labels,
    read_prompts,
    run_zero_shot,
)
from med3dvlm.train.phantoms.anatomy import ORGANS
from med3dvlm.train.phantoms.study import write_labels
from med3dvlm.train.tokenizers import build_tiny_tokenizer


PROMPTS = [
    ClassPrompts("liver", ("A lesion in the liver.", "Liver lesion."), ("The liver is normal.",)),
    ClassPrompts("lung", ("A nodule.",), ("Clear lungs.", "No nodule in either lung.")),
]


class Noise:
    """Another volume for each number."""

    def __init__(self):
        self.loaded = []

    def load(self, path):
        self.loaded.append(path)
        return torch.rand(IMAGE_SIZE, generator=torch.Generator().manual_seed(int(path)))


def build(**overrides):
    tokenizer = build_tiny_tokenizer()
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text_config = {"model_type": "bert", "vocab_size": len(tokenizer), "max_position_embeddings": 128, **text}
    return tiny_siglip(text_config=text_config, **overrides), SimpleNamespace(tokenizer=tokenizer)


def labelled(liver, lung=None):
    lung = lung or [1, 0] * (len(liver) // 2)
    rows = zip(liver, lung)
    return Labels(
        [
            LabelledVolume(
                str(place), f"case {place // 2}", {n: v for n, v in zip(("liver", "lung"), row) if v is not None}
            )
            for place, row in enumerate(rows)
        ]
    )


def unit(features):
    return torch.nn.functional.normalize(features.pooler_output, dim=-1)


@torch.no_grad()
def plain_logits(model, processor, text, image):
    """Of one text and one volume alone."""
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    vector = unit(model.get_text_features(ids, torch.ones_like(ids), return_dict=True))
    pixel_values = Noise().load(image)[None, None]
    return vector[0], unit(model.get_image_features(pixel_values, return_dict=True))[0]


def test_probabilities_are_those_of_the_formula_for_one_text_and_one_volume():
    model, processor = build()
    result = run_zero_shot(model, processor, PROMPTS, labelled([1, 0, 1, 0]), Noise(), batch_size=3)
    assert result.rule == "sigmoid"
    vectors = torch.stack([plain_logits(model, processor, text, "2")[0] for text in PROMPTS[0].positive])
    mean = vectors.mean(dim=0) / vectors.mean(dim=0).norm()
    logit = (
        model.logit_scale.exp().detach() * mean @ plain_logits(model, processor, "?", "2")[1]
        + model.logit_bias.detach()
    )
    assert result.probabilities["liver"][2] == pytest.approx(float(logit.sigmoid()), rel=1e-4)


def test_each_rule_by_its_formula():
    model, processor = build()
    images = embed_volumes(model, ["0", "1", "2"], Noise(), batch_size=2)
    positive, negative = embed_prompts(model, processor, PROMPTS)
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    z, against = (scale * (images @ vectors.T).double().numpy() + bias for vectors in (positive, negative))
    expected = {
        "sigmoid": 1 / (1 + np.exp(-z)),
        "against negatives": np.exp(z) / (np.exp(z) + np.exp(against)),
        "among classes": np.exp(z) / np.exp(z).sum(axis=1, keepdims=True),
    }
    for rule, values in expected.items():
        np.testing.assert_allclose(class_probabilities(model, images, positive, negative, rule), values, rtol=1e-4)
    assert len({values.round(6).tobytes() for values in expected.values()}) == 3


def test_the_rule_follows_the_loss_of_the_model_and_must_fit_it():
    softmax, processor = build(loss_type="softmax")
    assert run_zero_shot(softmax, processor, PROMPTS, labelled([1, 0, 1, 0]), Noise()).rule == "against negatives"
    without = [ClassPrompts(entry.name, entry.positive) for entry in PROMPTS]
    result = run_zero_shot(softmax, processor, without, labelled([1, 0, 1, 0]), Noise())
    assert result.rule == "among classes" and "all classes" in result.notes[0]
    np.testing.assert_allclose(np.sum(list(result.probabilities.values()), axis=0), 1)
    for prompts, rule, message in (
        (PROMPTS, "sigmoid", "trained with the sigmoid loss"),
        (without, "against negatives", "liver, lung have none"),
        (PROMPTS[:1], "among classes", "at least two classes"),
        (PROMPTS, "softmax", "Expected a rule out of 'sigmoid'"),
        ([], None, "at least one class"),
    ):
        with pytest.raises(ValueError, match=message):
            run_zero_shot(softmax, processor, prompts, labelled([1, 0, 1, 0]), Noise(), rule=rule)


def test_scores_are_those_of_scikit_learn_over_the_known_labels():
    model, processor = build(logit_bias_init_value=-8.0)
    liver = [1, 0, None, 0, 1, 1, 1, 0]
    result = run_zero_shot(model.train(), processor, PROMPTS, labelled(liver), Noise())
    assert model.training
    known = [place for place, label in enumerate(liver) if label is not None]
    truth = [liver[place] for place in known]
    given = np.array(result.probabilities["liver"])
    score = result.scores[0]
    assert score.auroc == pytest.approx(roc_auc_score(truth, given[known]))
    assert score.f1 == pytest.approx(f1_score(truth, given[known] >= 0.5, zero_division=0))
    assert score.accuracy == pytest.approx(np.mean((given[known] >= 0.5) == truth))
    assert (score.num_positive, score.num_negative, score.num_unknown, score.reason) == (4, 3, 1, "")
    assert (score.low, score.high) == auroc_interval(truth, given[known], [place // 2 for place in known])
    again = run_zero_shot(model.eval(), processor, PROMPTS, labelled(liver), Noise())
    assert again.probabilities == result.probabilities and not model.training
    # Cases 0 to 3 of two volumes each: another case is two further on, and its first volume stands for it.
    other = np.array([4, 4, 6, 6, 0, 0, 2, 2])
    assert score.blind_auroc == pytest.approx(roc_auc_score(truth, given[other][known])) != score.auroc
    mean = result.scores[-1]
    assert mean.name == MEAN_OF_CLASSES
    assert mean.auroc == pytest.approx((score.auroc + result.scores[1].auroc) / 2)


def test_a_class_with_one_label_stays_in_the_table_with_its_reason():
    model, processor = build()
    result = run_zero_shot(model, processor, PROMPTS, labelled([0, 0, None, 0], [1, 0, 1, 0]), Noise())
    liver, lung, mean = result.scores
    assert math.isnan(liver.auroc) and math.isnan(liver.f1) and not math.isnan(liver.accuracy)
    assert liver.reason == "No AUROC of 'liver': no volume with 1 among 4 volumes."
    assert mean.auroc == lung.auroc and "liver lack some" in mean.reason
    text = format_zero_shot(result)
    assert "| liver | - |" in text and liver.reason in text
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["scores"][0]["auroc"] is None and content["scores"][0]["reason"] == liver.reason
    nothing = run_zero_shot(model, processor, PROMPTS[:1], labelled([None] * 4), Noise()).scores[0]
    assert nothing.reason.startswith("No AUROC of 'liver': no labels") and math.isnan(nothing.accuracy)
    ones = run_zero_shot(model, processor, PROMPTS[:1], labelled([1] * 4), Noise()).scores[0]
    assert "no volume with 0" in ones.reason and ones.f1 in (0.0, 1.0)


def test_the_mean_and_the_table_have_every_figure():
    rows = [
        ZeroShotScore("a", 0.9, 0.8, 1.0, 0.5, 0.4, 0.7, 3, 4, 0, 0.1, 0.2, 0.3),
        ZeroShotScore("b", 0.7, 0.6, 0.8, 0.3, 0.2, 0.5, 1, 6, 1, 0.2, 0.4, 0.5),
    ]
    mean = _mean_of(rows)
    found = (mean.auroc, mean.blind_auroc, mean.f1, mean.accuracy, mean.f1_at_threshold, mean.accuracy_at_threshold)
    assert found == pytest.approx((0.8, 0.4, 0.3, 0.6, 0.3, 0.4)) and math.isnan(mean.low) and mean.threshold is None
    assert (mean.num_positive, mean.num_negative, mean.num_unknown) == (4, 10, 1)
    lines = format_zero_shot(ZeroShotResult("sigmoid", rows, {}, [])).splitlines()
    assert "| a | 90.0 | 80.0 to 100.0 | 50.0 | 40.0 | 70.0 | 0.1 | 20.0 | 30.0 | 3 | 4 | 0 |" in lines


def test_a_threshold_is_chosen_on_other_volumes():
    model, processor = build()
    rows = labelled([1, 0, 1, 0, 1, 0, 1, 0]).volumes
    scored, validation = Labels(rows[:4]), Labels(rows[4:])
    score = run_zero_shot(model, processor, PROMPTS, scored, Noise(), validation=validation).scores[0]
    given = {volume.image: None for volume in rows}
    both = run_zero_shot(model, processor, PROMPTS, Labels(rows), Noise()).probabilities["liver"]
    given = dict(zip(given, both))
    on_validation = {
        value: f1_score([1, 0, 1, 0], [given[i] >= value for i in "4567"]) for value in map(given.get, "4567")
    }
    assert score.threshold == pytest.approx(max(on_validation, key=lambda value: (on_validation[value], -value)))
    expected = [given[image] >= score.threshold for image in "0123"]
    assert score.f1_at_threshold == pytest.approx(f1_score([1, 0, 1, 0], expected, zero_division=0))
    with pytest.raises(ValueError, match="4 volumes are both for validation and scored"):
        run_zero_shot(model, processor, PROMPTS, scored, Noise(), validation=scored)
    empty = Labels([LabelledVolume(str(place), "x", {"liver": 0}) for place in range(4, 6)])
    without = run_zero_shot(model, processor, PROMPTS, scored, Noise(), validation=empty)
    assert without.scores[0].threshold is None and "No threshold for 'liver'" in without.scores[0].reason


def test_the_threshold_with_the_best_f1_by_trying_all():
    generator = np.random.default_rng(0)
    for _ in range(20):
        truth, given = generator.integers(0, 2, 12), generator.integers(0, 6, 12) / 5
        if truth.any():
            tried = {value: f1_score(truth, given >= value) for value in set(given)}
            best = max(tried.values())
            assert best_threshold(truth, given) == min(value for value, f1 in tried.items() if f1 > best - 1e-12)
    assert math.isnan(best_threshold(np.zeros(3, dtype=int), np.ones(3)))


def test_the_interval_of_the_auroc_is_that_of_resampled_cases():
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 2, 60)
    given = (truth + generator.normal(0, 1.5, 60)).round()  # with many ties
    cases = [place * 7 % 20 for place in range(60)]
    generator_of_draws = np.random.default_rng(0)
    draws = generator_of_draws.multinomial(20, [1 / 20] * 20, size=100)
    numbers = list(dict.fromkeys(cases))
    weights = draws[:, [numbers.index(case) for case in cases]]
    values = [roc_auc_score(truth, given, sample_weight=row) for row in weights]
    assert auroc_interval(truth, given, cases, num_resamples=100) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    more = generator_of_draws.multinomial(20, [1 / 20] * 20, size=50)[:, [numbers.index(case) for case in cases]]
    values += [roc_auc_score(truth, given, sample_weight=row) for row in more]  # of a second block
    assert auroc_interval(truth, given, cases, num_resamples=150) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    narrow = auroc_interval(np.repeat(truth, 4), np.repeat(given, 4), range(240))
    as_cases = auroc_interval(np.repeat(truth, 4), np.repeat(given, 4), np.repeat(np.arange(60), 4))
    assert narrow[1] - narrow[0] < 0.7 * (as_cases[1] - as_cases[0])
    assert all(map(math.isnan, auroc_interval([1, 1], [0.1, 0.2], [0, 1])))
    assert all(map(math.isnan, auroc_interval([1, 0], [0.1, 0.2], ["one case", "one case"])))


def test_perfect_separation_has_the_exact_bound_of_the_rarer_label():
    truth, given, cases = (
        [1, 1, 1, 0, 0, 0, 0],
        [0.9, 0.8, 0.7, 0.3, 0.2, 0.1, 0.1],
        ["a", "a", "b", "c", "d", "e", "f"],
    )
    bound = 0.025 ** (1 / 2)  # the label 1 has two cases
    assert auroc_interval(truth, given, cases) == pytest.approx((bound, 1.0))
    assert auroc_interval([1 - label for label in truth], given, cases) == pytest.approx((0.0, 1 - bound))
    given[3] = 0.7  # a tie is no separation
    assert auroc_interval(truth, given, cases)[0] > bound


def test_a_case_is_not_both_for_validation_and_scored():
    model, processor = build()
    rows = labelled([1, 0, 1, 0, 1, 0, 1, 0]).volumes  # of two volumes a case
    with pytest.raises(
        ValueError, match=r"1 cases are both for .* that of volume 5 of those that are scored: remove"
    ) as caught:
        run_zero_shot(model, processor, PROMPTS, Labels(rows[:5]), Noise(), validation=Labels(rows[5:]))
    assert "case 2" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"2 volumes are both for .* the first is volume 4 of those that are scored"
    ) as caught:
        secret = [LabelledVolume(f"Smith/{place}", "", {}) for place in range(7)]
        run_zero_shot(model, processor, PROMPTS, Labels(secret[:5]), Noise(), validation=Labels(secret[3:]))
    assert "Smith" not in str(caught.value)


def test_vectors_that_are_not_finite_are_refused():
    model, processor = build()

    class Broken(Noise):
        def load(self, path):
            return super().load(path) * (torch.nan if path == "2" else 1)

    with pytest.raises(
        ValueError, match=r"volumes: 1 of 4 vectors are not finite \(rows 2\).*float16 may have overflowed"
    ):
        run_zero_shot(model, processor, PROMPTS, labelled([1, 0, 1, 0]), Broken())


def test_names_of_classes_cannot_end_a_cell():
    model, processor = build()
    volumes = [LabelledVolume(str(place), str(place), {"a|b": place % 2}) for place in range(4)]
    result = run_zero_shot(model, processor, [ClassPrompts("a|b", ("A nodule.",))], Labels(volumes), Noise())
    lines = [line for line in format_zero_shot(result).splitlines() if line.startswith("| a")]
    assert len(lines) == 1 and lines[0].startswith("| a\\|b |")


def test_volumes_of_one_case_and_long_prompts_are_refused():
    model, processor = build()
    one = Labels([LabelledVolume(str(place), "a", {"liver": place}) for place in range(2)])
    with pytest.raises(ValueError, match="at least two cases, got 1"):
        run_zero_shot(model, processor, PROMPTS[:1], one, Noise())
    with pytest.raises(ValueError, match="A prompt has 22 tokens, more than 20: shorten 'A lesion in the liver.'"):
        run_zero_shot(model, processor, PROMPTS, labelled([1, 0, 1, 0]), Noise(), max_text_length=20)


def write(path, text):
    path.write_text(text)
    return path


def test_prompts_are_read_from_yaml_and_json(tmp_path):
    text = "liver:\n  positive: [A lesion.]\n  negative: [' Normal liver. ']\nlung: [A nodule., Nodules.]\n"
    expected = [
        ClassPrompts("liver", ("A lesion.",), ("Normal liver.",)),
        ClassPrompts("lung", ("A nodule.", "Nodules.")),
    ]
    assert read_prompts(write(tmp_path / "a.yaml", text)) == expected
    content = {"liver": {"positive": ["A lesion."], "negative": ["Normal liver."]}, "lung": ["A nodule.", "Nodules."]}
    assert read_prompts(write(tmp_path / "a.json", json.dumps(content))) == expected
    with pytest.raises(FileNotFoundError, match="no such set of prompts"):
        read_prompts(tmp_path / "b.yaml")
    for text, message in {
        "[a, b]": "expected prompts for each class",
        "liver: []": "'liver': expected a list of texts as 'positive'",
        "liver: A lesion.": "'liver': expected a list of prompts, or",
        "liver: {negative: [a]}": "'liver': expected a list of prompts, or",
        "liver: [3]": "got .3.",
        "case: [a]": "cannot have the name of the column 'case'",
        "liver: [": "not readable as YAML or JSON",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_prompts(write(tmp_path / "b.yaml", text))


def test_labels_are_read_by_image_or_by_case(tmp_path):
    path = write(tmp_path / "labels.csv", "image,case,liver,lung\na.nii.gz,x,1,\n/b.nii.gz,,0.0,1\n")
    assert read_labels(path, ["liver"]) == Labels(
        [
            LabelledVolume(f"{tmp_path}/a.nii.gz", "x", {"liver": 1}),
            LabelledVolume("/b.nii.gz", "/b.nii.gz", {"liver": 0}),
        ],
        ("lung",),
    )
    assert read_labels(path, ["lung"]).volumes[0].labels == {}
    path = write(tmp_path / "cases.csv", "case,liver\nx,1\ny,0\n")
    images = images_by_case({"case": ["x", "x", "y", "x"], "image": ["1", "2", "3", "1"]})
    assert [(row.image, row.case, row.labels["liver"]) for row in read_labels(path, ["liver"], images).volumes] == [
        ("1", "x", 1),
        ("2", "x", 1),
        ("3", "y", 0),
    ]
    with pytest.raises(ValueError, match="row 3: its case is not among the 1 cases of the data"):
        read_labels(path, ["liver"], {"x": ["1"]})
    with pytest.raises(ValueError, match="has no column 'image'"):
        read_labels(path, ["liver"])
    assert read_labels(path, ["liver"], lambda: images) == read_labels(path, ["liver"], images)
    with pytest.raises(FileNotFoundError, match="no such file of labels"):
        read_labels(tmp_path / "none.csv", ["liver"])
    for text, message in {
        "image,lung\na,1\n": r"no column for 'liver'. It has image, lung. Add .* \(--prompts\)",
        "path,liver\na,1\n": "a column 'image' or 'case', got path, liver",
        "image,liver\na,-1\n": r"row 2: expected 1, 0 or an empty cell for 'liver', got something else\.",
        "image,liver\na,1\na,0\n": "row 3: its volume occurs a second time, first in row 2",
        "image,liver\n ,1\n": "row 2: expected the path of a volume",
        "image,liver\na\n": "row 2: expected 2 cells",
        "image,liver\n": "expected rows with labels, got none",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_labels(write(tmp_path / "bad.csv", text), ["liver"])


def test_cells_that_are_no_labels_are_not_shown(tmp_path):
    path = write(tmp_path / "labels.csv", "image,liver\na,0\nb,Mr Smith\n")
    with pytest.raises(ValueError, match=r"labels\.csv, row 3: expected 1, 0 or an empty cell") as caught:
        read_labels(path, ["liver"])
    assert "Smith" not in str(caught.value)


def test_labels_are_read_as_manifests_are(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("\ufeff image , liver\n\na.nii.gz, 1\n".encode())
    assert [row.labels for row in read_labels(path, ["liver"]).volumes] == [{"liver": 1}]
    for content, message in {
        b'image,liver\n"a,1\n': r"labels\.csv, line 2, is not valid CSV: unexpected end of data",
        "image,liver,note\na,1,Gr\u00f6\u00dfe\n".encode(
            "cp1252"
        ): r"labels\.csv is not UTF-8 text .* Save it as UTF-8",
        b"image,liver,liver\na,1,0\n": r"labels\.csv names columns twice: liver",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_labels(path, ["liver"])


def test_the_example_for_phantoms_fits_its_labels(tmp_path):
    prompts = read_prompts(PHANTOM_PROMPTS)
    assert tuple(entry.name for entry in prompts) == ORGANS
    lines = [
        {"image": f"{place}.nii.gz", "case": f"phantom/{place}", "split": split, "organ": organ}
        for place, (split, organ) in enumerate([("test", "liver"), ("train", "spleen"), ("test", "left lung")])
    ]
    write_labels(lines, tmp_path / "labels.csv")
    labels = read_labels(tmp_path / "labels.csv", ORGANS)
    assert [row.case for row in labels.volumes] == ["phantom/0", "phantom/2"]
    assert [[name for name, label in row.labels.items() if label] for row in labels.volumes] == [
        ["liver"],
        ["left lung"],
    ]
    assert labels.volumes[0].image == str(tmp_path / "0.nii.gz")
    with (tmp_path / "labels.csv").open() as file:
        assert next(csv.reader(file)) == ["image", "case", *ORGANS]
