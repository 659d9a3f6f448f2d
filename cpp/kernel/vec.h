// SPDX-License-Identifier: Apache-2.0
//
// Vec<T>: as many T as one register of the instruction set being compiled holds, and the few
// operations that the kernel needs. Plain arithmetic, comparisons and shuffles are the compiler's
// vector extensions, the same for every instruction set; what they cannot say (fused multiply-add,
// rounding, scaling by a power of two, the NaN rule of max) is in vec_<isa>.h.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif

namespace fastattn {
namespace {

template <class T>
struct Register;
template <>
struct Register<float> {
    typedef float Native __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
    using Int = int32_t;
};
template <>
struct Register<double> {
    typedef double Native __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
    using Int = int64_t;
};

template <class T>
struct Vec {
    static constexpr int lanes = kVectorBytes / sizeof(T);
    static constexpr int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }
    using Int = typename Register<T>::Int;
    using Native = typename Register<T>::Native;
    using Mask = typename Register<T>::Mask;  // per lane all bits or none

    Native v;

    Vec() = default;
    Vec(Native native) : v(native) {}
    Vec(T x) : v(x - Native{}) {}

    static Vec load(const T* from) {
        Vec x;
        __builtin_memcpy(&x.v, from, sizeof x.v);
        return x;
    }
    void store(T* to) const { __builtin_memcpy(to, &v, sizeof v); }

    // The first `count` lanes, fewer than all; the others are 0, or not stored. No other memory is
    // touched. AddressSanitizer does not see the instructions for it.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
    static Vec load_some(const T* from, int64_t count) { return isa::load_some(from, count); }
    void store_some(T* to, int64_t count) const { isa::store_some(v, to, count); }
#else
    static Vec load_some(const T* from, int64_t count) {
        Vec x = T(0);
        for (int64_t i = 0; i < count; ++i) x.v[i] = from[i];
        return x;
    }
    void store_some(T* to, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) to[i] = v[i];
    }
#endif

    friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
    friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
    friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
    friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
    friend Mask operator<(Vec a, Vec b) { return a.v < b.v; }
    friend Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
    friend Mask operator==(Vec a, Vec b) { return a.v == b.v; }
};

template <class T>
Vec<T> select(typename Vec<T>::Mask mask, Vec<T> yes, Vec<T> no) {
    return mask ? yes.v : no.v;
}

template <class T>
typename Vec<T>::Mask is_finite(Vec<T> x) {
    return x - x == Vec<T>(T(0));
}

template <class T>
bool any(typename Vec<T>::Mask mask) {
    return isa::any(isa::Wide(mask));
}

template <class T>
bool all_finite(Vec<T> x) {
    return isa::all_finite(x.v);
}

template <class T>
Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    return isa::fma(a.v, b.v, c.v);
}

// The larger one; the second where either is NaN.
template <class T>
Vec<T> max(Vec<T> a, Vec<T> b) {
    return isa::max(a.v, b.v);
}

// The smaller one; the second where either is NaN.
template <class T>
Vec<T> min(Vec<T> a, Vec<T> b) {
    return isa::min(a.v, b.v);
}

template <class T>
Vec<T> abs(Vec<T> x) {
    return max(x, Vec<T>(T(0)) - x);
}

// A 32-bit number for each lane of a Vec<T>, in the low half of 64 bits; what lies above it means
// nothing. Of two parts, the first has the even lanes, the second the odd ones.
template <class T>
struct Words {
    static constexpr int parts = sizeof(uint64_t) / sizeof(T);
    isa::Wide part[parts];

    // words: one for each lane.
    static Words load(const uint32_t* words) {
        uint64_t wide[parts][Vec<T>::lanes / parts];
        for (int i = 0; i < Vec<T>::lanes; ++i) wide[i % parts][i / parts] = words[i];
        Words x;
        __builtin_memcpy(&x, wide, sizeof x);
        return x;
    }
    static Words everywhere(uint32_t word) {
        Words x;
        for (int p = 0; p < parts; ++p) x.part[p] = uint64_t{word} - isa::Wide{};
        return x;
    }
};

