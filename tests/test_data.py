"""Reading documents, tokenizers, packing and the cache; all of it offline."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseift_llm import corpora, data
from sparseift_llm.corpora import Source, builtin_source, file_source, hold_out, hub_source, is_local
from sparseift_llm.data import (
    EOS,
    DataConfig,
    LoadedData,
    PackedDataset,
    PackedStream,
    load_data,
    load_tokenizer,
    token_batches,
)
from sparseift_llm.strict import from_dict

WORDS = ("def", "return", "the", "sparse", "weights", "mask", "\n", "    ", "0.75", "é", "日本")
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40 + i)) for i in range(60)]

needs_data = pytest.mark.skipif("SPARSEIFT_DATA" not in os.environ, reason="SPARSEIFT_DATA is not set")


def real_data(name: str) -> str:
    return os.path.join(os.environ["SPARSEIFT_DATA"], name)


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    return [(text, text) for text in texts]


def memory_source(texts: list[str]) -> Source:
    return Source("memory", {"texts": texts}, partial(pairs, texts))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")


def windows(dataset: Any) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in dataset]


def decode(loaded: LoadedData, ids: Any) -> str:
    return str(loaded.tokenizer.decode(ids))


def items(dataset: Any) -> list[list[int]]:
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(DataConfig(vocab_size=300), TEXTS)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, TEXTS)
    return path


@pytest.fixture
def config(jsonl: Path) -> DataConfig:
    return DataConfig(corpus=str(jsonl), eval_fraction=0.2, vocab_size=300, seq_len=16)


@pytest.fixture
def encode_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per batch that is tokenised."""
    calls: list[int] = []
    original = data._encode

    def counted(tokenizer: Any, batch: list[tuple[str, bool]]) -> Any:
        calls.append(len(batch))
        return original(tokenizer, batch)

    monkeypatch.setattr(data, "_encode", counted)
    return calls


# Options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": ""}, "corpus must not be empty"),
        ({"eval_corpus": ""}, "eval_corpus must not be empty; leave it out or set it to null"),
        ({"eval_fraction": 0}, r"eval_fraction must be in \(0, 1\), got 0"),
        ({"eval_fraction": 1.0}, r"eval_fraction must be in \(0, 1\)"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"max_eval_sequences": 0}, "max_eval_sequences must be at least 1, got 0"),
        ({"streaming": True}, "streaming needs max_eval_sequences or eval_corpus"),
        ({"sequence_length": 8}, "unknown key 'sequence_length'"),
        ({"seq_len": "8"}, "data.seq_len must be int"),
    ],
)
def test_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(DataConfig, values, "data")


def test_config_reads_every_field() -> None:
    values: dict[str, Any] = {
        "corpus": "a/b",
        "corpus_config": "c",
        "eval_split": None,
        "max_eval_sequences": 3,
        "streaming": True,
    }
    assert from_dict(DataConfig, values, "data") == DataConfig(**values)


# The built-in corpus


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "stdlib"
    contents: dict[str, bytes] = {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 1\n",
        "a.py": b"# coding: latin-1\nname = '\xe9'\n",
        "broken.py": b"name = '\xe9'\n",
        "unknown.py": b"# coding: no-such-code\n",
        "empty.py": b"\n",
        "readme.txt": b"no",
        "a/test/t.py": b"no",
        "tests/t.py": b"no",
        "idlelib/idle_test/t.py": b"no",
        "site-packages/p.py": b"no",
        "dist-packages/p.py": b"no",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(corpora.sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)
    return root


def test_builtin_is_the_sorted_sources_without_tests(stdlib: Path) -> None:
    source = builtin_source()
    assert [key for key, _ in source.read()] == ["a.py", "a/z.py", "b.py", "empty.py"]
    assert list(source.documents()) == ["# coding: latin-1\nname = 'é'\n", "z = 1\n", "b = 1\n"]


def test_builtin_fingerprint_follows_content(stdlib: Path) -> None:
    before = builtin_source().fingerprint
    assert builtin_source().fingerprint == before
    (stdlib / "b.py").write_bytes(b"b = 2\n")
    assert builtin_source().fingerprint != before


def test_builtin_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="corpus='builtin': no Python source files"):
        builtin_source()


