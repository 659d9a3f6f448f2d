// SPDX-License-Identifier: Apache-2.0
//
// A row block against all the keys that its rows see: each key tile is brought near once, for all
// query tiles in turn (online_softmax.h). Called by attention.cpp and decode.cpp through the table
// in kernel.cpp.
#pragma once

#include "elements.h"
#include "factors.h"
#include "kernel.h"
#include "multiply.h"
#include "online_softmax.h"
#include "partials.h"
#include "vec.h"

namespace fastattn {
namespace {

// The query tiles of a row block, and its scratch memory.
template <class T>
struct Layout {
    static constexpr int tile_rows = kColumns * Vec<T>::lanes;
    using FullTile = QueryTile<T, false, kColumns>;  // as large as one in pairs

    const int full, last_rows;  // how many query tiles are full, and the rows of the last one
    Scratch scratch;
    void* const tiles;  // where the full ones are made
    Shared<T> shared;

    Layout(const Block& block, void* memory)
        : full((block.row_count - 1) / tile_rows),
          last_rows(block.row_count - full * tile_rows),
          scratch(memory),
          tiles(scratch.take<FullTile>(full)),
          shared(block, width(0), full == 0, scratch) {}

    // Cuts the matrices of query tile `index`: called for one after the other.
    Matrices<T> matrices(const Block& block, int index) { return {block, width(index), scratch}; }

   private:
    int64_t width(int index) const { return index < full ? tile_rows : Vec<T>::padded(last_rows); }
};

template <class T>
size_t scratch_bytes(const Block& block) {
    Layout<T> layout(block, nullptr);
    for (int i = 0; i <= layout.full; ++i) layout.matrices(block, i);
    return layout.scratch.used();
}

template <class T>
size_t kept_bytes(const Block& block) {
    return size_t(Layout<T>(block, nullptr).full + 1) * KeptArray<T>::bytes(block);
}

template <class T>
void begin_keeping(const Block& block) {
    const int tiles = Layout<T>(block, nullptr).full + 1;
    for (int i = 0; i < tiles; ++i) *KeptArray<T>::at(block, i).head = {};
}

// What is to be brought near in so many times: where the results go, or what comes next. Of rows
// that are not evenly apart, some are missed.
template <class T>
void look_ahead(const Block& block, bool stores, int64_t times, Ahead& ahead) {
    const int64_t size = with_query<T>(block.query_dtype, [](auto* x) { return sizeof *x; });
    const int64_t key_size = with_key<T>(block.kv_dtype, [](auto* x) { return sizeof *x; });
    const int64_t out_size = with_query<T>(block.out_dtype, [](auto* x) { return sizeof *x; });
    const int64_t bytes = block.head_dim * size, out_bytes = block.value_head_dim * out_size;
    if (stores && block.row_count > 1) {
        const auto* const out = static_cast<const char*>(block.rows[0].out);
        const int64_t stride = static_cast<const char*>(block.rows[1].out) - out;
        ahead.add(out, block.row_count, stride, out_bytes);
    }
    ahead.add(block.next_query, block.next_rows, block.next_query_stride * size, bytes);
    ahead.add(block.next_key, block.next_keys, block.key.stride * key_size,
              block.head_dim * key_size);
    ahead.add(block.next_value, block.next_keys, block.value.stride * key_size,
              block.value_head_dim * key_size);
    ahead.begin(times);
}

// Likewise, the keys of the next key tile, and their values.
template <class T>
void look_at_keys(const Block& block, Span keys, int64_t times, Ahead& ahead) {
    with_key<T>(block.kv_dtype, [&]<class Element>(const Element*) {
        constexpr int64_t size = sizeof(Element);
        ahead.add(row_of<Element>(block, block.key, keys.begin), keys.size(),
                  block.key.stride * size, block.head_dim * size);
        ahead.add(row_of<Element>(block, block.value, keys.begin), keys.size(),
                  block.value.stride * size, block.value_head_dim * size);
    });
    ahead.begin(times);
}

// Calls use(each_tile, ahead), where each_tile(visit) calls visit(query tile) for the full ones and
// then for the last one.
template <class T, bool InPairs, class Use>
void with_query_tiles(const Block& block, bool fetches, const Use& use) {
    using FullTile = QueryTile<T, InPairs, kColumns>;
    static_assert(sizeof(FullTile) == sizeof(typename Layout<T>::FullTile));
    constexpr int tile_rows = Layout<T>::tile_rows;
    Layout<T> layout(block, block.scratch);
    layout.shared.fetches = fetches;
    FullTile* const tiles = static_cast<FullTile*>(layout.tiles);
    const int full = layout.full;
    for (int i = 0; i < full; ++i) {
        new (tiles + i)
            FullTile(block, i * tile_rows, tile_rows, layout.matrices(block, i), &layout.shared);
    }
    with_columns<T>(layout.last_rows, [&]<int Columns>() {
        QueryTile<T, InPairs, Columns> last(block, full * tile_rows, layout.last_rows,
                                            layout.matrices(block, full), &layout.shared);
        const auto each_tile = [&](const auto& visit) {
            for (int i = 0; i < full; ++i) visit(tiles[i]);
            visit(last);
        };
        use(each_tile, layout.shared.ahead);
    });
}

template <class T, bool InPairs>
void attend_in_tiles(const Block& block, void* partials) {
    with_query_tiles<T, InPairs>(
        block, partials != nullptr, [&](const auto& each_tile, Ahead& ahead) {
            int64_t begin = block.kv_len, end = 0, steps = 0, tiles = 0;
            each_tile([&](auto& tile) {
                if (tile.begin() < begin) begin = tile.begin();
                if (tile.end() > end) end = tile.end();
                if (tile.begin() >= tile.end()) return;
                steps += (tile.end() - tile.begin()) / micro_rows(kColumns);
                ++tiles;
            });
            const int64_t in_turn = tiles * (kKeyTile / micro_rows(kColumns));
            if (!block.new_keys) look_ahead<T>(block, partials == nullptr, steps, ahead);
            for (int64_t key = begin / kKeyTile * kKeyTile; key < end; key += kKeyTile) {
                if (block.stop.requested(block.stop.context)) return;
                if (block.new_keys) {
                    ahead = {};
                    const Span next = {key + kKeyTile,
                                       end < key + 2 * kKeyTile ? end : key + 2 * kKeyTile};
                    if (next.size() > 0) {
                        look_at_keys<T>(block, next, in_turn, ahead);
                    } else {
                        look_ahead<T>(block, partials == nullptr, in_turn, ahead);
                    }
                }
                each_tile([&](auto& tile) { tile.attend_tile(key); });
            }
            char* here = static_cast<char*>(partials);
            each_tile([&](auto& tile) {
                tile.finish(here);
                if (partials != nullptr) here += tile.rows() * Partials<T>::bytes(block);
            });
        });
}

template <class T>
void attend(const Block& block, void* partials) {
    if constexpr (kMultipliesPairs && sizeof(T) == 4) {
        if (in_pairs<T>(block)) return attend_in_tiles<T, true>(block, partials);
    }
    attend_in_tiles<T, false>(block, partials);
}

template <class T>
void count_tiles(const Block& block, TileCounts& counts) {
    with_query_tiles<T, false>(block, false, [&](const auto& each_tile, Ahead&) {
        each_tile([&](const auto& tile) { tile.count(counts); });
    });
}

}  // namespace
}  // namespace fastattn
