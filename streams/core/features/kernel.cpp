// The fast way of `FeatureState.add`, `pack` and `unpack`: one call for all parts, in place.
//
// The arrays belong to the Python classes: `tiles.py`, `distinct.py`, `rankings.py` and `recent.py` define what each part
// holds, and mean the same by every name.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

void add_to_ring(const Part &part, const Batch &batch) {
    auto *hops = static_cast<int32_t *>(part.a);
    auto *numbers = static_cast<double *>(part.b);
    auto *accumulators = static_cast<const Accumulator *>(part.c);
    for (int64_t e = 0; e < batch.events; ++e) {
        const int64_t hop = batch.times_ms[e] / part.hop_ms;
        const int64_t cell = batch.rows[e] * part.tiles + hop % part.tiles;
        double *tile = numbers + cell * part.accumulators;
        if (hops[cell] > hop) continue;
        if (hops[cell] < hop) {
            hops[cell] = static_cast<int32_t>(hop);
            for (int64_t at = 0; at < part.accumulators; ++at) tile[at] = accumulators[at].initial;
        }
        for (int64_t at = 0; at < part.accumulators; ++at) {
            const Accumulator &each = accumulators[at];
            if (!batch.passes[each.filter * batch.stride + e]) continue;
            const double number = each.number < 0 ? 1.0 : batch.numbers[each.number * batch.stride + e];
            if (std::isnan(number)) continue;
            switch (each.statistic) {
                case COUNT: tile[at] += 1; break;
                case SUM: tile[at] += number; break;
                case MIN: tile[at] = std::min(tile[at], number); break;
                default: tile[at] = std::max(tile[at], number);
            }
        }
    }
}

int64_t find(const int64_t *keys, int64_t cap, int64_t key) {
    int64_t found = FREE;
    for (int64_t lane = 0; lane < cap; ++lane) found = keys[lane] == key ? lane : found;  // without a branch: vectors
    return found;
}

void add_distinct(const Part &part, const Batch &batch) {
    auto *all_keys = static_cast<int64_t *>(part.a);
    auto *all_last = static_cast<int32_t *>(part.b);
    auto *newest = static_cast<int32_t *>(part.c);
    auto *theta = static_cast<int64_t *>(part.d);
    auto *dropped = static_cast<int32_t *>(part.e);
    for (int64_t e = 0; e < batch.events; ++e) {
        const int64_t key = batch.ids[part.column * batch.stride + e], row = batch.rows[e];
        if (!batch.passes[part.filter * batch.stride + e] || key == FREE) continue;
        const auto hop = static_cast<int32_t>(batch.times_ms[e] / part.hop_ms);
        newest[row] = std::max(newest[row], hop);
        const int64_t floor = newest[row] - part.tiles + 1;
        if (theta[row] < FULL_RANGE && dropped[row] < floor) theta[row] = FULL_RANGE, dropped[row] = FREE;
        int64_t *keys = all_keys + row * part.cap;
        int32_t *last = all_last + row * part.cap;
        int64_t lane = find(keys, part.cap, key);
        if (lane != FREE) {
            last[lane] = std::max(last[lane], hop);
            continue;
        }
        if (hop < floor) continue;
        if (key >= theta[row]) {
            dropped[row] = std::max(dropped[row], hop);
            continue;
        }
        int64_t largest = 0;
        for (lane = 0; lane < part.cap && keys[lane] != FREE && last[lane] >= floor; ++lane)
            if (keys[lane] > keys[largest]) largest = lane;
        if (lane == part.cap) {
            theta[row] = std::max(key, keys[largest]);
            const bool is_smaller = key < keys[largest];
            dropped[row] = std::max(dropped[row], is_smaller ? last[largest] : hop);
            if (!is_smaller) continue;
            lane = largest;
        }
        keys[lane] = key;
        last[lane] = hop;
    }
}

