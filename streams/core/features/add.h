// Adds a batch to a part, event by event and in place.
#pragma once

#include <cmath>
#include <limits>

#include "parts.h"

namespace {

void add_to_ring(const Part &part, const Batch &batch) {
    const Accumulator *accumulators = part.accumulator();
    for (int64_t e = 0; e < batch.events; ++e) {
        const int64_t hop = batch.times_ms[e] / part.hop_ms;
        double *tile = part.ring(batch.rows[e]) + hop % part.tiles * (1 + part.accumulators);
        const auto mark = static_cast<double>(hop + 1);
        if (tile[0] > mark) continue;  // the hop is older than the ring reaches
        const bool is_new = tile[0] < mark;
        *tile++ = mark;
        if (is_new)
            for (int64_t at = 0; at < part.accumulators; ++at) tile[at] = accumulators[at].initial;
        for (int64_t at = 0; at < part.accumulators; ++at) {
            const Accumulator &each = accumulators[at];
            if (!batch.passes[each.filter * batch.stride + e]) continue;
            const double number = each.number < 0 ? 1.0 : batch.numbers[each.number * batch.stride + e];
            if (!std::isfinite(number)) continue;
            switch (each.statistic) {
                case COUNT: tile[at] += 1; break;
                case MIN: tile[at] = std::min(tile[at], number); break;
                case MAX: tile[at] = std::max(tile[at], number); break;
                default: tile[at] += number;
            }
        }
    }
}

template <typename Key>
int64_t find(const Key *keys, int64_t used, Key key) {
    int32_t found = FREE;
    for (int32_t lane = 0; lane < used; ++lane) found = keys[lane] == key ? lane : found;  // without a branch: vectors
    return found;
}

// Return a lane for a new id among lanes that are all in use: one whose id has left the window, or that of the largest
// key, which is dropped; FREE if that is the new id itself.
int64_t give_up(
    DistinctHead &head, const Part &part, const uint32_t *keys, const uint32_t *last, uint32_t key, uint32_t mark
) {
    const int64_t oldest = static_cast<int64_t>(head.newest) - part.tiles + 1;
    int64_t largest = 0;
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        if (last[lane] < oldest) return lane;
        if (keys[lane] > keys[largest]) largest = lane;
    }
    const bool is_smaller = key < keys[largest];
    head.theta = std::max(key, keys[largest]);
    head.dropped = std::max(head.dropped, is_smaller ? last[largest] : mark);
    return is_smaller ? largest : FREE;
}

void add_distinct(const Part &part, const Batch &batch) {
    for (int64_t e = 0; e < batch.events; ++e) {
        const uint32_t key = batch.ids[part.column * batch.stride + e];
        if (!batch.passes[part.filter * batch.stride + e] || !key) continue;
        const int64_t row = batch.rows[e];
        const auto mark = static_cast<uint32_t>(batch.times_ms[e] / part.hop_ms + 1);
        DistinctHead &head = *part.of<DistinctHead>(part.c, row, 1);
        head.newest = std::max(head.newest, mark);
        const int64_t oldest = static_cast<int64_t>(head.newest) - part.tiles + 1;
        if (head.dropped < oldest) head.theta = head.dropped = 0;  // what was dropped has left every window
        auto *keys = part.of<uint32_t>(part.a, row, part.cap), *last = part.of<uint32_t>(part.b, row, part.cap);
        int64_t lane = find(keys, head.used, key);
        if (lane != FREE) {
            last[lane] = std::max(last[lane], mark);
            continue;
        }
        if (mark < oldest) continue;
        if (head.theta && key >= head.theta) {
            head.dropped = std::max(head.dropped, mark);
            continue;
        }
        lane = head.used < part.cap ? head.used++ : give_up(head, part, keys, last, key, mark);
        if (lane == FREE) continue;
        keys[lane] = key;
        last[lane] = mark;
    }
}

