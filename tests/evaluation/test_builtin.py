"""The built-in suite's items: held out, distinct, of equal length, the same every time."""

from __future__ import annotations

import collections
import keyword

import pytest

from sparseift_llm.data.held_out import hold_out
from sparseift_llm.data.standard_library import builtin_source
from sparseift_llm.evaluation import builtin


@pytest.fixture(scope="module")
def documents() -> tuple[str, ...]:
    return builtin.held_out_documents()


def test_documents_are_those_that_training_holds_out(documents: tuple[str, ...]) -> None:
    train, held_out = hold_out(builtin_source(), 0.05)
    assert list(documents) == list(held_out.documents())
    assert not set(documents) & set(train.documents())


def test_continuations(documents: tuple[str, ...]) -> None:
    items = builtin.continuation_items(documents)
    assert len(items) == builtin.NUM_CONTINUATIONS >= 1000
    assert items == builtin.continuation_items(documents)
    assert len({item["context"] for item in items}) == len(items)
    whole = "\0".join(documents)
    for item in items:
        choices = item["choices"]
        assert len(set(choices)) == 4
        assert {len(choice.encode()) for choice in choices} == {builtin.CONTINUATION_CHARS}
        assert len(item["context"]) == builtin.CONTEXT_CHARS
        assert item["context"] + choices[item["answer"]] in whole
        assert sum(item["context"] + choice in whole for choice in choices) == 1
        assert not any(choice[0].isspace() for choice in choices)
    places = collections.Counter(item["answer"] for item in items)
    assert all(abs(count - len(items) / 4) < 4 * (len(items) * 3 / 16) ** 0.5 for count in places.values())


def test_identifiers(documents: tuple[str, ...]) -> None:
    items = builtin.identifier_items(documents)
    assert len(items) == builtin.NUM_IDENTIFIERS
    assert items == builtin.identifier_items(documents)
    uses = collections.Counter(item["identifier"] for item in items)
    assert max(uses.values()) <= 15  # no few names decide
    assert len({item["context"] for item in items}) == len(items)
    whole = "\0".join(documents)
    for item in items:
        name = item["identifier"]
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
        assert name in item["context"]
        assert item["context"] + name in whole
        assert not item["context"][-1].isalnum()


def test_texts(documents: tuple[str, ...]) -> None:
    items = builtin.text_items(documents)
    assert len(items) == builtin.NUM_PIECES
    assert len({item["text"] for item in items}) > 0.99 * len(items)
    assert all(len(item["text"]) == builtin.PIECE_CHARS and any(item["text"] in d for d in documents) for item in items)


def test_too_little_text_is_an_error() -> None:
    short = ("def name(value):\n    return value\n" * 3,)
    for make in (builtin.continuation_items, builtin.identifier_items, builtin.text_items):
        with pytest.raises(ValueError, match="the built-in corpus of this Python has fewer than"):
            make(short)
