// SPDX-License-Identifier: Apache-2.0
//
// The layers of a model beside its products and attention: activations number by number, norms,
// rotary embedding and softmax row by row, all in float32. Called by layers.cpp through the table
// in kernel.cpp. A number is read from memory once; where a row is gone over again, it is near by
// then. What is computed of a row depends on nothing else, nor on where it lies.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "vec.h"

namespace fastattn {
namespace {

// visit(i, count): the vectors of n numbers, each of `count` numbers from i on. Once inlined, count
// is a constant for all but the last.
template <class Visit>
[[gnu::always_inline]] inline void for_each_vector(int64_t n, const Visit& visit) {
    constexpr int lanes = Vec<float>::lanes;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) visit(i, lanes);
    if (i < n) visit(i, int(n - i));
}

// The first `count` numbers; the other lanes hold `rest`. What lies in a mapped file may be
// anywhere.
[[gnu::always_inline]] inline Vec<float> load_some(const float* from, int count, float rest = 0) {
    constexpr int lanes = Vec<float>::lanes;
    if (count >= lanes) return load(from);
    struct [[gnu::packed]] Anywhere {
        float number;
    };
    const auto* const numbers = reinterpret_cast<const Anywhere*>(from);
    float some[lanes];
    for (int i = 0; i < lanes; ++i) some[i] = i < count ? numbers[i].number : rest;
    return load(some);
}

// The numbers of a row folded into `folds` vectors in turn, and these together: in an order that n
// alone decides. fold(into, i, count) changes `into`.
template <class Fold, class Join>
[[gnu::always_inline]] inline Vec<float> folded(int64_t n, Vec<float> start, const Fold& fold,
                                                const Join& join) {
    constexpr int lanes = Vec<float>::lanes, folds = 4;
    Vec<float> part[folds] = {start, start, start, start};
    int64_t i = 0;
    for (; i + folds * lanes <= n; i += folds * lanes) {
#pragma GCC unroll 4
        for (int k = 0; k < folds; ++k) fold(part[k], i + k * lanes, lanes);
    }
    for_each_vector(n - i, [&](int64_t j, int count) { fold(part[0], i + j, count); });
    return join(join(part[0], part[1]), join(part[2], part[3]));
}

template <class Term>
[[gnu::always_inline]] inline float sum_of(int64_t n, const Term& term) {
    return sum_across(folded(
        n, Vec<float>(0.0f),
        [&](Vec<float>& into, int64_t i, int count) { into = into + term(i, count); },
        [](Vec<float> a, Vec<float> b) { return a + b; }));
}

// exp(x + rest) for x <= 0 and a rest that is small beside 1; exactly 0 below -104, where it would
// round to it. log(2) is taken off in two parts, so that the product with the first is exact.
inline Vec<float> exp(Vec<float> x, Vec<float> rest = 0.0f) {
    x = max(Vec<float>(-104.0f), x);
    Vec<float> n;
    isa::split((x * Vec<float>(1.44269504f)).v, n.v);
    Vec<float> f = fma(n, Vec<float>(-0x1.63p-1f), x);
    f = (fma(n, Vec<float>(2.12194440e-4f), f) + rest) * Vec<float>(1.44269504f);
    return times_power_of_two(fma(exp2_slope(f), f, Vec<float>(1.0f)), n);
}

// 1 / (1 + exp(-x)).
inline Vec<float> sigmoid(Vec<float> x) {
    const Vec<float> e = exp(min(x, Vec<float>(0.0f) - x)), one = 1.0f;
    return select<float>(x < Vec<float>(0.0f), e, one) / (one + e);
}

// The share of a normal distribution below x. Above z = |x| lies exp(-z^2 / 2) P(u) / (z + c) with
// u = (z - c) / (z + c), after Shepherd and Laframboise, https://doi.org/10.2307/2007699; c = 2.5,
// and P a minimax polynomial for z <= 14.5, of relative error 1.6e-8. The square is split in two,
// of which the first part is exact.
inline Vec<float> normal_share(Vec<float> x) {
    const Vec<float> z = min(Vec<float>(15.0f), abs(x)), one = 1.0f;
    const Vec<float> high = typename Vec<float>::Native(Vec<float>::Mask(z.v) & ~0xfff);
    const Vec<float> power =
        exp(high * high * Vec<float>(-0.5f), (z - high) * (z + high) * Vec<float>(-0.5f));
    const Vec<float> inverse = one / (z + Vec<float>(2.5f));
    const Vec<float> u = fma(inverse, Vec<float>(-5.0f), one);
    Vec<float> p = -1.57266372e-4f;
    p = fma(p, u, Vec<float>(-3.10864368e-4f));
    p = fma(p, u, Vec<float>(6.84344282e-4f));
    p = fma(p, u, Vec<float>(2.52329666e-3f));
    p = fma(p, u, Vec<float>(-1.60096103e-3f));
    p = fma(p, u, Vec<float>(-1.63860214e-2f));
    p = fma(p, u, Vec<float>(9.23591483e-3f));
    p = fma(p, u, Vec<float>(1.31986965e-1f));
    p = fma(p, u, Vec<float>(-4.33692014e-1f));
    p = fma(p, u, Vec<float>(7.0665666e-1f));
    const Vec<float> above = p * inverse * power;
    return select<float>(x < Vec<float>(0.0f), above, one - above);
}

// By the formula with tanh, which is a sigmoid of twice its argument.
inline Vec<float> rough_normal_share(Vec<float> x) {
    const Vec<float> cubic = fma(x * x, Vec<float>(0.0713548163f), Vec<float>(1.59576912f));
    return sigmoid(x * cubic);
}

template <Vec<float> (*Share)(Vec<float>)>
void activate(const float* x, float* out, int64_t n) {
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(x + i, count);
        store_some(a * Share(a), count, out + i);
    });
}

