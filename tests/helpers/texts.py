"""Helpers of the data tests: a small corpus, its tokenizer, a stand-in for the hub, and windows as plain lists.

Not a test module.
"""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.data.corpora import Source
from sparseift_llm.data.options import DataConfig
from sparseift_llm.data.tokenizer import load_tokenizer

WORDS = ("def", "return", "the", "sparse", "weights", "mask", "\n", "    ", "0.75", "é", "日本")
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40 + i)) for i in range(60)]
# Rows of one running text, as WikiText has them: lines with their newline, empty rows, and white space that counts.
ROWS = ["", " = Title = \n", "", *(f" {text}\n" for text in TEXTS[:20]), " \n", "\n", "no newline", " here", "\n"]


@functools.cache
def small_bpe() -> Any:
    """A tokenizer of 300 entries; tests leave it as it is."""
    return load_tokenizer(DataConfig(vocab_size=300), TEXTS)


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    return [(text, text) for text in texts]


def memory_source(texts: list[str]) -> Source:
    return Source("memory", {"texts": texts}, partial(pairs, texts))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path: Path, texts: list[Any], field: str = "text") -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": list(range(len(texts))), field: texts}), path)


def jsonl_config(folder: Path) -> DataConfig:
    """Options for `TEXTS` in a file of that folder."""
    write_jsonl(folder / "corpus.jsonl", TEXTS)
    return DataConfig(corpus=str(folder / "corpus.jsonl"), eval_fraction=0.2, vocab_size=300, seq_len=16)


def stand_in_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, train: list[str] = TEXTS[:50], validation: list[str] = TEXTS[50:]
) -> Path:
    """Let a new folder below `folder` stand in for the hub's data set `owner/name`."""
    datasets = pytest.importorskip("datasets")
    hub = folder / "hub"
    hub.mkdir()
    write_jsonl(hub / "train.jsonl", train)
    write_jsonl(hub / "validation.jsonl", validation)
    original = datasets.load_dataset_builder

    def stand_in(name: str, config_name: str | None = None) -> Any:
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return original(str(hub), config_name, cache_dir=str(folder / "hub-cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    return hub


def windows(dataset: Any) -> list[list[int]]:
    """The items of a stream."""
    return [item["input_ids"].tolist() for item in dataset]


def items(dataset: Any) -> list[list[int]]:
    """The items of a stored data set."""
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]
