import pytest

from med3dvlm.train.evaluation.journal import Journal


def test_rows_of_all_starts_are_read_and_an_unfinished_line_costs_itself_alone(tmp_path):
    first = Journal(tmp_path, "given")
    first.append([{"id": "a", "prediction": "one\ntwo"}, {"id": "b", "prediction": "ü"}])
    first.append([{"id": "c", "prediction": ""}])
    with first.file.open("ab") as stream:  # as a process that was killed leaves it
        stream.write(b'{"id": "d", "predic')
    second = Journal(tmp_path, "given")
    assert list(second.read()) == ["a", "b", "c"]
    second.append([{"id": "d", "prediction": "again"}])
    rows = Journal(tmp_path, "given").read()
    assert {name: row["prediction"] for name, row in rows.items()} == {
        "a": "one\ntwo",
        "b": "ü",
        "c": "",
        "d": "again",
    }
    assert Journal(tmp_path, "blind").read() == {}


@pytest.mark.parametrize("line", [b"no json\n", b'{"prediction": "x"}\n', b"[]\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    journal = Journal(tmp_path, "given")
    journal.append([{"id": "a"}])
    with journal.file.open("ab") as stream:
        stream.write(line)
    with pytest.raises(ValueError, match=rf"{journal.file.name}, line 2: damaged"):
        journal.read()


def test_what_json_does_not_have_is_not_kept(tmp_path):
    journal = Journal(tmp_path, "given")
    journal.append([{"id": "a", "probability": 0.5}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append([{"id": "b"}, {"id": "c", "probability": float("nan")}])
    assert list(journal.read()) == ["a"]
