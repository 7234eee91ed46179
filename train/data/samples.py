"""The one form in which every reader hands out samples, whatever files they come from."""

from datasets import Features, List, Value

from .layout import CHOICE_LETTERS, SPLITS, TASKS, Split, Task


# The types of questions in M3D-VQA, by the number in its files (Bai et al. 2024, "M3D: Advancing 3D Medical Image Analysis
# with Multi-Modal Large Language Models"). 0 is a sample without a type.
QUESTION_TYPES: dict[int, str] = {1: "plane", 2: "phase", 3: "organ", 4: "abnormality", 5: "location"}

# image: absolute path of a NIfTI file, or of a folder of slices; decoded when a sample is used, not before.
# case: the patient or study. Samples of one case share it, and a case belongs to one split.
# task: one of `TASKS`.
# question: empty for a report.
# choices: the texts of the choices A to D of a closed question, else empty.
# answer: the report, or the text of the answer.
# answer_choice: the letter of the right choice of a closed question, else empty.
# question_type: a key of `QUESTION_TYPES`, or 0.
SAMPLE_FEATURES = Features(
    {
        "image": Value("string"),
        "case": Value("string"),
        "task": Value("string"),
        "question": Value("string"),
        "choices": List(Value("string")),
        "answer": Value("string"),
        "answer_choice": Value("string"),
        "question_type": Value("int8"),
    }
)


__all__ = ["CHOICE_LETTERS", "QUESTION_TYPES", "SAMPLE_FEATURES", "SPLITS", "TASKS", "Split", "Task"]
