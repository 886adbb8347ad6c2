"""Which share of a text is held out, where there is no separate held-out text: some documents, or the end of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

from sparseift_llm.data.corpora import Source

ReadSide = Callable[[Source, float, bool], Iterator[tuple[str, str]]]


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split `source` into training and held-out documents, each by a hash of its own key alone.

    Adding or removing a document therefore moves no other one, and documents with equal keys
    (equal texts, except in the built-in corpus, whose keys are paths) stay on one side.

    Args:
        source: what to split.
        fraction: expected share of the documents, not of the text, that is held out, in (0, 1).

    Returns:
        The training and the held-out source; disjoint, together all of `source`.
    """
    return _sides(source, fraction, _read_side, ("training part", "held-out part"), "held_out")


def _sides(source: Source, fraction: float, read: ReadSide, names: tuple[str, str], mark: str) -> tuple[Source, Source]:
    """The training and the held-out source.

    Args:
        source: what is split.
        fraction: the held-out share.
        read: gives the documents of the side that its last argument says: False is for training.
        names: of the two sides.
        mark: the key by which the fingerprints of this way of splitting differ from others.
    """
    train, held_out = (
        Source(
            f"the {name} of {source.name}",
            {"of": source.fingerprint, mark: wanted, "fraction": fraction},
            partial(read, source, fraction, wanted),
            num_bytes=_share(source, fraction if wanted else 1 - fraction),
        )
        for name, wanted in zip(names, (False, True), strict=True)
    )
    return train, held_out


def _share(source: Source, share: float) -> int | None:
    return None if source.num_bytes is None else int(source.num_bytes * share)


def _read_side(source: Source, fraction: float, wanted: bool) -> Iterator[tuple[str, str]]:
    for key, text in source.read():
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        if (int.from_bytes(digest[:8], "big") < fraction * 2**64) == wanted:
            yield key, text


def hold_out_tails(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split every document of `source`: its beginning is for training, its end is held out.

    The cut is after the last line end before the held-out share, after the last space if there is no such line end in
    the half before it, else inside a word. It depends on the document's own text alone.

    Args:
        source: what to split.
        fraction: the share of each document's characters, at least, that is held out, in (0, 1).

    Returns:
        The training and the held-out source; of every document both have a part, unless one is empty.
    """
    return _sides(source, fraction, _read_part, ("beginning", "end"), "tail")


def _read_part(source: Source, fraction: float, wanted: bool) -> Iterator[tuple[str, str]]:
    for key, text in source.read():
        end = int(len(text) * (1 - fraction))
        cut = text.rfind("\n", end // 2, end) + 1 or text.rfind(" ", end // 2, end) + 1 or end
        yield key, text[cut:] if wanted else text[:cut]


def refuse_empty_side(source: Source, train: Source, held_out: Source, fraction: float) -> None:
    """Refuse a split into documents that left all on one side, before anything is made of them.

    Both sides are read up to their first document.

    Args:
        source: what was split.
        train, held_out: the two sides, see `hold_out`.
        fraction: the share that was to be held out.

    Raises:
        ValueError: one side has no document.
    """
    for side, what in ((held_out, "held out"), (train, "left to train on")):
        if next(side.documents(), None) is None:
            count = sum(1 for _ in source.documents())
            raise ValueError(
                f"{source.name}: of its {count} documents none is {what} with eval_fraction={fraction}; give a text "
                "of its own in eval_corpus, or hold out the end of every document with hold_out: tail"
            )
