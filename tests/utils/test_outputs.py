"""Outputs that appear whole or not at all, and errors that name the path which the user gave."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparseift_llm.utils.outputs import in_words, refuse_foreign, written_whole


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with written_whole(path) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_takes_the_place_of_none_or_an_empty_one(is_there: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    if is_there:
        path.mkdir()
    with written_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert [found.relative_to(tmp_path).as_posix() for found in sorted(tmp_path.rglob("*"))] == ["folder", "folder/a"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_fails_leaves_all_as_it_was(is_folder: bool, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def write() -> None:
        with written_whole(tmp_path / ("b" if is_folder else "a")) as temporary:
            if is_folder:
                temporary.mkdir()
            (temporary / "c" if is_folder else temporary).write_text("after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_errors_name_the_path_given(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    (tmp_path / "full" / "of").mkdir(parents=True)

    def write(path: Path, *parts: str) -> str:
        with pytest.raises(OSError) as caught, written_whole(path) as temporary:  # noqa: PT011 - see in_words
            temporary.joinpath(*parts).write_text("")
        return in_words(caught.value).replace(f"{tmp_path}/", "")

    assert write(tmp_path / "afile" / "x") == "cannot read or write afile: File exists"
    assert write(tmp_path / "full") == "cannot read or write full: Is a directory"
    assert write(tmp_path / "a", "b", "c") == "cannot read or write a/b/c: No such file or directory"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["afile", "full"]


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
