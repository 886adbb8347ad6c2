// One block-sparse linear map: y = x W^T + bias, its input gradient, and its weight gradient.
// The arguments are explained where they are passed, in kernels/native.py.

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

#define FOR_TYPE(NAME, IO, SUM)                                                                                      \
    EXPORTED int gather_##NAME(const IO* x, int64_t x_stride, int64_t num_tokens, int64_t in_blocks,                 \
                                 const IO* weight, int64_t transpose, int64_t num_tiles, const int32_t* starts,      \
                                 const int32_t* sources, const int32_t* tiles, int64_t out_blocks, const IO* bias,   \
                                 IO* y, int64_t size) {                                                              \
        return with_kernels<IO, SUM>(size, [&](auto kernels) {                                                       \
            gather<decltype(kernels), IO, SUM>(kernels, x, x_stride, num_tokens, in_blocks, weight, transpose != 0,  \
                                               num_tiles, {starts, sources, tiles}, out_blocks, bias, y, size);      \
        });                                                                                                          \
    }                                                                                                                \
    EXPORTED int outer_##NAME(const IO* grad, int64_t grad_stride, int64_t out_blocks, const IO* x,                  \
                                int64_t x_stride, int64_t in_blocks, int64_t num_tokens, const int32_t* rows,        \
                                const int32_t* columns, int64_t num_tiles, IO* result, int64_t size) {               \
        return with_kernels<IO, SUM>(size, [&](auto kernels) {                                                       \
            outer<decltype(kernels), IO, SUM>(kernels, grad, grad_stride, out_blocks, x, x_stride, in_blocks,        \
                                              num_tokens, rows, columns, num_tiles, result, size);                   \
        });                                                                                                          \
    }
FOR_TYPE(float32, float, float)
FOR_TYPE(float64, double, double)
FOR_TYPE(bfloat16, bfloat16, float)

// Bytes that all threads keep between calls, and giving them back; while no other function here runs.
EXPORTED int64_t scratch_bytes() {
    const std::lock_guard<std::mutex> lock(Buffers::mutex);
    return std::accumulate(Buffers::all.begin(), Buffers::all.end(), int64_t(0),
                           [](int64_t sum, const Buffers* kept) { return sum + kept->total(); });
}
EXPORTED void release_scratch() {
    const std::lock_guard<std::mutex> lock(Buffers::mutex);
    for (Buffers* kept : Buffers::all) kept->release();
}
