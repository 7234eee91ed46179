"""Tokenizers that are made here, of bytes or trained on texts, where none can be downloaded."""

from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer


IMAGE_TOKEN = "<image>"


def build_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 260 tokens made without any file: one for each byte, and the special ones of a conversation."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
    for token in special_tokens:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    return tokenizer


def train_word_piece_tokenizer(texts: Iterable[str], size: int) -> BertTokenizer:
    """A BERT tokenizer of at most `size` tokens, trained on the texts: the same in every process and at every start."""
    special_tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    texts = list(texts)
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(special_tokens)}).backend_tokenizer
    words = {
        word
        for text in set(texts)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    }
    letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    # The trainer numbers these letters as it meets them in a hash table, in another order each time, and where two merges
    # are equally frequent the numbers decide. Special tokens have their numbers before.
    tokenizer.train_from_iterator(texts, WordPieceTrainer(vocab_size=size, special_tokens=[*special_tokens, *letters]))
    return BertTokenizer(vocab=tokenizer.get_vocab(with_added_tokens=False))


__all__ = ["IMAGE_TOKEN", "build_tiny_tokenizer", "train_word_piece_tokenizer"]
