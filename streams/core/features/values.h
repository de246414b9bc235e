// Writes the values of users as JSON, one object per user. `FeatureState.values` is the slow reference.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "parts.h"

namespace {

constexpr int64_t NEVER_MS = int64_t{1} << 62;
constexpr int64_t NUMBER_BYTES = 32;  // of the longest number, with its point

struct Json {
    char *at, *end;
    bool full = false;

    bool fits(int64_t bytes) {
        full |= end - at < bytes;
        return !full;
    }
    void text(const char *text, int64_t bytes) {
        if (!fits(bytes)) return;
        std::memcpy(at, text, bytes);
        at += bytes;
    }
    void text(const Texts &texts, int64_t place) {
        text(texts.bytes + texts.starts[place], texts.starts[place + 1] - texts.starts[place]);
    }
    void sign(char value) {
        if (fits(1)) *at++ = value;
    }
    void whole(int64_t value) {
        if (fits(NUMBER_BYTES)) at = std::to_chars(at, end, value).ptr;
    }
    // A number that is read back as a floating-point number: 5 is written as 5.0.
    void number(double value) {
        if (!std::isfinite(value)) return text("null", 4);
        if (!fits(NUMBER_BYTES)) return;
        char *from = at;
        const bool is_small = std::fabs(value) < 9e15;
        at = (is_small ? std::to_chars(at, end, value) : std::to_chars(at, end, value, std::chars_format::scientific)).ptr;
        const bool is_whole = std::all_of(from, at, [](char each) { return each == '-' || (each >= '0' && each <= '9'); });
        if (is_whole) *at++ = '.', *at++ = '0';
    }
    void key(uint64_t value) {
        if (!fits(18)) return;
        *at++ = '"';
        for (int shift = 60; shift >= 0; shift -= 4) *at++ = "0123456789abcdef"[value >> shift & 15];
        *at++ = '"';
    }
};

// What is written of one user: as of when, until when it holds, and whether the feature at hand is an estimate.
struct Moment {
    int64_t row, as_of_ms, until_ms = NEVER_MS;
    bool is_estimate = false;

    void leaves(int64_t hop, int64_t window_ms, int64_t hop_ms) {
        until_ms = std::min(until_ms, (hop + 1) * hop_ms + window_ms);
    }
};

void write_tiled(const Part &part, const Field &field, Moment &moment, Json &out) {
    const auto *hops = static_cast<int32_t *>(part.a) + moment.row * part.tiles;
    const auto *tiles = static_cast<double *>(part.b) + moment.row * part.tiles * part.accumulators;
    const double initial = static_cast<const Accumulator *>(part.c)[field.number].initial;
    const int64_t first = first_hop(moment.as_of_ms, field.window_ms, part.hop_ms);
    double count = 0, value = initial;
    int64_t oldest = NEVER_MS;
    for (int64_t at = 0; at < part.tiles; ++at) {
        const double *tile = tiles + at * part.accumulators;
        const double number = tile[field.number];
        if (hops[at] < first || (field.kind == MEAN ? tile[field.count] == 0 : number == initial)) continue;
        count += tile[field.count];
        oldest = std::min<int64_t>(oldest, hops[at]);
        if (field.kind == LEAST) value = std::min(value, number);
        else if (field.kind == GREATEST) value = std::max(value, number);
        else value += number;
    }
    if (oldest < NEVER_MS) moment.leaves(oldest, field.window_ms, part.hop_ms);
    if (field.kind == COUNTED) out.whole(static_cast<int64_t>(value));
    else out.number(field.kind == MEAN ? value / count : value);  // infinite or not a number without an event: null
}

void write_distinct(const Part &part, const Field &field, Moment &moment, Json &out) {
    const auto *keys = static_cast<int64_t *>(part.a) + moment.row * part.cap;
    const auto *last = static_cast<int32_t *>(part.b) + moment.row * part.cap;
    const int64_t theta = static_cast<int64_t *>(part.d)[moment.row];
    const int64_t dropped = static_cast<int32_t *>(part.e)[moment.row];
    const int64_t first = first_hop(moment.as_of_ms, field.window_ms, part.hop_ms);
    int64_t count = 0, oldest = NEVER_MS;
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        if (keys[lane] == FREE || last[lane] < first) continue;
        ++count;
        oldest = std::min<int64_t>(oldest, last[lane]);
    }
    if (count) moment.leaves(oldest, field.window_ms, part.hop_ms);
    moment.is_estimate = theta < FULL_RANGE && dropped >= first;
    const double share = static_cast<double>(FULL_RANGE) / static_cast<double>(theta);
    out.whole(moment.is_estimate ? static_cast<int64_t>(std::rint(static_cast<double>(count) * share)) : count);
}

