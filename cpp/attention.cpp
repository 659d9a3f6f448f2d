// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call with many queries: cuts each sequence into row blocks, which share
// a key and value head, gives each thread its scratch memory, and lets the kernel attend. Where
// blocks are too few for all threads, their keys are cut too, into spans, and what each gives is
// merged in order. How large blocks are, and whether there are spans, schedule.cpp says. Called by
// src/; calls the kernel's table (kernel/kernel.h) through parallel_for. Sequences that are decoded
// go to decode.cpp, short ones to short.cpp.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "split.h"

namespace fastattn {
namespace {

constexpr double kMostVisited = 2e7;      // tiles; plan() takes seconds to look at so many
constexpr int64_t kKeysAhead = 256;       // of the next head that a thread comes to, so many
constexpr size_t kKeptBytes = 512 << 10;  // of one thread: half of a usual second-level cache

// The row blocks of all sequences, or of those that are not decoded.
class Blocks {
   public:
    Blocks(const Call& call, bool every)
        : call_(call),
          args_(call.args),
          functions_(call.functions),
          every_(every),
          costs_(args_.head_dim, args_.value_head_dim, functions_.lanes,
                 args_.key.dtype !=
                     (args_.query.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32)),
          shared_(call.shared_block()),
          partial_bytes_(functions_.decode.partial_bytes(shared_)) {
        if (args_.kv_heads == 0) return;
        const RowsToCut work = look();
        if (work.rows == 0) return;
        const double most_items = work.heads * std::ceil(double(work.rows) / double(work.lanes)) *
                                  std::ceil(double(work.keys) / double(kSpanKeys));
        const int team = team_size(int64_t(std::min(most_items, double(kMostThreads))),
                                   work.pairs * costs_.pair, call.threads);
        const RowCut best = cut_rows(work, costs_, team, [&](int64_t rows, bool in_spans) {
            return thread_bytes(rows, in_spans) + (in_spans ? slot_bytes(rows) : 0);
        });
        in_spans_ = best.in_spans;
        threads_ = best.threads;
        block_rows_ = best.rows;
        block_seconds_ = costs_.block(double(block_rows_), double(work.keys));
        kernel_bytes_ = kernel_bytes(block_rows_);
        thread_bytes_ = thread_bytes(block_rows_, in_spans_);
        across_heads_ = work.in_window && args_.key.head_stride < args_.key.row_stride;
        cut(work.rows);
        if (!in_spans_ && bias_recurs()) keep_bias();
        if (in_spans_) {
            const double most = double(items()) * (double(work.keys) / double(kSpanKeys) + 4);
            slots_ = partials_at_a_time(threads_, thread_bytes_, slot_bytes(block_rows_), most);
        } else {
            threads_ = int(std::min<int64_t>(threads_, items()));
        }
    }

    bool run(Interrupt interrupt) const {
        if (items() == 0) return true;
        const Memory memory = allocate(bytes());
        if (kept_bytes_ > 0) begin_keeping(memory.get());
        if (!in_spans_) {
            return parallel_for(items(), threads_, interrupt,
                                [&](int64_t item, int worker, const Stop& stop) {
                                    char* const mine = memory_of(worker, memory.get());
                                    char* const kept =
                                        kept_bytes_ > 0 ? kept_of(worker, memory.get()) : nullptr;
                                    for (int64_t n = 0; n < places(item); ++n) {
                                        attend(item, n, mine, kept, stop);
                                        take_back(mine, thread_bytes_);
                                    }
                                },
                                {.item_seconds = double(run_) * block_seconds_});
        }
        char* const slots = memory_of(threads_, memory.get());
        Patience patience(interrupt);
        for (Wave wave; next(wave);) {
            if (patience.ended()) return false;
            const auto attend = [&](int64_t i, int worker, const Stop& stop) {
                const Unit& unit = wave.units[size_t(i)];
                char* const mine = memory_of(worker, memory.get());
                char* partials = nullptr;
                if (unit.slot != kNone) {
                    partials = slots + size_t(unit.slot) * slot_bytes(block_rows_);
                    lend(partials, block_rows_ * partial_bytes_);
                }
                attend_unit(unit, mine, partials, stop);
                take_back(mine, thread_bytes_);
            };
            const auto merge = [&](int64_t i, int worker, const Stop&) {
                char* const mine = memory_of(worker, memory.get());
                merge_rows(wave, i, mine, slots);
                take_back(mine, thread_bytes_);
            };
            if (!parallel_for(int64_t(wave.units.size()), threads_, interrupt, attend))
                return false;
            if (wave.merges.empty()) continue;
            const int64_t merged = int64_t(wave.merges.size()) * pieces(wave);
            if (!parallel_for(merged, merging_team(wave), interrupt, merge)) return false;
            carry(wave, slots);
        }
        return true;
    }

