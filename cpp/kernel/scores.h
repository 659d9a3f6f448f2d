// SPDX-License-Identifier: Apache-2.0
//
// What happens to a tile of scores between the two products: softcap, bias, mask, ALiBi, and the
// edges that causality, window and length cut. Each is a pass of its own over the tile, so that
// they all compose, and a tile that needs none is left alone. Called by online_softmax.h and
// backward.h; decode.h, dropout.h and partials.h use the smaller functions alone.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// A sum over head_dim is in parts of this depth, for accuracy.
constexpr int64_t kDepth = 512;

// With softcap, tanh comes between the scale and the change of base.
template <class T>
T query_scale(const Block& block) {
    return nearest_finite<T>(block.softcap != 0 ? block.scale / block.softcap
                                                : block.scale * kLog2e);
}

struct Span {
    int64_t begin, end;  // keys
    int64_t size() const { return end - begin; }
};

// Which of a tile's pairs are seen. kAll also says that the scores need no pass.
enum class Seen { kNone, kSome, kAll };

// Finds out whether `count` elements of a row hold a hidden one, a seen one.
template <class Element>
void look(const Element* from, int64_t stride, int64_t count, bool& any_hidden, bool& any_seen) {
    constexpr int64_t most = 64;  // an early answer, and loops that are vectorised whole
    for (; count > 0 && !(any_hidden && any_seen); from += most * stride, count -= most) {
        const int64_t n = count < most ? count : most;
        int hidden = 0;
        if (stride == 1) {
            for (int64_t j = 0; j < n; ++j) hidden += hides(from[j]);
        } else {
            for (int64_t j = 0; j < n; ++j) hidden += hides(from[j * stride]);
        }
        any_hidden |= hidden > 0;
        any_seen |= hidden < n;
    }
}

// Some elements of a row of a mask or bias, in T.
template <class T>
void stage(const void* row, Dtype dtype, int64_t stride, Span keys, T* to) {
    with_element(dtype, [&](auto* element) {
        const auto* from = static_cast<decltype(element)>(row) + keys.begin * stride;
        const int64_t count = keys.size();
        if (stride == 1) {
            for (int64_t j = 0; j < count; ++j) to[j] = added<T>(from[j]);
        } else {
            for (int64_t j = 0; j < count; ++j) to[j] = added<T>(from[j * stride]);
        }
    });
}

// score + x * factor. Only -inf hides, and what is finite stays finite: a row whose every key has a
// huge negative bias is still the mean of what it sees.
template <class T>
Vec<T> bounded_sum(Vec<T> score, Vec<T> x, Vec<T> factor) {
    const Vec<T> hidden = -kInfinity<T>, zero = T(0), sum = fma(x, factor, score);
    if (all_finite(sum)) return sum;
    const Vec<T> bounded = min(Vec<T>(-kLowest<T>), max(Vec<T>(kLowest<T>), sum));
    const auto finite = fma(x, zero, score * zero) == zero;
    return select<T>((x == hidden) | (score == hidden), hidden, select<T>(finite, bounded, sum));
}

template <class T>
void add_to_scores(T* scores, Vec<T> array) {
    bounded_sum(Vec<T>::load(scores), array, Vec<T>(T(kLog2e))).store(scores);
}

// A bias as the scores of a query tile lie. It is kept from one row block to the next:
// often a bias is the same for every batch element.
template <class T>
struct KeptArray {
    static constexpr int most_rows = kColumns * Vec<T>::lanes;  // of a query tile
    struct Head {
        Span keys;  // that it has
        int width;
        bool finite;
    };
    Head* const head;
    const void** const rows;  // (width) whose it is
    T* const values;          // (keys, width)

    KeptArray(const Block& block, Scratch& memory)
        : head(memory.take<Head>(1)),
          rows(memory.take<const void*>(most_rows)),
          values(memory.take<T>(block.kv_len * most_rows)) {}

    // Of one query tile.
    static size_t bytes(const Block& block) {
        Scratch memory;
        KeptArray(block, memory);
        return memory.used();
    }
    // index: of the query tile, in its row block.
    static KeptArray at(const Block& block, int index) {
        Scratch memory(static_cast<char*>(block.kept) + size_t(index) * bytes(block));
        return {block, memory};
    }
};

