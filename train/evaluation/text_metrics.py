"""
The text metrics of the paper (BLEU-1, ROUGE-1, METEOR and BERTScore) and ROUGE-L, as `evaluate.Metric` modules that score every
sample by itself. They download no script; METEOR's data and BERTScore's encoder must be there.

They equal the metric scripts that Hugging Face publishes for `evaluate`, which the original evaluation uses, except that an
empty prediction scores 0 where those scripts fail. Each rests on a library: sacrebleu, rouge_score, nltk and bert_score.

Example:

```python
>>> from med3dvlm.train.evaluation.text_metrics import Rouge1

>>> Rouge1().compute(predictions=["A small cyst."], references=["A cyst."])
{'rouge_1': 0.8, 'per_sample': [0.8]}
```"""

import functools
import tempfile
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU


# BERTScore's encoder in the original, and the layer that bert_score takes of it.
DEFAULT_ENCODER, DEFAULT_LAYER = "roberta-large", 17
# A tokenizer that was saved without `model_max_length` has 10 ** 30, which bert_score cannot cut texts to.
MOST_TOKENS = 10**6
NLTK_DATA = ("corpora/wordnet", "tokenizers/punkt_tab/english")
NLTK_HINT = (
    "METEOR needs data of NLTK: run `python -m nltk.downloader wordnet punkt_tab` where there is a network, and point the "
    "environment variable NLTK_DATA to the folder."
)

# Of all letters; English reports have a few, in names and in "µm".
MOST_OTHER_LETTERS = 0.01
ROUGE_EFFECT = 'ROUGE takes all but a to z and digits for spaces, so that "Ödem" counts as "dem", and finds no word in other scripts'
EFFECTS_OF_OTHER_LETTERS = {
    "bleu_1": "BLEU splits at spaces and at English punctuation, so that a sentence without spaces is one word",
    "rouge_1": ROUGE_EFFECT,
    "rouge_l": ROUGE_EFFECT,
    "meteor": "METEOR knows stems and synonyms of English words alone",
    "bertscore": "BERTScore's encoder, roberta-large, was trained on English texts",
}


