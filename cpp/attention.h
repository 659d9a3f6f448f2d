// SPDX-License-Identifier: Apache-2.0
//
// The C++ door: what a caller of the attention library says, and nothing about how it is done.
// Called by src/calls.cpp. attention() is in attention.cpp, the rest in the file its comment
// names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"
#include "schedule.h"

namespace fastattn {

// An array of shape batch_shape + (heads, rows, cols). Strides are in elements; 0 repeats an axis
// without a copy, negative ones walk backwards.
struct Array {
    void* data = nullptr;  // the element at index 0 of every axis; null: not given
    Dtype dtype = Dtype::kFloat32;
    std::vector<int64_t> batch_strides;  // one per batch axis
    int64_t head_stride = 0, row_stride = 0, col_stride = 0;
};

constexpr int64_t kUnlimited = -1;

// Where the tokens of a paged sequence lie from whose middle some were evicted. The key at position
// p lies in slot p + shift, and slot s in page s / page_keys. kv_begins and kv_lengths tell which
// positions the newest tokens have; the first ones, in slots before, have first_begin..first_end -
// 1 and a shift of their own.
struct Parts {
    int64_t shift, first_begin, first_end, first_shift;
};

// One call. key and value share a dtype, and so do query and out, but that out may be float32 where
// query is of half precision: all float64, which is then the type of lse and of all arithmetic; or
// float32 or half precision, and then it is float32. Half-precision queries have keys and values of
// the same dtype, or int8. The last axis is contiguous. Trusted: the caller has checked it.
//
// Three layouts of the sequences. Plain: each batch element has q_len rows and kv_len keys. Packed:
// it has the rows and keys between two starts, of arrays without a batch axis; q_len and kv_len are
// the longest. Paged: its keys lie in the pages of a pool, page_keys in each.
struct AttentionArgs {
    Array query, key, value, out;
    Array key_scale, value_scale;  // (..., kv_heads, rows): what an int8 row is to be multiplied by
    Array lse;                     // cols absent; null: not asked for
    // out and lse hold what other keys gave, and take what both give; there are no sinks then.
    bool accumulates = false;
    Array mask, bias;  // (..., q_heads, q_len, kv_len)
    // Of the arithmetic's type, contiguous; null: not asked for. softmax (batch, q_heads, q_len, 2)
    // takes the largest score, in base 2, and 1 / the denominator; scores (batch, q_heads, kv_len)
    // those that a query sees, in base 2, of a call that takes_scores().
    void *softmax = nullptr, *scores = nullptr;
    std::vector<int64_t> batch_shape;
    int64_t q_heads = 0, kv_heads = 0, q_len = 0, kv_len = 0, head_dim = 0, value_head_dim = 0;
    const double* alibi_slopes = nullptr;     // (batch, q_heads)
    const double* sinks = nullptr;            // (q_heads)
    const int64_t* query_offset = nullptr;    // (batch), from the first key on; null: 0
    const int64_t* key_offset = nullptr;      // (batch), which dropout adds to positions; null: 0
    const int64_t* kv_lengths = nullptr;      // (batch); null: kv_len
    const int64_t* kv_begins = nullptr;       // (batch); keys before are not seen; null: 0
    const int64_t* q_starts = nullptr;        // (batch + 1); packed
    const int64_t* kv_starts = nullptr;       // (batch + 1)
    const int64_t* pages = nullptr;           // (batch, page_columns); paged: places in the pool
    const Parts* kv_parts = nullptr;          // (batch); null: a key's slot is its position
    int64_t page_columns = 0, page_keys = 0;  // page_keys: a multiple of kPageKeys
    int64_t key_page_stride = 0, value_page_stride = 0;  // in elements
    int64_t key_scale_page_stride = 0, value_scale_page_stride = 0;
    double scale = 1.0;
    double softcap = 0.0;  // 0: off
    // Query i sees key j iff -left <= j - (i + query_offset) <= right; causality is right = 0.
    int64_t left = kUnlimited, right = kUnlimited;
    double dropout_p = 0.0;                      // within 0..1
    uint64_t seed = 0;                           // of what dropout draws
    uint32_t head_offset = 0, batch_offset = 0;  // of the first head and batch element, for dropout
    int threads = 0;                             // to plan for; 0: those at hand
};

// The gradients of a call, whose out and lse are what it gave. grad_out is like out, grad_lse and
// delta like lse; dq, dk and dv are like query, key and value, without repeated axes, or all of
// these are of the arithmetic's type. delta takes the sum of out * grad_out. dbias, float32
// (float64 for float64), takes the gradient of the bias: a repeated axis sums over it. What is
// written comes as zeros, but for dq, dk and dv of a call that accumulates, to which gradients are
// added.
struct GradientArgs {
    AttentionArgs call;
    Array grad_out, grad_lse, dq, dk, dv, dbias, delta;  // grad_lse, dbias, delta: null, not given
    bool accumulates = false;
};

// What is asked of the probabilities of a call, which has no value, out, lse or dropout. Results
// are of the arithmetic's type, contiguous; null: not asked for.
struct StatisticsArgs {
    AttentionArgs call;
    void *entropy = nullptr, *maximum = nullptr;  // (batch, q_heads, q_len)
    void* top_weights = nullptr;                  // (batch, q_heads, q_len, top)
    int64_t* top_keys = nullptr;
    int64_t top = 0;
    void* column_sums = nullptr;            // (batch, q_heads, kv_len)
    Array row_weights;                      // like lse, of the arithmetic's type; null: 1
    void* blocks = nullptr;                 // (batch, q_heads, query_blocks, key_blocks)
    const int64_t* query_starts = nullptr;  // of each block, from 0 on, ascending
    const int64_t* key_starts = nullptr;
    int64_t query_blocks = 0, key_blocks = 0;
};

// What a call does, counted instead of computed.
struct Plan {
    bool decodes = false;  // the keys are cut into splits; the counts below are of query tiles
    int query_tile = 0, key_tile = 0, threads = 0;
    int64_t tiles = 0, tiles_skipped = 0, tiles_edge = 0;
    int64_t pairs_computed = 0;  // (query, key) pairs inside the tiles that are computed
    size_t scratch_bytes = 0;    // all threads together
};

// Asks the caller's environment whether to give up (Ctrl-C). Called now and then, on the calling
// thread only.
struct Interrupt {
    bool (*requested)() = nullptr;
};

// False: interrupted, out and lse are unfinished; so they are where it throws std::bad_alloc.
bool attention(const AttentionArgs& args, Interrupt interrupt);
bool attention_backward(const GradientArgs& args, Interrupt interrupt);      // backward.cpp
bool attention_statistics(const StatisticsArgs& args, Interrupt interrupt);  // statistics.cpp
// Attention, and what each key gets from all queries, (batch, q_heads, kv_len) of the arithmetic's
// type (statistics.cpp).
bool attention_column_sums(AttentionArgs args, void* column_sums, Interrupt interrupt);
Plan plan_attention(const AttentionArgs& args);
// What attention() would do; it looks at lengths and places, not at what is attended to.
Schedule schedule_attention(const AttentionArgs& args);
Schedule schedule_backward(const GradientArgs& args);  // backward.cpp

// Instruction sets (dispatch.cpp).
std::vector<std::string> isas();            // in this build, best first
std::vector<std::string> supported_isas();  // those that this CPU can run
std::string isa();                      // in use; throws std::invalid_argument, std::runtime_error
void set_isa(const std::string& name);  // "": back to FASTATTN_ISA, or the best

// Threads (parallel.cpp).
constexpr int kMostThreads = 1024;
void set_num_threads(int threads);
int get_num_threads();

// The machine's limits, measured with all threads (limits.cpp).
double measure_fma(Dtype dtype, double seconds);  // FLOP/s of products in that type
double measure_read(int64_t bytes, int repeats);  // bytes/s, the median of the repeats

}  // namespace fastattn