// A mask or a bias, as the rows of a query tile see it.
template <class T, int Columns>
class RowArray {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes, width = Columns * lanes;

    const void* rows[width];  // element [row][0]; lanes without a row repeat the block's last
    const Dtype dtype;
    const int64_t stride;
    bool one_row = true;              // for all
    int64_t first_key, last_key = 0;  // the array need not have keys outside the rows' intervals

    Span inside(Span keys) const {
        return {keys.begin > first_key ? keys.begin : first_key,
                keys.end < last_key ? keys.end : last_key};
    }

   public:
    const bool given;

    RowArray(const Block& block, const void* Row::* array, Dtype type, int64_t key_stride)
        : dtype(type),
          stride(key_stride),
          first_key(block.kv_len),
          given(block.rows[0].*array != nullptr) {
        if (!given) return;
        for (int i = 0; i < block.row_count; ++i) {
            if (block.rows[i].begin < first_key) first_key = block.rows[i].begin;
            if (block.rows[i].end > last_key) last_key = block.rows[i].end;
        }
        for (int i = 0; i < width; ++i) {
            rows[i] = block.rows[i < block.row_count ? i : block.row_count - 1].*array;
            one_row &= rows[i] == rows[0];
        }
    }

    // Which pairs the array leaves. Never kAll for a float array, which changes what it leaves.
    Seen classify(Span keys) const {
        if (!given) return Seen::kAll;
        keys = inside(keys);
        return with_element(dtype, [&](auto* element) {
            bool any_hidden = dtype != Dtype::kBool, any_seen = false;
            for (int i = 0; i < width && !(any_hidden && any_seen); ++i) {
                if (i > 0 && rows[i] == rows[i - 1]) continue;
                const auto* row = static_cast<decltype(element)>(rows[i]);
                look(row + keys.begin * stride, stride, keys.size(), any_hidden, any_seen);
            }
            return !any_seen ? Seen::kNone : any_hidden ? Seen::kSome : Seen::kAll;
        });
    }

    // The keys without those at either end that the array hides from all rows, such as padding; in
    // whole steps of the micro-kernel.
    Span narrowed(Span keys) const {
        if (!given || !one_row) return keys;
        return with_element(dtype, [&](auto* element) {
            const auto* row = static_cast<decltype(element)>(rows[0]);
            constexpr int64_t step = micro_rows(Columns);
            auto [begin, end] = inside(keys);
            while (begin < end && hides(row[begin * stride])) ++begin;
            while (begin < end && hides(row[(end - 1) * stride])) --end;
            begin -= (begin - keys.begin) % step;
            end += (keys.end - end) % step;
            if (end < keys.end) end += (end - begin) % 2;  // whole pairs
            return Span{begin, end};
        });
    }

    // Rows may lie far apart: they are asked for long before add_to() needs them.
    void prefetch(Span keys) const {
        if (!given || stride != 1) return;
        with_element(dtype, [&](auto* element) {
            for (int i = 0; i < width; ++i) {
                if (i > 0 && rows[i] == rows[i - 1]) continue;
                const auto* row = static_cast<decltype(element)>(rows[i]);
                fastattn::prefetch(row + keys.begin, keys.size());
            }
        });
    }

    // scores += log2(e) * the array. False: that changed none. staging: (lanes, keys.size() rounded
    // up to lanes).
    bool add_to(T* scores, Span keys, T* staging) const {
        scores += (inside(keys).begin - keys.begin) * width;
        keys = inside(keys);
        if (one_row) return add_row_to(scores, keys, staging);
        each_vector(keys, staging, [&](int64_t at, V x) { add_to_scores(scores + at, x); });
        return true;
    }

