"""Files that appear whole or not at all, whatever happens to their writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.checkpoints.mask_file import read_masks, write_masks
from sparseift_llm.utils import files
from sparseift_llm.utils.files import write_json, written_whole
from sparseift_llm.utils.json_lines import append_line, keep_lines, read_lines
from sparseift_llm.utils.outputs import in_words


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


# ---- killed writers

OLD = [{"step": step, "loss": 1.0 / step} for step in range(1, 41)]
KEPT = OLD[:20]


def write_old_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in OLD) + '{"step": 41, "lo')


def write_old_json(path: Path) -> None:
    write_json(path, {"lines": OLD})


def write_old_masks(path: Path) -> None:
    write_masks({"a": torch.ones(64, 64, dtype=torch.bool)}, path)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def masks_of(path: Path) -> Any:
    return read_masks(path.parent, path.name)["a"].sum().item()


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Callable[[Path], Any], Any, Any]] = {
    # how the old content is written, the new one written, either read, and what is read
    "lines": (write_old_lines, lambda path: keep_lines(path, 20), read_lines, OLD, KEPT),
    "json": (write_old_json, lambda path: write_json(path, {"lines": KEPT}), json_of, {"lines": OLD}, {"lines": KEPT}),
    "masks": (
        write_old_masks,
        lambda path: write_masks({"a": torch.eye(64, dtype=torch.bool)}, path),
        masks_of,
        64 * 64,
        64,
    ),
}


class Killed(BaseException):
    """What stands for a kill where no code runs afterwards that could notice it."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["makedirs", "fsync", "replace"])
@pytest.mark.parametrize("is_error", [True, False])
def test_a_writer_stopped_at_any_step_leaves_the_old_content(
    kind: str, step: str, is_error: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_old, write_new, read, old, new = KINDS[kind]
    write_old(path)

    def stopped(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device") if is_error else Killed

    with monkeypatch.context() as patch:
        if step == "makedirs":
            patch.setattr(files.Path, "mkdir", stopped)
        else:
            patch.setattr(files.os, step, stopped)
        if not is_error:
            patch.setattr(files, "remove", lambda _: None)  # a killed process cleans nothing up
        with pytest.raises(OSError if is_error else Killed):
            write_new(path)
    assert read(path) == old
    if is_error:
        assert [found.name for found in tmp_path.iterdir()] == ["file"]
    write_new(path)
    assert read(path) == new


def kill_writers(path: Path, num_kills: int) -> None:
    """Kill processes at random moments while they write; run in a process of its own, which forks them."""
    for write_old, write_new, read, old, new in KINDS.values():
        write_old(path)
        for kill in range(num_kills):
            child = os.fork()
            while child == 0:
                write_old(path.with_name("other"))
                path.with_name("other").replace(path)
                write_new(path)
            time.sleep(0.001 * kill)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert read(path) in (old, new)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_processes_leave_the_old_or_the_new_content(tmp_path: Path) -> None:
    script = f"from tests.utils.test_files import *; kill_writers(Path({str(tmp_path / 'file')!r}), 20)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path) -> None:
    young, old, other = (tmp_path / f".{name}.partial--0123" for name in ("[a]", "[a]", "a"))
    old = old.with_name(old.name + "4")
    for path in (young, old, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    write_json(tmp_path / "[a]", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["[a]", young.name, other.name])


def test_a_file_system_that_knows_no_flushing_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refused)
    write_json(tmp_path / "a", {"a": 1})
    assert json_of(tmp_path / "a") == {"a": 1}


# ---- files of JSON lines


def test_lines_are_kept_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    keep_lines(path, 10)
    assert path.read_text() == ""
    for step in (1, 2, 3):
        append_line(path, {"step": step, "loss": 0.1 + 0.2})
    before = path.read_text().splitlines(keepends=True)
    keep_lines(path, 2)
    assert path.read_text() == "".join(before[:2])


def test_a_damaged_line_is_named_and_nothing_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    text = '{"step": 1}\n{"step": \n{"step": 3}\n'
    path.write_text(text)
    for read in (read_lines, lambda path: keep_lines(path, 1)):
        with pytest.raises(ValueError, match=r"line 2 of .*lines.jsonl is damaged .*; restore the file, or delete"):
            read(path)
    assert path.read_text() == text
