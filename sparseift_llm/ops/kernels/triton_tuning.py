"""Which configuration the Triton kernels run with: what is tried, for which calls it is tried again, and when not.

A configuration is how many tokens a program computes, in how many warps, with how many operand buffers, and whether
these are filled by TMA (see triton_descriptors.py). It changes the time of a product and no bit of its result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from sparseift_llm.ops.kernels import triton_code, triton_descriptors, triton_product

if triton_code.HAS_TRITON:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]

Sizes = tuple[dict[str, int], int, int]  # of a configuration: what the kernel's arguments are, warps, stages
THIN = 16  # up to so many tokens, as in generation, a product reads weights and little else
_SMALLEST_BUCKET, _LARGEST_BUCKET = 6, 15
_logger = logging.getLogger(__name__)
_tuned_buckets: dict[Hashable, set[int]] = {}


def own_bucket(tokens: int) -> int:
    """Token counts with the same bucket share a configuration; 0 is for thin products, and all from 2**14 on share one.

    >>> [own_bucket(tokens) for tokens in (1, 16, 17, 63, 64, 8192, 16384, 10**6)]
    [0, 0, 6, 6, 7, 14, 15, 15]
    """
    return 0 if tokens <= THIN else min(max(tokens.bit_length(), _SMALLEST_BUCKET), _LARGEST_BUCKET)


def bucket_of(tokens: int, call: Hashable) -> int:
    """The bucket whose configuration a call takes: its own, or a larger one that was tuned for the same kind of call.

    Tuning takes seconds. Training tunes with its first batch; a shorter last batch, and evaluation in between, then run
    with what was found, which fits them nearly as well.

    Args:
        tokens: T.
        call: everything else that the configuration depends on: kernel, device, dtype, shapes.

    Raises:
        RuntimeError: a CUDA graph is being captured and the call would have to be tuned.
    """
    bucket, known = own_bucket(tokens), _tuned_buckets.setdefault(call, set())
    larger = [other for other in known if other >= bucket > 0 or other == bucket]
    if larger:
        return min(larger)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a block-sparse product with {tokens} tokens runs for the first time while a CUDA graph is captured, and "
            "its kernel is not tuned yet; run the same step once, with as many tokens, before capturing it"
        )
    known.add(bucket)
    return bucket


def fitting(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """The configurations for a call: whose accumulators leave registers for operands, and thin ones for few tokens.

    The others spill and compile slowly. Those with TMA are for operands that it can read.
    """
    part = arguments["part"]
    largest = 64 if arguments["weight" if "weight" in arguments else "x"].element_size() == 4 else 128
    found = []
    for config in configs:
        block = config.kwargs.get("token_block")
        tiles = 2 if config.kwargs.get("paired") else 1
        is_for_these = block is None or (block == THIN) == (arguments["token_bucket"] == 0)
        is_for_these &= bool(arguments["can_describe"]) or not config.kwargs.get("tma")
        if is_for_these and (block or part) * part * tiles <= largest * 32 * config.num_warps:
            found.append(config)
    return found


def seconds_of(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Quantiles of a configuration's seconds, as triton measures them; infinite, with a warning, if a launch fails.

    Then another one is taken, where triton would raise. If none can be launched, the one that is taken raises.

    Raises:
        RuntimeError: there is no memory, or the GPU's context is lost, with which every other launch fails, too.
    """
    try:
        found: list[float] = triton.runtime.driver.active.get_benchmarker()(call, quantiles=quantiles)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the context is lost
        _logger.warning("a configuration of a Triton kernel could not be launched and is left out: %s", problem)
        return [math.inf for _ in quantiles]
    return found


def _tuned(
    kernel: Any,
    key: list[str],
    configs: list[Sizes],
    descriptors: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
    """The kernel with the best of `configs` (sizes, warps, stages), of which the interpreter takes the first."""
    configs = configs[:1] if triton_code.INTERPRETED else configs
    tuner: Callable[[Any], Any] = triton.autotune(
        [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in configs],
        [*key, "token_bucket", "can_describe", "tile", "part", "precision", "slots"],
        prune_configs_by={"early_config_prune": fitting},
        do_bench=seconds_of,
        cache_results=True,
    )
    return tuner(triton_descriptors.Described(kernel, descriptors))


def with_tma(configs: list[Sizes]) -> list[Sizes]:
    """Those with 8 warps, with TMA: they are for many tokens, and every one that is tried takes time."""
    return [({**sizes, "tma": 1}, warps, stages) for sizes, warps, stages in configs if warps == 8]


if triton_code.HAS_TRITON:
    # With 3 stages, two programs of 128 tokens and 8 warps share a multiprocessor of a Hopper GPU; with 4, or 256
    # tokens, there is one. A thin product waits for memory alone, so it has many loads under way.
    PRODUCT_CONFIGS = [
        ({"token_block": block}, warps, stages)
        for block, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
        for stages in (3, 4)
    ]
    THIN_CONFIGS = [({"token_block": THIN}, warps, stages) for warps, stages in ((4, 4), (2, 5), (4, 6))]
    # Two tiles in one program read a quarter less, and leave room for no second program.
    WEIGHT_GRADIENT_CONFIGS = [
        ({"paired": paired}, warps, stages)
        for paired, warps, stages in ((0, 4, 3), (0, 4, 4), (0, 2, 4), (0, 8, 3), (1, 8, 3), (1, 8, 4))
    ]
    product = _tuned(
        triton_product.product_kernel,
        ["transposed", "activation", "blocks"],
        [*PRODUCT_CONFIGS, *with_tma(PRODUCT_CONFIGS), *THIN_CONFIGS],
        triton_descriptors.of_product,
    )
    weight_gradient = _tuned(
        triton_code.weight_gradient_kernel,
        [],
        [*WEIGHT_GRADIENT_CONFIGS, *with_tma(WEIGHT_GRADIENT_CONFIGS)],
        triton_descriptors.of_weight_gradient,
    )


def use_one_configuration(index: int) -> None:
    """Take one configuration of each kernel instead of tuning, so that several processes compile one each.

    Args:
        index: of a configuration; a kernel that has fewer of them starts again with its first.
    """
    for kernel in (product, weight_gradient):
        kernel.configs = [kernel.configs[index % len(kernel.configs)]]
