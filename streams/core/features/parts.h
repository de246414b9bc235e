// What the kernel is given: the arrays of all parts, and a batch. `kernel.py` has the same structures.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t FULL_RANGE = int64_t{1} << 32;
constexpr int64_t LONG_AGO_MS = -(int64_t{1} << 62);
constexpr int32_t FREE = -1;
constexpr int SESSIONS = 8;
constexpr int LANES_MAX = 1024;

enum Kind : int64_t { RING, DISTINCT, TOP_K, AFFINITY, LAST_K, SINCE, SESSION };
// Kinds of features that share one `Kind`: COUNTED to GREATEST a ring, LENGTH and DEPTH the sessions.
enum FieldKind : int64_t { COUNTED, TOTAL, MEAN, LEAST, GREATEST, OTHER, LENGTH, DEPTH };
enum Statistic : int32_t { COUNT, SUM, MIN, MAX, MEAN_SUM };

struct Accumulator {
    int32_t filter, number, statistic;  // number: -1 for the event itself
    int32_t reach;                      // tiles that the windows of its features can touch
    double initial;
};

struct Part {
    int64_t kind, hop_ms, tiles, cap, k, filter, column, accumulators, gap_ms;
    double half_life_ms;
    void *a, *b, *c, *d, *e;
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
    int64_t events, stride;         // stride: distance of two columns, in elements
    const int64_t *rows, *times_ms;
    const uint8_t *passes;          // [filters, E]
    const double *numbers;          // [numbers, E]
    const int64_t *items, *ids;     // [E]; [kinds of ids, E], hashed to 32 bits, FREE where there is none
    const int64_t *groups;          // [attributes, E]
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

// Return the first hop of a window, rounded down also below 0.
inline int64_t first_hop(int64_t as_of_ms, int64_t window_ms, int64_t hop_ms) {
    const int64_t begin_ms = as_of_ms - window_ms, hop = begin_ms / hop_ms;
    return hop - (hop * hop_ms > begin_ms);
}

}  // namespace
