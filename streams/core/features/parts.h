// What the kernel is given: the arrays of all parts, and a batch. `structures.py` has the same structures.
//
// An array begins as zeros, and zero means "nothing", so that rows that were never used take no memory. A hop is
// therefore kept as its *mark*, the number of the hop plus one, and a time in ms plus one where 0 could be a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t FREE = -1;
constexpr int64_t NEVER_MS = int64_t{1} << 62;
constexpr int64_t LATEST_MS = int64_t{1} << 50;
constexpr double FULL_RANGE = 4294967296.0;  // of the hashes of ids
constexpr int64_t SESSIONS = 8;
constexpr int64_t LANES_MAX = 1024;
constexpr int64_t COUNT_MAX = int64_t{1} << 53;
constexpr uint16_t TILE_COUNT_MAX = 65535;

enum Kind : int64_t { RING, DISTINCT, TOP_K, AFFINITY, LAST_K, SINCE, SESSION };
// Kinds of features that share one `Kind`: COUNTED to GREATEST a ring, LENGTH and DEPTH the sessions.
enum FieldKind : int64_t { COUNTED, TOTAL, MEAN, LEAST, GREATEST, OTHER, LENGTH, DEPTH };
enum Statistic : int32_t { COUNT, SUM, MIN, MAX, MEAN_SUM };

struct Accumulator {
    int32_t filter, number, statistic;  // number: -1 for the event itself
    int32_t reach;                      // tiles that the windows of its features can touch
    double initial;
};

// The arrays, each with one entry per row; L is `cap`, T `tiles`, A `accumulators`:
//
//     RING      tiles: a mark and A numbers [T, 1 + A]            accumulators [A]
//     DISTINCT  keys [L]        last: marks [L]    heads
//     TOP_K     keys [L]        marks [T]          heads    counts [T, L]    names
//     AFFINITY  keys [L]        sums [L]           heads                     names
//     LAST_K    items [k]       times [k]
//     SINCE     times
//     SESSION   sessions [8]
struct Part {
    int64_t kind, hop_ms, tiles, cap, k, filter, column, accumulators, gap_ms, half_life_ms;
    void *a, *b, *c, *d, *e;

    template <typename T>
    T *of(void *array, int64_t row, int64_t width) const { return static_cast<T *>(array) + row * width; }
    double *ring(int64_t row) const { return of<double>(a, row, tiles * (1 + accumulators)); }
    const Accumulator *accumulator() const { return static_cast<const Accumulator *>(c); }
};

struct DistinctHead {
    uint32_t newest, theta, dropped, used;  // marks of hops; theta: 0 for the full range; used: lanes
};

struct RankingHead {
    int64_t newest_ms;       // of AFFINITY: plus one
    uint32_t dropped, used;  // TOP_K: newest mark of the counts that are missing; AFFINITY: whether a sum is missing
};

struct Session {
    int64_t first_ms, last_ms, depth;  // no session if the depth is 0; newest first
};

// Texts as JSON strings, one after another; `starts` has one more, the end of the last.
struct Texts {
    const char *bytes;
    const int64_t *starts;
};

// The values of an item attribute, by code and by hash: what is stored must outlive the codes.
struct Names {
    int64_t count;
    const uint32_t *hashes;  // by code
    const uint32_t *sorted;  // ascending
    const int64_t *codes;    // of `sorted`
    Texts texts;             // by code

    int64_t code(uint32_t hash) const {
        const uint32_t *found = std::lower_bound(sorted, sorted + count, hash);
        return found != sorted + count && *found == hash ? codes[found - sorted] : FREE;
    }
};

// The items whose ids are known. Keys are hashes, so their upper bits find a key's bucket of about one.
struct Items {
    int64_t count, shift;
    const int64_t *keys;     // ascending
    const int64_t *buckets;  // first place of each bucket, and of the one after the last
    Texts texts;

    int64_t place(int64_t key) const {
        if (!count) return FREE;
        const auto bucket = (static_cast<uint64_t>(key) ^ uint64_t{1} << 63) >> shift;  // in the order of the keys
        for (int64_t at = buckets[bucket]; at < buckets[bucket + 1]; ++at)
            if (keys[at] == key) return at;
        return FREE;
    }
};

// A feature of the output.
struct Field {
    int64_t part, kind, window_ms;
    int64_t count, number;  // accumulators of its ring; `count` is that of a mean's numbers
    int64_t estimate;       // its column among the features that may be estimates, FREE for the others
    Texts name;             // with the colon
    const Items *items;
};

struct Batch {
    int64_t events, stride;  // stride: distance of two columns, in elements
    const int64_t *rows, *times_ms;
    const uint8_t *passes;  // [filters, E]
    const double *numbers;  // [numbers, E]
    const int64_t *items;   // [E]
    const uint32_t *ids;    // [kinds of ids, E], hashed to 32 bits, 0 where there is none
    const int32_t *groups;  // [attributes, E]
};

// The users whose values are wanted, and what is found beside the values.
struct Moments {
    int64_t users, stride;  // stride: number of fields that may be estimates
    const int64_t *rows, *as_of_ms;
    int64_t *ends, *until_ms;
    uint8_t *estimates;
};

// All parts, all fields, and the completeness of each field [R, fields].
struct State {
    int64_t part_count, field_count;
    const Part *parts;
    const Field *fields;
    int64_t *complete_from_ms;  // 0: all events are contained
    uint8_t *is_partial;        // [R] whether any is not 0
    uint8_t header[16];         // format and hash of the feature set, before each packed user
};

// Return the mark of the first hop of a window; it may be below that of every hop.
inline int64_t first_mark(int64_t as_of_ms, int64_t window_ms, int64_t hop_ms) {
    const int64_t begin_ms = as_of_ms - window_ms, hop = begin_ms / hop_ms;
    return std::max<int64_t>(hop - (hop * hop_ms > begin_ms), 0) + 1;  // rounded down, also below 0
}

// Return the newest mark of a ring or of the tiles of a ranking, 0 without one.
inline int64_t newest_mark(const Part &part, int64_t row) {
    int64_t newest = 0;
    if (part.kind == RING) {
        const double *tile = part.ring(row);
        for (int64_t at = 0; at < part.tiles; ++at, tile += 1 + part.accumulators)
            newest = std::max(newest, static_cast<int64_t>(*tile));
    } else {
        const auto *marks = part.of<uint32_t>(part.b, row, part.tiles);
        newest = *std::max_element(marks, marks + part.tiles);
    }
    return newest;
}

}  // namespace
