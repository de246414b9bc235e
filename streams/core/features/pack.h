// Packs a user's state into bytes, and reads it back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parts.h"

namespace {

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
    const auto holds = [&](int64_t back, int64_t at) {
        const double number = numbers[(newest - back) % part.tiles * part.accumulators + at];
        return back < accumulators[at].reach && number != accumulators[at].initial;
    };
    const auto is_used = [&](int64_t back) {
        if (hops[(newest - back) % part.tiles] != newest - back) return false;
        for (int64_t at = 0; at < part.accumulators; ++at)
            if (holds(back, at)) return true;
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
            if (holds(back, at)) out.number(tile[at]);
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
    const auto *items = static_cast<int64_t *>(part.a) + row * part.k;
    const auto *times_ms = static_cast<int64_t *>(part.b) + row * part.k;
    int64_t used = 0;
    while (used < part.k && items[used]) ++used;
    out.whole(used);
    for (int64_t at = 0; at < used; ++at) {
        out.raw(items[at]);
        out.whole(at ? times_ms[at - 1] - times_ms[at] : times_ms[at]);
    }
}

void unpack_last_k(const Part &part, int64_t row, Reader &in) {
    auto *items = static_cast<int64_t *>(part.a) + row * part.k;
    auto *times_ms = static_cast<int64_t *>(part.b) + row * part.k;
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
    const auto *firsts = static_cast<int64_t *>(part.a) + row * SESSIONS;
    const auto *lasts = static_cast<int64_t *>(part.b) + row * SESSIONS;
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
    auto *firsts = static_cast<int64_t *>(part.a) + row * SESSIONS;
    auto *lasts = static_cast<int64_t *>(part.b) + row * SESSIONS;
    auto *depths = static_cast<int64_t *>(part.c) + row * SESSIONS;
    const int64_t used = in.below(SESSIONS);
    for (int64_t at = 0; at < used && !in.bad; ++at) {
        const auto time_ms = static_cast<int64_t>(in.whole());
        lasts[at] = at ? lasts[at - 1] - time_ms : time_ms;
        firsts[at] = lasts[at] - static_cast<int64_t>(in.whole());
        depths[at] = static_cast<int64_t>(in.whole());
    }
}

}  // namespace
