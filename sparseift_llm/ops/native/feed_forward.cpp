// y = gelu(x U^T + bias) D^T + bias with block-sparse U and D.
//
// The widened activation exists for CHUNK tokens at a time, in cache. The backward pass computes it again, where it
// would have to read it back from memory otherwise.

#include "kernels.h"

// The tiles of one of the two weights, as stored.
template <class IO>
struct Tiles {
    const IO* weight;
    int64_t count;
};

template <class Kernels, class IO, class Sum>
static void feed_forward_few(Kernels k, const IO* x, int64_t x_stride, int64_t num_tokens, const IO* up,
                             const IO* up_bias, Map up_rows, int64_t hidden_blocks, const IO* down, const IO* down_bias,
                             Map down_rows, int64_t out_blocks, IO* y, int64_t size) {
    typedef typename Kernels::Vector Vector;
    const int64_t features = hidden_blocks * size;
    Sum* const hidden = scratch<Sum>(HIDDEN, num_tokens * features);
#pragma omp parallel
    {
        k.gather_few(x, x_stride, num_tokens, up, up_rows, size, hidden_blocks, up_bias, hidden);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_tokens * features; i += k.LANES) {
            const Vector h = *(const Vector*)(hidden + i);
            *(Vector*)(hidden + i) = h * k.gelu_sigmoid(h);
        }
        k.gather_few(hidden, features, num_tokens, down, down_rows, size, out_blocks, down_bias, y);
    }
}

template <class Kernels, class IO, class Sum>
static void feed_forward(Kernels k, const IO* x, int64_t x_stride, int64_t num_tokens, int64_t in_blocks,
                         Tiles<IO> up, const IO* up_bias, Map up_rows, int64_t hidden_blocks, Tiles<IO> down,
                         const IO* down_bias, Map down_rows, int64_t out_blocks, IO* y, int64_t size) {
    typedef typename Kernels::Vector Vector;
    if (num_tokens <= FEW_TOKENS)
        return feed_forward_few<Kernels, IO, Sum>(k, x, x_stride, num_tokens, up.weight, up_bias, up_rows, hidden_blocks,
                                                  down.weight, down_bias, down_rows, out_blocks, y, size);
    const int64_t parts = size / k.PANEL, hidden_panels = hidden_blocks * parts;
    Sum* const weights = scratch<Sum>(WEIGHT, (up.count + down.count) * size * size);
    Sum* const down_weights = weights + up.count * size * size;
    Sum* const input = scratch<Sum>(INPUT, in_blocks * parts * k.PANEL_STRIDE);
    Sum* const hidden = scratch<Sum>(HIDDEN, hidden_panels * k.PANEL_STRIDE);
#pragma omp parallel
    {
        k.pack_tiles(up.weight, up.count, size, true, weights);
        k.pack_tiles(down.weight, down.count, size, true, down_weights);
        for (int64_t begin = 0; begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            const int64_t subs = (tokens + SUB_CHUNK - 1) / SUB_CHUNK;
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, in_blocks * parts, input);
#pragma omp for collapse(2) schedule(dynamic, 4)
            for (int64_t sub = 0; sub < subs; sub++)
                for (int64_t q = 0; q < hidden_panels; q++) {
                    const int64_t first = sub * SUB_CHUNK;
                    k.panel(input, weights, up_rows, size, q, first, std::min(SUB_CHUNK, tokens - first),
                            [&](int64_t token, int64_t, const Sum* sums) {
                                Sum* const to = hidden + q * k.PANEL_STRIDE + token * k.PANEL;
                                for (int64_t i = 0; i < k.ROWS * k.PANEL; i += k.LANES) {
                                    Vector h = *(const Vector*)(sums + i);
                                    if (up_bias) h += k.widen(up_bias + q * k.PANEL + i % k.PANEL);
                                    *(Vector*)(to + i) = h * k.gelu_sigmoid(h);
                                }
                            });
                }
            k.gather_chunk(hidden, down_weights, down_rows, size, tokens, out_blocks, down_bias,
                           y + begin * out_blocks * size);
        }
    }
}

