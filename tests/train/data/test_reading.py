import json
import os

import pytest
import torch

from med3dvlm.train.data.reading import find_broken, read_all


class SomeBroken:
    """Volumes of which those in `broken` cannot be read."""

    def __init__(self, *broken):
        self.broken, self.loaded = broken, []

    def load(self, path):
        self.loaded.append(path)
        if path in self.broken:
            raise ValueError(f"{path}: damaged")
        return torch.zeros(2, 3, 4)


def test_volumes_are_read_where_the_system_does_not_tell_the_usable_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    assert read_all(SomeBroken("b"), ["a", "b"]) == {"b": "b: damaged"}


def test_what_is_broken_is_listed_once_and_for_all(tmp_path):
    listing = tmp_path / "skipped.jsonl"
    assert find_broken(SomeBroken("b", "\u2028"), ["\u2028", "a", "b"], listing) == ["b", "\u2028"]
    assert json.loads(listing.read_text().split("\n")[0]) == {"image": "b", "reason": "b: damaged"}
    later = SomeBroken("a")
    assert find_broken(later, ["a", "b"], listing) == ["b", "\u2028"] and not later.loaded


def test_without_a_listing_nothing_may_be_broken():
    with pytest.raises(ValueError, match="1 of 2 volumes cannot be read, the first is b: b: damaged Mend them"):
        find_broken(SomeBroken("b"), ["a", "b"])
    assert find_broken(SomeBroken(), ["a", "b"]) == []
