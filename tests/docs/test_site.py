"""The documentation site: it builds without a dead link and without the network, and holds what the code says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import sparseift_llm
from sparseift_llm.cli.program import COMMANDS
from sparseift_llm.config.describe import describe_options
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.runs.recipe import recipe_options
from tests.helpers.paths import ROOT


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, of the project in `folder`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    done = build(ROOT, site)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="?(https?:)?//[^">]+')
    for page in pages:
        text = page.read_text(encoding="utf-8").replace('<link rel="canonical"', "")
        assert not loaded.search(text), f"{page}: {loaded.search(text)}"
        assert "fonts.googleapis" not in text


def test_every_page_is_reached_from_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    decisions = ROOT / "docs" / "developers" / "decisions"
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").as_posix()
        if path.parent == decisions and path.name != "README.md":
            assert path.name in (decisions / "README.md").read_text(encoding="utf-8"), f"{name}: list it in README.md"
        else:
            assert f" {name}\n" in navigation, f"{name}: give it a place in mkdocs.yml, under nav"


def test_the_reference_lists_every_option_and_command(site: Path) -> None:
    config = text_of(site / "reference" / "config.html")
    for option in describe_options(SparseIFTConfig):
        assert option.name in config
        assert option.meaning.partition("`")[0] in config
    keys = text_of(site / "reference" / "recipe-keys.html")
    for option in recipe_options():
        section = option.name.partition(".")[0]
        assert option.name in keys or section == "sparse_ift" or "." not in option.name, option.name
    commands = text_of(site / "reference" / "cli.html")
    for name in COMMANDS:
        assert name == "lm-eval" or f"usage: sparseift {name}" in commands
    api = text_of(site / "reference" / "api.html")
    for name in sparseift_llm.__all__:
        assert name in api


def test_notebooks_are_pages_and_downloads(site: Path) -> None:
    sources = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
    assert len(sources) == 2
    for source in sources:
        notebook = json.loads((site / "tutorials" / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
        kinds = [cell["cell_type"] for cell in notebook["cells"]]
        assert kinds[0] == "markdown"
        assert kinds.count("code") >= 5
        page = text_of(site / "tutorials" / f"{source.stem}.html")
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert title in page
        assert code[-1].splitlines()[-1] in page
        assert not (site / "tutorials" / source.name).exists()


def test_what_only_tests_read_is_not_on_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- test:" not in text, page
        assert "<!-- generated:" not in text, page


def test_dead_links_fail_the_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sparseift_llm").symlink_to(ROOT / "sparseift_llm")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs" / "reference" / "cli.md").write_text("# Commands\n", encoding="utf-8")  # slow to generate
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write("\n[no page](guides/nowhere.md), [no heading](families.md#gone)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "guides/nowhere.md" in done.stdout + done.stderr
    assert "#gone" in done.stdout + done.stderr
