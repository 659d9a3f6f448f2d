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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "attention.h"
#include "dlpack.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

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
            static std::atomic<int> bfloat16{-1};  // its number: a name takes long
            if (dtype.num() == bfloat16) return Dtype::kBFloat16;
            if (dtype.attr("name").cast<std::string>() != "bfloat16") break;
            bfloat16 = dtype.num();
            return Dtype::kBFloat16;
        }
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
const T* values(const py::object& object, int64_t size) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
        throw py::type_error("a per-batch or per-head array has the wrong dtype or layout");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    require(array.size() == size, "a per-batch or per-head array has the wrong size");
    return static_cast<const T*>(array.data());
}

// The arguments shared by all calls.
#define FASTATTN_PARAMETERS                                                                      \
    const py::array &query, const py::array &key, const py::array &value, const py::object &out, \
        const py::object &lse, const std::vector<int64_t>&batch_shape, const py::object &mask,   \
        const py::object &bias, const py::object &alibi_slopes, const py::object &sinks,         \
        const py::object &query_offset, const py::object &kv_lengths, double scale,              \
        double softcap, int64_t left, int64_t right, double dropout_p, uint64_t seed
#define FASTATTN_ARGUMENTS                                                                   \
    query, key, value, out, lse, batch_shape, mask, bias, alibi_slopes, sinks, query_offset, \
        kv_lengths, scale, softcap, left, right, dropout_p, seed

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

// Where the sequences' rows begin in packed arrays.
const int64_t* starts(const py::object& object, int64_t batch, int64_t rows, int64_t& longest) {
    const int64_t* const starts = values<int64_t>(object, batch + 1);
    require(starts[0] >= 0 && starts[batch] <= rows, "a sequence ends beyond the rows");
    longest = 0;
    for (int64_t b = 0; b < batch; ++b) {
        require(starts[b] <= starts[b + 1], "a sequence has less than no rows");
        longest = std::max(longest, starts[b + 1] - starts[b]);
    }
    return starts;
}

// All but what the layout decides: the lengths, and where keys and values lie. q_rows, kv_rows: the
// rows of arrays.
AttentionArgs arguments(FASTATTN_PARAMETERS, int64_t q_rows, int64_t q_len, int64_t kv_heads,
                        int64_t kv_len) {
    AttentionArgs args;
    args.batch_shape = batch_shape;
    args.q_heads = axis_size(query, 2);
    args.q_len = q_len;
    args.head_dim = axis_size(query, 0);
    args.kv_heads = kv_heads;
    args.kv_len = kv_len;
    args.value_head_dim = axis_size(value, 0);
    require(query.ndim() >= 2 && key.ndim() >= 2 && value.ndim() >= 2, "arrays need two axes");
    require(args.head_dim >= 1, "head_dim must be at least 1");
    require(args.q_heads == 0 || (args.kv_heads >= 1 && args.q_heads % args.kv_heads == 0),
            "q_heads must be a multiple of kv_heads");
    args.query = view(query, batch_shape, args.q_heads, q_rows, args.head_dim);
    const Dtype dtype = args.query.dtype;
    const Dtype kv_dtype = dtype_of(key);
    const bool half = kv_dtype == Dtype::kFloat16 || kv_dtype == Dtype::kBFloat16;
    const bool int8 = kv_dtype == Dtype::kInt8;
    require(dtype != Dtype::kBool && dtype != Dtype::kInt8 && dtype_of(value) == kv_dtype,
            "dtypes are not supported");
    require(kv_dtype == dtype || (half && dtype == Dtype::kFloat32) ||
                (int8 && dtype != Dtype::kFloat64),
            "dtypes do not go together");
    require_rows(args.query, args.head_dim);
    require(axis_size(key, 0) == args.head_dim, "head_dim of query and key differ");
    if (!out.is_none()) {
        auto array = py::reinterpret_borrow<py::array>(out);
        require(array.writeable(), "out is not writeable");
        require(axis_size(array, 0) == args.value_head_dim && axis_size(array, 1) == q_rows &&
                    axis_size(array, 2) == args.q_heads,
                "out has the wrong shape");
        args.out = view(array, batch_shape, args.q_heads, q_rows, args.value_head_dim);
        require(args.out.dtype == dtype, "out has the wrong dtype");
        require_rows(args.out, args.value_head_dim);
    }
    if (!lse.is_none()) {
        auto array = py::reinterpret_borrow<py::array>(lse);
        require(array.writeable(), "lse is not writeable");
        args.lse = view(array, batch_shape, args.q_heads, q_rows, 1, 2);
        const bool wide = dtype == Dtype::kFloat64;
        require(args.lse.dtype == (wide ? Dtype::kFloat64 : Dtype::kFloat32),
                "lse has the wrong dtype");
    }
    if (!mask.is_none()) {
        args.mask = view(py::reinterpret_borrow<py::array>(mask), batch_shape, args.q_heads, q_rows,
                         args.kv_len);
    }
    if (!bias.is_none()) {
        args.bias = view(py::reinterpret_borrow<py::array>(bias), batch_shape, args.q_heads, q_rows,
                         args.kv_len);
    }
    require(args.mask.dtype != Dtype::kInt8 && args.bias.dtype != Dtype::kInt8 &&
                args.bias.dtype != Dtype::kBool,
            "mask or bias has the wrong dtype");
    const int64_t batch = product(batch_shape);
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
    require(dropout_p >= 0 && dropout_p <= 1, "dropout_p must lie in 0..1");
    args.dropout_p = dropout_p;
    args.seed = seed;
    return args;
}