// The four gradients, one hidden block of a chunk at a time: the activation of the block, its gradient, and the tiles
// of both weights that touch it.
template <class Kernels, class IO, class Sum>
static void feed_forward_gradient(Kernels k, const IO* grad, int64_t grad_stride, const IO* x, int64_t x_stride,
                                  int64_t num_tokens, int64_t in_blocks, Tiles<IO> up, const IO* up_bias, Map up_rows,
                                  Map up_columns, int64_t hidden_blocks, Tiles<IO> down, Map down_columns,
                                  int64_t out_blocks, IO* grad_x, IO* grad_up, IO* grad_bias, IO* grad_down,
                                  int64_t size) {
    typedef typename Kernels::Vector Vector;
    const int64_t parts = size / k.PANEL, area = size * size, stride = parts * k.PANEL_STRIDE;
    Sum* const up_forward = scratch<Sum>(WEIGHT, (2 * up.count + down.count) * area);
    Sum* const up_backward = up_forward + up.count * area;
    Sum* const down_backward = up_backward + up.count * area;
    Sum* const input = scratch<Sum>(INPUT, in_blocks * stride);
    Sum* const output_grad = scratch<Sum>(GRAD, out_blocks * stride);
    Sum* const hidden_grad = scratch<Sum>(HIDDEN_GRAD, hidden_blocks * stride);
    const Totals<IO, Sum> up_totals(TOTAL_UP, grad_up ? up.count * area : 0, grad_up);
    const Totals<IO, Sum> down_totals(TOTAL, grad_down ? down.count * area : 0, grad_down);
    const Totals<IO, Sum> bias_totals(TOTAL_BIAS, grad_bias ? hidden_blocks * size : 0, grad_bias);
#pragma omp parallel
    {
        Sum* const hidden = scratch<Sum>(HIDDEN, stride);
        k.pack_tiles(up.weight, up.count, size, true, up_forward);
        k.pack_tiles(up.weight, up.count, size, false, up_backward);
        k.pack_tiles(down.weight, down.count, size, false, down_backward);
        for (int64_t begin = 0; begin == 0 || begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            const bool add = begin > 0;
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, in_blocks * parts, input);
            k.pack_chunk(grad + begin * grad_stride, grad_stride, tokens, out_blocks * parts, output_grad);
#pragma omp for schedule(dynamic, 1)
            for (int64_t block = 0; block < hidden_blocks; block++) {
                Sum* const block_grad = hidden_grad + block * stride;
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t q = block * parts + part;
                    Sum* const h_panel = hidden + part * k.PANEL_STRIDE;
                    Sum* const grad_panel = block_grad + part * k.PANEL_STRIDE;
                    for (int64_t first = 0; first < tokens; first += SUB_CHUNK) {
                        const int64_t count = std::min(SUB_CHUNK, tokens - first);
                        k.panel(input, up_forward, up_rows, size, q, first, count,
                                [&](int64_t token, int64_t, const Sum* sums) {
                                    for (int64_t i = 0; i < k.ROWS * k.PANEL; i += k.LANES) {
                                        Vector h = *(const Vector*)(sums + i);
                                        if (up_bias) h += k.widen(up_bias + q * k.PANEL + i % k.PANEL);
                                        *(Vector*)(h_panel + token * k.PANEL + i) = h;
                                    }
                                });
                        k.panel(output_grad, down_backward, down_columns, size, q, first, count,
                                [&](int64_t token, int64_t, const Sum* sums) {
                                    for (int64_t i = token * k.PANEL; i < (token + k.ROWS) * k.PANEL; i += k.LANES) {
                                        const Vector h = *(const Vector*)(h_panel + i), s = k.gelu_sigmoid(h);
                                        const Vector g = *(const Vector*)(sums + i - token * k.PANEL);
                                        *(Vector*)(grad_panel + i) = g * k.gelu_derivative(h, s);
                                        *(Vector*)(h_panel + i) = h * s;
                                    }
                                });
                    }
                    if (grad_bias) k.add_columns(tokens, grad_panel, add, bias_totals.sums + q * k.PANEL);
                }
                if (grad_up)
                    for (int32_t e = up_rows.starts[block]; e < up_rows.starts[block + 1]; e++)
                        k.add_outer(tokens, block_grad, input + up_rows.sources[e] * stride, size, add,
                                    up_totals.sums + up_rows.tiles[e] * area);
                if (grad_down)
                    for (int32_t e = down_columns.starts[block]; e < down_columns.starts[block + 1]; e++)
                        k.add_outer(tokens, output_grad + down_columns.sources[e] * stride, hidden, size, add,
                                    down_totals.sums + down_columns.tiles[e] * area);
            }
            if (grad_x)
                k.gather_chunk(hidden_grad, up_backward, up_columns, size, tokens, in_blocks, nullptr,
                               grad_x + begin * in_blocks * size);
        }
        if (grad_up) up_totals.store_all();
        if (grad_down) down_totals.store_all();
        if (grad_bias) bias_totals.store_all();
    }
}

