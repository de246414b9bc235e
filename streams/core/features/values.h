// Writes the values of users as JSON, one object per user. `FeatureState.values` is the slow reference.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "add.h"

namespace {

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
        const auto written = is_small ? std::to_chars(at, end, value)
                                      : std::to_chars(at, end, value, std::chars_format::scientific);
        at = written.ptr;
        const auto is_digit = [](char each) { return each == '-' || (each >= '0' && each <= '9'); };
        const bool is_whole = std::all_of(from, at, is_digit);
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

    void leaves(int64_t mark, int64_t window_ms, int64_t hop_ms) {
        until_ms = std::min(until_ms, mark * hop_ms + window_ms);
    }
};

void write_tiled(const Part &part, const Field &field, Moment &moment, Json &out) {
    const double *tile = part.ring(moment.row);
    const double initial = part.accumulator()[field.number].initial;
    const auto first = static_cast<double>(first_mark(moment.as_of_ms, field.window_ms, part.hop_ms));
    double count = 0, value = initial, oldest = INFINITY;
    for (int64_t at = 0; at < part.tiles; ++at, tile += 1 + part.accumulators) {
        if (tile[0] < first) continue;
        const double number = tile[1 + field.number];
        if (field.kind == MEAN ? tile[1 + field.count] == 0 : number == initial) continue;
        count += tile[1 + field.count];
        oldest = std::min(oldest, tile[0]);
        if (field.kind == LEAST) value = std::min(value, number);
        else if (field.kind == GREATEST) value = std::max(value, number);
        else value += number;
    }
    if (std::isfinite(oldest)) moment.leaves(static_cast<int64_t>(oldest), field.window_ms, part.hop_ms);
    if (field.kind == COUNTED) out.whole(static_cast<int64_t>(value));
    else out.number(field.kind == MEAN ? value / count : value);  // infinite or not a number without an event: null
}

void write_distinct(const Part &part, const Field &field, Moment &moment, Json &out) {
    const DistinctHead &head = *part.of<DistinctHead>(part.c, moment.row, 1);
    const auto *last = part.of<uint32_t>(part.b, moment.row, part.cap);
    const int64_t first = first_mark(moment.as_of_ms, field.window_ms, part.hop_ms);
    int64_t count = 0;
    uint32_t oldest = UINT32_MAX;
    for (uint32_t lane = 0; lane < head.used; ++lane) {
        const bool is_inside = last[lane] >= first;
        count += is_inside;
        oldest = std::min(oldest, is_inside ? last[lane] : UINT32_MAX);
    }
    if (count) moment.leaves(oldest, field.window_ms, part.hop_ms);
    moment.is_estimate = head.theta && head.dropped >= first;
    if (moment.is_estimate) moment.leaves(head.dropped, field.window_ms, part.hop_ms);  // the count is exact again then
    const double share = FULL_RANGE / static_cast<double>(head.theta);
    out.whole(moment.is_estimate ? static_cast<int64_t>(std::rint(static_cast<double>(count) * share)) : count);
}

// The greatest total comes first, and of equal ones the first name.
template <typename Total>
struct Ranked {
    Total total;
    int32_t code;
    bool operator<(const Ranked &other) const {
        return total > other.total || (total == other.total && code < other.code);
    }
};

template <typename Total, typename Write>
void write_ranking(const Part &part, int64_t row, const Total *totals, int64_t used, Json &out, Write write) {
    const auto *keys = part.of<int32_t>(part.a, row, part.cap);
    const auto &names = *static_cast<const Names *>(part.e);
    Ranked<Total> ranked[LANES_MAX];
    int64_t found = 0;
    for (int64_t lane = 0; lane < used; ++lane)
        if (totals[lane] > 0) ranked[found++] = {totals[lane], keys[lane]};
    const int64_t shown = std::min(found, part.k);
    std::partial_sort(ranked, ranked + shown, ranked + found);
    out.sign('[');
    for (int64_t at = 0; at < shown; ++at) {
        out.text(at ? ",[" : "[", at ? 2 : 1);
        out.text(names.texts, ranked[at].code);
        out.sign(',');
        write(ranked[at].total);
        out.sign(']');
    }
    out.sign(']');
}

void write_top_k(const Part &part, const Field &field, Moment &moment, Json &out) {
    const RankingHead &head = *part.of<RankingHead>(part.c, moment.row, 1);
    const int64_t first = first_mark(moment.as_of_ms, field.window_ms, part.hop_ms);
    uint32_t totals[LANES_MAX];
    if (const int64_t oldest = sum_tiles(part, moment.row, head.used, first, totals))
        moment.leaves(oldest, field.window_ms, part.hop_ms);
    moment.is_estimate = head.dropped >= first;
    write_ranking(part, moment.row, totals, head.used, out, [&](uint32_t total) { out.whole(total); });
}

void write_affinity(const Part &part, const Field &, Moment &moment, Json &out) {
    const RankingHead &head = *part.of<RankingHead>(part.c, moment.row, 1);
    const auto *sums = part.of<double>(part.b, moment.row, part.cap);
    const int64_t newest_ms = std::max<int64_t>(head.newest_ms - 1, 0);
    const auto since_ms = static_cast<double>(newest_ms - newest_ms % part.half_life_ms - moment.as_of_ms);
    const double factor = std::exp2(std::max(since_ms / static_cast<double>(part.half_life_ms), -1100.0));
    double totals[LANES_MAX];
    for (uint32_t lane = 0; lane < head.used; ++lane) totals[lane] = sums[lane] * factor;
    moment.is_estimate = head.dropped;
    write_ranking(part, moment.row, totals, head.used, out, [&](double total) { out.number(total); });
}

void write_last_k(const Part &part, const Field &field, Moment &moment, Json &out) {
    const auto *items = part.of<int64_t>(part.a, moment.row, part.k);
    out.sign('[');
    for (int64_t at = 0; at < part.k && items[at]; ++at) {
        if (at) out.sign(',');
        const int64_t place = field.items->place(items[at]);
        if (place < 0) out.key(static_cast<uint64_t>(items[at]));
        else out.text(field.items->texts, place);
    }
    out.sign(']');
}

void write_since(const Part &part, const Field &, Moment &moment, Json &out) {
    const int64_t last_ms = static_cast<int64_t *>(part.a)[moment.row] - 1;
    if (last_ms < 0) out.text("null", 4);
    else out.number(static_cast<double>(moment.as_of_ms - last_ms) / 1000);
}

void write_session(const Part &part, const Field &field, Moment &moment, Json &out) {
    const Session &newest = *part.of<Session>(part.a, moment.row, SESSIONS);
    const bool is_open = newest.depth && moment.as_of_ms - newest.last_ms <= part.gap_ms;
    if (is_open) moment.until_ms = std::min(moment.until_ms, newest.last_ms + part.gap_ms + 1);
    if (field.kind == DEPTH) out.whole(is_open ? newest.depth : 0);
    else out.number(is_open ? static_cast<double>(newest.last_ms - newest.first_ms) / 1000 : 0);
}

}  // namespace