// Return the lane of the least total, of equal ones that of the last name.
template <typename Total>
int64_t least(const Total *totals, const int32_t *keys, int64_t cap) {
    int64_t found = 0;
    for (int64_t lane = 1; lane < cap; ++lane)
        if (totals[lane] < totals[found] || (totals[lane] == totals[found] && keys[lane] > keys[found])) found = lane;
    return found;
}

// Add the counts of all tiles from a mark on to `totals`; return the oldest mark with a count, 0 without one.
int64_t sum_tiles(const Part &part, int64_t row, int64_t used, int64_t first, uint32_t *totals) {
    const auto *marks = part.of<uint32_t>(part.b, row, part.tiles);
    const auto *counts = part.of<uint16_t>(part.d, row, part.tiles * part.cap);
    std::fill_n(totals, used, 0);
    int64_t oldest = 0;
    for (int64_t tile = 0; tile < part.tiles; ++tile, counts += part.cap) {
        if (!marks[tile] || marks[tile] < first) continue;
        uint16_t any = 0;
        for (int64_t lane = 0; lane < used; ++lane) totals[lane] += counts[lane], any |= counts[lane];
        if (any && (!oldest || marks[tile] < oldest)) oldest = marks[tile];
    }
    return oldest;
}

// Return the lane of the value with the fewest events among lanes that are all in use, cleared.
int64_t give_up(RankingHead &head, const Part &part, int64_t row) {
    uint32_t totals[LANES_MAX];
    const auto *marks = part.of<uint32_t>(part.b, row, part.tiles);
    auto *counts = part.of<uint16_t>(part.d, row, part.tiles * part.cap);
    sum_tiles(part, row, part.cap, newest_mark(part, row) - part.tiles + 1, totals);
    const int64_t lane = least(totals, part.of<int32_t>(part.a, row, part.cap), part.cap);
    for (int64_t tile = 0; tile < part.tiles; ++tile) {
        uint16_t &count = counts[tile * part.cap + lane];
        if (count) head.dropped = std::max(head.dropped, marks[tile]);
        count = 0;
    }
    return lane;
}

void add_top_k(const Part &part, const Batch &batch) {
    for (int64_t e = 0; e < batch.events; ++e) {
        const int32_t key = batch.groups[part.column * batch.stride + e];
        if (!batch.passes[part.filter * batch.stride + e] || key < 0) continue;
        const int64_t row = batch.rows[e], hop = batch.times_ms[e] / part.hop_ms, tile = hop % part.tiles;
        const auto mark = static_cast<uint32_t>(hop + 1);
        uint32_t &kept = part.of<uint32_t>(part.b, row, part.tiles)[tile];
        uint16_t *counts = part.of<uint16_t>(part.d, row, part.tiles * part.cap) + tile * part.cap;
        if (kept > mark) continue;
        if (kept < mark) std::fill_n(counts, part.cap, 0);
        kept = mark;
        RankingHead &head = *part.of<RankingHead>(part.c, row, 1);
        auto *keys = part.of<int32_t>(part.a, row, part.cap);
        int64_t lane = find(keys, head.used, key);
        if (lane == FREE) {
            lane = head.used < part.cap ? head.used++ : give_up(head, part, row);
            keys[lane] = key;
        }
        if (counts[lane] < TILE_COUNT_MAX) ++counts[lane];
        else head.dropped = std::max(head.dropped, mark);
    }
}

// Return what an event counts as of the begin of the half-life in which `newest_ms` is: 1 at that begin, less before.
double weight(const Part &part, int64_t time_ms, int64_t newest_ms) {
    const int64_t begin_ms = newest_ms - newest_ms % part.half_life_ms;
    const auto later_ms = static_cast<double>(time_ms - begin_ms);
    return std::exp2(std::max(later_ms / static_cast<double>(part.half_life_ms), -1100.0));
}

