// SPDX-License-Identifier: Apache-2.0
//
// Small calls with tensors of a framework, read by DLPack (dlpack.h) where nothing is special:
// without a NumPy array for each.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "calls.h"
#include "dlpack.h"
#include "parallel.h"

namespace fastattn {
namespace {

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

// Returns the tensor if its dtype, number of axes, batch axes and head_dim are query's, no axis is
// empty, and the last is contiguous.
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
// lse: None, or one as large. Returns nothing where something is special.
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

}  // namespace

void register_tensors(py::module_& m) {
    m.def("attend_plain", attend_plain);
    m.def("attend_plain_backward", attend_plain_backward);
    m.def("use_pool_of_caller", use_pool_of_caller);
}

}  // namespace fastattn
