"""The tokenizer of a run: a byte-level BPE trained on its text, or one that exists already."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseift_llm.data.cache import cached
from sparseift_llm.data.corpora import Source
from sparseift_llm.data.options import EOS, DataConfig
from sparseift_llm.data.packing import pieces
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.progress import is_watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BPE_CHARS = 100_000_000


def cached_tokenizer(config: DataConfig, source: Source, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the options mean.

    A `bpe` tokenizer is trained once and stored in `folder`. It is always loaded from there, so that a run that
    trains it and a run that finds it have the same object.
    """
    if config.tokenizer != "bpe":
        return load_tokenizer(config, ())

    def build(entry: Path) -> dict[str, Any]:
        logger.info(
            "training a byte-level BPE tokenizer with %d entries on %s; it is kept in %s",
            config.vocab_size, source.name, folder,
        )  # fmt: skip
        texts = (piece for piece, _ in pieces(source.documents(), source.joined))
        load_tokenizer(config, texts).save_pretrained(entry)
        return {}

    entry, _ = cached(folder, "tokenizer", {"bpe": config.vocab_size, "text": source.fingerprint}, build)
    return _pretrained(str(entry))


def load_tokenizer(config: DataConfig, documents: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the options mean; the same documents give the same `bpe` tokenizer.

    Args:
        config: the options.
        documents: training texts; read only for `tokenizer="bpe"`.

    Raises:
        ValueError: the tokenizer cannot be loaded or has no end-of-text token.
    """
    tokenizer = _pretrained(config.tokenizer) if config.vocab_size is None else _train_bpe(config.vocab_size, documents)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={config.tokenizer!r} has no end-of-text token, which must separate documents; "
            "set its eos_token and save it again"
        )
    return tokenizer


def _train_bpe(vocab_size: int, documents: Iterable[str]) -> PreTrainedTokenizerBase:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=is_watched(),
    )
    bpe.train_from_iterator(_first_chars(documents, _BPE_CHARS), trainer)
    size = bpe.get_vocab_size()
    if size < vocab_size:
        logger.warning("the corpus gives a BPE vocabulary of only %d entries, not %d", size, vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)


def _first_chars(documents: Iterable[str], count: int) -> Iterator[str]:
    """The first pieces, about `count` characters: more text hardly changes a BPE, and a stream may never end."""
    for piece, _ in pieces(documents):
        yield piece
        count -= len(piece)
        if count <= 0:
            return


def _pretrained(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = user_path(name)
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # GPT-2's two original files alone do not tell AutoTokenizer which class they belong to.
    bare_gpt2 = {"vocab.json", "merges.txt"} <= files and not any(
        file in files for file in ("tokenizer.json", "tokenizer_config.json", "config.json")
    )
    loader: Any = GPT2Tokenizer if bare_gpt2 else AutoTokenizer
    try:
        return loader.from_pretrained(str(folder) if files else name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={name!r} is not 'bpe', and cannot be loaded as a folder or from the hub: {error}"
        ) from error
