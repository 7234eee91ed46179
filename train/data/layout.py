"""
Names of tasks, of splits, and of M3D's files and their columns.

Nothing but text: what writes files in this layout needs no package that reads them.
"""

from typing import Literal, get_args


Task = Literal["report", "closed_vqa", "open_vqa", "yes_no_vqa"]
TASKS: tuple[Task, ...] = get_args(Task)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

CAP_INDEX = "M3D_Cap_npy/M3D_Cap.json"
# In the folder of a study of phantoms, what they were made with.
PHANTOM_SETTINGS = "phantom.json"
VQA_FOLDER = "M3D-VQA"
# M3D_Cap.json calls the second split "validation", the files of M3D-VQA call it "val".
VQA_SPLITS = {"train": "train", "validation": "val", "test": "test"}
CHOICE_LETTERS = ("A", "B", "C", "D")
# What every question needs, and what one with choices needs besides; the last column is the letter of the right choice.
QUESTION_COLUMNS = ("Image Path", "Question Type", "Question", "Answer")
CHOICE_COLUMNS = (*(f"Choice {letter}" for letter in CHOICE_LETTERS), "Answer Choice")
# All columns, in the order of M3D's own writer.
VQA_COLUMNS = ("Image Path", "Text", "Question Type", "Question", *CHOICE_COLUMNS[:4], "Answer", "Answer Choice")


def vqa_file(split: str, task: str) -> str:
    """The file of M3D-VQA with the questions of a split and a task, relative to the study: those of yes and no have their own."""
    return f"{VQA_FOLDER}/M3D_VQA_{'yn_' if task == 'yes_no_vqa' else ''}{VQA_SPLITS[split]}.csv"


__all__ = [
    "CAP_INDEX",
    "CHOICE_COLUMNS",
    "CHOICE_LETTERS",
    "PHANTOM_SETTINGS",
    "QUESTION_COLUMNS",
    "SPLITS",
    "TASKS",
    "VQA_COLUMNS",
    "VQA_FOLDER",
    "VQA_SPLITS",
    "Split",
    "Task",
    "vqa_file",
]
