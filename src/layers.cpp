// SPDX-License-Identifier: Apache-2.0
//
// The layers of python/fastattn/nn.py, from NumPy arrays to cpp/layers.h. Values are trusted; what
// memory safety needs is checked again.
#include "layers.h"

#include <pybind11/numpy.h>

#include "arrays.h"
#include "calls.h"
#include "gil.h"

namespace fastattn {
namespace {

constexpr Interrupt kInterrupt{signal_arrived};
constexpr int64_t kShort = 1 << 14;  // numbers, for which the GIL is not worth letting go

template <class Work>
void run(int64_t numbers, const Work& work) {
    if (!(numbers < kShort ? work() : without_gil(work))) throw py::error_already_set();
}

// The numbers of a contiguous array of so many float32.
const float* floats(const py::array& array, int64_t size) { return values<float>(array, size); }

float* result(const py::array& array, int64_t size) {
    require(array.writeable(), "out is not writeable");
    return const_cast<float*>(floats(array, size));
}

// The rows of an array, and the numbers of one.
struct Rows {
    explicit Rows(const py::array& x) : size(x.size()), dim(axis_size(x, 0)) {
        require(x.ndim() >= 1, "x has no axis");
        rows = dim == 0 ? 0 : size / dim;
    }
    int64_t size, dim, rows;
};

void run_gelu(const py::array& x, bool by_tanh, const py::array& out) {
    const int64_t size = x.size();
    const float* const from = floats(x, size);
    float* const to = result(out, size);
    run(size, [&] { return gelu(from, to, size, by_tanh, kInterrupt); });
}

template <auto Layer>
void run_gated(const py::array& gate, const py::array& up, const py::array& out) {
    const int64_t size = gate.size();
    const float *const g = floats(gate, size), *const u = floats(up, size);
    float* const to = result(out, size);
    run(size, [&] { return Layer(g, u, to, size, kInterrupt); });
}

void run_layer_norm(const py::array& x, const py::array& weight, const py::array& bias, double eps,
                    const py::array& out) {
    const Rows all(x);
    const float* const from = floats(x, all.size);
    const float *const w = floats(weight, all.dim), *const b = floats(bias, all.dim);
    float* const to = result(out, all.size);
    run(all.size, [&] { return layer_norm(from, w, b, eps, to, all.rows, all.dim, kInterrupt); });
}

void run_rms_norm(const py::array& x, const py::array& weight, double eps, const py::array& out) {
    const Rows all(x);
    const float *const from = floats(x, all.size), *const w = floats(weight, all.dim);
    float* const to = result(out, all.size);
    run(all.size, [&] { return rms_norm(from, w, eps, to, all.rows, all.dim, kInterrupt); });
}

void run_softmax(const py::array& x, bool log, const py::array& out) {
    const Rows all(x);
    const float* const from = floats(x, all.size);
    float* const to = result(out, all.size);
    run(all.size, [&] { return softmax(from, to, all.rows, all.dim, log, kInterrupt); });
}

void run_rotary(const py::array& x, const py::array& cos, const py::array& sin,
                const py::array& out) {
    require(x.ndim() == 3 && cos.ndim() == 2, "x needs three axes, cos two");
    const int64_t tokens = x.shape(0), heads = x.shape(1), head_dim = x.shape(2);
    const int64_t half = cos.shape(1);
    require(2 * half <= head_dim, "cos has too many columns");
    const float* const from = floats(x, x.size());
    const float *const c = floats(cos, tokens * half), *const s = floats(sin, tokens * half);
    float* const to = result(out, x.size());
    run(x.size(),
        [&] { return rotary(from, c, s, to, tokens, heads, head_dim, half, kInterrupt); });
}

}  // namespace

void register_layers(py::module_& m) {
    m.def("gelu", run_gelu);
    m.def("swiglu", run_gated<swiglu>);
    m.def("geglu", run_gated<geglu>);
    m.def("layer_norm", run_layer_norm);
    m.def("rms_norm", run_rms_norm);
    m.def("softmax", run_softmax);
    m.def("rotary", run_rotary);
}

}  // namespace fastattn
