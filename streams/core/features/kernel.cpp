// The compiled part of `FeatureState`: `add`, `records`, `pack` and `unpack`, each one call for all parts, in place.
//
// The arrays belong to the Python classes: `tiles.py`, `distinct.py`, `rankings.py` and `recent.py` define what each
// part holds, and mean the same by every name.

#include "add.h"
#include "columns.h"
#include "complete.h"
#include "lanes.h"
#include "pack.h"
#include "values.h"

namespace {

using Add = void (*)(const Part &, const Batch &);
using Pack = void (*)(const Part &, const User &, Writer &);
using Unpack = void (*)(const Part &, const User &, Reader &);
using Write = void (*)(const Part &, const Field &, Moment &, Json &);
constexpr Add ADD[] = {add_to_ring, add_distinct, add_top_k, add_affinity, add_last_k, add_since, add_session};
constexpr Pack PACK[] = {pack_ring, pack_distinct, pack_top_k, pack_affinity, pack_last_k, pack_since, pack_session};
constexpr Unpack UNPACK[] = {unpack_ring,   unpack_distinct, unpack_top_k,  unpack_affinity,
                             unpack_last_k, unpack_since,    unpack_session};
constexpr Write WRITE[] = {write_tiled,  write_distinct, write_top_k, write_affinity,
                           write_last_k, write_since,    write_session};

}  // namespace

constexpr int64_t HEADER_BYTES = 9;

// Write the state of users one after another to `out`, and where each ends; return the bytes, -1 if they do not fit.
extern "C" int64_t pack_users(
    const State *state, const int64_t *rows, int64_t users, uint8_t *out, int64_t size, int64_t *ends
) {
    const Part *begin = state->parts, *end = begin + state->part_count;
    int64_t room = HEADER_BYTES + 64 + state->field_count * 16;
    for (const Part *part = begin; part != end; ++part) room += bytes_max(*part);
    uint8_t *at = out;
    for (int64_t n = 0; n < users; ++n) {
        if (out + size - at < room) return -1;
        User user{rows[n], FREE};
        for (const Part *part = begin; part != end; ++part)
            user.newest_ms = std::max(user.newest_ms, newest_ms_of(*part, user.row));
        std::memcpy(at, state->header, HEADER_BYTES);
        Writer writer{at + HEADER_BYTES};
        pack_complete(*state, user.row, writer);
        writer.sized(user.newest_ms + 1);
        for (const Part *part = begin; part != end; ++part) PACK[part->kind](*part, user, writer);
        writer.end();
        at = writer.at;
        ends[n] = at - out;
    }
    return at - out;
}

// Read what `pack_users` wrote into cleared rows; return the first user whose bytes are not that, -1 if there is none.
// Each user's bytes begin with a header, which the caller has compared, and after the last there are 8 more.
extern "C" int64_t unpack_users(
    const State *state, const int64_t *rows, int64_t users, const uint8_t *in, const int64_t *ends
) {
    for (int64_t n = 0; n < users; ++n) {
        const int64_t begin = (n ? ends[n - 1] : 0) + HEADER_BYTES;
        Reader reader{in, begin * 8, ends[n] * 8};
        unpack_complete(*state, rows[n], reader);
        const User user{rows[n], reader.sized(LATEST_MS) - 1};
        for (int64_t at = 0; at < state->part_count && !reader.bad; ++at)
            UNPACK[state->parts[at].kind](state->parts[at], user, reader);
        if (!reader.is_at_end()) return n;
    }
    return -1;
}

extern "C" void clear_users(const State *state, const int64_t *rows, int64_t users) {
    for (int64_t n = 0; n < users; ++n) {
        for (int64_t at = 0; at < state->part_count; ++at) clear_part(state->parts[at], rows[n]);
        clear_complete(*state, rows[n]);
    }
}

extern "C" void add_events(const State *state, const Selection *selection, const Source *source) {
    Columns columns(*selection);
    for (int64_t begin = 0; begin < source->events; begin += BLOCK) {
        const Batch batch = columns.fill(*source, begin, std::min(BLOCK, source->events - begin));
        for (int64_t at = 0; at < state->part_count; ++at) ADD[state->parts[at].kind](state->parts[at], batch);
    }
}

// Write the values of users as JSON objects to `out`, and where each ends, until when it holds, and which fields are
// estimates [U, estimates]; return the bytes, -1 if they do not fit.
extern "C" int64_t write_values(const State *state, const Moments *moments, char *out, int64_t size) {
    Json json{out, out + size};
    for (int64_t user = 0; user < moments->users; ++user) {
        Moment moment{moments->rows[user], moments->as_of_ms[user]};
        json.sign('{');
        for (int64_t at = 0; at < state->field_count; ++at) {
            const Field &field = state->fields[at];
            const Part &part = state->parts[field.part];
            if (at) json.sign(',');
            json.text(field.name, 0);
            moment.is_estimate = false;
            WRITE[part.kind](part, field, moment, json);
            if (field.estimate != FREE)
                moments->estimates[user * moments->stride + field.estimate] = moment.is_estimate;
        }
        json.sign('}');
        if (json.full) return -1;
        moments->ends[user] = json.at - out;
        moments->until_ms[user] = moment.until_ms;
    }
    return json.at - out;
}

// Write which share of its window each field of users has seen [U, fields], in parts of `WHOLE`.
extern "C" void write_shares(
    const State *state, const int64_t *rows, const int64_t *as_of_ms, int64_t users, int64_t *shares
) {
    for (int64_t user = 0; user < users; ++user) {
        const int64_t *from_ms = state->complete_from_ms + rows[user] * state->field_count;
        for (int64_t at = 0; at < state->field_count; ++at) {
            const Field &field = state->fields[at];
            int64_t &share = shares[user * state->field_count + at];
            share = WHOLE;
            if (from_ms[at])
                share = share_of(state->parts[field.part], field, rows[user], as_of_ms[user], from_ms[at]);
        }
    }
}
