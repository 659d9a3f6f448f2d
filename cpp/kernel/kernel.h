// SPDX-License-Identifier: Apache-2.0
//
// The door to this folder: the table that every instruction-set variant fills, and what its
// functions are given. attention.cpp, decode.cpp, short.cpp, backward.cpp, statistics.cpp,
// linear.cpp, layers.cpp and limits.cpp call through it; kernel.cpp fills it, once per variant.
//
// This folder holds the code that is compiled once per instruction set, with that set's flags. An
// inline function that is compiled twice with different flags is merged by the linker, and an old
// CPU then meets an illegal instruction. Hence five rules for the folder:
//   1. everything is in an anonymous namespace, headers included;
//   2. no containers, no <algorithm>, no <cmath>, no OpenMP, no exceptions;
//   3. no vector constants with static storage;
//   4. no link-time optimisation;
//   5. each object exports one symbol, its table. tests/machine/test_build.py asks nm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "scratch.h"

namespace fastattn {

// One query row: a lane of a query tile.
struct Row {
    const void* query;
    void* out;
    void* lse;             // null: not asked for
    void* softmax;         // takes two: see RowStatistics; null: not asked for
    void* scores;          // of each key that is seen, in base 2; null: not asked for
    const void* mask;      // the row's first element; null: none
    const void* bias;      // likewise
    const int64_t* pages;  // which page of the pool holds keys [0, page_keys), and so on; or null
    int64_t begin, end;    // the keys that causality, window and length leave; begin <= end
    int64_t position;      // of the query among the keys, for ALiBi and dropout
    double slope;          // ALiBi
    double sink;           // -inf: none
    // Modulo 2**32, for dropout.
    uint32_t head, batch;
};

// A pair's probability counts, times scale, iff its random number (dropout.h) is larger than
// last_dropped; without `drops`, every pair's does. Keys and rows count from key_offset on there.
struct Dropout {
    bool drops = false;
    uint32_t last_dropped = 0;
    uint64_t seed = 0;
    double scale = 1;
    int64_t key_offset = 0;
};

// Asked once per key tile; true: stop, the result is not wanted any more.
struct Stop {
    bool (*requested)(void* context);
    void* context;
};

// A row per key: of a key or value head, or of its scales.
struct KeyRows {
    const void* data;
    int64_t stride, page_stride;  // from one key, one page to the next; in elements
};

// A row block: rows that share one key and value head, and are worked on in query tiles. A key tile
// is brought to the near caches once for all of them; how many there are changes no bit of a
// result. Rows may have different pages in DecodeFunctions::attend() alone.
struct Block {
    const Row* rows;
    int row_count;  // 1 or more; the last query tile may be less than full
    KeyRows key, value;
    KeyRows key_scale, value_scale;  // float, of int8 keys and values
    int64_t page_keys;
    int64_t head_dim, value_head_dim, kv_len;
    Dtype query_dtype, kv_dtype, out_dtype;  // kv_dtype: of key and value
    Dtype mask_dtype, bias_dtype;
    int64_t mask_stride, bias_stride;  // from one key to the next
    double scale, softcap;
    bool alibi, sinks;  // are there any
    bool accumulates;   // out and lse hold what other keys gave; then there are no sinks
    // What the thread works on next: to be fetched; of the keys' and values' stride. decode() takes
    // keys alone.
    const void *next_key, *next_value, *next_query;
    int64_t next_keys, next_rows, next_query_stride;
    bool new_keys;  // the thread was not at work on them just before
    bool in_span;   // no row sees keys of two spans (split.h): less scratch memory is needed
    Dropout dropout;
    void* scratch;  // scratch_bytes() of the function called, aligned
    void* kept;     // Functions::kept_bytes(); null: nothing is kept from block to block
    Stop stop;
};

struct TileCounts {
    int64_t skipped, edge, computed;  // tiles
    int64_t pairs;
};

// What the gradients of a row need beside it, and where they go.
struct GradientRow {
    const void* grad_out;  // of out's type
    const void* grad_lse;  // of the arithmetic's; null: 0
    void* dq;              // of dq_dtype
    void* dbias;           // of the arithmetic's, the row's first element; null: none
    void* delta;           // takes sum(out * grad_out); null: not asked for
};

// Some rows and some keys, to be differentiated.
struct GradientBlock {
    Block block;  // of GradientFunctions::block_rows() rows at most
    const GradientRow* gradients;
    int64_t begin, end;  // the keys, a key block; it begins with a whole key tile
    KeyRows dk, dv;      // of all keys; of dkv_dtype
    Dtype dq_dtype, dkv_dtype;
    bool accumulates;      // gradients are added to what is there
    int64_t dbias_stride;  // from one key to the next
    void* query_sums;      // query_sums_bytes()
    bool alone;            // of a problem that is one row block and one key tile
    bool keeps_bias;       // of which others have the same bias
};

// Problems to be differentiated, one after the other: next() makes the GradientBlock that the
// function was given the next one of them. They differ in places, and in row_count and end, which
// are no larger than those of the first. False: there is none.
struct GradientQueue {
    bool (*next)(void* context);
    void (*fetch)(void* context);  // brings some of what the problem after this one needs near
    void* context;
};

// The backward pass over a key block that stays near while all row blocks that see it pass by. It
// begins with begin_keys(). Then, for each row block, differentiate() leaves in scratch memory what
// add_query_sums() adds to what the key blocks before gave. finish_keys() ends it. Problems that
// are alone need none of this: differentiate_alone() does all. What it gives a bias, which all of
// them share, it adds at the end.
struct GradientFunctions {
    int (*block_rows)(const Block&);
    size_t (*scratch_bytes)(const Block&, int64_t keys, bool alone, bool keeps_bias);
    size_t (*query_sums_bytes)(const Block&);
    void (*begin_keys)(const GradientBlock&);
    void (*differentiate)(const GradientBlock&);
    void (*add_query_sums)(const GradientBlock&, bool first);  // first: no key block was before
    void (*store_query_sums)(const GradientBlock&);
    void (*finish_keys)(const GradientBlock&);
    void (*differentiate_alone)(const GradientBlock&, const GradientQueue&);
};

// Decoding: the rows' intervals leave one split of the keys, and the result is a partial for each
// row, one after the other. What a partial holds depends on no other row. attend() alone stores
// scores where a row asks for them.
struct DecodeFunctions {
    int most_rows;  // of a sequence; Functions::attend() is faster where there are more
    size_t (*scratch_bytes)(const Block&);
    void (*attend)(const Block&, void* partials);
    size_t (*partial_bytes)(const Block&);                 // of one row
    void (*merge)(const Block&, void* into, void* later);  // in the order of the keys
    void (*finish)(const Block&, void* partials);          // stores the result
};

// Short problems: a few rows and all keys that they may see, which one key tile holds, so that no
// softmax has to be carried on. What thousands of them share is said once.

// In bytes, from a row to that of the next query, and to that of the next head of the group.
struct RowSteps {
    int64_t query, head;
};

struct ShortShape {
    Block shared;         // without rows, keys and values
    int rows, group;      // row r is of query r / group and of head r % group of the group
    bool few;             // sums are those of DecodeFunctions; else of Functions::attend()
    int64_t left, right;  // of the window; negative: unlimited
    RowSteps query, out, lse, mask, bias;
    bool has_mask, has_bias;
};

// A key head of a batch element. What is of rows begins with the first query of the group's first
// head.
struct ShortProblem {
    const void *query, *key, *value;
    void *out, *lse;               // lse: null, not asked for
    const void *mask, *bias;       // null: none
    int64_t begin, end;            // the keys that length and eviction leave; begin <= end
    int64_t offset;                // position of the first query
    int64_t key_offset;            // as Dropout has it
    const double *slopes, *sinks;  // of each head of the group; null: none
    uint32_t head, batch;          // modulo 2**32, for dropout
};

// attend() stores the results of some problems, one after the other, and returns how many. If these
// are fewer than `count`, the next one is for the functions whose sums it takes: its numbers are
// not all finite, or too large.
struct ShortFunctions {
    bool (*takes)(const ShortShape&);
    size_t (*scratch_bytes)(const ShortShape&);
    int64_t (*attend)(const ShortShape&, const ShortProblem*, int64_t count, void* scratch);
};

// What is asked of a row's probabilities. Numbers are of the arithmetic's type; null: not asked
// for.
struct RowStatistics {
    void* softmax;  // takes two: the largest score, in base 2, and 1 / the denominator
    void* entropy;
    void* maximum;      // the largest probability
    void* top_weights;  // the largest probabilities, and
    int64_t* top_keys;  // whose they are
};

struct StatisticsBlock {
    Block block;  // a query tile at most
    const RowStatistics* statistics;
    int64_t top;   // how many of the strongest keys
    bool entropy;  // some row's is asked for
};

// Sums of the probabilities of some rows for a span of keys.
struct SumsBlock {
    Block block;                  // a query tile at most; the rows' intervals lie within the span
    const void* softmax;          // of one row after the other, as RowStatistics has it
    int64_t begin, end;           // the span
    double* column_sums;          // of each key of the span, weighted; null: not asked for
    const double* row_weights;    // of each row
    double* block_sums;           // (query blocks, key blocks); null: not asked for
    const int64_t* query_blocks;  // of each row
    const int64_t* key_starts;    // of each block of keys; the first is not behind the span's begin
    int64_t key_blocks, block_pitch;  // of block_sums: columns, and elements from row to row
};

// look() comes first. add() adds to sums, for some rows after the others.
struct StatisticsFunctions {
    size_t (*scratch_bytes)(const Block&);  // looks at the sizes and row_count alone
    void (*look)(const StatisticsBlock&);
    void (*add)(const SumsBlock&);
    // Makes probabilities of a row's scores, of which -inf is a key that is not seen.
    void (*normalise)(void* scores, int64_t count, const void* softmax);
};

// The functions for arithmetic in one type; float32's take half precision too.
struct Functions {
    int lanes;  // rows of a query tile are in vectors of so many
    int query_tile, key_tile;
    size_t (*scratch_bytes)(const Block&);  // looks at the sizes and row_count alone
    // Memory where attend() keeps the bias for the next block, in case it is the same;
    // begin_keeping comes before the first. row_count is that of the largest block.
    size_t (*kept_bytes)(const Block&);
    void (*begin_keeping)(const Block&);
    void (*attend)(const Block&, void* partials);  // null: it stores the result instead
    void (*count)(const Block&, TileCounts&);
    DecodeFunctions decode;
    ShortFunctions shorts;
    GradientFunctions gradients;
    StatisticsFunctions statistics;
    double (*fma)(int64_t rounds);  // multiplies and adds in registers, returns the FLOPs
};

// Some rows of x times some rows of a weight.
struct LinearBlock {
    const float* x;
    const void* weight;  // a row for each of out_features
    const float* bias;   // null: none
    float* out;
    int64_t rows, in_features, out_features;
    int64_t x_stride, out_stride;
    int64_t weight_stride;  // in bytes
    Storage storage;
    void* scratch;  // scratch_bytes(), aligned
};

struct LinearFunctions {
    int64_t few_rows;                             // rows, at most, that need no scratch memory
    size_t (*scratch_bytes)(const LinearBlock&);  // looks at the sizes and the storage alone
    void (*multiply)(const LinearBlock&);
};

// Layers of float32 numbers. Each works on one row of n numbers, the activations on any n.
struct LayerFunctions {
    void (*gelu)(const float* x, float* out, int64_t n);
    void (*gelu_tanh)(const float* x, float* out, int64_t n);
    void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
    void (*geglu)(const float* gate, const float* up, float* out, int64_t n);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, double eps,
                       float* out, int64_t n);
    void (*rms_norm)(const float* x, const float* weight, double eps, float* out, int64_t n);
    void (*rotary)(const float* x, const float* cos, const float* sin, float* out, int64_t heads,
                   int64_t head_dim, int64_t half);  // of one token
    void (*softmax)(const float* x, float* out, int64_t n);
    void (*log_softmax)(const float* x, float* out, int64_t n);
};

struct Kernel {
    const char* isa;
    Functions float32, float64;
    LinearFunctions linear;
    LayerFunctions layers;
    double (*fma_bfloat16)(int64_t rounds);           // in pairs, if the variant multiplies them
    double (*read)(const void* data, int64_t bytes);  // reads every cache line
};

#define FASTATTN_VARIANT(name, features) extern const Kernel kernel_##name;
#include "variants.inc"
#undef FASTATTN_VARIANT

// The variant in use (dispatch.cpp).
const Kernel& kernel();

}  // namespace fastattn