// Keys and values as arrays like query, with so many rows.
void set_keys(AttentionArgs& args, const py::array& key, const py::array& value, int64_t rows) {
    args.key = view(key, args.batch_shape, args.kv_heads, rows, args.head_dim);
    args.value = view(value, args.batch_shape, args.kv_heads, rows, args.value_head_dim);
    require(axis_size(value, 1) == rows, "kv_len of key and value differ");
    require(args.key.dtype != Dtype::kInt8, "int8 has no scales");
    require_rows(args.key, args.head_dim);
    require_rows(args.value, args.value_head_dim);
}

AttentionArgs plain(FASTATTN_PARAMETERS) {
    AttentionArgs args = arguments(FASTATTN_ARGUMENTS, axis_size(query, 1), axis_size(query, 1),
                                   axis_size(key, 2), axis_size(key, 1));
    set_keys(args, key, value, args.kv_len);
    return args;
}

AttentionArgs packed(FASTATTN_PARAMETERS, const py::object& q_starts, const py::object& kv_starts) {
    const int64_t batch = product(batch_shape);
    require(!q_starts.is_none() && !kv_starts.is_none(), "starts are missing");
    int64_t q_len, kv_len;
    const int64_t* const q = starts(q_starts, batch, axis_size(query, 1), q_len);
    const int64_t* const kv = starts(kv_starts, batch, axis_size(key, 1), kv_len);
    AttentionArgs args =
        arguments(FASTATTN_ARGUMENTS, axis_size(query, 1), q_len, axis_size(key, 2), kv_len);
    set_keys(args, key, value, axis_size(key, 1));
    args.q_starts = q;
    args.kv_starts = kv;
    for (int64_t b = 0; args.kv_lengths != nullptr && b < batch; ++b) {
        require(args.kv_lengths[b] <= kv[b + 1] - kv[b], "kv_lengths beyond a sequence");
    }
    return args;
}

// A pool (pages, kv_heads, page_keys, cols), or (pages, kv_heads, page_keys) of scales.
Array pool(const py::array& array, const py::array& like, int ndim, int64_t& page_stride) {
    require(array.ndim() == ndim && array.shape(0) == like.shape(0) &&
                array.shape(1) == like.shape(1) && array.shape(2) == like.shape(2),
            "arrays of pages have different shapes");
    const auto item = array.itemsize();
    for (int axis = 0; axis < ndim; ++axis) {
        require(array.strides(axis) % item == 0, "a stride is not a multiple of the item size");
    }
    Array result;
    result.dtype = dtype_of(array);
    result.data = const_cast<void*>(array.data());
    page_stride = array.strides(0) / item;
    result.head_stride = array.strides(1) / item;
    result.row_stride = array.strides(2) / item;
    result.col_stride = 1;
    require(ndim < 4 || array.size() == 0 || array.shape(3) <= 1 || array.strides(3) == item,
            "the last axis is not contiguous");
    return result;
}

