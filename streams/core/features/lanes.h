// Packs the parts with lanes, and reads them back: ids with their newest hops, and rankings of names.
#pragma once

#include "add.h"
#include "pack.h"

namespace {

void pack_distinct(const Part &part, const User &user, Writer &out) {
    const DistinctHead &head = *part.of<DistinctHead>(part.c, user.row, 1);
    const auto *keys = part.of<uint32_t>(part.a, user.row, part.cap);
    const auto *last = part.of<uint32_t>(part.b, user.row, part.cap);
    if (!put_mark(out, part, user, head.newest)) return;
    const int64_t oldest = static_cast<int64_t>(head.newest) - part.tiles + 1;
    const bool is_sampled = head.theta && head.dropped >= oldest;
    out.put(is_sampled, 1);
    if (is_sampled) {
        out.gamma(head.newest - head.dropped + 1);
        out.put(head.theta, 32);
    }
    const int bits = bits_of(part.tiles - 1), key_bits = is_sampled ? bits_of(head.theta) : 32;
    int64_t used = 0;
    for (uint32_t lane = 0; lane < head.used; ++lane) used += last[lane] >= oldest;
    out.gamma(used + 1);
    for (uint32_t lane = 0; lane < head.used; ++lane) {
        if (last[lane] < oldest) continue;
        out.put(keys[lane] | static_cast<uint64_t>(head.newest - last[lane]) << key_bits, key_bits + bits);
    }
}

void unpack_distinct(const Part &part, const User &user, Reader &in) {
    DistinctHead &head = *part.of<DistinctHead>(part.c, user.row, 1);
    auto *keys = part.of<uint32_t>(part.a, user.row, part.cap), *last = part.of<uint32_t>(part.b, user.row, part.cap);
    head.newest = static_cast<uint32_t>(get_mark(in, part, user));
    if (!head.newest) return;
    const int64_t reach = std::min<int64_t>(part.tiles, head.newest);
    if (in.get(1)) {
        head.dropped = head.newest - static_cast<uint32_t>(in.below(reach));
        head.theta = static_cast<uint32_t>(in.get(32));
        if (!in.check(head.theta)) return;
    }
    const int bits = bits_of(part.tiles - 1), key_bits = head.theta ? bits_of(head.theta) : 32;
    const int64_t used = in.below(part.cap + 1);
    for (int64_t lane = 0; lane < used && !in.bad; ++lane) {
        const auto key = static_cast<uint32_t>(in.get(key_bits));
        const auto back = static_cast<int64_t>(in.get(bits));
        if (!in.check(key && (!head.theta || key < head.theta) && back < reach)) return;
        keys[lane] = key;
        last[lane] = head.newest - static_cast<uint32_t>(back);
        head.used = static_cast<uint32_t>(lane + 1);
    }
}

// The tiles of a ranking, newest first: which lanes have a count, as a list of lanes or as one bit per lane, and the
// counts. Lanes without a count in any tile are left out, and those after them move up.
void pack_tile(const uint16_t *counts, int64_t used, const uint16_t *moved, int64_t lanes, Writer &out) {
    uint16_t at[LANES_MAX];
    int64_t found = 0;
    for (int64_t lane = 0; lane < used; lane += 4) {  // four at once: most are 0
        uint64_t four = 0;
        std::memcpy(&four, counts + lane, std::min<int64_t>(4, used - lane) * sizeof *counts);
        for (; four; four &= ~(uint64_t{0xffff} << (__builtin_ctzll(four) & ~15)))
            at[found++] = static_cast<uint16_t>(lane + (__builtin_ctzll(four) >> 4));
    }
    const int bits = bits_of(lanes - 1);
    const bool is_list = found * bits < lanes;
    out.gamma(found + 1);
    if (is_list) {
        for (int64_t n = 0; n < found; ++n) out.put(moved[at[n]], bits);
    } else {
        uint64_t word = 0;
        int64_t begin = 0;
        for (int64_t n = 0; n < found; ++n) {
            for (; moved[at[n]] >= begin + 32; begin += 32, word = 0) out.put(word, 32);
            word |= uint64_t{1} << (moved[at[n]] - begin);
        }
        for (; begin < lanes; begin += 32, word = 0)
            out.put(word, static_cast<int>(std::min<int64_t>(32, lanes - begin)));
    }
    for (int64_t n = 0; n < found; ++n) out.gamma(counts[at[n]]);
}

void pack_top_k(const Part &part, const User &user, Writer &out) {
    const RankingHead &head = *part.of<RankingHead>(part.c, user.row, 1);
    const auto *keys = part.of<int32_t>(part.a, user.row, part.cap);
    const auto *marks = part.of<uint32_t>(part.b, user.row, part.tiles);
    const auto *counts = part.of<uint16_t>(part.d, user.row, part.tiles * part.cap);
    const auto &names = *static_cast<const Names *>(part.e);
    const int64_t newest = newest_mark(part, user.row), oldest = newest - part.tiles + 1;
    if (!put_mark(out, part, user, newest)) return;
    const bool is_dropped = head.dropped && head.dropped >= oldest;
    out.put(is_dropped, 1);
    if (is_dropped) out.gamma(newest - head.dropped + 1);
    uint32_t totals[LANES_MAX];
    uint16_t moved[LANES_MAX];
    int64_t lanes = 0;
    sum_tiles(part, user.row, head.used, oldest, totals);
    for (uint32_t lane = 0; lane < head.used; ++lane) {
        moved[lane] = static_cast<uint16_t>(lanes);
        lanes += totals[lane] > 0;
    }
    out.gamma(lanes + 1);
    for (uint32_t lane = 0; lane < head.used; ++lane)
        if (totals[lane]) out.put(names.hashes[keys[lane]], 32);
    const int64_t reach = std::min(part.tiles, newest);
    int64_t slot = (newest - 1) % part.tiles;
    for (int64_t back = 0; back < reach && lanes; ++back, slot = (slot ? slot : part.tiles) - 1) {
        if (marks[slot] == newest - back) pack_tile(counts + slot * part.cap, head.used, moved, lanes, out);
        else out.gamma(1);
    }
}

// Return whether there is a count of a value that is not known any more.
bool unpack_tile(
    uint16_t *counts, const int32_t *codes, const uint16_t *moved, int64_t lanes, Reader &in
) {
    uint16_t at[LANES_MAX];
    const int64_t found = in.below(lanes + 1);
    const int bits = bits_of(lanes - 1);
    if (found * bits < lanes) {
        for (int64_t n = 0; n < found; ++n) {
            at[n] = static_cast<uint16_t>(in.get(bits));
            if (!in.check(at[n] < lanes)) return false;
        }
    } else {
        int64_t n = 0;
        for (int64_t begin = 0; begin < lanes; begin += 32) {
            uint64_t word = in.get(static_cast<int>(std::min<int64_t>(32, lanes - begin)));
            for (; word; word &= word - 1) {
                if (!in.check(n < found)) return false;
                at[n++] = static_cast<uint16_t>(begin + __builtin_ctzll(word));
            }
        }
        if (!in.check(n == found)) return false;
    }
    bool is_lost = false;
    for (int64_t n = 0; n < found; ++n) {
        const int64_t count = in.below(TILE_COUNT_MAX) + 1;
        if (codes[at[n]] == FREE) is_lost = true;
        else counts[moved[at[n]]] = static_cast<uint16_t>(count);
    }
    return is_lost;
}

void unpack_top_k(const Part &part, const User &user, Reader &in) {
    RankingHead &head = *part.of<RankingHead>(part.c, user.row, 1);
    auto *keys = part.of<int32_t>(part.a, user.row, part.cap);
    auto *marks = part.of<uint32_t>(part.b, user.row, part.tiles);
    auto *counts = part.of<uint16_t>(part.d, user.row, part.tiles * part.cap);
    const auto &names = *static_cast<const Names *>(part.e);
    const int64_t newest = get_mark(in, part, user), reach = std::min(part.tiles, newest);
    if (!newest) return;
    if (in.get(1)) head.dropped = static_cast<uint32_t>(newest - in.below(reach));
    const int64_t lanes = in.below(part.cap + 1);
    int32_t codes[LANES_MAX];
    uint16_t moved[LANES_MAX];
    for (int64_t lane = 0; lane < lanes && !in.bad; ++lane) {
        codes[lane] = static_cast<int32_t>(names.code(static_cast<uint32_t>(in.get(32))));
        moved[lane] = static_cast<uint16_t>(head.used);
        if (codes[lane] != FREE) keys[head.used++] = codes[lane];
    }
    marks[(newest - 1) % part.tiles] = static_cast<uint32_t>(newest);
    std::fill_n(counts + (newest - 1) % part.tiles * part.cap, part.cap, 0);
    for (int64_t back = 0; back < reach && lanes && !in.bad; ++back) {
        const int64_t slot = (newest - back - 1) % part.tiles;
        marks[slot] = static_cast<uint32_t>(newest - back);
        std::fill_n(counts + slot * part.cap, part.cap, 0);
        if (unpack_tile(counts + slot * part.cap, codes, moved, lanes, in))
            head.dropped = std::max(head.dropped, marks[slot]);
    }
}

void pack_affinity(const Part &part, const User &user, Writer &out) {
    const RankingHead &head = *part.of<RankingHead>(part.c, user.row, 1);
    const auto *keys = part.of<int32_t>(part.a, user.row, part.cap);
    const auto *sums = part.of<double>(part.b, user.row, part.cap);
    const auto &names = *static_cast<const Names *>(part.e);
    if (!put_time(out, user, head.newest_ms - 1)) return;
    int64_t used = 0;
    for (uint32_t lane = 0; lane < head.used; ++lane) used += sums[lane] > 0;
    out.put(head.dropped, 1);
    out.gamma(used + 1);
    for (uint32_t lane = 0; lane < head.used; ++lane) {
        if (!(sums[lane] > 0)) continue;
        out.put(names.hashes[keys[lane]], 32);
        out.raw(sums[lane]);
    }
}

void unpack_affinity(const Part &part, const User &user, Reader &in) {
    RankingHead &head = *part.of<RankingHead>(part.c, user.row, 1);
    auto *keys = part.of<int32_t>(part.a, user.row, part.cap);
    auto *sums = part.of<double>(part.b, user.row, part.cap);
    const auto &names = *static_cast<const Names *>(part.e);
    head.newest_ms = get_time(in, user) + 1;
    if (!head.newest_ms) return;
    head.dropped = static_cast<uint32_t>(in.get(1));
    const int64_t used = in.below(part.cap + 1);
    for (int64_t n = 0; n < used && !in.bad; ++n) {
        const int64_t code = names.code(static_cast<uint32_t>(in.get(32)));
        const double sum = in.raw();
        if (!in.check(sum > 0 && std::isfinite(sum))) return;
        if (code == FREE) {
            head.dropped = 1;
            continue;
        }
        keys[head.used] = static_cast<int32_t>(code);
        sums[head.used++] = sum;
    }
}

}  // namespace
