// SPDX-License-Identifier: Apache-2.0
//
// What Python may call, in parts: each registers its own functions in the module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "attention.h"

namespace fastattn {

namespace py = pybind11;

// Run a call without Python's lock. They throw what a signal's handler raised, as Ctrl-C.
void run(const AttentionArgs& args);
void run(const GradientArgs& args);

// A call that has no value, out or lse.
AttentionArgs weights_arguments(const py::array& query, const py::array& key,
                                const std::vector<int64_t>& batch_shape, const py::tuple& options);

void register_calls(py::module_& m);       // with NumPy arrays (calls.cpp)
void register_statistics(py::module_& m);  // of probabilities (statistics.cpp)
void register_tensors(py::module_& m);     // with tensors (tensors.cpp)
void register_layers(py::module_& m);      // layers of a model (layers.cpp)
void register_linear(py::module_& m);      // products of weights (linear.cpp)

}  // namespace fastattn