// Return the lane to give to a new value: the first free one, or that of the least worth.
template <typename Worth>
int64_t least(const int64_t *keys, int64_t cap, bool *dropped, Worth worth) {
    int64_t lane = 0;
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t at = 0; at < cap; ++at) {
        if (keys[at] == FREE) return at;
        const double found = worth(at);
        if (found < lowest) lowest = found, lane = at;
    }
    *dropped |= lowest > 0;
    return lane;
}

void add_top_k(const Part &part, const Batch &batch) {
    auto *all_keys = static_cast<int64_t *>(part.a);
    auto *all_hops = static_cast<int32_t *>(part.b);
    auto *all_counts = static_cast<int32_t *>(part.c);
    auto *dropped = static_cast<bool *>(part.d);
    for (int64_t e = 0; e < batch.events; ++e) {
        const int64_t key = batch.groups[part.column * batch.stride + e], row = batch.rows[e];
        if (!batch.passes[part.filter * batch.stride + e] || key < 0) continue;
        const auto hop = static_cast<int32_t>(batch.times_ms[e] / part.hop_ms);
        const int64_t tile = hop % part.tiles;
        int64_t *keys = all_keys + row * part.cap;
        int32_t *hops = all_hops + row * part.tiles, *counts = all_counts + row * part.cap * part.tiles;
        if (hops[tile] > hop) continue;
        if (hops[tile] < hop) {
            hops[tile] = hop;
            for (int64_t lane = 0; lane < part.cap; ++lane) counts[lane * part.tiles + tile] = 0;
        }
        int64_t lane = find(keys, part.cap, key);
        if (lane == FREE) {
            const int64_t floor = *std::max_element(hops, hops + part.tiles) - part.tiles + 1;
            lane = least(keys, part.cap, dropped + row, [&](int64_t at) {
                double total = 0;
                for (int64_t t = 0; t < part.tiles; ++t)
                    if (hops[t] >= floor) total += counts[at * part.tiles + t];
                return total;
            });
            keys[lane] = key;
            std::fill_n(counts + lane * part.tiles, part.tiles, 0);
        }
        ++counts[lane * part.tiles + tile];
    }
}

void add_affinity(const Part &part, const Batch &batch) {
    auto *all_keys = static_cast<int64_t *>(part.a);
    auto *all_sums = static_cast<double *>(part.b);
    auto *newest_ms = static_cast<int64_t *>(part.c);
    auto *dropped = static_cast<bool *>(part.d);
    const auto decay = [&](int64_t later_ms) { return std::exp2(std::max(later_ms / part.half_life_ms, -1100.0)); };
    for (int64_t e = 0; e < batch.events; ++e) {
        const int64_t key = batch.groups[part.column * batch.stride + e], row = batch.rows[e];
        if (!batch.passes[part.filter * batch.stride + e] || key < 0) continue;
        int64_t *keys = all_keys + row * part.cap;
        double *sums = all_sums + row * part.cap;
        const int64_t time_ms = batch.times_ms[e];
        if (time_ms > newest_ms[row]) {
            const double factor = decay(newest_ms[row] - time_ms);
            for (int64_t lane = 0; lane < part.cap; ++lane) sums[lane] *= factor;
            newest_ms[row] = time_ms;
        }
        int64_t lane = find(keys, part.cap, key);
        if (lane == FREE) {
            lane = least(keys, part.cap, dropped + row, [&](int64_t at) { return sums[at]; });
            keys[lane] = key;
            sums[lane] = 0;
        }
        sums[lane] += decay(time_ms - newest_ms[row]);
    }
}

void add_last_k(const Part &part, const Batch &batch) {
    auto *all_items = static_cast<int64_t *>(part.a), *all_times_ms = static_cast<int64_t *>(part.b);
    for (int64_t e = 0; e < batch.events; ++e) {
        if (!batch.passes[part.filter * batch.stride + e]) continue;
        int64_t *items = all_items + batch.rows[e] * part.k, *times_ms = all_times_ms + batch.rows[e] * part.k;
        int64_t place = 0;
        while (place < part.k && times_ms[place] > batch.times_ms[e]) ++place;
        if (place == part.k) continue;
        std::copy_backward(items + place, items + part.k - 1, items + part.k);
        std::copy_backward(times_ms + place, times_ms + part.k - 1, times_ms + part.k);
        items[place] = batch.items[e];
        times_ms[place] = batch.times_ms[e];
    }
}

