"""docs/support.md, made from the `support` marks of the tests: no row without a test that proves it.

    python -m tests.docs.support_matrix

collects the tests and writes the file; test_support_matrix.py fails when it is out of date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "support.md"
FIXTURES = ("every_structure", "either_structure", "structure")
FAMILIES = ("Parallel", "Factorized", "Doped")
COLUMNS = ("Wide, masks", "Wide, tiles", *FAMILIES)
# what a test on one of the structures of tiny models proves: columns, and whether of masks or of tiles
PROVES: dict[str, tuple[tuple[str, ...], str]] = {
    "unstructured": (COLUMNS[:1], "masks"),
    "block": (COLUMNS[1:2], "tiles"),
    "families": (FAMILIES, "masks"),
    "family_tiles": (FAMILIES, "tiles"),
}
GROUPS = {
    "Several processes": (
        "DistributedDataParallel",
        "DDP: no_sync",
        "DDP: find_unused_parameters, layers that some ranks do not use",
        "DDP: static_graph",
        "DDP: gradient_as_bucket_view",
        "DDP: join at uneven data",
        "DDP: float32, autocast, compressed gradients: same masks on all ranks",
        "FSDP2: fully_shard",
        "FSDP2: shards of another dimension",
        "FSDP2: four ranks, hybrid shards",
        "FSDP2: gradient accumulation without sync, activation checkpointing",
        "FSDP2: mixed-precision policy",
        "FSDP2: full state dicts",
        "FSDP2: sharded state dicts",
        "FSDP2: two ranks' shards on one and four ranks",
        "FSDP2: grown_state and drop_by",
        "FSDP2: Trainer, full and sharded checkpoints",
        "FSDP2: accelerate",
        "FSDP2: accelerate, cpu_ram_efficient_loading",
        "FSDP2: from_pretrained(distributed_config=...)",
        "FSDP1, tensor parallelism",
        "DeepSpeed ZeRO stages 1 to 3 (tests skip where it is not installed)",
        "DeepSpeed in the Trainer, DeepSpeed without ZeRO",
        "torch.nn.DataParallel",
        "masks that differ between ranks",
        "two ranks' checkpoint on one and four ranks",
        "SIGKILL of a rank, then resuming",
    ),
    "Training features": (
        "gradient accumulation",
        "bfloat16 and float16 autocast",
        "bfloat16 weights",
        "GradScaler, skipped steps",
        "activation checkpointing, reentrant or not",
        "torch.compile of the model",
        "torch.compile of the Trainer",
        "tied embeddings",
        "frozen layers",
        "several parameter groups",
        "fused and foreach optimizers",
        "capturable AdamW",
        "capturable AdamW, unfused, in eager steps on a CPU",
        "8-bit and paged optimizers (bitsandbytes, torchao)",
        "max_grad_norm=0",
        "averaged models (EMA), with controller.follow",
        "optimizers inside others (Lookahead, SAM, ScheduleFree)",
        "second-order optimizers (AdaHessian, Sophia, Hessian-vector products)",
        "several forward passes in one loss (R-Drop, contrastive, distillation)",
        "LayerDrop: layers that a step does not use keep their masks",
        "drop_by: saliency",
        "grown_state: how grown weights begin under Adam",
        "keep_connected: no input unread, no output unfed",
        "hyperparameter search",
        "PEFT adapters (LoRA) on top",
        "PEFT adapters (LoRA) on to_dense(model), where non-linearities allow it",
    ),
    "Checkpoints": (
        "saving and loading a trained model",
        "resuming bit for bit in one process",
        "damaged mask files",
        "checkpoints pieced together from two steps",
        "2,000 steps, an update every 10",
    ),
    "n:m masks": (
        "n:m masks: n of every m over updates, on one rank and on two",
        "n:m masks: FSDP2 on two ranks, with the masks of one process",
        "n:m masks: DeepSpeed ZeRO-2 (the test skips where it is not installed)",
        "n:m masks: torch.compile, on stand-ins of the semi-structured kernels, too",
        "n:m masks: outputs and gradients",
        "n:m masks: transposable, n of every m along both sides",
        "n:m masks: transposable with an m above 4",
        "n:m masks: static, SET and RigL, resuming bit for bit in a Trainer",
        "n:m masks: saving, loading, exporting",
        "n:m masks: gmp, granet, erk, whole_model, balance_heads, init: pretrained of a wider stream",
        "n:m masks: semi-structured kernels on a CPU, in float32, for another pattern or sides",
    ),
    "Wide, scope residual": (
        "model types with a head size of their own (39)",
        "GPT-2, GPT-NeoX, OPT and others, whose attention follows the hidden size",
        "outputs and gradients, tied and untied",
        "a wider stream: mask updates, also at the ends",
        "a wider stream: saving, loading, exporting",
        "a wider stream: resuming bit for bit in a Trainer",
        "a wider stream: DistributedDataParallel and FSDP2 on two ranks",
        "a wider stream: resize_token_embeddings",
        "a wider stream: resize_token_embeddings with tiles at the ends",
    ),
    "Models": (
        "decoders of self-attention and MLP in Linear or Conv1D, found by paths and shapes",
        "experts, encoder-decoders, recurrent, convolutional and multimodal models",
        "balance_heads",
        "fused q, k, v: each keeps its active weights",
        "fused q, k, v in an unknown order of rows, where masks change",
    ),
}
FOLD = '<details markdown="1"><summary>The tests behind these rows</summary>'
HEAD = """# What is supported

