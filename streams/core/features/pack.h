// Packs a user's parts into bits, and reads them back. Times and hops are differences from the newest time of the user.
#pragma once

#include "bits.h"
#include "parts.h"

namespace {

// A user that is packed or unpacked.
struct User {
    int64_t row, newest_ms;  // of any part; FREE without one
};

int64_t newest_ms_of(const Part &part, int64_t row) {
    switch (part.kind) {
        case DISTINCT: return (static_cast<int64_t>(part.of<DistinctHead>(part.c, row, 1)->newest) - 1) * part.hop_ms;
        case AFFINITY: return part.of<RankingHead>(part.c, row, 1)->newest_ms - 1;
        case LAST_K: return *part.of<int64_t>(part.a, row, part.k) ? *part.of<int64_t>(part.b, row, part.k) : FREE;
        case SINCE: return static_cast<int64_t *>(part.a)[row] - 1;
        case SESSION: {
            const Session &newest = *part.of<Session>(part.a, row, SESSIONS);
            return newest.depth ? newest.last_ms : FREE;
        }
        default: return (newest_mark(part, row) - 1) * part.hop_ms;
    }
}

// Write a mark, 0 for none; return whether there is one.
bool put_mark(Writer &out, const Part &part, const User &user, int64_t mark) {
    out.put(mark > 0, 1);
    if (mark) out.gamma(user.newest_ms / part.hop_ms + 1 - mark + 1);
    return mark > 0;
}

int64_t get_mark(Reader &in, const Part &part, const User &user) {
    if (!in.get(1) || !in.check(user.newest_ms >= 0)) return 0;
    const int64_t newest = user.newest_ms / part.hop_ms + 1;
    return newest - in.below(newest);
}

// The same for times.
bool put_time(Writer &out, const User &user, int64_t time_ms) {
    out.put(time_ms >= 0, 1);
    if (time_ms >= 0) out.sized(user.newest_ms - time_ms);
    return time_ms >= 0;
}

int64_t get_time(Reader &in, const User &user) {
    return in.get(1) && in.check(user.newest_ms >= 0) ? user.newest_ms - in.sized(user.newest_ms) : FREE;
}

void pack_ring(const Part &part, const User &user, Writer &out) {
    const double *tiles = part.ring(user.row);
    const Accumulator *accumulators = part.accumulator();
    const int64_t newest = newest_mark(part, user.row), width = 1 + part.accumulators;
    if (!put_mark(out, part, user, newest)) return;
    const int64_t reach = std::min(part.tiles, newest);
    int64_t before = FREE, slot = (newest - 1) % part.tiles;
    for (int64_t back = 0; back < reach; ++back, slot = (slot ? slot : part.tiles) - 1) {
        const double *tile = tiles + slot * width;
        bool is_used = false;
        if (tile[0] != static_cast<double>(newest - back)) continue;
        for (int64_t at = 0; at < part.accumulators; ++at)
            is_used |= back < accumulators[at].reach && tile[1 + at] != accumulators[at].initial;
        if (!is_used) continue;
        out.gamma(back - before + 1);
        before = back;
        for (int64_t at = 0; at < part.accumulators; ++at) {
            if (back >= accumulators[at].reach) continue;
            if (accumulators[at].statistic == COUNT) out.gamma(static_cast<uint64_t>(tile[1 + at]) + 1);
            else out.number(tile[1 + at], accumulators[at].initial);
        }
    }
    out.gamma(1);  // no further tile
}

void unpack_ring(const Part &part, const User &user, Reader &in) {
    double *tiles = part.ring(user.row);
    const Accumulator *accumulators = part.accumulator();
    const int64_t newest = get_mark(in, part, user), width = 1 + part.accumulators;
    if (!newest) return;
    const int64_t reach = std::min(part.tiles, newest);
    const auto begin = [&](int64_t back) {
        double *tile = tiles + (newest - back - 1) % part.tiles * width;
        *tile++ = static_cast<double>(newest - back);
        for (int64_t at = 0; at < part.accumulators; ++at) tile[at] = accumulators[at].initial;
        return tile;
    };
    begin(0);
    for (int64_t back = FREE; !in.bad;) {
        const int64_t gap = in.below(part.tiles + 1);
        back += gap;
        if (!gap || !in.check(back < reach)) return;
        double *tile = begin(back);
        for (int64_t at = 0; at < part.accumulators; ++at) {
            if (back >= accumulators[at].reach) continue;
            if (accumulators[at].statistic == COUNT) tile[at] = static_cast<double>(in.below(COUNT_MAX));
            else tile[at] = in.number(accumulators[at].initial);
        }
    }
}

void pack_last_k(const Part &part, const User &user, Writer &out) {
    const auto *items = part.of<int64_t>(part.a, user.row, part.k);
    const auto *times_ms = part.of<int64_t>(part.b, user.row, part.k);
    int64_t used = 0;
    while (used < part.k && items[used]) ++used;
    out.gamma(used + 1);
    for (int64_t at = 0; at < used; ++at) {
        out.put_long(static_cast<uint64_t>(items[at]), 64);
        out.sized((at ? times_ms[at - 1] : user.newest_ms) - times_ms[at]);
    }
}

void unpack_last_k(const Part &part, const User &user, Reader &in) {
    auto *items = part.of<int64_t>(part.a, user.row, part.k);
    auto *times_ms = part.of<int64_t>(part.b, user.row, part.k);
    const int64_t used = in.below(part.k + 1);
    int64_t time_ms = user.newest_ms;
    for (int64_t at = 0; at < used && !in.bad; ++at) {
        const auto item = static_cast<int64_t>(in.get_long(64));
        if (!in.check(item && time_ms >= 0)) return;
        time_ms -= in.sized(time_ms);
        items[at] = item;
        times_ms[at] = time_ms;
    }
}

void pack_since(const Part &part, const User &user, Writer &out) {
    put_time(out, user, static_cast<int64_t *>(part.a)[user.row] - 1);
}

void unpack_since(const Part &part, const User &user, Reader &in) {
    static_cast<int64_t *>(part.a)[user.row] = get_time(in, user) + 1;
}

void pack_session(const Part &part, const User &user, Writer &out) {
    const Session *sessions = part.of<Session>(part.a, user.row, SESSIONS);
    int64_t used = 0;
    while (used < SESSIONS && sessions[used].depth) ++used;
    out.gamma(used + 1);
    for (int64_t at = 0; at < used; ++at) {
        out.sized((at ? sessions[at - 1].last_ms : user.newest_ms) - sessions[at].last_ms);
        out.sized(sessions[at].last_ms - sessions[at].first_ms);
        out.gamma(sessions[at].depth);
    }
}

void unpack_session(const Part &part, const User &user, Reader &in) {
    Session *sessions = part.of<Session>(part.a, user.row, SESSIONS);
    const int64_t used = in.below(SESSIONS + 1);
    int64_t last_ms = user.newest_ms;
    for (int64_t at = 0; at < used && !in.bad; ++at) {
        if (!in.check(last_ms >= 0)) return;
        last_ms -= in.sized(last_ms);
        const int64_t first_ms = last_ms - in.sized(last_ms);
        sessions[at] = {first_ms, last_ms, in.below(COUNT_MAX) + 1};
    }
}

// Forget a user: what is left of the arrays is not read before it is written.
void clear_part(const Part &part, int64_t row) {
    switch (part.kind) {
        case RING:
            for (int64_t at = 0; at < part.tiles; ++at) part.ring(row)[at * (1 + part.accumulators)] = 0;
            break;
        case DISTINCT: *part.of<DistinctHead>(part.c, row, 1) = {}; break;
        case TOP_K: std::fill_n(part.of<uint32_t>(part.b, row, part.tiles), part.tiles, 0); [[fallthrough]];
        case AFFINITY: *part.of<RankingHead>(part.c, row, 1) = {}; break;
        case LAST_K: std::fill_n(part.of<int64_t>(part.a, row, part.k), part.k, 0); break;
        case SINCE: static_cast<int64_t *>(part.a)[row] = 0; break;
        default: std::fill_n(part.of<Session>(part.a, row, SESSIONS), SESSIONS, Session{});
    }
}

// Return the most bytes that a part takes.
int64_t bytes_max(const Part &part) {
    int64_t bits = 300;
    switch (part.kind) {
        case RING: bits += part.tiles * (64 + 110 * part.accumulators); break;
        case DISTINCT: bits += part.cap * 48; break;
        case TOP_K: bits += part.cap * 32 + part.tiles * (64 + part.cap * 48); break;
        case AFFINITY: bits += part.cap * 96; break;
        case LAST_K: bits += part.k * 140; break;
        default: bits += SESSIONS * 256;
    }
    return bits / 8 + 1;
}

}  // namespace