void add_since(const Part &part, const Batch &batch) {
    auto *last_ms = static_cast<int64_t *>(part.a);
    for (int64_t e = 0; e < batch.events; ++e)
        if (batch.passes[part.filter * batch.stride + e])
            last_ms[batch.rows[e]] = std::max(last_ms[batch.rows[e]], batch.times_ms[e]);
}

void add_session(const Part &part, const Batch &batch) {
    auto *all_first = static_cast<int64_t *>(part.a), *all_last = static_cast<int64_t *>(part.b);
    auto *all_depths = static_cast<int64_t *>(part.c);
    for (int64_t e = 0; e < batch.events; ++e) {
        if (!batch.passes[part.filter * batch.stride + e]) continue;
        const int64_t at = batch.rows[e] * SESSIONS;
        int64_t *firsts = all_first + at, *lasts = all_last + at, *depths = all_depths + at;
        int64_t first = batch.times_ms[e], last = first, depth = 1;
        int kept = 0;
        for (int s = 0; s < SESSIONS; ++s) {  // take out those in reach
            if (depths[s] && first - lasts[s] <= part.gap_ms && firsts[s] - last <= part.gap_ms) {
                first = std::min(first, firsts[s]), last = std::max(last, lasts[s]), depth += depths[s];
            } else if (depths[s]) {
                firsts[kept] = firsts[s], lasts[kept] = lasts[s], depths[kept] = depths[s], ++kept;
            }
        }
        int place = 0;
        while (place < kept && lasts[place] >= last) ++place;
        if (place == SESSIONS) continue;
        if (kept == SESSIONS) --kept;
        for (int s = kept; s > place; --s)
            firsts[s] = firsts[s - 1], lasts[s] = lasts[s - 1], depths[s] = depths[s - 1];
        firsts[place] = first, lasts[place] = last, depths[place] = depth;
        for (int s = kept + 1; s < SESSIONS; ++s) firsts[s] = lasts[s] = LONG_AGO_MS, depths[s] = 0;
    }
}

// The bytes of a user: its parts in order, each in the order of `pack_...` below. Whole numbers take seven bits a byte,
// lowest first; times and hops are differences from the newest. A number of an event is written as a whole number if it
// is one: folded so that small negative ones are short, and doubled, because an odd first byte announces 8 bytes of a
// double (1), or the value that the accumulator began with (3).
struct Writer {
    uint8_t *at, *end;
    bool full = false;

    void byte(uint8_t value) {
        if (at == end) full = true;
        else *at++ = value;
    }
    void whole(uint64_t value) {
        for (; value >= 128; value >>= 7) byte(static_cast<uint8_t>(value | 128));
        byte(static_cast<uint8_t>(value));
    }
    template <typename T>
    void raw(T value) {
        if (end - at < static_cast<int64_t>(sizeof value)) { full = true; return; }
        std::memcpy(at, &value, sizeof value);
        at += sizeof value;
    }
    void number(double value) {
        if (std::floor(value) == value && std::fabs(value) < 9e15 && !(value == 0 && std::signbit(value))) {
            const auto whole_value = static_cast<int64_t>(value);
            const auto folded = (static_cast<uint64_t>(whole_value) << 1) ^ static_cast<uint64_t>(whole_value >> 63);
            whole(folded << 1);
        } else {
            byte(1);
            raw(value);
        }
    }
};

struct Reader {
    const uint8_t *at, *end;
    bool bad = false;

