"""Rows that are consecutive pieces of one running text: read as they are, joined, and tokenised as one document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.data.corpora import file_source, join_rows
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig
from tests.helpers.texts import ROWS, items, memory_source, stand_in_hub, windows, write_jsonl, write_parquet


def test_joined_rows_keep_their_white_space() -> None:
    source = join_rows(memory_source(ROWS))
    assert source.joined
    assert "".join(source.documents()) == "".join(ROWS)
    assert source.fingerprint != memory_source(ROWS).fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_files_are_joined(tmp_path: Path, suffix: str) -> None:
    for name, rows in (("a", ROWS), ("b", ["more", "\n"])):
        (write_jsonl if suffix == ".jsonl" else write_parquet)(tmp_path / f"{name}{suffix}", rows)
    source = file_source("corpus", str(tmp_path), "text", joined=True)
    assert "".join(source.documents()) == "".join(ROWS) + "more\n"
    assert source.fingerprint != file_source("corpus", str(tmp_path), "text").fingerprint


@pytest.mark.parametrize("name", ["b.txt", "b.TXT.gz"])
def test_text_files_have_no_rows(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"eval_corpus: .*b\..* is one document and has no rows; rows_are_documents"):
        file_source("eval_corpus", str(tmp_path), "text", joined=True)


def whole(dataset: Any) -> list[int]:
    return [token for item in items(dataset) for token in item]


def test_rows_of_a_file_are_joined(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "eval.jsonl", ROWS[3:6])
    config = DataConfig(
        corpus=str(tmp_path / "train.jsonl"), eval_corpus=str(tmp_path / "eval.jsonl"), vocab_size=300, seq_len=2
    )
    separate = load_data(config, tmp_path / "cache")
    loaded = load_data(replace(config, rows_are_documents=False), tmp_path / "cache")
    streamed = load_data(replace(config, rows_are_documents=False, streaming=True), tmp_path / "cache")
    for dataset, rows in ((loaded.train, ROWS), (loaded.eval, ROWS[3:6])):
        tokens = [*loaded.tokenizer("".join(rows))["input_ids"], loaded.tokenizer.eos_token_id]
        assert whole(dataset) == tokens[: len(tokens) // 2 * 2]
    assert windows(streamed.train) == items(loaded.train)
    assert loaded.bytes_per_eval_token == len("".join(ROWS[3:6]).encode()) / len(tokens)
    assert whole(separate.eval).count(separate.tokenizer.eos_token_id) >= 2
    assert separate.fingerprint != loaded.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_hub_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    stand_in_hub(tmp_path, monkeypatch, ROWS, ROWS[3:6])
    config = DataConfig(
        corpus="owner/name",
        rows_are_documents=False,
        vocab_size=300,
        seq_len=2,
        streaming=streaming,
        max_eval_sequences=9,
    )
    loaded = load_data(config, tmp_path / "cache")
    tokens = [*loaded.tokenizer("".join(ROWS))["input_ids"], loaded.tokenizer.eos_token_id]
    assert [token for window in windows(loaded.train) for token in window] == tokens[: len(tokens) // 2 * 2]
    assert "".join(ROWS[3:6]).startswith(loaded.tokenizer.decode(whole(loaded.eval)))
    with pytest.raises(ValueError, match="rows_are_documents=False needs eval_corpus or eval_split"):
        load_data(replace(config, eval_split=None), tmp_path / "cache")
