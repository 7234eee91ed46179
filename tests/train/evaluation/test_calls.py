import json

from med3dvlm.train.evaluation.calls import begin_call, describe_calls, end_call


def test_only_calls_that_made_answers_are_kept(tmp_path):
    assert describe_calls(tmp_path) == {"work": None, "calls": [], "samples_per_second": None}
    begin_call(
        tmp_path, {"batch_size": 16, "dtype": "float32"}, {"given": 0, "blind": 0}
    )  # ended before its first answer
    begin_call(tmp_path, {"batch_size": 8, "dtype": "float32"}, {"given": 0, "blind": 0})  # ended in the middle
    begin_call(tmp_path, {"batch_size": 4, "dtype": "float32"}, {"given": 3, "blind": 0})
    end_call(tmp_path, {"given": 7, "blind": 10}, {"given": 2.0, "blind": 5.0})
    found = describe_calls(tmp_path)
    ended, last = found["calls"]
    assert (ended["work"]["batch_size"], ended["num_new"], ended["seconds"]) == (8, {"given": 3, "blind": 0}, None)
    assert (last["work"]["batch_size"], last["num_new"]) == (4, {"given": 7, "blind": 10})
    assert found["work"] == {"batch_size": None, "dtype": "float32"}  # what differs is in the calls
    assert found["samples_per_second"] == 3.5  # with the case's own volume, where the time is known
    assert json.loads((tmp_path / "calls.json").read_text()) == found["calls"]


def test_what_an_earlier_version_kept_of_a_complete_evaluation_stays(tmp_path):
    kept = {"work": {"batch_size": 16}, "samples_per_second": 2.5}
    (tmp_path / "scores.json").write_text(json.dumps({**kept, "scores": []}))
    assert describe_calls(tmp_path) == {**kept, "calls": []}


def test_answers_before_the_first_call_that_is_kept_are_of_unknown_work(tmp_path):
    begin_call(tmp_path, {"batch_size": 4, "dtype": "float32"}, {"given": 3, "blind": 0})
    end_call(tmp_path, {"given": 7, "blind": 10}, {"given": 2.0, "blind": 5.0})
    found = describe_calls(tmp_path)
    assert found["work"] == {"batch_size": None, "dtype": None} and found["samples_per_second"] == 3.5
    assert found["calls"][0]["work"]["batch_size"] == 4
