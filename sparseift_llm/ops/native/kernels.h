// The parts of which products of a block-sparse matrix with dense activations are made, for the machine at hand.
//
// CHUNK tokens at a time are copied into panels that are PANEL columns wide, so that the inner loop reads memory in
// order, whatever the strides outside. Up to FEW_TOKENS tokens are multiplied with the tiles as they are stored. Sums
// are float, or double for double. For a given number of tokens every sum has one fixed order, whatever the number of
// threads.
//
// All threads of a team call a function whose name ends in `_chunk`. The barrier at its end makes its result visible
// to all of them.
#pragma once

#define EXPORTED extern "C" __attribute__((visibility("default")))  // everything else is hidden

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "arguments.h"
#include "scratch.h"

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, NUM_SUMS = 24, MAX_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, NUM_SUMS = 12, MAX_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, NUM_SUMS = 24, MAX_VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 16, NUM_SUMS = 12, MAX_VECTORS = 2;
#endif
constexpr int64_t SUB_CHUNK = 240, CHUNK = 480;  // tokens; multiples of every number of rows below
constexpr int64_t PACKED_ROWS = 8;               // tokens that a thread copies at a time
constexpr int64_t WEIGHT_BYTES_IN_L1 = 32768;
constexpr int64_t PREFETCH_WIDTH = 48;  // columns of the input that are asked for before they are multiplied
constexpr int64_t FEW_TOKENS = 12;  // with no more, packing the tiles would take longer than multiplying them

