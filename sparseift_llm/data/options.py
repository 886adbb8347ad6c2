"""The data of a run: its options, its tokenizer, and its training and held-out sequences.

Reading documents is in corpora.py, making sequences of them in packing.py; batching and shuffling are the trainer's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseift_llm.data.cache import cached, cached_tokens, tokenizer_identity
from sparseift_llm.data.corpora import (
    Source,
    builtin_source,
    file_source,
    hold_out,
    hub_source,
    is_local,
    join_rows,
    local_files,
)
from sparseift_llm.data.packing import TRAIN_ADVICE, PackedDataset, PackedStream, pieces, too_short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EOS = "<|endoftext|>"
_BPE_CHARS = 100_000_000
_EVAL_ADVICE = (
    "give more held-out text in eval_corpus, raise eval_fraction or lower seq_len (a .txt file is one document, "
    "held out as a whole or not at all)"
)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Args:
        corpus: training text: `builtin` (the Python standard library's source, about 12 MB), a
            local file, folder or glob (see `corpora.file_source`), or a hub data set id; a path
            that exists wins over a hub id.
        corpus_config: the hub data set's configuration, e.g. `wikitext-103-raw-v1`.
        eval_corpus: local file, folder or glob with the held-out text.
        train_split: the hub data set's split to train on.
        eval_split: its held-out split, or None to hold out `eval_fraction` of the training split.
        text_field: the field (JSON) or column (parquet, hub) with the text.
        rows_are_documents: False: the rows of JSON, parquet or hub data are consecutive pieces of
            one running text, such as WikiText's lines, to be joined as they are. The held-out
            text, whose rows are joined too, then comes from `eval_corpus` or `eval_split`.
        eval_fraction: share of the documents held out where there is no separate held-out text
            (builtin, or local files without `eval_corpus`), in (0, 1).
        streaming: tokenise the training text while training, storing nothing; the trainer then
            needs `max_steps`.
        tokenizer: `bpe` (train a byte-level BPE on the training documents, on the first 100
            million characters at most), or a tokenizer's folder or hub id.
        vocab_size: entries of the `bpe` tokenizer, end-of-text included, at least 257; a small
            corpus may give fewer.
        seq_len: tokens per sequence, at least 2.
        max_eval_sequences: evaluate on this many sequences at most; None means all. Needed with
            `streaming` unless `eval_corpus` is given.
        cache_dir: where tokens and the trained tokenizer are kept; None leaves it to the caller.

    Raises:
        ValueError: a value outside its range or a contradictory combination, naming it.
    """

    corpus: str = "builtin"
    corpus_config: str | None = None
    eval_corpus: str | None = None
    train_split: str = "train"
    eval_split: str | None = "validation"
    text_field: str = "text"
    rows_are_documents: bool = True
    eval_fraction: float = 0.05
    streaming: bool = False
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    seq_len: int = 256
    max_eval_sequences: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("corpus", "train_split", "text_field", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("eval_corpus", "eval_split", "corpus_config", "cache_dir"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty; leave it out or set it to null")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {self.eval_fraction}")
        if self.corpus == "builtin" and not self.rows_are_documents:
            raise ValueError(
                "rows_are_documents=False is for rows of text; corpus='builtin' has files, each a document"
            )
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {EOS}), got {self.vocab_size}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if self.max_eval_sequences is not None and self.max_eval_sequences < 1:
            raise ValueError(f"max_eval_sequences must be at least 1, got {self.max_eval_sequences}")
        if self.streaming and self.max_eval_sequences is None and self.eval_corpus is None:
            raise ValueError("streaming needs max_eval_sequences or eval_corpus, or evaluation would read all the text")


