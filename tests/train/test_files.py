import json
import math
import multiprocessing
import os
import time

import pytest

from med3dvlm.train.files import only_one_at, without_nan, write_atomically, write_json_atomically, write_json_lines


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    write_atomically(b"old", tmp_path / "new" / "scan.nii.gz")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(b"voxels", tmp_path / "new" / "scan.nii.gz")
    assert [file.read_bytes() for file in (tmp_path / "new").iterdir()] == [b"old"]


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path):
    """As the workers of a data loader, which may outlive a training that was killed."""
    context = multiprocessing.get_context("fork")
    has_begun = context.Event()

    def work():
        has_begun.set()
        time.sleep(60)

    child = context.Process(target=work)
    with only_one_at(tmp_path / "lock", "held"):
        child.start()
        assert has_begun.wait(60)
        with pytest.raises(BlockingIOError, match="^held$"), only_one_at(tmp_path / "lock", "held"):
            pass
    try:
        with only_one_at(tmp_path / "lock", "held"):
            pass
    finally:
        child.kill()
        child.join()


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    for content in ({"a": 1}, {"b": [2.5, None]}):
        write_json_atomically(content, path)
        assert json.loads(path.read_text()) == content
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_have_are_none_at_all_levels():
    content = {"a": math.nan, "b": [1, -math.inf, "nan"], "c": {"d": (2.5, math.inf)}, "e": None}
    assert without_nan(content) == {"a": None, "b": [1, None, "nan"], "c": {"d": [2.5, None]}, "e": None}


def test_what_json_does_not_have_is_not_written_as_lines(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines([{"score": 0.5}, {"score": float("nan")}], tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())
