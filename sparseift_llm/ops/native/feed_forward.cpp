// y = f(x U^T) D^T, or with a gate y = (f(x G^T) * x U^T) D^T, each product with a bias; U, G and D are block-sparse.
//
// The widened activation exists for CHUNK tokens at a time, in cache. The backward pass computes it again, from what
// up and gate gave if that was kept, else from x.

#include <vector>

#include "activations.h"

// Up, gate or down: its tiles as stored, its bias or null, and which tiles make a block of its outputs, and of its
// inputs' gradient.
template <class IO>
struct Projection {
    const IO* weight;
    int64_t count;
    const IO* bias;
    Map rows, columns;
};

// A feed-forward block; `into` are up and, if there is one, the gate.
template <class IO>
struct Block {
    Activation activation;
    std::vector<Projection<IO>> into;
    Projection<IO> down;
    int64_t in_blocks, hidden_blocks, out_blocks, size;

    int64_t num_into() const { return int64_t(into.size()); }
    int64_t features() const { return hidden_blocks * size; }
    int64_t area() const { return size * size; }
    int64_t tiles_into() const {  // of up and gate together
        int64_t sum = 0;
        for (const Projection<IO>& projection : into) sum += projection.count;
        return sum;
    }
};

// What up and gate give, (tokens, hidden) each, between the two passes; null where it is not kept.
template <class IO>
using Kept = std::vector<IO*>;

// to = sums + bias, for ROWS rows of panel q.
template <class Kernels, class IO, class Sum>
static inline void shifted(Kernels k, const Sum* sums, const IO* bias, int64_t q, Sum* to) {
    typedef typename Kernels::Vector Vector;
    for (int64_t i = 0; i < k.ROWS * k.PANEL; i += k.LANES) {
        Vector h = *(const Vector*)(sums + i);
        if (bias) h += k.widen(bias + q * k.PANEL + i % k.PANEL);
        *(Vector*)(to + i) = h;
    }
}

template <class Kernels, class IO, class Sum>
static void feed_forward_few(Kernels k, const IO* x, int64_t x_stride, int64_t num_tokens, const Block<IO>& block, IO* y) {
    const int64_t count = num_tokens * block.features(), num_into = block.num_into();
    Sum* const hidden = scratch<Sum>(HIDDEN, num_into * count);
    Sum* const active = hidden + (num_into - 1) * count;  // the gate's, if there is one
#pragma omp parallel
    {
        for (int64_t i = 0; i < num_into; i++)
            k.gather_few(x, x_stride, num_tokens, block.into[i].weight, block.into[i].rows, block.size,
                         block.hidden_blocks, block.into[i].bias, hidden + i * count);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i += block.size)
            Activations<Kernels>::forward(block.activation, block.size, active + i, num_into > 1 ? hidden + i : nullptr);
        k.gather_few(active, block.features(), num_tokens, block.down.weight, block.down.rows, block.size,
                     block.out_blocks, block.down.bias, y);
    }
}