class SampleMetric(evaluate.Metric):
    """
    A metric whose score is the mean of a score in [0, 1] for each pair of a prediction and its reference.

    `compute(predictions=..., references=...)` returns a `dict` with the mean under `name`, and `per_sample`, the scores in the
    order of the predictions. White space around texts does not count.
    """

    name = ""
    description = ""
    citation = ""

    def __init__(self, **kwargs: Any):
        # In memory: pairs of texts of patients are not to be left in a cache folder. `evaluate` makes one all the same, which
        # stays empty; the user's may be read-only.
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, **{"cache_dir": folder, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions: list of str. references: list of str, one for each prediction.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        per_sample = self.score_samples([text.strip() for text in predictions], [text.strip() for text in references])
        return {self.name: sum(per_sample) / len(per_sample), "per_sample": per_sample}

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one for each pair."""
        raise NotImplementedError


class Bleu1(SampleMetric):
    """BLEU of order 1: share of the prediction's 13a tokens that the reference has, with the brevity penalty."""

    name = "bleu_1"
    description = "Sentence BLEU of order 1, 13a tokens, no smoothing, with the brevity penalty."
    citation = "Papineni et al. 2002, BLEU: a Method for Automatic Evaluation of Machine Translation"

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one for each pair."""
        # As a corpus of one: `sentence_score` would drop orders that a short text does not have.
        metric = BLEU(max_ngram_order=1, smooth_method="none", effective_order=False, tokenize="13a")
        scores = [metric.corpus_score([text], [[reference]]).score for text, reference in zip(predictions, references)]
        return [min(1.0, score / 100) for score in scores]  # sacrebleu's logarithms may go beyond by a rounding error


class _Rouge(SampleMetric):
    """F-measure of a kind of ROUGE without stemming; `kind` is the name that rouge_score gives it."""

    kind = ""
    citation = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one for each pair."""
        scorer = RougeScorer([self.kind], use_stemmer=False)
        return [scorer.score(reference, text)[self.kind].fmeasure for text, reference in zip(predictions, references)]


class Rouge1(_Rouge):
    """ROUGE-1: F-measure of the words that prediction and reference share, without stemming."""

    name, kind = "rouge_1", "rouge1"
    description = "F-measure of ROUGE-1 without stemming."


class RougeL(_Rouge):
    """ROUGE-L: F-measure of the longest sequence of words that prediction and reference share, without stemming."""

    name, kind = "rouge_l", "rougeL"
    description = "F-measure of ROUGE-L without stemming."


class Meteor(SampleMetric):
    """
    METEOR of NLTK with its defaults (alpha 0.9, beta 3, gamma 0.5): words, their stems and their WordNet synonyms.

    Raises:
        FileNotFoundError: NLTK's data are not there; the message says how to get them.
    """

    name = "meteor"
    description = "METEOR of NLTK on tokens of `word_tokenize`: alpha 0.9, beta 3, gamma 0.5, WordNet."
    citation = "Banerjee and Lavie 2005, METEOR: An Automatic Metric for MT Evaluation"

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one for each pair."""
        from nltk import word_tokenize
        from nltk.translate.meteor_score import single_meteor_score

        check_nltk_data()
        return [
            float(single_meteor_score(word_tokenize(reference), word_tokenize(text)))
            for text, reference in zip(predictions, references)
        ]


class BertScore(SampleMetric):
    """
    F1 of BERTScore, without idf weights and without rescaling.

    Args:
        model (`str`, *optional*):
            Encoder, by name or folder; roberta-large, as in the original, if not given.
        num_layers (`int`, *optional*):
            Layer whose vectors are compared; needed for a folder, known to bert_score for published encoders.
        batch_size (`int`, *optional*, defaults to 64):
            Pairs at a time.
        device (`str`, *optional*):
            Where the encoder runs; CUDA if there is one.

    Raises:
        ValueError: bert_score does not know how many layers of `model` to use.
    """

    name = "bertscore"
    description = "F1 of BERTScore without idf and without baseline rescaling."
    citation = "Zhang et al. 2020, BERTScore: Evaluating Text Generation with BERT"

    def __init__(
        self, model: str | None = None, num_layers: int | None = None, batch_size: int = 64, device: str | None = None
    ):
        super().__init__()
        self.model, self.num_layers, self.batch_size, self.device = model, num_layers, batch_size, device

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores, one for each pair; in [-1, 1] by definition, and hardly ever below 0."""
        scores = [0.0] * len(predictions)
        # bert_score cannot encode an empty text with transformers 5. What it gave before, with nothing to match, is 0.
        filled = [
            place for place, pair in enumerate(zip(predictions, references)) if all(text.strip() for text in pair)
        ]
        if filled:
            texts, targets = ([entries[place] for place in filled] for entries in (predictions, references))
            for place, value in zip(filled, self.scorer.score(texts, targets, batch_size=self.batch_size)[2].tolist()):
                scores[place] = min(1.0, value)  # a cosine may go beyond by a rounding error
        return scores

    @functools.cached_property
    def scorer(self) -> Any:
        """The loaded encoder."""
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

        if self.model is not None and self.num_layers is None and self.model not in model2layers:
            raise ValueError(
                f"BERTScore does not know which layer of {self.model!r} to compare: pass `num_layers`, such as the number "
                "of its layers."
            )
        scorer = BERTScorer(
            model_type=self.model,
            num_layers=self.num_layers,
            lang=None if self.model else "en",
            idf=False,
            rescale_with_baseline=False,
            use_fast_tokenizer=True,
            device=self.device,
            batch_size=self.batch_size,
        )
        if isinstance(scorer._tokenizer, (GPT2Tokenizer, RobertaTokenizer)):
            # bert_score asks for the blank before the first word with each text, where transformers 5 no longer minds it.
            # Without it, the first token of every text is another one than in the original.
            scorer._tokenizer = AutoTokenizer.from_pretrained(scorer.model_type, add_prefix_space=True)
        if scorer._tokenizer.model_max_length > MOST_TOKENS:
            positions = getattr(scorer._model.config, "max_position_embeddings", None) or 0
            # Models of RoBERTa's kind count positions from 2.
            scorer._tokenizer.model_max_length = positions - 2 if positions > 2 else 512
        return scorer


def encoder_note(model: str | None = None, num_layers: int | None = None) -> str | None:
    """
    What a reader of BERTScores must know where they are those of another encoder than the original's.

    Args:
        model (`str`, *optional*), num_layers (`int`, *optional*):
            As for [`BertScore`].

    Returns:
        `str`, or `None` for the original's encoder.

    Example:

    ```python
    >>> from med3dvlm.train.evaluation.text_metrics import encoder_note

    >>> encoder_note("microsoft/deberta-base", 9)
    "BERTScore's encoder: microsoft/deberta-base, layer 9; not comparable with figures of roberta-large."
    ```"""
    from bert_score.utils import model2layers

    layer = num_layers or model2layers.get(model or DEFAULT_ENCODER)
    if model in (None, DEFAULT_ENCODER) and layer == DEFAULT_LAYER:
        return None
    name = Path(model or DEFAULT_ENCODER)
    shown = name.name if name.is_absolute() or len(name.parts) > 2 or name.exists() else str(name)
    return f"BERTScore's encoder: {shown}, layer {layer}; not comparable with figures of {DEFAULT_ENCODER}."


def language_note(
    references: Sequence[str], metrics: Collection[str], bertscore_model: str | None = None
) -> str | None:
    """
    What a reader of scores must know where references have letters that English has not.

    Args:
        references (`Sequence[str]`):
            The true texts.
        metrics (`Collection[str]`):
            Names of the metrics that compared them.
        bertscore_model (`str`, *optional*):
            Encoder of BERTScore, if another than the default was taken.

    Returns:
        `str`: what the metrics, all made for English, do with such letters; `None` where they are at most 1 % of all letters.

    Example:

    ```python
    >>> from med3dvlm.train.evaluation.text_metrics import language_note

    >>> language_note(["Ödem der Füße."], ["meteor"]).partition(":")[0]
    '27.3 % of the letters of the true texts are none of A to Z, and these metrics are made for English'
    >>> language_note(["A small cyst."], ["meteor"]) is None
    True
    ```"""
    num_letters = num_others = 0
    for text in references:
        letters = [letter for letter in unicodedata.normalize("NFC", text) if letter.isalpha()]
        num_letters += len(letters)
        num_others += sum(not letter.isascii() for letter in letters)
    share = num_others / max(1, num_letters)
    effects = {
        name: effect
        for name, effect in EFFECTS_OF_OTHER_LETTERS.items()
        if name in metrics and not (name == "bertscore" and bertscore_model not in (None, DEFAULT_ENCODER))
    }
    if share <= MOST_OTHER_LETTERS or not effects:
        return None
    return (
        f"{100 * share:.1f} % of the letters of the true texts are none of A to Z, and these metrics are made for English: "
        f"{'; '.join(dict.fromkeys(effects.values()))}."
    )


def corpus_bleu_4(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    BLEU of order 4 of a whole corpus, in [0, 1]: counts are summed over all pairs before they are divided, with 13a tokens and
    sacrebleu's exponential smoothing, which matters for small corpora alone.
    """
    return min(1.0, BLEU(tokenize="13a").corpus_score(list(predictions), [list(references)]).score / 100)


def check_nltk_data() -> None:
    """
    Raises:
        FileNotFoundError: what METEOR needs is in none of NLTK's folders.
    """
    import nltk

    for resource in NLTK_DATA:
        try:
            nltk.data.find(resource)
        except LookupError as error:
            try:
                nltk.data.find(f"{resource}.zip")
            except LookupError:
                raise FileNotFoundError(f"{NLTK_HINT} Not found: {resource}.") from error


__all__ = [
    "BertScore",
    "Bleu1",
    "Meteor",
    "Rouge1",
    "RougeL",
    "SampleMetric",
    "check_nltk_data",
    "corpus_bleu_4",
    "encoder_note",
    "language_note",
]
