"""The tables of the study at equal whole-model FLOPs: every row at its best rates, and what its gain is worth."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equal_flops_rows import BY_NAME, ROWS, SEEDS, WEIGHT_DECAY, Baseline, Rates
from scipy import stats

from sparseift_llm.reporting.sweep import difference_interval, t_interval
from sparseift_llm.utils.tables import markdown_table

DENSE_LENGTHS = ("dense-half", "dense", "dense-double")  # their slope says what compute is worth
HEADER = (
    "row",
    "rate, embedding's",
    "FLOPs",
    "held-out loss",
    "95% interval",
    "seeds",
    "gain over dense (95%)",
    "dense FLOPs for this loss",
    "step time",
    "gain at equal time",
)


def loss_of(result: Mapping[str, Any]) -> float:
    """Held-out nats per token, infinite if there is none."""
    loss = result["eval_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def rates_of(result: Mapping[str, Any]) -> Rates:
    """What a run was trained with."""
    return Rates(
        result["rate"],
        result["embedding_factor"],
        result.get("weight_decay", WEIGHT_DECAY),
        result.get("attention_dropout", 0.0),
    )


def times_path(results: Path, baseline: Baseline) -> Path:
    """Where the step times of the rows at a size are kept."""
    return results / f"times-{baseline}.json"


@dataclass(frozen=True)
class Best:
    """A row at its best rates.

    Args:
        rates: the best ones.
        losses: seed -> held-out loss.
        is_inside: whether all neighbours of the best rates were tried.
        train_flops: of the whole training.
    """

    rates: Rates
    losses: Mapping[int, float]
    is_inside: bool
    train_flops: float

    @property
    def mean(self) -> float:
        """Held-out loss, over the seeds."""
        return statistics.mean(self.losses.values())


def best_of(folder: Path) -> Best | None:
    """What the results of one row in `folder` say; None without any.

    The best rates are those with the lowest loss for the first seed. Once several have all `SEEDS`, those compete by
    their means, so that one lucky seed does not decide.
    """
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    losses: dict[Rates, dict[int, float]] = {}
    for result in results:
        losses.setdefault(rates_of(result), {})[result["seed"]] = loss_of(result)
    first = {rates: found[SEEDS[0]] for rates, found in losses.items() if SEEDS[0] in found}
    if not first:
        return None
    repeated = {rates: statistics.mean(found.values()) for rates, found in losses.items() if found.keys() >= set(SEEDS)}
    compared = repeated if len(repeated) > 1 else first
    best = min(compared, key=lambda rates: compared[rates])
    regularises = any(rates.is_regularised for rates in first)
    return Best(
        best,
        losses[best],
        all(rates in first for rates in best.neighbours(regularises)),
        results[0]["train_flops"],
    )


def gain(row: Best, dense: Best) -> str:
    """How much lower the row's mean loss is, with the 95% interval of the difference (Welch's t)."""
    interval = difference_interval(list(dense.losses.values()), list(row.losses.values()))
    return f"{dense.mean - row.mean:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def nats_per_e_fold(found: Mapping[str, Best]) -> float | None:
    """How much the dense model's loss falls when its training FLOPs grow e times: a line through its lengths.

    None if it was trained for one length only.
    """
    lengths = [found[name] for name in DENSE_LENGTHS if name in found]
    if len(lengths) < 2:
        return None
    fit = stats.linregress([math.log(length.train_flops) for length in lengths], [length.mean for length in lengths])
    return -float(fit.slope)


def equal_loss_flops(row: Best, dense: Best, slope: float) -> str:
    """How many times its training FLOPs the dense model would need for the row's loss, by `nats_per_e_fold`."""
    return f"{math.exp((dense.mean - row.mean) / slope):.2f}x"


def equal_time_gain(row: Best, dense: Best, slope: float, time_ratio: float) -> str:
    """How much lower the row's loss is than the dense model's would be after the time that the row takes."""
    return f"{dense.mean - slope * math.log(time_ratio) - row.mean:+.3f}"


def read_times(path: Path) -> dict[str, float]:
    """Row -> its step time over the dense model's; empty if they were not measured."""
    if not path.is_file():
        return {}
    seconds = json.loads(path.read_text("utf-8"))["step_seconds"]
    return {name: seconds[name] / seconds["dense"] for name in seconds}


def rates_cell(best: Best) -> str:
    """The rates, regularisation that is another than the recipe's, and whether better ones may lie outside."""
    words = f"{best.rates.rate:g}, {best.rates.embedding_factor:g}x"
    if best.rates.weight_decay != WEIGHT_DECAY:
        words += f", decay {best.rates.weight_decay:g}"
    if best.rates.attention_dropout:
        words += f", dropout {best.rates.attention_dropout:g}"
    return words if best.is_inside else f"{words} (search not ended)"


def peer_of(name: str, found: Mapping[str, Best]) -> Best | None:
    """The dense model that a row's gain is over: one of as many tokens; "dense" for another dense one."""
    row, usual = BY_NAME[name], (peer for peer in ROWS if peer.sparse is None and peer.shape is None)
    return found.get(next(peer.name for peer in usual if peer.tokens == (row.tokens if row.sparse else 1)))


def table_line(
    name: str, best: Best, found: Mapping[str, Best], slope: float | None, times: Mapping[str, float]
) -> list[Any]:
    """The cells of a row; what needs the dense model, its slope or step times is empty without them."""
    dense, peer = found.get("dense"), peer_of(name, found)
    interval, is_other = t_interval(list(best.losses.values())), dense is not None and best is not dense
    line = [
        BY_NAME[name].title,
        rates_cell(best),
        f"{best.train_flops / dense.train_flops:.4f}" if dense else "",
        f"{best.mean:.4f}",
        f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
        len(best.losses),
        gain(best, peer) if peer and is_other else "",
        equal_loss_flops(best, dense, slope) if dense and is_other and slope else "",
        f"{times[name]:.2f}x" if name in times else "",
        equal_time_gain(best, dense, slope, times[name]) if dense and is_other and slope and name in times else "",
    ]
    assert len(line) == len(HEADER)
    return line


def table(results: Path) -> str:
    """A Markdown table for every corpus and baseline: the rows at their best rates, and their gain over dense."""
    parts = []
    for corpus, baseline in sorted(
        (path.parent.name, Baseline.from_name(path.name)) for path in results.glob("*/width*")
    ):
        folder = results / corpus / str(baseline)
        found = {row.name: best for row in ROWS if (best := best_of(folder / row.name)) is not None}
        slope, times = nats_per_e_fold(found), read_times(times_path(results, baseline))
        lines = [table_line(name, best, found, slope, times) for name, best in found.items()]
        parts.append(f"{corpus}, {baseline.title}\n\n{markdown_table(HEADER, lines, 'llrrlrlrrr')}")
    return "\n\n".join(parts)
