"""Cutting and tokenising documents, and the windows of the token stream, stored and streamed."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparseift_llm.data import cache as token_cache
from sparseift_llm.data import packing
from sparseift_llm.data.options import EOS
from sparseift_llm.data.packing import PackedDataset, PackedStream, pieces, token_batches
from tests.helpers.texts import ROWS, TEXTS, items, memory_source, small_bpe, windows


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return small_bpe()


documents = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents, st.integers(2, 9), st.integers(1, 40))
@example([EOS], 2, 1)  # text that spells the special token is text
def test_windows_are_the_stream(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], seq_len: int, batch_chars: int
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARS", batch_chars)
    encoded = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    stream = [token for tokens in encoded for token in [*tokens, tokenizer.eos_token_id]]
    written = token_cache._write_tokens(tmp_path / "t.npy", token_batches(tokenizer, texts), np.dtype(np.uint16), None)
    del written["sha256"]
    assert written == {"tokens": len(stream), "text_bytes": sum(len(text.encode()) for text in texts)}
    packed = items(PackedDataset(tmp_path / "t.npy", seq_len))
    assert packed == [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    if packed:
        assert windows(PackedStream(memory_source(texts), tokenizer, seq_len)) == packed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("ab\n", max_size=200), st.integers(1, 20))
def test_pieces_end_at_newlines(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", size)
    cut = list(pieces([text]))
    assert "".join(piece for piece, _ in cut) == text
    assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]
    assert all(len(piece) <= size for piece, _ in cut)
    assert all(piece.endswith("\n") or ("\n" not in piece and len(piece) == size) for piece, last in cut if not last)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab\n", max_size=40), min_size=1), st.integers(1, 20))
def test_joined_rows_are_cut_like_one_text(monkeypatch: pytest.MonkeyPatch, rows: list[str], size: int) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", size)
    assert list(pieces(rows, joined=True)) == list(pieces(["".join(rows)]))


def test_joined_rows_have_one_eos(tokenizer: Any) -> None:
    joined = np.concatenate([tokens for tokens, _ in token_batches(tokenizer, ROWS, joined=True)])
    assert joined.tolist() == [*tokenizer("".join(ROWS))["input_ids"], tokenizer.eos_token_id]
    assert list(token_batches(tokenizer, [], joined=True)) == []


def test_joined_rows_are_read_as_they_are_needed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", 100)
    monkeypatch.setattr(packing, "_BATCH_CHARS", 100)
    endless = token_batches(tokenizer, itertools.cycle(["some row\n"]), joined=True)
    first = [next(endless)[0] for _ in range(3)]
    assert tokenizer.decode(np.concatenate(first)).startswith("some row\n" * 20)


def test_a_long_document_has_one_eos(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", 10)
    monkeypatch.setattr(packing, "_BATCH_CHARS", 25)
    text = "one line\n" * 20
    ids = np.concatenate([tokens for tokens, _ in token_batches(tokenizer, [text, "x"])])
    assert np.flatnonzero(ids == tokenizer.eos_token_id).tolist() == [len(ids) - 3, len(ids) - 1]
    assert tokenizer.decode(ids) == text + EOS + "x" + EOS


def test_text_cannot_spell_a_document_end(tokenizer: Any) -> None:
    ids = np.concatenate([tokens for tokens, _ in token_batches(tokenizer, [f"a{EOS}b"])])
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids) == f"a{EOS}b{EOS}"
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]  # the tokenizer itself is left as it was


def test_items(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(7, dtype=np.uint16))
    dataset = PackedDataset(tmp_path / "t.npy", 3)
    assert len(dataset) == 2
    item = dataset[1]
    assert item["input_ids"].dtype == torch.int64
    torch.testing.assert_close(item["input_ids"], torch.tensor([3, 4, 5]))
    torch.testing.assert_close(item["labels"], torch.tensor([3, 4, 5]))
    assert len(PackedDataset(tmp_path / "t.npy", 3, 1)) == 1
    assert len(PackedDataset(tmp_path / "t.npy", 3, 9)) == 2
    with pytest.raises(IndexError, match="sequence 2 of 2"):
        dataset[2]


def test_pickle_holds_no_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(60_000, dtype=np.uint16))
    pickled = pickle.dumps(PackedDataset(tmp_path / "t.npy", 10, 5))
    assert len(pickled) < 1000
    assert items(pickle.loads(pickled)) == np.arange(50).reshape(5, 10).tolist()


# Streaming


@pytest.fixture
def stream(tokenizer: Any) -> PackedStream:
    return PackedStream(memory_source(TEXTS), tokenizer, 16)


def test_stream_shorter_than_a_sequence_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"memory has 2 tokens, less than one sequence \(seq_len=16\)"):
        list(PackedStream(memory_source(["a"]), tokenizer, 16))


def test_stream_with_workers_gives_each_window_once(stream: PackedStream) -> None:
    loader = torch.utils.data.DataLoader(stream, batch_size=1, num_workers=2)
    assert [batch["input_ids"][0].tolist() for batch in loader] == windows(stream)


def test_stream_over_ranks_gives_each_window_once(stream: PackedStream) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    shards = [accelerate.IterableDatasetShard(stream, batch_size=4, num_processes=2, process_index=i) for i in (0, 1)]
    all_windows = windows(stream)
    even, odd = (windows(shard) for shard in shards)
    assert even[:8] == all_windows[:4] + all_windows[8:12]
    assert odd[:8] == all_windows[4:8] + all_windows[12:16]
    assert {*map(tuple, even), *map(tuple, odd)} == {*map(tuple, all_windows)}
