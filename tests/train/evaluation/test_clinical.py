import json
import math
import sys
from types import ModuleType

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from med3dvlm.train.evaluation.clinical import (
    GreenScore,
    RadGraphF1,
    RateScore,
    as_text_metrics,
    build_clinical_metrics,
    clinical_notes,
    find_labeller,
    format_labels,
    label_reports,
    score_labels,
)


PREDICTIONS = ["a cyst", "", "a mass"]
REFERENCES = ["a cyst", "clear", "a cyst"]


@pytest.fixture
def packages(monkeypatch):
    """Puts a module in the place of a package, or takes it away."""
    for name in ("RaTEScore", "green_score", "radgraph", "radeval"):
        monkeypatch.setitem(sys.modules, name, None)

    def put(name, **members):
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


# The signatures and returned values below are those of RaTEScore 0.6.0, green-score 0.0.12, radgraph 0.1.18, radeval 2.2.1.
class FakeRaTEScore:
    def __init__(
        self,
        bert_model="Angelakeke/RaTE-NER-Deberta",
        eval_model="FremyCompany/BioLORD-2023-C",
        batch_size=1,
        use_gpu=True,
        visualization_path=None,
        affinity_matrix="long",
    ):
        self.use_gpu = use_gpu

    def compute_score(self, candidate_list, reference_list):
        assert isinstance(candidate_list, list) and isinstance(reference_list, list)
        # As the package does: a text without a sentence of three letters is left out, and the others move up; without any
        # sentence its tokenizer fails.
        kept = [[text for text in texts if len(text) > 2] for texts in (candidate_list, reference_list)]
        if not all(kept):
            raise IndexError("list index out of range")
        return [float(text == reference) for text, reference in zip(*kept)]


class FakeGreen:
    def __init__(self, model_name=None, output_dir=".", cpu=False, compute_summary_stats=True):
        self.arguments = (model_name, cpu, compute_summary_stats)

    def __call__(self, refs, hyps):
        scores = [len(hyp) / len(ref) if hyp != "a mass" else None for ref, hyp in zip(refs, hyps)]
        return None, None, scores, None, {"green_score": scores}


class FakeF1RadGraph:
    def __init__(self, reward_level, model_type=None, **kwargs):
        assert reward_level in ["simple", "partial", "complete", "all"]
        self.arguments = (reward_level, model_type)

    def __call__(self, refs, hyps):
        assert isinstance(hyps, list) and isinstance(refs, list)
        scores = [len(hyp) / (len(hyp) + len(ref)) for ref, hyp in zip(refs, hyps)]
        return sum(scores) / len(scores), scores, [], []


class FakeRadEval:
    def __init__(self, metrics=None, per_sample=False, show_progress=True):
        (self.metric,) = metrics
        assert per_sample and not show_progress

    def __call__(self, refs, hyps):
        if hyps == ["1."]:
            raise ZeroDivisionError
        return {self.metric: [len(hyp) / 10 for hyp in hyps]}


def test_ratescore_is_loaded_and_called_as_its_package_has_it(packages):
    packages("RaTEScore", RaTEScore=FakeRaTEScore)
    metric = RateScore()
    assert metric.score_samples(PREDICTIONS, REFERENCES) == [1, 0, 0]
    assert metric.scorer.use_gpu == torch.cuda.is_available()
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {
        "ratescore": pytest.approx(1 / 3),
        "per_sample": [1, 0, 0],
    }
    # "1." is left out by the package; the score of the pair after it must not move up.
    assert metric.score_samples(["1.", "a cyst"], ["clear", "a cyst"]) == [0, 1]
    assert "package RaTEScore" in metric.note and "English" in metric.note


