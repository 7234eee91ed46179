"""Results in a card: what the Hub reads, what readers see, and that all else stays."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from med3dvlm.hub_cards import model_index
from med3dvlm.hub_cards.model_index import add_results_to_card, hub_metric, readable_metric


CARD = """---
license: mit # ours
tags: [a,   b]
base_model: 'org/base'
---

# A model

Text.

```python
# no heading
## no heading either
```

## Limits

None known.
"""
FOREIGN = """model-index:
- name: A model
  results:
  - task: {type: image-classification}
    dataset: {name: Beans, type: beans}
    metrics:
    - {type: accuracy, value: 0.9, verified: true}
# a remark
pipeline_tag: image-text-to-text
"""


def figure(task="closed_vqa", metric="accuracy", group="all", value=0.5, **others):
    fields = {"low": 0.4, "high": 0.6, "count": 1200, "blind": 0.25, "chance": None}
    return {"task": task, "metric": metric, "group": group, "value": value, **fields, **others}


SCORES = {
    "settings": {},
    "scores": [
        figure(group="organ", value=0.123456, chance=0.25),
        figure(group="mean of types", low=None, high=float("nan")),
        figure("open_vqa", "bleu_1", value=0.25),
        figure("retrieval", "recall_at_5", "volume to report, 100", 1),
    ],
}


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(CARD.encode())
    return path


def add(path, scores=SCORES, name="M3D-VQA", kind="org/m3d", **options):
    return add_results_to_card(path, scores, name, kind, **options)


def results_of(path):
    return {
        (result.task_type, result.dataset_config, result.metric_type, result.metric_name): result.metric_value
        for result in ModelCard.load(path).data.eval_results
    }


def test_hub_reads_the_results_and_all_else_stays(card):
    assert add(card) == card and list(card.parent.iterdir()) == [card]
    assert results_of(card) == {
        ("visual-question-answering", "closed_vqa", "accuracy", "Accuracy (organ)"): 0.1235,
        ("visual-question-answering", "closed_vqa", "accuracy", "Accuracy (mean of types)"): 0.5,
        ("visual-question-answering", "open_vqa", "bleu", "BLEU-1 (all)"): 0.25,
        ("image-text-retrieval", "retrieval", "recall@5", "Recall@5 (volume to report, 100)"): 1.0,
    }
    data = ModelCard.load(card).data
    assert data.model_name == "A model"
    (first, *_) = data.eval_results
    assert (first.dataset_name, first.dataset_type, first.dataset_split) == ("M3D-VQA", "org/m3d", "test")
    # Without the two insertions it is the card that was.
    text = card.read_text()
    index = text[text.index("model-index:") : text.index("---\n\n# A model")]
    section = text[text.index("## Results") : text.index("## Limits")]
    assert text.replace(index, "").replace(section, "") == CARD


def test_readers_see_model_interval_blind_chance_and_count(card):
    text = add(card).read_text()
    assert "### M3D-VQA, test: open questions\n" in text
    assert "| Accuracy | organ | 12.35 | 40.00 to 60.00 | 25.00 | 25.00 | 1,200 |" in text
    assert "| Accuracy | mean of types | 50.00 |  | 25.00 |  | 1,200 |" in text
    assert text.index("# A model") < text.index("\n## Results\n") < text.index("\n## Limits\n")


def test_again_changes_nothing_and_new_values_replace_old_ones(card):
    first = add(card).read_bytes()
    assert add(card).read_bytes() == first
    changed = {"scores": [figure(group="organ", value=0.9), figure("report", "meteor", value=0.3)]}
    add(card, changed)
    results = results_of(card)
    assert len(results) == 5
    assert results[("visual-question-answering", "closed_vqa", "accuracy", "Accuracy (organ)")] == 0.9
    assert results[("image-to-text", "report", "meteor", "METEOR (all)")] == 0.3
    text = card.read_text()
    assert text.count("## Results") == 1 + text.count("### Results") and "12.35" not in text and "90.00" in text


def test_a_figure_under_a_former_name_is_replaced(card):
    add(card, {"scores": [figure("open_vqa", "exact"), figure("open_vqa", "exact", "organ")]})
    card.write_text(card.read_text().replace("Every word right (all)", "Exact match (all)"))
    add(card, {"scores": [figure("open_vqa", "exact", value=0.75)]})
    assert results_of(card) == {
        ("visual-question-answering", "open_vqa", "exact_match", f"Every word right ({group})"): value
        for group, value in {"all": 0.75, "organ": 0.5}.items()
    }


def test_data_sets_and_splits_stand_beside_each_other(card):
    add(card)
    add(card, name="Phantoms", kind="phantoms")
    add(card, split="validation")
    before = card.read_bytes()
    assert len(ModelCard.load(card).data.eval_results) == 12
    text = before.decode()
    places = [text.index(part) for part in ("## Results", "### M3D-VQA, test", "### Phantoms, test", "## Limits")]
    assert places == sorted(places) and text.count("\n## Results\n") == 1
    assert add(card).read_bytes() == before  # each in its own place


def test_tasks_of_one_data_set_stand_beside_each_other(card):
    add(card, {"scores": [figure(value=0.5)]})
    add(card, {"scores": [figure("report", "meteor", value=0.3)]})
    text = card.read_text()
    assert "| Accuracy | all | 50.00 |" in text and "| METEOR | all | 30.00 |" in text
    add(card, {"scores": [figure(value=0.75)]})
    text = card.read_text()
    assert "| Accuracy | all | 75.00 |" in text and "50.00 |" not in text and "| METEOR | all | 30.00 |" in text
    assert text.count("### M3D-VQA, test") == 2


def test_a_part_of_a_split_is_not_taken_for_the_whole(card):
    note = "Only the first 4 cases of the split 'test' were scored."
    part = {"scores": [figure(), figure(metric="original_accuracy")], "notes": [note, "a <!-- b"], "num_cases": 4}
    add(card, {**part, "part_of_split": True})
    assert {str(result.dataset_args) for result in ModelCard.load(card).data.eval_results} == {"{'num_cases': 4}"}
    text = card.read_text()
    assert text.index("### M3D-VQA, test") < text.index(f"**{note}**") < text.index("| Accuracy | all |")
    assert "**a &lt;!-- b**" in text
    # The whole takes the place of the part, and no figure of the part is left beside it.
    add(card, {"scores": [figure(value=0.7)], "notes": [], "num_cases": 900, "part_of_split": False})
    (result,) = ModelCard.load(card).data.eval_results
    assert (result.dataset_args, result.metric_value) == (None, 0.7) and note not in card.read_text()


def test_results_of_others_stay(card):
    foreign = FOREIGN.replace("type: beans}", "type: beans, args: [all]}")
    card.write_bytes(CARD.replace("---\n\n", foreign + "---\n\n", 1).encode())
    add(card)
    results = ModelCard.load(card).data.eval_results
    assert (results[0].dataset_type, results[0].metric_value, results[0].verified) == ("beans", 0.9, True)
    assert len(results) == 5
    assert "\n# a remark\npipeline_tag: image-text-to-text\n---\n" in card.read_text()


def test_another_model_of_the_index_keeps_its_name(card):
    card.write_bytes(CARD.replace("---\n\n", FOREIGN + "---\n\n", 1).encode())
    add(card, model_name="Another")
    index = model_index._load_metadata(model_index.FRONT_MATTER.match(card.read_text())[1], card)["model-index"]
    assert [model["name"] for model in index] == ["A model", "Another"]
    before = card.read_bytes()
    assert add(card, model_name="Another").read_bytes() == before


def test_only_chosen_groups_go_into_the_metadata(card):
    add(card, groups=["mean of types"])
    assert [name for *_, name in results_of(card)] == ["Accuracy (mean of types)"]
    assert "| BLEU-1 | all | 25.00 |" in card.read_text()
    with pytest.raises(
        ValueError, match="No score is of the groups every: expected some of organ, mean of types, all"
    ):
        add(card, groups=["every"])


def test_line_endings_stay(card):
    card.write_bytes(CARD.replace("\n", "\r\n").encode())
    content = add(card).read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n")
    assert len(results_of(card)) == 4


def test_published_folder_and_adapter(published, tmp_path):
    from med3dvlm.train.merge import ADAPTER_CARD

    folder = tmp_path / "published"
    shutil.copytree(published["vlm"], folder)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    before = ModelCard.load(folder / "README.md").data.to_dict()
    assert add(folder, scores) == folder / "README.md"
    card = ModelCard.load(folder / "README.md")
    after = card.data.to_dict()
    assert after.pop("model-index")[0]["name"] == "Med3DVLM" and after == before
    assert card.text.index("## Results") < card.text.index("## Intended use")

    adapter = tmp_path / "adapter" / "README.md"
    adapter.parent.mkdir()
    adapter.write_text(
        ADAPTER_CARD.format(base="org/base", here="here", notes="Notes.", training_data="None.", training_record="")
    )
    add(adapter.parent, scores)
    assert len(results_of(adapter)) == 4 and adapter.read_text().endswith(": end -->\n")


def test_nothing_is_written_when_writing_fails(card, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(model_index, "write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        add(card)
    assert card.read_text() == CARD


@pytest.mark.parametrize(
    "metric, identifier, name",
    [
        ("accuracy", "accuracy", "Accuracy"),
        ("original_accuracy", "accuracy", "Original accuracy"),
        ("rouge_1", "rouge", "ROUGE-1"),
        ("meteor", "meteor", "METEOR"),
        ("bertscore", "bertscore", "BERTScore"),
        ("exact", "exact_match", "Every word right"),
        ("rouge_l", "rouge", "ROUGE-L"),
        ("corpus_bleu_4", "bleu", "BLEU-4 of the corpus"),
        ("ratescore", "ratescore", "RaTEScore"),
        ("green", "green", "GREEN"),
        ("radgraph_f1", "radgraph_f1", "RadGraph F1"),
        ("recall_at_10", "recall@10", "Recall@10"),
        ("deduplicated_recall_at_1", "recall@1", "Deduplicated recall@1"),
        ("of_my_own", "of_my_own", "Of my own"),
    ],
)
def test_metrics_are_named_as_on_the_hub(metric, identifier, name):
    assert (hub_metric(metric), readable_metric(metric)) == (identifier, name)


@pytest.mark.parametrize(
    "scores, message",
    [
        ({}, "at least one figure under `scores`"),
        ({"scores": []}, "at least one figure"),
        ({"scores": [{"task": "report"}]}, "figure 1: expected `task`, `metric`, `group` and `count`"),
        ({"scores": ["a"]}, "figure 1: expected `task`"),
        ({"scores": [figure("a --> b")]}, "figure 1: expected `task` to be a word, got 'a --> b'"),
        ({"scores": [figure(value=float("nan"))]}, "figure 1: expected a finite `value`, got nan"),
        ({"scores": [figure(), figure()]}, "figure 2: closed_vqa / accuracy / all occurs a second time"),
        ({"scores": [figure()], "part_of_split": True}, "expected the number of cases under `num_cases`, got None"),
        ({"scores": [figure()], "notes": "Few."}, "expected a list of texts under `notes`, got 'Few.'"),
    ],
)
def test_scores_of_another_form_are_refused(card, scores, message):
    with pytest.raises(ValueError, match=message):
        add(card, scores)
    assert card.read_text() == CARD


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "a b"}, "`dataset_type` to be `organisation/name` or a word, got 'a b'"),
        ({"kind": "a--b"}, "`dataset_type`"),
        ({"split": "-->"}, "`split` to be a word"),
        ({"name": "a\nb"}, "`dataset_name` to be one line"),
        ({"name": "<b>"}, "`dataset_name`"),
    ],
)
def test_names_that_would_break_a_card_are_refused(card, options, message):
    with pytest.raises(ValueError, match=message):
        add(card, **options)


@pytest.mark.parametrize(
    "text, message",
    [
        ("# A model\n", "metadata between two lines `---`"),
        ("---\n- a\n---\n", "expected metadata with keys"),
        ("---\na: [\n---\n", "its metadata are no YAML"),
        ("---\nmodel-index:\n- name: a\n---\n", "`model-index` is not of the Hub's form"),
        ("---\n{license: mit}\n---\n", "are no YAML|cannot be replaced without touching other metadata"),
        ("---\na: 1\n---\n<!-- results of open_vqa on org/m3d, test: end -->\n", "each once"),
    ],
)
def test_cards_that_cannot_be_changed_are_refused_and_left(tmp_path, text, message):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        add(path)
    assert path.read_text() == text


def test_missing_files_are_named(card, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such card"):
        add(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="Run `med3dvlm evaluate` first"):
        add(card, tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        add(card, tmp_path / "scores.json")
