// SPDX-License-Identifier: Apache-2.0
//
// The extension module `_core`. Only the files of this folder know Python: calls.cpp says which
// call it is, arrays.cpp what arrays look like, tensors.cpp reads tensors, linear.cpp and
// layers.cpp have a model's layers, gil.h lets go of Python's lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "arrays.h"
#include "attention.h"
#include "calls.h"
#include "gil.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

Dtype dtype_named(const std::string& name) {
    if (name == "float32") return Dtype::kFloat32;
    if (name == "float64") return Dtype::kFloat64;
    if (name == "bfloat16") return Dtype::kBFloat16;
    throw py::value_error("dtype_name must be float32, float64 or bfloat16, got " + name);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used(), py::multiple_interpreters::not_supported()) {
    m.attr("__version__") = FASTATTN_VERSION;
    m.attr("MOST_THREADS") = kMostThreads;
    register_calls(m);
    register_statistics(m);
    register_tensors(m);
    register_layers(m);
    register_linear(m);
    m.def("lie_apart", lie_apart);
    m.def("isa", isa);
    m.def("isas", isas);
    m.def("supported_isas", supported_isas);
    m.def("set_isa", [](const std::optional<std::string>& name) { set_isa(name.value_or("")); });
    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", get_num_threads);
    m.def("record_items", record_items);
    m.def("recorded_items", [] {
        py::list calls;
        for (const std::vector<double>& items : recorded_items()) {
            calls.append(py::array_t<double>(py::ssize_t(items.size()), items.data()));
        }
        return calls;
    });
    m.def("probe_fma", [](const std::string& dtype_name, double seconds) {
        return without_gil([&] { return measure_fma(dtype_named(dtype_name), seconds); });
    });
    m.def("probe_read", [](int64_t megabytes, int repeats) {
        return without_gil([&] { return measure_read(megabytes << 20, repeats); });
    });
    m.def("build_info", [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["openmp"] = _OPENMP;
        return info;
    });
}
