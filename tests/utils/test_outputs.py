"""Paths that users name, and errors in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparseift_llm.utils.outputs import in_words, refuse_foreign, user_path


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ({}, None),
        ({"a": "mark, and more"}, None),
        ({"a": "mark, and more", "b": "whatever"}, None),
        ({"a": "no mark"}, "a"),
        ({"a": ""}, "a"),
        ({"a": "\udcff"}, "a"),  # not text
        ({"a": None}, "a"),  # a folder
        ({"b": "mark"}, "b"),  # the first one tells, and is not there
        ({"a": "no mark", "b": "mark"}, "a"),
    ],
)
def test_what_a_command_did_not_write_is_refused(
    contents: dict[str, str | None], named: str | None, tmp_path: Path
) -> None:
    for name, text in contents.items():
        if text is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    paths = [tmp_path / "a", tmp_path / "b"]
    if named is None:
        refuse_foreign(paths, r"mark,", "this")
    else:
        advice = "move it away or give another --output" + ("" if "a" in contents else " (a is not beside it)")
        message = f"{tmp_path / named} is there already, and not from this; {advice}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuse_foreign(paths, r"mark,", "this")


def test_errors_that_name_no_file_keep_their_words() -> None:
    assert in_words(ValueError("a must be 1, got 2")) == "a must be 1, got 2"
    assert in_words(OSError("owner/name cannot be reached")) == "owner/name cannot be reached"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == user_path(Path("~/a")) == tmp_path / "a"
    assert user_path("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match=r"'~nobody-of-that-name/a' starts with a home folder that is not known"):
        user_path("~nobody-of-that-name/a")
