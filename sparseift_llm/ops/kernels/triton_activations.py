"""Activations and their derivatives, as a GPU computes them at the end of a product, in float32.

The same functions in torch are in ops/activations.py.
"""

from __future__ import annotations

from sparseift_llm.ops.kernels.triton_code import HAS_TRITON

if HAS_TRITON:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator]
    def _sigmoid(x, fast: tl.constexpr):  # type: ignore[no-untyped-def]
        if fast:
            # One instruction, where an exponential and a division take many registers. It is off by 2**-12, an eighth
            # of what bfloat16 is rounded by.
            return 0.5 + 0.5 * tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit  # type: ignore[untyped-decorator]
    def value_and_slope(h, name: tl.constexpr, fast: tl.constexpr):  # type: ignore[no-untyped-def]
        """f(h) and f'(h). The compiler drops the one that is not used. nan stays nan."""
        if name == "gelu_tanh":  # 0.5 (1 + tanh(u)) is the sigmoid of 2u
            square = tl.minimum(h * h, 4096.0)  # beyond 64 the sigmoid is 0 or 1, and powers would overflow
            s = _sigmoid(h * (1.5957691216057308 + 0.07135481627159862 * square), fast)
            slope = s + h * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881479586 * square)
            value = h * s
        elif name == "gelu_erf":
            cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
            slope = cdf + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
            value = h * cdf
        elif name == "silu":
            s = _sigmoid(h, fast)
            slope = s + h * s * (1.0 - s)
            value = h * s
        elif name == "relu":
            slope = tl.where(h <= 0.0, 0.0, 1.0)
            value = tl.where(h <= 0.0, 0.0, h)
        else:
            tl.static_assert(name == "relu_squared")
            positive = tl.where(h <= 0.0, 0.0, h)
            slope = 2.0 * positive
            value = positive * positive
        return value, slope