    uint8_t byte() {
        if (at >= end) { bad = true; return 0; }
        return *at++;
    }
    uint64_t whole() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const uint8_t next = byte();
            value |= static_cast<uint64_t>(next & 127) << shift;
            if (next < 128) return value;
        }
        bad = true;
        return 0;
    }
    int64_t below(int64_t limit) {  // a whole number that may be at most `limit`
        const uint64_t value = whole();
        if (value > static_cast<uint64_t>(limit)) { bad = true; return 0; }
        return static_cast<int64_t>(value);
    }
    template <typename T>
    T raw() {
        T value{};
        if (end - at < static_cast<int64_t>(sizeof value)) { bad = true; return value; }
        std::memcpy(&value, at, sizeof value);
        at += sizeof value;
        return value;
    }
    double number() {
        if (at < end && *at == 1) { ++at; return raw<double>(); }
        const uint64_t folded = whole() >> 1;
        return static_cast<double>(static_cast<int64_t>(folded >> 1) ^ -static_cast<int64_t>(folded & 1));
    }
};

int64_t code_of(const Names &names, uint32_t hash) {
    const uint32_t *found = std::lower_bound(names.sorted, names.sorted + names.count, hash);
    return found != names.sorted + names.count && *found == hash ? names.codes[found - names.sorted] : FREE;
}

template <typename T>
int32_t newest_of(const T *hops, int64_t count) { return *std::max_element(hops, hops + count); }

void pack_ring(const Part &part, int64_t row, Writer &out) {
    const auto *hops = static_cast<int32_t *>(part.a) + row * part.tiles;
    const auto *numbers = static_cast<double *>(part.b) + row * part.tiles * part.accumulators;
    const auto *accumulators = static_cast<const Accumulator *>(part.c);
    const int32_t newest = newest_of(hops, part.tiles);
    out.whole(newest + 1);
    if (newest < 0) return;
    const auto is_used = [&](int64_t back) {
        const int64_t tile = (newest - back) % part.tiles;
        if (hops[tile] != newest - back) return false;
        for (int64_t at = 0; at < part.accumulators; ++at)
            if (accumulators[at].statistic == COUNT && numbers[tile * part.accumulators + at]) return true;
        return false;
    };
    int64_t used = 0;
    for (int64_t back = 0; back < std::min<int64_t>(part.tiles, newest + 1); ++back) used += is_used(back);
    out.whole(used);
    int64_t before = 0;
    for (int64_t back = 0; back < std::min<int64_t>(part.tiles, newest + 1); ++back) {
        if (!is_used(back)) continue;
        out.whole(back - before);
        before = back;
        const double *tile = numbers + (newest - back) % part.tiles * part.accumulators;
        for (int64_t at = 0; at < part.accumulators; ++at)
            if (accumulators[at].statistic == COUNT || tile[at] != accumulators[at].initial) out.number(tile[at]);
            else out.byte(3);  // as it began
    }
}

void unpack_ring(const Part &part, int64_t row, Reader &in) {
    auto *hops = static_cast<int32_t *>(part.a) + row * part.tiles;
    auto *numbers = static_cast<double *>(part.b) + row * part.tiles * part.accumulators;
    const auto *accumulators = static_cast<const Accumulator *>(part.c);
    const int64_t newest = in.below(std::numeric_limits<int32_t>::max()) - 1;
    if (newest < 0) return;
    const int64_t used = in.below(part.tiles);
    int64_t back = 0;
    for (int64_t n = 0; n < used && !in.bad; ++n) {
        back += in.below(part.tiles);
        if (back >= part.tiles || back > newest) { in.bad = true; return; }
        const int64_t tile = (newest - back) % part.tiles;
        hops[tile] = static_cast<int32_t>(newest - back);
        for (int64_t at = 0; at < part.accumulators; ++at) {
            const bool as_it_began = in.at < in.end && *in.at == 3;
            if (as_it_began) ++in.at;
            numbers[tile * part.accumulators + at] = as_it_began ? accumulators[at].initial : in.number();
        }
    }
    hops[newest % part.tiles] = static_cast<int32_t>(newest);
}

