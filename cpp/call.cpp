// SPDX-License-Identifier: Apache-2.0
//
// See call.h.
#include "call.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>

#include "platform.h"

namespace fastattn {
namespace {

// reference.py has the same: a pair is kept iff its number is at least round(dropout_p * 2**32).
Dropout dropout_of(const AttentionArgs& args) {
    Dropout dropout;
    if (args.dropout_p == 0) return dropout;
    const double threshold = std::nearbyint(args.dropout_p * 0x1p32);
    dropout.drops = threshold > 0;
    if (dropout.drops) dropout.last_dropped = uint32_t(threshold - 1);
    dropout.seed = args.seed;
    dropout.scale = args.dropout_p < 1 ? 1 / (1 - args.dropout_p) : 0;
    return dropout;
}

}  // namespace

int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBool:
        case Dtype::kInt8:
            return 1;
        case Dtype::kFloat16:
        case Dtype::kBFloat16:
            return 2;
        case Dtype::kFloat32:
            return 4;
        default:
            return 8;
    }
}

Call::Call(const AttentionArgs& arguments)
    : args(arguments),
      functions(args.query.dtype == Dtype::kFloat64 ? kernel().float64 : kernel().float32),
      group(args.q_heads / std::max<int64_t>(args.kv_heads, 1)),
      threads(args.threads > 0 ? Threads(args.threads) : Threads(threads_at_hand)) {
    int64_t heads = args.kv_heads;
    for (const int64_t size : args.batch_shape) {
        batches *= size;
        if (__builtin_mul_overflow(heads, size, &heads)) {
            throw std::invalid_argument("batch x kv_heads must be less than 2**63");
        }
    }
}

Sequence Call::sequence(int64_t batch) const {
    Sequence s{};
    s.batch = batch;
    s.q_start = args.q_starts ? args.q_starts[batch] : 0;
    s.q_len = args.q_starts ? args.q_starts[batch + 1] - s.q_start : args.q_len;
    s.kv_start = args.kv_starts ? args.kv_starts[batch] : 0;
    s.kv_len = args.kv_starts ? args.kv_starts[batch + 1] - s.kv_start : args.kv_len;
    s.end = args.kv_lengths ? args.kv_lengths[batch] : s.kv_len;
    s.begin = args.kv_begins ? std::min(args.kv_begins[batch], s.end) : 0;
    s.offset = args.query_offset ? args.query_offset[batch] : 0;
    s.key_offset = args.key_offset ? args.key_offset[batch] : 0;
    if (args.kv_parts != nullptr) {
        s.kv_len = slots();
        s.shift = args.kv_parts[batch].shift;
        for (int64_t* const position : {&s.begin, &s.end, &s.offset}) *position += s.shift;
    }
    return s;
}

Sequence Call::first_part(int64_t batch) const {
    const Parts& parts = args.kv_parts[batch];
    Sequence s = sequence(batch);
    s.offset += parts.first_shift - s.shift;
    s.shift = parts.first_shift;
    s.begin = parts.first_begin + s.shift;
    s.end = parts.first_end + s.shift;
    return s;
}

Interval Call::interval(const Sequence& s, int64_t i) const {
    const int64_t position = i + s.offset;
    const int64_t first = args.left == kUnlimited ? s.begin : position - args.left;
    const int64_t past = args.right == kUnlimited ? s.end : position + args.right + 1;
    const int64_t begin = std::clamp(first, s.begin, s.end);
    return {begin, std::clamp(past, begin, s.end)};
}

Interval Call::interval(const Sequence& s, int64_t first, int64_t last) const {
    const int64_t end = interval(s, last).end;
    return {std::min(interval(s, first).begin, end), end};
}

int64_t Call::visible_at_most() const {
    if (args.left == kUnlimited || args.right == kUnlimited) return args.kv_len;
    return std::min(args.left, args.kv_len) + std::min(args.right, args.kv_len) + 1;
}

double Call::pairs(const Sequence& s) const {
    if (s.q_len == 0) return 0;
    const auto seen = [&](int64_t i) {
        const Interval keys = interval(s, i);
        return double(keys.end - keys.begin);
    };
    // Simpson's rule: right under a diagonal, and nearly so in a window.
    return double(s.q_len) * (seen(0) + 4 * seen(s.q_len / 2) + seen(s.q_len - 1)) / 6;
}

double Call::seconds(const Sequence& s) const {
    return 2 * double(args.q_heads) * pairs(s) * double(args.head_dim + args.value_head_dim + 16) /
           (kFlopsOfLane * double(functions.lanes));
}

double Call::seconds() const {
    if (batches == 0) return 0;
    if (!unlike()) return double(batches) * seconds(sequence(0));
    double all = 0;
    for (int64_t batch = 0; batch < batches; ++batch) all += seconds(sequence(batch));
    return all;
}

int64_t Call::offset(const Array& array, int64_t batch) const {
    int64_t offset = 0;
    for (size_t axis = array.batch_strides.size(); axis-- > 0;) {
        offset += batch % args.batch_shape[axis] * array.batch_strides[axis];
        batch /= args.batch_shape[axis];
    }
    return offset;
}

Call::Rows Call::rows(const Array& array, int64_t batch) const {
    if (array.data == nullptr) return {};
    const int64_t size = size_of(array.dtype);
    return {static_cast<char*>(array.data) + offset(array, batch) * size, array.head_stride * size,
            array.row_stride * size};
}