void add_affinity(const Part &part, const Batch &batch) {
    for (int64_t e = 0; e < batch.events; ++e) {
        const int32_t key = batch.groups[part.column * batch.stride + e];
        if (!batch.passes[part.filter * batch.stride + e] || key < 0) continue;
        const int64_t row = batch.rows[e], time_ms = batch.times_ms[e];
        RankingHead &head = *part.of<RankingHead>(part.c, row, 1);
        auto *keys = part.of<int32_t>(part.a, row, part.cap);
        auto *sums = part.of<double>(part.b, row, part.cap);
        if (time_ms >= head.newest_ms) {
            const int64_t newest_ms = std::max<int64_t>(head.newest_ms - 1, 0);
            const int64_t halved = time_ms / part.half_life_ms - newest_ms / part.half_life_ms;
            const double factor = std::ldexp(1.0, -static_cast<int>(std::min<int64_t>(halved, 1100)));  // exact
            for (int64_t lane = 0; lane < head.used && halved; ++lane) sums[lane] *= factor;
            head.newest_ms = time_ms + 1;
        }
        int64_t lane = find(keys, head.used, key);
        if (lane == FREE && head.used < part.cap) {
            lane = head.used++;
            keys[lane] = key;
            sums[lane] = 0;
        } else if (lane == FREE) {
            lane = least(sums, keys, part.cap);
            head.dropped |= sums[lane] > 0;
            keys[lane] = key;
            sums[lane] = 0;
        }
        sums[lane] += weight(part, time_ms, head.newest_ms - 1);
    }
}

void add_last_k(const Part &part, const Batch &batch) {
    for (int64_t e = 0; e < batch.events; ++e) {
        if (!batch.passes[part.filter * batch.stride + e] || !batch.items[e]) continue;
        auto *items = part.of<int64_t>(part.a, batch.rows[e], part.k);
        auto *times_ms = part.of<int64_t>(part.b, batch.rows[e], part.k);
        int64_t place = 0;
        while (place < part.k && items[place] && times_ms[place] > batch.times_ms[e]) ++place;
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
            last_ms[batch.rows[e]] = std::max(last_ms[batch.rows[e]], batch.times_ms[e] + 1);
}

// Join the session of one event with those in its reach, and keep the newest sessions.
void insert(Session *sessions, Session joined, int64_t gap_ms) {
    int64_t kept = 0;
    for (int64_t at = 0; at < SESSIONS && sessions[at].depth; ++at) {
        const Session each = sessions[at];
        if (joined.first_ms - each.last_ms <= gap_ms && each.first_ms - joined.last_ms <= gap_ms) {
            joined.first_ms = std::min(joined.first_ms, each.first_ms);
            joined.last_ms = std::max(joined.last_ms, each.last_ms);
            joined.depth += each.depth;
        } else {
            sessions[kept++] = each;
        }
    }
    int64_t place = 0;
    while (place < kept && sessions[place].last_ms >= joined.last_ms) ++place;
    if (place == SESSIONS) return;
    kept = std::min(kept, SESSIONS - 1);
    std::copy_backward(sessions + place, sessions + kept, sessions + kept + 1);
    sessions[place] = joined;
    std::fill(sessions + kept + 1, sessions + SESSIONS, Session{});
}

void add_session(const Part &part, const Batch &batch) {
    for (int64_t e = 0; e < batch.events; ++e) {
        if (!batch.passes[part.filter * batch.stride + e]) continue;
        Session *sessions = part.of<Session>(part.a, batch.rows[e], SESSIONS);
        const int64_t time_ms = batch.times_ms[e];
        Session &newest = sessions[0];
        if (newest.depth && time_ms >= newest.first_ms && time_ms <= newest.last_ms + part.gap_ms) {
            newest.last_ms = std::max(newest.last_ms, time_ms);
            ++newest.depth;  // nearly every event
        } else {
            insert(sessions, Session{time_ms, time_ms, 1}, part.gap_ms);
        }
    }
}

}  // namespace