void pack_distinct(const Part &part, int64_t row, Writer &out) {
    const auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    const auto *last = static_cast<int32_t *>(part.b) + row * part.cap;
    const int32_t newest = static_cast<int32_t *>(part.c)[row], dropped = static_cast<int32_t *>(part.e)[row];
    const int64_t theta = static_cast<int64_t *>(part.d)[row], floor = newest - part.tiles + 1;
    out.whole(newest + 1);
    if (newest < 0) return;
    const bool is_sampled = theta < FULL_RANGE && dropped >= floor;
    out.whole(is_sampled ? newest - dropped + 1 : 0);
    if (is_sampled) out.raw(static_cast<uint32_t>(theta));
    int64_t used = 0;
    for (int64_t lane = 0; lane < part.cap; ++lane) used += keys[lane] != FREE && last[lane] >= floor;
    out.whole(used);
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        if (keys[lane] == FREE || last[lane] < floor) continue;
        out.raw(static_cast<uint32_t>(keys[lane]));
        out.whole(newest - last[lane]);
    }
}

void unpack_distinct(const Part &part, int64_t row, Reader &in) {
    auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    auto *last = static_cast<int32_t *>(part.b) + row * part.cap;
    const int64_t newest = in.below(std::numeric_limits<int32_t>::max()) - 1;
    if (newest < 0) return;
    static_cast<int32_t *>(part.c)[row] = static_cast<int32_t>(newest);
    if (const int64_t since = in.below(part.tiles)) {
        static_cast<int32_t *>(part.e)[row] = static_cast<int32_t>(newest - since + 1);
        static_cast<int64_t *>(part.d)[row] = in.raw<uint32_t>();
    }
    const int64_t used = in.below(part.cap);
    for (int64_t lane = 0; lane < used && !in.bad; ++lane) {
        keys[lane] = in.raw<uint32_t>();
        last[lane] = static_cast<int32_t>(newest - in.below(part.tiles));
    }
}

void pack_top_k(const Part &part, int64_t row, Writer &out) {
    const auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    const auto *hops = static_cast<int32_t *>(part.b) + row * part.tiles;
    const auto *counts = static_cast<int32_t *>(part.c) + row * part.cap * part.tiles;
    const auto &names = *static_cast<const Names *>(part.e);
    const int32_t newest = newest_of(hops, part.tiles);
    out.whole(newest + 1);
    if (newest < 0) return;
    out.byte(static_cast<bool *>(part.d)[row]);
    const auto count_of = [&](int64_t lane, int64_t back) {
        const int64_t tile = (newest - back) % part.tiles;
        return hops[tile] == newest - back ? counts[lane * part.tiles + tile] : 0;
    };
    const int64_t reach = std::min<int64_t>(part.tiles, newest + 1);
    const auto tiles_of = [&](int64_t lane) {
        int64_t used = 0;
        for (int64_t back = 0; back < reach; ++back) used += count_of(lane, back) > 0;
        return keys[lane] == FREE ? 0 : used;
    };
    int64_t lanes = 0;
    for (int64_t lane = 0; lane < part.cap; ++lane) lanes += tiles_of(lane) > 0;
    out.whole(lanes);
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        const int64_t used = tiles_of(lane);
        if (!used) continue;
        out.raw(names.hashes[keys[lane]]);
        out.whole(used);
        int64_t before = 0;
        for (int64_t back = 0; back < reach; ++back) {
            if (!count_of(lane, back)) continue;
            out.whole(back - before);
            before = back;
            out.whole(count_of(lane, back));
        }
    }
}

