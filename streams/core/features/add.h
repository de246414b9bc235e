// Adds a batch to a part, event by event and in place.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "parts.h"

namespace {

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

}  // namespace
