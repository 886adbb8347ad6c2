"""Helpers of the report page's tests: a strict reader of HTML, and run folders written by hand.

Not a test module.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config

from sparseift_llm import SparseIFTConfig
from sparseift_llm.checkpoints.mask_file import digest, pack
from sparseift_llm.planning.planner import plan_of_dense
from tests.reporting.test_comparison import DATA, SPARSE

VOID = {"meta", "link", "input", "br", "hr", "img"}
LAYERS = {  # name -> (kind, mask shape)
    "transformer.h.0.attn.c_attn": ("qkv", (12, 4)),
    "transformer.h.0.mlp.c_fc": ("mlp_in", (16, 4)),
    "transformer.h.1.attn.c_attn": ("qkv", (12, 4)),
    "transformer.h.1.mlp.c_fc": ("mlp_in", (16, 4)),
}
TILES: dict[str, Any] = {"structure": "block", "block_size": 16}


@functools.cache
def model_config() -> str:
    """config.json of a model that has LAYERS."""
    dense = GPT2Config(n_embd=32, n_layer=2, n_head=2)
    result = plan_of_dense(dense, SparseIFTConfig(targets=("q", "k", "v", "mlp_in"), **TILES))
    result.hf_config.sparse_ift = result.record.to_dict()
    return json.dumps(result.hf_config.to_dict())


@dataclass
class Node:
    """An element; `children` are elements and text in order."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self, tag: str = "", class_: str = "") -> list[Node]:
        """Elements inside, in order, of that tag and class."""
        return [node for node in self._walk() if tag in ("", node.tag) and (not class_ or class_ in node.classes)]

    def by_id(self, name: str) -> Node:
        (found,) = [node for node in self._walk() if node.attributes.get("id") == name]
        return found

    def _walk(self) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child._walk()


class _Reader(HTMLParser):
    """Builds the tree; an end tag that closes another element than the innermost is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> closes itself, which HTML does not know")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    """The tree of a page; wrongly nested or unclosed elements are errors."""
    assert page.startswith("<!DOCTYPE html>")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"not closed: {[node.tag for node in reader.open[1:]]}"
    return reader.root


def table_rows(root: Node, caption: str) -> dict[str, list[list[str]]]:
    """Rows below every heading ("" if there is none) of the one table with a caption."""
    (table,) = [t for t in root.all("table") if t.all("caption")[0].text == caption]
    found: dict[str, list[list[str]]] = {}
    for body in table.all("tbody"):
        rows = body.all("tr")
        name = rows.pop(0).text.strip() if "group" in rows[0].classes else ""
        found[name] = [[cell.text for cell in row.children if isinstance(cell, Node)] for row in rows]
    return found


def drawn_points(chart: Node, classes: set[str]) -> list[tuple[float, float]]:
    """The points of a chart's lines with these classes, read back from the numbers printed along its axes."""
    x_ticks, y_ticks = [], []
    for text in chart.all("text"):
        if "end" in text.classes:
            continue
        value = float(text.text.replace(",", ""))
        if text.attributes["text-anchor"] == "middle":
            x_ticks.append((float(text.attributes["x"].rstrip("%")) * 10, value))
        else:
            y_ticks.append((float(text.attributes["y"].rstrip("%")) * 10, value))
    points = []
    for line in chart.all("polyline"):
        if classes <= set(line.classes):
            pairs = (pair.split(",") for pair in line.attributes["points"].split())
            points += [(_at(float(x), x_ticks), _at(float(y), y_ticks)) for x, y in pairs]
    return points


def _at(place: float, ticks: list[tuple[float, float]]) -> float:
    (first, low), (last, high) = ticks[0], ticks[-1]
    return low + (place - first) * (high - low) / (last - first)


def variables(style: str) -> tuple[dict[str, str], dict[str, str]]:
    """Custom properties of a style sheet for light and for dark pages."""
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)[:2]
    return tuple(dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark))  # type: ignore[return-value]