Block Call::shared_block() const {
    Block block{};
    block.key = {nullptr, args.key.row_stride, args.key_page_stride};
    block.value = {nullptr, args.value.row_stride, args.value_page_stride};
    block.key_scale = {nullptr, args.key_scale.row_stride, args.key_scale_page_stride};
    block.value_scale = {nullptr, args.value_scale.row_stride, args.value_scale_page_stride};
    block.page_keys = args.page_keys;
    block.head_dim = args.head_dim;
    block.value_head_dim = args.value_head_dim;
    block.kv_len = args.kv_parts ? slots() : args.kv_len;
    block.query_dtype = args.query.dtype;
    block.kv_dtype = args.key.dtype;
    block.out_dtype = args.out.dtype;
    block.mask_dtype = args.mask.dtype;
    block.bias_dtype = args.bias.dtype;
    block.mask_stride = args.mask.col_stride;
    block.bias_stride = args.bias.col_stride;
    block.scale = args.scale;
    block.softcap = args.softcap;
    block.alibi = args.alibi_slopes != nullptr;
    block.sinks = args.sinks != nullptr;
    block.accumulates = args.accumulates;
    block.dropout = dropout_of(args);
    return block;
}

void Call::set_keys(Block& block, const Sequence& s, int64_t kv_head) const {
    block.key.data = rows(args.key, s.batch).at(kv_head, s.kv_start);
    block.value.data = rows(args.value, s.batch).at(kv_head, s.kv_start);
    block.key_scale.data = rows(args.key_scale, s.batch).at(kv_head, s.kv_start);
    block.value_scale.data = rows(args.value_scale, s.batch).at(kv_head, s.kv_start);
    block.kv_len = s.kv_len;
    block.dropout.key_offset = s.key_offset;
}

void Call::set_rows(Row* to, int count, const Sequence& s, int64_t kv_head, int64_t first) const {
    for (int64_t r = 0; r < std::min<int64_t>(count, group); ++r) {
        const int64_t head = kv_head * group + (first + r) % group;
        set_rows_of_head(to + r, (count - r + group - 1) / group, s, head, (first + r) / group,
                         group);
    }
}

void Call::set_rows_of_head(Row* to, int64_t count, const Sequence& s, int64_t head, int64_t first,
                            int64_t step) const {
    const auto of_keys = [&](const Array& array) {  // whose columns are positions
        Rows columns = rows(array, s.batch);
        if (s.shift != 0 && columns.first != nullptr) {
            columns.first -= s.shift * array.col_stride * size_of(array.dtype);
        }
        return columns;
    };
    const Rows query = rows(args.query, s.batch), out = rows(args.out, s.batch),
               lse = rows(args.lse, s.batch), mask = of_keys(args.mask), bias = of_keys(args.bias);
    const int64_t size = args.query.dtype == Dtype::kFloat64 ? 8 : 4;
    const auto numbers = [&](void* data, int64_t place) {
        return data == nullptr ? nullptr : static_cast<char*>(data) + place * size;
    };
    const int64_t of_all = s.batch * args.q_heads + head;
    const int64_t softmax_bytes = args.softmax == nullptr ? 0 : 2 * size;
    const bool limited = args.left != kUnlimited || args.right != kUnlimited;
    const auto move = [](auto& pointer, int64_t bytes) {
        pointer = const_cast<char*>(static_cast<const char*>(pointer)) + bytes;
    };
    Row row{};
    row.query = query.at(head, s.q_start + first);
    row.out = out.at(head, s.q_start + first);
    row.lse = lse.at(head, s.q_start + first);
    row.softmax = numbers(args.softmax, (of_all * args.q_len + first) * 2);
    row.scores = numbers(args.scores, of_all * args.kv_len - s.shift);
    row.mask = mask.at(head, s.q_start + first);
    row.bias = bias.at(head, s.q_start + first);
    row.pages = args.pages ? args.pages + s.batch * args.page_columns : nullptr;
    row.slope = args.alibi_slopes ? args.alibi_slopes[of_all] : 0;
    row.sink = args.sinks ? args.sinks[head] : -std::numeric_limits<double>::infinity();
    row.head = uint32_t(head) + args.head_offset;
    row.batch = uint32_t(s.batch) + args.batch_offset;
    Interval seen = interval(s, first);
    for (int64_t i = first; i < first + count; ++i, to += step) {
        if (limited) seen = interval(s, i);
        row.position = i + s.offset;
        row.begin = seen.begin;
        row.end = seen.end;
        *to = row;
        move(row.query, query.row_bytes);
        move(row.out, out.row_bytes);
        move(row.lse, lse.row_bytes);
        move(row.softmax, softmax_bytes);
        move(row.mask, mask.row_bytes);
        move(row.bias, bias.row_bytes);
    }
}

namespace {

// A thread keeps one small piece for its next call: of a call of a few microseconds, the allocator
// took a tenth.
constexpr size_t kSmallBytes = 256 << 10;
thread_local Memory small(nullptr, &free_aligned);

void keep(void* memory) { small.reset(static_cast<char*>(memory)); }

}  // namespace

Memory allocate(size_t bytes) {
    // A whole number of alignments.
    size_t whole = std::max(room_for(bytes) - kRedZone, kScratchAlignment);
    const bool is_small = whole <= kSmallBytes;
    if (is_small) whole = kSmallBytes;
    void* memory = is_small ? small.release() : nullptr;
    if (memory == nullptr) memory = allocate_aligned(kScratchAlignment, whole);
    if (memory == nullptr) throw std::bad_alloc();
    take_back(memory, whole);
    return Memory(static_cast<char*>(memory), is_small ? &keep : &free_aligned);
}

}  // namespace fastattn