    // All sequences must be of the same lengths.
    Plan plan() const {
        const TileCounts counts = items() == 0 ? TileCounts{} : count();
        Plan plan;
        plan.query_tile = functions_.query_tile;
        plan.key_tile = functions_.key_tile;
        plan.threads = threads_;
        plan.tiles = counts.skipped + counts.computed;
        plan.tiles_skipped = counts.skipped;
        plan.tiles_edge = counts.edge;
        plan.pairs_computed = counts.pairs;
        plan.scratch_bytes = bytes();
        return plan;
    }

    // Adds the phases of run().
    void add_phases(Schedule& schedule) const {
        schedule.scratch_bytes = std::max(schedule.scratch_bytes, bytes());
        if (!in_spans_) {
            Phase phase{threads_, {}};
            for (int64_t item = 0; item < items(); ++item) {
                double all = 0;
                for (int64_t n = 0; n < places(item); ++n) {
                    const Place at = place(item, n);
                    for (int64_t i = 0; i < units(at); ++i) all += unit(at, i).seconds;
                }
                phase.items.push_back({{all}});
            }
            if (items() > 0) schedule.phases.push_back(phase);
            return;
        }
        for (Wave wave; next(wave);) {
            Phase attending{threads_, {}}, merging{merging_team(wave), {}};
            for (const Unit& unit : wave.units) attending.items.push_back({{unit.seconds}});
            for (const Merge& merge : wave.merges) {
                for (int64_t i = 0; i < pieces(wave); ++i) {
                    merging.items.push_back({{merging_seconds(merge) / double(pieces(wave))}});
                }
            }
            schedule.phases.push_back(attending);
            if (!merging.items.empty()) schedule.phases.push_back(merging);
        }
    }

   private:
    // Some rows of a head.
    struct Place {
        int64_t batch, head, index;
    };
    // The keys of a block that lie in one span of one part.
    struct Unit {
        Place at;
        bool first_part;
        Interval keys;
        double seconds;
        int64_t slot;  // where its partials go; none: it is the only unit of its block
    };
    // Units of a block that come one after the other, and so do their partials.
    struct Merge {
        Place at;
        int64_t first, count;  // slots
        bool starts, ends;     // else the wave before, the next one has more of the block
    };
    // As many units as there are slots for: no more partials may wait to be merged.
    struct Wave {
        std::vector<Unit> units;
        std::vector<Merge> merges;
        int64_t merged_rows = 1;     // at a time
        int64_t item = 0, done = 0;  // the next block, and how many of its units were in waves
    };
    static constexpr int64_t kNone = -1, kCarried = 0;  // slots

    bool included(const Sequence& sequence) const {
        return every_ || !call_.decodes(sequence.q_len);
    }
    int64_t rows(const Sequence& sequence) const { return sequence.q_len * call_.group; }
    int64_t blocks(const Sequence& sequence) const {
        return (rows(sequence) + block_rows_ - 1) / block_rows_;
    }
    int64_t runs() const { return (call_.batches + run_ - 1) / run_; }
    int64_t items() const { return (run_ > 1 ? blocks_ * runs() : all_blocks_) * args_.kv_heads; }
    int64_t sequences() const { return call_.unlike() ? call_.batches : 1; }

    RowsToCut look() const {
        RowsToCut work{};
        work.lanes = functions_.lanes;
        work.query_tile = functions_.query_tile;
        work.in_window = call_.visible_at_most() < args_.kv_len;
        if (call_.batches == 0) return work;
        for (int64_t batch = 0; batch < sequences(); ++batch) {
            const Sequence sequence = call_.sequence(batch);
            if (!included(sequence) || sequence.q_len == 0) continue;
            double pairs = 0;
            const auto add = [&](const Sequence& part) {
                work.keys = std::max(work.keys, most_keys(part));
                pairs += double(args_.q_heads) * call_.pairs(part);
            };
            add(sequence);
            if (call_.has_first_part(batch)) add(call_.first_part(batch));
            work.rows = std::max(work.rows, rows(sequence));
            work.pairs += pairs;
            if (pairs > 0) work.heads += double(args_.kv_heads);
        }
        const double alike = call_.unlike() ? 1 : double(call_.batches);
        work.heads *= alike;
        work.pairs *= alike;
        return work;
    }