template <class Kernels, class IO, class Sum>
static void feed_forward(Kernels k, const IO* x, int64_t x_stride, int64_t num_tokens, const Block<IO>& block,
                         const Kept<IO>& kept, IO* y) {
    if (num_tokens <= FEW_TOKENS && !kept[0])
        return feed_forward_few<Kernels, IO, Sum>(k, x, x_stride, num_tokens, block, y);
    const int64_t size = block.size, parts = size / k.PANEL, hidden_panels = block.hidden_blocks * parts;
    const int64_t num_into = block.num_into(), features = block.features();
    Sum* const weights = scratch<Sum>(WEIGHT, (block.tiles_into() + block.down.count) * block.area());
    Sum* const down_weights = weights + block.tiles_into() * block.area();
    Sum* const input = scratch<Sum>(INPUT, block.in_blocks * parts * k.PANEL_STRIDE);
    Sum* const hidden = scratch<Sum>(HIDDEN, hidden_panels * k.PANEL_STRIDE);
    for (IO* const memory : kept)
        if (memory) ask_for_huge_pages(memory, num_tokens * features * int64_t(sizeof(IO)));
#pragma omp parallel
    {
        Sum* const up = scratch<Sum>(UP, k.PANEL_STRIDE);
        for (int64_t i = 0, first = 0; i < num_into; first += block.into[i++].count)
            k.pack_tiles(block.into[i].weight, block.into[i].count, size, true, weights + first * block.area());
        k.pack_tiles(block.down.weight, block.down.count, size, true, down_weights);
        for (int64_t begin = 0; begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            const int64_t subs = (tokens + SUB_CHUNK - 1) / SUB_CHUNK;
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, block.in_blocks * parts, input);
#pragma omp for collapse(2) schedule(dynamic, 4)
            for (int64_t sub = 0; sub < subs; sub++)
                for (int64_t q = 0; q < hidden_panels; q++) {
                    const int64_t first = sub * SUB_CHUNK;
                    // Up comes first. What the last one gives, the gate if there is one, goes through the activation.
                    for (int64_t i = 0; i < num_into; i++) {
                        const bool is_last = i == num_into - 1;
                        Sum* const panel = is_last ? hidden + q * k.PANEL_STRIDE : up;
                        k.panel(input, weights + (i > 0 ? block.into[0].count * block.area() : 0), block.into[i].rows,
                                size, q, first, std::min(SUB_CHUNK, tokens - first),
                                [&](int64_t token, int64_t rows, const Sum* sums) {
                                    Sum* const to = panel + token * k.PANEL;
                                    shifted(k, sums, block.into[i].bias, q, to);
                                    if (kept[i])
                                        k.write_rows(to, rows, kept[i] + (begin + token) * features + q * k.PANEL, features);
                                    if (is_last)
                                        Activations<Kernels>::forward(block.activation, k.ROWS * k.PANEL, to,
                                                                      i > 0 ? up + token * k.PANEL : nullptr);
                                });
                    }
                }
            k.gather_chunk(hidden, down_weights, block.down.rows, size, tokens, block.out_blocks, block.down.bias,
                           y + begin * block.out_blocks * size);
        }
    }
}

// The map of the product [grad_up, grad_gate] [U; G]: the entries of both maps, block by block.
struct JointMap {
    std::vector<int32_t> starts, sources, tiles;
    template <class IO>
    explicit JointMap(const Block<IO>& block) : starts(1, 0) {
        for (int64_t j = 0; j < block.in_blocks; j++) {
            for (int64_t i = 0; i < block.num_into(); i++) {
                const Map map = block.into[i].columns;
                for (int32_t e = map.starts[j]; e < map.starts[j + 1]; e++) {
                    sources.push_back(map.sources[e] + int32_t(i * block.hidden_blocks));
                    tiles.push_back(map.tiles[e] + int32_t(i * block.into[0].count));
                }
            }
            starts.push_back(int32_t(sources.size()));
        }
    }
    Map map() const { return {starts.data(), sources.data(), tiles.data()}; }
};

// Where the gradients go, each null if it is not wanted; `weight` and `bias` are those of `Block::into`.
template <class IO>
struct Gradients {
    IO* x;
    std::vector<IO*> weight, bias;
    IO* down;
};

