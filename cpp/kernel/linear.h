// SPDX-License-Identifier: Apache-2.0
//
// A linear layer: out = x weight^T + bias, with the weight as it is stored. in_features are cut
// into equal parts. A part of a number is one sum, whose lane l takes every lanes-th product from l
// on, in order, and then the lanes are added; the parts are added in order, and the bias at last.
// So a number depends on one row of x and one of the weight, whatever tile they stand in, and rows
// are read as they lie, since both run along the sum. Few rows widen the weights in registers, and
// many widen them once, part by part, into scratch memory. Called by linear.cpp through the table
// in kernel.cpp.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr int kStep = 32;  // in_features that are widened together: a block of quantised weights
constexpr int kStepVectors = kStep / Vec<float>::lanes;

// The micro-kernel's rows of x and of the weight: 8 x 3 sums (of 16 registers: 4 x 3), the weights
// and a vector of x.
constexpr int kLinearRows = kVectorBytes == 64 ? 8 : 4, kLinearColumns = 3;
constexpr int64_t kFewLinearRows = 4;   // widen the weights in registers
constexpr int64_t kMostFeatures = 768;  // of a part: rows of x stay in the first-level cache

using Step = Vec<float>[kStepVectors];

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The features of a part, in whole steps: the last may have fewer.
inline int64_t part_of(int64_t in_features) {
    const int64_t steps = (in_features + kStep - 1) / kStep;
    const int64_t parts = (steps * kStep + kMostFeatures - 1) / kMostFeatures;
    return parts <= 1 ? kMostFeatures : (steps + parts - 1) / parts * kStep;
}

// How a weight is stored: bytes() of so many numbers of a row, and what `step` number of a row is.
template <class Element>
struct Plain {
    static constexpr int64_t bytes(int64_t count) { return count * int64_t(sizeof(Element)); }
    static void widen(const char* row, int64_t step, const float*, Step& to) {
        const auto* const from = reinterpret_cast<const Element*>(row) + step * kStep;
#pragma GCC unroll 8
        for (int v = 0; v < kStepVectors; ++v) to[v] = load(from + v * Vec<float>::lanes);
    }
};

// A float16 as float, in all lanes. `halves` has all of them: to look one up takes no unit that the
// products need, as to convert and to broadcast it does.
inline Vec<float> broadcast_half(const float* halves, const char* from) {
    uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return Vec<float>(halves[bits]);
}

// ggml's Q8_0: a scale and 32 integers.
struct Q8_0 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 34; }
    static void widen(const char* row, int64_t step, const float* halves, Step& to) {
        const char* const block = row + step * 34;
        const Vec<float> scale = broadcast_half(halves, block);
#pragma GCC unroll 8
        for (int v = 0; v < kStepVectors; ++v) {
            isa::Int8s numbers;
            __builtin_memcpy(&numbers, block + 2 + v * sizeof numbers, sizeof numbers);
            to[v] = Vec<float>(isa::from_int8(numbers)) * scale;
        }
    }
};

// Integers of 4 bits: the low halves of 16 bytes, then the high ones. scales: a scale, and where
// it is given the smallest number.
template <class... Scales>
inline void widen_halves(const char* bytes, Step& to, Scales... scales) {
#pragma GCC unroll 4
    for (int v = 0; v < kStepVectors / 2; ++v) {
        isa::Int8s some;
        __builtin_memcpy(&some, bytes + v * sizeof some, sizeof some);
        isa::from_halves(some, scales.v..., to[v].v, to[v + kStepVectors / 2].v);
    }
}

// ggml's Q4_0: a scale and 32 integers, less 8.
struct Q4_0 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 18; }
    static void widen(const char* row, int64_t step, const float* halves, Step& to) {
        const char* const block = row + step * 18;
        widen_halves(block + 2, to, broadcast_half(halves, block));
    }
};

// ggml's Q4_1: a scale, a smallest number and 32 integers.
struct Q4_1 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 20; }
    static void widen(const char* row, int64_t step, const float* halves, Step& to) {
        const char* const block = row + step * 20;
        const Vec<float> scale = broadcast_half(halves, block);
        widen_halves(block + 4, to, scale, broadcast_half(halves, block + 2));
    }
};

