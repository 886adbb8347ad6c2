// Products of a block-sparse matrix with dense activations on a CPU, compiled for the machine at hand.
//
// Both kernels copy CHUNK tokens at a time into panels PANEL columns wide, so that the inner loop reads memory in
// order whatever the strides outside. Sums are float (double for double); every sum has one fixed order.
// The arguments are explained where they are passed, in block_native.py.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

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
constexpr int64_t PACKED_ROWS = 8;  // tokens that a thread copies at a time
constexpr int64_t WEIGHT_BYTES_IN_L1 = 32768;

struct bfloat16 {
    uint16_t bits;
};

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

// A widened activation is fresh memory on every call: with 2 MiB pages the first touch costs a fraction.
static void ask_for_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20, first = (uintptr_t(start) + page - 1) & ~(page - 1);
    const uintptr_t last = (uintptr_t(start) + bytes) & ~(page - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory that a thread keeps between calls, one buffer per purpose.
enum Purpose { LEFT, RIGHT, SUMS, TOTAL, NUM_PURPOSES };
struct Buffers {
    void* start[NUM_PURPOSES] = {};
    int64_t size[NUM_PURPOSES] = {};
    ~Buffers() {
        for (void* buffer : start) free(buffer);
    }
};
template <class Sum>
static Sum* scratch(Purpose purpose, int64_t count) {
    static thread_local Buffers buffers;
    const int64_t bytes = (count * int64_t(sizeof(Sum)) + 4095) / 4096 * 4096;
    if (buffers.size[purpose] < bytes) {
        free(buffers.start[purpose]);
        buffers.start[purpose] = aligned_alloc(4096, bytes);
        if (!buffers.start[purpose]) abort();
        buffers.size[purpose] = bytes;
        ask_for_huge_pages(buffers.start[purpose], bytes);
    }
    return static_cast<Sum*>(buffers.start[purpose]);
}

template <class IO, class Sum, int BYTES, int VECTORS>
struct Kernels {
    typedef Sum Vector __attribute__((vector_size(BYTES), aligned(sizeof(Sum)), may_alias));
    static constexpr int LANES = BYTES / sizeof(Sum), PANEL = VECTORS * LANES, ROWS = NUM_SUMS / VECTORS;

    // sums[m] += sum over k of a[m * A_ROW + k * A_STEP] * b[k * PANEL + ...]: the only place where numbers multiply.
    template <int NUM_ROWS, int64_t A_ROW, int64_t A_STEP>
    static inline void multiply(int64_t count, const Sum* a, const Sum* b, Vector (&sums)[NUM_ROWS][VECTORS]) {
        for (int64_t k = 0; k < count; k++) {
            Vector right[VECTORS];
            for (int v = 0; v < VECTORS; v++) right[v] = *(const Vector*)(b + k * PANEL + v * LANES);
            for (int m = 0; m < NUM_ROWS; m++)
                for (int v = 0; v < VECTORS; v++) sums[m][v] += a[m * A_ROW + k * A_STEP] * right[v];
        }
    }

    template <int NUM_ROWS>
    static inline void keep(const Vector (&sums)[NUM_ROWS][VECTORS], Sum* to, bool add) {
        for (int m = 0; m < NUM_ROWS; m++)
            for (int v = 0; v < VECTORS; v++) {
                Vector* target = (Vector*)(to + m * PANEL + v * LANES);
                *target = add ? *target + sums[m][v] : sums[m][v];
            }
    }

    static inline Vector cut(Vector x, Sum low, Sum high) {  // nan stays nan
        x = x < low ? Vector{} + low : x;
        return x > high ? Vector{} + high : x;
    }

    // exp(z) to a unit or two in the last place, for all lanes at once; z is cut to where floats reach.
    static inline Vector exponential(Vector z) {
        if constexpr (std::is_same_v<Sum, float>) {
            typedef int32_t Bits __attribute__((vector_size(BYTES)));
            z = cut(z, -87.0f, 88.0f);
            const Vector shifted = z * 1.44269504f + 12582912.0f;  // rounds to an integer, held in the low bits
            const Vector n = shifted - 12582912.0f;
            const Vector r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
            Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
            p = p * r + 8.3334519073e-3f;
            p = p * r + 4.1665795894e-2f;
            p = p * r + 1.6666665459e-1f;
            p = p * r + 5.0000001201e-1f;
            p = p * r * r + r + 1.0f;
            return p * (Vector)(((Bits)shifted - 0x4b400000 + 127) << 23);
        } else {
            for (int lane = 0; lane < LANES; lane++) z[lane] = exp(z[lane]);
            return z;
        }
    }

    // GELU with the tanh formula: x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3); and its derivative.
    // Beyond 64 the sigmoid is 0 or 1 to the last bit; x is cut there, lest its powers overflow.
    static inline Vector gelu_sigmoid(Vector x) {
        x = cut(x, -64, 64);
        return 1 / (1 + exponential(x * (Sum(-1.5957691216057308) - Sum(1.5957691216057308 * 0.044715) * x * x)));
    }
    static inline Vector gelu(Vector x) { return x * gelu_sigmoid(x); }
    static inline Vector gelu_derivative(Vector x) {
        x = cut(x, -64, 64);
        const Vector s = gelu_sigmoid(x);
        const Vector slope = Sum(1.5957691216057308) + Sum(3 * 1.5957691216057308 * 0.044715) * x * x;
        return s + x * s * (1 - s) * slope;
    }

    // Rows first to first + count of a chunk -> [panel][token][PANEL], reading each row in order.
    static void pack(const IO* chunk, int64_t stride, int64_t first, int64_t count, int64_t num_panels,
                     int64_t panel_stride, bool apply_gelu, Sum* panels) {
        for (int64_t p = 0; p < num_panels; p++)
            for (int64_t t = first; t < first + count; t++) {
                const IO* from = chunk + t * stride + p * PANEL;
                Sum* to = panels + p * panel_stride + t * PANEL;
                for (int j = 0; j < PANEL; j += LANES) {
                    Vector x;
                    for (int lane = 0; lane < LANES; lane++) x[lane] = load(from[j + lane]);
                    *(Vector*)(to + j) = apply_gelu ? gelu(x) : x;
                }
            }
    }

    // One tile of the weight -> [panel of outputs][input][PANEL].
    static void pack_tile(const IO* tile, int64_t size, bool transpose, Sum* to) {
        const int64_t by_output = transpose ? size : 1, by_input = transpose ? 1 : size;
        for (int64_t first = 0; first < size; first += PANEL)
            for (int64_t k = 0; k < size; k++)
                for (int j = 0; j < PANEL; j++)
                    to[first * size + k * PANEL + j] = load(tile[(first + j) * by_output + k * by_input]);
    }

    static void gather(const IO* x, int64_t x_stride, int64_t num_tokens, int64_t in_blocks, const IO* weight,
                       bool transpose, int64_t num_tiles, const int32_t* starts, const int32_t* sources,
                       const int32_t* tiles, int64_t out_blocks, const IO* bias, bool apply_gelu,
                       const IO* before_gelu, IO* y, int64_t size) {
        const int64_t parts = size / PANEL, in_panels = in_blocks * parts, out_panels = out_blocks * parts;
        const int64_t panel_stride = (CHUNK + ROWS) * PANEL, y_stride = out_blocks * size;
        const int64_t group = std::max<int64_t>(1, WEIGHT_BYTES_IN_L1 / int64_t(sizeof(Sum) * PANEL * PANEL));
        Sum* const weights = scratch<Sum>(LEFT, num_tiles * size * size);
        Sum* const panels = scratch<Sum>(RIGHT, in_panels * panel_stride);
        ask_for_huge_pages(y, num_tokens * y_stride * int64_t(sizeof(IO)));
#pragma omp parallel
        {
            Sum* const sums = scratch<Sum>(SUMS, (SUB_CHUNK + ROWS) * PANEL);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < num_tiles; n++)
                pack_tile(weight + n * size * size, size, transpose, weights + n * size * size);
            for (int64_t begin = 0; begin < num_tokens; begin += CHUNK) {
                const int64_t tokens = std::min(CHUNK, num_tokens - begin);
                const int64_t subs = (tokens + SUB_CHUNK - 1) / SUB_CHUNK;
#pragma omp for schedule(static)
                for (int64_t t = 0; t < tokens; t += PACKED_ROWS)
                    pack(x + begin * x_stride, x_stride, t, std::min(PACKED_ROWS, tokens - t), in_panels, panel_stride,
                         apply_gelu, panels);
#pragma omp for collapse(2) schedule(dynamic, 4)
                for (int64_t sub = 0; sub < subs; sub++)
                    for (int64_t q = 0; q < out_panels; q++) {
                        const int64_t first = sub * SUB_CHUNK, here = std::min(SUB_CHUNK, tokens - first);
                        const int64_t block = q / parts, part = q % parts, entry = starts[block];
                        const int64_t steps = (starts[block + 1] - entry) * parts;
                        IO* const out = y + (begin + first) * y_stride + q * PANEL;
                        const IO* const shift = bias ? bias + q * PANEL : nullptr;
                        for (int64_t g = 0; g == 0 || g < steps; g += group)
                            for (int64_t m = 0; m < here; m += ROWS) {
                                Vector local[ROWS][VECTORS] = {};
                                for (int64_t e = g; e < std::min(steps, g + group); e++) {
                                    const int64_t slot = entry + e / parts, k = e % parts;
                                    const Sum* a = panels + (sources[slot] * parts + k) * panel_stride;
                                    const Sum* b = weights + (tiles[slot] * size + part * PANEL) * size;
                                    multiply<ROWS, PANEL, 1>(PANEL, a + (first + m) * PANEL, b + k * PANEL * PANEL, local);
                                }
                                keep<ROWS>(local, sums + m * PANEL, g > 0);
                                if (g + group < steps) continue;
                                const int64_t rows = std::min<int64_t>(ROWS, here - m);
                                if (before_gelu)
                                    scale_by_derivative(sums + m * PANEL, rows, before_gelu + (out - y) + m * y_stride, y_stride);
                                write(sums + m * PANEL, rows, shift, out + m * y_stride, y_stride);
                            }
                    }
            }
        }
    }

    static inline void scale_by_derivative(Sum* sums, int64_t rows, const IO* before_gelu, int64_t stride) {
        for (int64_t t = 0; t < rows; t++)
            for (int j = 0; j < PANEL; j += LANES) {
                Vector x;
                for (int lane = 0; lane < LANES; lane++) x[lane] = load(before_gelu[t * stride + j + lane]);
                *(Vector*)(sums + t * PANEL + j) *= gelu_derivative(x);
            }
    }

    static inline void write(const Sum* sums, int64_t rows, const IO* bias, IO* y, int64_t stride) {
        for (int64_t t = 0; t < rows; t++)
            for (int j = 0; j < PANEL; j++) store(sums[t * PANEL + j] + (bias ? load(bias[j]) : 0), y + t * stride + j);
    }

    static void outer(const IO* grad, int64_t grad_stride, int64_t out_blocks, const IO* x, int64_t x_stride,
                      int64_t in_blocks, int64_t num_tokens, const int32_t* rows, const int32_t* columns,
                      int64_t num_tiles, bool apply_gelu, IO* result, int64_t size) {
        const int64_t parts = size / PANEL, out_panels = out_blocks * parts, in_panels = in_blocks * parts;
        Sum* const left = scratch<Sum>(LEFT, out_panels * CHUNK * PANEL);
        Sum* const right = scratch<Sum>(RIGHT, in_panels * CHUNK * PANEL);
        Sum* total;
        if constexpr (std::is_same_v<IO, Sum>) total = result;
        else total = scratch<Sum>(TOTAL, num_tiles * size * size);
        ask_for_huge_pages(result, num_tiles * size * size * int64_t(sizeof(IO)));
#pragma omp parallel
        {
            Sum* const sums = scratch<Sum>(SUMS, (SUB_CHUNK + ROWS) * PANEL);
            for (int64_t begin = 0; begin == 0 || begin < num_tokens; begin += CHUNK) {
                const int64_t tokens = std::min(CHUNK, num_tokens - begin);
#pragma omp for schedule(static) nowait
                for (int64_t t = 0; t < tokens; t += PACKED_ROWS)
                    pack(grad + begin * grad_stride, grad_stride, t, std::min(PACKED_ROWS, tokens - t), out_panels,
                         CHUNK * PANEL, false, left);
#pragma omp for schedule(static)
                for (int64_t t = 0; t < tokens; t += PACKED_ROWS)
                    pack(x + begin * x_stride, x_stride, t, std::min(PACKED_ROWS, tokens - t), in_panels, CHUNK * PANEL,
                         apply_gelu, right);
#pragma omp for schedule(dynamic, 1)
                for (int64_t n = 0; n < num_tiles; n++)
                    for (int64_t q = 0; q < parts * parts; q++) {
                        const Sum* a = left + (rows[n] * parts + q / parts) * CHUNK * PANEL;
                        const Sum* b = right + (columns[n] * parts + q % parts) * CHUNK * PANEL;
                        transposed_product(tokens, a, b, sums);
                        Sum* to = total + n * size * size + q / parts * PANEL * size + q % parts * PANEL;
                        for (int64_t i = 0; i < PANEL; i++)
                            for (int64_t j = 0; j < PANEL; j++)
                                to[i * size + j] = (begin > 0 ? to[i * size + j] : 0) + sums[i * PANEL + j];
                    }
            }
            if constexpr (!std::is_same_v<IO, Sum>) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < num_tiles * size * size; i++) store(total[i], result + i);
            }
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

// Calls `run` with the widest kernels whose panel divides a tile.
template <class IO, class Sum, class Run>
static int with_kernels(int64_t size, Run run) {
    constexpr int LANES = VECTOR_BYTES / sizeof(Sum);
    if (size % (MAX_VECTORS * LANES) == 0) run(Kernels<IO, Sum, VECTOR_BYTES, MAX_VECTORS>());
    else if (size % (2 * LANES) == 0) run(Kernels<IO, Sum, VECTOR_BYTES, 2>());
    else if (size % LANES == 0) run(Kernels<IO, Sum, VECTOR_BYTES, 1>());
    else if (size % (32 / sizeof(Sum)) == 0) run(Kernels<IO, Sum, 32, 1>());
    else if (size % (16 / sizeof(Sum)) == 0) run(Kernels<IO, Sum, 16, 1>());
    else return 1;
    return 0;
}

#define FOR_TYPE(NAME, IO, SUM)                                                                                      \
    extern "C" int gather_##NAME(const IO* x, int64_t x_stride, int64_t num_tokens, int64_t in_blocks,               \
                                 const IO* weight, int64_t transpose, int64_t num_tiles, const int32_t* starts,      \
                                 const int32_t* sources, const int32_t* tiles, int64_t out_blocks, const IO* bias,   \
                                 int64_t apply_gelu, const IO* before_gelu, IO* y, int64_t size) {                   \
        return with_kernels<IO, SUM>(size, [&](auto kernels) {                                                       \
            kernels.gather(x, x_stride, num_tokens, in_blocks, weight, transpose != 0, num_tiles, starts, sources,   \
                           tiles, out_blocks, bias, apply_gelu != 0, before_gelu, y, size);                          \
        });                                                                                                          \
    }                                                                                                                \
    extern "C" int outer_##NAME(const IO* grad, int64_t grad_stride, int64_t out_blocks, const IO* x,                \
                                int64_t x_stride, int64_t in_blocks, int64_t num_tokens, const int32_t* rows,        \
                                const int32_t* columns, int64_t num_tiles, int64_t apply_gelu, IO* result,           \
                                int64_t size) {                                                                      \
        return with_kernels<IO, SUM>(size, [&](auto kernels) {                                                       \
            kernels.outer(grad, grad_stride, out_blocks, x, x_stride, in_blocks, num_tokens, rows, columns,          \
                          num_tiles, apply_gelu != 0, result, size);                                                 \
        });                                                                                                          \
    }
FOR_TYPE(float32, float, float)
FOR_TYPE(float64, double, double)
FOR_TYPE(bfloat16, bfloat16, float)
