"""
Questions with their references, and what a system answered: one JSON line for each, matched by id.

Any system can be scored by the harness: `references.jsonl` lists what is asked, and a file with a line
`{"id": "closed_vqa/000012", "prediction": "B. spleen"}` for each of its entries answers it. An id says only which row of the
data is meant: best add `prediction` to the lines of `references.jsonl`, so that what was asked can be compared.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.samples import QUESTION_TYPES, TASKS
from ..files import find_surrogate
from ..naming import name_a_few
from ..prompts import format_answer, format_question


# Of a reference, what a line with a prediction may repeat.
CHECKED_FIELDS = ("question", "reference", "answer_choice")
# Ids of ours; those of others may be of patients, and messages do not show them.
ID = re.compile(rf"(?:{'|'.join(TASKS)})/\d+")


@dataclass(frozen=True)
class Reference:
    """
    One thing that is asked, and the true answer.

    Args:
        id (`str`): `task/row`, the row counted from 0 among the samples of the task, in the order of the data.
        case (`str`): Patient or study.
        image (`str`): Path of the volume.
        task (`str`): One of `TASKS`.
        question_type (`int`): A key of `QUESTION_TYPES`, or 0.
        question (`str`): As the model is asked, choices included.
        reference (`str`): The true answer; for a closed question its text, without the letter.
        answer_choice (`str`): The letter of the right choice of a closed question, else empty.
    """

    id: str
    case: str
    image: str
    task: str
    question_type: int
    question: str
    reference: str
    answer_choice: str

    @property
    def expected(self) -> str:
        """The whole answer that a model is taught: the letter and the text, for a closed question."""
        return format_answer({"task": self.task, "answer_choice": self.answer_choice, "answer": self.reference})


def build_references(samples: Iterable[Mapping[str, Any]]) -> list[Reference]:
    """
    References of samples, in their order.

    Args:
        samples (`Iterable`):
            Rows of `SAMPLE_FEATURES`.

    Raises:
        ValueError: a sample has a type of question that is not known.
    """
    counts: dict[str, int] = {}
    references = []
    for sample in samples:
        task, question_type = sample["task"], sample["question_type"]
        if question_type and question_type not in QUESTION_TYPES:
            raise ValueError(
                f"{sample['case']}: question type {question_type} is not one of {sorted(QUESTION_TYPES)}, for "
                f"{sample['question']!r}. Check the data with `med3dvlm prepare check`."
            )
        row = counts[task] = counts.get(task, -1) + 1
        references.append(
            Reference(
                id=f"{task}/{row:06d}",
                case=sample["case"],
                image=sample["image"],
                task=task,
                question_type=question_type,
                question=format_question(sample),
                reference=sample["answer"],
                answer_choice=sample["answer_choice"],
            )
        )
    return references


def read_predictions(path: Path, references: Sequence[Reference]) -> list[str]:
    """
    The predictions of a file, in the order of the references, without white space at their ends.

    Args:
        path (`Path`):
            JSON lines with `id` and `prediction`. Where a line also has `question`, `reference` or `answer_choice`, as those of
            `references.jsonl` do, they must be those of the reference with its id: an id alone says only which row of the data
            was asked about. Other keys, and ids of tasks that are not asked, are ignored.
        references (`Sequence[Reference]`):
            What was asked.

    Returns:
        `list[str]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of this form, an id occurs twice, is not among the references, or has no line, or a line is
            about something else than its reference. The message names the line, or the first few ids and how many there are,
            and no text of a patient; an id that is not of the form of ours stands there as its line.
    """
    found: dict[str, str] = {}
    lines: dict[str, int] = {}
    asked = {reference.id: reference for reference in references}
    for number, row in read_json_lines(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("id", "prediction")):
            # The keys alone: what stands under them may be of a patient.
            keys = [f"{name} ({type(value).__name__})" for name, value in row.items()] if isinstance(row, dict) else []
            raise ValueError(
                f'{path}, line {number}: expected {{"id": "...", "prediction": "..."}} with two texts, got '
                f"{name_a_few(keys, 3) or type(row).__name__}."
            )
        if (place := find_surrogate(row["id"] + row["prediction"])) is not None:
            raise ValueError(
                f"{path}, line {number}: half of a character ({place}), which no file can hold. Write the answers as UTF-8."
            )
        if row["id"] in found:
            raise ValueError(f"{path}, line {number}: its id occurs a second time, first in line {lines[row['id']]}.")
        found[row["id"]], lines[row["id"]] = row["prediction"].strip(), number
        for field in CHECKED_FIELDS if row["id"] in asked else ():
            said, true = row.get(field), getattr(asked[row["id"]], field)
            if said is not None and (not isinstance(said, str) or said.split() != true.split()):
                raise ValueError(
                    f"{path}, line {number}: the {field!r} of {row['id']} is another one in these data, so that the answer is to "
                    "something else. Answer what `med3dvlm evaluate references` writes for them."
                )
    wanted = [reference.id for reference in references]
    known, not_asked = set(wanted), {*TASKS} - {reference.task for reference in references}
    unknown = [name for name in found if name not in known and name.partition("/")[0] not in not_asked]
    missing = [name for name in wanted if name not in found]
    problems = []
    if unknown:
        shown = [name if ID.fullmatch(name) else f"line {lines[name]}" for name in unknown]
        problems.append(f"{len(unknown)} ids are not among the {len(wanted)} asked: {name_a_few(shown, 3)}")
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} have no prediction: {name_a_few(missing, 3)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}. The ids are those of references.jsonl.")
    return [found[name] for name in wanted]


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """
    Lines of a JSONL file with their number from 1; empty lines are passed over, and a byte order mark at the beginning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON, or not in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of predictions.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
                    ) from error
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error


__all__ = ["Reference", "build_references", "read_json_lines", "read_predictions"]