// All gradients, one hidden block of a chunk at a time: the activation of the block, its gradient, and the tiles of
// all weights that touch it.
template <class Kernels, class IO, class Sum>
static void feed_forward_gradient(Kernels k, const IO* grad, int64_t grad_stride, const IO* x, int64_t x_stride,
                                  int64_t num_tokens, const Block<IO>& block, const Kept<IO>& kept,
                                  const Gradients<IO>& wanted) {
    const int64_t size = block.size, parts = size / k.PANEL, area = block.area(), stride = parts * k.PANEL_STRIDE;
    const int64_t num_into = block.num_into(), tiles_into = block.tiles_into(), features = block.features();
    Sum* const into_forward = scratch<Sum>(WEIGHT, (2 * tiles_into + block.down.count) * area);
    Sum* const into_backward = into_forward + tiles_into * area;
    Sum* const down_backward = into_backward + tiles_into * area;
    Sum* const input = scratch<Sum>(INPUT, block.in_blocks * stride);
    Sum* const output_grad = scratch<Sum>(GRAD, block.out_blocks * stride);
    Sum* const hidden_grad = scratch<Sum>(HIDDEN_GRAD, num_into * block.hidden_blocks * stride);
    const JointMap joint(block);
    std::vector<Totals<IO, Sum>> weight_totals, bias_totals;
    for (int64_t i = 0; i < num_into; i++) {
        weight_totals.emplace_back(i ? TOTAL_GATE : TOTAL_UP, wanted.weight[i] ? block.into[i].count * area : 0,
                                   wanted.weight[i]);
        bias_totals.emplace_back(i ? TOTAL_GATE_BIAS : TOTAL_UP_BIAS, wanted.bias[i] ? features : 0, wanted.bias[i]);
    }
    const Totals<IO, Sum> down_totals(TOTAL, wanted.down ? block.down.count * area : 0, wanted.down);
#pragma omp parallel
    {
        Sum* const hidden = scratch<Sum>(HIDDEN, num_into * stride);  // of one block: what up gives, what the gate gives
        for (int64_t i = 0, first = 0; i < num_into; first += block.into[i++].count)
            for (const bool transpose : {true, false})
                if (!transpose || !kept[i])
                    k.pack_tiles(block.into[i].weight, block.into[i].count, size, transpose,
                                 (transpose ? into_forward : into_backward) + first * area);
        k.pack_tiles(block.down.weight, block.down.count, size, false, down_backward);
        for (int64_t begin = 0; begin == 0 || begin < num_tokens; begin += CHUNK) {
            const int64_t tokens = std::min(CHUNK, num_tokens - begin);
            const bool add = begin > 0;
            k.pack_chunk(x + begin * x_stride, x_stride, tokens, block.in_blocks * parts, input);
            k.pack_chunk(grad + begin * grad_stride, grad_stride, tokens, block.out_blocks * parts, output_grad);
#pragma omp for schedule(dynamic, 1)
            for (int64_t j = 0; j < block.hidden_blocks; j++) {
                const auto grad_of = [&](int64_t i) { return hidden_grad + (i * block.hidden_blocks + j) * stride; };
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t q = j * parts + part, of_part = part * k.PANEL_STRIDE;
                    for (int64_t first = 0; first < tokens; first += SUB_CHUNK) {
                        const int64_t count = std::min(SUB_CHUNK, tokens - first);
                        for (int64_t i = 0; i < num_into; i++) {
                            Sum* const panel = hidden + i * stride + of_part;
                            if (kept[i]) {
                                const IO* const from = kept[i] + (begin + first) * features + q * k.PANEL;
                                k.read_rows(from, features, count, panel + first * k.PANEL);
                                continue;
                            }
                            k.panel(input, into_forward + (i > 0 ? block.into[0].count * area : 0), block.into[i].rows,
                                    size, q, first, count, [&](int64_t token, int64_t, const Sum* sums) {
                                        shifted(k, sums, block.into[i].bias, q, panel + token * k.PANEL);
                                    });
                        }
                        k.panel(output_grad, down_backward, block.down.columns, size, q, first, count,
                                [&](int64_t token, int64_t, const Sum* sums) {
                                    const int64_t at = of_part + token * k.PANEL;
                                    if (num_into == 1)
                                        Activations<Kernels>::backward(block.activation, sums, hidden + at, grad_of(0) + at);
                                    else
                                        Activations<Kernels>::backward_gated(block.activation, sums, hidden + at,
                                                                             hidden + stride + at, grad_of(0) + at,
                                                                             grad_of(1) + at);
                                });
                    }
                    for (int64_t i = 0; i < num_into; i++)
                        if (wanted.bias[i])
                            k.add_columns(tokens, grad_of(i) + of_part, add, bias_totals[i].sums + q * k.PANEL);
                }
                for (int64_t i = 0; i < num_into; i++) {
                    const Map map = block.into[i].rows;
                    if (wanted.weight[i])
                        for (int32_t e = map.starts[j]; e < map.starts[j + 1]; e++)
                            k.add_outer(tokens, grad_of(i), input + map.sources[e] * stride, size, add,
                                        weight_totals[i].sums + map.tiles[e] * area);
                }
                const Map map = block.down.columns;
                if (wanted.down)
                    for (int32_t e = map.starts[j]; e < map.starts[j + 1]; e++)
                        k.add_outer(tokens, output_grad + map.sources[e] * stride, hidden, size, add,
                                    down_totals.sums + map.tiles[e] * area);
            }
            if (wanted.x)
                k.gather_chunk(hidden_grad, into_backward, joint.map(), size, tokens, block.in_blocks, nullptr,
                               wanted.x + begin * block.in_blocks * size);
        }
        for (int64_t i = 0; i < num_into; i++) {
            if (wanted.weight[i]) weight_totals[i].store_all();
            if (wanted.bias[i]) bias_totals[i].store_all();
        }
        if (wanted.down) down_totals.store_all();
    }
}

