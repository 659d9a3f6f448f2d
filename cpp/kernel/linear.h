// SPDX-License-Identifier: Apache-2.0
//
// A linear layer: out = x weight^T + bias, with the weight as it is stored. Each number is one sum
// over in_features, whose lane l takes every lanes-th product from l on, in order; the lanes are
// added at last. It depends on one row of x and one of the weight, whatever tile they stand in, and
// rows are read as they lie, since both run along the sum. Few rows widen the weights in registers,
// and many widen them once, into scratch memory. Called by linear.cpp through the table in
// kernel.cpp.
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
constexpr int64_t kMostFeatures = 768;  // of rows of x that stay in the first-level cache

using Step = Vec<float>[kStepVectors];

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a weight is stored: bytes() of so many numbers of a row, and what `step` number of a row is.
template <class Element>
struct Plain {
    static constexpr int64_t bytes(int64_t count) { return count * int64_t(sizeof(Element)); }
    static void widen(const char* row, int64_t step, Step& to) {
        const auto* const from = reinterpret_cast<const Element*>(row) + step * kStep;
#pragma GCC unroll 8
        for (int v = 0; v < kStepVectors; ++v) to[v] = load(from + v * Vec<float>::lanes);
    }
};

// The first two float16 of a block, each in all lanes.
inline void broadcast_float16(const char* block, Vec<float>& first, Vec<float>& second) {
    uint32_t two;
    __builtin_memcpy(&two, block, sizeof two);
    isa::broadcast_float16(two, first.v, second.v);
}
inline Vec<float> broadcast_float16(const char* block) {
    Vec<float> first, second;
    broadcast_float16(block, first, second);
    return first;
}

// ggml's Q8_0: a scale and 32 integers.
struct Q8_0 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 34; }
    static void widen(const char* row, int64_t step, Step& to) {
        const char* const block = row + step * 34;
        const Vec<float> scale = broadcast_float16(block);
#pragma GCC unroll 8
        for (int v = 0; v < kStepVectors; ++v) {
            isa::Int8s numbers;
            __builtin_memcpy(&numbers, block + 2 + v * sizeof numbers, sizeof numbers);
            to[v] = Vec<float>(isa::from_int8(numbers)) * scale;
        }
    }
};

// Integers of 4 bits, times scale, and least: the low halves of 16 bytes, then the high ones. A
// scale times an integer is exact, so that one rounding is left.
inline void widen_halves(const char* bytes, Vec<float> scale, Vec<float> least, Step& to) {
#pragma GCC unroll 4
    for (int v = 0; v < kStepVectors / 2; ++v) {
        isa::Int8s some;
        __builtin_memcpy(&some, bytes + v * sizeof some, sizeof some);
        isa::from_halves(some, scale.v, least.v, to[v].v, to[v + kStepVectors / 2].v);
    }
}

// ggml's Q4_0: a scale and 32 integers, less 8.
struct Q4_0 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 18; }
    static void widen(const char* row, int64_t step, Step& to) {
        const char* const block = row + step * 18;
        const Vec<float> scale = broadcast_float16(block);
        widen_halves(block + 2, scale, scale * Vec<float>(-8.0f), to);
    }
};

