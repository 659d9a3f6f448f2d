// SPDX-License-Identifier: Apache-2.0
//
// Which call is it? NumPy arrays and their checked options in, plain structs out, to
// cpp/attention.h. Values are trusted; of the shapes, what memory safety needs is checked again.
#include "calls.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "arrays.h"
#include "gil.h"

namespace fastattn {

namespace {

// While a thread asks for schedules, its calls are planned for so many threads and not run.
struct Asked {
    int threads;
    std::vector<Schedule> schedules;
};
thread_local Asked* asked = nullptr;

}  // namespace

void run(const AttentionArgs& args) {
    if (asked != nullptr) {
        AttentionArgs planned = args;
        planned.threads = asked->threads;
        return asked->schedules.push_back(schedule_attention(planned));
    }
    const bool finished = without_gil([&] { return attention(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

void run(const GradientArgs& args) {
    if (asked != nullptr) {
        GradientArgs planned = args;
        planned.call.threads = asked->threads;
        return asked->schedules.push_back(schedule_backward(planned));
    }
    const bool finished =
        without_gil([&] { return attention_backward(args, Interrupt{signal_arrived}); });
    if (!finished) throw py::error_already_set();
}

namespace {

// CallOptions of python/fastattn/_options.py, in its order.
struct Options {
    explicit Options(const py::tuple& options)
        : mask(item(options, 0)),
          bias(item(options, 1)),
          alibi_slopes(item(options, 2)),
          sinks(item(options, 3)),
          query_offset(item(options, 4)),
          kv_lengths(item(options, 5)),
          scale(item(options, 6).cast<double>()),
          softcap(item(options, 7).cast<double>()),
          left(item(options, 8).cast<int64_t>()),
          right(item(options, 9).cast<int64_t>()),
          dropout_p(item(options, 10).cast<double>()),
          seed(item(options, 11).cast<uint64_t>()) {
        require(options.size() == 15, "there are fifteen options");
        if (dropout_p == 0) return;
        key_offset = item(options, 12);
        head_offset = item(options, 13).cast<uint32_t>();
        batch_offset = item(options, 14).cast<uint32_t>();
    }

    py::handle mask, bias, alibi_slopes, sinks, query_offset, kv_lengths;
    double scale, softcap;
    int64_t left, right;
    double dropout_p;
    uint64_t seed;
    py::handle key_offset = Py_None;  // this and those below are for dropout
    uint32_t head_offset = 0, batch_offset = 0;

   private:
    static py::handle item(const py::tuple& options, size_t i) {
        require(i < options.size(), "an option is missing");
        return PyTuple_GET_ITEM(options.ptr(), py::ssize_t(i));
    }
};

bool is_half(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }

// The arrays of one call, and its options.
struct Call {
    const py::array &query, &key, &value;
    const std::vector<int64_t>& batch_shape;
    const Options options;
};

// Where the sequences' rows begin in packed arrays.
const int64_t* starts(py::handle object, int64_t batch, int64_t rows, int64_t& longest) {
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
AttentionArgs arguments(const Call& call, int64_t q_rows, int64_t q_len, int64_t kv_heads,
                        int64_t kv_len) {
    const auto& [query, key, value, batch_shape, options] = call;
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
    const bool half = is_half(kv_dtype);
    const bool int8 = kv_dtype == Dtype::kInt8;
    require(dtype != Dtype::kBool && dtype != Dtype::kInt8 && dtype_of(value) == kv_dtype,
            "dtypes are not supported");
    require(kv_dtype == dtype || (half && dtype == Dtype::kFloat32) ||
                (int8 && dtype != Dtype::kFloat64),
            "dtypes do not go together");
    require_rows(args.query, args.head_dim);
    require(axis_size(key, 0) == args.head_dim, "head_dim of query and key differ");
    const auto pairs = [&](py::handle object) -> Array {
        if (object.is_none()) return {};
        return view(py::reinterpret_borrow<py::array>(object), batch_shape, args.q_heads, q_rows,
                    kv_len);
    };
    args.mask = pairs(options.mask);
    args.bias = pairs(options.bias);
    require(args.mask.dtype != Dtype::kInt8 && args.bias.dtype != Dtype::kInt8 &&
                args.bias.dtype != Dtype::kBool,
            "mask or bias has the wrong dtype");
    const int64_t batch = product(batch_shape);
    args.alibi_slopes = values<double>(options.alibi_slopes, batch * args.q_heads);
    args.sinks = values<double>(options.sinks, args.q_heads);
    args.query_offset = values<int64_t>(options.query_offset, batch);
    args.key_offset = values<int64_t>(options.key_offset, batch);
    args.head_offset = options.head_offset;
    args.batch_offset = options.batch_offset;
    args.kv_lengths = values<int64_t>(options.kv_lengths, batch);
    for (int64_t b = 0; args.kv_lengths != nullptr && b < batch; ++b) {
        require(args.kv_lengths[b] >= 0 && args.kv_lengths[b] <= args.kv_len,
                "kv_lengths must lie in 0..kv_len");
    }
    args.scale = options.scale;
    args.softcap = options.softcap;
    args.left = options.left;
    args.right = options.right;
    require(options.dropout_p >= 0 && options.dropout_p <= 1, "dropout_p must lie in 0..1");
    args.dropout_p = options.dropout_p;
    args.seed = options.seed;
    return args;
}

// Where the results go. lse: None, if it is not asked for.
void set_results(AttentionArgs& args, const py::array& query, py::array out, py::handle lse,
                 bool accumulates = false) {
    const int64_t rows = axis_size(query, 1);
    const Dtype dtype = args.query.dtype;
    require(out.writeable(), "out is not writeable");
    require(axis_size(out, 0) == args.value_head_dim && axis_size(out, 1) == rows &&
                axis_size(out, 2) == args.q_heads,
            "out has the wrong shape");
    args.out = view(out, args.batch_shape, args.q_heads, rows, args.value_head_dim);
    require(args.out.dtype == dtype || (args.out.dtype == Dtype::kFloat32 && is_half(dtype)),
            "out has the wrong dtype");
    require_rows(args.out, args.value_head_dim);
    args.accumulates = accumulates;
    require(!accumulates || (!lse.is_none() && args.sinks == nullptr),
            "to accumulate takes lse and no sinks");
    if (lse.is_none()) return;
    auto array = py::reinterpret_borrow<py::array>(lse);
    require(array.writeable(), "lse is not writeable");
    args.lse = view(array, args.batch_shape, args.q_heads, rows, 1, 2);
    const bool wide = dtype == Dtype::kFloat64;
    require(args.lse.dtype == (wide ? Dtype::kFloat64 : Dtype::kFloat32),
            "lse has the wrong dtype");
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

AttentionArgs plain(const Call& call) {
    const auto& [query, key, value, batch_shape, options] = call;
    AttentionArgs args = arguments(call, axis_size(query, 1), axis_size(query, 1),
                                   axis_size(key, 2), axis_size(key, 1));
    set_keys(args, key, value, args.kv_len);
    return args;
}

AttentionArgs packed(const Call& call, py::handle q_starts, py::handle kv_starts) {
    const auto& [query, key, value, batch_shape, options] = call;
    const int64_t batch = product(batch_shape);
    require(!q_starts.is_none() && !kv_starts.is_none(), "starts are missing");
    int64_t q_len, kv_len;
    const int64_t* const q = starts(q_starts, batch, axis_size(query, 1), q_len);
    const int64_t* const kv = starts(kv_starts, batch, axis_size(key, 1), kv_len);
    AttentionArgs args = arguments(call, axis_size(query, 1), q_len, axis_size(key, 2), kv_len);
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

// Parts of sequences, four numbers each; null for None. Lengths and begins are there.
const Parts* parts_of(const AttentionArgs& args, py::handle object, int64_t batch) {
    const auto* const parts = reinterpret_cast<const Parts*>(values<int64_t>(object, 4 * batch));
    for (int64_t b = 0; parts != nullptr && b < batch; ++b) {
        const auto& [shift, first_begin, first_end, first_shift] = parts[b];
        constexpr int64_t far = int64_t(1) << 61;
        for (const int64_t x : {shift, first_begin, first_end, first_shift}) {
            require(-far <= x && x <= far, "parts lie too far away");
        }
        require(args.kv_begins[b] <= far && args.kv_begins[b] + shift >= 0,
                "a slot is before the first");
        require(first_begin <= first_end && first_end <= args.kv_begins[b] &&
                    first_begin + first_shift >= 0 &&
                    first_end + first_shift <= args.kv_begins[b] + shift,
                "the first part must end before the other");
    }
    return parts;
}

// What a cache knows of its sequences: the position of the first query, the number of tokens, the
// first token that is left, the parts, and the pages.
AttentionArgs paged(const Call& call, int64_t kv_len, py::handle positions, py::handle lengths,
                    py::handle begins, py::handle parts, const py::array& pages,
                    py::handle key_scale, py::handle value_scale) {
    const auto& [query, key, value, batch_shape, options] = call;
    require(key.ndim() == 4 && value.ndim() == 4, "arrays of pages need four axes");
    AttentionArgs args =
        arguments(call, axis_size(query, 1), axis_size(query, 1), key.shape(1), kv_len);
    const int64_t batch = product(batch_shape);
    args.page_keys = key.shape(2);
    require(pages.ndim() == 2, "pages need two axes");
    args.page_columns = pages.shape(1);
    args.pages = values<int64_t>(pages, batch * args.page_columns);
    args.query_offset = values<int64_t>(positions, batch);
    args.kv_lengths = values<int64_t>(lengths, batch);
    args.kv_begins = values<int64_t>(begins, batch);
    require(args.page_keys > 0 && args.page_keys % kPageKeys == 0,
            "the keys of a page must be a multiple of 128");
    require(args.kv_lengths != nullptr && args.kv_begins != nullptr, "lengths are missing");
    args.kv_parts = parts_of(args, parts, batch);
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
    const auto require_pages = [&](int64_t b, int64_t begin, int64_t end) {
        require(end <= args.page_columns * args.page_keys, "there are more keys than pages hold");
        for (int64_t i = begin / args.page_keys; i * args.page_keys < end; ++i) {
            const int64_t page = args.pages[b * args.page_columns + i];
            require(page >= 0 && page < key.shape(0), "a page lies outside the pool");
        }
    };
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t begin = args.kv_begins[b], end = args.kv_lengths[b];
        require(begin >= 0, "begins must be at least 0");
        require(end >= 0 && end <= kv_len, "lengths must lie in 0..kv_len");
        const Parts own = args.kv_parts == nullptr ? Parts{} : args.kv_parts[b];
        require_pages(b, begin + own.shift, end + own.shift);
        require_pages(b, own.first_begin + own.first_shift, own.first_end + own.first_shift);
    }
    return args;
}

// `array` of a call, like query (core 3) or lse (2).
Array gradient(const AttentionArgs& call, py::handle array, int64_t heads, int64_t rows,
               int64_t cols, Dtype dtype, bool written, int core = 3) {
    if (array.is_none()) return {};
    const auto given = py::reinterpret_borrow<py::array>(array);
    require(!written || given.writeable(), "a gradient is not writeable");
    const Array result = view(given, call.batch_shape, heads, rows, cols, core);
    require(result.dtype == dtype, "a gradient has the wrong dtype");
    return result;
}

// arrays: GradientArrays of python/fastattn/_backward.py, in its order.
void differentiate(AttentionArgs attention, int64_t q_rows, int64_t kv_rows,
                   const py::tuple& arrays, bool accumulates) {
    GradientArgs args;
    args.call = std::move(attention);
    AttentionArgs& call = args.call;
    require(arrays.size() == 9, "there are nine more arrays");
    const Dtype wide = call.query.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    const auto like = [&](Dtype dtype, int i) {  // or of the arithmetic's
        return dtype_of(py::reinterpret_borrow<py::array>(arrays[size_t(i)])) == wide ? wide
                                                                                      : dtype;
    };
    const auto of_rows = [&](int i, int64_t cols, bool written) {
        const Array array = gradient(call, py::object(arrays[i]), call.q_heads, q_rows, cols,
                                     like(call.query.dtype, i), written);
        require_rows(array, cols);
        return array;
    };
    const auto of_keys = [&](int i, int64_t cols) {
        const Array array = gradient(call, py::object(arrays[i]), call.kv_heads, kv_rows, cols,
                                     like(call.key.dtype, i), true);
        require_rows(array, cols);
        return array;
    };
    const auto per_row = [&](int i, bool written) {
        return gradient(call, py::object(arrays[i]), call.q_heads, q_rows, 1, wide, written, 2);
    };
    call.out = of_rows(0, call.value_head_dim, false);
    call.lse = per_row(1, false);
    args.grad_out = of_rows(2, call.value_head_dim, false);
    args.grad_lse = per_row(3, false);
    args.dq = of_rows(4, call.head_dim, true);
    args.dk = of_keys(5, call.head_dim);
    args.dv = of_keys(6, call.value_head_dim);
    args.dbias =
        gradient(call, py::object(arrays[7]), call.q_heads, q_rows, call.kv_len, wide, true);
    args.delta = per_row(8, true);
    for (const Array* array :
         {&call.out, &call.lse, &args.grad_out, &args.dq, &args.dk, &args.dv}) {
        require(array->data != nullptr, "an array of the backward pass is missing");
    }
    require(call.out.dtype == args.grad_out.dtype && args.dk.dtype == args.dv.dtype,
            "the dtypes of gradients do not go together");
    args.accumulates = accumulates;
    require(!accumulates || (args.dq.dtype == wide && args.dk.dtype == wide),
            "what is accumulated has the wrong dtype");
    run(args);
}

using Shape = std::vector<int64_t>;

void attend(const py::array& query, const py::array& key, const py::array& value,
            const py::array& out, py::handle lse, const Shape& batch_shape,
            const py::tuple& options, bool accumulates) {
    AttentionArgs args = plain({query, key, value, batch_shape, Options(options)});
    set_results(args, query, out, lse, accumulates);
    run(args);
}

void attend_packed(const py::array& query, const py::array& key, const py::array& value,
                   const py::array& out, py::handle lse, const Shape& batch_shape,
                   const py::tuple& options, bool accumulates, py::handle q_starts,
                   py::handle kv_starts) {
    AttentionArgs args =
        packed({query, key, value, batch_shape, Options(options)}, q_starts, kv_starts);
    set_results(args, query, out, lse, accumulates);
    run(args);
}

void attend_paged(const py::array& query, const py::array& key, const py::array& value,
                  const py::array& out, py::handle lse, const Shape& batch_shape,
                  const py::tuple& options, int64_t kv_len, py::handle positions,
                  py::handle lengths, py::handle begins, py::handle parts, const py::array& pages,
                  py::handle key_scale, py::handle value_scale, py::handle column_sums) {
    AttentionArgs args = paged({query, key, value, batch_shape, Options(options)}, kv_len,
                               positions, lengths, begins, parts, pages, key_scale, value_scale);
    set_results(args, query, out, lse);
    if (column_sums.is_none()) return run(args);
    auto sums = py::reinterpret_borrow<py::array>(column_sums);
    values<float>(sums, product(batch_shape) * args.q_heads * kv_len);
    require(sums.writeable() && args.query.dtype != Dtype::kFloat64,
            "column_sums has the wrong form");
    const bool finished = without_gil([&, into = sums.mutable_data()] {
        return attention_column_sums(args, into, Interrupt{signal_arrived});
    });
    if (!finished) throw py::error_already_set();
}

void attend_backward(const py::array& query, const py::array& key, const py::array& value,
                     const Shape& batch_shape, const py::tuple& options, const py::tuple& arrays,
                     bool accumulates) {
    differentiate(plain({query, key, value, batch_shape, Options(options)}), axis_size(query, 1),
                  axis_size(key, 1), arrays, accumulates);
}

void attend_packed_backward(const py::array& query, const py::array& key, const py::array& value,
                            const Shape& batch_shape, const py::tuple& options, py::handle q_starts,
                            py::handle kv_starts, const py::tuple& arrays, bool accumulates) {
    differentiate(packed({query, key, value, batch_shape, Options(options)}, q_starts, kv_starts),
                  axis_size(query, 1), axis_size(key, 1), arrays, accumulates);
}

py::dict explain(const py::array& query, const py::array& key, const py::array& value,
                 const Shape& batch_shape, const py::tuple& options, int threads) {
    AttentionArgs args = plain({query, key, value, batch_shape, Options(options)});
    args.threads = threads;
    const Plan plan = without_gil([&] { return plan_attention(args); });
    const int64_t batch = product(args.batch_shape);
    const double dims = double(args.head_dim + args.value_head_dim);
    py::dict report;
    report["kernel"] = plan.decodes ? "decode" : "tiled";
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

// Of each parallel_for: the threads, the first step of each item and one past the last of all, and
// of each step its seconds, place and turn.
py::tuple phase_of(const Phase& phase) {
    std::vector<int64_t> first{0}, place, turn;
    std::vector<double> seconds;
    for (const std::vector<Step>& steps : phase.items) {
        for (const Step& step : steps) {
            seconds.push_back(step.seconds);
            place.push_back(step.place);
            turn.push_back(step.turn);
        }
        first.push_back(int64_t(seconds.size()));
    }
    const auto array = [](const auto& x) { return py::array(py::ssize_t(x.size()), x.data()); };
    return py::make_tuple(phase.threads, array(first), array(seconds), array(place), array(turn));
}

// The schedules of the calls that call() makes, which are planned for so many threads and leave
// their results as they were.
py::list schedule(const py::function& call, int threads) {
    Asked mine{threads, {}};
    struct Asking {
        explicit Asking(Asked* now) : before(std::exchange(asked, now)) {}
        ~Asking() { asked = before; }
        Asked* const before;
    };
    {
        const Asking asking(&mine);
        call();
    }
    py::list schedules;
    for (const Schedule& each : mine.schedules) {
        py::list phases;
        for (const Phase& phase : each.phases) phases.append(phase_of(phase));
        schedules.append(py::make_tuple(each.scratch_bytes, phases));
    }
    return schedules;
}

}  // namespace

AttentionArgs weights_arguments(const py::array& query, const py::array& key,
                                const std::vector<int64_t>& batch_shape, const py::tuple& options) {
    AttentionArgs args = plain({query, key, key, batch_shape, Options(options)});
    args.value = {};
    args.value_head_dim = 0;
    require(args.dropout_p == 0, "statistics have no dropout");
    return args;
}

void register_calls(py::module_& m) {
    m.def("attention", attend);
    m.def("varlen_attention", attend_packed);
    m.def("cache_attention", attend_paged);
    m.def("attention_backward", attend_backward);
    m.def("varlen_attention_backward", attend_packed_backward);
    m.def("explain", explain);
    m.def("schedule", schedule);
}

}  // namespace fastattn