static inline float load(float value) { return value; }
static inline double load(double value) { return value; }
static inline float load(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static inline void store(float value, float* to) { *to = value; }
static inline void store(double value, double* to) { *to = value; }
static inline void store(float value, bfloat16* to) {  // round to nearest even; nan stays nan
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = uint16_t(is_nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where sums are kept until they are complete: in the result itself, or in scratch memory if the result is narrower.
template <class IO, class Sum>
struct Totals {
    Sum* sums;
    IO* result;
    int64_t count;
    Totals(Purpose purpose, int64_t count, IO* result) : result(result), count(count) {
        if constexpr (std::is_same_v<IO, Sum>) sums = result;
        else sums = scratch<Sum>(purpose, count);
        ask_for_huge_pages(result, count * int64_t(sizeof(IO)));
    }
    void store_all() const {
        if constexpr (!std::is_same_v<IO, Sum>) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) store(sums[i], result + i);
        }
    }
};

template <class IO, class Sum, int BYTES, int VECTORS>
struct Kernels {
    typedef IO Element;
    typedef Sum Total;
    typedef Sum Vector __attribute__((vector_size(BYTES), aligned(sizeof(Sum)), may_alias));
    static constexpr int LANES = BYTES / sizeof(Sum), PANEL = VECTORS * LANES, ROWS = NUM_SUMS / VECTORS;
    static constexpr int64_t GROUP = std::max<int64_t>(1, WEIGHT_BYTES_IN_L1 / int64_t(sizeof(Sum) * PANEL * PANEL));
    static constexpr int64_t AHEAD = (PREFETCH_WIDTH + PANEL - 1) / PANEL;

    // Loops over sums have to be unrolled whatever their length: registers have no index. A compiler that is not told
    // stops at 16 and keeps sums in memory.
#define UNROLLED _Pragma("GCC unroll 32")

    // sums[m] += sum over k of a[m * A_ROW + k * A_STEP] * b[k * PANEL + ...]. Every product in this library is summed here.
    template <int NUM_ROWS, int64_t A_ROW, int64_t A_STEP>
    static inline void multiply(int64_t count, const Sum* a, const Sum* b, Vector (&sums)[NUM_ROWS][VECTORS]) {
        for (int64_t k = 0; k < count; k++) {
            Vector right[VECTORS];
            for (int v = 0; v < VECTORS; v++) right[v] = *(const Vector*)(b + k * PANEL + v * LANES);
            UNROLLED
            for (int m = 0; m < NUM_ROWS; m++)
                for (int v = 0; v < VECTORS; v++) sums[m][v] += a[m * A_ROW + k * A_STEP] * right[v];
        }
    }

    template <int NUM_ROWS>
    static inline void keep(const Vector (&sums)[NUM_ROWS][VECTORS], Sum* to, bool add) {
        UNROLLED
        for (int m = 0; m < NUM_ROWS; m++)
            for (int v = 0; v < VECTORS; v++) {
                Vector* target = (Vector*)(to + m * PANEL + v * LANES);
                *target = add ? *target + sums[m][v] : sums[m][v];
            }
    }

    // Ask for ROWS rows of a panel. Which panel comes next depends on the tiles, and no processor guesses it.
    static inline void prefetch(const Sum* rows) {
        UNROLLED
        for (int64_t i = 0; i < ROWS * PANEL; i += 64 / int64_t(sizeof(Sum))) __builtin_prefetch(rows + i);
    }

    template <class From>
    static inline Vector widen(const From* from) {
        Vector x;
        for (int lane = 0; lane < LANES; lane++) x[lane] = load(from[lane]);
        return x;
    }

    // Panels of a chunk lie this far apart. Rows are computed ROWS at a time, so up to ROWS - 1 follow the last token.
    static constexpr int64_t PANEL_STRIDE = (CHUNK + ROWS) * PANEL;

    // Copy `tokens` rows to panels[panel][token][PANEL], reading each row in order. Rows of zeros fill up the last
    // ROWS: what lay there before could be denormal numbers, with which a product takes many times as long.
    static void pack_chunk(const IO* chunk, int64_t stride, int64_t tokens, int64_t num_panels, Sum* panels) {
        const int64_t padded = (tokens + ROWS - 1) / ROWS * ROWS;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < padded; first += PACKED_ROWS)
            for (int64_t p = 0; p < num_panels; p++)
                for (int64_t t = first; t < std::min(first + PACKED_ROWS, padded); t++)
                    for (int j = 0; j < PANEL; j += LANES)
                        *(Vector*)(panels + p * PANEL_STRIDE + t * PANEL + j) =
                            t < tokens ? widen(chunk + t * stride + p * PANEL + j) : Vector{};
    }

    // Copy rows of a panel out to memory whose rows are `stride` apart, and `tokens` of them back in. Behind the last
    // one follow zeros, as in pack_chunk.
    static inline void write_rows(const Sum* panel, int64_t rows, IO* to, int64_t stride) {
        for (int64_t t = 0; t < rows; t++)
            for (int j = 0; j < PANEL; j++) store(panel[t * PANEL + j], to + t * stride + j);
    }
    static inline void read_rows(const IO* from, int64_t stride, int64_t tokens, Sum* panel) {
        for (int64_t t = 0; t < (tokens + ROWS - 1) / ROWS * ROWS; t++)
            for (int j = 0; j < PANEL; j += LANES)
                *(Vector*)(panel + t * PANEL + j) = t < tokens ? widen(from + t * stride + j) : Vector{};
    }

    // y = x W^T + bias for at most FEW_TOKENS tokens, from tiles as they are stored. All threads of a team call it.
    template <class From, class To>
    static void gather_few(const From* x, int64_t stride, int64_t tokens, const IO* weight, const Map& map, int64_t size,
                           int64_t out_blocks, const IO* bias, To* y) {
#pragma omp for schedule(static)
        for (int64_t first = 0; first < out_blocks * size; first += 4)
            for (int64_t t = 0; t < tokens;) {
                Sum sums[4][4];
                const int64_t count = std::min<int64_t>(4, tokens - t);  // which read the tiles once
                const From* const rows = x + t * stride;
                if (count == 4) dot_products<4>(rows, stride, weight, map, size, first, sums);
                else if (count == 3) dot_products<3>(rows, stride, weight, map, size, first, sums);
                else if (count == 2) dot_products<2>(rows, stride, weight, map, size, first, sums);
                else dot_products<1>(rows, stride, weight, map, size, first, sums);
                for (int64_t m = 0; m < count; m++, t++)
                    for (int i = 0; i < 4; i++)
                        store(sums[m][i] + (bias ? load(bias[first + i]) : 0), y + t * out_blocks * size + first + i);
            }
    }

    // sums[m][i] = output first + i of row m of x, for i below 4. The side of a tile is a multiple of 4.
    template <int NUM_ROWS, class From>
    static inline void dot_products(const From* x, int64_t stride, const IO* weight, const Map& map, int64_t size,
                                    int64_t first, Sum (&sums)[4][4]) {
        Vector local[NUM_ROWS][4] = {};
        for (int64_t e = map.starts[first / size]; e < map.starts[first / size + 1]; e++) {
            const IO* const rows = weight + (map.tiles[e] * size + first % size) * size;
            const From* const block = x + map.sources[e] * size;
            for (int64_t k = 0; k < size; k += LANES) {
                Vector right[4];
                for (int i = 0; i < 4; i++) right[i] = widen(rows + i * size + k);
                for (int m = 0; m < NUM_ROWS; m++) {
                    const Vector left = widen(block + m * stride + k);
                    for (int i = 0; i < 4; i++) local[m][i] += left * right[i];
                }
            }
        }
        for (int m = 0; m < NUM_ROWS; m++)
            for (int i = 0; i < 4; i++) {
                Sum sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += local[m][i][lane];
                sums[m][i] = sum;
            }
    }

    // Copy all tiles of a weight to packed[tile][panel of outputs][input][PANEL].
    static void pack_tiles(const IO* weight, int64_t num_tiles, int64_t size, bool transpose, Sum* packed) {
        const int64_t by_output = transpose ? size : 1, by_input = transpose ? 1 : size;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < num_tiles; n++) {
            const IO* tile = weight + n * size * size;
            Sum* to = packed + n * size * size;
            for (int64_t first = 0; first < size; first += PANEL)
                for (int64_t k = 0; k < size; k++)
                    for (int j = 0; j < PANEL; j++)
                        to[first * size + k * PANEL + j] = load(tile[(first + j) * by_output + k * by_input]);
        }
    }

    // Output panel q of a product for tokens first to first + count - 1. emit(token, rows, sums) gets the sums of ROWS
    // rows at a time. The first `rows` of them are tokens; the others only fill up.
    template <class Emit>
    static inline void panel(const Sum* input, const Sum* weights, const Map& map, int64_t size, int64_t q, int64_t first,
                             int64_t count, Emit emit) {
        Sum* const sums = scratch<Sum>(SUMS, (SUB_CHUNK + ROWS) * PANEL);
        const int64_t parts = size / PANEL, block = q / parts, part = q % parts, entry = map.starts[block];
        const int64_t steps = (map.starts[block + 1] - entry) * parts;
        const Sum *left[GROUP], *right[GROUP];
        for (int64_t g = 0; g == 0 || g < steps; g += GROUP) {
            const int64_t length = std::min(GROUP, steps - g);
            for (int64_t e = 0; e < length; e++) {
                const int64_t slot = entry + (g + e) / parts, k = (g + e) % parts;
                left[e] = input + (map.sources[slot] * parts + k) * PANEL_STRIDE + first * PANEL;
                right[e] = weights + (map.tiles[slot] * size + part * PANEL) * size + k * PANEL * PANEL;
            }
            for (int64_t m = 0; m < count; m += ROWS) {
                Vector local[ROWS][VECTORS] = {};
                for (int64_t e = 0; e < length; e++) {
                    const int64_t next = e + AHEAD;
                    if (next < length) prefetch(left[next] + m * PANEL);
                    else if (next < 2 * length) prefetch(left[next - length] + (m + ROWS) * PANEL);
                    multiply<ROWS, PANEL, 1>(PANEL, left[e] + m * PANEL, right[e], local);
                }
                keep<ROWS>(local, sums + m * PANEL, g > 0);
                if (g + GROUP >= steps) emit(first + m, std::min<int64_t>(ROWS, count - m), sums + m * PANEL);
            }
        }
    }

    // y = the product for a whole chunk, plus bias.
    static void gather_chunk(const Sum* input, const Sum* weights, const Map& map, int64_t size, int64_t tokens,
                             int64_t out_blocks, const IO* bias, IO* y) {
        const int64_t panels = out_blocks * (size / PANEL), stride = out_blocks * size;
        const int64_t subs = (tokens + SUB_CHUNK - 1) / SUB_CHUNK;
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (int64_t sub = 0; sub < subs; sub++)
            for (int64_t q = 0; q < panels; q++) {
                const int64_t first = sub * SUB_CHUNK;
                const IO* const shift = bias ? bias + q * PANEL : nullptr;
                panel(input, weights, map, size, q, first, std::min(SUB_CHUNK, tokens - first),
                      [&](int64_t token, int64_t rows, const Sum* sums) {
                          IO* const to = y + token * stride + q * PANEL;
                          for (int64_t t = 0; t < rows; t++)
                              for (int j = 0; j < PANEL; j++)
                                  store(sums[t * PANEL + j] + (shift ? load(shift[j]) : 0), to + t * stride + j);
                      });
            }
    }

    // columns (PANEL,) = the sum of a panel over tokens, added to what `columns` holds if `add`.
    static inline void add_columns(int64_t tokens, const Sum* panel, bool add, Sum* columns) {
        for (int j = 0; j < PANEL; j += LANES) {
            Vector sum = add ? *(const Vector*)(columns + j) : Vector{};
            for (int64_t t = 0; t < tokens; t++) sum += *(const Vector*)(panel + t * PANEL + j);
            *(Vector*)(columns + j) = sum;
        }
    }

    // tile (size, size) = sum over tokens of a[t][i] * b[t][j], added to what `tile` holds if `add`. a and b are the
    // panels of the two blocks.
    static inline void add_outer(int64_t tokens, const Sum* a, const Sum* b, int64_t size, bool add, Sum* tile) {
        Sum* const sums = scratch<Sum>(SUMS, (SUB_CHUNK + ROWS) * PANEL);
        for (int64_t q = 0; q < size / PANEL; q++)
            for (int64_t p = 0; p < size / PANEL; p++) {
                transposed_product(tokens, a + q * PANEL_STRIDE, b + p * PANEL_STRIDE, sums);
                Sum* const to = tile + q * PANEL * size + p * PANEL;
                for (int64_t i = 0; i < PANEL; i++)
                    for (int64_t j = 0; j < PANEL; j++)
                        to[i * size + j] = (add ? to[i * size + j] : 0) + sums[i * PANEL + j];
            }
    }

    // result (PANEL, PANEL) = sum over tokens of a[t][i] * b[t][j].
    static inline void transposed_product(int64_t tokens, const Sum* a, const Sum* b, Sum* result) {
        constexpr int REST = PANEL % ROWS;
        for (int64_t k = 0; k == 0 || k < tokens; k += SUB_CHUNK) {
            const int64_t count = std::min(SUB_CHUNK, tokens - k);
            for (int m = 0; m + ROWS <= PANEL; m += ROWS) {
                Vector local[ROWS][VECTORS] = {};
                multiply<ROWS, 1, PANEL>(count, a + k * PANEL + m, b + k * PANEL, local);
                keep<ROWS>(local, result + m * PANEL, k > 0);
            }
            if constexpr (REST > 0) {
                Vector local[REST][VECTORS] = {};
                multiply<REST, 1, PANEL>(count, a + k * PANEL + PANEL - REST, b + k * PANEL, local);
                keep<REST>(local, result + (PANEL - REST) * PANEL, k > 0);
            }
        }
    }
};

