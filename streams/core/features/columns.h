// Turns actions into the columns of a batch, block by block: each column of a block stays in the processor's cache.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parts.h"

namespace {

constexpr int64_t BLOCK = 256;
// An event with a later time, far beyond every clock, counts as one of this time; one before 1970 as one of then.
constexpr int64_t EVENT_LATEST_MS = int64_t{1} << 49;
constexpr int64_t NUMBERS = 2, IDS = 2;        // duration and value; item and surface
// Odd multiplier after Fibonacci hashing: its product's upper bits depend on every bit of an id.
constexpr uint64_t MIX = 0x9E3779B97F4A7C15u;

// An action as sequences store it, `encoder.actions.columns.ACTION_DTYPE`; nothing in it is aligned.
struct __attribute__((packed)) Action {
    uint64_t item;
    uint16_t action, surface;
    int64_t timestamp_ms;
    uint32_t duration_ms;
    uint64_t event_id;
};
static_assert(sizeof(Action) == 32);

// A condition on an item attribute: its code by the item's place (null if no item has it), and which codes count.
struct Condition {
    const int64_t *codes;
    const uint8_t *counts;
};

// A filter: which codes of action types and surfaces count (null: all do), and the conditions on attributes.
struct Filter {
    const uint8_t *actions, *surfaces;
    const Condition *conditions;
    int64_t condition_count;

    bool passes(const Action &action, int64_t place) const {
        if (actions && !actions[action.action]) return false;
        if (surfaces && !surfaces[action.surface]) return false;
        for (int64_t at = 0; at < condition_count; ++at) {
            const int64_t code = place < 0 || !conditions[at].codes ? FREE : conditions[at].codes[place];
            if (code < 0 || !conditions[at].counts[code]) return false;
        }
        return true;
    }
};

// What the columns are made of.
struct Selection {
    int64_t filter_count, group_count;
    const Filter *filters;
    const int64_t *const *groups;  // codes of each attribute by the item's place; null where no item has the attribute
    const Items *items;
};

// Events; `values` is null where none has a value.
struct Source {
    int64_t events;
    const int64_t *rows;
    const Action *actions;
    const double *values;
};

// Return an id as a number from 1 to below 2^32, and 0 for 0, which stands for no id.
inline uint32_t hashed(uint64_t id) { return id ? std::max<uint32_t>(id * MIX >> 32, 1) : 0; }

// The columns of one block; `batch` points to them.
class Columns {
  public:
    explicit Columns(const Selection &selection)
        : selection(selection), passes(selection.filter_count * BLOCK), groups(selection.group_count * BLOCK) {}

    Batch fill(const Source &source, int64_t begin, int64_t events) {
        const double none = std::numeric_limits<double>::quiet_NaN();
        for (int64_t e = 0; e < events; ++e) {
            const Action action = source.actions[begin + e];
            times_ms[e] = std::clamp<int64_t>(action.timestamp_ms, 0, EVENT_LATEST_MS);
            numbers[e] = action.duration_ms ? action.duration_ms : none;
            numbers[BLOCK + e] = source.values ? source.values[begin + e] : none;
            items[e] = static_cast<int64_t>(action.item);
            ids[e] = hashed(action.item);
            ids[BLOCK + e] = hashed(action.surface);
            const int64_t place = selection.items->place(items[e]);
            for (int64_t at = 0; at < selection.group_count; ++at)
                groups[at * BLOCK + e] = static_cast<int32_t>(
                    place < 0 || !selection.groups[at] ? FREE : selection.groups[at][place]
                );
            for (int64_t at = 0; at < selection.filter_count; ++at)
                passes[at * BLOCK + e] = selection.filters[at].passes(action, place);
        }
        return {events, BLOCK, source.rows + begin, times_ms, passes.data(), numbers, items, ids, groups.data()};
    }

  private:
    const Selection &selection;
    int64_t times_ms[BLOCK], items[BLOCK];
    uint32_t ids[IDS * BLOCK];
    double numbers[NUMBERS * BLOCK];
    std::vector<uint8_t> passes;
    std::vector<int32_t> groups;
};

}  // namespace
