// What the kernel is given: the arrays of all parts, and a batch. `kernel.py` has the same structures.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t FULL_RANGE = int64_t{1} << 32;
constexpr int64_t LONG_AGO_MS = -(int64_t{1} << 62);
constexpr int32_t FREE = -1;
constexpr int SESSIONS = 8;

enum Kind : int64_t { RING, DISTINCT, TOP_K, AFFINITY, LAST_K, SINCE, SESSION };
enum Statistic : int32_t { COUNT, SUM, MIN, MAX };

struct Accumulator {
    int32_t filter, number, statistic, unused;  // number: -1 for the event itself
    double initial;
};

struct Part {
    int64_t kind, hop_ms, tiles, cap, k, filter, column, accumulators, gap_ms;
    double half_life_ms;
    void *a, *b, *c, *d, *e;
};

// The values of an item attribute, by code and by hash: what is stored must outlive the codes.
struct Names {
    int64_t count;
    const uint32_t *hashes;  // by code
    const uint32_t *sorted;  // ascending
    const int64_t *codes;    // of `sorted`
};

struct Batch {
    int64_t events, stride;         // stride: distance of two columns, in elements
    const int64_t *rows, *times_ms;
    const uint8_t *passes;          // [filters, E]
    const double *numbers;          // [numbers, E]
    const int64_t *items, *ids;     // [E]; [kinds of ids, E], hashed to 32 bits, FREE where there is none
    const int64_t *groups;          // [attributes, E]
};

}  // namespace
