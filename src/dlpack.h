// SPDX-License-Identifier: Apache-2.0
//
// What is a tensor of another library, in memory? Asked by tensors.cpp for calls so small that a
// NumPy view of each tensor would take longer than the work. The structs are DLPack's, version 1
// (https://dmlc.github.io/dlpack/latest/c_api.html): a tensor's type points to functions that say
// where a tensor lies, without a call into Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "attention.h"

namespace fastattn {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // in elements
    uint64_t byte_offset;

    int64_t size(int from_end) const { return shape[ndim - 1 - from_end]; }
    int64_t stride(int from_end) const { return strides[ndim - 1 - from_end]; }

    // The dtype, if a query may have it and the tensor lies in the CPU's memory.
    std::optional<Dtype> dtype() const {
        constexpr int kCpu = 1, kFloat = 2, kBFloat = 4;
        if (device_type != kCpu || lanes != 1) return {};
        if (code == kFloat && bits == 16) return Dtype::kFloat16;
        if (code == kFloat && bits == 32) return Dtype::kFloat32;
        if (code == kFloat && bits == 64) return Dtype::kFloat64;
        if (code == kBFloat && bits == 16) return Dtype::kBFloat16;
        return {};
    }
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    const DLPackExchangeAPI* previous;
    void *allocator, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DLTensor* tensor);  // shape and strides: the object's
    void* current_stream;
};

// The functions of a type, or null. The last type that had some is remembered, and never freed.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
    thread_local PyTypeObject* known = nullptr;
    thread_local const DLPackExchangeAPI* api = nullptr;
    if (type == known) return api;
    const pybind11::handle object(reinterpret_cast<PyObject*>(type));
    const char* const name = "__dlpack_c_exchange_api__";
    if (!pybind11::hasattr(object, name)) return nullptr;
    const pybind11::object capsule = object.attr(name);
    const auto* const found = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw pybind11::error_already_set();
    if (found->major != 1 || found->tensor_from_object == nullptr) return nullptr;
    object.inc_ref();
    known = type;
    return api = found;
}

// Where the tensor lies, as long as the object lives. Nothing if the type does not say it, or says
// it in another version.
inline std::optional<DLTensor> tensor_of(pybind11::handle object) {
    const DLPackExchangeAPI* const api = exchange_api(Py_TYPE(object.ptr()));
    DLTensor tensor;
    if (api == nullptr) return {};
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) {  // a tensor without memory, say
        PyErr_Clear();
        return {};
    }
    if (tensor.data == nullptr) return {};  // freed, or zeros that were never written down
    return tensor;
}

}  // namespace fastattn