def test_builtin_of_this_python() -> None:
    train, held_out = hold_out(builtin_source(), 0.05)
    train_keys, eval_keys = ([key for key, _ in side.read()] for side in (train, held_out))
    assert "argparse.py" in train_keys + eval_keys
    assert not [key for key in train_keys + eval_keys if "test" in key.split("/")]
    assert 0.02 < len(eval_keys) / len(train_keys) < 0.1
    assert sum(map(len, train.documents())) > 5_000_000


# Held-out documents


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8)), st.floats(0.01, 0.99))
def test_hold_out_splits_by_document(texts: list[str], fraction: float) -> None:
    train, held_out = hold_out(memory_source(texts), fraction)
    train_texts, eval_texts = ([text for _, text in side.read()] for side in (train, held_out))
    assert not set(train_texts) & set(eval_texts)
    assert sorted(train_texts + eval_texts) == sorted(texts)
    alone = hold_out(memory_source(texts[:1]), fraction)[1]
    assert [text for _, text in alone.read()] == [text for text in texts[:1] if text in eval_texts]


def test_hold_out_fraction_is_respected() -> None:
    held_out = hold_out(memory_source([str(i) for i in range(4000)]), 0.05)[1]
    assert 150 < len(list(held_out.documents())) < 250


def test_hold_out_fingerprints_differ() -> None:
    train, held_out = hold_out(memory_source(["a"]), 0.1)
    other = hold_out(memory_source(["a"]), 0.2)[0]
    assert train.fingerprint != held_out.fingerprint
    assert train.fingerprint != other.fingerprint


# Local files

DOCUMENTS = ["first\nline é\n", "second"]


def write_parquet(path: Path, texts: list[Any], field: str = "text") -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": list(range(len(texts))), field: texts}), path)


def zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd as module

        return module
    return pytest.importorskip("backports.zstd")


PACKERS: dict[str, Callable[[], Callable[[bytes], bytes]]] = {
    "": lambda: bytes,
    ".gz": lambda: gzip.compress,
    ".xz": lambda: lzma.compress,
    ".zst": lambda: zstd().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".json", ".jsonl", ".JSONL"])
def test_text_files_round_trip(tmp_path: Path, kind: str, suffix: str) -> None:
    lines = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS) + "\n\n"
    content = DOCUMENTS[0] if kind == ".txt" else lines
    (tmp_path / f"a{kind}{suffix}").write_bytes(PACKERS[suffix]()(content.encode()))
    expected = DOCUMENTS[:1] if kind == ".txt" else DOCUMENTS
    assert list(file_source("corpus", str(tmp_path), "text").documents()) == expected


def test_parquet_round_trip(tmp_path: Path) -> None:
    texts = [str(i) for i in range(2500)]  # more than one batch
    write_parquet(tmp_path / "a.parquet", texts, "body")
    assert list(file_source("corpus", str(tmp_path / "a.parquet"), "body").documents()) == texts


def test_folder_and_glob_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "a.jsonl", ".hidden/h.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert list(file_source("corpus", str(tmp_path), "text").documents()) == ["a/c.txt", "a.jsonl", "b.txt"]
    assert list(file_source("corpus", str(tmp_path / "*.txt"), "text").documents()) == ["b.txt"]
    assert list(file_source("corpus", f"{tmp_path}/**/*.txt", "text").documents()) == ["a/c.txt", "b.txt"]


def test_byte_order_mark_and_blank_documents_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.txt").write_bytes(b" \n")
    assert list(file_source("corpus", str(tmp_path), "text").documents()) == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1, "id": 2}\n', r"a.jsonl, line 2 has no field 'text'.*\['body', 'id'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2 is not JSON"),
        ("a.json", b'[{"text": "x"}]', "a.json, line 1 is a list; each line must be one object"),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: 'text' is NoneType, not a text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: 'text' is not valid Unicode"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"x" * 100)[:-9], "a.txt.gz cannot be read, it may be truncated"),
        ("a.txt.xz", lzma.compress(b"x" * 100)[:-9], "a.txt.xz cannot be read, it may be truncated"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1PAR1PAR1", "a.parquet cannot be read, it may be truncated"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(file_source("corpus", str(tmp_path), "text").documents())


def test_truncated_zst_is_an_error(tmp_path: Path) -> None:
    whole = zstd().compress(os.urandom(300_000).hex().encode())
    (tmp_path / "a.txt.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.txt.zst cannot be read, it may be truncated"):
        list(file_source("corpus", str(tmp_path), "text").documents())


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="zstd is part of this Python")
def test_missing_zstd_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "backports", None)
    with pytest.raises(ValueError, match=r"a.txt.zst needs a package: pip install backports.zstd"):
        list(file_source("corpus", str(tmp_path), "text").documents())