// ggml's Q4_1: a scale, a smallest number and 32 integers.
struct Q4_1 {
    static constexpr int64_t bytes(int64_t count) { return count / kStep * 20; }
    static void widen(const char* row, int64_t step, Step& to) {
        const char* const block = row + step * 20;
        Vec<float> scale, least;
        broadcast_float16(block, scale, least);
        widen_halves(block + 4, scale, least, to);
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

// The last numbers of a row, with zeros behind them. Quantised rows end with a whole block.
template <class Stored>
void widen_some(const char* row, int64_t step, int64_t count, Step& to) {
    char some[size_t(Stored::bytes(kStep))] = {};
    __builtin_memcpy(some, row + Stored::bytes(step * kStep), size_t(Stored::bytes(count)));
    Stored::widen(some, 0, to);
}

// The sum over the lanes of each vector, always in the same order: each pass adds the halves of
// all, and makes one vector of two. lane_sum() is where the sum of vector i then lies.
template <int Count, int Lanes = Vec<float>::lanes>
[[gnu::always_inline]] inline void lane_sums(const Vec<float> (&sum)[Count], float* to) {
    constexpr int half = (Count + 1) / 2;
    if constexpr (Lanes == 1) {
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) sum[i].store(to + i * Vec<float>::lanes);
    } else {
        Vec<float> next[half];
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            const auto other =
                i + half < Count ? sum[i + half < Count ? i + half : i].v : Vec<float>(0.0f).v;
            const Vec<float> low = isa::zip_low(sum[i].v, other);
            next[i] = low + Vec<float>(isa::zip_high(sum[i].v, other));
        }
        lane_sums<half, Lanes / 2>(next, to);
    }
}
constexpr int lane_sum(int count, int i) {
    int lane = 0;
    for (int lanes = Vec<float>::lanes; lanes > 1; lanes /= 2) {
        count = (count + 1) / 2;
        lane = 2 * lane + (i >= count);
        i %= count;
    }
    return i * Vec<float>::lanes + lane;
}

// Stores what a tile of Rows x Columns has of the block; of the sums, the rows of x run first.
template <int Rows, int Columns>
[[gnu::always_inline]] inline void store_tile(const LinearBlock& block, int64_t row, int64_t column,
                                              const Vec<float> (&sum)[Rows * Columns]) {
    float sums[Vec<float>::padded(Rows * Columns)];
    lane_sums(sum, sums);
    const int64_t rows = block.rows - row, columns = block.out_features - column;
    float* to = block.out + row * block.out_stride + column;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, to += block.out_stride) {
        if (r >= rows) break;
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) {
            if (c >= columns) break;
            to[c] = sums[lane_sum(Rows * Columns, c * Rows + r)];
            if (block.bias != nullptr) to[c] += block.bias[column + c];
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
    Vec<float> sum[Rows * Columns];
#pragma GCC unroll 32
    for (Vec<float>& s : sum) s = Vec<float>(0.0f);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) {
            const char* const from = weight + c * block.weight_stride;
            // The tile behind this one is on its way.
            for (int64_t line = 0; line < Stored::bytes(kStep); line += 64) {
                __builtin_prefetch(from + ahead + Stored::bytes(step * kStep) + line);
            }
            Step w;
            Stored::widen(from, step, w);
#pragma GCC unroll 8
            for (int v = 0; v < kStepVectors; ++v) {
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) {
                    const auto xs =
                        Vec<float>::load(block.x + r * block.x_stride + step * kStep + v * lanes);
                    sum[c * Rows + r] = fma(xs, w[v], sum[c * Rows + r]);
                }
            }
        }
    }
    if (rest > 0) {
        for (int c = 0; c < Columns; ++c) {
            Step w, xs;
            widen_some<Stored>(weight + c * block.weight_stride, steps, rest, w);
            for (int r = 0; r < Rows; ++r) {
                const auto* const row = reinterpret_cast<const char*>(block.x + r * block.x_stride);
                widen_some<Plain<float>>(row, steps, rest, xs);
                for (int v = 0; v < kStepVectors; ++v) {
                    sum[c * Rows + r] = fma(xs[v], w[v], sum[c * Rows + r]);
                }
            }
        }
    }
    store_tile<Rows, Columns>(block, 0, column, sum);
}

template <class Stored, int Rows>
void multiply_columns(const LinearBlock& block) {
    constexpr int columns = Rows == 1 ? 8 : 4;
    int64_t column = 0;
    for (; column + columns <= block.out_features; column += columns) {
        multiply_few<Stored, Rows, columns>(block, column);
    }
    for (; column < block.out_features; ++column) multiply_few<Stored, Rows, 1>(block, column);
}

template <class Stored>
void multiply_few_rows(const LinearBlock& block) {
    if (block.rows == 1) return multiply_columns<Stored, 1>(block);
    if (block.rows == 2) return multiply_columns<Stored, 2>(block);
    if (block.rows == 3) return multiply_columns<Stored, 3>(block);
    multiply_columns<Stored, 4>(block);
}

