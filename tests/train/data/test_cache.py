import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from preparation_program import IMAGE_SIZE, load_into_cache
from processes import run_processes
from safetensors import safe_open

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.processing.volume_io import InvalidVolumeError
from med3dvlm.train.data import cache as cache_module
from med3dvlm.train.data.cache import CACHE_DTYPES, VolumeCache, volume_loader
from med3dvlm.train.data.dataset import ProcessedVolumes
from med3dvlm.train.data.preparation_record import PREPARED


def image_processor(**overrides):
    return Med3DVLMImageProcessor(**{"image_size": list(IMAGE_SIZE), **overrides})


def write_scan(path, seed=0):
    array = np.random.default_rng(seed).integers(-1000, 1500, size=(14, 12, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.7, 0.8, 2.5, 1])), path)
    return str(path)


def write_stack(folder, count=6):
    folder.mkdir()
    for number in range(count):
        array = np.random.default_rng(number).integers(0, 256, size=(20, 30), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number}.png")
    return str(folder)


def expected_volume(scan, **overrides):
    return image_processor(**overrides)(scan)["pixel_values"][0, 0]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_first_and_later_loads_are_equal_to_the_bit(dtype, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    cache = VolumeCache(tmp_path / "cache", image_processor(), dtype)
    first = cache.load(scan)
    assert first.shape == IMAGE_SIZE and first.dtype == torch.float32
    assert cache.path_of(scan).is_file()
    again = VolumeCache(tmp_path / "cache", image_processor(), dtype)
    again.image_processor = None  # nothing is processed a second time
    assert torch.equal(again.load(scan), first)
    error = (first - expected_volume(scan)).abs().max().item()
    bound = CACHE_DTYPES[dtype][1]
    assert error <= bound + 1e-7 and (error > bound / 2 or bound == 0)
    assert first.min() >= 0 and first.max() <= 1
    first.zero_()  # a caller may change what it got
    assert torch.equal(again.load(scan), cache.load(scan)) and again.load(scan).any()


def test_volumes_are_loaded_as_was_asked(tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    plain = volume_loader(image_processor())
    assert isinstance(plain, ProcessedVolumes) and torch.equal(plain.load(scan), expected_volume(scan))
    cached = volume_loader(image_processor(), prepared=True, cache=str(tmp_path / "cache"), dtype="float32")
    assert isinstance(cached, VolumeCache) and cached.dtype == "float32" and cached.options == PREPARED
    assert cached.folder.parent == tmp_path / "cache"


def test_stated_errors_hold_for_all_values():
    values = torch.linspace(0, 1, 1_000_001, dtype=torch.float64).float()
    halves = values.half().float()
    bytes_ = values.mul(255).round().to(torch.uint8).float().div(255)
    assert (halves - values).abs().max() <= CACHE_DTYPES["float16"][1]
    assert (bytes_ - values).abs().max() <= CACHE_DTYPES["uint8"][1] + 1e-7


def test_a_file_is_small_and_says_what_was_done(tmp_path):
    scan = write_scan(tmp_path / "secret_name.nii.gz")
    cache = VolumeCache(tmp_path / "cache", image_processor(), "uint8")
    cache.load(scan)
    with safe_open(cache.path_of(scan), framework="pt") as content:
        metadata = content.metadata()
        assert content.get_tensor("volume").dtype == torch.uint8
    assert metadata["dtype"] == "uint8" and '"intensity_mode": "window"' in metadata["preprocessing_report"]
    assert b"secret_name" not in cache.path_of(scan).read_bytes()


def test_folders_of_slices_are_cached_too(tmp_path, caplog):
    folder = write_stack(tmp_path / "series")
    (tmp_path / "series/x.db").write_bytes(b"")
    cache = VolumeCache(tmp_path / "cache", image_processor(), "float32")
    first = cache.load(folder)
    stack = np.stack([np.asarray(Image.open(tmp_path / f"series/{n}.png"), dtype=np.float32) for n in range(6)]) / 255
    assert torch.equal(first, expected_volume(stack))
    assert "1 files are not among the slices (x.db: not a .png or .jpeg file)" in caplog.text
    cache.image_processor = None
    assert torch.equal(cache.load(folder), first)
    cache.image_processor = image_processor()
    Path(folder, "3.png").unlink()
    assert not torch.equal(cache.load(folder), first)


def test_a_link_that_leads_nowhere_is_one_damaged_slice(tmp_path):
    folder = write_stack(tmp_path / "series")
    (tmp_path / "series/99.png").symlink_to(tmp_path / "nowhere")
    cache = VolumeCache(tmp_path / "cache", image_processor())
    with pytest.raises(ValueError, match="1 slices are damaged, beside 6 .*99.png: the picture cannot be read"):
        cache.load(folder)
    (tmp_path / "scan.nii.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no such scan"):
        cache.load(str(tmp_path / "scan.nii.gz"))


def test_one_slice_replaced_by_another_of_the_same_size_is_noticed(tmp_path):
    folder = write_stack(tmp_path / "series")
    cache = VolumeCache(tmp_path / "cache", image_processor())
    first = cache.load(folder)
    time = os.stat(f"{folder}/5.png").st_mtime_ns
    Image.new("L", (20, 30), 9).resize((30, 20)).save(f"{folder}/2.png")
    os.utime(f"{folder}/2.png", ns=(time - 10, time - 10))  # the folder's latest time stays
    assert not torch.equal(cache.load(folder), first)


def test_a_scan_that_changed_is_processed_again(tmp_path):
    path = tmp_path / "scan.nii.gz"
    cache = VolumeCache(tmp_path / "cache", image_processor(), "float32")
    first = cache.load(write_scan(path))
    second = cache.load(write_scan(path, seed=1))
    assert not torch.equal(first, second) and torch.equal(second, expected_volume(str(path)))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    cache.image_processor = None
    with pytest.raises(TypeError):  # it would be processed
        cache.load(str(path))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_file_is_made_again_with_a_warning(keep, tmp_path, caplog):
    scan = write_scan(tmp_path / "scan.nii.gz")
    cache = VolumeCache(tmp_path / "cache", image_processor())
    first = cache.load(scan)
    file = cache.path_of(scan)
    file.write_bytes(file.read_bytes()[:keep])
    assert torch.equal(cache.load(scan), first)
    assert f"{file}: damaged" in caplog.text
    cache.image_processor = None
    assert torch.equal(cache.load(scan), first)


def test_other_settings_lie_side_by_side(tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    caches = [
        VolumeCache(tmp_path / "cache", image_processor()),
        VolumeCache(tmp_path / "cache", image_processor(), "float32"),
        VolumeCache(tmp_path / "cache", image_processor(hu_range="lung")),
        VolumeCache(tmp_path / "cache", image_processor(), options={"hu_range": "bone"}),
        VolumeCache(tmp_path / "cache", image_processor(image_size=[12, 8, 16])),
    ]
    volumes = [cache.load(scan) for cache in caches]
    assert len({cache.path_of(scan) for cache in caches}) == len(caches)
    for cache, volume in zip(caches, volumes):
        cache.image_processor = None
        assert torch.equal(cache.load(scan), volume)
    assert torch.equal(volumes[3], expected_volume(scan, hu_range="bone").half().float())
    same = VolumeCache(tmp_path / "cache", image_processor(), options={})
    assert same.fingerprint == caches[0].fingerprint


def test_two_processes_fill_one_cache(tmp_path):
    paths = [write_scan(tmp_path / f"{number}.nii.gz", number) for number in range(8)]
    (tmp_path / "output").mkdir()
    run_processes(load_into_cache, 2, tmp_path, str(tmp_path / "cache"), paths, str(tmp_path / "output"))
    first, second = (torch.load(tmp_path / f"output/{rank}.pt") for rank in range(2))
    for path, one, other in zip(paths, first, second):
        assert torch.equal(one, other) and torch.equal(one, expected_volume(path).half().float())
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 8 and all(path.suffix == ".safetensors" for path in files)


def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"one of \['float16', 'float32', 'uint8'\], got 'int4'"):
        VolumeCache(tmp_path, image_processor(), "int4")
    cache = VolumeCache(tmp_path / "cache", image_processor())
    with pytest.raises(FileNotFoundError, match="there is no such scan. Check the path"):
        cache.load(str(tmp_path / "missing.nii.gz"))
    (tmp_path / "bad.nii.gz").write_bytes(b"x" * 400)
    with pytest.raises(InvalidVolumeError, match="bad.nii.gz: not a NIfTI file"):
        cache.load(str(tmp_path / "bad.nii.gz"))
    black = tmp_path / "black"
    black.mkdir()
    for number in range(3):
        Image.new("L", (4, 5)).save(black / f"{number}.png")
    with pytest.raises(InvalidVolumeError, match="black: all voxels are 0"):
        cache.load(str(black))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    scan = write_scan(tmp_path / "scan.nii.gz")
    cache = VolumeCache(tmp_path / "cache", image_processor())

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", fail)
    with pytest.raises(RuntimeError, match=r"cannot be written \(No space left on device\). Free some space"):
        cache.load(scan)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
