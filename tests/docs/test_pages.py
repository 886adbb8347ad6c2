"""The code blocks of every page run, and what they are said to print is what they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.config.yaml_files import parse_yaml
from sparseift_llm.runs.sweep_plan import Sweep
from tests.docs.page_blocks import Block, PageRun, blocks_of, prepare
from tests.helpers.pages import PAGES as TEXTS
from tests.helpers.paths import ROOT

RUN = [name for name, text in TEXTS.items() if {"python", "bash"} & {block.language for block in blocks_of(text)}]


class NotRunError(Exception):
    """Raised in the place of running a sweep, with the number of runs."""


@pytest.mark.filterwarnings("default")  # what the pages do is watched by other tests; here they have to work
@pytest.mark.parametrize("name", RUN)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(sweep: Sweep, jobs: int) -> list[None]:
        assert len(sweep.runs) == 24  # two rates, two factors, three seeds, two models
        return []

    monkeypatch.setattr("sparseift_llm.runs.sweep.run_sweep", planned)
    monkeypatch.setattr("sparseift_llm.reporting.sweep.write_sweep", lambda sweep, outcomes, has_picture: "")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    torch.manual_seed(0)
    run = PageRun(name)
    for block in blocks_of(TEXTS[name]):
        run.run(block)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "```yaml" in text])
def test_yaml_blocks_are_valid_configs(name: str) -> None:
    for block in blocks_of(TEXTS[name]):
        if block.language == "yaml":
            values = parse_yaml(block.code, name)
            assert SparseIFTConfig.from_dict(values["sparse_ift"]).to_dict()


def test_named_recipes_and_links_exist() -> None:
    for name, text in TEXTS.items():
        page = ROOT / name
        for recipe in re.findall(r"`(?:recipes/)?(\w+\.yaml)`", text):
            assert (ROOT / "recipes" / recipe).is_file() or recipe in ("mkdocs.yml",), f"{name}: {recipe}"
        for target in re.findall(r"\]\((?!http)([^)#\s]+)(?:#[\w-]+)?\)", text):
            wanted = page.parent / target
            tutorial = wanted.with_suffix(".py")  # pages of the site are made of these
            assert wanted.exists() or tutorial.exists(), f"{name}: {target}"


def test_a_block_that_fails_is_caught() -> None:
    run = PageRun("page")
    run.run(Block("python", "print(1 + 1)"))
    run.run(Block("text", "2\n", "output"))
    with pytest.raises(AssertionError, match="and not\n3"):
        run.run(Block("text", "3\n", "output"))
    for code in ("sparseift plan --model nothing --sparsity 0.5 --seq-len 8", "make tea", "python recipes/none.py"):
        with pytest.raises(AssertionError):
            run.run(Block("bash", code))
    with pytest.raises(NameError):
        run.run(Block("python", "undefined"))


def test_comments_say_how_a_block_is_run() -> None:
    text = "<!-- test: setup\nx = 1\n-->\n\n<!-- test: with --a 1 -->\n```bash\nls\n```\n\n```python\ny = 2\n```\n"
    assert blocks_of(text) == [
        Block("python", "x = 1\n"),
        Block("bash", "ls\n", "with --a 1"),
        Block("python", "y = 2\n"),
    ]


def test_errors_that_troubleshooting_explains_are_errors_of_the_package() -> None:
    """Every message quoted there stands in the code, word for word, with `…` for what varies."""
    text = TEXTS["docs/guides/troubleshooting.md"]
    quoted = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert len(quoted) > 20
    words = "\n".join(_literals(path) for path in (ROOT / "sparseift_llm").rglob("*.py"))
    unknown = "Unknown quantization type, got sparse_ift"  # transformers' own
    missing = [
        part.strip() for quote in quoted if quote != unknown for part in quote.split("…") if part.strip() not in words
    ]
    assert missing == []


def _literals(path: Path) -> str:
    """The strings of a module, one per line, with `…` in the place of what is filled in."""
    import ast

    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
    return "\n".join(found)
