"""The program `sparseift`: its table of commands, its help, and how mistakes are reported.

Every command has a file of its own beside this one, with two functions: `add_arguments(parser)`, and
`run(arguments)`, which does the work through the library and returns what is printed. A third one, `more_help()`, is
called for `--help` alone, and may take longer. Only the file of the command that was asked for is imported, so that
`sparseift --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from sparseift_llm.utils.outputs import in_words
from sparseift_llm.utils.words import nearest


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: what the user types.
        module: its file in this folder, without `.py`.
        help: one line for `sparseift --help`.
        takes_overrides: whether words that are not options of the command are handed on to it as
            `arguments.overrides`, in order. `--learning_rate 1e-3` of `pretrain` is an example.
        is_foreign: whether all words after the name are those of another command line, which parses them and prints by
            itself. They are handed on as `arguments.words`, and the file has no `add_arguments`.
    """

    name: str
    module: str
    help: str
    takes_overrides: bool = False
    is_foreign: bool = False

    def load(self) -> ModuleType:
        """The module with `add_arguments` and `run`."""
        return importlib.import_module(f"sparseift_llm.cli.{self.module}")


COMMANDS = {
    command.name: command
    for command in (
        Command("plan", "plan", "show sizes, FLOPs and memory of a model before and after Sparse-IFT"),
        Command("pretrain", "pretrain", "train a model from a recipe file", takes_overrides=True),
        Command("sweep", "sweep", "train a recipe over a grid of settings and seeds", takes_overrides=True),
        Command("evaluate", "evaluate", "score a model on a suite of tasks", is_foreign=True),
        Command("fetch-data", "fetch_data", "download the data sets of a suite for later", is_foreign=True),
        Command("compare", "compare", "put finished runs, or results of evaluations, side by side"),
        Command("report", "report", "write one HTML page about runs, finished or not"),
        Command("analyze", "analyze", "compute spectral quantities of the checkpoints of runs, and correlations"),
        Command("export", "export", "write a run's model as a stock dense one, or as active weights alone"),
        Command("lm-eval", "lm_eval", "run lm-eval's own command line on Sparse-IFT checkpoints", is_foreign=True),
        Command("bench", "bench", "time dense, masked and block-sparse twins side by side"),
    )
}

_EXAMPLES = """\
example:
  sparseift plan --model gpt3-small --sparsity 0.75 --seq-len 1024
  sparseift pretrain recipes/demo.yaml --output_dir runs/sparse
  sparseift pretrain recipes/demo.yaml --output_dir runs/dense \\
    --sparse_ift null --learning_rate 1.6e-2 --embedding_lr_factor 4
  sparseift compare runs/dense runs/sparse --output runs/comparison
  sparseift evaluate --model runs/sparse --suite builtin

`sparseift COMMAND --help` lists the options of one command."""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        words: the command line without the program's name; by default that of this process.

    Returns:
        Exit status: 0, or 2 after an error message on stderr.
    """
    words = list(sys.argv[1:] if words is None else words)
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return _without_command(words)
    module = command.load()
    rest = words[1:]
    arguments = argparse.Namespace(words=rest) if command.is_foreign else _arguments(command, module, rest)
    try:
        text = module.run(arguments)
    except (ValueError, OSError) as error:
        return _refuse(in_words(error))
    except SystemExit as error:  # the end of a command line that serves a script as well
        if not isinstance(error.code, str):
            raise
        return _refuse(error.code)
    if text:
        _show(text)
    return 0


def _show(text: str) -> None:
    """Print what a command found; a reader that has read enough, such as `head`, ends it without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # and nothing is written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    print(f"sparseift: {message}", file=sys.stderr)
    return 2


def _without_command(words: Sequence[str]) -> int:
    """Print the help or the version, or refuse a command that does not exist."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:{width}}  {command.help}" for command in COMMANDS.values()]
    parser = argparse.ArgumentParser(
        prog="sparseift",
        usage="sparseift COMMAND ...",
        description="Pretrain GPT-style models with Sparse Iso-FLOP Transformations.",
        epilog="\n".join(["commands:", *lines, "", _EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    arguments, rest = parser.parse_known_args(words)
    if rest:
        parser.error(f"{rest[0]!r} is not one of {', '.join(COMMANDS)}{nearest(rest[0], COMMANDS)}")
    if not arguments.version:
        parser.error(f"give a command: {', '.join(COMMANDS)}")
    from importlib.metadata import version

    print(f"sparseift {version('sparseift_llm')}")
    return 0


def _arguments(command: Command, module: ModuleType, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"sparseift {command.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=not command.takes_overrides,
    )
    module.add_arguments(parser)
    if hasattr(module, "more_help") and {"-h", "--help"} & set(words):
        parser.epilog = module.more_help()
    if not command.takes_overrides:
        return parser.parse_args(words)
    arguments, overrides = parser.parse_known_args(words)
    arguments.overrides = overrides
    return arguments
