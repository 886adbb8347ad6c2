// One block-sparse linear map: y = x W^T + bias, its input gradient, and its weight gradient.

#include "kernels.h"

template <class Kernels, class IO, class Sum>
static void gather(Kernels k, const IO* x, int64_t x_stride, int64_t num_tokens, int64_t in_blocks, const IO* weight,
                   bool transpose, int64_t num_tiles, Map map, int64_t out_blocks, const IO* bias, IO* y, int64_t size) {
    if (transpose && num_tokens <= FEW_TOKENS) {
#pragma omp parallel
        k.gather_few(x, x_stride, num_tokens, weight, map, size, out_blocks, bias, y);
        return;
    }
    const int64_t in_panels = in_blocks * size / k.PANEL, y_stride = out_blocks * size;
    Sum* const weights = scratch<Sum>(WEIGHT, num_tiles * size * size);
    Sum* const input = scratch<Sum>(INPUT, in_panels * k.PANEL_STRIDE);
    ask_for_huge_pages(y, num_tokens * y_stride * int64_t(sizeof(IO)));
#pragma omp parallel
    {
        k.pack_tiles(weight, num_tiles, size, transpose, weights);
        for (int64_t begin = 0; begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, in_panels, input);
            k.gather_chunk(input, weights, map, size, tokens, out_blocks, bias, y + begin * y_stride);
        }
    }
}

template <class Kernels, class IO, class Sum>
static void outer(Kernels k, const IO* grad, int64_t grad_stride, int64_t out_blocks, const IO* x, int64_t x_stride,
                  int64_t in_blocks, int64_t num_tokens, const int32_t* rows, const int32_t* columns, int64_t num_tiles,
                  IO* result, int64_t size) {
    const int64_t parts = size / k.PANEL;
    Sum* const left = scratch<Sum>(GRAD, out_blocks * parts * k.PANEL_STRIDE);
    Sum* const right = scratch<Sum>(INPUT, in_blocks * parts * k.PANEL_STRIDE);
    Totals<IO, Sum> totals(TOTAL, num_tiles * size * size, result);
#pragma omp parallel
    {
        for (int64_t begin = 0; begin == 0 || begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            k.pack_chunk(grad + begin * grad_stride, grad_stride, tokens, out_blocks * parts, left);
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, in_blocks * parts, right);
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < num_tiles; n++)
                k.add_outer(tokens, left + rows[n] * parts * k.PANEL_STRIDE, right + columns[n] * parts * k.PANEL_STRIDE,
                            size, begin > 0, totals.sums + n * size * size);
        }
        totals.store_all();
    }
}

// y = x W^T + bias, or y = x W (the input gradient, with x the gradient of the output).
//
// x          (tokens, in), with any row stride
// weight     the tiles (N, size, size) of W
// transpose  whether tiles are (output, input) of this product, as for x W^T; for x W they are (input, output)
// map        which tiles make a block of y: starts (out / size + 1), sources and tiles (N)
// bias       (out,), or null
// y          (tokens, out), written
EXPORTED int gather(const Array* x, const Array* weight, int64_t transpose, const Array* starts, const Array* sources,
                    const Array* tiles, const Array* bias, const Array* y) {
    return guarded([&] {
        const int64_t size = tile_side(present(weight, "weight"), "weight"), count = weight->shape[0];
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t in_blocks = blocks_of(x, "x", size), out_blocks = blocks_of(y, "y", size);
            const int64_t tokens = x->shape[0], width = out_blocks * size;
            gather<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, tokens, in_blocks,
                memory_of<IO>(weight, "weight", {count, size, size}), transpose != 0, count,
                map_of({starts, sources, tiles}, "map", out_blocks, in_blocks, count), out_blocks,
                memory_if_any<IO>(bias, "bias", {width}), memory_of<IO>(y, "y", {tokens, width}), size);
        });
    });
}

// The tiles of grad^T x.
//
// grad     (tokens, out), with any row stride
// x        (tokens, in), with any row stride
// rows     the block-row of every tile (N,)
// columns  the block-column of every tile (N,)
// result   (N, size, size), written
EXPORTED int outer(const Array* grad, const Array* x, const Array* rows, const Array* columns, const Array* result) {
    return guarded([&] {
        const int64_t size = tile_side(present(result, "result"), "result"), count = result->shape[0];
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t out_blocks = blocks_of(grad, "grad", size), in_blocks = blocks_of(x, "x", size);
            const int64_t tokens = x->shape[0];
            outer<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(grad, "grad", {tokens, out_blocks * size}, true), grad->stride, out_blocks,
                memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, in_blocks, tokens,
                indices_of(rows, "rows", count, out_blocks), indices_of(columns, "columns", count, in_blocks), count,
                memory_of<IO>(result, "result", {count, size, size}), size);
        });
    });
}

// What was wrong with the last call of this thread that returned NO_CODE or WRONG_ARGUMENT.
EXPORTED const char* last_mistake() { return mistake.c_str(); }

// Bytes that all threads keep between calls, and giving them back. No other function here may run meanwhile.
EXPORTED int64_t scratch_bytes() {
    const std::lock_guard<std::mutex> lock(Buffers::mutex);
    return std::accumulate(Buffers::all.begin(), Buffers::all.end(), int64_t(0),
                           [](int64_t sum, const Buffers* kept) { return sum + kept->total(); });
}
EXPORTED void release_scratch() {
    const std::lock_guard<std::mutex> lock(Buffers::mutex);
    for (Buffers* kept : Buffers::all) kept->release();
}