    // That a row sees, roughly.
    int64_t most_keys(const Sequence& sequence) const {
        int64_t most = 0;
        for (const int64_t i : {int64_t{0}, sequence.q_len / 2, sequence.q_len - 1}) {
            const Interval keys = call_.interval(sequence, i);
            most = std::max(most, keys.end - keys.begin);
        }
        return most;
    }

    // Sets what place() reads. The longest blocks come first, and what ends last is short: those
    // of long sequences, and late ones where later rows see more keys.
    void cut(int64_t most_rows) {
        blocks_ = (most_rows + block_rows_ - 1) / block_rows_;
        all_blocks_ = blocks_ * call_.batches;
        late_first_ = args_.right != kUnlimited;
        if (threads_ > 1 && call_.unlike() && call_.batches <= kMostSorted) {
            std::vector<std::pair<float, int32_t>> longest;
            for (int64_t batch = 0; batch < call_.batches; ++batch) {
                const Sequence sequence = call_.sequence(batch);
                const int64_t most = std::min(rows(sequence), block_rows_);
                const double pairs = most > 0 ? double(most) * double(most_keys(sequence)) : 0;
                longest.emplace_back(float(-pairs), int32_t(batch));
            }
            std::sort(longest.begin(), longest.end());
            for (const auto& [pairs, batch] : longest) order_.push_back(batch);
        }
        if (!call_.packed()) {
            tail_ = blocks_across_heads(blocks_, call_.batches * args_.kv_heads, threads_);
            return;
        }
        all_blocks_ = 0;
        for (int64_t rank = 0; rank < call_.batches; ++rank) {
            const Sequence sequence = call_.sequence(ranked(rank));
            first_block_.push_back(all_blocks_);
            if (included(sequence)) all_blocks_ += blocks(sequence);
        }
    }

    char* memory_of(int worker, char* memory) const {
        return memory + size_t(worker) * thread_bytes_;
    }

    int64_t ranked(int64_t rank) const { return order_.empty() ? rank : order_[size_t(rank)]; }

    // Bytes of one thread, and of a slot.
    size_t thread_bytes(int64_t block_rows, bool in_spans) const {
        Scratch scratch;
        BlockMemory(block_rows, kernel_bytes(block_rows), scratch);
        const bool merges = args_.kv_parts != nullptr && !in_spans;
        for (int part = 0; merges && part < 2; ++part) {
            scratch.take<char>(block_rows * partial_bytes_);
        }
        return scratch.used();
    }
    size_t slot_bytes(int64_t block_rows) const {
        return room_for(size_t(block_rows * partial_bytes_));
    }
    size_t kernel_bytes(int64_t block_rows) const {
        Block block = shared_;
        block.row_count = int(block_rows);
        return functions_.scratch_bytes(block);
    }
    size_t bytes() const {
        const size_t slots = in_spans_ ? size_t(slots_ + 1) * slot_bytes(block_rows_) : 0;
        return size_t(threads_) * (thread_bytes_ + kept_bytes_) + slots;
    }

    // Whether batch elements that come one after the other have the same bias.
    bool bias_recurs() const {
        if (args_.bias.data == nullptr || call_.packed()) return false;
        for (size_t axis = args_.batch_shape.size(); axis-- > 0;) {
            if (args_.batch_shape[axis] > 1) return args_.bias.batch_strides[axis] == 0;
        }
        return false;
    }
    // An item is then the same block of many of them, if what is kept meanwhile stays near.
    void keep_bias() {
        Block block = shared_;
        block.row_count = int(block_rows_);
        const size_t kept = functions_.kept_bytes(block);
        const bool fits = size_t(threads_) * (thread_bytes_ + kept) <= kForwardBytes;
        const int64_t run = std::min(batches_of_item(items(), threads_), call_.batches);
        if (!fits || kept > kKeptBytes || run == 1) return;
        kept_bytes_ = kept;
        run_ = run;
    }
    void begin_keeping(char* memory) const {
        Block block = shared_;
        block.row_count = int(block_rows_);
        for (int worker = 0; worker < threads_; ++worker) {
            block.kept = kept_of(worker, memory);
            functions_.begin_keeping(block);
        }
    }
    // Behind the scratch memory of all threads.
    char* kept_of(int worker, char* memory) const {
        return memory_of(threads_, memory) + size_t(worker) * kept_bytes_;
    }

