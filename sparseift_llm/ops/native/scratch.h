// Memory for packed operands and sums that threads keep between calls.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <set>

// Ask for pages of 2 MiB. A widened activation is fresh memory on every call, and touching it costs a fraction then.
static void ask_for_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20, first = (uintptr_t(start) + page - 1) & ~(page - 1);
    const uintptr_t last = (uintptr_t(start) + bytes) & ~(page - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory that a thread keeps between calls, one buffer per purpose.
enum Purpose {
    WEIGHT, INPUT, GRAD, HIDDEN, HIDDEN_GRAD, UP, SUMS,
    TOTAL, TOTAL_UP, TOTAL_UP_BIAS, TOTAL_GATE, TOTAL_GATE_BIAS, NUM_PURPOSES
};
struct Buffers {
    inline static std::mutex mutex;
    inline static std::set<Buffers*>& all = *new std::set<Buffers*>;  // the buffers of all threads
    void* start[NUM_PURPOSES] = {};
    int64_t size[NUM_PURPOSES] = {};
    Buffers() {
        const std::lock_guard<std::mutex> lock(mutex);
        all.insert(this);
    }
    ~Buffers() {
        const std::lock_guard<std::mutex> lock(mutex);
        all.erase(this);
        release();
    }
    int64_t total() const { return std::accumulate(size, size + NUM_PURPOSES, int64_t(0)); }
    void release() {
        for (int purpose = 0; purpose < NUM_PURPOSES; purpose++) resize(purpose, 0);
    }
    void resize(int purpose, int64_t bytes) {
        free(start[purpose]);
        size[purpose] = 0;
        start[purpose] = bytes ? aligned_alloc(4096, bytes) : nullptr;
        if (bytes && !start[purpose]) throw std::bad_alloc();
        size[purpose] = bytes;
    }
};
inline thread_local Buffers buffers;

// This thread's memory for one purpose, at least `count` numbers long. What it holds is not defined.
template <class Sum>
static Sum* scratch(Purpose purpose, int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(Sum)) + 4095) / 4096 * 4096;
    if (buffers.size[purpose] < bytes) {
        buffers.resize(purpose, bytes);
        ask_for_huge_pages(buffers.start[purpose], bytes);
    }
    return static_cast<Sum*>(buffers.start[purpose]);
}
