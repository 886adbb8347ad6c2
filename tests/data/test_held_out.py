"""Text without held-out text beside it: the end of a single file is held out, and an empty side is refused at once."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparseift_llm.data.cache as cache_module
import sparseift_llm.data.loading as loading_module
from sparseift_llm.data.corpora import Source
from sparseift_llm.data.held_out import hold_out_tails
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig


def memory_source(texts: list[str]) -> Source:
    return Source("texts", {"texts": texts}, lambda: ((text, text) for text in texts))


@given(st.lists(st.text(st.sampled_from("ab \n"), min_size=1), min_size=1, max_size=4), st.floats(0.01, 0.99))
def test_beginnings_and_ends_make_the_documents(texts: list[str], fraction: float) -> None:
    beginnings, ends = ([text for _, text in side.read()] for side in hold_out_tails(memory_source(texts), fraction))
    assert [first + last for first, last in zip(beginnings, ends, strict=True)] == texts
    for text, last in zip(texts, ends, strict=True):
        assert len(last) >= len(text) - int(len(text) * (1 - fraction))


@pytest.mark.parametrize(
    ("text", "end"),
    [("one\ntwo\nthree four", "three four"), ("one two three four", "three four"), ("onetwothreefour", "efour")],
)
def test_cuts_are_at_a_line_end_else_at_a_space(text: str, end: str) -> None:
    assert [last for _, last in hold_out_tails(memory_source([text]), 0.3)[1].read()] == [end]


def write_lines(path: Path, number: int) -> Path:
    path.write_text("".join(f"line {i} of the text\n" for i in range(number)))
    return path


def test_the_end_of_a_single_text_file_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = write_lines(tmp_path / "train.txt", 400)
    with caplog.at_level(logging.INFO, "sparseift_llm"):
        data = load_data(
            DataConfig(corpus=str(corpus), vocab_size=280, seq_len=8, eval_fraction=0.1), tmp_path / "tokens"
        )
    assert "the last 0.1 of every document is held out" in caplog.text
    assert f"tokens are kept in {tmp_path / 'tokens'}" in caplog.text
    decoded = [
        data.tokenizer.decode([token for i in range(len(side)) for token in side[i]["input_ids"].tolist()])
        for side in (data.train, data.eval)
        if not isinstance(side, Source)
    ]
    assert decoded[0].startswith("line 0 of the text\nline 1 ")
    assert "line 399 of the text" not in decoded[0]
    assert decoded[1].startswith("line 3")
    assert "line 390 of the text" in decoded[1]
    assert 0.08 < data.num_eval_tokens / (data.num_eval_tokens + (data.num_train_tokens or 0)) < 0.14


def test_documents_that_all_fall_on_one_side_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        write_lines(tmp_path / name, 30 + ord(name[0]))
    for module, name in ((loading_module, "cached_tokenizer"), (cache_module, "token_batches")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was made of the text"))
    config = DataConfig(corpus=str(tmp_path / "*.txt"), eval_fraction=0.001)
    with pytest.raises(ValueError, match=r"of its 2 documents none is held out with eval_fraction=0.001; give "):
        load_data(config, tmp_path / "tokens")
    config = DataConfig(corpus=str(tmp_path / "*.txt"), eval_fraction=0.999)
    with pytest.raises(ValueError, match=r"of its 2 documents none is left to train on with eval_fraction=0.999"):
        load_data(config, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "a.txt", "eval_corpus": "b.txt", "hold_out": "tail"}, "is for text without eval_corpus='b.txt'"),
        ({"hold_out": "tail"}, "would train on files of the built-in evaluation"),
        (
            {"corpus": "a.txt", "hold_out": "tails"},
            "hold_out='tails' is not one of 'documents', 'tail'; did you mean 'tail'",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_several_files_can_give_their_ends(tmp_path: Path) -> None:
    for name, letter in itertools.product(("a", "b"), "x"):
        (tmp_path / f"{name}.txt").write_text(f"{letter}{name} " * 200)
    config = DataConfig(corpus=str(tmp_path / "*.txt"), hold_out="tail", vocab_size=258, seq_len=8)
    data = load_data(config, tmp_path / "tokens")
    text = data.tokenizer.decode([token for i in range(len(data.eval)) for token in data.eval[i]["input_ids"].tolist()])
    assert "xa" in text
    assert "xb" in text
