"""Reading documents from files and the hub, and holding some out; all of it offline."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_llm.data.corpora import file_source, hub_source, is_local, would_read
from sparseift_llm.data.held_out import hold_out
from tests.helpers.texts import TEXTS, memory_source, stand_in_hub, write_jsonl, write_parquet

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
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-9], "a.txt.gz cannot be read, it may be truncated"),
        ("a.txt.xz", lzma.compress(b"x" * 100)[:-9], "a.txt.xz cannot be read, it may be truncated"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1PAR1PAR1", "a.parquet cannot be read, it may be truncated"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(file_source("corpus", str(tmp_path), "text").documents())


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
@pytest.mark.parametrize("skip", [True, False])
def test_rows_without_a_text_are_an_error_or_are_counted(
    kind: str, skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[Any] = ["a", None, "b", None, ""]
    if kind == "hub":
        name = str(stand_in_hub(tmp_path, monkeypatch, train=texts))
        source = hub_source("owner/name", None, "train", "text", streaming=False, skip_null_texts=skip)
        name = "corpus='owner/name' split 'train'"
    else:
        path = tmp_path / f"a.{kind}"
        (write_parquet if kind == "parquet" else write_jsonl)(path, texts)
        source = file_source("corpus", str(path), "text", skip_null_texts=skip)
        name = str(path)
    if not skip:
        with pytest.raises(ValueError, match=r"is NoneType, not a text; drop that record, or .* skip_null_texts: true"):
            list(source.documents())
        return
    train, held_out = hold_out(source, 0.5)
    assert sorted([*train.documents(), *held_out.documents()]) == ["a", "b"]
    assert caplog.messages == [f"{name}: 2 rows whose 'text' is null were left out"]  # once, though read twice


def test_skipping_rows_is_part_of_what_the_text_is_known_by(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    kept, skipped = (
        file_source("corpus", str(tmp_path), "text", skip_null_texts=skip).fingerprint for skip in (False, True)
    )
    assert kept != skipped
    assert kept.keys() == {"files", "text_field"}  # as before there was the option, so that stored tokens are found


@pytest.mark.parametrize(
    ("pattern", "folder", "expected"),
    [
        ("texts", "texts/run", True),
        ("texts", "texts", True),
        ("texts", "run", False),
        ("texts", "texts2/run", False),
        ("texts", "texts/.hidden/run", False),  # hidden folders are not read
        ("texts/**/*.json", "texts/a/run", True),
        ("**/*.json", "runs/a", True),
        ("texts/*.json", "texts", True),
        ("texts/*.json", "texts/run", False),
        ("*.jsonl", "run", False),
        ("**/*.txt", "run", False),
        ("run/summary.json", "run", True),
        ("texts/a.txt", "texts", False),
    ],
)
def test_which_text_a_run_would_write_itself(
    pattern: str, folder: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("summary.json", "checkpoint-1/config.json")
    for home in ("", f"{tmp_path}/"):
        assert would_read(home + pattern, Path(folder), names) == expected
        assert would_read(pattern, Path(home + folder), names) == expected


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
    return stand_in_hub(tmp_path, monkeypatch)


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