def test_green_is_loaded_and_called_as_its_package_has_it(packages, caplog, monkeypatch):
    packages("green_score", GREEN=FakeGreen)
    monkeypatch.setattr("med3dvlm.train.evaluation.clinical.logger.warning", lambda text: caplog.records.append(text))
    metric = GreenScore()
    assert metric.score_samples(["a cyst", "", "a mass", "abc"], ["a cyst", "clear", "a cyst", "abcdef"]) == [
        1,
        0,
        0,
        0.5,
    ]
    assert metric.scorer.arguments == ("StanfordAIMI/GREEN-radllama2-7b", not torch.cuda.is_available(), False)
    assert "green: 1 of 3 pairs got no score" in caplog.records[-1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        GreenScore("other/model").score_samples(["a"], ["a"])


def test_radgraph_is_loaded_and_called_as_its_package_has_it(packages):
    packages("radgraph", F1RadGraph=FakeF1RadGraph)
    metric = RadGraphF1()
    assert metric.score_samples(["abc", "", "a"], ["abc", "x", "abc"]) == [0.5, 0, 0.25]
    assert metric.scorer.arguments == ("partial", "radgraph-xl")
    assert metric.score_samples(["", " "], ["a", "b"]) == [0, 0]


def test_radeval_is_taken_where_the_package_is_not_there(packages):
    packages("radeval", RadEval=FakeRadEval)
    metrics = build_clinical_metrics(["ratescore", "green"])
    scores = {name: metric(["abc", "", "a"], ["x", "x", "x"]) for name, metric in as_text_metrics(metrics).items()}
    assert scores == {"ratescore": [0.3, 0, 0.1], "green": [0.3, 0, 0.1]}
    assert metrics["ratescore"].score_samples(["1.", "abc"], ["x", "x"]) == [0, 0.3]
    notes = clinical_notes(metrics)
    assert len(notes) == 2 and all("package radeval" in note for note in notes) and "chest X-ray" in notes[1]
    with pytest.raises(ValueError, match="no choice of model: leave out 'other/model'"):
        GreenScore("other/model")


def test_radeval_can_be_asked_for(packages):
    packages("radeval", RadEval=FakeRadEval)
    packages("RaTEScore", RaTEScore=FakeRaTEScore)
    packages("radgraph", F1RadGraph=FakeF1RadGraph)
    assert not RateScore().uses_radeval
    metrics = build_clinical_metrics(["ratescore", "radgraph_f1"], use_radeval=True)
    assert [metric.uses_radeval for metric in metrics.values()] == [True, False]
    with pytest.raises(ValueError, match="radgraph_f1 is not taken from radeval"):
        RadGraphF1(use_radeval=True)


@pytest.mark.parametrize(
    "name, install", [("ratescore", "RaTEScore"), ("green", "green-score"), ("radgraph_f1", "radgraph")]
)
def test_without_its_package_a_metric_says_what_to_install(packages, name, install):
    with pytest.raises(
        ImportError, match=f"{name} needs a package that is not there: `pip install {install}`"
    ) as caught:
        build_clinical_metrics([name])
    assert ("pip install radeval" in str(caught.value)) == (name != "radgraph_f1")
    with pytest.raises(ValueError, match="out of ratescore, green, radgraph_f1, got bleu"):
        build_clinical_metrics(["bleu"])


def test_a_package_that_gives_too_few_scores_is_found_out(packages):
    packages("radgraph", F1RadGraph=lambda **_: lambda refs, hyps: (0, [0.5], [], []))
    with pytest.raises(RuntimeError, match="radgraph_f1: expected 2 scores from its package, got 1"):
        RadGraphF1().score_samples(["a", "b"], ["a", "b"])


def test_label_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    true, given = torch.randint(0, 2, (2, 30, 4), generator=generator)
    names = ["cyst", "mass", "stone", "clear"]
    rows = [[dict(zip(names, row)) for row in side.tolist()] for side in (given, true)]
    scores = {score.label: score for score in score_labels(*rows)}
    assert list(scores) == [*names, "micro", "macro"]
    for place, name in enumerate(names):
        expected = precision_recall_fscore_support(true[:, place], given[:, place], average="binary")[:3]
        assert (scores[name].precision, scores[name].recall, scores[name].f1) == pytest.approx(expected)
        assert (scores[name].num_reference, scores[name].num_predicted) == (
            true[:, place].sum(),
            given[:, place].sum(),
        )
    for average in ("micro", "macro"):
        expected = precision_recall_fscore_support(true, given, average=average)[:3]
        assert (scores[average].precision, scores[average].recall, scores[average].f1) == pytest.approx(expected)


def test_unknown_labels_are_left_out_and_empty_ones_are_not_in_the_mean():
    given = [{"cyst": 1, "mass": 0}, {"cyst": None, "mass": 0}, {"cyst": 1, "mass": 0}]
    true = [{"cyst": 1, "mass": 0}, {"cyst": 1, "mass": 0}, {"cyst": 0}]
    cyst, mass, micro, macro = score_labels(given, true)
    assert (cyst.precision, cyst.recall, cyst.f1, cyst.num_unknown) == (0.5, 1, pytest.approx(2 / 3), 1)
    assert math.isnan(mass.f1) and mass.num_unknown == 1
    assert macro.f1 == micro.f1 == pytest.approx(2 / 3) and micro.num_unknown == 2
    text = format_labels([cyst, mass, micro, macro])
    assert "| cyst | 50.0 | 100.0 | 66.7 | 1 | 2 | 1 |" in text and "| mass | - |" in text
    assert "No report on either side has mass" in text
    assert json.loads(json.dumps(mass.to_dict(), allow_nan=False))["f1"] is None


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one report, got 0 predicted and 1 true"):
        score_labels([], [{"a": 1}])
    with pytest.raises(ValueError, match="got -1 for 'a' in a predicted report"):
        score_labels([{"a": -1}], [{"a": 1}])
    with pytest.raises(ValueError, match="one alone has b, c"):
        score_labels([{"a": 1, "b": 0}], [{"a": 1, "c": 0}])
    with pytest.raises(ValueError, match="none at all"):
        score_labels([{}], [{}])


def find_cysts(reports):
    return [{"cyst": int("cyst" in report)} for report in reports]


def test_a_labeller_is_a_function_or_its_name(monkeypatch):
    module = ModuleType("labellers")
    module.find_cysts = find_cysts
    monkeypatch.setitem(sys.modules, "labellers", module)
    for labeller in (find_cysts, "labellers:find_cysts"):
        labels = [label_reports(texts, labeller) for texts in (PREDICTIONS, REFERENCES)]
        assert score_labels(*labels)[0].f1 == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match='as "module:function", got .labellers.'):
        find_labeller("labellers")
    with pytest.raises(ValueError, match="no function 'find_masses'"):
        find_labeller("labellers:find_masses")
    with pytest.raises(ImportError, match="'no_such_labeller:label' cannot be imported.*Install its package"):
        find_labeller("no_such_labeller:label")
    with pytest.raises(ValueError, match="a dict of labels for each of 3 reports"):
        label_reports(PREDICTIONS, lambda reports: [{"cyst": 1}])


def test_labels_cannot_end_a_cell():
    text = format_labels(score_labels([{"a|b": 1}], [{"a|b": 1}]))
    (row,) = [line for line in text.splitlines() if line.startswith("| a")]
    assert row.startswith("| a\\|b | 100.0 |")