    // Of batch elements, heads and blocks that are alike, it visits one and counts it for all.
    TileCounts count() const {
        const int64_t batches = call_.batches;
        const int64_t some_batches = batches_are_alike(batches) ? 1 : batches;
        const int64_t some_heads = heads_are_alike() ? 1 : args_.kv_heads;
        // The first of them is the last of the rows, which may be less than full.
        const int64_t some_blocks = blocks_are_alike() ? std::min<int64_t>(blocks_, 2) : blocks_;
        require_quick(double(some_batches) * double(some_heads) * double(some_blocks));

        const Memory memory = allocate(thread_bytes_);
        TileCounts counts{};
        for (int64_t i = 0; i < some_batches * some_heads * some_blocks; ++i) {
            const int64_t index = i % some_blocks;
            const int64_t head = i / some_blocks % some_heads;
            const int64_t batch = i / some_blocks / some_heads;
            TileCounts one{};
            const Sequence sequence = call_.sequence(batch);
            const Place at{batch, head, blocks_ - 1 - index};
            functions_.count(block(sequence, at, 0, block_rows_, memory.get(), {}), one);
            take_back(memory.get(), thread_bytes_);
            int64_t times = batches / some_batches * (args_.kv_heads / some_heads);
            if (index > 0) times *= (blocks_ - 1) / (some_blocks - 1);
            counts.skipped += times * one.skipped;
            counts.edge += times * one.edge;
            counts.computed += times * one.computed;
            counts.pairs += times * one.pairs;
        }
        return counts;
    }

    bool batches_are_alike(int64_t batches) const {
        for (const Array* array : {&args_.mask, &args_.bias}) {
            for (const int64_t stride : array->batch_strides) {
                if (stride != 0) return false;
            }
        }
        for (const int64_t* array : {args_.query_offset, args_.kv_lengths}) {
            for (int64_t i = 1; array != nullptr && i < batches; ++i) {
                if (array[i] != array[0]) return false;
            }
        }
        return true;
    }

    bool heads_are_alike() const {
        return args_.mask.head_stride == 0 && args_.bias.head_stride == 0;
    }

    bool blocks_are_alike() const {
        return heads_are_alike() && args_.mask.row_stride == 0 && args_.bias.row_stride == 0 &&
               args_.left == kUnlimited && args_.right == kUnlimited;
    }

    void require_quick(double blocks) const {
        const bool every_tile = args_.mask.data != nullptr || args_.bias.data != nullptr;
        const double tiles = blocks * double(block_rows_) / functions_.query_tile *
                             (every_tile ? double(args_.kv_len) / functions_.key_tile : 1);
        if (tiles <= kMostVisited) return;
        throw std::invalid_argument(
            "explain looks at each tile of a mask or bias, and at one of each row of tiles in a "
            "window or below a diagonal, at most " +
            std::to_string(int64_t(kMostVisited)) + ", but there are " +
            std::to_string(int64_t(tiles)));
    }

    // How many blocks an item is, and which.
    int64_t places(int64_t item) const {
        return std::min(run_, call_.batches - item % runs() * run_);
    }
    Place place(int64_t item, int64_t n) const {
        if (run_ == 1) return place(item);
        const int64_t block = item / runs();
        return {ranked(item % runs() * run_ + n), block / blocks_, index(block % blocks_, blocks_)};
    }
    Place place(int64_t item) const {
        const int64_t heads = args_.kv_heads;
        if (call_.packed()) {
            const int64_t block = item / heads;
            const auto next = std::upper_bound(first_block_.begin(), first_block_.end(), block) - 1;
            const int64_t batch = ranked(next - first_block_.begin());
            const int64_t of_batch = blocks(call_.sequence(batch));
            return {batch, item % heads, index(block - *next, of_batch)};
        }
        const int64_t all_heads = call_.batches * heads, before = blocks_ - tail_;
        if (item >= all_heads * before) {
            item -= all_heads * before;
            const int64_t head = item % all_heads;
            return {ranked(head / heads), head % heads, index(before + item / all_heads, blocks_)};
        }
        const int64_t in_batch = item % (heads * before);
        const int64_t head = across_heads_ ? in_batch % heads : in_batch / before;
        const int64_t turn = across_heads_ ? in_batch / heads : in_batch % before;
        return {ranked(item / (heads * before)), head, index(turn, blocks_)};
    }
    int64_t index(int64_t turn, int64_t blocks) const {
        return late_first_ ? blocks - 1 - turn : turn;
    }

