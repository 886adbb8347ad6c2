"""What is stored on disk: when it is used again, when it is made anew, and what killed builds leave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseift_llm.data import cache as token_cache
from sparseift_llm.data import packing
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import EOS, DataConfig
from sparseift_llm.data.tokenizer import load_tokenizer
from sparseift_llm.utils import files
from tests.helpers.texts import TEXTS, items, jsonl_config, memory_source, small_bpe


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return small_bpe()


def entries(folder: Path) -> list[str]:
    """The names of the finished entries."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return jsonl_config(tmp_path)


@pytest.fixture
def encode_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per batch that is tokenised."""
    calls: list[int] = []
    original = packing._encode

    def counted(tokenizer: Any, batch: list[tuple[str, bool]]) -> Any:
        calls.append(len(batch))
        return original(tokenizer, batch)

    monkeypatch.setattr(packing, "_encode", counted)
    return calls


def test_wide_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({EOS: 0, "a": 1, "b": 65_536}, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wide = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    file, _ = token_cache.cached_tokens(wide, memory_source(["a b"]), tmp_path, None)
    assert np.load(file).tolist() == [1, 65_536, 0]


def test_second_call_reads_the_cache(config: DataConfig, tmp_path: Path, encode_calls: list[int]) -> None:
    first = load_data(config, tmp_path / "cache")
    assert len(encode_calls) == 2
    names = entries(tmp_path / "cache")
    second = load_data(config, tmp_path / "cache")
    longer = load_data(replace(config, seq_len=32), tmp_path / "cache")
    assert len(encode_calls) == 2
    assert items(second.train) == items(first.train)
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert items(longer.train)[0] == items(first.train)[0] + items(first.train)[1]
    assert names == entries(tmp_path / "cache")
    assert [name.split("-")[0] for name in names] == ["tokenizer", "tokens", "tokens"]


@pytest.mark.parametrize("change", [{"vocab_size": 290}, {"eval_fraction": 0.3}, {"text_field": "body"}, {"corpus": 0}])
def test_changes_rebuild(config: DataConfig, tmp_path: Path, encode_calls: list[int], change: dict[str, Any]) -> None:
    jsonl = Path(config.corpus)
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
    options = {key: value for key, value in vars(config).items() if key != "vocab_size"}
    options["tokenizer"] = str(folder)
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
        patch.setattr(token_cache, "_write_tokens", killed)
        patch.setattr(files, "remove", lambda _: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            load_data(config, tmp_path / "cache")
    assert list((tmp_path / "cache").glob(".tokens-*.partial-*/tokens.npy"))
    assert items(load_data(config, tmp_path / "cache").train) == items(load_data(config, tmp_path / "new").train)
    assert not list((tmp_path / "cache").glob(".tokens-*"))


def test_a_failed_build_cleans_up(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no field 'nothing'"):
        load_data(replace(config, text_field="nothing", hold_out="tail"), tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


BUILDER = """
import logging, sys; from pathlib import Path; from sparseift_llm.data.cache import cached
logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout)
def build(folder):
    (folder / 'a').write_text(sys.argv[2]); print('building', flush=True); input(); return {}
print((cached(Path(sys.argv[1]), 'x', {}, build)[0] / 'a').read_text())
"""


def builder(folder: Path, content: str) -> subprocess.Popen[str]:
    """A process that starts to build an entry with `content`, and ends it after a line of input."""
    command = [sys.executable, "-c", BUILDER, str(folder), content]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def test_a_process_waits_for_another_that_builds_the_same_entry(tmp_path: Path) -> None:
    with builder(tmp_path, "first") as first:
        assert next_line(first) == "building"
        with builder(tmp_path, "second") as second:
            assert next_line(second).startswith("another process is making ")
            assert first.communicate("\n", timeout=120)[0] == "first\n"
            assert second.communicate(timeout=120)[0] == "first\n"  # it has not built its own
    assert len(entries(tmp_path)) == 1


def test_a_killed_process_loses_its_lock(tmp_path: Path) -> None:
    with builder(tmp_path, "first") as first:
        assert next_line(first) == "building"
        with builder(tmp_path, "second") as second:
            assert next_line(second).startswith("another process is making ")
            first.kill()
            assert next_line(second).startswith("removing ")
            assert next_line(second) == "building"
            assert second.communicate("\n", timeout=120)[0] == "second\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".locks", *entries(tmp_path)])


def test_without_locks_the_first_of_two_builders_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system whose locks hold for one machine only."""
    monkeypatch.setattr(token_cache, "_locked", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(token_cache, "_remove_abandoned", lambda *_: None)

    def build(folder: Path, content: str, meanwhile: Callable[[], Any]) -> dict[str, int]:
        (folder / "a").write_text(content)
        meanwhile()
        return {"length": len(content)}

    fast = partial(token_cache.cached, tmp_path, "x", {}, lambda folder: build(folder, "fast", lambda: None))
    entry, _ = token_cache.cached(tmp_path, "x", {}, lambda folder: build(folder, "slower", fast))
    assert (entry / "a").read_text() == "fast"
    assert fast()[1] == {"length": 4}
    assert list(tmp_path.iterdir()) == [entry]


def test_a_build_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(PermissionError):
        token_cache.cached(tmp_path, "x", {}, lambda _: {})
    assert entries(tmp_path) == []


# What killed builds leave


def build_here(folder: Path) -> list[str]:
    """The names of unfinished entries after a build in this process."""
    token_cache.cached(folder, "x", {"who": "here"}, lambda _: {})
    return [path.name for path in folder.glob(".*partial-*")]


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with builder(tmp_path, "there") as process:
        assert next_line(process) == "building"
        assert len(build_here(tmp_path)) == 1  # it is still building
        shutil.rmtree(next(tmp_path.glob("x-*")))
        process.kill()
    assert build_here(tmp_path) == []


@pytest.mark.parametrize(
    "name", [f".x-0123.partial-{'0' * 12}-{'a' * 12}", ".x-0123.partial-", ".partial-x-0123-f-1-a"]
)
def test_builds_elsewhere_are_removed_after_a_day_without_a_write(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokens.npy").write_text("half")
    age(tmp_path / name, 25)
    age(tmp_path / name / "tokens.npy", 23)  # the folder's own time stands still while a file in it grows
    assert build_here(tmp_path) == [name]
    (entry,) = tmp_path.glob("x-*")
    (entry / "manifest.json").unlink()
    age(tmp_path / name / "tokens.npy", 25)
    assert build_here(tmp_path) == []
