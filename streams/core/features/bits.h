// Writes and reads numbers of any number of bits, lowest bit first.
//
//     gamma   a number from 1 on: as many zeros as it has bits after its first, a one, and those bits; 1 takes one bit
//     sized   a number from 0 on: its number of bits, in 6 bits, and these
//     number  a double: 0 for "as it began", 1 whole, 2 whole hundredths (both with sign and `sized`), 3 as it is
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum NumberForm : uint64_t { INITIAL, WHOLES, HUNDREDTHS, RAW };
constexpr double WHOLE_MAX = 9e15;  // each whole number up to this is exact

inline int bits_of(uint64_t value) { return value ? 64 - __builtin_clzll(value) : 0; }
inline uint64_t low_bits(uint64_t value, int count) {
    return count < 64 ? value & ((uint64_t{1} << count) - 1) : value;
}

// Writes without a check: the caller makes sure that there is room, and 8 bytes more.
struct Writer {
    uint8_t *at;
    uint64_t pending = 0;
    int count = 0;  // pending bits, fewer than 8 between two calls

    void put(uint64_t value, int bits) {  // at most 56
        pending |= value << count;
        count += bits;
        std::memcpy(at, &pending, sizeof pending);
        at += count >> 3;
        pending >>= count & ~7;
        count &= 7;
    }
    void put_long(uint64_t value, int bits) {  // at most 64
        if (bits > 32) {
            put(low_bits(value, 32), 32);
            value >>= 32;
            bits -= 32;
        }
        put(value, bits);
    }
    void gamma(uint64_t value) {
        const int after = bits_of(value) - 1;
        if (after <= 27) return put((low_bits(value, after) << 1 | 1) << after, 2 * after + 1);
        put_long(0, after);
        put(1, 1);
        put_long(low_bits(value, after), after);
    }
    void sized(uint64_t value) {  // below 2^63
        const int bits = bits_of(value);
        put(bits, 6);
        put_long(value, bits);
    }
    void number(double value, double initial) {
        if (value == initial) return put(INITIAL, 2);
        const bool is_negative = std::signbit(value);
        const double size = std::fabs(value), hundredths = std::rint(size * 100);
        if (size < WHOLE_MAX && size == std::floor(size) && (size > 0 || !is_negative)) {
            put(WHOLES | is_negative << 2, 3);
            sized(static_cast<uint64_t>(size));
        } else if (hundredths < WHOLE_MAX && hundredths / 100 == size && hundredths > 0) {
            put(HUNDREDTHS | is_negative << 2, 3);
            sized(static_cast<uint64_t>(hundredths));
        } else {
            put(RAW, 2);
            raw(value);
        }
    }
    void raw(double value) {
        uint64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        put_long(bits, 64);
    }
    void end() {  // the last byte
        if (count) ++at;
        pending = 0;
        count = 0;
    }
};

// Reads and checks. After the last bit there must be 8 bytes that can be read, of any content. What cannot be right
// sets `bad`; everything is 0 (or 1, as `gamma`) from then on.
struct Reader {
    const uint8_t *bytes;
    int64_t at, end;  // in bits
    bool bad = false;

    uint64_t peek() const {  // at least 57 bits
        uint64_t value;
        std::memcpy(&value, bytes + (at >> 3), sizeof value);
        return value >> (at & 7);
    }
    bool fail() {
        bad = true;
        at = end;
        return false;
    }
    bool has(int64_t bits) { return bits <= end - at || fail(); }
    bool check(bool is_right) { return is_right || fail(); }
    uint64_t get(int bits) {  // at most 56
        if (!has(bits)) return 0;
        const uint64_t value = low_bits(peek(), bits);
        at += bits;
        return value;
    }
    uint64_t get_long(int bits) {  // at most 64
        if (bits <= 32) return get(bits);
        const uint64_t low = get(32);
        return low | get(bits - 32) << 32;
    }
    uint64_t gamma() {
        const uint64_t seen = peek();
        const int after = seen ? __builtin_ctzll(seen) : 64;
        if (after > 27) return long_gamma();
        if (!has(2 * after + 1)) return 1;
        at += 2 * after + 1;
        return low_bits(seen >> (after + 1), after) | uint64_t{1} << after;
    }
    uint64_t long_gamma() {
        int after = 0;
        while (!get(1) && !bad && after < 63) ++after;
        const uint64_t low = get_long(after);
        return bad || !check(after < 63) ? 1 : low | uint64_t{1} << after;
    }
    int64_t below(int64_t limit) {  // a gamma of a number from 0 to below `limit`, plus one
        const uint64_t value = gamma() - 1;
        return check(value < static_cast<uint64_t>(limit)) ? static_cast<int64_t>(value) : 0;
    }
    int64_t sized(int64_t most) {
        const uint64_t value = get_long(static_cast<int>(get(6)));
        return check(value <= static_cast<uint64_t>(most)) ? static_cast<int64_t>(value) : 0;
    }
    double number(double initial) {
        const uint64_t form = get(2);
        if (form == INITIAL) return initial;
        if (form == RAW) return raw();
        const double sign = get(1) ? -1.0 : 1.0;
        const auto whole = static_cast<double>(sized(static_cast<int64_t>(WHOLE_MAX)));
        return sign * (form == WHOLES ? whole : whole / 100);
    }
    double raw() {
        const uint64_t bits = get_long(64);
        double value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    bool is_at_end() const { return !bad && end - at < 8 && low_bits(peek(), static_cast<int>(end - at)) == 0; }
};

}  // namespace