AttentionArgs paged(FASTATTN_PARAMETERS, int64_t kv_len, const py::object& kv_begins,
                    const py::array& pages, const py::object& key_scale,
                    const py::object& value_scale) {
    require(key.ndim() == 4 && value.ndim() == 4, "arrays of pages need four axes");
    AttentionArgs args = arguments(FASTATTN_ARGUMENTS, axis_size(query, 1), axis_size(query, 1),
                                   key.shape(1), kv_len);
    const int64_t batch = product(batch_shape);
    args.page_keys = key.shape(2);
    require(pages.ndim() == 2, "pages need two axes");
    args.page_columns = pages.shape(1);
    args.pages = values<int64_t>(pages, batch * args.page_columns);
    args.kv_begins = values<int64_t>(kv_begins, batch);
    require(args.page_keys > 0 && args.page_keys % kPageKeys == 0,
            "the keys of a page must be a multiple of 128");
    require(kv_len >= 0 && kv_len <= args.page_columns * args.page_keys,
            "kv_len is more than the pages hold");
    require(args.kv_lengths != nullptr, "kv_lengths are missing");
    args.key = pool(key, key, 4, args.key_page_stride);
    args.value = pool(value, key, 4, args.value_page_stride);
    args.key.batch_strides.assign(batch_shape.size(), 0);
    args.value.batch_strides = args.key.batch_strides;
    if (args.key.dtype == Dtype::kInt8) {
        require(!key_scale.is_none() && !value_scale.is_none(), "int8 has no scales");
        args.key_scale =
            pool(py::reinterpret_borrow<py::array>(key_scale), key, 3, args.key_scale_page_stride);
        args.value_scale = pool(py::reinterpret_borrow<py::array>(value_scale), key, 3,
                                args.value_scale_page_stride);
        require(
            args.key_scale.dtype == Dtype::kFloat32 && args.value_scale.dtype == Dtype::kFloat32,
            "scales must be float32");
        args.key_scale.batch_strides = args.value_scale.batch_strides = args.key.batch_strides;
    }
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t begin = args.kv_begins ? args.kv_begins[b] : 0, end = args.kv_lengths[b];
        require(begin >= 0, "kv_begins must be at least 0");
        for (int64_t i = begin / args.page_keys; i * args.page_keys < end; ++i) {
            const int64_t page = args.pages[b * args.page_columns + i];
            require(page >= 0 && page < key.shape(0), "a page lies outside the pool");
        }
    }
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

// `array` of a call, like query (core 3) or lse (2).
Array gradient(const AttentionArgs& call, const py::object& array, int64_t heads, int64_t rows,
               int64_t cols, Dtype dtype, bool written, int core = 3) {
    if (array.is_none()) return {};
    const auto given = py::reinterpret_borrow<py::array>(array);
    require(!written || given.writeable(), "a gradient is not writeable");
    const Array result = view(given, call.batch_shape, heads, rows, cols, core);
    require(result.dtype == dtype, "a gradient has the wrong dtype");
    return result;
}