    // The keys that some row of a block sees.
    Interval seen(const Sequence& sequence, int64_t index) const {
        const int64_t first = index * block_rows_;
        const int64_t last = std::min(rows(sequence), first + block_rows_) - 1;
        return call_.interval(sequence, first / call_.group, last / call_.group);
    }
    static int64_t spans(Interval keys) {
        if (keys.begin == keys.end) return 0;
        return (keys.end - 1) / kSpanKeys - keys.begin / kSpanKeys + 1;
    }
    Sequence part(int64_t batch, bool first) const {
        return first ? call_.first_part(batch) : call_.sequence(batch);
    }

    // How many units a block has: one at least.
    int64_t units(const Place& at) const {
        int64_t all = spans(seen(call_.sequence(at.batch), at.index));
        if (call_.has_first_part(at.batch)) all += spans(seen(part(at.batch, true), at.index));
        return std::max<int64_t>(all, 1);
    }

    Unit unit(const Place& at, int64_t n) const {
        const auto in_span = [&](bool first_part, Interval keys) {
            return Unit{at, first_part, keys, seconds(at, part(at.batch, first_part), keys), kNone};
        };
        for (bool first_part = call_.has_first_part(at.batch);; first_part = false) {
            const Interval keys = seen(part(at.batch, first_part), at.index);
            const int64_t span = keys.begin / kSpanKeys + n;
            if (n < spans(keys)) {
                return in_span(first_part, {std::max(keys.begin, span * kSpanKeys),
                                            std::min(keys.end, (span + 1) * kSpanKeys)});
            }
            if (!first_part) return in_span(false, {keys.begin, keys.begin});
            n -= spans(keys);
        }
    }

    // What a block takes for some of its keys.
    double seconds(const Place& at, const Sequence& sequence, Interval keys) const {
        const int64_t first = at.index * block_rows_;
        const int64_t last = std::min(rows(sequence), first + block_rows_);
        const int64_t tile = functions_.query_tile, lanes = functions_.lanes;
        double pairs = 0;
        for (int64_t row = first; row < last; row += tile) {
            const int64_t end = std::min(row + tile, last);
            const Interval seen =
                call_.interval(sequence, row / call_.group, (end - 1) / call_.group);
            const int64_t both = std::min(seen.end, keys.end) - std::max(seen.begin, keys.begin);
            const int64_t padded = (end - row + lanes - 1) / lanes * lanes;
            pairs += double(padded) * double(std::max<int64_t>(both, 0));
        }
        return pairs * costs_.pair + double(keys.end - keys.begin) * costs_.key +
               double(last - first) * costs_.row;
    }

    // False: all is done.
    bool next(Wave& wave) const {
        wave.units.clear();
        wave.merges.clear();
        int64_t used = kCarried;
        while (wave.item < items() && int64_t(wave.units.size()) < kMostUnits) {
            const Place at = place(wave.item);
            const int64_t all = units(at);
            const bool alone = all == 1;
            const int64_t count = alone ? 1 : std::min(all - wave.done, slots_ - used);
            if (count == 0) break;
            if (!alone) {
                wave.merges.push_back(
                    {at, used + 1, count, wave.done == 0, wave.done + count == all});
            }
            for (int64_t n = 0; n < count; ++n) {
                wave.units.push_back(unit(at, wave.done + n));
                if (!alone) wave.units.back().slot = ++used;
            }
            wave.done += count;
            if (wave.done < all) break;
            wave.done = 0;
            ++wave.item;
        }
        std::stable_sort(wave.units.begin(), wave.units.end(),
                         [](const Unit& a, const Unit& b) { return a.seconds > b.seconds; });
        const int64_t all_rows = int64_t(wave.merges.size()) * block_rows_;
        wave.merged_rows = std::clamp<int64_t>(all_rows / (4 * threads_), 1, block_rows_);
        return !wave.units.empty();
    }