@dataclass(frozen=True)
class LoadedData:
    """What `load_data` returns.

    Args:
        tokenizer: has an end-of-text token; `len(tokenizer)` is the vocabulary size for the model.
        train: sequences to train on.
        eval: held-out sequences.
        num_train_tokens: tokens in `train`, or None when streaming.
        num_eval_tokens: tokens in `eval`.
        bytes_per_eval_token: UTF-8 bytes of held-out text per token, end-of-text tokens counted, so
            that bits per byte = loss in nats / ln 2 / bytes_per_eval_token.
        fingerprint: hex digest of the tokenizer and of the training and held-out token streams, the
            same wherever and whenever those are the same; sequence length is no part of it. A
            streamed training text is known by its files' paths, sizes and times or by the hub's version.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset | PackedStream
    eval: PackedDataset
    num_train_tokens: int | None
    num_eval_tokens: int
    bytes_per_eval_token: float
    fingerprint: str


def load_data(config: DataConfig, cache_dir: str | Path) -> LoadedData:
    """Tokenizer, training and held-out sequences; whatever is stored already is reused.

    With several processes call it inside `TrainingArguments.main_process_first()`: the main process
    builds, the others find the finished files and map the same memory.

    Args:
        config: the options.
        cache_dir: where to store tokens and the trained tokenizer, unless `config.cache_dir` is set.

    Raises:
        ValueError: text or tokenizer cannot be read, or there is less than one sequence of training
            or of held-out text; the message names the file or option to change.
    """
    folder = Path(config.cache_dir or cache_dir).expanduser()
    train_source, eval_source = _open_sources(config)
    tokenizer = _cached_tokenizer(config, train_source, folder)
    limit = config.max_eval_sequences and config.max_eval_sequences * config.seq_len
    eval_file, eval_info = cached_tokens(tokenizer, eval_source, folder, limit)
    held_out = PackedDataset(eval_file, config.seq_len, config.max_eval_sequences)
    if len(held_out) == 0:
        raise ValueError(too_short(eval_source, eval_info["tokens"], config.seq_len, _EVAL_ADVICE))
    train: PackedDataset | PackedStream
    if config.streaming:
        train = PackedStream(train_source, tokenizer, config.seq_len)
        train_identity: Any = train_source.fingerprint
    else:
        train_file, train_info = cached_tokens(tokenizer, train_source, folder, None)
        train = PackedDataset(train_file, config.seq_len)
        train_identity = train_info["sha256"]
        if len(train) == 0:
            raise ValueError(too_short(train_source, train_info["tokens"], config.seq_len, TRAIN_ADVICE))
    identity = json.dumps([tokenizer_identity(tokenizer), train_identity, eval_info["sha256"]], sort_keys=True)
    return LoadedData(
        tokenizer=tokenizer,
        train=train,
        eval=held_out,
        num_train_tokens=len(train) * config.seq_len if isinstance(train, PackedDataset) else None,
        num_eval_tokens=len(held_out) * config.seq_len,
        bytes_per_eval_token=eval_info["text_bytes"] / eval_info["tokens"],
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the held-out documents that the options mean."""
    hub = config.corpus != "builtin" and not is_local(config.corpus)
    joined = not config.rows_are_documents
    if config.corpus_config is not None and not hub:
        raise ValueError(
            f"corpus_config={config.corpus_config!r} is for hub data sets; corpus={config.corpus!r} is not one"
        )

    def hub_split(split: str) -> Source:
        rows = hub_source(config.corpus, config.corpus_config, split, config.text_field, config.streaming)
        return join_rows(rows) if joined else rows

    if config.corpus == "builtin":
        source = builtin_source()
    elif hub:
        source = hub_split(config.train_split)
    else:
        source = file_source("corpus", config.corpus, config.text_field, joined)
    if config.eval_corpus is not None:
        if config.corpus != "builtin" and not hub:
            _check_disjoint(config.corpus, config.eval_corpus)
        return source, file_source("eval_corpus", config.eval_corpus, config.text_field, joined)
    if hub and config.eval_split is not None:
        return source, hub_split(config.eval_split)
    if joined:
        raise ValueError(
            "rows_are_documents=False needs eval_corpus or eval_split (of a hub data set): "
            "rows of one running text cannot be held out one by one"
        )
    return hold_out(source, config.eval_fraction)


def _check_disjoint(corpus: str, eval_corpus: str) -> None:
    shared = set(local_files("corpus", corpus)).intersection(local_files("eval_corpus", eval_corpus))
    if shared:
        raise ValueError(f"{min(shared)} is in both corpus and eval_corpus; training must not see held-out text")


def _cached_tokenizer(config: DataConfig, source: Source, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer; a `bpe` one is stored, and loaded from there so that every run has the same object."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config, ())

    def build(entry: Path) -> dict[str, Any]:
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
    tokenizer = _train_bpe(config.vocab_size, documents) if config.tokenizer == "bpe" else _pretrained(config.tokenizer)
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
        show_progress=False,
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

    folder = Path(name).expanduser()
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