// A projection as Python passes it. What a pass does not need is left out.
struct ProjectionArrays {
    const Array *weight, *bias;
    MapArrays rows, columns;
};

static inline Activation activation_of(int64_t number) {
    require(0 <= number && number < NUM_ACTIVATIONS, "activation", "is unknown");
    return Activation(number);
}

// The projection (outputs, inputs), checked.
template <class IO>
static Projection<IO> projection_of(const ProjectionArrays& arrays, const char* name, int64_t size, int64_t out_blocks,
                                    int64_t in_blocks, bool by_rows, bool by_columns) {
    const int64_t count = present(arrays.weight, name).shape[0];
    return {memory_of<IO>(arrays.weight, name, {count, size, size}), count,
            memory_if_any<IO>(arrays.bias, name, {out_blocks * size}),
            by_rows ? map_of(arrays.rows, name, out_blocks, in_blocks, count) : Map{},
            by_columns ? map_of(arrays.columns, name, in_blocks, out_blocks, count) : Map{}};
}

// y, and what up and gate give.
//
// x              (tokens, in), with any row stride
// activation     a number of enum Activation
// up             the tiles (N, size, size) of U (hidden, in), each (out, in)
// up_bias        (hidden,), or null
// up_...         which tiles make a block of the hidden activation: starts (hidden / size + 1), sources and tiles (N)
// gate...        the same of G; all of them null if there is no gate
// down           the tiles (M, size, size) of D (out, hidden), each (out, in)
// down_bias      (out,), or null
// down_...       which tiles make a block of y: starts (out / size + 1), sources and tiles (M)
// y              (tokens, out), written
// kept_up        (tokens, hidden), written: what up gives; or null
// kept_gate      the same of the gate
EXPORTED int feed_forward(const Array* x, int64_t activation, const Array* up, const Array* up_bias,
                          const Array* up_starts, const Array* up_sources, const Array* up_tiles, const Array* gate,
                          const Array* gate_bias, const Array* gate_starts, const Array* gate_sources,
                          const Array* gate_tiles, const Array* down, const Array* down_bias, const Array* down_starts,
                          const Array* down_sources, const Array* down_tiles, const Array* y, const Array* kept_up,
                          const Array* kept_gate) {
    return guarded([&] {
        const int64_t size = tile_side(present(up, "up"), "up");
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t in_blocks = blocks_of(x, "x", size), out_blocks = blocks_of(y, "y", size);
            const int64_t hidden_blocks = present(up_starts, "up_starts").shape[0] - 1, tokens = x->shape[0];
            const int64_t features = hidden_blocks * size;
            Block<IO> block{activation_of(activation), {}, {}, in_blocks, hidden_blocks, out_blocks, size};
            block.into.push_back(projection_of<IO>({up, up_bias, {up_starts, up_sources, up_tiles}, {}}, "up", size,
                                                   hidden_blocks, in_blocks, true, false));
            Kept<IO> kept{memory_if_any<IO>(kept_up, "kept_up", {tokens, features})};
            if (gate) {
                block.into.push_back(projection_of<IO>({gate, gate_bias, {gate_starts, gate_sources, gate_tiles}, {}},
                                                       "gate", size, hidden_blocks, in_blocks, true, false));
                kept.push_back(memory_if_any<IO>(kept_gate, "kept_gate", {tokens, features}));
                require(!kept[0] == !kept[1], "one of kept_up and kept_gate", "is missing");
            } else require(!gate_bias && !gate_starts && !gate_sources && !gate_tiles && !kept_gate, "gate", "is missing");
            block.down = projection_of<IO>({down, down_bias, {down_starts, down_sources, down_tiles}, {}}, "down", size,
                                           out_blocks, hidden_blocks, true, false);
            feed_forward<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, tokens, block, kept,
                memory_of<IO>(y, "y", {tokens, out_blocks * size}));
        });
    });
}