    // Of each block that is merged, so many items.
    int64_t pieces(const Wave& wave) const {
        return (block_rows_ + wave.merged_rows - 1) / wave.merged_rows;
    }
    double merging_seconds(const Merge& merge) const {
        return double(merge.count * block_rows_ * partial_bytes_) / kMergeBytesPerSecond;
    }
    int merging_team(const Wave& wave) const {
        double all = 0;
        for (const Merge& merge : wave.merges) all += merging_seconds(merge);
        return team_size(int64_t(wave.merges.size()) * pieces(wave), all, threads_);
    }

    // memory: thread_bytes_ of it, here and below.
    void attend(int64_t item, int64_t n, char* memory, char* kept, const Stop& stop) const {
        const Place at = place(item, n);
        Block newest = block(call_.sequence(at.batch), at, 0, block_rows_, memory, stop);
        newest.kept = kept;
        newest.new_keys = args_.kv_len > kKeysAhead &&
                          (run_ > 1 || item < threads_ || !same_keys(place(item - threads_), at));
        if (n + 1 < places(item)) {
            set_next(at, place(item, n + 1), newest);
        } else if (item + threads_ < items()) {  // unless others are slower, or faster
            set_next(at, place(item + threads_, 0), newest);
        }
        if (!call_.has_first_part(at.batch)) return functions_.attend(newest, nullptr);
        Scratch scratch(memory);
        BlockMemory(block_rows_, kernel_bytes_, scratch);
        char* const partials = scratch.take<char>(block_rows_ * partial_bytes_);
        char* const later = scratch.take<char>(block_rows_ * partial_bytes_);
        for (int64_t n = 0; n < units(at); ++n) {
            attend_unit(unit(at, n), memory, n == 0 ? partials : later, stop);
            if (n > 0) functions_.decode.merge(newest, partials, later);
        }
        functions_.decode.finish(newest, partials);
    }

    // partials: where those of the rows go; null: it stores the result.
    void attend_unit(const Unit& unit, char* memory, char* partials, const Stop& stop) const {
        const Sequence sequence = part(unit.at.batch, unit.first_part);
        const Block some = block(sequence, unit.at, 0, block_rows_, memory, stop);
        Scratch scratch(memory);
        Row* const rows_here = BlockMemory(block_rows_, kernel_bytes_, scratch).rows;
        for (Row* row = rows_here; row < rows_here + some.row_count; ++row) {
            row->begin = std::clamp(row->begin, unit.keys.begin, unit.keys.end);
            row->end = std::clamp(row->end, row->begin, unit.keys.end);
        }
        functions_.attend(some, partials);
    }

    // Merges some rows of a block with what came before, and stores them where nothing follows.
    void merge_rows(const Wave& wave, int64_t item, char* memory, char* slots) const {
        const Merge& merge = wave.merges[size_t(item / pieces(wave))];
        const int64_t first = item % pieces(wave) * wave.merged_rows;
        const Block some =
            block(call_.sequence(merge.at.batch), merge.at, first, wave.merged_rows, memory, {});
        if (some.row_count == 0) return;
        const auto partials = [&](int64_t slot) {
            return slots + size_t(slot) * slot_bytes(block_rows_) + first * partial_bytes_;
        };
        char* const into = partials(merge.starts ? merge.first : kCarried);
        for (int64_t n = merge.starts ? 1 : 0; n < merge.count; ++n) {
            functions_.decode.merge(some, into, partials(merge.first + n));
        }
        if (merge.ends) functions_.decode.finish(some, into);
    }

    // The last block may go on in the next wave.
    void carry(const Wave& wave, char* slots) const {
        if (wave.done == 0 || !wave.merges.back().starts) return;
        const size_t size = slot_bytes(block_rows_);
        lend(slots, block_rows_ * partial_bytes_);
        std::memcpy(slots, slots + size_t(wave.merges.back().first) * size,
                    size_t(block_rows_ * partial_bytes_));
    }

    static bool same_keys(const Place& a, const Place& b) {
        return a.batch == b.batch && a.head == b.head;
    }