void unpack_top_k(const Part &part, int64_t row, Reader &in) {
    auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    auto *hops = static_cast<int32_t *>(part.b) + row * part.tiles;
    auto *counts = static_cast<int32_t *>(part.c) + row * part.cap * part.tiles;
    const auto &names = *static_cast<const Names *>(part.e);
    const int64_t newest = in.below(std::numeric_limits<int32_t>::max()) - 1;
    if (newest < 0) return;
    bool *dropped = static_cast<bool *>(part.d) + row;
    *dropped = in.byte() != 0;
    hops[newest % part.tiles] = static_cast<int32_t>(newest);
    const int64_t lanes = in.below(part.cap);
    for (int64_t lane = 0, n = 0; n < lanes && !in.bad; ++n) {
        const int64_t code = code_of(names, in.raw<uint32_t>());
        const int64_t used = in.below(part.tiles);
        int64_t back = 0;
        for (int64_t t = 0; t < used && !in.bad; ++t) {
            back += in.below(part.tiles);
            const int64_t count = in.below(std::numeric_limits<int32_t>::max());
            if (back >= part.tiles || back > newest) { in.bad = true; return; }
            const int64_t tile = (newest - back) % part.tiles;
            if (code != FREE) counts[lane * part.tiles + tile] = static_cast<int32_t>(count);
            hops[tile] = static_cast<int32_t>(newest - back);
        }
        if (code != FREE) keys[lane++] = code;
        else *dropped = true;
    }
}

void pack_affinity(const Part &part, int64_t row, Writer &out) {
    const auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    const auto *sums = static_cast<double *>(part.b) + row * part.cap;
    const auto &names = *static_cast<const Names *>(part.e);
    const int64_t newest_ms = static_cast<int64_t *>(part.c)[row];
    out.whole(newest_ms < 0 ? 0 : newest_ms + 1);
    if (newest_ms < 0) return;
    out.byte(static_cast<bool *>(part.d)[row]);
    int64_t used = 0;
    for (int64_t lane = 0; lane < part.cap; ++lane) used += keys[lane] != FREE && sums[lane] > 0;
    out.whole(used);
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        if (keys[lane] == FREE || !(sums[lane] > 0)) continue;
        out.raw(names.hashes[keys[lane]]);
        out.raw(sums[lane]);
    }
}

void unpack_affinity(const Part &part, int64_t row, Reader &in) {
    auto *keys = static_cast<int64_t *>(part.a) + row * part.cap;
    auto *sums = static_cast<double *>(part.b) + row * part.cap;
    const auto &names = *static_cast<const Names *>(part.e);
    const int64_t newest_ms = static_cast<int64_t>(in.whole()) - 1;
    if (newest_ms < 0) return;
    static_cast<int64_t *>(part.c)[row] = newest_ms;
    bool *dropped = static_cast<bool *>(part.d) + row;
    *dropped = in.byte() != 0;
    const int64_t used = in.below(part.cap);
    for (int64_t lane = 0, n = 0; n < used && !in.bad; ++n) {
        const int64_t code = code_of(names, in.raw<uint32_t>());
        const double sum = in.raw<double>();
        if (code != FREE) keys[lane] = code, sums[lane++] = sum;
        else *dropped = true;
    }
}

void pack_last_k(const Part &part, int64_t row, Writer &out) {
    const auto *items = static_cast<int64_t *>(part.a) + row * part.k, *times_ms = static_cast<int64_t *>(part.b) + row * part.k;
    int64_t used = 0;
    while (used < part.k && items[used]) ++used;
    out.whole(used);
    for (int64_t at = 0; at < used; ++at) {
        out.raw(items[at]);
        out.whole(at ? times_ms[at - 1] - times_ms[at] : times_ms[at]);
    }
}

void unpack_last_k(const Part &part, int64_t row, Reader &in) {
    auto *items = static_cast<int64_t *>(part.a) + row * part.k, *times_ms = static_cast<int64_t *>(part.b) + row * part.k;
    const int64_t used = in.below(part.k);
    for (int64_t at = 0; at < used && !in.bad; ++at) {
        items[at] = in.raw<int64_t>();
        const auto time_ms = static_cast<int64_t>(in.whole());
        times_ms[at] = at ? times_ms[at - 1] - time_ms : time_ms;
    }
}