// Puts up to Rows rows in the micro-kernel's order, that is, lanes of the first, of the second and
// so on, and then the next ones. A row that is not there is 0.
template <class Stored, int Rows>
void pack(const char* from, int64_t stride, int64_t rows, int64_t in_features, float* to) {
    constexpr int lanes = Vec<float>::lanes;
    for (int r = 0; r < Rows; ++r, from += stride) {
        float* place = to + r * lanes;
        for (int64_t k = 0; k == 0 || k < in_features; k += kStep) {
            Step step;
            if (r >= rows) {
                for (Vec<float>& v : step) v = Vec<float>(0.0f);
            } else if (in_features - k < kStep) {
                widen_some<Stored>(from, k / kStep, in_features - k, step);
            } else {
                Stored::widen(from, k / kStep, step);
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
    float *weight, *x, *sums;  // sums: of the tiles of a row of tiles, between two parts of x
    size_t used;

    explicit LinearScratch(const LinearBlock& block, void* memory = nullptr) {
        Scratch scratch(memory);
        const int64_t tiles = (block.out_features + kLinearColumns - 1) / kLinearColumns;
        weight = scratch.take<float>(tiles * kLinearColumns * features(block));
        x = scratch.take<float>(kLinearRows * features(block));
        sums = scratch.take<float>(tiles * kTileSums);
        used = scratch.used();
    }
    static int64_t features(const LinearBlock& block) {  // whole steps; one at least
        return block.in_features == 0 ? kStep : (block.in_features + kStep - 1) / kStep * kStep;
    }
    static constexpr int64_t kTileSums = kLinearRows * kLinearColumns * Vec<float>::lanes;
};

// Multiplies a row of tiles by the features [begin, end).
inline void multiply_tiles(const LinearBlock& block, const LinearScratch& scratch, int64_t row,
                           int64_t begin, int64_t end) {
    constexpr int lanes = Vec<float>::lanes, count = kLinearRows * kLinearColumns;
    const int64_t features = LinearScratch::features(block);
    float* sums = scratch.sums;
    for (int64_t column = 0; column < block.out_features; column += kLinearColumns) {
        Vec<float> sum[count];
#pragma GCC unroll 32
        for (int i = 0; i < count; ++i) {
            sum[i] = begin == 0 ? Vec<float>(0.0f) : Vec<float>::load(sums + i * lanes);
        }
        add_packed(scratch.x + begin * kLinearRows,
                   scratch.weight + column * features + begin * kLinearColumns, end - begin, sum);
        if (end == features) {
            store_tile<kLinearRows, kLinearColumns>(block, row, column, sum);
        } else {
#pragma GCC unroll 32
            for (int i = 0; i < count; ++i) sum[i].store(sums + i * lanes);
        }
        sums += LinearScratch::kTileSums;
    }
}

template <class Stored>
void multiply_many(const LinearBlock& block) {
    const LinearScratch scratch(block, block.scratch);
    const int64_t features = LinearScratch::features(block);
    const int64_t parts = (features + kMostFeatures - 1) / kMostFeatures;
    const int64_t part = (features / kStep + parts - 1) / parts * kStep;
    const char* weight = static_cast<const char*>(block.weight);
    for (int64_t column = 0; column < block.out_features; column += kLinearColumns) {
        pack<Stored, kLinearColumns>(weight, block.weight_stride, block.out_features - column,
                                     block.in_features, scratch.weight + column * features);
        weight += kLinearColumns * block.weight_stride;
    }
    for (int64_t row = 0; row < block.rows; row += kLinearRows) {
        pack<Plain<float>, kLinearRows>(
            reinterpret_cast<const char*>(block.x + row * block.x_stride),
            block.x_stride * int64_t(sizeof(float)), block.rows - row, block.in_features,
            scratch.x);
        for (int64_t begin = 0; begin < features; begin += part) {
            multiply_tiles(block, scratch, row, begin, smaller(begin + part, features));
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