def log_lines(num: int = 6) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a training step each, held-out losses after every second."""
    lines: list[dict[str, Any]] = []
    for step in range(1, num + 1):
        at = {
            "step": step,
            "train_tokens": 128 * step,
            "train_flops": 7_500_000_001 * step,
            "wall_seconds": 0.37 * step,
        }
        quantities = {
            "loss": 6.0 / step + 0.123456789,
            "grad_norm": 1.5 / step,
            "tokens_per_second": 900.5 + step,
            "sparsity": 0.75,
            "sparsity/qkv": 0.75,
            "exploration": 0.25 + step / 100,
            "exploration/qkv": 0.26 + step / 100,
            "dead_units": 0.0,
        }
        if step > 1:
            quantities |= {"mask_churn": 0.1 / step, "mask_survival": 1 - 0.1 / step}
        lines.append({**at, **quantities})
        if step % 2 == 0:
            lines.append({**at, "eval_loss": 6.5 / step + 0.1})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_masks(folder: Path, seed: int = 0, names: dict[str, Any] = LAYERS) -> dict[str, torch.Tensor]:
    """A mask file with one empty column and one full row in every layer."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < 0.3 for name, (_, shape) in names.items()}
    for mask in masks.values():
        mask[0], mask[:, 0] = True, False
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    header = {"sparseift_masks_v1": json.dumps({"digest": digest(masks), "shapes": shapes})}
    save_file({name: pack(mask) for name, mask in masks.items()}, folder / "sparse_masks.safetensors", metadata=header)
    return masks


def evaluation(value: float = 0.3125) -> dict[str, Any]:
    """A result file of two tasks."""
    tasks = {"pick": ("acc", value, 0.0432, 0.25), "bytes": ("bits_per_byte", 2.34567, None, None)}
    keys = ("metric", "value", "stderr", "chance")
    rows = {
        name: {**dict(zip(keys, values, strict=True)), "num_fewshot": 5, "num_items": 1200}
        for name, values in tasks.items()
    }
    leaves = {name: {"num_fewshot": 5, "version": 1.0, "num_items": 1200, "task_hash": "0"} for name in tasks}
    return {
        "suite": "tiny", "results": rows, "average": value, "averages": {"average": ["pick"]}, "average_of": "value",
        "subtasks": leaves, "model": {"name": "m"}, "versions": {"lm_eval": "0.4.13"},
    }  # fmt: skip


def write_full_run(folder: Path, **changes: Any) -> Path:
    """A finished sparse run with every file that a report reads; `changes` go into its summary."""
    folder.mkdir(parents=True)
    config = {"model": {"name": "gpt3-small"}, "data": DATA, "sparse_ift": {"sparsity": 0.75, **TILES}}
    config["training"] = {"max_steps": 6, "learning_rate": 0.01}
    record = {"machine": {"num_cores": 2}, "versions": {"torch": "2.13.0"}, "commit": "0123456789ab"}
    summary = {**SPARSE, "step": 6, "config": config, **record, **changes}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.json").write_text(json.dumps({**config, "data_fingerprint": "f00"}))
    (folder / "config.json").write_text(model_config())
    (folder / "eval_tiny.json").write_text(json.dumps(evaluation()))
    write_lines(folder / "metrics.jsonl", log_lines())
    layers = [
        {"step": step, "layers": {
            name: {"kind": kind, "sparsity": 0.75, "exploration": 0.25 + step / 50, "churn": 0.1 / step,
                   "survival": None if step < 3 else 1 - 0.1 / step}
            for name, (kind, _) in LAYERS.items()
        }}
        for step in range(1, 7)
    ]  # fmt: skip
    write_lines(folder / "layers.jsonl", layers)
    quantities = {"delta_r": -0.512345678, "delta_r_imdb": None, "lambda": 1.75, "lambda_imsg": 0.625}
    checkpoints = [
        {"step": step, "folder": f"checkpoint-{step}",
         "layers": {name: {"kind": kind, "shape": list(shape), "sparsity": 0.75, "mean_degree_left": 3.5,
                           "mean_degree_right": 1.25, **quantities, "excluded": "delta_r_imdb: no subgraph"}
                    for name, (kind, shape) in LAYERS.items()},
         "model": {**quantities, "delta_r": step / 7, "num_layers": 4, "num_excluded": 4}}
        for step in (2, 4, 6)
    ]  # fmt: skip
    spectral = {"format": "sparseift_spectral_v1", "settings": {}, "checkpoints": checkpoints}
    (folder / "spectral.json").write_text(json.dumps(spectral))
    write_masks(folder)
    return folder
