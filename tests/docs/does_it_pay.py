"""README's table of what is gained and what it costs, made from result files: no figure without a run.

    python -m tests.docs.does_it_pay

writes it between the two marks in README.md; test_readme.py fails when it is out of date.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from sparseift_llm.reporting.sweep import difference_interval
from sparseift_llm.utils.tables import markdown_table
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MAX_ROWS = 8
BETWEEN = re.compile(r"(?<=<!-- does it pay -->\n).*?(?=\n<!-- end -->)", re.DOTALL)
HEADER = ("sparse model", "held-out loss, dense → sparse", "FLOPs", "step time")
CORPORA = ("novels", "builtin")
# Rows of benchmarks/equal_flops_rows.py. Where a search of rates did not end, docs/results.md says so.
TITLES = {
    "ffn2": "`scope: ffn`, 50%",
    "residual2-embedding": "`scope: residual`, 50%, dense embedding",
    "model": "`scope: model`, 75%, at equal FLOPs",
}
NAMES = {"llama": (), "starcoder2": ("StarCoder2",)}  # a Llama needs no name
# Architecture and row, the largest gain first.
ROWS = (("starcoder2", "residual2-embedding"), *(("llama", name) for name in ("residual2-embedding", "ffn2", "model")))


def table() -> str:
    """The table, at most MAX_ROWS rows: equal whole-model FLOPs first, where there are results."""
    rows = [*equal_flops(), *study(), *timings()]
    return markdown_table(HEADER, rows[:MAX_ROWS], "lrrr")


def equal_flops() -> Iterator[tuple[str, str, str, str]]:
    """Rows at equal whole-model FLOPs with three seeds, of each corpus and architecture the widest that have them."""
    tables = load_script("benchmarks/equal_flops_table.py")
    for corpus in CORPORA:
        baselines = [tables.Baseline.from_name(path.name) for path in (RESULTS / "equal_flops" / corpus).glob("width*")]
        widest_first = sorted(baselines, key=lambda dense: (-dense.width, dense.layers))
        for architecture, name in ROWS:
            alike = [dense for dense in widest_first if dense.architecture == architecture]
            found = (_row_over(tables, corpus, dense, name) for dense in alike)
            yield from itertools.islice(filter(None, found), 1)


def _row_over(tables: Any, corpus: str, baseline: Any, name: str) -> tuple[str, str, str, str] | None:
    """The row `name` beside the dense model that it is compared with; None unless both have three seeds."""
    folder = RESULTS / "equal_flops" / corpus / str(baseline)
    ours, dense = tables.best_of(folder / name), tables.best_of(folder / "dense")
    if ours is None or dense is None or min(len(ours.losses), len(dense.losses)) < 3:
        return None
    times = tables.read_times(tables.times_path(RESULTS / "equal_flops", baseline))
    low, high = difference_interval(list(dense.losses.values()), list(ours.losses.values())) or (0, 0)
    what = ", ".join((TITLES[name], corpus, *NAMES[baseline.architecture])) + (
        " (within noise)" if low <= 0 <= high else ""
    )
    return _row(what, (dense.mean, ours.mean), ours.train_flops / dense.train_flops, times.get(name))


def study() -> Iterator[tuple[str, str, str, str]]:
    """Static masks of the study of tiles, means of three seeds; RigL with the scope that keeps the model's FLOPs."""
    seconds = _read(RESULTS / "quality_study" / "tiles" / "times.json")["step_seconds"]
    dense = [_summary("tiles", f"dense{seed}-lr0.008") for seed in ("", "-seed1", "-seed2")]
    for title, name in (("`scope: model`, single weights", "mask"), ("`scope: model`, tiles, 8 per side", "tile32")):
        ours = [_summary("tiles", f"{name}-static{seed}-lr0.008") for seed in ("", "-seed1", "-seed2")]
        yield _row(
            title, (_loss(dense), _loss(ours)), _flops(ours, dense), seconds[f"{name}-static"] / seconds["dense"]
        )
    ours, dense = _best("wide-scope-ffn"), _best("dense")
    seconds = _read(RESULTS / "quality_study" / "families" / "times.json")["step_seconds"]
    ratio = seconds["wide-scope-ffn"] / seconds["dense"]
    yield _row("`scope: ffn`, tiles of 16, RigL", (_loss([dense]), _loss([ours])), _flops([ours], [dense]), ratio)


def timings() -> Iterator[tuple[str, str, str, str]]:
    """The time of a step with large tiles; no loss was measured there."""
    (row,) = _read(RESULTS / "bench" / "step_cpu.json")["rows"]
    yield (f"`scope: ffn`, tiles of {row['tile']}", "not measured", "1.00x", f"{row['ratio_block']:.2f}x")


def _row(title: str, losses: tuple[float, float], flops: float, time: float | None) -> tuple[str, str, str, str]:
    said = "not measured" if time is None else f"{time:.2f}x"
    return title, f"{losses[0]:.3f} → {losses[1]:.3f}", f"{flops:.2f}x", said


def _best(name: str) -> dict[str, Any]:
    paths = sorted((RESULTS / "quality_study" / "families").glob(f"{name}-lr*.json"))
    return min((_read(path) for path in paths), key=lambda summary: float(summary["eval_loss"]))


def _summary(study: str, name: str) -> dict[str, Any]:
    return _read(RESULTS / "quality_study" / study / f"{name}.json")


def _loss(summaries: Iterable[dict[str, Any]]) -> float:
    return mean(summary["eval_loss"] for summary in summaries)


def _flops(ours: list[dict[str, Any]], dense: list[dict[str, Any]]) -> float:
    key = "forward_flops_per_token"
    return float(ours[0][key] / dense[0][key])


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


if __name__ == "__main__":
    README.write_text(BETWEEN.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