    // Makes `kept` hold the array, unless it does so since a block before. staging: (lanes,
    // kKeyTile), or for fewer keys, if there are not so many.
    void keep(const KeptArray<T>& kept, T* staging) const {
        typename KeptArray<T>::Head& head = *kept.head;
        bool has_it = head.keys.begin <= first_key && last_key <= head.keys.end;
        has_it &= head.width == width;
        for (int i = 0; i < width; ++i) has_it &= kept.rows[i] == rows[i];
        if (has_it) return;
        head = {};
        bool finite = true;
        for (int64_t key = first_key, end; key < last_key; key = end) {
            end = last_key - key < kKeyTile ? last_key : key + kKeyTile;
            T* const to = kept.values + key * width;
            each_vector({key, end}, staging, [&](int64_t at, V x) {
                finite &= all_finite(x);
                x.store(to + at);
            });
        }
        __builtin_memcpy(kept.rows, rows, sizeof rows);
        head = {{first_key, last_key}, width, finite};
    }

    // Likewise, where a tile of it is kept.
    void add_kept_to(T* scores, Span keys, const T* kept) const {
        const Span seen = inside(keys);
        for (int64_t i = (seen.begin - keys.begin) * width; i < (seen.end - keys.begin) * width;
             i += lanes) {
            add_to_scores(scores + i, V::load(kept + i));
        }
    }

   private:
    bool add_row_to(T* scores, Span keys, T* staging) const {
        stage(rows[0], dtype, stride, keys, staging);
        bool changes = false;
        for (int64_t j = 0; j < keys.size(); ++j, scores += width) {
            if (staging[j] == T(0))
                continue;  // a score of -0 may stay: nothing else tells it from 0
            for (int c = 0; c < width; c += lanes) add_to_scores(scores + c, V(staging[j]));
            changes = true;
        }
        return changes;
    }

    // use(at, x) for each vector of the array, `at` its place among scores.
    template <class Use>
    void each_vector(Span keys, T* staging, const Use& use) const {
        const int64_t count = keys.size(), pitch = V::padded(count);
        const bool as_it_is = stride == 1 && dtype == kDtype<T>;
        for (int c = 0; c < Columns; ++c) {
            const void* const* here = rows + c * lanes;
            bool same = true;
            for (int i = 1; i < lanes; ++i) same &= here[i] == here[0];
            if (same) {
                stage(here[0], dtype, stride, keys, staging);
                for (int64_t j = 0; j < count; ++j) use(j * width + c * lanes, V(staging[j]));
                continue;
            }
            for (int i = 0; i < lanes && !as_it_is; ++i) {
                stage<T>(here[i], dtype, stride, keys, staging + i * pitch);
            }
            // As far ahead as a key tile of these rows is long.
            const void* const* const ahead = c + 1 < Columns ? here + lanes : rows;
            const int64_t more = c + 1 < Columns ? 0 : kKeyTile;
            for (int64_t first = 0; first < count; first += lanes) {
                V square[lanes];
                if (as_it_is) {
#pragma GCC unroll 16
                    for (int i = 0; i < lanes; ++i) {
                        __builtin_prefetch(static_cast<const T*>(ahead[i]) + keys.begin + first +
                                           more);
                        square[i] = load_some<T>(
                            static_cast<const T*>(here[i]) + keys.begin + first, count - first);
                    }
                } else {
#pragma GCC unroll 16
                    for (int i = 0; i < lanes; ++i) {
                        square[i] = V::load(staging + i * pitch + first);
                    }
                }
                transpose<T>(square);
#pragma GCC unroll 16
                for (int j = 0; j < lanes; ++j) {
                    if (first + j == count) break;
                    use((first + j) * width + c * lanes, square[j]);
                }
            }
        }
    }
};

// All that stands between the scores of a query tile and its softmax.
template <class T, int Columns>
class ScorePasses {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes, width = Columns * lanes;

    const Block& block;
    const RowArray<T, Columns> mask, bias;
    int64_t inner_begin = 0, inner_end;             // the keys inside every row's interval
    int64_t first_key[Columns], last_key[Columns];  // inside the interval of some row of a vector
    const T* kept_bias = nullptr;                   // (keys, width)
    bool kept_is_finite = false;

   public:
    int64_t begin, end = 0;  // the keys inside some row's interval