// Order the best `k` lanes first: the greatest total, and of equal ones the first name.
struct Ranked {
    double total;
    int64_t code;
    bool operator<(const Ranked &other) const {
        return total > other.total || (total == other.total && code < other.code);
    }
};

template <typename Total>
void write_ranking(const Part &part, Moment &moment, Json &out, Total write_total, const double *totals) {
    const auto *keys = static_cast<int64_t *>(part.a) + moment.row * part.cap;
    const auto &names = *static_cast<const Names *>(part.e);
    moment.is_estimate = static_cast<bool *>(part.d)[moment.row];
    Ranked ranked[LANES_MAX];
    int64_t found = 0;
    for (int64_t lane = 0; lane < part.cap; ++lane)
        if (keys[lane] != FREE && totals[lane] > 0) ranked[found++] = {totals[lane], keys[lane]};
    const int64_t shown = std::min(found, part.k);
    std::partial_sort(ranked, ranked + shown, ranked + found);
    out.sign('[');
    for (int64_t at = 0; at < shown; ++at) {
        if (at) out.sign(',');
        out.sign('[');
        out.text(names.texts, ranked[at].code);
        out.sign(',');
        write_total(ranked[at].total);
        out.sign(']');
    }
    out.sign(']');
}

void write_top_k(const Part &part, const Field &field, Moment &moment, Json &out) {
    const auto *hops = static_cast<int32_t *>(part.b) + moment.row * part.tiles;
    const auto *counts = static_cast<int32_t *>(part.c) + moment.row * part.cap * part.tiles;
    const auto *keys = static_cast<int64_t *>(part.a) + moment.row * part.cap;
    const int64_t first = first_hop(moment.as_of_ms, field.window_ms, part.hop_ms);
    double totals[LANES_MAX];
    int64_t oldest = NEVER_MS;
    for (int64_t lane = 0; lane < part.cap; ++lane) {
        int64_t total = 0;
        for (int64_t at = 0; at < part.tiles && keys[lane] != FREE; ++at) {
            const int64_t count = hops[at] >= first ? counts[lane * part.tiles + at] : 0;
            total += count;
            if (count) oldest = std::min<int64_t>(oldest, hops[at]);
        }
        totals[lane] = static_cast<double>(total);
    }
    if (oldest < NEVER_MS) moment.leaves(oldest, field.window_ms, part.hop_ms);
    write_ranking(part, moment, out, [&](double total) { out.whole(static_cast<int64_t>(total)); }, totals);
}

void write_affinity(const Part &part, const Field &, Moment &moment, Json &out) {
    const auto *sums = static_cast<double *>(part.b) + moment.row * part.cap;
    const int64_t later_ms = static_cast<int64_t *>(part.c)[moment.row] - moment.as_of_ms;
    const double factor = std::exp2(std::max(static_cast<double>(later_ms) / part.half_life_ms, -1100.0));
    double totals[LANES_MAX];
    for (int64_t lane = 0; lane < part.cap; ++lane) totals[lane] = sums[lane] * factor;
    write_ranking(part, moment, out, [&](double total) { out.number(total); }, totals);
}

void write_last_k(const Part &part, const Field &field, Moment &moment, Json &out) {
    const auto *items = static_cast<int64_t *>(part.a) + moment.row * part.k;
    const auto &known = *static_cast<const Items *>(field.items);
    out.sign('[');
    for (int64_t at = 0; at < part.k && items[at]; ++at) {
        if (at) out.sign(',');
        const int64_t place = known.place(items[at]);
        if (place < 0) out.key(static_cast<uint64_t>(items[at]));
        else out.text(known.texts, place);
    }
    out.sign(']');
}

void write_since(const Part &part, const Field &, Moment &moment, Json &out) {
    const int64_t last_ms = static_cast<int64_t *>(part.a)[moment.row];
    if (last_ms == LONG_AGO_MS) out.text("null", 4);
    else out.number(static_cast<double>(moment.as_of_ms - last_ms) / 1000);
}

void write_session(const Part &part, const Field &field, Moment &moment, Json &out) {
    const int64_t at = moment.row * SESSIONS;
    const int64_t first_ms = static_cast<int64_t *>(part.a)[at], last_ms = static_cast<int64_t *>(part.b)[at];
    const int64_t depth = static_cast<int64_t *>(part.c)[at];
    const bool is_open = depth > 0 && moment.as_of_ms - last_ms <= part.gap_ms;
    if (is_open) moment.until_ms = std::min(moment.until_ms, last_ms + part.gap_ms + 1);
    if (field.kind == DEPTH) out.whole(is_open ? depth : 0);
    else out.number(is_open ? static_cast<double>(last_ms - first_ms) / 1000 : 0);
}

}  // namespace
