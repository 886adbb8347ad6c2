"""2:4 products on torch's semi-structured kernels: checked against float64, then timed beside dense products.

    python benchmarks/semi_structured.py            # less than a minute on an NVIDIA GPU; prints one JSON
    python benchmarks/semi_structured.py --dry      # on a CPU: the masks alone, without a product

Masks are 2:4 along both sides, so that the gradient of the input is computed on the kernels, too. Shapes are those of
GPT-3 Small's FFN, 16,384 tokens in bfloat16: each projection as it is in the dense model, and the
wider one that takes its place at 50% zeros with as many multiply-adds (Wide, scope `ffn`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config

from sparseift_llm import SparseIFTConfig, sparsify, to_dense, to_semi_structured, use_semi_structured_kernels
from sparseift_llm.bench.measure import queued_seconds
from sparseift_llm.ops.masked_weight import masked_weight
from sparseift_llm.ops.semi_structured import PATTERN, check_device, compress, compressed_linear, semi_structured_linear
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.masks import random_scores
from sparseift_llm.topology.transposable import TransposableBlocks
from sparseift_llm.utils.provenance import commit, machine, versions

TOKENS, CALLS, WARM_UP = 16384, 30, 5
SHAPES = {"up": (3072, 768), "down": (768, 3072), "wide up": (6144, 768), "wide down": (768, 6144)}  # (out, in)
DRY_SHAPES = {"up": (192, 64), "down": (64, 192)}
TOLERANCE = 1e-2  # of the norm of the difference; rounding an output to bfloat16 alone makes 2e-3


def mask_of(shape: tuple[int, int], seed: int) -> Tensor:
    """A random mask (out, in) that is 2:4 along both sides, after one exchange of 30%; it is checked to be one."""
    n, m = PATTERN
    groups = TransposableBlocks(n, m)
    mask = groups.first_mask(torch.Size(shape), shape[0] * shape[1] * n // m, seed)
    importance, growth = random_scores(torch.Size(shape), seed + 1), random_scores(torch.Size(shape), seed + 2)
    changed = drop_and_grow(mask, importance, growth, groups.num_exchanged(mask, importance, 0.3, 0.0), groups)
    if not all(bool((side.reshape(-1, m).sum(1) == n).all()) for side in (changed, changed.T)):
        raise SystemExit(f"a mask of {shape} is not {n}:{m} along both sides")
    if torch.equal(changed, mask):
        raise SystemExit(f"the exchange changed nothing in a mask of {shape}")
    return changed


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the float64 reference."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def errors_of(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, gradient: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients of the training product, and of the output for inference.

    The gradient of the input is computed on the kernels, too.
    """
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.linear(*wide)
    expected.backward(gradient.double())
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = semi_structured_linear(leaves[0], masked_weight(leaves[1], mask), leaves[2], transposable=True)
    y.backward(gradient)
    references = [tensor.grad for tensor in wide]
    assert references[1] is not None
    references[1] = references[1] * mask
    errors = {
        "output": relative_error(y, expected),
        "inference": relative_error(inference(x, weight, bias)(), expected),
    }
    for name, leaf, reference in zip(("input", "weight", "bias"), leaves, references, strict=True):
        assert leaf.grad is not None
        assert reference is not None
        errors[f"{name} gradient"] = relative_error(leaf.grad, reference)
    return errors


def inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """The product with a weight that was compressed before."""
    compressed = compress(weight)
    return lambda: compressed_linear(x, compressed, bias)


