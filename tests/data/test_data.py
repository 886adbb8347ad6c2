"""The data options, the tokenizer, and `load_data` as a whole; all of it offline."""

from __future__ import annotations

import itertools
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_llm.config.parsing import from_dict
from sparseift_llm.data import packing
from sparseift_llm.data import tokenizer as tokenizer_module
from sparseift_llm.data.corpora import file_source
from sparseift_llm.data.held_out import hold_out
from sparseift_llm.data.loading import LoadedData, load_data
from sparseift_llm.data.options import EOS, DataConfig
from sparseift_llm.data.packing import PackedDataset
from sparseift_llm.data.tokenizer import load_tokenizer
from tests.helpers.texts import TEXTS, items, jsonl_config, small_bpe, stand_in_hub, windows, write_jsonl

needs_data = pytest.mark.skipif("SPARSEIFT_DATA" not in os.environ, reason="SPARSEIFT_DATA is not set")


def real_data(name: str) -> str:
    return os.path.join(os.environ["SPARSEIFT_DATA"], name)


def decode(loaded: LoadedData, ids: Any) -> str:
    return str(loaded.tokenizer.decode(ids))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return small_bpe()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return jsonl_config(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_in_hub(tmp_path, monkeypatch)


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
        ({"rows_are_documents": False}, "rows_are_documents=False is for rows of text; corpus='builtin' has files"),
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
    monkeypatch.setattr(tokenizer_module, "_BPE_CHARS", 100)
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


# The whole


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


def test_eval_limit_reads_no_further(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARS", 100)
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
        ({"rows_are_documents": False}, "rows_are_documents=False needs eval_corpus or eval_split"),
        ({"rows_are_documents": False, "eval_corpus": "{tmp}/one.txt"}, r"eval_corpus: .*one.txt is one document"),
        (
            {"rows_are_documents": False, "corpus": "{tmp}/one.txt"},
            r"corpus: .*one.txt is one document and has no rows",
        ),
        ({"corpus": "{tmp}/one.txt"}, r"the end of corpus=.*one.txt' has \d+ tokens, less than one sequence"),
        ({"corpus": "{tmp}/blank.txt", "eval_corpus": "{tmp}/one.txt"}, r"blank.txt' has 0 tokens, .*give more text"),
    ],
)
def test_load_data_errors(config: DataConfig, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "one.txt").write_text("one document" * 9)
    (tmp_path / "blank.txt").write_text("\n")
    change = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        load_data(replace(config, **change), tmp_path / "cache")


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


# Fingerprint


@pytest.fixture
def two_files(config: DataConfig, tmp_path: Path) -> DataConfig:
    write_jsonl(tmp_path / "eval.jsonl", TEXTS[:5][::-1])
    return replace(config, eval_corpus=str(tmp_path / "eval.jsonl"))


def test_fingerprint_is_stable(two_files: DataConfig, tmp_path: Path) -> None:
    fingerprint = load_data(two_files, tmp_path / "cache").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert load_data(two_files, tmp_path / "cache").fingerprint == fingerprint
    assert load_data(replace(two_files, seq_len=32), tmp_path / "cache").fingerprint == fingerprint
    elsewhere = tmp_path / "elsewhere.jsonl"  # other path, other time, and made anew
    elsewhere.write_bytes(Path(two_files.corpus).read_bytes())
    os.utime(elsewhere, (1, 1))
    assert load_data(replace(two_files, corpus=str(elsewhere)), tmp_path / "new").fingerprint == fingerprint


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", ["tokenizer", "corpus", "eval_corpus"])
def test_fingerprint_changes(
    two_files: DataConfig, tmp_path: Path, tokenizer: Any, change: str, streaming: bool
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = replace(two_files, tokenizer=str(tmp_path / "tokenizer"), vocab_size=None, streaming=streaming)
    before = load_data(config, tmp_path / "cache").fingerprint
    assert load_data(config, tmp_path / "cache").fingerprint == before
    if change == "tokenizer":
        load_tokenizer(DataConfig(vocab_size=299), TEXTS).save_pretrained(tmp_path / "tokenizer")
    else:
        file = Path(getattr(config, change))
        file.write_text(file.read_text().replace("0.75", "0.25", 1))
    assert load_data(config, tmp_path / "cache").fingerprint != before


# Streaming


def test_streaming_equals_stored(config: DataConfig, tmp_path: Path) -> None:
    stored = load_data(config, tmp_path / "cache")
    streamed = load_data(replace(config, streaming=True, max_eval_sequences=3), tmp_path / "cache")
    assert streamed.num_train_tokens is None
    assert windows(streamed.train) == items(stored.train)
    assert windows(streamed.train) == windows(streamed.train)
    assert len(streamed.eval) == 3


@pytest.mark.parametrize("corpus", ["owner/name", "{jsonl}"])
def test_stream_can_be_sent_to_a_spawned_worker(hub: Path, tmp_path: Path, corpus: str) -> None:
    config = DataConfig(
        corpus=corpus.format(jsonl=hub / "train.jsonl"),
        vocab_size=300,
        seq_len=16,
        streaming=True,
        max_eval_sequences=1,
    )
    train = load_data(config, tmp_path / "cache").train
    assert windows(pickle.loads(pickle.dumps(train))) == windows(train)


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


@pytest.mark.parametrize("option", ["corpus", "eval_corpus"])
def test_a_corpus_that_holds_the_stored_tokens_is_refused(option: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write_jsonl(texts / "a.jsonl", TEXTS)
    options: dict[str, Any] = {"corpus": str(texts), "vocab_size": 300, "seq_len": 16}
    if option == "eval_corpus":
        options |= {"corpus": "builtin", "eval_corpus": str(texts)}
    message = rf"{option}='.*texts' covers cache_dir='.*/texts/data', so that a resumed run would read"
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(**options), texts / "data")
    assert [path.name for path in texts.iterdir()] == ["a.jsonl"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every option that takes a path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:40])
    write_jsonl(tmp_path / "held_out.jsonl", TEXTS[40:])
    load_tokenizer(DataConfig(vocab_size=300), TEXTS).save_pretrained(tmp_path / "tokenizer")
    paths = {"corpus": "train.jsonl", "eval_corpus": "held_out.jsonl", "tokenizer": "tokenizer", "cache_dir": "cache"}
    config = DataConfig(seq_len=16, **{key: f"~/{name}" for key, name in paths.items()})  # type: ignore[arg-type]
    loaded = load_data(config, "unused")
    assert len(loaded.tokenizer) == 300
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").glob("[!.]*")) == ["tokens", "tokens"]
    assert not (tmp_path / "~").exists()
