"""
What is evaluated on what, how the work is done, and with which metrics.

This imports no package: a wrong option of a command is known before torch is loaded.
"""

from dataclasses import dataclass

from ..data.layout import Split, Task


# Metrics of texts, by the names under which scores are kept. The first four are the paper's.
TEXT_METRICS = ("bleu_1", "rouge_1", "meteor", "bertscore", "rouge_l")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What is evaluated on what.

    Args:
        data (`str`): Folder in the layout of M3D, or a manifest.
        tasks (`tuple[Task, ...]`): What is asked; ("report",) for retrieval too.
        split (`str`, *optional*): "test" if not given.
        num_cases (`int`, *optional*): Only the first so many cases of each task.
        blind (`bool`, *optional*): Whether all is asked a second time with the volume of another case.
        max_new_tokens (`int`, *optional*): Longest answer.
        max_text_length (`int`, *optional*): Tokens of a report in retrieval.
        dtype (`str`, *optional*): Of the weights, such as "bfloat16"; "auto" keeps theirs.
        prepared (`bool`, *optional*): Whether the volumes were prepared before, in [0, 1].
    """

    data: str
    tasks: tuple[Task, ...]
    split: Split = "test"
    num_cases: int | None = None
    blind: bool = True
    max_new_tokens: int = 256
    max_text_length: int = 512
    dtype: str = "auto"
    prepared: bool = False


@dataclass(frozen=True)
class Work:
    """
    How the work is done. None of it changes what is asked; but what is computed in another order is rounded otherwise, which in
    low precision may change a word of an answer, so that `scores.json` records it.

    Args:
        batch_size (`int`, *optional*): Questions, or pairs, at a time.
        device (`str`, *optional*): Where the model runs; CUDA if there is one.
        cache (`str`, *optional*): Folder of a cache of processed volumes.
        progress (`bool`, *optional*): Whether to show progress bars.
        skip_broken (`bool`, *optional*): Whether samples whose scan is missing or cannot be read, or that lack a text, are left
            out, listed and counted; otherwise they end the evaluation. For it, all scans are read before the first is asked about.
    """

    batch_size: int = 16
    device: str = ""
    cache: str | None = None
    progress: bool = False
    skip_broken: bool = False


@dataclass(frozen=True)
class MetricOptions:
    """
    Which text metrics, and with which encoder.

    Args:
        names (`tuple[str, ...]`, *optional*): Of `TEXT_METRICS` and `CLINICAL_METRICS`.
        bertscore_model (`str`, *optional*): Encoder of BERTScore; roberta-large if not given, as in the original.
        bertscore_layers (`int`, *optional*): Its layer, for an encoder that bert_score does not know.
        labeller (`str`, *optional*): "module:function" that labels reports, for F1 of labels.
    """

    names: tuple[str, ...] = TEXT_METRICS
    bertscore_model: str | None = None
    bertscore_layers: int | None = None
    labeller: str | None = None


__all__ = ["TEXT_METRICS", "EvaluationSettings", "MetricOptions", "Work"]
