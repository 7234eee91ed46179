"""Which case of a preparation is for training, validation or the test: by fractions, or by an index that is there already."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..naming import name_a_few
from .m3d import case_of, read_cap_index
from .samples import SPLITS, Split


DEFAULT_FRACTIONS: dict[str, float] = {"validation": 0.05, "test": 0.05}


def check_splits(
    splits: Mapping[str, float] | str | Path | None,
) -> tuple[dict[str, float], list[tuple[str, Split]] | None]:
    """
    Fractions of the splits; or the volumes of an index with their splits, in its order.

    Raises:
        FileNotFoundError: there is no such index.
        ValueError: the fractions are none, or the index has another form.
    """
    if isinstance(splits, (str, Path)):
        if not Path(splits).is_file():
            raise FileNotFoundError(
                f"{splits}: there is no such file. `splits` (--splits) names an index, M3D_Cap.json."
            )
        # A volume may be in two splits there: it stays in both, as protocols have it, and the report tells.
        given = [(key_of_volume(image), split) for split in SPLITS for image, _ in read_cap_index(Path(splits), split)]
        return {}, list(dict.fromkeys(given))
    fractions = dict(DEFAULT_FRACTIONS if splits is None else splits)
    is_valid = set(fractions) <= set(SPLITS) and all(0 <= fraction <= 1 for fraction in fractions.values())
    held_out = sum(fraction for split, fraction in fractions.items() if split != "train")
    total = held_out + fractions.get("train", 1 - held_out)
    if not is_valid or held_out > 1 or abs(total - 1) > 1e-6:
        raise ValueError(
            '`splits` must be an index, or fractions of the cases such as {"validation": 0.05, "test": 0.05}, the rest '
            f"being for training; got {splits!r}."
        )
    return fractions, None


def describe_splits(
    fractions: Mapping[str, float], given: Sequence[tuple[str, Split]] | None, seed: int
) -> dict[str, Any]:
    """All that decides about the splits, for JSON."""
    if given is None:
        return {"fractions": {split: fractions.get(split, 0) for split in ("validation", "test")}, "seed": seed}
    content = json.dumps(given)
    return {"index": hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}


def key_of_volume(image: str) -> str:
    """What a volume is called whatever the folder above it: its case and file name, with the ending it has today."""
    name = Path(image.replace("\\", "/")).name
    return f"{case_of(image)}/{name.removesuffix('.npy') + '.nii.gz' if name.endswith('.npy') else name}"


def draw_splits(cases: Sequence[str], fractions: Mapping[str, float], seed: int) -> dict[str, Split]:
    """
    A split for each case, by its own place between 0 and 1, which seed and name decide: other cases do not matter. Only where a
    split that is wanted would stay empty, the nearest case is moved into it, for training first.
    """
    places = {
        case: int.from_bytes(hashlib.blake2b(f"{seed}/{case}".encode(), digest_size=16).digest(), "big") / 2**128
        for case in cases
    }
    first, second = fractions.get("test", 0), fractions.get("test", 0) + fractions.get("validation", 0)
    ranges: dict[Split, tuple[float, float]] = {
        "train": (second, 1),
        "test": (0, first),
        "validation": (first, second),
    }
    drawn: dict[str, Split] = {
        case: "test" if place < first else "validation" if place < second else "train"
        for case, place in places.items()
    }
    for split, (lower, upper) in ranges.items():
        if upper - lower < 1e-6 or split in drawn.values():
            continue
        counts = Counter(drawn.values())
        distances = {
            case: max(lower - place, place - upper)
            for case, place in places.items()
            if split == "train" or counts[drawn[case]] > 1
        }
        if distances:
            drawn[min(distances, key=distances.__getitem__)] = split
    return drawn


def check_cases_are_named(
    splits: Any, given: Sequence[tuple[str, Split]], source: Path, cases: Sequence[str]
) -> list[str]:
    """
    The cases of the source that a given index does not name: their volumes will be in no split.

    Args:
        splits (path):
            The index, for the message.
        given (`Sequence[tuple[str, str]]`):
            What stands in it, as [`check_splits`] has it.
        source (`Path`), cases (`Sequence[str]`):
            Folder of the case folders, and those, relative to it.

    Raises:
        ValueError: it names none of the cases, as where the source is one folder too high or too low.
    """
    named = {key.rpartition("/")[0]: None for key, _ in given}
    unnamed = [case for case in cases if case not in named]
    if len(unnamed) == len(cases):
        found = f"it has {next(iter(named))}, the source {cases[0]}" if named else "it is empty"
        raise ValueError(
            f"{splits}: `splits` (--splits) names none of the {len(cases)} cases in {source}: {found}. Name the source folder "
            "that its cases are relative to, one above or one below, or another index."
        )
    return unnamed


def check_index_may_be_written(
    index: Path, report: Path, splits: Any, chosen: Mapping[str, Any], source: Path, folders: Collection[str]
) -> set[str]:
    """
    Args:
        index (`Path`), report (`Path`):
            The index and the report that an earlier call may have written.
        splits, chosen (`Mapping`):
            What was asked for, and what it means, see [`describe_splits`].
        source (`Path`), folders (`Collection[str]`):
            Folder of the case folders; and those of the cases found in it, as the index names them.

    Returns:
        `set[str]`: the volumes that the index names; none without one.

    Raises:
        FileExistsError: there is an index that `splits` names, that no earlier call has made, or that one has made with other
            splits than those now `chosen`, or drawn as earlier versions did, which kept no note of it: it may hold the only
            copy of official splits. Or it cannot be read, or names cases of another source that are not in this one.
    """
    if not index.exists():
        return set()
    if isinstance(splits, (str, Path)) and Path(splits).samefile(index):
        raise FileExistsError(
            f"{index}: `splits` (--splits) names the file that is about to be written, without the entries whose volumes are "
            "not made now: move it elsewhere and pass it from there."
        )
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileExistsError(
            f"{index}: it exists, and preparation has not made it, so it is not replaced. To keep its splits, move it "
            "elsewhere and pass it from there as `splits` (--splits)."
        ) from error
    earlier = content.get("splits")
    if earlier is None and "seed" in chosen:
        raise FileExistsError(
            f"{index}: its splits are those of an earlier version, which drew them otherwise: volumes would move from one "
            "split to another. Move it elsewhere and pass it from there as `splits` (--splits) to keep them, or delete it "
            "to split anew."
        )
    if earlier is not None and earlier != chosen:
        ways = [
            f"the fractions {way['fractions']} and the seed {way['seed']}"
            if "seed" in way
            else f"an index ({way['index']})"
            for way in (earlier, chosen)
        ]
        raise FileExistsError(
            f"{index}: an earlier call took its splits from {ways[0]}, this one takes them from {ways[1]}: volumes would move "
            "from one split to another. Pass the same `splits` (--splits) and `seed` (--seed), or delete the index to split "
            "anew."
        )
    try:
        volumes = {image for split in SPLITS for image, _ in read_cap_index(index, split)}
    except ValueError as error:
        raise FileExistsError(
            f"{error} Preparation wrote this file and it was changed since: delete it to have it made anew."
        ) from error
    lost = sorted({PurePosixPath(image).parent.as_posix() for image in volumes} - set(folders))
    if lost and Path(content["source"]).resolve() != source.resolve():
        raise FileExistsError(
            f"{index}: it names {len(lost)} cases that are not in {source} ({name_a_few(lost, 3)}): an earlier call made it of "
            f"{content['source']}, and this one would drop or replace what is there. Choose another destination; to have both "
            "in one, choose a new one, and the folder above both as the source. To do without these cases, delete the index."
        )
    return volumes


__all__ = [
    "DEFAULT_FRACTIONS",
    "check_cases_are_named",
    "check_index_may_be_written",
    "check_splits",
    "describe_splits",
    "draw_splits",
]
