// SPDX-License-Identifier: Apache-2.0
//
// A linear layer of NumPy arrays, to cpp/linear.h. Values are trusted; what memory safety needs is
// checked again.
#include "linear.h"

#include <pybind11/numpy.h>

#include <string>
#include <vector>

#include "arrays.h"
#include "calls.h"
#include "gil.h"

namespace fastattn {
namespace {

struct Stored {
    Storage storage;
    int64_t numbers, bytes;  // of a block: so many numbers lie in so many bytes
};

Stored stored_as(const std::string& name) {
    if (name == "float32") return {Storage::kFloat32, 1, 4};
    if (name == "float16") return {Storage::kFloat16, 1, 2};
    if (name == "bfloat16") return {Storage::kBFloat16, 1, 2};
    if (name == "Q8_0") return {Storage::kQ8_0, 32, 34};
    if (name == "Q4_0") return {Storage::kQ4_0, 32, 18};
    if (name == "Q4_1") return {Storage::kQ4_1, 32, 20};
    throw py::value_error("storage is not known: " + name);
}

// x (rows, in_features), contiguous; a layer is its weight (out_features, its bytes or blocks),
// whose rows are, how it is stored, and a bias or None.
LinearArgs layer_of(const py::array& x, const py::tuple& layer) {
    require(py::isinstance<py::array>(layer[0]), "a weight is an array");
    const auto weight = py::reinterpret_borrow<py::array>(layer[0]);
    const Stored stored = stored_as(layer[1].cast<std::string>());
    require(x.ndim() == 2 && weight.ndim() == 2, "x and weight have two axes");
    LinearArgs args{};
    args.rows = x.shape(0);
    args.in_features = args.x_stride = x.shape(1);
    args.out_features = weight.shape(0);
    args.storage = stored.storage;
    require(args.in_features % stored.numbers == 0, "a row of the weight is whole blocks");
    require(weight.shape(1) * weight.itemsize() * stored.numbers == args.in_features * stored.bytes,
            "weight has other in_features than x");
    require(weight.size() == 0 || weight.shape(1) == 1 || weight.strides(1) == weight.itemsize(),
            "rows of the weight are contiguous");
    args.x = values<float>(x, x.size());
    args.weight = weight.data();
    args.weight_stride = weight.strides(0);
    args.bias = values<float>(layer[2], args.out_features);
    return args;
}

py::list multiply(const py::array& x, const py::args& layers) {
    py::list all;
    std::vector<LinearArgs> work;
    for (const py::handle layer : layers) {
        LinearArgs args = layer_of(x, layer.cast<py::tuple>());
        py::array_t<float> out({args.rows, args.out_features});
        args.out = out.mutable_data();
        all.append(out);
        if (args.rows > 0 && args.out_features > 0) work.push_back(args);
    }
    const bool finished = without_gil([&] { return linear(work, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
    return all;
}

}  // namespace

void register_linear(py::module_& m) { m.def("linear", multiply); }

}  // namespace fastattn