def measure(name: str, shape: tuple[int, int], device: str) -> dict[str, Any]:
    """Errors, and median seconds of every product of one projection."""
    rows, columns = shape
    mask = mask_of(shape, seed=len(name)).to(device)

    def normal(*sides: int) -> Tensor:
        return torch.randn(*sides, device=device, dtype=torch.bfloat16)

    x, gradient, bias = normal(TOKENS, columns), normal(TOKENS, rows), 0.1 * normal(rows)
    weight = (normal(rows, columns) * (2 / columns) ** 0.5).masked_fill(~mask, 0)  # so that outputs are about 1
    errors = errors_of(x, weight, bias, mask, gradient)
    if worst := [f"{key} {value:.1e}" for key, value in errors.items() if not value < TOLERANCE]:
        raise SystemExit(f"{name} is wrong against float64: {', '.join(worst)}")
    runs: dict[str, Callable[[], Any]] = {
        "dense output": lambda: F.linear(x, weight, bias),
        "2:4 output, compressed before": inference(x, weight, bias),
        "2:4 output with compression": lambda: semi_structured_linear(x, weight, bias),
        "compression": lambda: compress(weight),
        "dense input gradient": lambda: gradient @ weight,
        "2:4 input gradient, compressed before": inference(gradient, weight.T, None),
        "2:4 input gradient with compression": lambda: compressed_linear(gradient, compress(weight.T), None),
        "dense weight gradient": lambda: gradient.T @ x,
    }
    seconds = {}
    for key, run in runs.items():
        queued_seconds([run] * WARM_UP, device)
        seconds[key] = statistics.median(queued_seconds([run] * CALLS, device))
    ratios = {
        "dense over 2:4": seconds["dense output"] / seconds["2:4 output, compressed before"],
        "dense over 2:4, input gradient": seconds["dense input gradient"]
        / seconds["2:4 input gradient with compression"],
    }
    return {"shape": shape, "tokens": TOKENS, "relative_errors": errors, "seconds": seconds, **ratios}


def check_model(device: str, transposable: bool) -> dict[str, float]:
    """Relative errors of a small 2:4 GPT-2 in bfloat16 against float64: dense with its zeros, and on the kernels.

    Raises:
        SystemExit: on the kernels it is more than twice as far off as dense.
    """
    dense = GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=1024, n_positions=128)
    config = SparseIFTConfig(structure="2:4", transposable=transposable, width_multiple=16)
    model = sparsify(dense, config).eval().to(device, torch.bfloat16)
    tokens = torch.randint(dense.vocab_size, (2, 128), device=device)

    def logits_and_gradient(which: Any) -> tuple[Tensor, Tensor]:
        which.zero_grad()
        output = which(input_ids=tokens, labels=tokens)
        output.loss.backward()
        return output.logits.detach(), which.transformer.h[0].attn.c_attn.weight.grad.clone()

    mask = model.transformer.h[0].attn.c_attn.mask
    logits, gradient = logits_and_gradient(to_dense(model).double())
    references, found = (logits, gradient * mask), {"dense": logits_and_gradient(model)}
    use_semi_structured_kernels(model)
    found["training"] = logits_and_gradient(model)
    with torch.no_grad():
        inference_logits = to_semi_structured(model)(input_ids=tokens).logits
    errors = {
        f"{key} {what}": relative_error(one, reference)
        for key, pair in found.items()
        for what, one, reference in zip(("logits", "gradient"), pair, references, strict=True)
    }
    errors["inference logits"] = relative_error(inference_logits, logits)
    for key in ("training logits", "training gradient", "inference logits"):
        if not errors[key] < 2 * errors[f"dense {key.split()[1]}"]:
            raise SystemExit(f"a model on the kernels is wrong against float64: {errors}")
    return errors


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="make and check masks alone, on a CPU")
    arguments = parser.parse_args(words)
    torch.manual_seed(0)
    if arguments.dry:
        active = {name: float(mask_of(shape, seed=0).double().mean()) for name, shape in DRY_SHAPES.items()}
        print(json.dumps({"device": "cpu, masks alone", "density": active}))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(torch.device(device), torch.bfloat16)
    except ValueError as problem:
        print(f"{problem}; --dry tests the masks of this program", file=sys.stderr)
        return 2
    rows = {}
    for name, shape in SHAPES.items():
        rows[name] = measure(name, shape, device)
        print(json.dumps({name: rows[name]}), file=sys.stderr)  # not lost if a later check fails
    errors = {name: check_model(device, name == "transposable") for name in ("2:4", "transposable")}
    wide = {name: rows[name]["seconds"]["dense output"] for name in ("up", "down")}
    pays = {n: wide[n] / rows[f"wide {n}"]["seconds"]["2:4 output, compressed before"] for n in wide}
    found = {"device": torch.cuda.get_device_name(), "model_errors": errors, "rows": rows}
    found["dense twin over wide 2:4"] = pays
    print(json.dumps({**found, "machine": machine(), "versions": versions(), "commit": commit()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