@pytest.mark.parametrize(("texts", "field"), [(["x"], "body"), (["x", None], "text")])
def test_unusable_parquet_is_named(tmp_path: Path, texts: list[Any], field: str) -> None:
    write_parquet(tmp_path / "a.parquet", texts, field)
    message = (
        r"a.parquet has no field 'text'; .*\['body', 'n'\]" if field == "body" else "a.parquet, row 1: 'text' is None"
    )
    with pytest.raises(ValueError, match=message):
        list(file_source("corpus", str(tmp_path), "text").documents())


def test_no_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_corpus='.*nothing.txt' matches no file .*known suffixes: .txt"):
        file_source("eval_corpus", str(tmp_path / "nothing.txt"), "text")
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"corpus: .*a.pdf has an unknown suffix; known are .txt"):
        file_source("corpus", str(tmp_path / "*"), "text")
    with pytest.raises(ValueError, match="matches no file"):
        file_source("corpus", str(tmp_path), "text")


@pytest.mark.parametrize(
    ("corpus", "local"),
    [
        ("wikitext", False),
        ("Salesforce/wikitext", False),
        ("user/set-v1.0", False),
        ("./wikitext", True),
        ("~/text", True),
        ("/data/x", True),
        ("a/b/c", True),
        ("data/*.txt", True),
        ("train.txt", True),
        ("data/train.jsonl.gz", True),
    ],
)
def test_local_or_hub(corpus: str, local: bool) -> None:
    assert is_local(corpus) is local


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name")


# Hub data sets: a local folder stands in for the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS[:50])
    write_jsonl(folder / "validation.jsonl", TEXTS[50:])
    original = datasets.load_dataset_builder

    def stand_in(name: str, config_name: str | None = None) -> Any:
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return original(str(folder), config_name, cache_dir=str(tmp_path / "hub-cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_documents(hub: Path, streaming: bool) -> None:
    source = hub_source("owner/name", None, "train", "text", streaming)
    assert list(source.documents()) == TEXTS[:50]
    assert list(source.documents()) == TEXTS[:50]


def test_hub_fingerprint_follows_content(hub: Path) -> None:
    before = hub_source("owner/name", None, "train", "text", False).fingerprint
    assert hub_source("owner/name", None, "validation", "text", False).fingerprint != before
    write_jsonl(hub / "train.jsonl", TEXTS[:2])
    os.utime(hub / "train.jsonl", (1, 1))
    assert hub_source("owner/name", None, "train", "text", False).fingerprint != before


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_errors_list_the_choices(hub: Path, streaming: bool) -> None:
    with pytest.raises(ValueError, match=r"eval_split 'test' is not there: .*train.*validation"):
        list(hub_source("owner/name", None, "test", "text", streaming).documents())
    with pytest.raises(ValueError, match=r"corpus='owner/name' has no field 'body'; .*\['n', 'text'\]"):
        list(hub_source("owner/name", None, "train", "body", streaming).documents())
    with pytest.raises(ValueError, match=r"corpus='bultin' is not 'builtin', not an existing file .* doesn't exist"):
        hub_source("bultin", None, "train", "text", streaming)


@pytest.mark.parametrize("eval_split", ["validation", None])
def test_load_data_from_hub(hub: Path, tmp_path: Path, eval_split: str | None) -> None:
    options: dict[str, Any] = {"corpus": "owner/name", "eval_split": eval_split, "vocab_size": 300, "seq_len": 16}
    loaded = load_data(DataConfig(**options), tmp_path / "cache")
    streamed = load_data(DataConfig(**options, streaming=True, max_eval_sequences=10), tmp_path / "cache")
    assert isinstance(loaded.train, PackedDataset)
    assert windows(streamed.train) == items(loaded.train)
    assert items(streamed.eval) == items(loaded.eval)[:10]
    if eval_split:
        text = decode(loaded, loaded.eval[0]["input_ids"])
        assert TEXTS[50].startswith(text)


# Tokenizer


def test_bpe_is_deterministic_and_reloads(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    again = load_tokenizer(DataConfig(vocab_size=300), iter(TEXTS))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (len(reloaded), reloaded.eos_token, reloaded.eos_token_id) == (300, EOS, tokenizer.eos_token_id)
    other = load_tokenizer(DataConfig(vocab_size=300), TEXTS[:5])
    assert other.get_vocab() != tokenizer.get_vocab()


@given(st.text(st.characters(codec="utf-8")))
def test_bpe_is_lossless(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bpe_of_a_small_corpus_warns(caplog: pytest.LogCaptureFixture) -> None:
    small = load_tokenizer(DataConfig(vocab_size=1000), ["ab ab"])
    assert len(small) < 1000
    assert f"vocabulary of only {len(small)} entries, not 1000" in caplog.text


def test_bpe_stops_reading_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_BPE_CHARS", 100)
    endless = itertools.cycle(["some words to learn "])
    assert len(load_tokenizer(DataConfig(vocab_size=260), endless)) == 260


def test_bare_gpt2_files_load(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), ())
    assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_without_eos_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), ())


def test_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="is not 'bpe', and cannot be loaded as a folder or from the hub"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), ())