template <Vec<float> (*Share)(Vec<float>)>
void activate_gated(const float* gate, const float* up, float* out, int64_t n) {
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(gate + i, count);
        store_some(a * Share(a) * load_some(up + i, count), count, out + i);
    });
}

// The mean is rounded; what it leaves has a mean again, which makes up for it.
void layer_norm(const float* x, const float* weight, const float* bias, double eps, float* out,
                int64_t n) {
    const float size = float(n);
    const Vec<float> mean =
        sum_of(n, [&](int64_t i, int count) { return load_some(x + i, count); }) / size;
    const float left = sum_of(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(x + i, count, mean.v[0]) - mean;
        store_some(a, count, out + i);
        return a;
    });
    const Vec<float> rest = left / size;
    const float square = sum_of(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(out + i, count, rest.v[0]) - rest;
        return a * a;
    });
    const Vec<float> scale = float(1 / __builtin_sqrt(double(square / size) + eps));
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec<float> a = (load_some(out + i, count) - rest) * scale;
        store_some(fma(a, load_some(weight + i, count), load_some(bias + i, count)), count,
                   out + i);
    });
}

void rms_norm(const float* x, const float* weight, double eps, float* out, int64_t n) {
    const float square = sum_of(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(x + i, count);
        return a * a;
    });
    const Vec<float> scale = float(1 / __builtin_sqrt(double(square / float(n)) + eps));
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec<float> a = load_some(x + i, count) * scale;
        store_some(a * load_some(weight + i, count), count, out + i);
    });
}

// The heads of one token. cos and sin: `half` numbers each.
void rotary(const float* x, const float* cos, const float* sin, float* out, int64_t heads,
            int64_t head_dim, int64_t half) {
    for (; heads > 0; --heads, x += head_dim, out += head_dim) {
        for_each_vector(half, [&](int64_t i, int count) {
            const Vec<float> a = load_some(x + i, count), b = load_some(x + half + i, count);
            const Vec<float> c = load_some(cos + i, count), s = load_some(sin + i, count);
            store_some(a * c - b * s, count, out + i);
            store_some(b * c + a * s, count, out + half + i);
        });
        const size_t kept = size_t(head_dim - 2 * half) * sizeof(float);
        __builtin_memcpy(out + 2 * half, x + 2 * half, kept);
    }
}

float largest_of(const float* x, int64_t n) {
    const Vec<float> least = -kInfinity<float>;
    return largest_across(folded(
        n, least,
        [&](Vec<float>& into, int64_t i, int count) {
            into = max(load_some(x + i, count, -kInfinity<float>), into);
        },
        [](Vec<float> a, Vec<float> b) { return max(a, b); }));
}

// NaN, also without one in the row, where its largest number is infinite.
void softmax(const float* x, float* out, int64_t n) {
    const Vec<float> largest = largest_of(x, n);
    const float sum = sum_of(n, [&](int64_t i, int count) {
        const Vec<float> power = exp(load_some(x + i, count, -kInfinity<float>) - largest);
        store_some(power, count, out + i);
        return power;
    });
    for_each_vector(n, [&](int64_t i, int count) {
        store_some(load_some(out + i, count) / Vec<float>(sum), count, out + i);
    });
}

void log_softmax(const float* x, float* out, int64_t n) {
    const Vec<float> largest = largest_of(x, n);
    const float sum = sum_of(n, [&](int64_t i, int count) {
        return exp(load_some(x + i, count, -kInfinity<float>) - largest);
    });
    const Vec<float> log_sum = float(__builtin_log(double(sum)));
    for_each_vector(n, [&](int64_t i, int count) {
        store_some(load_some(x + i, count) - largest - log_sum, count, out + i);
    });
}

constexpr LayerFunctions layer_functions = {
    .gelu = activate<normal_share>,
    .gelu_tanh = activate<rough_normal_share>,
    .swiglu = activate_gated<sigmoid>,
    .geglu = activate_gated<rough_normal_share>,
    .layer_norm = layer_norm,
    .rms_norm = rms_norm,
    .rotary = rotary,
    .softmax = softmax,
    .log_softmax = log_softmax,
};

}  // namespace
}  // namespace fastattn
