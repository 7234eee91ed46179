import json
from dataclasses import asdict

import pytest

from med3dvlm.train.evaluation.predictions import build_references, read_predictions


def sample(task="open_vqa", **fields):
    base = {"image": "a.nii.gz", "case": "a", "task": task, "question": "Where?", "choices": [], "answer": "liver"}
    return {**base, "answer_choice": "", "question_type": 3, **fields}


SAMPLES = [
    sample(),
    sample("closed_vqa", choices=["liver", "spleen", "lung", "heart"], answer_choice="A"),
    sample(question="Which?", case="b"),
    sample("report", question="", question_type=0, answer="A cyst."),
]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_references_are_numbered_within_their_task():
    references = build_references(SAMPLES)
    assert [reference.id for reference in references] == [
        "open_vqa/000000",
        "closed_vqa/000000",
        "open_vqa/000001",
        "report/000000",
    ]
    closed = references[1]
    assert closed.question == "Where? Choices: A. liver B. spleen C. lung D. heart"
    assert (closed.reference, closed.expected, references[3].expected) == ("liver", "A. liver", "A cyst.")


def test_unknown_types_of_questions_are_named():
    with pytest.raises(ValueError, match=r"a: question type 9 is not one of \[1, 2, 3, 4, 5\], for 'Where\?'"):
        build_references([sample(question_type=9)])


def test_predictions_come_in_the_order_of_the_references(tmp_path):
    references = build_references(SAMPLES)
    rows = [{"id": entry.id, "prediction": entry.id[-1] + entry.task, "more": 1} for entry in reversed(references)]
    path = write(tmp_path / "p.jsonl", *rows[:2], "\n", *rows[2:])
    assert read_predictions(path, references) == ["0open_vqa", "0closed_vqa", "1open_vqa", "0report"]


def test_white_space_around_predictions_does_not_count(tmp_path):
    rows = [{"id": "open_vqa/000000", "prediction": " Yes.\n"}]
    assert read_predictions(write(tmp_path / "p.jsonl", *rows), build_references(SAMPLES[:1])) == ["Yes."]


def test_a_byte_order_mark_does_not_count(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": "open_vqa/000000", "prediction": "Yes."})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets and PowerShell save UTF-8
    assert read_predictions(path, build_references(SAMPLES[:1])) == ["Yes."]
    path.write_bytes(
        path.read_bytes().replace(b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n")
    )  # on a line that is otherwise empty
    assert read_predictions(path, build_references(SAMPLES[:1])) == ["Yes."]


def test_answers_to_tasks_that_are_not_asked_are_passed_over(tmp_path):
    references = build_references(SAMPLES[:1])
    answers = [{"id": name, "prediction": name} for name in ("open_vqa/000000", "report/000000", "yes_no_vqa/000007")]
    path = write(tmp_path / "p.jsonl", *answers)
    assert read_predictions(path, references) == ["open_vqa/000000"]
    write(path, *answers, {"id": "open_vqa/000009", "prediction": ""})  # of a task that is asked
    with pytest.raises(ValueError, match="1 ids are not among the 1 asked: open_vqa/000009"):
        read_predictions(path, references)


def test_answers_to_something_else_are_refused(tmp_path):
    references = build_references(SAMPLES)
    rows = [{**asdict(entry), "prediction": "x"} for entry in references]
    rows[1]["answer_choice"] = None  # as a table without it writes it
    assert read_predictions(write(tmp_path / "p.jsonl", *rows), references) == ["x"] * 4
    for place, field, value in (
        (0, "question", "Where is Mr Smith's cyst?"),
        (1, "answer_choice", "B"),
        (3, "reference", "Mr Smith has a cyst."),
        (3, "reference", 5),
    ):
        changed = [{**row, field: value} if number == place else row for number, row in enumerate(rows)]
        message = f"line {place + 1}: the '{field}' of {references[place].id} is another one in these data"
        with pytest.raises(ValueError, match=message) as caught:
            read_predictions(write(tmp_path / "p.jsonl", *changed), references)
        assert "Smith" not in str(caught.value) and "cyst" not in str(caught.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        (["{\n"], "line 1: not JSON"),
        (["[1]\n"], r"line 1: expected .* got list\."),
        ([{"id": "open_vqa/000000"}], "line 1: expected"),
        ([{"id": "open_vqa/000000", "prediction": None}], "line 1: expected"),
        ([{"id": "x", "prediction": ""}] * 2, "line 2: its id occurs a second time, first in line 1"),
        (
            [{"id": "x", "prediction": ""}],
            "1 ids are not among the 4 asked: line 1; 4 of 4 have no prediction: .* and 1 more",
        ),
        ([], "4 of 4 have no prediction: open_vqa/000000, closed_vqa/000000, open_vqa/000001 and 1 more"),
    ],
)
def test_what_does_not_match_is_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_predictions(write(tmp_path / "p.jsonl", *rows), build_references(SAMPLES))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file of predictions"):
        read_predictions(tmp_path / "none.jsonl", build_references(SAMPLES))


@pytest.mark.parametrize(
    "row", [{"id": 7, "report": "Mr Smith"}, ["Mr Smith"], "Mr Smith", {"id": "Mr Smith", "prediction": 5}]
)
def test_a_line_of_another_form_is_named_without_its_texts(row, tmp_path):
    with pytest.raises(ValueError, match="line 1: expected .* with two texts, got ") as caught:
        read_predictions(write(tmp_path / "p.jsonl", row if isinstance(row, dict) else json.dumps(row) + "\n"), [])
    assert "Smith" not in str(caught.value)
    if row == {"id": 7, "report": "Mr Smith"}:
        assert "got id (int), report (str)." in str(caught.value)


def test_ids_of_others_are_named_by_their_lines(tmp_path):
    names = ["Smith_John", "open_vqa/000009", "report/Smith"]
    rows = [{"id": name, "prediction": ""} for name in names]
    for given, message in (
        (rows, "3 ids are not among the 4 asked: line 1, open_vqa/000009, line 3; "),
        ([*rows, rows[0]], "line 4: its id occurs a second time, first in line 1."),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_predictions(write(tmp_path / "p.jsonl", *given), build_references(SAMPLES))
        assert "Smith" not in str(caught.value)


def test_what_is_no_text_is_named_by_its_line(tmp_path):
    references = build_references(SAMPLES[:1])
    path = write(tmp_path / "p.jsonl", "\n", '{"id": "open_vqa/000000", "prediction": "a \\ud83d cyst"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: half of a character \(\\ud83d\)"):
        read_predictions(path, references)
    path.write_bytes(
        '{"id": "x", "prediction": ""}\n{"id": "open_vqa/000000", "prediction": "Größe"}\n'.encode("cp1252")
    )
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: not UTF-8 text .* Save it as UTF-8"):
        read_predictions(path, references)