# Packing

documents = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents, st.integers(2, 9), st.integers(1, 40))
def test_windows_are_the_stream(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], seq_len: int, batch_chars: int
) -> None:
    monkeypatch.setattr(data, "_BATCH_CHARS", batch_chars)
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    written = data._write_tokens(tmp_path / "t.npy", token_batches(tokenizer, texts), np.dtype(np.uint16), None)
    assert written == {"tokens": len(stream), "text_bytes": sum(len(text.encode()) for text in texts)}
    packed = items(PackedDataset(tmp_path / "t.npy", seq_len))
    assert packed == [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    if packed:
        assert windows(PackedStream(memory_source(texts), tokenizer, seq_len)) == packed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("ab\n", max_size=200), st.integers(1, 20))
def test_pieces_end_at_newlines(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setattr(data, "_PIECE_CHARS", size)
    pieces = list(data._pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= size for piece, _ in pieces)
    assert all(piece.endswith("\n") or ("\n" not in piece and len(piece) == size) for piece, last in pieces if not last)


def test_a_long_document_has_one_eos(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PIECE_CHARS", 10)
    monkeypatch.setattr(data, "_BATCH_CHARS", 25)
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


def test_wide_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({EOS: 0, "a": 1, "b": 65_536}, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wide = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    file, _ = data._cached_tokens(wide, memory_source(["a b"]), tmp_path, None)
    assert np.load(file).tolist() == [1, 65_536, 0]


# The whole, and its cache


def test_load_data(config: DataConfig, tmp_path: Path) -> None:
    loaded = load_data(config, tmp_path / "cache")
    assert isinstance(loaded.train, PackedDataset)
    text = decode(loaded, [token for window in items(loaded.train) for token in window])
    evaluated = decode(loaded, [token for window in items(loaded.eval) for token in window])
    train, held_out = (list(side.documents()) for side in hold_out(file_source("corpus", config.corpus, "text"), 0.2))
    assert (EOS.join(train) + EOS).startswith(text)
    assert (EOS.join(held_out) + EOS).startswith(evaluated)
    assert len(train) + len(held_out) == len(TEXTS)
    assert loaded.num_train_tokens == 16 * len(loaded.train)
    assert loaded.num_eval_tokens == 16 * len(loaded.eval)
    tokens = sum(len(loaded.tokenizer(text)["input_ids"]) + 1 for text in held_out)
    assert loaded.bytes_per_eval_token == sum(len(text.encode()) for text in held_out) / tokens


def test_second_call_reads_the_cache(config: DataConfig, tmp_path: Path, encode_calls: list[int]) -> None:
    first = load_data(config, tmp_path / "cache")
    assert len(encode_calls) == 2
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    second = load_data(config, tmp_path / "cache")
    longer = load_data(replace(config, seq_len=32), tmp_path / "cache")
    assert len(encode_calls) == 2
    assert items(second.train) == items(first.train)
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert items(longer.train)[0] == items(first.train)[0] + items(first.train)[1]
    assert names == sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split("-")[0] for name in names] == ["tokenizer", "tokens", "tokens"]


@pytest.mark.parametrize("change", [{"vocab_size": 290}, {"eval_fraction": 0.3}, {"text_field": "body"}, {"corpus": 0}])
def test_changes_rebuild(
    config: DataConfig, jsonl: Path, tmp_path: Path, encode_calls: list[int], change: dict[str, Any]
) -> None:
    jsonl.write_text("".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in TEXTS))
    before = load_data(config, tmp_path / "cache")
    encode_calls.clear()
    if change == {"corpus": 0}:  # same size, other text, later time
        state = jsonl.stat()
        jsonl.write_text(jsonl.read_text().replace("sparse", "sporse"))
        os.utime(jsonl, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        change = {}
    after = load_data(replace(config, **change), tmp_path / "cache")
    assert len(encode_calls) == 2
    assert items(after.train) != items(before.train)


def test_other_tokenizer_rebuilds(config: DataConfig, tokenizer: Any, tmp_path: Path, encode_calls: list[int]) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    options = {**vars(config), "tokenizer": str(folder)}
    load_data(DataConfig(**options), tmp_path / "cache")
    load_tokenizer(DataConfig(vocab_size=280), TEXTS).save_pretrained(folder)  # same folder, other content
    load_data(DataConfig(**options), tmp_path / "cache")
    assert len(encode_calls) == 4


@pytest.mark.parametrize("damage", ["tokens.npy", "manifest.json", "tokenizer.json"])
def test_damaged_entry_is_replaced(
    config: DataConfig, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_data(config, tmp_path / "cache")
    expected = items(first.train)
    for file in (tmp_path / "cache").rglob(damage):
        file.write_bytes(file.read_bytes()[:-1])
    assert items(load_data(config, tmp_path / "cache").train) == expected
    assert "is damaged and replaced" in caplog.text


def test_a_killed_build_leaves_nothing_that_is_used(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Path, batches: Iterator[Any], *_: Any) -> Any:
        np.save(file, next(iter(batches))[0][:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "_write_tokens", killed)
        patch.setattr(data.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            load_data(config, tmp_path / "cache")
    assert list((tmp_path / "cache").glob(".partial-tokens-*/tokens.npy"))
    assert items(load_data(config, tmp_path / "cache").train) == items(load_data(config, tmp_path / "new").train)


def test_a_failed_build_cleans_up(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no field 'nothing'"):
        load_data(replace(config, text_field="nothing"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    def build(folder: Path, content: str, meanwhile: Callable[[], Any]) -> dict[str, int]:
        (folder / "a").write_text(content)
        meanwhile()
        return {"length": len(content)}

    fast = partial(data._cached, tmp_path, "x", {}, lambda folder: build(folder, "fast", lambda: None))
    entry, _ = data._cached(tmp_path, "x", {}, lambda folder: build(folder, "slower", fast))
    assert (entry / "a").read_text() == "fast"
    assert fast()[1] == {"length": 4}
    assert list(tmp_path.iterdir()) == [entry]


def test_eval_limit_reads_no_further(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_BATCH_CHARS", 100)
    limited = load_data(replace(config, max_eval_sequences=2), tmp_path / "cache")
    whole = load_data(config, tmp_path / "cache")
    assert len(whole.eval) > 6
    assert items(limited.eval) == items(whole.eval)[:2]
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").rglob("tokens.npy"))
    assert sizes[0] < sizes[1] / 2  # the limited stream next to the whole held-out one


def test_config_cache_dir_wins(config: DataConfig, tmp_path: Path) -> None:
    load_data(replace(config, cache_dir=str(tmp_path / "mine")), tmp_path / "theirs")
    assert (tmp_path / "mine").exists()
    assert not (tmp_path / "theirs").exists()


def test_separate_eval_corpus(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(TEXTS[0] * 3)
    loaded = load_data(replace(config, eval_corpus=str(tmp_path / "held.txt")), tmp_path / "cache")
    assert (TEXTS[0] * 3).startswith(decode(loaded, loaded.eval[0]["input_ids"]))
    whole = sum(len(loaded.tokenizer(text)["input_ids"]) + 1 for text in TEXTS)  # nothing held out of the corpus
    assert loaded.num_train_tokens == whole // 16 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 100_000}, r"the held-out part of corpus=.* has \d+ tokens, less than one sequence .*eval_corpus"),
        ({"eval_corpus": "{tmp}/corpus.jsonl"}, r"corpus.jsonl is in both corpus and eval_corpus"),
        ({"eval_corpus": "{tmp}/none.txt"}, r"eval_corpus='.*none.txt' matches no file"),
        ({"corpus_config": "raw"}, "corpus_config='raw' is for hub data sets"),
        ({"corpus": "{tmp}/one.txt"}, r"held-out part of .* has 0 tokens.*a .txt file is one document"),
        ({"corpus": "{tmp}/blank.txt", "eval_corpus": "{tmp}/one.txt"}, r"blank.txt' has 0 tokens, .*give more text"),
    ],
)
def test_load_data_errors(config: DataConfig, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "one.txt").write_text("one document" * 9)
    (tmp_path / "blank.txt").write_text("\n")
    change = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        load_data(replace(config, **change), tmp_path / "cache")


# Streaming


@pytest.fixture
def stream(tokenizer: Any) -> PackedStream:
    return PackedStream(memory_source(TEXTS), tokenizer, 16)


def test_streaming_equals_stored(config: DataConfig, tmp_path: Path) -> None:
    stored = load_data(config, tmp_path / "cache")
    streamed = load_data(replace(config, streaming=True, max_eval_sequences=3), tmp_path / "cache")
    assert streamed.num_train_tokens is None
    assert windows(streamed.train) == items(stored.train)
    assert windows(streamed.train) == windows(streamed.train)
    assert len(streamed.eval) == 3


def test_stream_shorter_than_a_sequence_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"memory has 2 tokens, less than one sequence \(seq_len=16\)"):
        list(PackedStream(memory_source(["a"]), tokenizer, 16))


def test_stream_with_workers_gives_each_window_once(stream: PackedStream) -> None:
    loader = torch.utils.data.DataLoader(stream, batch_size=1, num_workers=2)
    assert [batch["input_ids"][0].tolist() for batch in loader] == windows(stream)


@pytest.mark.parametrize("corpus", ["owner/name", "{jsonl}"])
def test_stream_can_be_sent_to_a_spawned_worker(hub: Path, jsonl: Path, tmp_path: Path, corpus: str) -> None:
    config = DataConfig(
        corpus=corpus.format(jsonl=jsonl), vocab_size=300, seq_len=16, streaming=True, max_eval_sequences=1
    )
    train = load_data(config, tmp_path / "cache").train
    assert windows(pickle.loads(pickle.dumps(train))) == windows(train)


def test_stream_over_ranks_gives_each_window_once(stream: PackedStream) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    shards = [accelerate.IterableDatasetShard(stream, batch_size=4, num_processes=2, process_index=i) for i in (0, 1)]
    all_windows = windows(stream)
    even, odd = (windows(shard) for shard in shards)
    assert even[:8] == all_windows[:4] + all_windows[8:12]
    assert odd[:8] == all_windows[4:8] + all_windows[12:16]
    assert {*map(tuple, even), *map(tuple, odd)} == {*map(tuple, all_windows)}


def test_trainer_takes_a_stream(config: DataConfig, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    loaded = load_data(replace(config, streaming=True, max_eval_sequences=3), tmp_path / "cache")
    seen: list[list[int]] = []

    size = len(loaded.tokenizer)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)
    )
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=loaded.train, eval_dataset=loaded.eval)
    trainer.train()
    assert seen == windows(loaded.train)[:6]
    seen.clear()
    trainer.evaluate()
    assert seen == items(loaded.eval)


# Real data


@needs_data
def test_gpt2_tokenizer_on_real_text(tmp_path: Path) -> None:
    config = DataConfig(
        corpus=real_data("text/tinyshakespeare.txt"),
        eval_corpus=real_data("text/novels/valid.txt.xz"),
        tokenizer=real_data("tokenizers/gpt2"),
        max_eval_sequences=8,
    )
    loaded = load_data(config, tmp_path)
    assert len(loaded.tokenizer) == 50_257
    assert loaded.tokenizer("hello world")["input_ids"] == [31373, 995]  # as the original GPT-2 code gives
    assert loaded.num_train_tokens is not None
    assert 290_000 < loaded.num_train_tokens < 350_000
    assert len(loaded.eval) == 8
    assert 3 < loaded.bytes_per_eval_token < 6
