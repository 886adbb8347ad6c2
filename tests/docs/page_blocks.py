"""The code blocks of a Markdown page, and running them as a reader would, one after the other. No tests stand here.

A comment on the line before a block says how it is run; readers do not see it:

    <!-- test: not run, REASON -->       the block is left out
    <!-- test: with --max_steps 2 -->    these words are added to the block's first command, and to
                                         others of the same name
    <!-- test: output -->                the block is what the block before it prints
    <!-- test: setup ... -->             no block follows: the rest of the comment is Python that is run at this place

Python blocks of a page share their names. Shell blocks are run line by line, in the page's folder: `sparseift` in this
process, whereas of other programs only the words are looked at, because they install things or start many processes.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseift_llm.cli import main as sparseift
from tests.helpers.paths import ROOT

_PIECE = re.compile(
    r"^<!-- test: setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- test: (?P<how>[^\n]*?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_SCRIPTS = ("recipes/", "eval/", "benchmarks/")


@dataclass(frozen=True)
class Block:
    """A code block, or the hidden setup of a page, with what the comment before it says."""

    language: str
    code: str
    how: str = ""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page in their order; setup is a Python block."""
    return [
        Block("python", match["setup"])
        if match["setup"]
        else Block(match["language"], match["code"], match["how"] or "")
        for match in _PIECE.finditer(text)
    ]


class PageRun:
    """Runs the blocks of one page in the working directory.

    Args:
        name: how errors call the page.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def run(self, block: Block) -> None:
        """Run a block, or compare it with what the one before printed.

        Raises:
            AssertionError: a command fails or does not exist, or the output is another one.
        """
        how, _, words = block.how.partition(" ")
        assert how in ("", "with", "output", "not"), f"{self.name}: {block.how!r} is no way to run a block"
        if how == "output":
            assert block.code.strip() in self.printed, f"{self.name} prints\n{self.printed}\nand not\n{block.code}"
        elif how != "not" and block.language in ("python", "bash"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if block.language == "python":
                    exec(compile(block.code, self.name, "exec"), self.scope)
                else:
                    for command in (found := list(commands(block.code))):
                        self.command(command, shlex.split(words) if command[:2] == found[0][:2] else [])
            self.printed = printed.getvalue()

    def command(self, command: list[str], more: list[str]) -> None:
        """Run a `sparseift` command with `more` words; look at any other."""
        program, *words = command
        if program == "sparseift":
            assert sparseift([*words, *more]) == 0, f"{self.name}: {shlex.join(command)}"
        else:
            check_words(program, words)


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments and settings of the environment."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def check_words(program: str, words: list[str]) -> None:
    """What another program is asked to do names things that exist: targets, extras, scripts."""
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words) <= set(targets), words
    elif program == "pip":
        extras = {name for word in words for name in re.findall(r"\[([\w,]+)\]", word)}
        setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} =$", setup, re.MULTILINE) for name in extras for extra in name.split(","))
    elif program in ("accelerate", "torchrun", "python"):
        scripts = [word for word in words if word.startswith(_SCRIPTS)]
        modules = re.findall(r"-m ([\w.]+)", " ".join(words))
        assert scripts or modules or "pytest" in words or "-c" in words, words
        assert all((ROOT / script).exists() for script in scripts), words
    else:
        assert program in ("git", "cd"), f"{program}: say how this is tested"


def prepare(folder: Path) -> None:
    """Give a page's folder what a clone has."""
    for name in ("recipes", "eval", "benchmarks", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
