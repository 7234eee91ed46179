"""The record of a training: what is in it, and what is left out."""

import json
import shutil
import subprocess

import pytest

from med3dvlm.hub_cards import training_record
from med3dvlm.hub_cards.training_record import (
    describe_training,
    find_commit,
    read_training_record,
    without_absolute_paths,
)


def test_a_record_has_settings_and_those_of_what_came_before_but_no_places(tmp_path):
    settings = {"stage": "projector", "data": {"root": "/data/me/phantoms", "tasks": ["report"]}, "seed": 0}
    first = describe_training(settings, {})
    assert first["tool"].startswith("med3dvlm ") and first["before"] == {}
    assert first["settings"] == {**settings, "data": {"root": "phantoms", "tasks": ["report"]}}
    (tmp_path / "training.json").write_text(json.dumps(first))
    second = describe_training({"stage": "finetune"}, {"start_from": tmp_path, "language_model": "Qwen/Qwen2.5-7B"})
    assert second["before"] == {"start_from": first}
    assert "/data" not in json.dumps(second)


@pytest.mark.parametrize(
    "value, kept",
    [
        ("/data/a b/scans", "scans"),
        ("~/scans", "scans"),
        ("../../hospital/scans", "scans"),
        ("file:///data/scans", "scans"),
        (r"C:\data\scans", "scans"),
        ("org/model", "org/model"),
        ("runs/contrastive", "runs/contrastive"),
        (0.1, 0.1),
    ],
)
def test_of_paths_that_lead_out_the_last_part_is_kept(value, kept):
    assert without_absolute_paths({"a": [value]}) == {"a": [kept]}


@pytest.mark.parametrize("content, found", [("{", "Expecting property name"), ("[]", "list")])
def test_a_record_that_is_none_is_named(tmp_path, content, found):
    assert read_training_record(tmp_path) is None
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=rf"training\.json: expected a JSON object, got {found}.*remove it"):
        read_training_record(tmp_path)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_and_none_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(training_record, "__file__", str(tmp_path / "hub_cards" / "training_record.py"))
    assert find_commit() is None
    (tmp_path / ".git").mkdir()  # none that git knows
    assert find_commit() is None
    (tmp_path / ".git").rmdir()
    (tmp_path / "file").write_text("1")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init",), ("add", "file"), (*identity, "commit", "-m", "first"), ("tag", "v1")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert find_commit() == commit
    (tmp_path / "file").write_text("2")
    assert find_commit() == f"{commit}-dirty"
