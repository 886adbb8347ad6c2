"""What a GPU runs for block-sparse products. The calls that launch it are in triton.py.

Legend: T is the number of tokens, b the side of a tile ("tile"), N the number of stored tiles ("slots"). Tiles are
grouped by block-row, and the numbers of tiles in two block-rows differ by at most one (see topology/blocks.py).
"""

from __future__ import annotations

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    triton = None

HAS_TRITON = triton is not None
if HAS_TRITON:
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

    @triton.jit
    def place_of(program, token_blocks, parts):  # type: ignore[no-untyped-def]
        # Programs that run together should read the same memory. Eight token blocks pass through all parts of the
        # output before the next eight: a tile is read once for eight programs that follow each other, and the rows
        # of eight token blocks stay in the L2 cache while every block-row picks the columns it needs from them.
        group = program // (8 * parts)
        height = tl.minimum(token_blocks - group * 8, 8)
        inside = program % (8 * parts)
        return group * 8 + inside % height, inside // height

    @triton.jit
    def first_slot(row, slots, rows):  # type: ignore[no-untyped-def]
        return (row.to(tl.int64) * slots // rows).to(tl.int32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_product(left, right, total, precision: tl.constexpr):  # type: ignore[no-untyped-def]
        if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        return tl.dot(left, right, total, input_precision=precision)

    @triton.jit  # type: ignore[untyped-decorator]
    def add_tiles(  # type: ignore[no-untyped-def]
        total, source, source_stride, source_tma, weight, weight_tma, others, order, first, count, slots, first_token,
        tokens, first_beside, tile: tl.constexpr, depth: tl.constexpr, transposed: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        """total (token block, part) + the products of `count` tiles from entry `first` on with blocks of the source.

        source_tma, weight_tma: descriptors of both, or None. others: the block of the source that every entry reads.
        order: the slot of every entry, if `transposed`. first_beside: of a tile's output features that are computed.
        """
        token = first_token.to(tl.int64) + tl.arange(0, total.shape[0])
        present = token < tokens
        beside = first_beside + tl.arange(0, total.shape[1])
        stride_along: tl.constexpr = tile if transposed else 1
        stride_beside: tl.constexpr = 1 if transposed else tile
        # One flat loop, which the compiler pipelines: `depth` features are part of a large tile or several small ones.
        # Where the next step reads is looked up one step ahead: were it looked up in its own step, the compiler would
        # spend every second stage on the look-up, and buffer half as many operands. The last look-up is not used.
        ahead = tl.arange(0, depth)
        # a scalar takes fewer registers and copies than a vector of equal numbers, hence the second case
        entry = tl.minimum(first + ahead // tile if tile < depth else first, slots - 1)
        other = tl.load(others + entry, mask=entry >= 0, other=0)  # without tiles there is nothing to look up
        slot = tl.load(order + entry, mask=entry >= 0, other=0) if transposed else entry
        for start in range(0, count * tile, depth):
            inner = start + ahead
            along = inner % tile
            feature = other * tile + along
            row = slot.to(tl.int64) * tile * tile + along * stride_along
            if tile < depth:
                tl.static_assert(source_tma is None, "several small tiles are no rectangle of a matrix")
                active = inner < count * tile
                values = tl.load(
                    source + token[:, None] * source_stride + feature[None, :],
                    mask=present[:, None] & active[None, :], other=0.0,
                )  # fmt: skip
                weights = tl.load(
                    weight + row[:, None] + beside[None, :] * stride_beside, mask=active[:, None], other=0.0
                )
                entry = tl.minimum(first + (inner + depth) // tile, slots - 1)
            else:
                if source_tma is not None:
                    values = source_tma.load([first_token, other * tile + start % tile])
                    if transposed:
                        weights = weight_tma.load([slot * tile + start % tile, first_beside])
                    else:
                        weights = weight_tma.load([slot * tile + first_beside, start % tile]).T
                else:
                    values = tl.load(
                        source + token[:, None] * source_stride + feature[None, :], mask=present[:, None], other=0.0
                    )
                    weights = tl.load(weight + row[:, None] + beside[None, :] * stride_beside)
                entry = tl.minimum(first + (start + depth) // tile, slots - 1)
            other = tl.load(others + entry)
            slot = tl.load(order + entry) if transposed else entry
            total = _add_product(values, weights, total, precision)
        return total

    @triton.jit(  # type: ignore[untyped-decorator]
        do_not_specialize=["tokens", "slots", "rows", "piece_tokens", "token_bucket", "can_describe"]
    )
    def weight_gradient_kernel(  # type: ignore[no-untyped-def]
        grad, grad_stride, x, x_stride, columns, gradient, tokens, slots, rows, piece_tokens, token_bucket,
        can_describe, tile: tl.constexpr, part: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
        paired: tl.constexpr, grad_tma=None, x_tma=None,
    ):  # fmt: skip
        """gradient (pieces, N, b, b) = the tiles of grad.T @ x, each summed over a piece of the tokens.

        A program computes one tile or, if `paired`, two of a block-row, for which `grad` is read once. grad_tma, x_tma:
        descriptors of both, or None.
        """
        # Neighbours in the launch order work on one tile, then on its block-row, and walk through the tokens together:
        # the columns of `grad` that they share, and the same rows of `x`, are in the L2 cache.
        parts: tl.constexpr = tile // part
        tiles: tl.constexpr = 2 if paired else 1
        in_row = tl.cdiv(tl.cdiv(slots, rows), tiles)  # programs of a block-row, of which the last may have no tile
        piece = tl.program_id(0) // (rows * in_row * parts * parts)
        program = tl.program_id(0) % (rows * in_row * parts * parts)
        row = program // (parts * parts) // in_row
        slot = first_slot(row, slots, rows) + program // (parts * parts) % in_row * tiles
        last = first_slot(row + 1, slots, rows) - 1
        if slot <= last:
            first_out, first_beside = (program // parts) % parts * part, program % parts * part
            out, beside = first_out + tl.arange(0, part), first_beside + tl.arange(0, part)
            column = tl.load(columns + slot) * tile
            upstream_at = grad + row * tile + out[:, None]
            values_at = x + column + beside[None, :]
            total = tl.zeros((part, part), tl.float32)
            if paired:
                second_column = tl.load(columns + tl.minimum(slot + 1, last)) * tile
                beside_at = x + second_column + beside[None, :]
                second = tl.zeros((part, part), tl.float32)
            for start in range(piece * piece_tokens, tl.minimum((piece + 1) * piece_tokens, tokens), depth):
                token = start + tl.arange(0, depth).to(tl.int64)
                present = token < tokens
                if grad_tma is not None:
                    upstream = grad_tma.load([start, row * tile + first_out]).T
                    values = x_tma.load([start, column + first_beside])
                else:
                    upstream = tl.load(upstream_at + token[None, :] * grad_stride, mask=present[None, :], other=0.0)
                    values = tl.load(values_at + token[:, None] * x_stride, mask=present[:, None], other=0.0)
                total = _add_product(upstream, values, total, precision)
                if paired:
                    if x_tma is not None:
                        values = x_tma.load([start, second_column + first_beside])
                    else:
                        values = tl.load(beside_at + token[:, None] * x_stride, mask=present[:, None], other=0.0)
                    second = _add_product(upstream, values, second, precision)
            number = piece.to(tl.int64) * slots + slot
            target = gradient + number * tile * tile + out[:, None] * tile + beside[None, :]
            tl.store(target, total.to(gradient.dtype.element_ty))
            if paired:  # noqa: SIM102 - this is known when it is compiled, the other is not
                if slot < last:
                    tl.store(target + tile * tile, second.to(gradient.dtype.element_ty))

    @triton.jit(do_not_specialize=["pieces"])  # type: ignore[untyped-decorator]
    def add_pieces_kernel(partial, total, size, pieces, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """total (size,) = the sum of partial (pieces, size) over its pieces, one after the other."""
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < size
        sums = tl.zeros((block,), tl.float32)
        for _ in range(pieces):
            sums += tl.load(partial + at, mask=inside, other=0.0)
            partial += size
        tl.store(total + at, sums.to(total.dtype.element_ty), mask=inside)
