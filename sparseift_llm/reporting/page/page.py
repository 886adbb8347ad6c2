"""The page: all sections in order, put into the template, written as one file that needs nothing else.

A content security policy in the page forbids everything but the page's own style and script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import sparseift_llm
from sparseift_llm.reporting.page import curves, evaluations, layer_maps, overview, settings
from sparseift_llm.reporting.page.charts import MARKERS, marker_of, style_class
from sparseift_llm.reporting.page.runs import Run, read_runs
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.outputs import refuse_foreign, user_path

_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_BEGINNING = (
    r"<!DOCTYPE html>\s*<html [^>]*>\s*<head>\s*(<meta [^>]*>\s*)+<title>Training runs: "  # also of older pages
)
_NOT_IN_HTML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "\ufffd")


def write_report(folders: Sequence[str | Path], path: str | Path) -> list[Run]:
    """Write a page about training runs, whatever state they are in.

    Args:
        folders: output folders of recipes/pretrain.py, or of a Trainer, which may lack some pieces.
        path: the file to write, new or an older page; its folder is made.

    Returns:
        The runs as they were read.

    Raises:
        ValueError: a run's path is not a folder, one is given twice, no run can be read, or `path` is a folder or a
            file that is not such a page.
    """
    path = user_path(path)
    if path.is_dir():
        raise ValueError(f"--output must be a file such as report.html, got the folder {path}")
    refuse_foreign([path], _BEGINNING, "sparseift report")
    runs = read_runs(folders)
    page = render(runs).translate(_NOT_IN_HTML).encode("utf-8", errors="replace")
    with written_whole(path) as temporary:
        temporary.write_bytes(page)
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return _ENVIRONMENT.get_template("page.html.jinja").render(
        **_sections(runs),
        version=sparseift_llm.__version__,
        markers=list(enumerate(MARKERS)),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def _sections(runs: Sequence[Run]) -> dict[str, Any]:
    loss = curves.loss_figure(runs)
    headline, same = overview.headline_table(runs)
    return {
        "runs": runs,
        "styles": [(run.name, style_class(index), marker_of(index)) for index, run in enumerate(runs)],
        "cards": overview.cards(runs),
        "line": overview.comparison_line(runs),
        "headline": headline,
        "same": same,
        "warnings": overview.comparison_warnings(runs),
        "loss": loss,
        "x_axes": curves.drawn_axes(loss),
        "spans": [(name, words) for name, *_, words in curves.SPANS],
        "degrees": layer_maps.degree_figures(runs),
        "masks": curves.multiples("masks", "Masks along training", runs, curves.MASK_QUANTITIES),
        "by_kind": curves.by_kind_table(runs),
        "evolution": layer_maps.evolution_figures(runs),
        "spectral": curves.multiples(
            "spectral",
            "Spectral quantities of the whole model",
            runs,
            curves.SPECTRAL_QUANTITIES,
            curves.spectral_lines,
        ),
        "spectral_layers": layer_maps.spectral_figures(runs),
        "training": curves.multiples("training", "Speed and gradients", runs, curves.TRAINING_QUANTITIES),
        "evaluations": evaluations.evaluation_tables(runs),
        "evaluation_differences": evaluations.difference_tables(runs),
        "differences": settings.difference_table(runs),
        "settings": settings.setting_tables(runs),
        "notes": overview.notes(runs),
    }


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