    explicit ScorePasses(const Block& b)
        : block(b),
          mask(b, &Row::mask, b.mask_dtype, b.mask_stride),
          bias(b, &Row::bias, b.bias_dtype, b.bias_stride),
          inner_end(b.kv_len),
          begin(b.kv_len) {
        for (int c = 0; c < Columns; ++c) {
            first_key[c] = block.kv_len;
            last_key[c] = 0;
        }
        for (int i = 0; i < block.row_count; ++i) {
            const Row& row = block.rows[i];
            if (row.begin < first_key[i / lanes]) first_key[i / lanes] = row.begin;
            if (row.end > last_key[i / lanes]) last_key[i / lanes] = row.end;
            if (row.begin > inner_begin) inner_begin = row.begin;
            if (row.end < inner_end) inner_end = row.end;
            if (row.begin >= row.end) continue;
            if (row.begin < begin) begin = row.begin;
            if (row.end > end) end = row.end;
        }
        // An edge that must be cut anyway moves out to a whole step of the micro-kernel, but not to
        // another tile, of which a page may lack.
        constexpr int64_t step = micro_rows(Columns);
        if (begin < inner_begin) {
            const int64_t tile = begin / kKeyTile * kKeyTile;
            begin = begin / step * step > tile ? begin / step * step : tile;
        }
        if (end > inner_end) {
            int64_t most = (end + kKeyTile - 1) / kKeyTile * kKeyTile;
            if (most > block.kv_len) most = block.kv_len;
            end = (end + step - 1) / step * step;
            if (end > most) end = most;
        }
        // Keys may be worked on in pairs, counted from the first of all.
        begin -= begin % 2;
        if (end < block.kv_len) end += end % 2;
    }

    // Whether scores change other than by being hidden: then no tile is plain.
    bool changes_scores() const {
        const bool float_mask = mask.given && block.mask_dtype != Dtype::kBool;
        return float_mask || bias.given || block.softcap != 0 || block.alibi;
    }

    // Calls visit(first, last) for the keys of a tile that may be hidden from some row.
    template <class Visit>
    void hidden_keys(Span keys, const Visit& visit) const {
        if (mask.given || bias.given) return visit(keys.begin, keys.end);
        const int64_t head = clamp(inner_begin, keys), tail = clamp(inner_end, keys);
        visit(keys.begin, head);
        visit(tail > head ? tail : head, keys.end);
    }

    // The keys of a tile that some row's interval holds.
    Span span(int64_t tile) const {
        const int64_t last = tile + kKeyTile;
        return {tile > begin ? tile : begin, last < end ? last : end};
    }

    // Positions grow with the rows: the first keys of a tile may matter to the first vectors alone,
    // the last ones to the last. cuts: where the next vector comes in, then where one drops out.
    void find_cuts(Span keys, int64_t (&cuts)[2 * Columns]) const {
        constexpr int64_t step = micro_rows(Columns);
        const int64_t count = keys.size();
        cuts[0] = 0;
        cuts[2 * Columns - 1] = count;
        for (int c = 1; c < Columns; ++c) {
            const int64_t in = (clamp(first_key[c], keys) - keys.begin) / step * step;
            int64_t out = (clamp(last_key[c - 1], keys) - keys.begin + step - 1) / step * step;
            if (out > count) out = count;
            cuts[c] = in;
            cuts[Columns - 1 + c] = out;
        }
        bool ordered = true;
        for (int i = 1; i < 2 * Columns; ++i) ordered &= cuts[i - 1] <= cuts[i];
        for (int c = 1; c < Columns && !ordered; ++c) {  // a window narrower than the block
            cuts[c] = 0;
            cuts[Columns - 1 + c] = count;
        }
    }

    // Also takes keys off either end that are plainly hidden from all rows.
    Seen classify(Span& keys) const {
        const Seen by_mask = mask.classify(keys);
        if (by_mask == Seen::kNone) return Seen::kNone;
        const Seen by_bias = bias.classify(keys);
        if (by_bias == Seen::kNone) return Seen::kNone;
        if (by_mask == Seen::kSome) keys = mask.narrowed(keys);
        if (by_bias == Seen::kSome) keys = bias.narrowed(keys);
        const bool plain = by_mask == Seen::kAll && by_bias == Seen::kAll && block.softcap == 0 &&
                           !block.alibi && keys.begin >= inner_begin && keys.end <= inner_end;
        return plain ? Seen::kAll : Seen::kSome;
    }

