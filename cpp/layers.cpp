// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a layer: an item is some rows, or some numbers where each stands alone.
// Called by src/layers.cpp; calls the kernel's table (kernel/kernel.h) through parallel_for.
#include "layers.h"

#include <algorithm>

#include "kernel/kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t kItem = 1 << 14;   // numbers, about
constexpr double kSeconds = 0.5e-9;  // for each of them, roughly

// work(begin, end) for all rows in parts; a row is `dim` numbers.
template <class Work>
bool in_parts(int64_t rows, int64_t dim, Interrupt interrupt, const Work& work) {
    const int64_t part = std::max<int64_t>(kItem / std::max<int64_t>(dim, 1), 1);
    const int64_t items = (rows + part - 1) / part;
    const int threads = team_size(items, kSeconds * double(rows) * double(dim), threads_at_hand);
    return parallel_for(items, threads, interrupt, [&](int64_t item, int, const Stop&) {
        work(item * part, std::min(item * part + part, rows));
    });
}

// The same, row by row.
template <class Work>
bool by_rows(int64_t rows, int64_t dim, Interrupt interrupt, const Work& work) {
    return in_parts(rows, dim, interrupt, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) work(row);
    });
}

}  // namespace

bool gelu(const float* x, float* out, int64_t count, bool by_tanh, Interrupt interrupt) {
    const auto activate = by_tanh ? kernel().layers.gelu_tanh : kernel().layers.gelu;
    return in_parts(count, 1, interrupt, [&](int64_t begin, int64_t end) {
        activate(x + begin, out + begin, end - begin);
    });
}

bool swiglu(const float* gate, const float* up, float* out, int64_t count, Interrupt interrupt) {
    const auto activate = kernel().layers.swiglu;
    return in_parts(count, 1, interrupt, [&](int64_t begin, int64_t end) {
        activate(gate + begin, up + begin, out + begin, end - begin);
    });
}

bool geglu(const float* gate, const float* up, float* out, int64_t count, Interrupt interrupt) {
    const auto activate = kernel().layers.geglu;
    return in_parts(count, 1, interrupt, [&](int64_t begin, int64_t end) {
        activate(gate + begin, up + begin, out + begin, end - begin);
    });
}

bool layer_norm(const float* x, const float* weight, const float* bias, double eps, float* out,
                int64_t rows, int64_t dim, Interrupt interrupt) {
    const auto norm = kernel().layers.layer_norm;
    return by_rows(rows, dim, interrupt, [&](int64_t row) {
        norm(x + row * dim, weight, bias, eps, out + row * dim, dim);
    });
}

bool rms_norm(const float* x, const float* weight, double eps, float* out, int64_t rows,
              int64_t dim, Interrupt interrupt) {
    const auto norm = kernel().layers.rms_norm;
    return by_rows(rows, dim, interrupt,
                   [&](int64_t row) { norm(x + row * dim, weight, eps, out + row * dim, dim); });
}

bool softmax(const float* x, float* out, int64_t rows, int64_t dim, bool log, Interrupt interrupt) {
    const auto normalise = log ? kernel().layers.log_softmax : kernel().layers.softmax;
    return by_rows(rows, dim, interrupt,
                   [&](int64_t row) { normalise(x + row * dim, out + row * dim, dim); });
}

bool rotary(const float* x, const float* cos, const float* sin, float* out, int64_t tokens,
            int64_t heads, int64_t head_dim, int64_t half, Interrupt interrupt) {
    const auto turn = kernel().layers.rotary;
    const int64_t dim = heads * head_dim;
    return by_rows(tokens, dim, interrupt, [&](int64_t token) {
        turn(x + token * dim, cos + token * half, sin + token * half, out + token * dim, heads,
             head_dim, half);
    });
}

}  // namespace fastattn
