"""From documents to token sequences: the data options, the tokenizer, packing, and their cache on disk.

Reading documents is in corpora.py; batching and shuffling are the trainer's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparseift_llm.corpora import Source, builtin_source, file_source, hold_out, hub_source, is_local, local_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EOS = "<|endoftext|>"
_FORMAT = 1  # part of every cache key: raise it when the same input would give other tokens
_PIECE_CHARS = 1_000_000
_BATCH_CHARS = 4_000_000
_BPE_CHARS = 100_000_000
_TRAIN_ADVICE = "give more text or lower seq_len"
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
    """

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset | PackedStream
    eval: PackedDataset
    num_train_tokens: int | None
    num_eval_tokens: int
    bytes_per_eval_token: float


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
    eval_file, eval_info = _cached_tokens(tokenizer, eval_source, folder, limit)
    held_out = PackedDataset(eval_file, config.seq_len, config.max_eval_sequences)
    if len(held_out) == 0:
        raise ValueError(_too_short(eval_source, eval_info["tokens"], config.seq_len, _EVAL_ADVICE))
    train: PackedDataset | PackedStream
    if config.streaming:
        train = PackedStream(train_source, tokenizer, config.seq_len)
    else:
        train_file, train_info = _cached_tokens(tokenizer, train_source, folder, None)
        train = PackedDataset(train_file, config.seq_len)
        if len(train) == 0:
            raise ValueError(_too_short(train_source, train_info["tokens"], config.seq_len, _TRAIN_ADVICE))
    return LoadedData(
        tokenizer=tokenizer,
        train=train,
        eval=held_out,
        num_train_tokens=len(train) * config.seq_len if isinstance(train, PackedDataset) else None,
        num_eval_tokens=len(held_out) * config.seq_len,
        bytes_per_eval_token=eval_info["text_bytes"] / eval_info["tokens"],
    )


def _too_short(source: Source, tokens: int, seq_len: int, advice: str) -> str:
    return f"{source.name} has {tokens} tokens, less than one sequence (seq_len={seq_len}); {advice}"


def _open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the held-out documents that the options mean."""
    hub = config.corpus != "builtin" and not is_local(config.corpus)
    if config.corpus_config is not None and not hub:
        raise ValueError(
            f"corpus_config={config.corpus_config!r} is for hub data sets; corpus={config.corpus!r} is not one"
        )

    def hub_split(split: str) -> Source:
        return hub_source(config.corpus, config.corpus_config, split, config.text_field, config.streaming)

    if config.corpus == "builtin":
        source = builtin_source()
    elif hub:
        source = hub_split(config.train_split)
    else:
        source = file_source("corpus", config.corpus, config.text_field)
    if config.eval_corpus is not None:
        if config.corpus != "builtin" and not hub:
            _check_disjoint(config.corpus, config.eval_corpus)
        return source, file_source("eval_corpus", config.eval_corpus, config.text_field)
    if hub and config.eval_split is not None:
        return source, hub_split(config.eval_split)
    return hold_out(source, config.eval_fraction)


def _check_disjoint(corpus: str, eval_corpus: str) -> None:
    shared = set(local_files("corpus", corpus)).intersection(local_files("eval_corpus", eval_corpus))
    if shared:
        raise ValueError(f"{min(shared)} is in both corpus and eval_corpus; training must not see held-out text")


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
    for text in documents:
        for piece, _ in _pieces(text):
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


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text after newlines into pieces of at most `_PIECE_CHARS`, inside a line only if the line is longer.

    Returns:
        An iterator of (piece, whether it is the text's last).
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        cut = text.rfind("\n", start, end) + 1 or end
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def token_batches(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Tokenise documents, each followed by the end-of-text token, many at a time.

    Text that spells a special token is tokenised as plain text: it cannot end a document.

    Args:
        tokenizer: has an end-of-text token.
        documents: texts; long ones are tokenised in pieces, so that memory stays bounded.

    Returns:
        An iterator of (uint32 token ids (n,), UTF-8 bytes of the text they stand for). The ids of
        all batches, one after the other, are the token stream.
    """
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in documents:
        for piece in _pieces(text):
            batch.append(piece)
            size += len(piece[0])
            if size >= _BATCH_CHARS:
                yield _encode(tokenizer, batch)
                batch, size = [], 0
    if batch:
        yield _encode(tokenizer, batch)


