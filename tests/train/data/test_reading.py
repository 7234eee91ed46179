import json
import os

import pytest
import torch

from med3dvlm.train.data import reading
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


def test_what_is_read_soon_is_read_in_this_process(monkeypatch):
    monkeypatch.setattr(reading, "worker_pool", None)
    images = [str(number) for number in range(100)]
    volumes = SomeBroken("40", "99")
    assert list(read_all(volumes, images, num_workers=2)) == ["40", "99"] and volumes.loaded == images


class TellsProcess:
    """Volumes of which none can be read; the reason is the process that tried."""

    def load(self, path):
        raise ValueError(str(os.getpid()))


def test_the_rest_of_what_takes_long_is_read_by_processes(monkeypatch):
    monkeypatch.setattr(reading, "START_SECONDS", 0.0)
    images = [str(number) for number in range(40)]
    faults = read_all(TellsProcess(), images, num_workers=2)
    readers = [int(faults[image]) for image in images]
    assert list(faults) == images and set(readers[:16]) == {os.getpid()} and os.getpid() not in readers[16:]


def test_what_is_broken_is_listed_by_its_place_in_the_study(tmp_path):
    listing, images = tmp_path / "skipped.jsonl", [str(tmp_path / name) for name in ("\u2028", "a", "b")]
    assert find_broken(SomeBroken(images[2], images[0]), images, listing, tmp_path) == [images[0], images[2]]
    rows = [json.loads(line) for line in listing.read_text().rstrip("\n").split("\n")]
    assert [row["image"] for row in rows] == ["b", "\u2028"] and rows[0]["reason"] == f"{images[2]}: damaged"


def test_a_resumed_run_leaves_out_the_same_volumes_and_another_start_reads_again(tmp_path):
    listing, images = tmp_path / "skipped.jsonl", [str(tmp_path / name) for name in ("a", "b")]
    find_broken(SomeBroken(images[1]), images, listing, tmp_path)
    moved = [str(tmp_path / "elsewhere" / name) for name in ("a", "b")]
    later = SomeBroken(moved[0])
    kept = find_broken(later, moved, listing, tmp_path / "elsewhere", reuse_listing=True)
    assert kept == [moved[1]] and not later.loaded
    assert find_broken(later, moved, listing, tmp_path / "elsewhere") == [moved[0]]
    assert find_broken(SomeBroken(), images, listing, tmp_path) == [] and not listing.read_text()


def test_without_a_listing_nothing_may_be_broken():
    with pytest.raises(ValueError, match="1 of 2 volumes cannot be read, the first is b: b: damaged Mend them"):
        find_broken(SomeBroken("b"), ["a", "b"])
    assert find_broken(SomeBroken(), ["a", "b"]) == []
