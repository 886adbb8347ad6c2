// What Python passes to the entry points, and the checks of it.
//
// A tensor comes as an Array, which knows its own dtype and shape. Numbers of tokens, blocks and tiles are taken from
// shapes and never passed, and every Array is compared with the shape that it must have then. So two arguments in the
// wrong order are an error, and what an index points to lies inside of the tensor that is read.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>

struct bfloat16 {
    uint16_t bits;
};

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, INT32 };
template <class Element> constexpr Type TYPE_OF = INT32;
template <> constexpr Type TYPE_OF<float> = FLOAT32;
template <> constexpr Type TYPE_OF<double> = FLOAT64;
template <> constexpr Type TYPE_OF<bfloat16> = BFLOAT16;

// A tensor in the memory of this process. kernels/native.py has the same structure.
struct Array {
    void* data;
    int64_t type;       // of enum Type
    int64_t num_sides;  // 1 to 3
    int64_t shape[3];   // unused sides are 1
    int64_t stride;     // elements from one index of the first side to the next; the other sides are contiguous
};

// What an entry point returns; what is wrong is then in `mistake`.
enum Outcome { DONE, NO_CODE, NO_MEMORY, WRONG_ARGUMENT };
struct NoCode {
    std::string text;
};
struct WrongArgument {
    std::string text;
};
inline thread_local std::string mistake;

// Run the body of an entry point. No exception may leave it, because Python is its caller.
template <class Body>
static int guarded(Body body) try {
    body();
    return DONE;
} catch (const NoCode& error) {
    mistake = error.text;
    return NO_CODE;
} catch (const WrongArgument& error) {
    mistake = error.text;
    return WRONG_ARGUMENT;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

static inline std::string text_of(const int64_t* sides, int64_t count) {
    std::string text = "(";
    for (int64_t i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(sides[i]);
    return text + ")";
}

static inline void require(bool holds, const char* name, const std::string& what) {
    if (!holds) throw WrongArgument{std::string(name) + " " + what};
}

static inline const Array& present(const Array* array, const char* name) {
    require(array, name, "is missing");
    return *array;
}

// The side of the tiles in an array (tiles, side, side).
static inline int64_t tile_side(const Array& tiles, const char* name) {
    require(tiles.num_sides == 3 && tiles.shape[1] == tiles.shape[2], name,
            "must be (tiles, side, side), got " + text_of(tiles.shape, tiles.num_sides));
    return tiles.shape[1];
}

// Blocks of `size` in the second side of (tokens, width).
static inline int64_t blocks_of(const Array* array, const char* name, int64_t size) {
    const Array& found = present(array, name);
    require(found.num_sides == 2 && size > 0 && found.shape[1] % size == 0, name,
            "must be (tokens, a multiple of " + std::to_string(size) + "), got " + text_of(found.shape, found.num_sides));
    return found.shape[1] / size;
}

// The memory of `array`, which must have this shape, and elements of type Element in one piece unless `any_stride`.
template <class Element>
static Element* memory_of(const Array* array, const char* name, std::initializer_list<int64_t> shape,
                          bool any_stride = false) {
    const Array& found = present(array, name);
    require(found.type == TYPE_OF<Element>, name, "has another dtype than expected");
    bool same = found.num_sides == int64_t(shape.size());
    int64_t inner = 1, count = 1;
    for (size_t i = 0; same && i < shape.size(); i++) {
        same = found.shape[i] == shape.begin()[i];
        if (i > 0) inner *= found.shape[i];
        count *= found.shape[i];
    }
    require(same, name, "must be " + text_of(shape.begin(), shape.size()) + ", got " +
                            text_of(found.shape, found.num_sides));
    require(any_stride || found.shape[0] <= 1 || found.stride == inner, name, "must be contiguous");
    require(found.data || count == 0, name, "has no memory");
    return static_cast<Element*>(found.data);
}

// As `memory_of`, for an argument that may be left out.
template <class Element>
static Element* memory_if_any(const Array* array, const char* name, std::initializer_list<int64_t> shape) {
    return array ? memory_of<Element>(array, name, shape) : nullptr;
}

// Which tiles make an output block: block j sums, over e from starts[j] to starts[j + 1] - 1, input block sources[e]
// times tile tiles[e].
struct Map {
    const int32_t *starts, *sources, *tiles;
};

// The three index tensors of a product as Python passes them.
struct MapArrays {
    const Array *starts, *sources, *tiles;
};

static inline const int32_t* indices_of(const Array* array, const char* name, int64_t count, int64_t below) {
    const int32_t* const found = memory_of<int32_t>(array, name, {count});
    for (int64_t i = 0; i < count; i++)
        if (found[i] < 0 || found[i] >= below)  // a message for each would take longer than the product
            require(false, name,
                    "must be at least 0 and below " + std::to_string(below) + ", got " + std::to_string(found[i]));
    return found;
}

// A map of `num_outputs` output blocks, checked: all it points to are `num_inputs` input blocks and `num_tiles` tiles.
static inline Map map_of(const MapArrays& arrays, const char* name, int64_t num_outputs, int64_t num_inputs,
                         int64_t num_tiles) {
    const int64_t count = present(arrays.sources, name).shape[0];
    require(num_outputs >= 0, name, "must begin with the starts of all blocks, and their end");
    const int32_t* const starts = memory_of<int32_t>(arrays.starts, name, {num_outputs + 1});
    bool ascends = starts[0] == 0 && starts[num_outputs] == count;
    for (int64_t j = 0; j < num_outputs; j++) ascends = ascends && starts[j] <= starts[j + 1];
    require(ascends, name, "must ascend from 0 to the number of its entries");
    return {starts, indices_of(arrays.sources, name, count, num_inputs),
            indices_of(arrays.tiles, name, count, num_tiles)};
}