// visit(storage) with the type above that reads weights of that kind.
template <class Visit>
void with_storage(Storage storage, const Visit& visit) {
    switch (storage) {
        case Storage::kFloat16:
            return visit(Plain<Float16>{});
        case Storage::kBFloat16:
            return visit(Plain<BFloat16>{});
        case Storage::kQ8_0:
            return visit(Q8_0{});
        case Storage::kQ4_0:
            return visit(Q4_0{});
        case Storage::kQ4_1:
            return visit(Q4_1{});
        default:
            return visit(Plain<float>{});
    }
}

// The last numbers of a row, with zeros behind them. Quantised rows end with a whole block: of
// them, those without features come here.
template <class Stored>
void widen_some(const char* row, int64_t step, int64_t count, const float* halves, Step& to) {
    char some[size_t(Stored::bytes(kStep))] = {};
    __builtin_memcpy(some, row + Stored::bytes(step * kStep), size_t(Stored::bytes(count)));
    Stored::widen(some, 0, halves, to);
}

// The sums of the lanes of `a` that are Apart from each other, in its half of the lanes, and of `b`
// in the other half.
template <int Apart>
[[gnu::always_inline]] inline Vec<float> add_apart(Vec<float> a, Vec<float> b) {
    using Native = decltype(a.v);
    typedef int32_t Index [[gnu::vector_size(kVectorBytes)]];
    constexpr int lanes = Vec<float>::lanes;
    Index own, other;
#pragma GCC unroll 16
    for (int lane = 0; lane < lanes; ++lane) {
        const int of = lane & Apart ? lanes : 0;
        own[lane] = of + lane, other[lane] = of + (lane ^ Apart);
    }
    return Vec<float>(Native(__builtin_shuffle(a.v, b.v, own))) +
           Vec<float>(Native(__builtin_shuffle(a.v, b.v, other)));
}

// The sum over the lanes of each vector, always in the same order: each pass adds the halves of
// all, and makes one vector of two. lane_sum() is where the sum of vector i then lies.
template <int Count, int Apart = Vec<float>::lanes / 2>
[[gnu::always_inline]] inline void lane_sums(const Vec<float> (&sum)[Count], float* to) {
    constexpr int half = (Count + 1) / 2;
    if constexpr (Apart == 0) {
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) sum[i].store(to + i * Vec<float>::lanes);
    } else {
        Vec<float> next[half];
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) next[i] = add_apart<Apart>(sum[i], sum[(i + half) % Count]);
        lane_sums<half, Apart / 2>(next, to);
    }
}
constexpr int lane_sum(int count, int i) {
    int lane = 0;
    for (int apart = Vec<float>::lanes / 2; apart > 0; apart /= 2) {
        count = (count + 1) / 2;
        if (i >= count) lane += apart, i -= count;
    }
    return i * Vec<float>::lanes + lane;
}

// Stores a part of a tile of Rows x Columns, or adds it to the parts before; of the sums, the rows
// of x run first.
template <int Rows, int Columns>
[[gnu::always_inline]] inline void add_part(const LinearBlock& block, int64_t row, int64_t column,
                                            bool first, const Vec<float> (&sum)[Rows * Columns]) {
    float sums[Vec<float>::padded(Rows * Columns)];
    lane_sums(sum, sums);
    const int64_t rows = smaller(Rows, block.rows - row);
    const int64_t columns = smaller(Columns, block.out_features - column);
    float* const out = block.out + row * block.out_stride + column;
    const auto each = [&](auto&& number) {
        if (rows == Rows && columns == Columns) {
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
                for (int c = 0; c < Columns; ++c) number(r, c);
            }
        } else {
            for (int r = 0; r < rows; ++r) {
                for (int c = 0; c < columns; ++c) number(r, c);
            }
        }
    };
    const auto part = [&](int r, int c) { return sums[lane_sum(Rows * Columns, c * Rows + r)]; };
    if (first) {
        each([&](int r, int c) { out[r * block.out_stride + c] = part(r, c); });
    } else {
        each([&](int r, int c) { out[r * block.out_stride + c] += part(r, c); });
    }
}

// Adds the bias to rows whose parts are all there.
inline void add_bias(const LinearBlock& block, int64_t row, int64_t rows) {
    if (block.bias == nullptr) return;
    for (int64_t end = smaller(row + rows, block.rows); row < end; ++row) {
        float* const out = block.out + row * block.out_stride;
        for (int64_t c = 0; c < block.out_features; ++c) out[c] += block.bias[c];
    }
}

