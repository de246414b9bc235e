// Which share of its window each feature of a user has seen; `completeness.py` defines it and is the slow reference.
#pragma once

#include <algorithm>

#include "pack.h"

namespace {

constexpr int64_t WHOLE = 10000;
constexpr int64_t HALF_LIVES = 10;

int64_t certain_places(const Part &part, int64_t row, int64_t from_ms) {
    const auto *items = part.of<int64_t>(part.a, row, part.k);
    const auto *times_ms = part.of<int64_t>(part.b, row, part.k);
    int64_t certain = 0;
    while (certain < part.k && items[certain] && times_ms[certain] >= from_ms) ++certain;
    return certain;
}

int64_t share_of(const Part &part, const Field &field, int64_t row, int64_t as_of_ms, int64_t from_ms) {
    int64_t begin_ms;
    switch (part.kind) {
        case LAST_K: return certain_places(part, row, from_ms) * WHOLE / part.k;
        case SINCE: return static_cast<int64_t *>(part.a)[row] - 1 >= from_ms ? WHOLE : 0;
        case SESSION: {
            const Session &newest = *part.of<Session>(part.a, row, SESSIONS);
            const bool is_open = newest.depth && as_of_ms - newest.last_ms <= part.gap_ms;
            begin_ms = (is_open ? newest.first_ms : as_of_ms) - part.gap_ms;
            break;
        }
        case AFFINITY: begin_ms = as_of_ms - HALF_LIVES * part.half_life_ms; break;
        default: begin_ms = (first_mark(as_of_ms, field.window_ms, part.hop_ms) - 1) * part.hop_ms;
    }
    if (from_ms <= begin_ms) return WHOLE;
    const auto seen_ms = static_cast<__int128>(std::max<int64_t>(as_of_ms - from_ms, 0));
    return static_cast<int64_t>(seen_ms * WHOLE / (as_of_ms - begin_ms));
}

// Return whether the feature will be complete as of every later time, so that its time need not be stored.
bool is_over(const Part &part, const Field &field, int64_t row, int64_t from_ms) {
    switch (part.kind) {
        case LAST_K: return certain_places(part, row, from_ms) == part.k;
        case SINCE: return static_cast<int64_t *>(part.a)[row] - 1 >= from_ms;
        case SESSION: {
            const Session &oldest = part.of<Session>(part.a, row, SESSIONS)[SESSIONS - 1];
            return oldest.depth && oldest.first_ms - part.gap_ms >= from_ms;
        }
        case AFFINITY: return newest_ms_of(part, row) - HALF_LIVES * part.half_life_ms >= from_ms;
        default: return newest_ms_of(part, row) - field.window_ms >= from_ms;
    }
}

void pack_complete(const State &state, int64_t row, Writer &out) {
    const int64_t *from_ms = state.complete_from_ms + row * state.field_count;
    const auto is_stored = [&](int64_t at) {
        const Field &field = state.fields[at];
        return from_ms[at] && !is_over(state.parts[field.part], field, row, from_ms[at]);
    };
    int64_t stored = 0;
    for (int64_t at = 0; at < state.field_count && state.is_partial[row]; ++at) stored += is_stored(at);
    out.gamma(stored + 1);
    for (int64_t at = 0; at < state.field_count && stored; ++at) {
        if (!is_stored(at)) continue;
        out.gamma(at + 1);
        out.sized(from_ms[at]);
    }
}

void unpack_complete(const State &state, int64_t row, Reader &in) {
    const int64_t stored = in.below(state.field_count + 1);
    state.is_partial[row] = stored > 0;
    for (int64_t n = 0; n < stored && !in.bad; ++n) {
        const int64_t at = in.below(state.field_count);
        state.complete_from_ms[row * state.field_count + at] = in.sized(LATEST_MS);
    }
}

void clear_complete(const State &state, int64_t row) {
    if (state.is_partial[row]) std::fill_n(state.complete_from_ms + row * state.field_count, state.field_count, 0);
    state.is_partial[row] = 0;
}

}  // namespace