// y = gelu(x U^T + up_bias) D^T + down_bias.
//
// x          (tokens, in), with any row stride
// up         the tiles (N, size, size) of U (hidden, in), each (out, in)
// up_bias    (hidden,), or null
// up_...     which tiles make a block of the hidden activation: starts (hidden / size + 1), sources and tiles (N)
// down       the tiles (M, size, size) of D (out, hidden), each (out, in)
// down_bias  (out,), or null
// down_...   which tiles make a block of y: starts (out / size + 1), sources and tiles (M)
// y          (tokens, out), written
EXPORTED int feed_forward(const Array* x, const Array* up, const Array* up_bias, const Array* up_starts,
                          const Array* up_sources, const Array* up_tiles, const Array* down, const Array* down_bias,
                          const Array* down_starts, const Array* down_sources, const Array* down_tiles,
                          const Array* y) {
    return guarded([&] {
        const int64_t size = tile_side(present(up, "up"), "up"), up_count = up->shape[0];
        const int64_t down_count = present(down, "down").shape[0];
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t in_blocks = blocks_of(x, "x", size), out_blocks = blocks_of(y, "y", size);
            const int64_t hidden_blocks = present(up_starts, "up_starts").shape[0] - 1, tokens = x->shape[0];
            feed_forward<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, tokens, in_blocks,
                {memory_of<IO>(up, "up", {up_count, size, size}), up_count},
                memory_if_any<IO>(up_bias, "up_bias", {hidden_blocks * size}),
                map_of({up_starts, up_sources, up_tiles}, "up's map", hidden_blocks, in_blocks, up_count),
                hidden_blocks, {memory_of<IO>(down, "down", {down_count, size, size}), down_count},
                memory_if_any<IO>(down_bias, "down_bias", {out_blocks * size}),
                map_of({down_starts, down_sources, down_tiles}, "down's map", out_blocks, hidden_blocks, down_count),
                out_blocks, memory_of<IO>(y, "y", {tokens, out_blocks * size}), size);
        });
    });
}

// The gradients of x, up, up_bias and down.
//
// grad          (tokens, out), with any row stride: the gradient of y
// x             (tokens, in), with any row stride
// up, up_bias   as of feed_forward
// row_...       as up_... of feed_forward
// column_...    which tiles of U make a block of the gradient of x: starts (in / size + 1), sources and tiles (N)
// down          as of feed_forward
// down_...      which tiles of D make a block of the gradient of the hidden activation: starts (hidden / size + 1),
//               sources and tiles (M)
// grad_x        (tokens, in), written; or null
// grad_up       (N, size, size), written; or null
// grad_bias     (hidden,), written; or null
// grad_down     (M, size, size), written; or null
EXPORTED int feed_forward_gradient(const Array* grad, const Array* x, const Array* up, const Array* up_bias,
                                   const Array* row_starts, const Array* row_sources, const Array* row_tiles,
                                   const Array* column_starts, const Array* column_sources, const Array* column_tiles,
                                   const Array* down, const Array* down_starts, const Array* down_sources,
                                   const Array* down_tiles, const Array* grad_x, const Array* grad_up,
                                   const Array* grad_bias, const Array* grad_down) {
    return guarded([&] {
        const int64_t size = tile_side(present(up, "up"), "up"), up_count = up->shape[0];
        const int64_t down_count = present(down, "down").shape[0];
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t in_blocks = blocks_of(x, "x", size), out_blocks = blocks_of(grad, "grad", size);
            const int64_t hidden_blocks = present(row_starts, "row_starts").shape[0] - 1, tokens = x->shape[0];
            feed_forward_gradient<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(grad, "grad", {tokens, out_blocks * size}, true), grad->stride,
                memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, tokens, in_blocks,
                {memory_of<IO>(up, "up", {up_count, size, size}), up_count},
                memory_if_any<IO>(up_bias, "up_bias", {hidden_blocks * size}),
                map_of({row_starts, row_sources, row_tiles}, "up's map by rows", hidden_blocks, in_blocks, up_count),
                map_of({column_starts, column_sources, column_tiles}, "up's map by columns", in_blocks, hidden_blocks,
                       up_count),
                hidden_blocks, {memory_of<IO>(down, "down", {down_count, size, size}), down_count},
                map_of({down_starts, down_sources, down_tiles}, "down's map", hidden_blocks, out_blocks, down_count),
                out_blocks, memory_if_any<IO>(grad_x, "grad_x", {tokens, in_blocks * size}),
                memory_if_any<IO>(grad_up, "grad_up", {up_count, size, size}),
                memory_if_any<IO>(grad_bias, "grad_bias", {hidden_blocks * size}),
                memory_if_any<IO>(grad_down, "grad_down", {down_count, size, size}), size);
        });
    });
}