// The features behind the last whole step.
template <class Stored, int Rows, int Columns>
[[gnu::always_inline]] inline void add_rest(const LinearBlock& block, const char* weight,
                                            Vec<float> (&sum)[Rows * Columns]) {
    const int64_t step = block.in_features / kStep, rest = block.in_features % kStep;
    for (int c = 0; c < Columns; ++c) {
        Step w, xs;
        widen_some<Stored>(weight + c * block.weight_stride, step, rest, block.halves, w);
        for (int r = 0; r < Rows; ++r) {
            const auto* const row = reinterpret_cast<const char*>(block.x + r * block.x_stride);
            widen_some<Plain<float>>(row, step, rest, nullptr, xs);
            for (int v = 0; v < kStepVectors; ++v) {
                sum[c * Rows + r] = fma(xs[v], w[v], sum[c * Rows + r]);
            }
        }
    }
}

// A tile whose weights are widened in registers.
template <class Stored, int Rows, int Columns>
void multiply_few(const LinearBlock& block, int64_t column) {
    constexpr int lanes = Vec<float>::lanes;
    const int64_t steps = block.in_features / kStep, rest = block.in_features % kStep;
    const char* const weight =
        static_cast<const char*>(block.weight) + column * block.weight_stride;
    const int64_t ahead = Columns * block.weight_stride;
    const int64_t part = part_of(block.in_features) / kStep;
    for (int64_t begin = 0; begin == 0 || begin < steps + (rest > 0); begin += part) {
        const int64_t end = smaller(begin + part, steps);
        Vec<float> sum[Rows * Columns];
#pragma GCC unroll 32
        for (Vec<float>& s : sum) s = Vec<float>(0.0f);
        for (int64_t step = begin; step < end; ++step) {
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) {
                const char* const from = weight + c * block.weight_stride;
                // The tile behind this one is on its way.
                for (int64_t line = 0; line < Stored::bytes(kStep); line += 64) {
                    __builtin_prefetch(from + ahead + Stored::bytes(step * kStep) + line);
                }
                Step w;
                Stored::widen(from, step, block.halves, w);
#pragma GCC unroll 8
                for (int v = 0; v < kStepVectors; ++v) {
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; ++r) {
                        const float* const row = block.x + r * block.x_stride + step * kStep;
                        const auto xs = Vec<float>::load(row + v * lanes);
                        sum[c * Rows + r] = fma(xs, w[v], sum[c * Rows + r]);
                    }
                }
            }
        }
        const bool last = begin + part >= steps + (rest > 0);
        if (last && rest > 0) add_rest<Stored, Rows, Columns>(block, weight, sum);
        add_part<Rows, Columns>(block, 0, column, begin == 0, sum);
    }
}

template <class Stored, int Rows>
void multiply_columns(const LinearBlock& block) {
    constexpr int columns = Rows == 1 ? 8 : 4;
    int64_t column = 0;
    for (; column + columns <= block.out_features; column += columns) {
        multiply_few<Stored, Rows, columns>(block, column);
    }
    for (; column < block.out_features; ++column) multiply_few<Stored, Rows, 1>(block, column);
    add_bias(block, 0, Rows);
}

template <class Stored>
void multiply_few_rows(const LinearBlock& block) {
    if (block.rows == 1) return multiply_columns<Stored, 1>(block);
    if (block.rows == 2) return multiply_columns<Stored, 2>(block);
    if (block.rows == 3) return multiply_columns<Stored, 3>(block);
    multiply_columns<Stored, 4>(block);
}

// Puts the features [begin, end) of up to Rows rows in the micro-kernel's order, that is, lanes of
// the first row, of the second and so on, and then the next ones. A row that is not there is 0, and
// so is a feature.
template <class Stored, int Rows>
void pack(const char* from, int64_t stride, int64_t rows, int64_t in_features, int64_t begin,
          int64_t end, const float* halves, float* to) {
    constexpr int lanes = Vec<float>::lanes;
    for (int r = 0; r < Rows; ++r, from += stride) {
        float* place = to + r * lanes;
        for (int64_t k = begin; k < end; k += kStep) {
            Step step;
            if (r >= rows) {
                for (Vec<float>& v : step) v = Vec<float>(0.0f);
            } else if (in_features - k < kStep) {
                widen_some<Stored>(from, k / kStep, in_features - k, halves, step);
            } else {
                Stored::widen(from, k / kStep, halves, step);
            }
            for (int v = 0; v < kStepVectors; ++v, place += Rows * lanes) step[v].store(place);
        }
    }
}

