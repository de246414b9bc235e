// The compiled part of `FeatureState`: `add`, `records`, `pack` and `unpack`, each one call for all parts, in place.
//
// The arrays belong to the Python classes: `tiles.py`, `distinct.py`, `rankings.py` and `recent.py` define what each
// part holds, and mean the same by every name.

#include "add.h"
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

// Write the state of users one after another to `out`, and where each ends; return the bytes, -1 if they do not fit.
extern "C" int64_t pack_users(
    const Part *parts, int64_t count, const int64_t *rows, int64_t users, uint8_t *out, int64_t size, int64_t *ends
) {
    Writer writer{out, out + size};
    for (int64_t user = 0; user < users; ++user) {
        for (int64_t at = 0; at < count; ++at) PACK[parts[at].kind](parts[at], rows[user], writer);
        if (writer.full) return -1;
        ends[user] = writer.at - out;
    }
    return writer.at - out;
}

// Read what `pack_users` wrote into cleared rows; return the first user whose bytes are not that, -1 if there is none.
extern "C" int64_t unpack_users(
    const Part *parts, int64_t count, const int64_t *rows, int64_t users, const uint8_t *in, const int64_t *ends
) {
    for (int64_t user = 0; user < users; ++user) {
        Reader reader{in + (user ? ends[user - 1] : 0), in + ends[user]};
        for (int64_t at = 0; at < count && !reader.bad; ++at) UNPACK[parts[at].kind](parts[at], rows[user], reader);
        if (reader.bad || reader.at != reader.end) return user;
    }
    return -1;
}

extern "C" void add_events(const Part *parts, int64_t count, const Batch *batch) {
    for (int64_t at = 0; at < count; ++at) ADD[parts[at].kind](parts[at], *batch);
}

// Write the values of users as JSON objects to `out`, and where each ends, until when it holds, and which fields are
// estimates [U, estimates]; return the bytes, -1 if they do not fit.
extern "C" int64_t write_values(
    const Part *parts, const Field *fields, int64_t count, const Moments *moments, char *out, int64_t size
) {
    Json json{out, out + size};
    for (int64_t user = 0; user < moments->users; ++user) {
        Moment moment{moments->rows[user], moments->as_of_ms[user]};
        json.sign('{');
        for (int64_t at = 0; at < count; ++at) {
            const Field &field = fields[at];
            if (at) json.sign(',');
            json.text(field.name, 0);
            moment.is_estimate = false;
            WRITE[parts[field.part].kind](parts[field.part], field, moment, json);
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
