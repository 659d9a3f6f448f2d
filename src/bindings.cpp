// SPDX-License-Identifier: Apache-2.0
//
// What do the arrays look like in memory? NumPy arrays in, plain structs out. The only file that
// knows Python. Called by python/fastattn; calls cpp/attention.h. Values are trusted; of the
// shapes, what memory safety needs is checked again.
#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <optional>

#include "attention.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

Dtype dtype_of(const py::array& array) {
    const py::dtype dtype = array.dtype();
    const auto size = dtype.itemsize();
    switch (dtype.kind()) {
        case 'b':
            return Dtype::kBool;
        case 'f':
            if (size == 2) return Dtype::kFloat16;
            if (size == 4) return Dtype::kFloat32;
            if (size == 8) return Dtype::kFloat64;
            break;
        case 'V':
            if (dtype.attr("name").cast<std::string>() == "bfloat16") return Dtype::kBFloat16;
            break;
    }
    throw py::type_error("unsupported dtype " + py::str(dtype).cast<std::string>());
}

void require(bool holds, const char* rule) {
    if (!holds) throw py::value_error(rule);
}

// `array` as batch_shape + the last `core` of (heads, rows, cols): missing or single axes repeat.
// core 3: all of them; core 2: (heads, rows), for lse.
Array view(const py::array& array, const std::vector<int64_t>& batch_shape, int64_t heads,
           int64_t rows, int64_t cols, int core = 3) {
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
const T* values(const py::object& object, int64_t size) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
        throw py::type_error("a per-batch or per-head array has the wrong dtype or layout");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    require(array.size() == size, "a per-batch or per-head array has the wrong size");
    return static_cast<const T*>(array.data());
}

AttentionArgs arguments(const py::array& query, const py::array& key, const py::array& value,
                        const py::object& out, const py::object& lse,
                        const std::vector<int64_t>& batch_shape, const py::object& mask,
                        const py::object& bias, const py::object& alibi_slopes,
                        const py::object& sinks, const py::object& query_offset,
                        const py::object& kv_lengths, double scale, double softcap, int64_t left,
                        int64_t right) {
    AttentionArgs args;
    args.batch_shape = batch_shape;
    args.q_heads = axis_size(query, 2);
    args.q_len = axis_size(query, 1);
    args.head_dim = axis_size(query, 0);
    args.kv_heads = axis_size(key, 2);
    args.kv_len = axis_size(key, 1);
    args.value_head_dim = axis_size(value, 0);
    require(query.ndim() >= 2 && key.ndim() >= 2 && value.ndim() >= 2, "arrays need two axes");
    require(args.head_dim >= 1, "head_dim must be at least 1");
    require(args.q_heads == 0 || (args.kv_heads >= 1 && args.q_heads % args.kv_heads == 0),
            "q_heads must be a multiple of kv_heads");
    int64_t batch = 1;
    for (const int64_t size : batch_shape) batch *= size;
    args.query = view(query, batch_shape, args.q_heads, args.q_len, args.head_dim);
    args.key = view(key, batch_shape, args.kv_heads, args.kv_len, args.head_dim);
    args.value = view(value, batch_shape, args.kv_heads, args.kv_len, args.value_head_dim);
    const Dtype dtype = args.query.dtype;
    const Dtype kv_dtype = args.key.dtype;
    const bool half = kv_dtype == Dtype::kFloat16 || kv_dtype == Dtype::kBFloat16;
    require(dtype != Dtype::kBool && args.value.dtype == kv_dtype, "dtypes are not supported");
    require(kv_dtype == dtype || (half && dtype == Dtype::kFloat32), "dtypes do not go together");
    for (const Array* array : {&args.query, &args.key, &args.value}) {
        require(array->col_stride <= 1 && array->col_stride >= 0,
                "the last axis is not contiguous");
    }
    require(axis_size(key, 0) == args.head_dim, "head_dim of query and key differ");
    require(axis_size(value, 1) == args.kv_len, "kv_len of key and value differ");
    if (!out.is_none()) {
        auto array = py::reinterpret_borrow<py::array>(out);
        require(array.writeable(), "out is not writeable");
        require(axis_size(array, 0) == args.value_head_dim && axis_size(array, 1) == args.q_len &&
                    axis_size(array, 2) == args.q_heads,
                "out has the wrong shape");
        args.out = view(array, batch_shape, args.q_heads, args.q_len, args.value_head_dim);
        require(args.out.dtype == dtype && args.out.col_stride <= 1 && args.out.col_stride >= 0,
                "out has the wrong dtype or layout");
    }
    if (!lse.is_none()) {
        auto array = py::reinterpret_borrow<py::array>(lse);
        require(array.writeable(), "lse is not writeable");
        args.lse = view(array, batch_shape, args.q_heads, args.q_len, 1, 2);
        const bool wide = dtype == Dtype::kFloat64;
        require(args.lse.dtype == (wide ? Dtype::kFloat64 : Dtype::kFloat32),
                "lse has the wrong dtype");
    }
    if (!mask.is_none()) {
        args.mask = view(py::reinterpret_borrow<py::array>(mask), batch_shape, args.q_heads,
                         args.q_len, args.kv_len);
    }
    if (!bias.is_none()) {
        args.bias = view(py::reinterpret_borrow<py::array>(bias), batch_shape, args.q_heads,
                         args.q_len, args.kv_len);
    }
    args.alibi_slopes = values<double>(alibi_slopes, batch * args.q_heads);
    args.sinks = values<double>(sinks, args.q_heads);
    args.query_offset = values<int64_t>(query_offset, batch);
    args.kv_lengths = values<int64_t>(kv_lengths, batch);
    for (int64_t b = 0; args.kv_lengths != nullptr && b < batch; ++b) {
        require(args.kv_lengths[b] >= 0 && args.kv_lengths[b] <= args.kv_len,
                "kv_lengths must lie in 0..kv_len");
    }
    args.scale = scale;
    args.softcap = softcap;
    args.left = left;
    args.right = right;
    return args;
}

bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

[[noreturn]] void wait_for_the_end() {
    for (;;) pause();
}

// Takes the GIL by the function given. While the interpreter ends, only the thread that ends it can
// have it. Before Python 3.14 another one that asks is unwound, which C++ frames would not let
// pass; it waits for the end of the process instead, as it does since then.
template <class Take>
auto take_gil(const Take& take) {
    if (interpreter_is_ending()) wait_for_the_end();
    try {
        return take();
    } catch (const abi::__forced_unwind&) {  // it began to end just now
        wait_for_the_end();
    }
}

// Takes the GIL for a moment, in the thread that handles signals; a signal's exception stays set
// for the caller to throw.
bool signal_arrived() {
    const bool main_thread = syscall(SYS_gettid) == getpid();
    if (!main_thread || interpreter_is_ending()) return false;
    const PyGILState_STATE state = take_gil([] { return PyGILState_Ensure(); });
    const bool arrived = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return arrived;
}

// Runs work without the GIL; not by pybind11's guard, for what take_gil() says. A thread that has
// the GIL while the interpreter ends is the one that ends it, in some object's destructor: it keeps
// it, and nobody else could get it.
template <class Work>
auto without_gil(const Work& work) {
    if (interpreter_is_ending()) return work();
    PyThreadState* const state = PyEval_SaveThread();
    std::optional<decltype(work())> result;
    std::exception_ptr failure;
    try {
        result = work();
    } catch (...) {
        failure = std::current_exception();
    }
    take_gil([&] { PyEval_RestoreThread(state); });
    if (failure) std::rethrow_exception(failure);
    return *result;
}

// The arguments shared by attention and explain, with whatever else `call` needs.
#define FASTATTN_PARAMETERS                                                                      \
    const py::array &query, const py::array &key, const py::array &value, const py::object &out, \
        const py::object &lse, const std::vector<int64_t>&batch_shape, const py::object &mask,   \
        const py::object &bias, const py::object &alibi_slopes, const py::object &sinks,         \
        const py::object &query_offset, const py::object &kv_lengths, double scale,              \
        double softcap, int64_t left, int64_t right
#define FASTATTN_ARGUMENTS                                                                   \
    query, key, value, out, lse, batch_shape, mask, bias, alibi_slopes, sinks, query_offset, \
        kv_lengths, scale, softcap, left, right

void attend(FASTATTN_PARAMETERS) {
    const AttentionArgs args = arguments(FASTATTN_ARGUMENTS);
    require(args.out.data != nullptr, "out is missing");
    const bool finished = without_gil([&] { return attention(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

py::dict explain(FASTATTN_PARAMETERS) {
    const AttentionArgs args = arguments(FASTATTN_ARGUMENTS);
    const Plan plan = without_gil([&] { return plan_attention(args); });
    int64_t batch = 1;
    for (const int64_t size : args.batch_shape) batch *= size;
    const double dims = double(args.head_dim + args.value_head_dim);
    py::dict report;
    report["kernel"] = plan.few_queries ? "few queries" : "tiled";
    report["isa"] = isa();
    report["query_tile"] = plan.query_tile;
    report["key_tile"] = plan.key_tile;
    report["tiles"] = plan.tiles;
    report["tiles_skipped"] = plan.tiles_skipped;
    report["tiles_edge"] = plan.tiles_edge;
    report["pairs_computed"] = plan.pairs_computed;
    report["flops"] = py::int_(py::float_(2 * double(plan.pairs_computed) * dims));
    report["bytes"] =
        py::int_(py::float_(double(batch) * dims *
                            (double(query.itemsize()) * double(args.q_heads * args.q_len) +
                             double(key.itemsize()) * double(args.kv_heads * args.kv_len))));
    report["scratch_bytes"] = plan.scratch_bytes;
    report["threads"] = plan.threads;
    return report;
}

Dtype dtype_named(const std::string& name) {
    if (name == "float32") return Dtype::kFloat32;
    if (name == "float64") return Dtype::kFloat64;
    throw py::value_error("dtype_name must be float32 or float64, got " + name);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used(), py::multiple_interpreters::not_supported()) {
    m.attr("__version__") = FASTATTN_VERSION;
    m.attr("MOST_THREADS") = kMostThreads;
    m.def("attention", attend);
    m.def("explain", explain);
    m.def("isa", isa);
    m.def("isas", isas);
    m.def("supported_isas", supported_isas);
    m.def("set_isa", [](const std::optional<std::string>& name) { set_isa(name.value_or("")); });
    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", get_num_threads);
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
