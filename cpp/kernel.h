// SPDX-License-Identifier: Apache-2.0
//
// The table that every instruction-set variant fills: one block of query rows against all the keys
// that they see. attention.cpp, decode.cpp, backward.cpp and limits.cpp call through it; kernel.cpp
// fills it, once per variant.
//
// Rules for code that is compiled with instruction-set flags (kernel.cpp, kernel_*.h, vec*.h). An
// inline function that is compiled twice with different flags is merged by the linker, and an old
// CPU then meets an illegal instruction; hence
//   1. everything is in an anonymous namespace, headers included;
//   2. no containers, no <algorithm>, no <cmath>, no OpenMP, no exceptions;
//   3. no vector constants with static storage;
//   4. no link-time optimisation;
//   5. each object exports one symbol, its table. tests/test_build.py asks nm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "scratch.h"

namespace fastattn {

// One query row: a lane of a panel.
struct Row {
    const void* query;
    void* out;
    void* lse;         // null: not asked for
    const void* mask;  // the row's first element; null: none
    const void* bias;  // likewise
    const int64_t*
        pages;           // which page of the pool holds keys [0, page_keys), and so on; null: none
    int64_t begin, end;  // the keys that causality, window and length leave; begin <= end
    int64_t position;    // of the query among the keys, for ALiBi and dropout
    double slope;        // ALiBi
    double sink;         // -inf: none
    // Modulo 2**32, for dropout.
    uint32_t head, batch;
};

// A pair's probability counts, times scale, iff its random number (kernel_dropout.h) is larger than
// last_dropped; without `drops`, every pair's does.
struct Dropout {
    bool drops = false;
    uint32_t last_dropped = 0;
    uint64_t seed = 0;
    double scale = 1;
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

// Rows that share one key and value head, and are worked on in panels of panel_rows. A key tile is
// brought to the near caches once for all panels; how many there are changes no bit of a result.
// Only in attend_few() may the pages of some rows be others than those of the first.
struct Block {
    const Row* rows;
    int row_count;  // 1 or more; the last panel may be less than full
    KeyRows key, value;
    KeyRows key_scale, value_scale;  // float, of int8 keys and values
    int64_t page_keys;
    int64_t head_dim, value_head_dim, kv_len;
    Dtype query_dtype, kv_dtype;  // of query and out, of key and value
    Dtype mask_dtype, bias_dtype;
    int64_t mask_stride, bias_stride;  // from one key to the next
    double scale, softcap;
    bool alibi;
    Dropout dropout;
    void* scratch;  // scratch_bytes(), aligned to kScratchAlignment
    Stop stop;
};

constexpr int64_t kStretch = 1024;  // keys of a part; whole tiles
constexpr int kMostTogether = 64;   // rows that share a stretch of keys

struct TileCounts {
    int64_t skipped, edge, computed;  // tiles
    int64_t pairs;
};

// What the gradients of a row need beside it, and where they go.
struct GradientRow {
    const void* grad_out;  // of the query's type
    const void* grad_lse;  // of the arithmetic's; null: 0
    void* dq;              // of the query's type
    void* dbias;           // of the arithmetic's, the row's first element; null: none
    void* delta;           // takes sum(out * grad_out); null: not asked for
};

// Some rows and some keys, to be differentiated.
struct GradientBlock {
    Block block;  // its rows: a strip, strip_rows at most
    const GradientRow* gradients;
    int64_t begin, end;    // the keys; from a whole tile on
    KeyRows dk, dv;        // of all keys; of the keys' type
    int64_t dbias_stride;  // from one key to the next
    void* query_sums;      // query_sums_bytes() of the strip
};

// The backward pass over keys that stay near while all strips of rows that see them pass by:
// begin_keys, for each strip differentiate, which leaves in scratch what add_query_sums then adds
// to what other keys gave, and at last finish_keys.
struct Gradients {
    int (*strip_rows)(const Block&);
    size_t (*scratch_bytes)(const Block&, int64_t keys);
    size_t (*query_sums_bytes)(const Block&);  // of a strip
    void (*begin_keys)(const GradientBlock&);
    void (*differentiate)(const GradientBlock&);
    void (*add_query_sums)(const GradientBlock&, bool first);  // first: there is nothing yet
    void (*store_query_sums)(const GradientBlock&);
    void (*finish_keys)(const GradientBlock&);
};

// The functions for arithmetic in one type; float32's take half precision too.
struct Functions {
    int panel_rows, key_tile;
    size_t (*scratch_bytes)(const Block&);      // of the sizes and row_count alone
    void (*attend)(const Block&, void* parts);  // stores the result, or its parts, if not null
    void (*count)(const Block&, TileCounts&);

    // For few queries: the keys that the rows' intervals leave are a part of all. Each row has its
    // part, one after the other, and what that holds depends on no other row.
    size_t (*part_bytes)(const Block&);         // of a row
    int few_rows;                               // of a sequence: up to there this is faster:
    size_t (*few_scratch_bytes)(const Block&);  // instead of scratch_bytes and attend
    void (*attend_few)(const Block&, void* parts);
    void (*merge_parts)(const Block&, void* into, void* later);  // in the order of the keys
    void (*finish_parts)(const Block&, void* parts);             // stores the result

    Gradients gradients;

    double (*fma)(int64_t rounds);  // runs fused multiply-adds in registers, returns their FLOPs
};

struct Kernel {
    const char* isa;
    Functions float32, float64;
    double (*fma_bfloat16)(int64_t rounds);  // with pairs of them, if the variant has such products
    double (*read)(const void* data, int64_t bytes);  // reads every cache line
};

#define FASTATTN_VARIANT(name, features) extern const Kernel kernel_##name;
#include "variants.inc"
#undef FASTATTN_VARIANT

// The variant in use (dispatch.cpp).
const Kernel& kernel();

}  // namespace fastattn