    // What the thread attends to after this block.
    void set_next(const Place& at, const Place& next, Block& block) const {
        if (args_.pages != nullptr || args_.kv_parts != nullptr) return;
        const Sequence sequence = call_.sequence(next.batch);
        const int64_t first = next.index * block_rows_;
        if (call_.group == 1) {
            block.next_query =
                call_.rows(args_.query, next.batch).at(next.head, sequence.q_start + first);
            block.next_rows = std::min(block_rows_, rows(sequence) - first);
            block.next_query_stride = args_.query.row_stride;
        }
        if (same_keys(at, next)) return;
        const Interval keys = seen(sequence, next.index);
        const auto row = [&](const Array& array) {
            return call_.rows(array, next.batch).at(next.head, sequence.kv_start + keys.begin);
        };
        block.next_key = row(args_.key);
        block.next_value = row(args_.value);
        block.next_keys = std::min(keys.end - keys.begin, kKeysAhead);
    }

    // Some rows of a block, from its row `first` on.
    Block block(const Sequence& sequence, const Place& at, int64_t first, int64_t count,
                char* memory, const Stop& stop) const {
        const int64_t begin = at.index * block_rows_;
        const int64_t end = std::min(rows(sequence), begin + std::min(first + count, block_rows_));
        first += begin;
        Scratch scratch(memory);
        const BlockMemory mine(block_rows_, kernel_bytes_, scratch);
        Block block = shared_;
        block.rows = mine.rows;
        block.row_count = int(std::max<int64_t>(end - first, 0));
        block.scratch = mine.kernel;
        block.stop = stop;
        call_.set_keys(block, sequence, at.head);
        call_.set_rows(mine.rows, block.row_count, sequence, at.head, first);
        return block;
    }

    const Call& call_;
    const AttentionArgs& args_;
    const Functions& functions_;
    const bool every_;
    const RowCosts costs_;
    const Block shared_;
    const int64_t partial_bytes_;                           // of a row
    double block_seconds_ = 0;                              // of the longest
    int64_t block_rows_ = 1, blocks_ = 0, all_blocks_ = 0;  // blocks of the longest head; of all
    std::vector<int32_t> order_;                            // of batch elements; empty: their own
    std::vector<int64_t> first_block_;  // of each packed sequence, in that order
    int64_t tail_ = 0;                  // see blocks_across_heads()
    bool late_first_ = false;
    // One block of all heads after the other: where the heads of a token are neighbours and few
    // keys are seen, the next block finds the same pages of memory.
    bool across_heads_ = false;
    size_t kernel_bytes_ = 0, thread_bytes_ = 0;
    // Of a bias that one batch element after the other has, and so many are in an item; 0: none is
    // kept.
    size_t kept_bytes_ = 0;
    int64_t run_ = 1;
    int threads_ = 1;
    bool in_spans_ = false;
    int64_t slots_ = 0;  // beside kCarried
};

}  // namespace

bool attention(const AttentionArgs& args, Interrupt interrupt) {
    const Call call(args);
    if (const auto shape = short_shape(call)) return attend_short(call, *shape, interrupt);
    const bool decodes = call.packed() || call.decodes(args.q_len);
    const bool attends = call.packed() || !decodes;
    for (;;) {
        const int before = times_begun_again();
        if (attends && !Blocks(call, false).run(interrupt)) return false;
        if (decodes && !decode(call, interrupt)) return false;
        // A child that a signal handler forked has lost what other threads had merged by halves.
        if (times_begun_again() == before) return true;
        if (args.accumulates) throw_begun_again();
    }
}

Plan plan_attention(const AttentionArgs& args) {
    const Call call(args);
    Plan plan = Blocks(call, true).plan();
    if (call.decodes(args.q_len)) plan_decode(call, plan);
    if (const auto shape = short_shape(call)) plan_short(call, *shape, plan);
    return plan;
}

Schedule schedule_attention(const AttentionArgs& args) {
    const Call call(args);
    Schedule schedule;
    if (const auto shape = short_shape(call)) {
        schedule_short(call, *shape, schedule);
        return schedule;
    }
    const bool decodes = call.packed() || call.decodes(args.q_len);
    if (call.packed() || !decodes) Blocks(call, false).add_phases(schedule);
    if (decodes) schedule_decode(call, schedule);
    return schedule;
}

}  // namespace fastattn