// Which words are larger than `bound`.
inline Vec<float>::Mask above(Words<float> x, uint32_t bound) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    return Bits((x.part[0] & 0xffffffff) | x.part[1] << 32) > bound;
}
inline Vec<double>::Mask above(Words<double> x, uint32_t bound) {
    return Vec<double>::Mask(x.part[0] & 0xffffffff) > int64_t{bound};
}

// a[0], b[0], a[1], b[1], and so on, of the low (high) halves of masks.
template <class T>
typename Vec<T>::Mask zip_low(typename Vec<T>::Mask a, typename Vec<T>::Mask b) {
    using Native = typename Vec<T>::Native;
    return typename Vec<T>::Mask(isa::zip_low(Native(a), Native(b)));
}
template <class T>
typename Vec<T>::Mask zip_high(typename Vec<T>::Mask a, typename Vec<T>::Mask b) {
    using Native = typename Vec<T>::Native;
    return typename Vec<T>::Mask(isa::zip_high(Native(a), Native(b)));
}

// Pairs of bfloat16, each the size of a float, where there is an instruction for their products.
typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
// sum + a.first * b.first + a.second * b.second; subnormal numbers count as 0.
inline Vec<float> fma(Pairs a, Pairs b, Vec<float> sum) { return isa::add_dot(a, b, sum.v); }
// Lane i: a pair of first[i] and second[i].
inline Pairs to_pairs(Vec<float> first, Vec<float> second) {
    return isa::to_pairs(first.v, second.v);
}
// Pairs of neighbours: of low[0] and low[1], and so on, to those of high.
inline Pairs adjacent_pairs(Vec<float> low, Vec<float> high) {
    return isa::adjacent_pairs(low.v, high.v);
}
// Pairs of an element of `first` and the one of `second` in the same place. The sums that come of
// them are brought into the order of the elements by in_order().
inline void pair_rows(Pairs first, Pairs second, Pairs& a, Pairs& b) {
    isa::pair_rows(first, second, a, b);
}
inline void in_order(Vec<float>& a, Vec<float>& b) { isa::in_order(a.v, b.v); }
#else
constexpr bool kMultipliesPairs = false;
#endif

// p * 2^n for the n of isa::split(x, n), x <= 100 (float) or 900 (double), rounded once.
template <class T>
Vec<T> times_power_of_two(Vec<T> p, Vec<T> n) {
    return isa::times_power_of_two(p.v, n.v);
}

// (2^f - 1) / f for |f| <= 1/2: minimax polynomials of the relative error of 1 + f q(f), which is
// 3e-9 and 2e-17. That form makes 2^0 exactly 1.
inline Vec<float> exp2_slope(Vec<float> f) {
    Vec<float> q = 1.559467816e-4f;
    q = fma(q, f, Vec<float>(1.34066439e-3f));
    q = fma(q, f, Vec<float>(9.617692973e-3f));
    q = fma(q, f, Vec<float>(5.550310551e-2f));
    q = fma(q, f, Vec<float>(2.402265278e-1f));
    return fma(q, f, Vec<float>(6.93147215e-1f));
}
inline Vec<double> exp2_slope(Vec<double> f) {
    Vec<double> q = 4.078071929588336665e-10;
    q = fma(q, f, Vec<double>(7.0725704128144235096e-9));
    q = fma(q, f, Vec<double>(1.0180647659234138888e-7));
    q = fma(q, f, Vec<double>(1.3215442675329822143e-6));
    q = fma(q, f, Vec<double>(1.5252727385193868197e-5));
    q = fma(q, f, Vec<double>(1.540353044157213033e-4));
    q = fma(q, f, Vec<double>(1.3333558153439964747e-3));
    q = fma(q, f, Vec<double>(9.6181291076070023796e-3));
    q = fma(q, f, Vec<double>(5.5504108664790394552e-2));
    q = fma(q, f, Vec<double>(2.4022650695910098007e-1));
    return fma(q, f, Vec<double>(6.9314718055994569675e-1));
}

