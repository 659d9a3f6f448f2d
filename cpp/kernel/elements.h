// SPDX-License-Identifier: Apache-2.0
//
// The types that numbers have in memory, and how they become the T of the arithmetic and back.
// Called by the whole folder.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace fastattn {
namespace {

template <class T>
constexpr T kInfinity = T(__builtin_inf());
template <class T>
constexpr T kLowest = T(sizeof(T) == 4 ? -0x1.fffffep127 : -0x1.fffffffffffffp1023);

struct Bool {
    uint8_t byte;  // whoever made it, it need not be 0 or 1
};
struct Int8 {
    int8_t number;
};
struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class Element>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

inline bool hides(Bool x) { return x.byte == 0; }
inline bool hides(float x) { return x == -kInfinity<float>; }
inline bool hides(double x) { return x == -kInfinity<double>; }
inline bool hides(Float16 x) { return x.bits == 0xfc00; }
inline bool hides(BFloat16 x) { return x.bits == 0xff80; }

inline float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The element in T; for a bool, what it adds to a score.
template <class T>
T added(Bool x) {
    return hides(x) ? -kInfinity<T> : T(0);
}
template <class T>
T added(float x) {
    return x;
}
template <class T>
T nearest_finite(double x) {
    constexpr double highest = -double(kLowest<T>);
    return T(x > highest ? highest : x < -highest ? -highest : x);
}
template <class T>
T added(double x) {
    return x - x == 0 ? nearest_finite<T>(x) : T(x);  // only Inf may become Inf
}
template <class T>
T added(Int8 x) {
    return x.number;
}
template <class T>
T added(BFloat16 x) {
    return from_bits(uint32_t(x.bits) << 16);
}
template <class T>
T added(Float16 x) {
    // The product moves the exponent's bias, subnormals included; Inf and NaN get all exponent
    // bits.
    const float magnitude = from_bits(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return from_bits(to_bits(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
}

template <class T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;

// Brings a row near, to be read or (Write = 1) written: 3 to the first-level cache, 2 to the
// second.
template <int Write = 0, int Near = 2, class Element>
void prefetch(const Element* row, int64_t count) {
    constexpr int64_t line = 64 / sizeof(Element);
    for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + i, Write, Near);
}

// Rows of some arrays that are brought near a few cache lines at a time: many at once would have to
// wait, and what is needed now behind them.
class Ahead {
    struct Rows {
        const char* first;
        int64_t count, stride, bytes;
    };
    Rows arrays[4];
    int given = 0, begun = 0;
    const char *at, *end;  // of a row
    int64_t rows = 0;      // to come, with that one
    int64_t lines = 0, due = 0, at_a_time = 0;

   public:
    // All of it in bytes.
    void add(const void* first, int64_t count, int64_t stride, int64_t bytes) {
        if (first == nullptr || count <= 0 || bytes == 0) return;
        if (stride == bytes) bytes *= count, count = 1;
        arrays[given++] = {static_cast<const char*>(first), count, stride, bytes};
        lines += count * ((bytes + 63) / 64);
    }

    // fetch() is to be called so many times.
    void begin(int64_t times) {
        at_a_time = times == 0 ? 0 : (lines + times - 1) / times;
        go_on();
    }

    // From time to time: another array, once all of one is fetched.
    void go_on() {
        if (rows > 0) return;
        if (begun == given) {
            at_a_time = 0;
            return;
        }
        const Rows& next = arrays[begun++];
        at = next.first;
        end = at + next.bytes;
        rows = next.count;
        due = 0;
    }

    // Calls nothing: around it, registers are full.
    [[gnu::always_inline]] void fetch() {
        if (at_a_time == 0) return;
        for (due += at_a_time; due > 0 && rows > 0; --due) {
            __builtin_prefetch(at, 0, 2);
            at += 64;
            if (at < end) continue;
            const Rows& now = arrays[begun - 1];
            end += now.stride;
            at = end - now.bytes;
            --rows;
        }
    }
};

// visit(pointer to the element type); the pointer is null.
template <class Visit>
auto with_element(Dtype dtype, const Visit& visit) {
    switch (dtype) {
        case Dtype::kBool:
            return visit(static_cast<const Bool*>(nullptr));
        case Dtype::kFloat16:
            return visit(static_cast<const Float16*>(nullptr));
        case Dtype::kBFloat16:
            return visit(static_cast<const BFloat16*>(nullptr));
        case Dtype::kFloat64:
            return visit(static_cast<const double*>(nullptr));
        default:
            return visit(static_cast<const float*>(nullptr));
    }
}

// The same for a query in the arithmetic of T: float also takes half precision.
template <class T, class Visit>
auto with_query(Dtype dtype, const Visit& visit) {
    if constexpr (sizeof(T) == 4) {
        if (dtype == Dtype::kFloat16) return visit(static_cast<const Float16*>(nullptr));
        if (dtype == Dtype::kBFloat16) return visit(static_cast<const BFloat16*>(nullptr));
    }
    return visit(static_cast<const T*>(nullptr));
}

// The same for a key or value: float also takes int8.
template <class T, class Visit>
auto with_key(Dtype dtype, const Visit& visit) {
    if constexpr (sizeof(T) == 4) {
        if (dtype == Dtype::kInt8) return visit(static_cast<const Int8*>(nullptr));
    }
    return with_query<T>(dtype, visit);
}

inline Vec<float> load(const float* from) { return Vec<float>::load(from); }
inline Vec<double> load(const double* from) { return Vec<double>::load(from); }
inline Vec<float> load(const Float16* from) {
    isa::HalfBits bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return isa::from_float16(bits);
}
inline Vec<float> load(const BFloat16* from) {
    isa::HalfBits bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return isa::from_bfloat16(bits);
}

inline Vec<float> load(const Int8* from) {
    isa::Int8s numbers;
    __builtin_memcpy(&numbers, from, sizeof numbers);
    return isa::from_int8(numbers);
}

// To the nearest, and to the even one of two.
inline void store(Vec<float> x, float* to) { x.store(to); }
inline void store(Vec<double> x, double* to) { x.store(to); }
inline void store(Vec<float> x, Float16* to) {
    const isa::HalfBits bits = isa::to_float16(x.v);
    __builtin_memcpy(to, &bits, sizeof bits);
}
inline void store(Vec<float> x, BFloat16* to) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    const Bits bits = Bits(x.v);
    const Bits nearest = bits + 0x7fff + (bits >> 16 & 1);  // of a NaN, it might be Inf
    const Bits kept = x.v == x.v ? nearest : bits | 0x400000;
    const isa::HalfBits half = __builtin_convertvector(kept >> 16, isa::HalfBits);
    __builtin_memcpy(to, &half, sizeof half);
}

// Two rows as one of pairs, in which the bits of `second` lie above; without a second row, 0.
inline void store_pairs(const BFloat16* first, const BFloat16* second, int64_t columns,
                        BFloat16* to) {
    constexpr int lanes = Vec<float>::lanes;
    int64_t d = 0;
    for (; second != nullptr && d + lanes <= columns; d += lanes) {
        isa::HalfBits low, high;
        __builtin_memcpy(&low, first + d, sizeof low);
        __builtin_memcpy(&high, second + d, sizeof high);
        const Pairs pairs = Pairs(isa::from_bfloat16(high)) | Pairs(isa::from_bfloat16(low)) >> 16;
        __builtin_memcpy(to + 2 * d, &pairs, sizeof pairs);
    }
    for (; d < columns; ++d) {
        to[2 * d] = first[d];
        to[2 * d + 1] = second == nullptr ? BFloat16{0} : second[d];
    }
}

// The first `count` elements, or as many as there are lanes; where there are fewer, zeros follow.
template <class T, class Element>
Vec<T> load_some(const Element* from, int64_t count) {
    constexpr int lanes = Vec<T>::lanes;
    if (count >= lanes) return load(from);
    if constexpr (sizeof(Element) == sizeof(T)) {
        return Vec<T>::load_some(from, count);
    } else {
        Element some[lanes] = {};
        for (int64_t i = 0; i < count; ++i) some[i] = from[i];
        return load(some);
    }
}

// Likewise.
template <class Element, class T>
void store_some(Vec<T> x, int64_t count, Element* to) {
    constexpr int lanes = Vec<T>::lanes;
    if (count >= lanes) return store(x, to);
    if constexpr (sizeof(Element) == sizeof(T)) {
        x.store_some(to, count);
    } else {
        Element some[lanes];
        store(x, some);
        for (int64_t i = 0; i < count; ++i) to[i] = some[i];
    }
}

// The row of a key, and with it those of all keys up to the next multiple of kPageKeys; in the
// pages of one of the block's rows.
template <class Element>
const Element* row_of(const Block& block, const KeyRows& rows, int64_t key, int64_t r = 0) {
    const auto* const data = static_cast<const Element*>(rows.data);
    const int64_t* const pages = block.rows[r].pages;
    if (pages == nullptr) return data + key * rows.stride;
    return data + pages[key / block.page_keys] * rows.page_stride +
           key % block.page_keys * rows.stride;
}

// Rows of `columns` elements, one after the other in `to`.
template <class T, class Element>
void widen(const Element* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
    constexpr int lanes = Vec<T>::lanes;
    for (; rows > 0; --rows, from += stride, to += columns) {
        int64_t d = 0;
        for (; d + lanes <= columns; d += lanes) load(from + d).store(to + d);
        for (; d < columns; ++d) to[d] = added<T>(from[d]);
    }
}

}  // namespace
}  // namespace fastattn