void run(const AttentionArgs& args) {
    require(args.out.data != nullptr, "out is missing");
    const bool finished = without_gil([&] { return attention(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

void run(const GradientArgs& args) {
    const bool finished =
        without_gil([&] { return attention_backward(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

// arrays: out, lse, grad_out, grad_lse, dq, dk, dv, dbias, delta; the last five are filled, and
// come as zeros.
void differentiate(GradientArgs args, int64_t q_rows, int64_t kv_rows, const py::list& arrays) {
    AttentionArgs& call = args.call;
    require(arrays.size() == 9, "there are nine more arrays");
    const Dtype wide = call.query.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    const auto of_rows = [&](int i, int64_t cols, bool written) {
        const Array array =
            gradient(call, arrays[i], call.q_heads, q_rows, cols, call.query.dtype, written);
        require_rows(array, cols);
        return array;
    };
    const auto of_keys = [&](int i, int64_t cols) {
        const Array array =
            gradient(call, arrays[i], call.kv_heads, kv_rows, cols, call.key.dtype, true);
        require_rows(array, cols);
        return array;
    };
    const auto per_row = [&](int i, bool written) {
        return gradient(call, arrays[i], call.q_heads, q_rows, 1, wide, written, 2);
    };
    call.out = of_rows(0, call.value_head_dim, false);
    call.lse = per_row(1, false);
    args.grad_out = of_rows(2, call.value_head_dim, false);
    args.grad_lse = per_row(3, false);
    args.dq = of_rows(4, call.head_dim, true);
    args.dk = of_keys(5, call.head_dim);
    args.dv = of_keys(6, call.value_head_dim);
    args.dbias = gradient(call, arrays[7], call.q_heads, q_rows, call.kv_len, wide, true);
    args.delta = per_row(8, true);
    for (const Array* array :
         {&call.out, &call.lse, &args.grad_out, &args.dq, &args.dk, &args.dv}) {
        require(array->data != nullptr, "an array of the backward pass is missing");
    }
    run(args);
}

void attend(FASTATTN_PARAMETERS) { run(plain(FASTATTN_ARGUMENTS)); }

void attend_packed(FASTATTN_PARAMETERS, const py::object& q_starts, const py::object& kv_starts) {
    run(packed(FASTATTN_ARGUMENTS, q_starts, kv_starts));
}

void attend_paged(FASTATTN_PARAMETERS, int64_t kv_len, const py::object& kv_begins,
                  const py::array& pages, const py::object& key_scale,
                  const py::object& value_scale) {
    run(paged(FASTATTN_ARGUMENTS, kv_len, kv_begins, pages, key_scale, value_scale));
}

void attend_backward(FASTATTN_PARAMETERS, const py::list& arrays) {
    GradientArgs args;
    args.call = plain(FASTATTN_ARGUMENTS);
    differentiate(args, axis_size(query, 1), axis_size(key, 1), arrays);
}

void attend_packed_backward(FASTATTN_PARAMETERS, const py::object& q_starts,
                            const py::object& kv_starts, const py::list& arrays) {
    GradientArgs args;
    args.call = packed(FASTATTN_ARGUMENTS, q_starts, kv_starts);
    differentiate(args, axis_size(query, 1), axis_size(key, 1), arrays);
}

// Calls of this thread run in its own pool, while it lives.
struct PoolOfCaller {
    PoolOfCaller() { use_pool_of_caller(true); }
    ~PoolOfCaller() { use_pool_of_caller(false); }
};

Array array_of(const DLTensor& tensor, Dtype dtype) {
    Array array;
    array.dtype = dtype;
    array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    array.batch_strides.assign(tensor.strides, tensor.strides + tensor.ndim - 3);
    array.head_stride = tensor.stride(2);
    array.row_stride = tensor.stride(1);
    array.col_stride = 1;
    return array;
}

// The tensor, if it is as query is, but for heads and rows: of one dtype and as many axes, equal
// ones but those, no empty one, the last contiguous.
std::optional<DLTensor> tensor_like(py::handle object, const DLTensor& query) {
    const std::optional<DLTensor> x = tensor_of(object);
    if (!x || x->ndim != query.ndim || x->ndim < 3) return {};
    if (!x->dtype() || x->dtype() != query.dtype()) return {};
    for (int axis = 0; axis < x->ndim; ++axis) {
        if (x->shape[axis] < 1) return {};
        if (axis < x->ndim - 3 && x->shape[axis] != query.shape[axis]) return {};
    }
    if (x->size(0) != query.size(0) || x->size(0) >= int64_t(1) << 31) return {};
    return x->stride(0) == 1 ? x : std::nullopt;
}

// The call that tensors make where nothing is special: they are alike as tensor_like() says, out
// has the shape of query. The first query stands at the first key, so that every one sees a key.
// lse: None, or one as large. Nothing: something is special.
std::optional<AttentionArgs> call_of_tensors(py::handle query, py::handle key, py::handle value,
                                             py::handle out, py::handle lse,
                                             const std::optional<double>& scale, bool is_causal,
                                             bool grouped) {
    const std::optional<DLTensor> q = tensor_of(query);
    if (!q || !tensor_like(query, *q)) return {};
    const std::optional<DLTensor> k = tensor_like(key, *q), v = tensor_like(value, *q);
    const std::optional<DLTensor> o = tensor_like(out, *q);
    if (!k || !v || !o) return {};
    if (k->size(1) != v->size(1) || k->size(2) != v->size(2)) return {};
    if (o->size(1) != q->size(1) || o->size(2) != q->size(2)) return {};
    if (q->size(2) % k->size(2) != 0 || (!grouped && q->size(2) != k->size(2))) return {};
    const Dtype dtype = *q->dtype();
    AttentionArgs args;
    args.batch_shape.assign(q->shape, q->shape + q->ndim - 3);
    args.q_heads = q->size(2);
    args.kv_heads = k->size(2);
    args.q_len = q->size(1);
    args.kv_len = k->size(1);
    args.head_dim = args.value_head_dim = q->size(0);
    args.query = array_of(*q, dtype);
    args.key = array_of(*k, dtype);
    args.value = array_of(*v, dtype);
    args.out = array_of(*o, dtype);
    if (!lse.is_none()) {
        const std::optional<DLTensor> sums = tensor_of(lse);
        const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
        if (!sums || sums->dtype() != wide || sums->ndim != q->ndim - 1 ||
            !std::equal(q->shape, q->shape + q->ndim - 1, sums->shape)) {
            return {};
        }
        args.lse.dtype = wide;
        args.lse.data = static_cast<char*>(sums->data) + sums->byte_offset;
        args.lse.batch_strides.assign(sums->strides, sums->strides + sums->ndim - 2);
        args.lse.head_stride = sums->stride(1);
        args.lse.row_stride = sums->stride(0);
    }
    args.scale = scale.value_or(1 / std::sqrt(double(args.head_dim)));
    if (is_causal) args.right = 0;
    return args;
}

// False: something is special, and nothing was done. It runs in the caller's pool.
bool attend_plain(py::handle query, py::handle key, py::handle value, py::handle out,
                  py::handle lse, const std::optional<double>& scale, bool is_causal,
                  bool grouped) {
    const auto args = call_of_tensors(query, key, value, out, lse, scale, is_causal, grouped);
    if (!args) return false;
    const PoolOfCaller here;
    run(*args);
    return true;
}

// Likewise, for the gradients of such a call, of as many heads as may be; dq, dk and dv have the
// shapes of query, key and value and need not be zeros: no row of them is left out.
bool attend_plain_backward(py::handle grad_out, py::handle query, py::handle key, py::handle value,
                           py::handle out, py::handle lse, py::handle dq, py::handle dk,
                           py::handle dv, const std::optional<double>& scale, bool is_causal) {
    auto call = call_of_tensors(query, key, value, out, lse, scale, is_causal, true);
    if (!call || call->lse.data == nullptr) return false;
    GradientArgs args;
    args.call = std::move(*call);
    const DLTensor q = *tensor_of(query);
    const auto fill = [&](Array& array, py::handle object, int64_t heads, int64_t rows) {
        const std::optional<DLTensor> x = tensor_like(object, q);
        if (!x || x->size(2) != heads || x->size(1) != rows) return false;
        array = array_of(*x, args.call.query.dtype);
        return true;
    };
    const int64_t q_heads = args.call.q_heads, kv_heads = args.call.kv_heads;
    if (!fill(args.grad_out, grad_out, q_heads, args.call.q_len) ||
        !fill(args.dq, dq, q_heads, args.call.q_len) ||
        !fill(args.dk, dk, kv_heads, args.call.kv_len) ||
        !fill(args.dv, dv, kv_heads, args.call.kv_len)) {
        return false;
    }
    const PoolOfCaller here;
    run(args);
    return true;
}

py::dict explain(FASTATTN_PARAMETERS) {
    const AttentionArgs args = plain(FASTATTN_ARGUMENTS);
    const Plan plan = without_gil([&] { return plan_attention(args); });
    const int64_t batch = product(args.batch_shape);
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
    if (name == "bfloat16") return Dtype::kBFloat16;
    throw py::value_error("dtype_name must be float32, float64 or bfloat16, got " + name);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used(), py::multiple_interpreters::not_supported()) {
    m.attr("__version__") = FASTATTN_VERSION;
    m.attr("MOST_THREADS") = kMostThreads;
    m.def("attention", attend);
    m.def("varlen_attention", attend_packed);
    m.def("cache_attention", attend_paged);
    m.def("attention_backward", attend_backward);
    m.def("varlen_attention_backward", attend_packed_backward);
    m.def("attend_plain", attend_plain);
    m.def("attend_plain_backward", attend_plain_backward);
    m.def("explain", explain);
    m.def("isa", isa);
    m.def("isas", isas);
    m.def("supported_isas", supported_isas);
    m.def("set_isa", [](const std::optional<std::string>& name) { set_isa(name.value_or("")); });
    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", get_num_threads);
    m.def("use_pool_of_caller", use_pool_of_caller);
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
