// SPDX-License-Identifier: Apache-2.0
//
// What does a NumPy array look like in memory? See arrays.h.
#include "arrays.h"

#include <atomic>
#include <string>
#include <utility>

namespace fastattn {

void require(bool holds, const char* rule) {
    if (!holds) throw py::value_error(rule);
}

Dtype dtype_of(const py::array& array) {
    const py::dtype dtype = array.dtype();
    const auto size = dtype.itemsize();
    switch (dtype.kind()) {
        case 'b':
            return Dtype::kBool;
        case 'i':
            if (size == 1) return Dtype::kInt8;
            break;
        case 'f':
            if (size == 2) return Dtype::kFloat16;
            if (size == 4) return Dtype::kFloat32;
            if (size == 8) return Dtype::kFloat64;
            break;
        case 'V': {
            // What a bfloat16 tensor of another library is seen as, without ml_dtypes.
            if (dtype.num() == py::detail::npy_api::NPY_VOID_ && size == 2 && !dtype.has_fields()) {
                return Dtype::kBFloat16;
            }
            static std::atomic<int> bfloat16{-1};  // its number: comparing names is slow
            if (dtype.num() == bfloat16) return Dtype::kBFloat16;
            if (dtype.attr("name").cast<std::string>() != "bfloat16") break;
            bfloat16 = dtype.num();
            return Dtype::kBFloat16;
        }
    }
    throw py::type_error("unsupported dtype " + py::str(dtype).cast<std::string>());
}

Array view(const py::array& array, const std::vector<int64_t>& batch_shape, int64_t heads,
           int64_t rows, int64_t cols, int core) {
    const auto ndim = array.ndim();
    const auto item = array.itemsize();
    require(ndim <= py::ssize_t(batch_shape.size()) + core, "an array has too many axes");
    Array result;
    result.dtype = dtype_of(array);
    result.data = const_cast<void*>(array.data());
    // The stride of the axis that stands `from_end` axes before the end.
    const auto stride = [&](int from_end, int64_t size) -> int64_t {
        const auto axis = ndim - 1 - from_end;
        if (axis < 0 || array.shape(axis) == 1) return 0;
        require(array.shape(axis) == size, "an array does not fit the shape of the call");
        require(array.strides(axis) % item == 0, "a stride is not a multiple of the item size");
        return array.strides(axis) / item;
    };
    int from_end = 0;
    if (core == 3) result.col_stride = stride(from_end++, cols);
    if (array.size() == 0) result.col_stride = 1;  // NumPy gives any
    result.row_stride = stride(from_end++, rows);
    result.head_stride = stride(from_end++, heads);
    result.batch_strides.resize(batch_shape.size());
    for (size_t axis = batch_shape.size(); axis-- > 0;) {
        result.batch_strides[axis] = stride(from_end++, batch_shape[axis]);
    }
    return result;
}

int64_t axis_size(const py::array& array, int from_end) {
    return from_end < array.ndim() ? array.shape(array.ndim() - 1 - from_end) : 1;
}

template <class T>
const T* values(py::handle object, int64_t size) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
        throw py::type_error("a per-batch or per-head array has the wrong dtype or layout");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    require(array.size() == size, "a per-batch or per-head array has the wrong size");
    return static_cast<const T*>(array.data());
}

template const int64_t* values<int64_t>(py::handle, int64_t);
template const double* values<double>(py::handle, int64_t);
template const float* values<float>(py::handle, int64_t);

namespace {

// The bytes between which an array lies.
std::pair<uintptr_t, uintptr_t> extent(const py::array& array) {
    auto begin = reinterpret_cast<uintptr_t>(array.data()), end = begin;
    if (array.size() == 0) return {begin, end};
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        const py::ssize_t reach = (array.shape(axis) - 1) * array.strides(axis);
        (reach < 0 ? begin : end) += uintptr_t(reach);
    }
    return {begin, end + uintptr_t(array.itemsize())};
}

}  // namespace

bool lie_apart(const py::array& array, const py::tuple& others) {
    const auto [begin, end] = extent(array);
    for (const py::handle other : others) {
        if (!py::isinstance<py::array>(other)) continue;
        const auto [first, past] = extent(py::reinterpret_borrow<py::array>(other));
        if (begin < past && first < end) return false;
    }
    return true;
}

void require_rows(const Array& array, int64_t cols) {
    require(array.col_stride == 1 || cols <= 1, "the last axis is not contiguous");
}

int64_t product(const std::vector<int64_t>& shape) {
    int64_t product = 1;
    for (const int64_t size : shape) {
        require(size >= 0, "a batch axis has a negative size");
        product *= size;
    }
    return product;
}

}  // namespace fastattn
