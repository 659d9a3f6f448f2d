// SPDX-License-Identifier: Apache-2.0
//
// What Python may call, in parts: each registers its own functions in the module.
#pragma once

#include <pybind11/pybind11.h>

#include "attention.h"

namespace fastattn {

namespace py = pybind11;

// Run a call without Python's lock. They throw what a signal's handler raised, as Ctrl-C.
void run(const AttentionArgs& args);
void run(const GradientArgs& args);

void register_calls(py::module_& m);    // with NumPy arrays (calls.cpp)
void register_tensors(py::module_& m);  // with tensors (tensors.cpp)
void register_layers(py::module_& m);   // layers of a model (layers.cpp)
void register_linear(py::module_& m);   // products of weights (linear.cpp)

}  // namespace fastattn