// The same, 3e-6: for what will be rounded to bfloat16.
inline Vec<float> rough_exp2_slope(Vec<float> f) {
    Vec<float> q = 9.582853038e-3f;
    q = fma(q, f, Vec<float>(5.590642468e-2f));
    q = fma(q, f, Vec<float>(2.402409861e-1f));
    return fma(q, f, Vec<float>(6.931241934e-1f));
}

// 2^x for x <= 100: exactly 1 at 0, exactly 0 at -inf, NaN stays.
template <bool Rough = false, class T>
Vec<T> exp2(Vec<T> x) {
    Vec<T> n, slope;
    const Vec<T> f = isa::split(x.v, n.v);
    if constexpr (Rough) {
        slope = rough_exp2_slope(f);
    } else {
        slope = exp2_slope(f);
    }
    return times_power_of_two(fma(slope, f, Vec<T>(T(1))), n);
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, computed without cancellation near 0.
template <class T>
Vec<T> tanh(Vec<T> x) {
    const Vec<T> bound = T(60), one = T(1);
    Vec<T> y = x * Vec<T>(T(2.8853900817779268147));  // 2 log2(e)
    y = max(Vec<T>(T(0)) - bound, y);
    y = select<T>(bound < y, bound, y);
    Vec<T> n;
    const Vec<T> f = isa::split(y.v, n.v);
    const Vec<T> power = times_power_of_two(one, n);
    const Vec<T> e = fma(exp2_slope(f) * f, power, power - one);
    return e / (e + Vec<T>(T(2)));
}

// Swaps rows and columns of a square of registers: each pass interleaves the upper half of the rows
// with the lower half, and log2(lanes) perfect shuffles make a transpose.
template <class T>
[[gnu::always_inline]] inline void transpose(Vec<T> (&rows)[Vec<T>::lanes]) {
    constexpr int n = Vec<T>::lanes;
#pragma GCC unroll 4
    for (int pass = 1; pass < n; pass *= 2) {
        Vec<T> next[n];
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = isa::zip_low(rows[i].v, rows[i + n / 2].v);
            next[2 * i + 1] = isa::zip_high(rows[i].v, rows[i + n / 2].v);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) rows[i] = next[i];
    }
}

// Lane i: the sum over the lanes of rows[i]. Each pass adds halves of half as many vectors.
template <class T, int N = Vec<T>::lanes / 2, int Count>
[[gnu::always_inline]] inline Vec<T> sums_across(const Vec<T> (&rows)[Count]) {
    Vec<T> halves[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const Vec<T> low = isa::zip_low(rows[i].v, rows[i + N].v);
        halves[i] = low + Vec<T>(isa::zip_high(rows[i].v, rows[i + N].v));
    }
    if constexpr (N > 1) {
        return sums_across<T, N / 2>(halves);
    } else {
        return halves[0];
    }
}

template <class T>
T largest_across(Vec<T> x) {
#pragma GCC unroll 4
    for (int n = Vec<T>::lanes; n > 1; n /= 2) {
        x = max(Vec<T>(isa::zip_low(x.v, x.v)), Vec<T>(isa::zip_high(x.v, x.v)));
    }
    return x.v[0];
}

template <class T>
T sum_across(Vec<T> x) {
#pragma GCC unroll 4
    for (int n = Vec<T>::lanes; n > 1; n /= 2) {
        x = Vec<T>(isa::zip_low(x.v, x.v)) + Vec<T>(isa::zip_high(x.v, x.v));
    }
    return x.v[0];
}

}  // namespace
}  // namespace fastattn