// A tile of packed rows of x and of the weight, of which so many features are added to the sums.
[[gnu::always_inline]] inline void add_packed(const float* x, const float* weight, int64_t features,
                                              Vec<float> (&sum)[kLinearRows * kLinearColumns]) {
    constexpr int lanes = Vec<float>::lanes, rows = kLinearRows, columns = kLinearColumns;
    const float* const end = weight + features * columns;
    for (; weight < end; x += rows * lanes, weight += columns * lanes) {
        Vec<float> w[columns];
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) w[c] = Vec<float>::load(weight + c * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            auto xs = Vec<float>::load(x + r * lanes);
            isa::hold(xs.v);
#pragma GCC unroll 4
            for (int c = 0; c < columns; ++c) {
                sum[c * rows + r] = fma(xs, w[c], sum[c * rows + r]);
            }
        }
    }
}

struct LinearScratch {
    float *weight, *x;  // a part of each, packed
    size_t used;

    explicit LinearScratch(const LinearBlock& block, void* memory = nullptr) {
        Scratch scratch(memory);
        const int64_t tiles = (block.out_features + kLinearColumns - 1) / kLinearColumns;
        const int64_t part = smaller(part_of(block.in_features), features(block));
        weight = scratch.take<float>(tiles * kLinearColumns * part);
        x = scratch.take<float>(kLinearRows * part);
        used = scratch.used();
    }
    static int64_t features(const LinearBlock& block) {  // whole steps; one at least
        return block.in_features == 0 ? kStep : (block.in_features + kStep - 1) / kStep * kStep;
    }
};

// Adds the packed features [begin, end) of a row of tiles, while the next rows of x are fetched.
inline void multiply_tiles(const LinearBlock& block, const LinearScratch& scratch, int64_t row,
                           int64_t begin, int64_t end) {
    constexpr int count = kLinearRows * kLinearColumns, line = 64 / sizeof(float);
    const bool first = begin == 0;
    const float* const next_x = block.x + (row + kLinearRows) * block.x_stride + begin;
    const int64_t share = ((end - begin) * kLinearColumns / block.out_features / line + 1) * line;
    for (int64_t column = 0; column < block.out_features; column += kLinearColumns) {
        const int64_t next = column / kLinearColumns * share;
        for (int64_t k = next; k < smaller(next + share, end - begin); k += line) {
            for (int r = 0; r < kLinearRows; ++r) {
                __builtin_prefetch(next_x + r * block.x_stride + k, 0, 2);
            }
        }
        if (!first) {
            const float* const out = block.out + row * block.out_stride + column;
            for (int r = 0; r < kLinearRows; ++r) __builtin_prefetch(out + r * block.out_stride);
        }
        Vec<float> sum[count];
#pragma GCC unroll 32
        for (Vec<float>& s : sum) s = Vec<float>(0.0f);
        add_packed(scratch.x, scratch.weight + column * (end - begin), end - begin, sum);
        add_part<kLinearRows, kLinearColumns>(block, row, column, first, sum);
    }
    if (end == LinearScratch::features(block)) add_bias(block, row, kLinearRows);
}

template <class Stored>
void multiply_many(const LinearBlock& block) {
    const LinearScratch scratch(block, block.scratch);
    const int64_t features = LinearScratch::features(block), part = part_of(block.in_features);
    for (int64_t begin = 0; begin < features; begin += part) {
        const int64_t end = smaller(begin + part, features);
        const auto* weight = static_cast<const char*>(block.weight);
        for (int64_t column = 0; column < block.out_features; column += kLinearColumns) {
            pack<Stored, kLinearColumns>(weight, block.weight_stride, block.out_features - column,
                                         block.in_features, begin, end, block.halves,
                                         scratch.weight + column * (end - begin));
            weight += kLinearColumns * block.weight_stride;
        }
        for (int64_t row = 0; row < block.rows; row += kLinearRows) {
            pack<Plain<float>, kLinearRows>(
                reinterpret_cast<const char*>(block.x + row * block.x_stride),
                block.x_stride * int64_t(sizeof(float)), block.rows - row, block.in_features, begin,
                end, nullptr, scratch.x);
            multiply_tiles(block, scratch, row, begin, end);
        }
    }
}

inline size_t linear_scratch_bytes(const LinearBlock& block) {
    return block.rows > kFewLinearRows ? LinearScratch(block).used : 0;
}

inline void multiply_linear(const LinearBlock& block) {
    with_storage(block.storage, [&](auto stored) {
        if (block.rows > kFewLinearRows) return multiply_many<decltype(stored)>(block);
        multiply_few_rows<decltype(stored)>(block);
    });
}

}  // namespace
}  // namespace fastattn