// Call `run` with the widest kernels whose panel divides a tile. The side of a tile is a multiple of 4.
template <class IO, class Sum, class Run>
static void with_kernels_of(int64_t size, Run run) {
    constexpr int LANES = VECTOR_BYTES / sizeof(Sum);
    const bool fits = size > 0 && size % 4 == 0;
    if (fits && size % (MAX_VECTORS * LANES) == 0) run(Kernels<IO, Sum, VECTOR_BYTES, MAX_VECTORS>());
    else if (fits && size % (2 * LANES) == 0) run(Kernels<IO, Sum, VECTOR_BYTES, 2>());
    else if (fits && size % LANES == 0) run(Kernels<IO, Sum, VECTOR_BYTES, 1>());
    else if (fits && size % (32 / sizeof(Sum)) == 0) run(Kernels<IO, Sum, 32, 1>());
    else if (fits && size % (16 / sizeof(Sum)) == 0) run(Kernels<IO, Sum, 16, 1>());
    else throw NoCode{"have no code for block size " + std::to_string(size)};
}

// The same for elements of a type that is known when the program runs.
template <class Run>
static void with_kernels(int64_t type, int64_t size, Run run) {
    if (type == FLOAT32) with_kernels_of<float, float>(size, run);
    else if (type == FLOAT64) with_kernels_of<double, double>(size, run);
    else if (type == BFLOAT16) with_kernels_of<bfloat16, float>(size, run);
    else throw WrongArgument{"x must be float32, float64 or bfloat16"};
}
