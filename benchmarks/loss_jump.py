"""The loss jump: held-out loss of a dense GPT-2, and of its sparse twins that start from its weights, before training.

    OMP_NUM_THREADS=1 python benchmarks/loss_jump.py benchmarks/results/loss_jump.json    # a minute on one core

Trains a small dense model on the bytes of the built-in corpus first. Beside each twin stands the one of random
projections (`init="preserve"`), which keeps embeddings and norms.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.data.corpora import Source, builtin_source
from sparseift_llm.data.held_out import hold_out
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

HIDDEN, NUM_LAYERS, NUM_HEADS, SEQ_LEN, TILE = 64, 2, 4, 64, 8
NUM_STEPS, BATCH, LEARNING_RATE = 1000, 16, 4e-3
NUM_TRAIN_BYTES, NUM_EVAL_BYTES = 4_000_000, 128 * SEQ_LEN
FAMILIES: dict[str, dict[str, Any]] = {
    "Parallel, no non-linearity": {"family": "parallel", "nonlinearity": "none"},
    "Factorized": {"family": "factorized"},
    "Factorized, V dense": {"family": "factorized", "sparse_u_only": True},
    "Doped": {"family": "doped"},
    "Wide, scope ffn": {"scope": "ffn"},
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "unstructured": {},
    f"tiles of {TILE}": {"structure": "block", "block_size": TILE},
}
SPARSITIES = (0.5, 0.75)


def read_bytes(source: Source, number: int) -> Tensor:
    """The first bytes of a source's documents."""
    text = "\n".join(islice(source.documents(), 1000)).encode()
    return torch.frombuffer(bytearray(text[:number]), dtype=torch.uint8).long()


def trained_model(num_steps: int) -> tuple[PreTrainedModel, Tensor]:
    """A dense model after `num_steps` steps of AdamW with a one-cycle schedule, and held-out bytes (N, SEQ_LEN)."""
    train_source, eval_source = hold_out(builtin_source(), 0.05)
    text, held_out = read_bytes(train_source, NUM_TRAIN_BYTES), read_bytes(eval_source, NUM_EVAL_BYTES)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=SEQ_LEN, n_embd=HIDDEN, n_layer=NUM_LAYERS, n_head=NUM_HEADS,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    for _ in range(num_steps):
        batch = torch.stack([text[at : at + SEQ_LEN] for at in torch.randint(len(text) - SEQ_LEN, (BATCH,))])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), held_out.view(-1, SEQ_LEN)


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean loss in nats per byte."""
    return float(model(input_ids=tokens, labels=tokens).loss)


def measure(model: PreTrainedModel, held_out: Tensor) -> list[dict[str, Any]]:
    """One row per family, sparsity and structure."""
    rows = []
    for family, options in FAMILIES.items():
        for sparsity in SPARSITIES:
            for structure, storage in STRUCTURES.items():
                losses = {}
                for key, init in (("start", "pretrained"), ("random", "preserve")):
                    torch.manual_seed(0)
                    twin = sparsify(model, SparseIFTConfig(sparsity=sparsity, init=init, **options, **storage))
                    losses[key] = loss_of(twin, held_out)
                rows.append({"family": family, "sparsity": sparsity, "structure": structure, **losses})
    return rows


def table(result: dict[str, Any]) -> str:
    """Held-out loss at step 0 as a Markdown table: from the dense weights, and in brackets with random projections."""
    columns = [(sparsity, structure) for sparsity in SPARSITIES for structure in STRUCTURES]
    losses = {(row["family"], (row["sparsity"], row["structure"])): row for row in result["rows"]}
    header = ["family", *(f"{sparsity:.0%}, {structure}" for sparsity, structure in columns)]
    lines = []
    for family in FAMILIES:
        cells = [losses[family, column] for column in columns]
        lines.append([family, *(f"{row['start']:.3f} ({row['random']:.2f})" for row in cells)])
    return markdown_table(header, lines, "l" + "r" * len(columns))


def main(output: str) -> None:
    """Train, measure, print the table and write the results."""
    model, held_out = trained_model(NUM_STEPS)
    settings = {"num_steps": NUM_STEPS, "hidden": HIDDEN, "num_layers": NUM_LAYERS, "tile": TILE}
    facts = {"command": f"python benchmarks/loss_jump.py {output}", "machine": machine(), "versions": versions()}
    result = {**settings, "dense": loss_of(model, held_out), "rows": measure(model, held_out)}
    print(f"dense: {result['dense']:.3f}\n{table(result)}")
    write_json(Path(output), {**result, **facts, "commit": commit()})


if __name__ == "__main__":
    main(sys.argv[1])
