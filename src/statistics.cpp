// SPDX-License-Identifier: Apache-2.0
//
// Which statistics are asked for? NumPy arrays in, plain structs out, to cpp/attention.h.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "arrays.h"
#include "calls.h"
#include "gil.h"

namespace fastattn {
namespace {

// The memory of a result, contiguous, of `size` numbers; null for None.
void* result(py::handle object, const char* dtype, int64_t size) {
    if (object.is_none()) return nullptr;
    auto array = py::reinterpret_borrow<py::array>(object);
    require(array.writeable(), "a result is not writeable");
    require(array.dtype().is(py::dtype(dtype)) && array.size() == size &&
                (array.flags() & py::array::c_style) != 0,
            "a result has the wrong form");
    return array.mutable_data();
}

// Where blocks start.
const int64_t* starts(py::handle object, int64_t length, int64_t& count) {
    count = py::len(object);
    const int64_t* const found = values<int64_t>(object, count);
    require(count >= 1 && found[0] == 0, "blocks must start with 0");
    for (int64_t i = 1; i < count; ++i) {
        require(found[i - 1] < found[i], "blocks must ascend");
    }
    require(length == 0 || found[count - 1] < length, "a block starts beyond the end");
    return found;
}

// results: StatisticsArrays of python/fastattn/_statistics.py, in its order.
void statistics(const py::array& query, const py::array& key,
                const std::vector<int64_t>& batch_shape, const py::tuple& options,
                const py::tuple& arrays) {
    require(arrays.size() == 9, "there are nine more arrays");
    StatisticsArgs args;
    args.call = weights_arguments(query, key, batch_shape, options);
    const AttentionArgs& call = args.call;
    const char* const number = call.query.dtype == Dtype::kFloat64 ? "float64" : "float32";
    const int64_t heads = product(batch_shape) * call.q_heads, rows = heads * call.q_len;
    args.entropy = result(arrays[0], number, rows);
    args.maximum = result(arrays[1], number, rows);
    if (const py::object keys = arrays[2]; !keys.is_none()) {
        const auto shape = py::reinterpret_borrow<py::array>(keys);
        args.top = axis_size(shape, 0);
        args.top_keys = static_cast<int64_t*>(result(keys, "int64", rows * args.top));
        args.top_weights = result(arrays[3], number, rows * args.top);
        require(args.top_weights != nullptr, "weights are missing");
    }
    args.column_sums = result(arrays[4], number, heads * call.kv_len);
    if (const py::object weights = arrays[5]; !weights.is_none()) {
        args.row_weights = view(py::reinterpret_borrow<py::array>(weights), batch_shape,
                                call.q_heads, call.q_len, 1, 2);
        require(args.row_weights.dtype ==
                    (call.query.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
                "row_weights has the wrong dtype");
    }
    if (const py::object blocks = arrays[6]; !blocks.is_none()) {
        args.query_starts = starts(py::object(arrays[7]), call.q_len, args.query_blocks);
        args.key_starts = starts(py::object(arrays[8]), call.kv_len, args.key_blocks);
        args.blocks = result(blocks, number, heads * args.query_blocks * args.key_blocks);
    }
    const bool finished =
        without_gil([&] { return attention_statistics(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

}  // namespace

void register_statistics(py::module_& m) { m.def("attention_statistics", statistics); }

}  // namespace fastattn
