import csv

from med3dvlm.train.evaluation.published import PublishedScore
from med3dvlm.train.evaluation.scores import Score
from med3dvlm.train.evaluation.tables import build_tables, metric_title, write_tables


NAN = float("nan")


def score(task, metric, group, value, low=NAN, high=NAN, **fields):
    return Score(task=task, metric=metric, group=group, value=value, low=low, high=high, count=8, **fields)


def published(task, metric, group, value, system="M3D-LaMed", table="Table 5", source="A paper"):
    return PublishedScore(
        table=table, task=task, system=system, metric=metric, group=group, value=value, source=source, note=""
    )


SCORES = [
    score("closed_vqa", "accuracy", "plane", 0.5, 0.25, 0.75, blind=0.3, chance=0.25),
    score("closed_vqa", "accuracy", "mean of types", 0.5, blind=0.3, chance=0.25),
    score("closed_vqa", "accuracy", "all", 0.5, 0.25, 0.75, blind=0.3, chance=0.25),
    score("report", "meteor", "all", 0.3642),
    score("report", "corpus_bleu_4", "all", 0.1),
    score("retrieval", "recall_at_1", "volume to report, 100", 0.61, blind=0.01, chance=0.01),
    score("retrieval", "deduplicated_recall_at_1", "volume to report, 100", 0.7, blind=0.01, chance=0.02),
]


def test_tables_have_the_forms_of_the_paper_with_controls_and_published_figures_marked():
    others = [
        published("closed_vqa", "original_accuracy", "plane", 0.988),
        published("report", "meteor", "all", 0.2, system="A | B"),
        published("report", "bertscore", "all", 0.8, table="Table 2"),
    ]
    closed, report, retrieval = build_tables(SCORES, "ours", others, "Not checked.")
    assert [table.notes[-1:] for table in (closed, report, retrieval)] == [("Not checked.",), ("Not checked.",), ()]
    assert closed.header == ("metric", "system", "source", "plane", "mean of types", "all")
    assert closed.rows == (
        ("accuracy", "ours", "measured here", "50.0 [25.0, 75.0]", "50.0", "50.0 [25.0, 75.0]"),
        ("accuracy", "ours, blind", "measured here", "30.0", "30.0", "30.0"),
        ("accuracy", "chance", "", "25.0", "25.0", "25.0"),
        ("accuracy, original rule", "M3D-LaMed", "published [1]", "98.8", "", ""),
    )
    assert report.header == ("system", "source", "METEOR", "BLEU-4 of the corpus", "BERTScore")
    assert ("A | B", "published [1]", "20.0", "", "") in report.rows
    assert ("M3D-LaMed", "published [2]", "", "", "80.0") in report.rows
    assert "A \\| B" in report.to_markdown() and report.notes[1].startswith("[2] Table 2: A paper.")
    assert [row[0] for row in retrieval.rows] == ["volume to report, 100"] * 3 + [
        "volume to report, 100, identical reports match"
    ] * 3
    assert retrieval.header[-3:] == ("R@1", "R@5", "R@10") and retrieval.rows[0][-3:] == ("61.0", "", "")


def test_metrics_have_one_name_for_readers():
    names = ("exact", "meteor", "original_accuracy", "recall_at_5", "of_my_own")
    assert [metric_title(name) for name in names] == [
        "every word right",
        "METEOR",
        "accuracy, original rule",
        "R@5",
        "of my own",
    ]
    (table,) = build_tables([score("open_vqa", "exact", "organ", 0.5)], "ours")
    assert table.rows[0][0] == "every word right"


def test_files_hold_the_tables_and_every_field(tmp_path):
    tables = build_tables(SCORES, "ours")
    write_tables(tables, SCORES, tmp_path)
    with (tmp_path / "closed_vqa.csv").open() as file:
        assert tuple(map(tuple, csv.reader(file))) == (tables[0].header, *tables[0].rows)
    assert (tmp_path / "report.md").read_text().startswith("# Report generation, %\n\n| system |")
    with (tmp_path / "all_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SCORES) and rows[0]["low"] == "0.25" and rows[3]["low"] == rows[3]["blind"] == ""
