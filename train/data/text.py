"""Shortening reports to what a text encoder takes, in whole sentences."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


# Words after which a full stop does not end a sentence ...
ABBREVIATIONS = re.compile(
    r"(?:approx|ca|cf|cont'd|dr|e\.g|ed|i\.e|incl|mr|mrs|ms|prof|resp|st|vs|viz|w\.r\.t)$", re.I
)
# ... and those after which it does not if a number follows, as in "No. 3" but not in "Is there a lesion? No."
ABBREVIATIONS_BEFORE_NUMBERS = re.compile(r"(?:al|figs?|im|img|max|min|nos?|nr|pp|ref|ser|seg|vol)$", re.I)

# Where a sentence may end: after ".", "?", "!" and closing quotes or brackets, if white space follows or, as reports that
# lost their line breaks have it, a capital right after the full stop of a word; and at a line break, if what follows does
# not look like the rest of a wrapped line.
ENDS = re.compile(
    r"[.!?]+[\"'\u2019\u201d)\]]*(?=\s|$)"
    r"|(?<=[a-z)])\.(?=[A-Z])"
    r"|\n(?=\s*(?:\n|[A-Z*\u2022-]|\d{1,2}[.)]\s|$))"
)
LAST_WORD = re.compile(r"[^\s(\[\"'\u2018\u201c]+$")
# The label of an item at the beginning of a sentence: "1.", "12.", "b.", "1.2."
LIST_LABEL = re.compile(r"\s*(?:\d{1,2}(?:\.\d{1,2})*|[A-Za-z])$")


def split_sentences(text: str) -> list[str]:
    """
    Splits a report into sentences. Decimals (`3.5 cm`), abbreviations (`Dr.`, `e.g.`, `approx.`, `vs.`, `No. 3`,
    `Fig. 2`) and the numbers of lists (`1. Liver`) do not end one; a line break does,
    unless the next line goes on with a small letter.

    Args:
        text (`str`):
            The report.

    Returns:
        `list[str]`: the sentences with the white space after them, so that joined they are `text` again.

    Example:

    ```python
    >>> split_sentences("1. Liver: a cyst of 3.5 cm. 2. Spleen: normal.")
    ['1. Liver: a cyst of 3.5 cm. ', '2. Spleen: normal.']
    ```"""
    return list(_sentences(text))


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for match in ENDS.finditer(text):
        if match[0].startswith(".") and not _ends_sentence(text[start : match.start()], text[match.end() :][:8]):
            continue
        end = match.end()
        while end < len(text) and text[end].isspace():
            end += 1
        if text[start:end].strip():
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def _ends_sentence(before: str, after: str) -> bool:
    """Whether the full stop between the beginning of a sentence and what comes next is the sentence's end."""
    if LIST_LABEL.match(before):
        return False
    word = LAST_WORD.search(before)
    if word is None:
        return True
    if ABBREVIATIONS_BEFORE_NUMBERS.match(word[0]):
        return not after.lstrip()[:1].isdigit()
    return not ABBREVIATIONS.match(word[0])


def keep_whole_sentences(text: str, tokenizer: Any, max_length: int, generator: torch.Generator | None = None) -> str:
    """
    Shortens a text to whole sentences that together have at most `max_length` tokens.

    A text that fits stays as it is. Of a longer one the first sentence stays, and of the others, in the order of the text,
    each that still fits; with a `generator` they are tried in random order instead, so that in the course of training a
    model reads all of a long report. The sentences kept always stand in the order of the text. If the first sentence
    alone is too long, it is cut after the last whole word that fits (a single word that does not, within the word).

    The original implementation differs: it splits at every full stop, so also in `3.5 cm`; puts random sentences
    in the order drawn; and does not count the first sentence, so that the tokenizer then cuts the end off.

    Args:
        text (`str`):
            The report.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the text encoder.
        max_length (`int`):
            Tokens the text may have, with the special ones that the tokenizer adds.
        generator (`torch.Generator`, *optional*):
            Draws which sentences are kept. The same state gives the same sentences.

    Returns:
        `str`.

    Raises:
        ValueError: `max_length` leaves no room beside the special tokens.
    """

    def fits(candidate: str) -> bool:
        return len(tokenizer(candidate, verbose=False)["input_ids"]) <= max_length

    if fits(text):
        return text
    sentences = split_sentences(text)
    if not fits(sentences[0].strip()):
        return _cut(sentences[0].strip(), fits, max_length)
    others = list(range(1, len(sentences)))
    if generator is not None:
        others = (torch.randperm(len(others), generator=generator) + 1).tolist()
    kept = [0]
    for index in others:
        if fits(_join(sentences, [*kept, index])):
            kept.append(index)
    return _join(sentences, kept)


def _join(sentences: Sequence[str], indices: Sequence[int]) -> str:
    return "".join(_separated(sentences[index]) for index in sorted(indices)).strip()


def _separated(sentence: str) -> str:
    """A sentence with white space at its end: "Liver normal.Spleen normal." has none, and its neighbour may now be another."""
    return sentence if sentence[-1].isspace() else f"{sentence} "


def _cut(sentence: str, fits: Callable[[str], bool], max_length: int) -> str:
    """The longest beginning of a sentence that fits and ends with a word, or where none does, within one."""
    ends = [match.end() for match in re.finditer(r"\S+", sentence)]
    count = _largest(len(ends), lambda words: fits(sentence[: ends[words - 1]]))
    length = ends[count - 1] if count else _largest(ends[0], lambda characters: fits(sentence[:characters]))
    if not length:
        raise ValueError(f"`max_length` {max_length} leaves no room for a text beside the tokenizer's special tokens.")
    return sentence[:length]


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` for which `holds`, which is true up to it; 0 if there is none."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if holds(middle) else (low, middle - 1)
    return low


__all__ = ["keep_whole_sentences", "split_sentences"]
