"""The loss jump: held-out loss of dense models, and of sparse twins that start from their weights, before training.

    OMP_NUM_THREADS=1 python benchmarks/loss_jump.py benchmarks/results/loss_jump.json    # two minutes on one core

Trains a small GPT-2 and a small Llama, whose heads allow a wider residual stream, on the bytes of the built-in corpus
first. Beside each twin stands the one of random projections (`init="preserve"`), which keeps embeddings and norms where
they have their sides.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.data.corpora import Source
from sparseift_llm.data.held_out import hold_out
from sparseift_llm.data.standard_library import builtin_source
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
    "Wide, scope residual": {"scope": "residual"},
    "Wide, scope residual, no reserve": {"scope": "residual", "reserve": 0.0},
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


def dense_config(model_type: str) -> PreTrainedConfig:
    """The config of a dense model over bytes."""
    if model_type == "gpt2":
        return GPT2Config(
            vocab_size=256, n_positions=SEQ_LEN, n_embd=HIDDEN, n_layer=NUM_LAYERS, n_head=NUM_HEADS,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=256, max_position_embeddings=SEQ_LEN, hidden_size=HIDDEN, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS, intermediate_size=HIDDEN * 8 // 3 // TILE * TILE, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip


def model_type_of(options: dict[str, Any]) -> str:
    """Which dense model a family starts from: scope `residual` needs heads whose size is a number of its own."""
    return "llama" if options.get("scope") == "residual" else "gpt2"


def trained_models(num_steps: int) -> tuple[dict[str, PreTrainedModel], Tensor]:
    """The dense models by type, after `num_steps` steps of AdamW with a one-cycle schedule, and held-out bytes."""
    train_source, eval_source = hold_out(builtin_source(), 0.05)
    text, held_out = read_bytes(train_source, NUM_TRAIN_BYTES), read_bytes(eval_source, NUM_EVAL_BYTES)
    models = {model_type: trained_model(dense_config(model_type), text, num_steps) for model_type in ("gpt2", "llama")}
    return models, held_out.view(-1, SEQ_LEN)


def trained_model(config: PreTrainedConfig, text: Tensor, num_steps: int) -> PreTrainedModel:
    """A dense model trained on the bytes of `text`."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    for _ in range(num_steps):
        batch = torch.stack([text[at : at + SEQ_LEN] for at in torch.randint(len(text) - SEQ_LEN, (BATCH,))])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean loss in nats per byte."""
    return float(model(input_ids=tokens, labels=tokens).loss)


def measure(models: dict[str, PreTrainedModel], held_out: Tensor) -> list[dict[str, Any]]:
    """One row per family, sparsity and structure."""
    rows = []
    for family, options in FAMILIES.items():
        model_type = model_type_of(options)
        for sparsity in SPARSITIES:
            for structure, storage in STRUCTURES.items():
                losses = {}
                for key, init in (("start", "pretrained"), ("random", "preserve")):
                    torch.manual_seed(0)
                    own = options if init == "pretrained" else {k: v for k, v in options.items() if k != "reserve"}
                    config = SparseIFTConfig(sparsity=sparsity, init=init, **own, **storage)
                    losses[key] = loss_of(sparsify(models[model_type], config), held_out)
                facts = {"family": family, "model": model_type, "sparsity": sparsity, "structure": structure}
                rows.append({**facts, **losses})
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
    models, held_out = trained_models(NUM_STEPS)
    settings = {"num_steps": NUM_STEPS, "hidden": HIDDEN, "num_layers": NUM_LAYERS, "tile": TILE}
    facts = {"command": f"python benchmarks/loss_jump.py {output}", "machine": machine(), "versions": versions()}
    dense = {model_type: loss_of(model, held_out) for model_type, model in models.items()}
    result = {**settings, "dense": dense, "rows": measure(models, held_out)}
    print(f"dense: {dense}\n{table(result)}")
    write_json(Path(output), {**result, **facts, "commit": commit()})


if __name__ == "__main__":
    main(sys.argv[1])
