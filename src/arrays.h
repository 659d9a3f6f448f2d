// SPDX-License-Identifier: Apache-2.0
//
// What does a NumPy array look like in memory? Values are trusted; of the shapes, what memory
// safety needs is checked again.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "attention.h"

namespace fastattn {

namespace py = pybind11;

void require(bool holds, const char* rule);

Dtype dtype_of(const py::array& array);

// `array` as batch_shape + the last `core` of (heads, rows, cols): missing or single axes repeat.
// core 3: all of them; core 2: (heads, rows), for lse.
Array view(const py::array& array, const std::vector<int64_t>& batch_shape, int64_t heads,
           int64_t rows, int64_t cols, int core = 3);

// Whether no other array begins before this one ends and ends after it begins. What is no array is
// not looked at.
bool lie_apart(const py::array& array, const py::tuple& others);

// The size of the axis that stands `from_end` axes before the end; 1 if there is none.
int64_t axis_size(const py::array& array, int from_end);

// The numbers of an array of `size` int64, double or float; null for None.
template <class T>
const T* values(py::handle object, int64_t size);

// Rows are contiguous.
void require_rows(const Array& array, int64_t cols);

int64_t product(const std::vector<int64_t>& shape);

}  // namespace fastattn
