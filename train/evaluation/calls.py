"""
Which calls made the answers of an evaluation: with what work and versions, how many, and how fast.

A later call may answer the rest, or nothing at all, and be given other work: what the scores were made with is what is kept
here of each call that made an answer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_json_atomically
from .folders import CALLS, SCORES, versions_of_answers


def read_calls(output: Path) -> list[dict[str, Any]]:
    """The calls that are kept in the folder of an evaluation, the first one first; none if none made an answer there."""
    path = output / CALLS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def begin_call(output: Path, work: Mapping[str, Any], num_before: Mapping[str, int]) -> None:
    """
    Adds a call that is about to answer, and settles what one made that was ended before it was done. For the first process.

    Args:
        output (`Path`):
            Folder of the evaluation, which this call has to itself.
        work (`Mapping`):
            See [`~train.evaluation.loading.describe_work`].
        num_before (`Mapping`):
            By mode, "given" and perhaps "blind", how many answers are there already.
    """
    calls = read_calls(output)
    if calls and calls[-1]["num_new"] is None:
        ended = calls.pop()
        made = {mode: max(0, number - ended["num_before"].get(mode, 0)) for mode, number in num_before.items()}
        if any(made.values()):
            calls.append({**ended, "num_new": made})
    call = {
        "work": dict(work),
        "versions": versions_of_answers(),
        "num_before": dict(num_before),
        "num_new": None,
        "seconds": None,
    }
    write_json_atomically([*calls, call], output / CALLS)


def end_call(output: Path, num_new: Mapping[str, int], seconds: Mapping[str, float]) -> None:
    """
    Adds to the call that was begun last what it made. For the first process.

    Args:
        output (`Path`):
            Folder of the evaluation.
        num_new, seconds (`Mapping`):
            By mode, how many answers all processes made, and how long the slowest of them took.
    """
    *others, last = read_calls(output)
    write_json_atomically([*others, {**last, "num_new": dict(num_new), "seconds": dict(seconds)}], output / CALLS)


def describe_calls(output: Path) -> dict[str, Any]:
    """
    What the answers in the folder of an evaluation were made with.

    Returns:
        `dict` with the `calls`; their `work`, in which `None` stands for what differs between them, and for all of it if there
        were answers before the first of them, or `None` of answers that no call made; and `samples_per_second`, answers with the
        case's own volume, of the calls that were not ended before they were done. Where no call is kept, `work` and
        `samples_per_second` are those of the scores that are there: earlier versions kept them there alone.
    """
    calls = read_calls(output)
    if not calls:
        path = output / SCORES
        scored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {"calls": calls, **{name: scored.get(name) for name in ("work", "samples_per_second")}}
    works = [call["work"] for call in calls]
    made_all = not any(calls[0]["num_before"].values())
    work = {
        name: value if made_all and all(other[name] == value for other in works) else None
        for name, value in works[0].items()
    }
    timed = [call for call in calls if call["seconds"] is not None]
    number, seconds = (sum(call[name]["given"] for call in timed) for name in ("num_new", "seconds"))
    return {"work": work, "calls": calls, "samples_per_second": number / seconds if number else None}


__all__ = ["begin_call", "describe_calls", "end_call", "read_calls"]