Made by `python -m tests.docs.support_matrix` from the tests that prove it; do not edit. **yes**: a test shows that it
works; **refused**: a test shows that it is an error (damage: that it is noticed); **-**: not tested. The tests run on
CPU processes with gloo. A column of a family is both unstructured and in tiles; where one of them is not
tested, the cell says which one is. Parallel, Factorized and Doped are mixed in one model, which the tests run on.
"""


@dataclass
class Row:
    """One feature: how it fares by column and storage, and the tests that say so."""

    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    tests: dict[str, None] = field(default_factory=dict)

    def cell(self, column: str) -> str:
        """What stands in the table."""
        found = {storage: value for (name, storage), value in self.cells.items() if name == column}
        both = column in FAMILIES
        if not found:
            return "-"
        if len(set(found.values())) > 1:
            return ", ".join(f"{storage} {value}" for storage, value in sorted(found.items()))
        value, *_ = found.values()
        return value if not both or len(found) == 2 else f"{value} ({', '.join(found)})"


class Collector:
    """A pytest plugin that reads the marks of collected tests."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("support"):
                self.add(item, *mark.args, **mark.kwargs)

    def add(self, item: Any, name: str, refused: bool = False, proves: tuple[str, ...] = ("unstructured",)) -> None:
        """Args as of the mark; `proves` names the structures of a test that has no parameter for them."""
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        found = [parameters[fixture] for fixture in FIXTURES if fixture in parameters]
        row = self.rows.setdefault(name, Row())
        row.tests[item.nodeid.partition("[")[0]] = None
        for structure in found or proves:
            columns, storage = PROVES[structure]
            if "variant" in parameters:  # test_families.py: one family at a time
                columns = (parameters["variant"].replace(",", "").split()[0].capitalize(),)
            for column in columns:
                cell = "refused" if refused else "yes"
                if row.cells.setdefault((column, storage), cell) != cell:
                    raise ValueError(f"{name}, {column}: both yes and refused")


def page(rows: dict[str, Row]) -> str:
    """The whole file.

    Raises:
        ValueError: a marked row is not in GROUPS, or a row in GROUPS has no test.
    """
    # Imported here, because pytest's plugins must be imported by pytest first, and the package imports one of them.
    from sparseift_llm.utils.tables import markdown_table

    expected = [name for names in GROUPS.values() for name in names]
    if different := sorted(set(expected) ^ set(rows)):
        raise ValueError(f"in GROUPS or in the tests' marks, but not in both: {different}")
    lines = [HEAD]
    for title, names in GROUPS.items():
        cells = [(name, *(rows[name].cell(column) for column in COLUMNS)) for name in names]
        tests = [(name, ", ".join(f"`{test}`" for test in rows[name].tests)) for name in names]
        table = markdown_table(("feature", *COLUMNS), cells, "l" * (1 + len(COLUMNS)))
        lines += [f"## {title}", "", table, ""]
        lines += [FOLD, "", markdown_table(("feature", "tests"), tests, "ll"), "", "</details>", ""]
    return "\n".join(lines)


def collect() -> dict[str, Row]:
    """The marks of all tests in files that have any; nothing is run."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.support(" in path.read_text())
    collector = Collector()
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *map(str, files)]
    if pytest.main(arguments, plugins=[collector]) != pytest.ExitCode.OK:
        raise SystemExit("the tests could not be collected")
    return collector.rows


if __name__ == "__main__":
    text = page(collect())
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
