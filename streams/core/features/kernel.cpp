// The compiled part of `FeatureState`: `add`, `records`, `pack` and `unpack`, each one call for all parts, in place.
//
// The arrays belong to the Python classes: `tiles.py`, `distinct.py`, `rankings.py` and `recent.py` define what each
// part holds, and mean the same by every name.

#include "add.h"
#include "complete.h"
#include "pack.h"
#include "values.h"

namespace {

using Add = void (*)(const Part &, const Batch &);
using Pack = void (*)(const Part &, int64_t, Writer &);
using Unpack = void (*)(const Part &, int64_t, Reader &);
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
    Writer writer{out, out + size};
    for (int64_t user = 0; user < users; ++user) {
        for (int64_t at = 0; at < HEADER_BYTES; ++at) writer.byte(state->header[at]);
        pack_complete(*state, rows[user], writer);
        for (int64_t at = 0; at < state->part_count; ++at)
            PACK[state->parts[at].kind](state->parts[at], rows[user], writer);
        if (writer.full) return -1;
        ends[user] = writer.at - out;
    }
    return writer.at - out;
}

// Read what `pack_users` wrote into cleared rows; return the first user whose bytes are not that, -1 if there is none.
// Each user's bytes begin with a header, which the caller has compared.
extern "C" int64_t unpack_users(
    const State *state, const int64_t *rows, int64_t users, const uint8_t *in, const int64_t *ends
) {
    for (int64_t user = 0; user < users; ++user) {
        Reader reader{in + (user ? ends[user - 1] : 0) + HEADER_BYTES, in + ends[user]};
        unpack_complete(*state, rows[user], reader);
        for (int64_t at = 0; at < state->part_count && !reader.bad; ++at)
            UNPACK[state->parts[at].kind](state->parts[at], rows[user], reader);
        if (reader.bad || reader.at != reader.end) return user;
    }
    return -1;
}

extern "C" void add_events(const State *state, const Batch *batch) {
    for (int64_t at = 0; at < state->part_count; ++at) ADD[state->parts[at].kind](state->parts[at], *batch);
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
