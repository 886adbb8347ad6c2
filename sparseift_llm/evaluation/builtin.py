"""Items of the built-in suite, drawn with a fixed seed from the held-out files of the built-in corpus.

Three tasks for a machine that has nothing else: pick the true continuation among four of equal
length, complete the last identifier, and bits per byte. The lm-eval tasks are in tasks/*.yaml.
"""

from __future__ import annotations

import collections
import functools
import itertools
import keyword
import random
import re
from collections.abc import Sequence
from typing import Any

from sparseift_llm.data.held_out import hold_out
from sparseift_llm.data.standard_library import builtin_source

EVAL_FRACTION = 0.05  # DataConfig's default; a run that held out less has trained on some of the items
NUM_CONTINUATIONS = 1200
NUM_IDENTIFIERS = 700
NUM_PIECES = 300
CONTEXT_CHARS, CONTINUATION_CHARS, PIECE_CHARS = 192, 48, 1024  # 240 characters fit a context of 128 small tokens
_SEED = 20230521
_MAX_BLANK = 0.3  # share of white space in a continuation
_IDENTIFIER = re.compile(r"(?<![\w.])[A-Za-z_]\w{3,23}\b")
_DRAWS_PER_ITEM = 200
_MAX_WEIGHT = 40_000  # characters
_MAX_USES = 15  # of one identifier


def continuation_items(documents: Sequence[str], num_items: int = NUM_CONTINUATIONS) -> list[dict[str, Any]]:
    """Items `{context, choices, answer}`: which of four pieces of code goes on after the context?

    All four have CONTINUATION_CHARS characters, all ASCII, and begin where a line's text begins; the
    three wrong ones are from other places, so guessing scores 0.25.

    Args:
        documents: held-out files.
        num_items: how many to draw; no two begin in the same CONTEXT_CHARS characters of a file.

    Raises:
        ValueError: the documents do not have as many.
    """
    draw, weights = random.Random(_SEED), _weights(documents)
    items: dict[tuple[int, int], dict[str, Any]] = {}
    contexts: set[str] = set()
    for _ in range(num_items * _DRAWS_PER_ITEM):
        if len(items) == num_items:
            return list(items.values())
        places = [_draw_place(draw, documents, weights) for _ in range(4)]
        number, start = places[0]
        context = documents[number][max(0, start - CONTEXT_CHARS) : start]
        choices = [documents[n][at : at + CONTINUATION_CHARS] for n, at in places]
        truth = choices[0]
        if len(context) < CONTEXT_CHARS or len(set(choices)) < 4 or not all(_is_dense(choice) for choice in choices):
            continue
        if context in contexts:
            continue
        contexts.add(context)
        draw.shuffle(choices)
        item = {"context": context, "choices": choices, "answer": choices.index(truth)}
        items.setdefault((number, start // CONTEXT_CHARS), item)
    raise _too_little(num_items, "continuations")


def identifier_items(documents: Sequence[str], num_items: int = NUM_IDENTIFIERS) -> list[dict[str, Any]]:
    """Items `{context, identifier}`: complete the last name of a piece of code, greedily and exactly.

    The name has 4 to 24 characters, is not a keyword, stands in the context already and is asked for 15
    times at most. A model that guesses tokens scores next to nothing: chance is stated as 0.

    Args, Raises: as `continuation_items`.
    """
    draw, weights = random.Random(_SEED), _weights(documents)
    items: dict[tuple[int, int], dict[str, Any]] = {}
    uses: collections.Counter[str] = collections.Counter()
    contexts: set[str] = set()
    for _ in range(num_items * _DRAWS_PER_ITEM):
        if len(items) == num_items:
            return list(items.values())
        number, start = _draw_place(draw, documents, weights)
        window = documents[number][start : start + CONTEXT_CHARS + CONTINUATION_CHARS]
        found = [match for match in _IDENTIFIER.finditer(window) if CONTEXT_CHARS // 2 <= match.start() < CONTEXT_CHARS]
        if not found or not window.isascii():
            continue
        name, context = found[-1].group(), window[: found[-1].start()]
        earlier = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", context)
        if earlier is None or keyword.iskeyword(name) or found[-1].end() == len(window) or uses[name] == _MAX_USES:
            continue
        place = (number, (start + found[-1].start()) // CONTEXT_CHARS)
        if place not in items and context not in contexts:
            contexts.add(context)
            items[place] = {"context": context, "identifier": name}
            uses[name] += 1
    raise _too_little(num_items, "repeated identifiers")


def text_items(documents: Sequence[str], num_items: int = NUM_PIECES) -> list[dict[str, Any]]:
    """Items `{text}`: the text of held-out files, one piece of PIECE_CHARS characters from each of `num_items`.

    Args:
        documents: held-out files.
        num_items: number of pieces; files shorter than a piece are left out, long ones give several.

    Raises: as `continuation_items`.
    """
    draw = random.Random(_SEED)
    starts = [
        (number, start)
        for number, text in enumerate(documents)
        for start in range(0, len(text) - PIECE_CHARS + 1, PIECE_CHARS)
    ]
    if len(starts) < num_items:
        raise _too_little(num_items, "pieces")
    chosen = sorted(draw.sample(starts, num_items))
    return [{"text": documents[number][start : start + PIECE_CHARS]} for number, start in chosen]


@functools.cache
def held_out_documents() -> tuple[str, ...]:
    """The held-out files of the built-in corpus, as training with the default `eval_fraction` leaves them out."""
    return tuple(hold_out(builtin_source(), EVAL_FRACTION)[1].documents())


def _weights(documents: Sequence[str]) -> list[int]:
    """How likely a file is drawn: by its length, so that items spread out, but no file takes over."""
    return list(itertools.accumulate(min(len(text), _MAX_WEIGHT) for text in documents))


def _draw_place(draw: random.Random, documents: Sequence[str], weights: Sequence[int]) -> tuple[int, int]:
    """Where the text of a random line begins: number of the file, and position in it."""
    (number,) = draw.choices(range(len(documents)), cum_weights=weights)
    text = documents[number]
    start = text.find("\n", draw.randrange(len(text))) + 1
    while start < len(text) and text[start].isspace():
        start += 1
    return number, start


def _is_dense(piece: str) -> bool:
    blank = sum(character.isspace() for character in piece)
    return len(piece) == CONTINUATION_CHARS and piece.isascii() and blank <= _MAX_BLANK * len(piece)


def _too_little(num_items: int, what: str) -> ValueError:
    return ValueError(f"the built-in corpus of this Python has fewer than {num_items} {what}; use a full installation")
