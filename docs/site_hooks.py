"""What the site adds to the Markdown pages while mkdocs builds it; the pages can be read without it, too.

- A line `<!-- generated: NAME -->` is replaced by what the code says now: options, keys of a recipe, help of commands.
- A notebook, `tutorials/NAME.py` in jupytext's percent format, becomes the page `tutorials/NAME.md`, and
  `tutorials/NAME.ipynb` to download.
- Comments for the tests that run the pages' code, `<!-- test: ... -->`, are taken out.
- A link to a file outside docs/ becomes that file's name, because the site does not hold it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
HELP_WIDTH = 100  # columns of the help of commands
TUTORIALS = "tutorials"

sys.path.insert(0, str(ROOT))  # the pages describe the code beside them, whichever is installed


def on_files(files: Any, config: Any) -> Any:
    """Add the page and the download of every notebook, and take out its source."""
    from mkdocs.structure.files import File

    for source in sorted((DOCS / TUTORIALS).glob("*.py")):
        name = f"{TUTORIALS}/{source.stem}"
        files.remove(files.src_uris[f"{name}.py"])
        files.append(File.generated(config, f"{name}.md", content=notebook_page(source)))
        files.append(File.generated(config, f"{name}.ipynb", content=notebook_file(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of a page, with what is generated, and with links that work on the site."""
    text = re.sub(r"<!-- test: .*?-->\n", "", markdown, flags=re.DOTALL)
    text = re.sub(r"<!-- generated: ([\w-]+) -->", lambda match: GENERATED[match[1]](), text)
    return _site_links(text, Path(page.file.src_uri).parent)


def notebook_page(source: Path) -> str:
    """A notebook in the percent format as Markdown, with a link to the file to download."""
    import jupytext

    parts = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in jupytext.read(source).cells
    ]
    title, *rest = parts
    download = f"Download [{source.stem}.ipynb]({source.stem}.ipynb) to run it."
    return "\n\n".join([title, download, *rest]) + "\n"


def notebook_file(source: Path) -> str:
    """A notebook in the percent format as the text of an .ipynb file."""
    import jupytext

    text: str = jupytext.writes(jupytext.read(source), fmt="ipynb")
    return text


def _site_links(text: str, folder: Path) -> str:
    """Links of a page in `folder`, relative to docs/: to notebooks' pages, and none to what the site lacks."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path = target.partition("#")[0]
        place = os.path.normpath(folder / path)
        if not path or re.match(r"\w+:", path):
            return match[0]
        if place == "../README.md":
            return f"[{words}]({os.path.relpath('index.md', folder)})"
        if place.startswith(".."):
            return words
        if place.startswith(f"{TUTORIALS}/") and place.endswith(".py"):
            return f"[{words}]({path.removesuffix('.py')}.md)"
        return match[0]

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    return "".join(re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, piece) if i % 2 == 0 else piece
                   for i, piece in enumerate(pieces))  # fmt: skip


def config_options() -> str:
    """Every option of `SparseIFTConfig`."""
    from sparseift_llm.config.describe import describe_options
    from sparseift_llm.config.transform import SparseIFTConfig

    return _table(describe_options(SparseIFTConfig))


def recipe_keys() -> str:
    """Every key of a recipe, by section."""
    from sparseift_llm.config.describe import describe_options
    from sparseift_llm.data.options import DataConfig
    from sparseift_llm.runs.recipe import ModelConfig, Recipe
    from sparseift_llm.runs.recipe_help import trainer_options
    from sparseift_llm.runs.recipe_training import LearningRateFactors

    decay = [option for option in describe_options(Recipe) if option.name == "lr_decay_steps"]
    sections = {
        "model": describe_options(ModelConfig, "model"),
        "data": describe_options(DataConfig, "data"),
        "training": [*describe_options(LearningRateFactors, "training"), *decay],
        "training: fields of transformers.TrainingArguments": trainer_options(),
    }
    return "\n\n".join(f"## {title}\n\n{_table(options)}" for title, options in sections.items())


def commands() -> str:
    """The help of every command, as it is printed, without the keys of a recipe and lm-eval's own options."""
    from sparseift_llm.cli.program import COMMANDS

    parts = [f"## {name}\n\n{_sentence(command.help)}\n\n```text\n{_help(name)}\n```"
             for name, command in COMMANDS.items() if name != "lm-eval"]  # fmt: skip
    foreign = "`sparseift lm-eval --help` lists lm-eval's options; [evaluation](../evaluation.md) says more."
    return "\n\n".join([*parts, f"## lm-eval\n\n{_sentence(COMMANDS['lm-eval'].help)}\n\n{foreign}"])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _help(name: str) -> str:
    """What `sparseift NAME --help` prints, up to the keys of a recipe, which have a page of their own."""
    from sparseift_llm.cli.program import main

    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, "--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return printed.getvalue().partition("\nkeys of a recipe")[0].strip()


def _table(options: Iterable[Any]) -> str:
    """Options as a Markdown table; a bar in a cell is written as a character reference."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for option in options:
        default = "must be given" if option.default is None else f"`{option.default}`"
        cells = (f"`{option.name}`", option.type, default, option.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "config-options": config_options,
    "recipe-keys": recipe_keys,
    "commands": commands,
}