void pack_since(const Part &part, int64_t row, Writer &out) {
    const int64_t last_ms = static_cast<int64_t *>(part.a)[row];
    out.whole(last_ms < 0 ? 0 : last_ms + 1);
}

void unpack_since(const Part &part, int64_t row, Reader &in) {
    if (const auto last_ms = static_cast<int64_t>(in.whole())) static_cast<int64_t *>(part.a)[row] = last_ms - 1;
}

void pack_session(const Part &part, int64_t row, Writer &out) {
    const auto *firsts = static_cast<int64_t *>(part.a) + row * SESSIONS, *lasts = static_cast<int64_t *>(part.b) + row * SESSIONS;
    const auto *depths = static_cast<int64_t *>(part.c) + row * SESSIONS;
    int64_t used = 0;
    while (used < SESSIONS && depths[used]) ++used;
    out.whole(used);
    for (int64_t at = 0; at < used; ++at) {
        out.whole(at ? lasts[at - 1] - lasts[at] : lasts[at]);
        out.whole(lasts[at] - firsts[at]);
        out.whole(depths[at]);
    }
}

void unpack_session(const Part &part, int64_t row, Reader &in) {
    auto *firsts = static_cast<int64_t *>(part.a) + row * SESSIONS, *lasts = static_cast<int64_t *>(part.b) + row * SESSIONS;
    auto *depths = static_cast<int64_t *>(part.c) + row * SESSIONS;
    const int64_t used = in.below(SESSIONS);
    for (int64_t at = 0; at < used && !in.bad; ++at) {
        const auto time_ms = static_cast<int64_t>(in.whole());
        lasts[at] = at ? lasts[at - 1] - time_ms : time_ms;
        firsts[at] = lasts[at] - static_cast<int64_t>(in.whole());
        depths[at] = static_cast<int64_t>(in.whole());
    }
}

using Add = void (*)(const Part &, const Batch &);
using Pack = void (*)(const Part &, int64_t, Writer &);
using Unpack = void (*)(const Part &, int64_t, Reader &);
constexpr Add ADD[] = {add_to_ring, add_distinct, add_top_k, add_affinity, add_last_k, add_since, add_session};
constexpr Pack PACK[] = {pack_ring, pack_distinct, pack_top_k, pack_affinity, pack_last_k, pack_since, pack_session};
constexpr Unpack UNPACK[] = {unpack_ring,   unpack_distinct, unpack_top_k,  unpack_affinity,
                             unpack_last_k, unpack_since,    unpack_session};

}  // namespace

// Write the state of users one after another to `out`, and where each ends; return the bytes, -1 if they do not fit.
extern "C" int64_t pack_users(
    const Part *parts, int64_t count, const int64_t *rows, int64_t users, uint8_t *out, int64_t size, int64_t *ends
) {
    Writer writer{out, out + size};
    for (int64_t user = 0; user < users; ++user) {
        for (int64_t at = 0; at < count; ++at) PACK[parts[at].kind](parts[at], rows[user], writer);
        if (writer.full) return -1;
        ends[user] = writer.at - out;
    }
    return writer.at - out;
}

// Read what `pack_users` wrote into cleared rows; return the first user whose bytes are not that, -1 if there is none.
extern "C" int64_t unpack_users(
    const Part *parts, int64_t count, const int64_t *rows, int64_t users, const uint8_t *in, const int64_t *ends
) {
    for (int64_t user = 0; user < users; ++user) {
        Reader reader{in + (user ? ends[user - 1] : 0), in + ends[user]};
        for (int64_t at = 0; at < count && !reader.bad; ++at) UNPACK[parts[at].kind](parts[at], rows[user], reader);
        if (reader.bad || reader.at != reader.end) return user;
    }
    return -1;
}

extern "C" void add_events(const Part *parts, int64_t count, const Batch *batch) {
    for (int64_t at = 0; at < count; ++at) ADD[parts[at].kind](parts[at], *batch);
}
