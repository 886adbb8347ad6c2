"""The product kernel: output blocks of a block-sparse product, and what is done to them before they are written.

A feed-forward block does its elementwise work here, while its numbers are in registers: as passes over memory of their
own, activations and their derivatives take as long as half of the products.
"""

from __future__ import annotations

from sparseift_llm.ops.kernels.triton_code import HAS_TRITON

TOKENS_PER_SUM = 64  # of a bias gradient: sums of so many tokens are written, whatever a program computes

if HAS_TRITON:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

    from sparseift_llm.ops.kernels.triton_activations import value_and_slope
    from sparseift_llm.ops.kernels.triton_code import INTERPRETED, add_tiles, first_slot, place_of

    _TOKENS_PER_SUM = tl.constexpr(TOKENS_PER_SUM)

    @triton.jit  # type: ignore[untyped-decorator]
    def _activate(total, result, hidden, gate, at, present, activation: tl.constexpr, fast: tl.constexpr):  # type: ignore[no-untyped-def]
        """result = f(total), or f(gate) * total; hidden = total. f takes what is stored, so that it can be repeated."""
        kind: tl.constexpr = result.dtype.element_ty
        total = total.to(kind)
        if hidden is not None:
            tl.store(hidden + at, total, mask=present)
        if gate is None:
            active, _ = value_and_slope(total.to(tl.float32), activation, fast)
        else:
            active, _ = value_and_slope(tl.load(gate + at, mask=present, other=0.0).to(tl.float32), activation, fast)
            active *= total.to(tl.float32)
        tl.store(result + at, active.to(kind), mask=present)

    @triton.jit  # type: ignore[untyped-decorator]
    def _derive(  # type: ignore[no-untyped-def]
        total, result, hidden, gate, grad_gate, active, sums, gate_sums, at, present, where, width, column, tokens,
        activation: tl.constexpr, fast: tl.constexpr,
    ):  # fmt: skip
        """From total, the gradient of the activation: those of hidden (result) and gate, and the sums of both."""
        kind: tl.constexpr = result.dtype.element_ty
        stored = tl.load(hidden + at, mask=present, other=0.0).to(tl.float32)
        if gate is None:
            value, slope = value_and_slope(stored, activation, fast)
            total *= slope
        else:
            value, slope = value_and_slope(tl.load(gate + at, mask=present, other=0.0).to(tl.float32), activation, fast)
            of_gate = total * stored * slope
            total *= value
            value *= stored
            tl.store(grad_gate + at, of_gate.to(kind), mask=present)
            if gate_sums is not None:
                _store_sums(of_gate, gate_sums, where, width, column, tokens)
        if active is not None:
            tl.store(active + at, value.to(kind), mask=present)
        tl.store(result + at, total.to(kind), mask=present)
        if sums is not None:
            _store_sums(total, sums, where, width, column, tokens)

    @triton.jit
    def _store_sums(values, sums, where, width, column, tokens):  # type: ignore[no-untyped-def]
        """Sums over tokens of values (token block, part), which are 0 after the last token, to sums (., width)."""
        token_block: tl.constexpr = values.shape[0]
        size: tl.constexpr = _TOKENS_PER_SUM if token_block > _TOKENS_PER_SUM else token_block
        number: tl.constexpr = token_block // size
        pieces = tl.sum(tl.reshape(values, (number, size, values.shape[1])), 1)
        piece = where.to(tl.int64) * number + tl.arange(0, number)
        tl.store(sums + piece[:, None] * width + column[None, :], pieces, mask=(piece * size < tokens)[:, None])

    @triton.jit  # type: ignore[untyped-decorator]
    def _finish(  # type: ignore[no-untyped-def]
        total, narrow: tl.constexpr, first, result, hidden, gate, grad_gate, active, sums, gate_sums, token, where,
        width, tokens, transposed: tl.constexpr, activation: tl.constexpr,
    ):  # fmt: skip
        """`_activate` or `_derive` for the columns from `first` on, halved until they are no more than `narrow`."""
        columns: tl.constexpr = total.shape[1]
        if columns > narrow:
            half: tl.constexpr = columns // 2
            left, right = tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, half)), (0, 2, 1)))
            _finish(
                left, narrow, first, result, hidden, gate, grad_gate, active, sums, gate_sums, token, where, width,
                tokens, transposed, activation,
            )  # fmt: skip
            _finish(
                right, narrow, first + half, result, hidden, gate, grad_gate, active, sums, gate_sums, token, where,
                width, tokens, transposed, activation,
            )  # fmt: skip
        else:
            column = first + tl.arange(0, columns)
            at = token[:, None] * width + column[None, :]
            present = (token < tokens)[:, None]
            fast: tl.constexpr = (not INTERPRETED) and result.dtype.element_ty == tl.bfloat16
            if transposed:
                _derive(
                    total, result, hidden, gate, grad_gate, active, sums, gate_sums, at, present, where, width, column,
                    tokens, activation, fast,
                )  # fmt: skip
            else:
                _activate(total, result, hidden, gate, at, present, activation, fast)

    @triton.jit(  # type: ignore[untyped-decorator]
        do_not_specialize=["tokens", "slots", "second_slots", "rows", "blocks", "token_bucket", "can_describe"]
    )
    def product_kernel(  # type: ignore[no-untyped-def]
        source, source_stride, weight, bias, others, order, starts, heavy_first, second, second_stride, second_weight,
        second_others, second_order, second_starts, result, hidden, gate, grad_gate, active, sums, gate_sums,
        tokens, slots, second_slots, rows, blocks, token_bucket, can_describe, tile: tl.constexpr, part: tl.constexpr,
        depth: tl.constexpr, transposed: tl.constexpr, activation: tl.constexpr, precision: tl.constexpr,
        token_block: tl.constexpr, source_tma=None, weight_tma=None, second_tma=None, second_weight_tma=None,
    ):  # fmt: skip
        """result (T, blocks * b) = source times the tiles, which are transposed if `order` and `starts` are given.

        second...: another product of the same shape, transposed, that is added. activation: with a name, `_activate`
        or, if `transposed`, `_derive` computes the result; hidden to gate_sums are theirs. ..._tma: descriptors of the
        operands, or None.
        """
        parts = tile // part
        where, position = place_of(tl.program_id(0), tl.cdiv(tokens, token_block), blocks * parts)
        block = position // parts
        if transposed:
            block = tl.load(heavy_first + block)
            first = tl.load(starts + block)
            count = tl.load(starts + block + 1) - first
        else:
            first = first_slot(block, slots, rows)
            count = first_slot(block + 1, slots, rows) - first
        first_token, first_beside = where * token_block, (position % parts) * part
        total = tl.zeros((token_block, part), tl.float32)
        total = add_tiles(
            total, source, source_stride, source_tma, weight, weight_tma, others, order, first, count, slots,
            first_token, tokens, first_beside, tile, depth, transposed, precision,
        )  # fmt: skip
        if second is not None:
            first = tl.load(second_starts + block)
            total = add_tiles(
                total, second, second_stride, second_tma, second_weight, second_weight_tma, second_others, second_order,
                first, tl.load(second_starts + block + 1) - first, second_slots, first_token, tokens, first_beside,
                tile, depth, transposed, precision,
            )  # fmt: skip
        token = first_token.to(tl.int64) + tl.arange(0, token_block)
        column = block * tile + first_beside + tl.arange(0, part)
        if bias is not None:
            total += tl.load(bias + column).to(tl.float32)[None, :]
        if activation is None:
            target = result + token[:, None] * (blocks * tile) + column[None, :]
            tl.store(target, total.to(result.dtype.element_ty), mask=(token < tokens)[:, None])
        else:
            # A piece of the columns at a time: all at once, a derivative's intermediates would not fit into registers
            narrow: tl.constexpr = (
                (part // 8 if gate is not None else part // 4)
                if transposed or activation == "gelu_erf"  # whose polynomials take many registers, too
                else (part // 2 if gate is not None else part)  # else 4 warps spill
            )
            _finish(
                total, narrow if narrow > 16 else 16, block * tile + first_beside, result, hidden, gate,
                grad_gate, active, sums, gate_sums, token, where, blocks * tile, tokens, transposed, activation,
            )  # fmt: skip
