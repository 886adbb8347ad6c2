"""The project's documentation as text, for tests that hold it to the code and to result files. No tests stand here."""

from tests.helpers.paths import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
"""Path from the project's folder -> text, of README.md and of every page in docs/."""

ALL_TEXT = "\n".join(" ".join(text.split()) for text in PAGES.values())
"""All pages, a line for each, so that a sentence is found wherever its lines break; tables are found in PAGES."""
