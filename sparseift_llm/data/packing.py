"""From documents to a token stream, and from the stream to sequences of one length, stored or streamed.

Every document ends with the end-of-text token; sequences are consecutive windows of the stream.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparseift_llm.data.corpora import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE_CHARS = 1_000_000
_BATCH_CHARS = 4_000_000
TRAIN_ADVICE = "give more text or lower seq_len"


def pieces(documents: Iterable[str], joined: bool = False) -> Iterator[tuple[str, bool]]:
    """Cut documents into pieces of bounded size; where depends on nothing but each document's text.

    Args:
        documents: texts.
        joined: they are, one after the other, the parts of a single document.

    Returns:
        An iterator of (piece, whether it is its document's last).
    """
    for parts in [documents] if joined else ([text] for text in documents):
        yield from _cut(parts)


def _cut(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text, given in parts, after newlines; inside a line only if the line is longer than a piece.

    No piece is longer than `_PIECE_CHARS`; no parts give no piece.
    """
    waiting: list[str] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size <= _PIECE_CHARS:
            continue
        text = "".join(waiting)
        start = 0
        while len(text) - start > _PIECE_CHARS:
            end = start + _PIECE_CHARS
            cut = text.rfind("\n", start, end) + 1 or end
            yield text[start:cut], False
            start = cut
        waiting = [text[start:]]
        size = len(waiting[0])
    if waiting:
        yield "".join(waiting), True


def token_batches(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], joined: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Tokenise documents, each followed by the end-of-text token, many at a time.

    Text that spells a special token is tokenised as plain text: it cannot end a document.

    Args:
        tokenizer: has an end-of-text token.
        documents: texts; long ones are tokenised in pieces, so that memory stays bounded.
        joined: they are, one after the other, the parts of a single document.

    Returns:
        An iterator of (uint32 token ids (n,), UTF-8 bytes of the text they stand for). The ids of
        all batches, one after the other, are the token stream.
    """
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces(documents, joined):
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
        for tokens, _ in token_batches(self._tokenizer, self._source.documents(), self._source.joined):
            rest = np.concatenate([rest, tokens])
            cut = len(rest) - len(rest) % self._seq_len
            for start in range(0, cut, self._seq_len):
                empty = False
                yield _item(rest[start : start + self._seq_len])
            rest = rest[cut:]
        if empty:
            raise ValueError(too_short(self._source, len(rest), self._seq_len, TRAIN_ADVICE))


class RepeatedStream(IterableDataset[dict[str, torch.Tensor]]):
    """A stream that starts over whenever it ends, so that no batch at its end is smaller than the others.

    Args:
        stream: an iterable dataset that yields at least one item.
    """

    def __init__(self, stream: IterableDataset[dict[str, torch.Tensor]]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.chain.from_iterable(itertools.repeat(self._stream))


def _item(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(tokens.astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def too_short(source: Source, tokens: int, seq_len: int, advice: str) -> str:
    """The error message about `source`, which has too few tokens for one sequence."""
    return f"{source.name} has {tokens} tokens, less than one sequence (seq_len={seq_len}); {advice}"