// The gradients of x, of the tiles and biases of up and gate, and of the tiles of down.
//
// grad            (tokens, out), with any row stride: the gradient of y
// x, activation   as of feed_forward
// up, up_bias     as of feed_forward
// up_row_...      as up_... of feed_forward
// up_column_...   which tiles of U make a block of the gradient of x: starts (in / size + 1), sources and tiles (N)
// gate...         the same of G; all of them null if there is no gate
// down            as of feed_forward
// down_...        which tiles of D make a block of the gradient of the hidden activation: starts (hidden / size + 1),
//                 sources and tiles (M)
// kept_...        what feed_forward wrote there, or null
// grad_x          (tokens, in), written; or null
// grad_up         (N, size, size), written; or null
// grad_up_bias    (hidden,), written; or null
// grad_gate...    the same of the gate
// grad_down       (M, size, size), written; or null
EXPORTED int feed_forward_gradient(
    const Array* grad, const Array* x, int64_t activation, const Array* up, const Array* up_bias,
    const Array* up_row_starts, const Array* up_row_sources, const Array* up_row_tiles, const Array* up_column_starts,
    const Array* up_column_sources, const Array* up_column_tiles, const Array* gate, const Array* gate_bias,
    const Array* gate_row_starts, const Array* gate_row_sources, const Array* gate_row_tiles,
    const Array* gate_column_starts, const Array* gate_column_sources, const Array* gate_column_tiles, const Array* down,
    const Array* down_starts, const Array* down_sources, const Array* down_tiles, const Array* kept_up,
    const Array* kept_gate, const Array* grad_x, const Array* grad_up, const Array* grad_up_bias, const Array* grad_gate,
    const Array* grad_gate_bias, const Array* grad_down) {
    return guarded([&] {
        const int64_t size = tile_side(present(up, "up"), "up"), up_count = up->shape[0];
        const int64_t down_count = present(down, "down").shape[0];
        with_kernels(present(x, "x").type, size, [&](auto kernels) {
            typedef typename decltype(kernels)::Element IO;
            typedef typename decltype(kernels)::Total Sum;
            const int64_t in_blocks = blocks_of(x, "x", size), out_blocks = blocks_of(grad, "grad", size);
            const int64_t hidden_blocks = present(up_row_starts, "up_row_starts").shape[0] - 1, tokens = x->shape[0];
            const int64_t features = hidden_blocks * size;
            const ProjectionArrays of_up{up, up_bias, {up_row_starts, up_row_sources, up_row_tiles},
                                         {up_column_starts, up_column_sources, up_column_tiles}};
            const ProjectionArrays of_gate{gate, gate_bias, {gate_row_starts, gate_row_sources, gate_row_tiles},
                                           {gate_column_starts, gate_column_sources, gate_column_tiles}};
            Block<IO> block{activation_of(activation), {}, {}, in_blocks, hidden_blocks, out_blocks, size};
            block.into.push_back(projection_of<IO>(of_up, "up", size, hidden_blocks, in_blocks, true, true));
            Kept<IO> kept{memory_if_any<IO>(kept_up, "kept_up", {tokens, features})};
            Gradients<IO> wanted{memory_if_any<IO>(grad_x, "grad_x", {tokens, in_blocks * size}),
                                 {memory_if_any<IO>(grad_up, "grad_up", {up_count, size, size})},
                                 {memory_if_any<IO>(grad_up_bias, "grad_up_bias", {features})},
                                 memory_if_any<IO>(grad_down, "grad_down", {down_count, size, size})};
            if (gate) {
                const int64_t gate_count = gate->shape[0];
                block.into.push_back(projection_of<IO>(of_gate, "gate", size, hidden_blocks, in_blocks, true, true));
                kept.push_back(memory_if_any<IO>(kept_gate, "kept_gate", {tokens, features}));
                require(!kept[0] == !kept[1], "one of kept_up and kept_gate", "is missing");
                wanted.weight.push_back(memory_if_any<IO>(grad_gate, "grad_gate", {gate_count, size, size}));
                wanted.bias.push_back(memory_if_any<IO>(grad_gate_bias, "grad_gate_bias", {features}));
            } else
                for (const Array* array : {gate_bias, gate_row_starts, gate_row_sources, gate_row_tiles,
                                           gate_column_starts, gate_column_sources, gate_column_tiles, kept_gate,
                                           grad_gate, grad_gate_bias})
                    require(!array, "gate", "is missing");
            const ProjectionArrays of_down{down, nullptr, {}, {down_starts, down_sources, down_tiles}};
            block.down = projection_of<IO>(of_down, "down", size, out_blocks, hidden_blocks, false, true);
            feed_forward_gradient<decltype(kernels), IO, Sum>(
                kernels, memory_of<IO>(grad, "grad", {tokens, out_blocks * size}, true), grad->stride,
                memory_of<IO>(x, "x", {tokens, in_blocks * size}, true), x->stride, tokens, block, kept, wanted);
        });
    });
}