def _encode(tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, bool]]) -> tuple[np.ndarray, int]:
    texts = [text for text, _ in batch]
    encoded: Any = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no note about texts longer than the model takes: they are cut in windows
    )
    ids = itertools.chain.from_iterable(
        [*tokens, tokenizer.eos_token_id] if last else tokens
        for tokens, (_, last) in zip(encoded["input_ids"], batch, strict=True)
    )
    return np.fromiter(ids, dtype=np.uint32), sum(len(text.encode()) for text in texts)


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """The windows of a stored token stream; the file is mapped, so processes share its memory.

    Item i is `{"input_ids": int64 (seq_len,), "labels": the same}`, tokens i*seq_len to
    (i+1)*seq_len of the stream; a remainder shorter than seq_len is left out.

    Args:
        file: a `.npy` file with token ids (n,).
        seq_len: tokens per item.
        max_sequences: at most this many items; None means all.
    """

    def __init__(self, file: str | Path, seq_len: int, max_sequences: int | None = None) -> None:
        self._arguments = (file, seq_len, max_sequences)
        self._tokens = np.load(file, mmap_mode="r")
        self._seq_len = seq_len
        available = len(self._tokens) // seq_len
        self._length = available if max_sequences is None else min(available, max_sequences)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a pickled memory map would hold all the tokens."""
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        return _item(self._tokens[index * self._seq_len : (index + 1) * self._seq_len])


class PackedStream(IterableDataset[dict[str, torch.Tensor]]):
    """The same windows as `PackedDataset`, in the same order, made while they are read.

    It knows nothing of ranks: the Trainer (accelerate) reads an iterable dataset on the main process and
    hands each rank its share of every batch, so that all windows are used once and in an order
    that does not depend on the number of ranks. With loader workers the first one does all the
    work, for the same reason. A resumed run reads again, and skips, what was used before.

    Args:
        source: the documents.
        tokenizer: has an end-of-text token.
        seq_len: tokens per item.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._seq_len = seq_len

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Raises ValueError at the end if there was not even one window."""
        worker = get_worker_info()
        if worker is not None:
            if worker.id > 0:
                return
            # A forked worker cannot use the tokenizer's threads, and would say so at length.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        rest = np.empty(0, dtype=np.uint32)
        empty = True
        for tokens, _ in token_batches(self._tokenizer, self._source.documents()):
            rest = np.concatenate([rest, tokens])
            cut = len(rest) - len(rest) % self._seq_len
            for start in range(0, cut, self._seq_len):
                empty = False
                yield _item(rest[start : start + self._seq_len])
            rest = rest[cut:]
        if empty:
            raise ValueError(_too_short(self._source, len(rest), self._seq_len, _TRAIN_ADVICE))


def _item(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(tokens.astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def _cached_tokenizer(config: DataConfig, source: Source, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer; a `bpe` one is stored, and loaded from there so that every run has the same object."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config, ())

    def build(entry: Path) -> dict[str, int]:
        load_tokenizer(config, source.documents()).save_pretrained(entry)
        return {}

    entry, _ = _cached(folder, "tokenizer", {"bpe": config.vocab_size, "text": source.fingerprint}, build)
    return _pretrained(str(entry))


def _cached_tokens(
    tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path, limit: int | None
) -> tuple[Path, dict[str, int]]:
    """The stored token stream of `source`, at least its first `limit` tokens.

    Returns:
        The `.npy` file, and `{"tokens": ..., "text_bytes": ...}` of what it holds.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    key = {
        "tokenizer": [type(tokenizer).__name__, hashlib.sha256(content.encode()).hexdigest(), tokenizer.eos_token_id],
        "text": source.fingerprint,
        "limit": limit,
    }
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)

    def build(entry: Path) -> dict[str, int]:
        return _write_tokens(entry / "tokens.npy", token_batches(tokenizer, source.documents()), dtype, limit)

    entry, info = _cached(folder, "tokens", key, build)
    return entry / "tokens.npy", info


def _write_tokens(
    file: Path, batches: Iterable[tuple[np.ndarray, int]], dtype: np.dtype[Any], limit: int | None
) -> dict[str, int]:
    """Write a `.npy` file batch by batch, then its header again: numpy pads it so that the length can grow."""
    tokens = text_bytes = 0

    def write_header() -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(out, header)

    with file.open("wb") as out:
        write_header()
        start = out.tell()
        for batch, size in batches:
            out.write(batch.astype(dtype).tobytes())
            tokens += len(batch)
            text_bytes += size
            if limit is not None and tokens >= limit:
                break
        out.seek(0)
        write_header()
        assert out.tell() == start, "the .npy header changed its length"
    return {"tokens": tokens, "text_bytes": text_bytes}


def _cached(
    folder: Path, kind: str, key: dict[str, Any], build: Callable[[Path], dict[str, int]]
) -> tuple[Path, dict[str, int]]:
    """The folder that `build` fills, made once per `key` and never seen half done.

    It is built under another name and renamed when complete; a manifest with all file sizes tells
    a damaged one, which is built again.

    Args:
        folder: parent of all entries.
        kind: start of the entry's name.
        key: JSON-ready; everything the content depends on.
        build: fills an empty folder, returns JSON-ready facts about it.

    Returns:
        The entry's folder and the facts.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    entry = folder / f"{kind}-{digest[:32]}"
    info = _intact(entry)
    if info is not None:
        return entry, info
    partial = folder / f".partial-{entry.name}-{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        info = build(partial)
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        manifest = {"key": key, "info": info, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        if entry.exists() and _intact(entry) is None:
            logger.warning("%s is damaged and replaced", entry)
            shutil.rmtree(entry)
        try:
            os.replace(partial, entry)
        except OSError:
            if _intact(entry) is None:  # otherwise another machine finished first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry, info


def _intact(entry: Path) -> dict[str, int] | None:
    """The facts about a complete entry, or None if it is missing or damaged."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        complete = all((entry / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError):
        return None
    return manifest["info"] if complete else None
