"""The one place where samples become conversations: questions, choices, requests for a report, and the answers to learn.

The chat template of the processor turns a conversation into the format of the language model; nothing here writes special
tokens. The form of closed questions and answers is that of the original implementation of M3D-VQA training.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .data.samples import CHOICE_LETTERS


# Requests for a report. In training one is drawn for each sample and epoch; evaluation uses the first.
REPORT_PROMPTS: tuple[str, ...] = (
    "Write the findings of this scan.",
    "Please write a radiology report for this scan.",
    "Describe what this volume shows.",
    "What are the findings in this scan?",
    "Report this study.",
    "Summarise the findings of this 3D image.",
    "Could you describe this scan as a radiologist would?",
    "Give a report of the abnormal and the normal findings.",
    "What does this scan show?",
    "Please describe the findings in this volume.",
    "Write a description of this medical image.",
    "Provide the findings section for this study.",
    "Explain what can be seen in this scan.",
    "Read this scan and report it.",
    "Generate a report for this volume.",
    "Tell me what you see in this scan.",
    "Which findings does this study show?",
    "Please report the findings of this 3D scan.",
    "Describe this study in the words of a report.",
    "Look through this volume and write down the findings.",
    "I need a report of this scan.",
    "What would a radiologist write about this scan?",
    "Compose the report that belongs to this scan.",
    "Please summarise this study.",
)


# What may stand around the letter of a choice and around its text.
MARKS = "*()[]:., \xa0\t\n\v\f\r"
# The letter of a choice at the beginning of an answer, perhaps in brackets or in bold, and what tells it from a word.
DASH = r"[-\u2013\u2014]"
BREAK = r"[ \xa0]*[\t\n\v\f\r]"
CHOICE = re.compile(rf"\s*[*(\[]*([A-Da-d])(?:[):,\]*]|\.(?!\w\.)|\s+{DASH}|{DASH}(?:\s|$)|\s*$|{BREAK}|(?<![Aa])\s)")


def format_question(sample: Mapping[str, Any], generator: torch.Generator | None = None) -> str:
    """
    What the user asks about the volume of a sample.

    Args:
        sample (`Mapping`):
            A row of `SAMPLE_FEATURES`.
        generator (`torch.Generator`, *optional*):
            Draws the request for a report; without it, the first of `REPORT_PROMPTS` is used.

    Returns:
        `str`. The question itself; a closed question is followed by `" Choices: A. ... B. ... C. ... D. ..."`.

    Raises:
        ValueError: a closed question has other than four choices.
    """
    if sample["task"] == "report":
        if generator is None:
            return REPORT_PROMPTS[0]
        return REPORT_PROMPTS[int(torch.randint(len(REPORT_PROMPTS), (), generator=generator))]
    if sample["task"] != "closed_vqa":
        return sample["question"]
    if len(sample["choices"]) != len(CHOICE_LETTERS):
        raise ValueError(
            f"A closed question needs {len(CHOICE_LETTERS)} choices, got {len(sample['choices'])} for "
            f"{sample['question']!r}: complete them, or use the task 'open_vqa'."
        )
    choices = " ".join(f"{letter}. {choice}" for letter, choice in zip(CHOICE_LETTERS, sample["choices"]))
    return f"{sample['question']} Choices: {choices}"


def format_answer(sample: Mapping[str, Any]) -> str:
    """What the model is to answer: the report or the answer, in a closed question after its letter, `"B. spleen"`."""
    if sample["task"] == "closed_vqa":
        return f"{sample['answer_choice']}. {sample['answer']}"
    return sample["answer"]


def build_messages(
    volume: Any, question: str, answer: str | None = None, system: str | None = None
) -> list[dict[str, Any]]:
    """
    The conversation about one volume, as `apply_chat_template` of the processor takes it.

    Args:
        volume (`Any`):
            The volume, in any form the image processor takes.
        question (`str`):
            What the user asks.
        answer (`str`, *optional*):
            What the model is to learn; left out where it shall answer.
        system (`str`, *optional*):
            A system message.

    Returns:
        `list` of messages.
    """
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    content = [{"type": "image", "image": volume}, {"type": "text", "text": question}]
    messages.append({"role": "user", "content": content})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def describe_case(samples: Sequence[Mapping[str, Any]]) -> str:
    """
    What is known of a case, as a text that can stand where its volume would: the report, and the open questions whose answer
    the report does not have the words of, each with its answer.

    Args:
        samples (`Sequence[Mapping]`):
            Rows of `SAMPLE_FEATURES` of one case.

    Returns:
        `str`, one paragraph.

    Example:

    ```python
    >>> report = {"task": "report", "question": "", "answer": "Cyst of the liver."}
    >>> organ = {"task": "open_vqa", "question": "Which organ is abnormal?", "answer": "liver"}
    >>> plane = {"task": "open_vqa", "question": "Which plane is shown?", "answer": "axial"}
    >>> describe_case([report, organ, plane])
    'Cyst of the liver. Which plane is shown? axial.'
    ```"""
    reports = [sample["answer"] for sample in samples if sample["task"] == "report"]
    told = set(words_of(" ".join(reports)))
    facts = dict.fromkeys(
        f"{sample['question']} {sample['answer'].rstrip('.')}."
        for sample in samples
        if sample["task"] == "open_vqa" and not told.issuperset(words_of(sample["answer"]))
    )
    return " ".join([*dict.fromkeys(reports), *facts])


def build_text_messages(description: str, question: str, answer: str) -> list[dict[str, Any]]:
    """
    The conversation of [`build_messages`] with a text in the place of the volume, from which a language model can learn to
    answer before it has seen any volume.

    Args:
        description (`str`):
            What is known of the case, see [`describe_case`].
        question (`str`), answer (`str`):
            What the user asks, and what the model is to learn.

    Returns:
        `list` of messages.
    """
    content = [{"type": "text", "text": f"{description}\n"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without what stands between them."""
    return re.findall(r"\w+", text.lower())


def parse_choice(text: str) -> str | None:
    """
    The letter that an answer to a closed question begins with, such as `"B"` in `"B. spleen"`, `"(b) spleen"`, `"**B** spleen"`,
    `"B spleen"`, `"B - spleen"` or `"B"`. An A with nothing but a blank before the next word is a word, as in `"A large cyst"`
    and `"A (small) cyst"`; what begins as `"C.T."` does is an abbreviation, and a dash without a blank beside it makes a word, as in
    `"B-cell lymphoma"`.

    Returns:
        `str` or `None`, when the answer begins with no letter of a choice.
    """
    match = CHOICE.match(text)
    return match.group(1).upper() if match else None


def text_after_choice(text: str) -> str | None:
    """
    What follows the letter that [`parse_choice`] finds, without `MARKS` at its ends, such as `"spleen"` in `"(b) spleen"`; empty
    where nothing does, and `None` where there is no letter.
    """
    match = CHOICE.match(text)
    return text[match.end() :].strip(MARKS) if match else None


__all__ = [
    "MARKS",
    "REPORT_PROMPTS",
    "build_messages",
    "build_text_messages",
    "describe_case",
    "format_answer",
    "format_question",
    "parse_choice",
    "text_after_choice",
    "words_of",
]