    void prefetch(Span keys) const {
        if (kept_bias == nullptr) bias.prefetch(keys);
        mask.prefetch(keys);
    }

    // The bias comes from there.
    void keep_bias(const KeptArray<T>& kept, T* staging) {
        if (!bias.given || begin >= end) return;
        bias.keep(kept, staging);
        kept_bias = kept.values;
        kept_is_finite = kept.head->finite;
    }

    // The part of the bias that may be added to scores before apply(), if that is possible.
    const T* simple_bias(Span keys) const {
        const bool one_part = block.head_dim <= kDepth;
        const bool inside = keys.begin >= inner_begin && keys.end <= inner_end;
        const bool simple = kept_is_finite && block.softcap == 0 && inside && one_part;
        return simple ? kept_bias + keys.begin * width : nullptr;
    }

    // scores: (keys, width), scale (or scale / softcap) applied, in base 2 (with softcap: not yet).
    // added: the bias is in them. False: all passes left them as they were.
    bool apply(T* scores, Span keys, T* staging, bool added = false) const {
        const int64_t count = keys.size();
        bool changes = block.softcap != 0 || block.alibi;
        if (block.softcap != 0) {
            const V cap = T(block.softcap * kLog2e);
            for (int64_t i = 0; i < count * width; i += lanes) {
                (cap * tanh(V::load(scores + i))).store(scores + i);
            }
        }
        if (bias.given && !added) {
            if (kept_bias != nullptr) {
                bias.add_kept_to(scores, keys, kept_bias + keys.begin * width);
            } else {
                bias.add_to(scores, keys, staging);
            }
            changes = true;
        }
        if (mask.given) changes |= mask.add_to(scores, keys, staging);
        if (block.alibi) add_alibi(scores, keys);
        if (keys.begin < inner_begin || keys.end > inner_end) {
            cut_edges(scores, keys);
            changes = true;
        }
        return changes;
    }

   private:
    const Row& row_of_lane(int lane) const {
        return block.rows[lane < block.row_count ? lane : block.row_count - 1];
    }

    void add_alibi(T* scores, Span keys) const {
        T slope[width], first[width];  // first: key keys.begin as seen from the query
        for (int i = 0; i < width; ++i) {
            const Row& row = row_of_lane(i);
            slope[i] = T(-row.slope * kLog2e);
            first[i] = T(keys.begin - row.position);
        }
        for (int64_t j = 0; j < keys.size(); ++j, scores += width) {
            for (int c = 0; c < width; c += lanes) {
                const V distance = abs(V::load(first + c) + V(T(j)));
                bounded_sum(V::load(scores + c), distance, V::load(slope + c)).store(scores + c);
            }
        }
    }

    void cut_edges(T* scores, Span keys) const {
        T low[width], high[width];  // each row's interval, counted from keys.begin
        for (int i = 0; i < width; ++i) {
            const Row& row = row_of_lane(i);
            low[i] = T(clamp(row.begin, keys) - keys.begin);
            high[i] = T(clamp(row.end, keys) - keys.begin);
        }
        hidden_keys(keys, [&](int64_t first, int64_t last) {
            for (int64_t j = first - keys.begin; j < last - keys.begin; ++j) {
                const V key = T(j);
                for (int c = 0; c < width; c += lanes) {
                    const auto seen = (key >= V::load(low + c)) & (key < V::load(high + c));
                    T* score = scores + j * width + c;
                    select<T>(seen, V::load(score), V(-kInfinity<T>)).store(score);
                }
            }
        });
    }

    static int64_t clamp(int64_t key, Span keys) {
        return key < keys.begin ? keys.begin : key < keys.end ? key : keys.end;
    }
};

}  // namespace
}  // namespace fastattn
