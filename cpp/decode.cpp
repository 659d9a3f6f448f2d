// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call that decodes, that is, with few queries. Here the keys are cut,
// into splits of fixed length, so that one head keeps every core busy. A split gives a partial for
// each row, and a row's partials are merged in order. Sequences that hold some of the same keys in
// a split, be it in an array that is broadcast or in the same pages, are attended together: these
// keys are read once. How much is done at a time, and by how many, schedule.h says. Called by
// attention.cpp; calls the kernel's table (kernel/kernel.h) through parallel_for.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "schedule.h"
#include "split.h"

namespace fastattn {
namespace {

constexpr int64_t kMostVisited = 1 << 16;  // batch elements between two such looks
constexpr int kMostLooks = 64;             // of a plan: at slices, and at the waves of a slice

// Places for partials in memory, one after the other. Each holds some rows; each head has the same.
class Places {
    std::vector<size_t> first_rows_;  // of each place, among the rows of a head
    size_t rows_ = 0;                 // of a head

   public:
    void add(int64_t rows) {
        first_rows_.push_back(rows_);
        rows_ += size_t(rows);
    }

    size_t count() const { return first_rows_.size(); }
    size_t bytes(int64_t heads, size_t row_bytes) const {
        return size_t(heads) * (rows_ * row_bytes + first_rows_.size() * kRedZone);
    }
    size_t offset(int64_t head, size_t place, size_t row_bytes) const {
        return bytes(head, row_bytes) + first_rows_[place] * row_bytes + place * kRedZone;
    }
};

// Rows of a sequence that is decoded, or of a part of one.
struct Member {
    Sequence sequence;
    int64_t first_row, rows;          // of all pairs of a query and a head of the group
    size_t carried;                   // whose place in Slice::carried: that of both parts
    bool starts, ends;                // whether no part comes before it, behind it
    int64_t begin, end;               // the keys that some of the sequence's rows see
    int64_t first_split, last_split;  // that hold them; one at least
    int64_t key, value;               // where its batch element's keys and values begin
    int64_t splits() const { return last_split - first_split + 1; }
    bool one_split() const { return starts && ends && splits() == 1; }
};

// The sequences that are worked on at a time, for some of the heads.
struct Slice {
    int64_t first_head = 0, heads = 0;
    std::vector<Member> members;
    Places carried;  // of members with more than one split
    int64_t first_split = INT64_MAX, last_split = 0;
    int64_t items = 0;  // where no keys are shared
    int team = 1;
    int64_t most_together[2] = {0, 0};  // rows, without and with query tiles
};

// What a member has of a task. link: its place in Wave::links; -1: there is nothing to merge.
struct Share {
    int member;
    int link = -1;
};

// Members that attend to a split together; for each head.
struct Task {
    int64_t split;
    size_t place;      // of the first of them, among the split's
    int first, count;  // in Wave::shares
    int64_t rows;
    size_t waiting;  // whose place in Wave::waiting
    double seconds;
};

// A partial that is to be merged, and where it waits.
struct Link {
    int member, share;
    int64_t split;
    size_t waiting;
    int64_t first_row;  // in that place
};

// The tasks that are done at a time.
struct Wave {
    std::vector<Share> shares;
    std::vector<Task> tasks;        // those that take longest first
    std::vector<size_t> unlike;     // that take much less than those before, the first ones
    Places waiting;                 // of each task
    std::vector<Link> links;        // of one member after the other, each in the order of the keys
    int64_t most_rows[2] = {0, 0};  // of a task, without and with query tiles
};

// Where a wave begins, among the members that have a split.
struct Position {
    int64_t split;
    size_t place = 0;
    std::vector<int> order = {};  // of these members; empty: not yet asked for
};

class Decode {
   public:
    explicit Decode(const Call& call)
        : call_(call),
          functions_(call.functions),
          partial_bytes_(functions_.decode.partial_bytes(call.shared_block())),
          costs_(costs_of(call, partial_bytes_)) {
        const int64_t most_rows = std::min(call.args.q_len * call.group, kMostRows);
        const size_t room = kCarriedBytes / (size_t(most_rows) * partial_bytes_);
        heads_ = std::clamp<int64_t>(int64_t(room), 1, call.args.kv_heads);
    }

    // Calls visit(slice) for one after the other until it returns false. False: it did.
    template <class Visit>
    bool each_slice(const Visit& visit) const {
        for (int64_t head = 0; head < call_.args.kv_heads; head += heads_) {
            for (int64_t batch = 0; batch < call_.batches;) {
                if (!visit(take(head, batch))) return false;
            }
        }
        return true;
    }

    // Likewise, for the waves of a slice.
    template <class Visit>
    bool each_wave(const Slice& slice, const Visit& visit) const {
        for (Position next{slice.first_split}; next.split <= slice.last_split;) {
            if (!visit(take(slice, next))) return false;
        }
        return true;
    }

    size_t carried_bytes(const Slice& slice) const {
        return slice.carried.bytes(slice.heads, partial_bytes_);
    }
    // Of all threads, and of the partials that wait.
    size_t bytes(const Slice& slice, const Wave& wave) const {
        return scratch_bytes(wave) * size_t(slice.team) +
               wave.waiting.bytes(slice.heads, partial_bytes_);
    }

    // carried: carried_bytes() of it.
    bool run(const Slice& slice, const Wave& wave, char* carried, Interrupt interrupt) const {
        const size_t scratch = scratch_bytes(wave), team = size_t(slice.team);
        const Memory memory =
            allocate(scratch * team + wave.waiting.bytes(slice.heads, partial_bytes_));
        std::vector<std::atomic<char>> missing(wave.links.size() * size_t(slice.heads));
        for (size_t i = 0; i < missing.size(); ++i) {
            missing[i] = is_first(slice, wave, i / size_t(slice.heads)) ? 1 : 2;
        }
        const Work work{slice, wave, carried, memory.get() + scratch * team, missing.data()};
        const int64_t items = int64_t(wave.tasks.size()) * slice.heads;
        const auto attend_item = [&](int64_t item, int worker, const Stop& stop) {
            char* const mine = memory.get() + size_t(worker) * scratch;
            const Item which = item_of(slice, wave, item), none{};
            const int64_t next = item + slice.team;  // unless others are slower, or faster
            attend(work, which, next < items ? item_of(slice, wave, next) : none, mine, stop);
            if (!merges_alone(slice.team)) merge_all_of(work, *which.task, which.head, mine);
            take_back(mine, scratch);
        };
        if (!parallel_for(items, slice.team, interrupt, attend_item)) return false;
        if (!merges_alone(slice.team) || wave.links.empty()) return true;
        const auto merge_all = [&](int64_t item, int, const Stop&) {
            const Item which = item_of(slice, wave, item);
            merge_all_of(work, *which.task, which.head, memory.get());
        };
        parallel_for(items, 1, {}, merge_all);
        take_back(memory.get(), scratch);
        return true;
    }

    // Adds what run() does. In large teams most partials are merged as soon as they are there.
    void add_phases(const Slice& slice, const Wave& wave, Schedule& schedule) const {
        Phase attending{slice.team, {}}, merging{1, {}};
        for (int64_t item = 0; item < int64_t(wave.tasks.size()) * slice.heads; ++item) {
            const Task& task = *item_of(slice, wave, item).task;
            double merge = 0;
            for (int i = task.first; i < task.first + task.count; ++i) {
                const Share& share = wave.shares[size_t(i)];
                if (share.link < 0) continue;
                merge += costs_.merge(double(slice.members[size_t(share.member)].rows));
            }
            const bool later = merges_alone(slice.team);
            attending.items.push_back({Step{task.seconds + (later ? 0 : merge)}});
            if (!later) continue;
            merging.items.emplace_back();
            if (merge > 0) merging.items.back().push_back({merge});
        }
        schedule.phases.push_back(attending);
        if (!merging.items.empty() && !wave.links.empty()) schedule.phases.push_back(merging);
    }

   private:
    static DecodeCosts costs_of(const Call& call, size_t partial_bytes) {
        const double dims = double(call.args.head_dim + call.args.value_head_dim);
        const double widths = call.args.query.dtype == Dtype::kFloat64 ? 2 : 1;
        return {dims * double(size_of(call.args.key.dtype)), widths * 2 * (dims + 16),
                double(partial_bytes)};
    }

    // A wave at work. missing: of each link and head, what is to be done before it can be merged:
    // attending, and merging what comes before it.
    struct Work {
        const Slice& slice;
        const Wave& wave;
        char *carried, *waiting;
        std::atomic<char>* missing;
    };

    struct Item {
        const Task* task;
        int64_t head;  // in the slice
    };

    // All tasks of a head come one after the other, as its keys do in memory; but long ones first.
    static Item item_of(const Slice& slice, const Wave& wave, int64_t item) {
        for (size_t i = 0, first = 0;; first = wave.unlike[i++]) {
            const size_t end = i < wave.unlike.size() ? wave.unlike[i] : wave.tasks.size();
            const int64_t count = int64_t(end - first);
            if (item < count * slice.heads) {
                return {&wave.tasks[first + size_t(item % count)], item / count};
            }
            item -= count * slice.heads;
        }
    }

    // The sequences that are decoded, from batch element `next` on, as many as fit a slice. It may
    // have none.
    Slice take(int64_t head, int64_t& next) const {
        Slice slice;
        slice.first_head = head;
        slice.heads = std::min(heads_, call_.args.kv_heads - head);
        size_t count = 0, carried = 0;
        const int64_t stop = std::min(call_.batches, next + kMostVisited);
        for (; next < stop; ++next) {
            const Sequence sequence = call_.sequence(next);
            if (sequence.q_len == 0 || !call_.decodes(sequence.q_len)) continue;
            const bool parts = call_.has_first_part(next);
            const Member newest = member(sequence, !parts, true);
            count += 1 + size_t(newest.rows) / 16;
            if (!newest.one_split()) carried += size_t(newest.rows) * row_bytes(slice);
            const bool fits = count <= kMostMembers && carried <= kCarriedBytes;
            if (!slice.members.empty() && !fits) break;
            if (parts) slice.members.push_back(member(call_.first_part(next), true, false));
            slice.members.push_back(newest);
        }
        if (!slice.members.empty()) share_out(slice);
        return slice;
    }

    // Cuts the members into rows, and finds the team.
    void share_out(Slice& slice) const {
        double seconds = 0, keys = 0;
        int64_t most_rows[2] = {0, 0};
        for (const Member& member : slice.members) {
            const double its_keys = double(member.end - member.begin);
            seconds +=
                double(slice.heads) * costs_.attend(its_keys, its_keys * double(member.rows));
            keys += its_keys;
            slice.items += member.splits() * slice.heads;
            slice.first_split = std::min(slice.first_split, member.first_split);
            slice.last_split = std::max(slice.last_split, member.last_split);
            int64_t& most = most_rows[in_query_tiles(member)];
            most = std::max(most, member.rows);
        }
        keys *= double(slice.heads) / double(slice.items);  // of a split
        int threads = team_size(INT64_MAX, seconds, call_.threads);
        int64_t rows_of[2] = {1, 1};
        for (const bool in_tiles : {false, true}) {
            if (most_rows[in_tiles] == 0) continue;
            const TaskShape shape = shape_tasks(
                most_rows[in_tiles], in_tiles ? functions_.lanes : 1, slice.items, threads,
                partial_bytes_, [&](int64_t rows) { return scratch_bytes(rows, in_tiles); },
                [&](int64_t rows) { return costs_.attend(keys, keys * double(rows)); });
            rows_of[in_tiles] = shape.rows;
            threads = shape.threads;
        }
        cut(slice, rows_of);
        slice.team = team_size(slice.items, seconds, threads);
        for (const bool in_tiles : {false, true}) {
            if (slice.members.size() == 1) break;
            slice.most_together[in_tiles] =
                rows_together(kMostTogether, slice.team, slice.heads, partial_bytes_,
                              [&](int64_t rows) { return scratch_bytes(rows, in_tiles); });
        }
    }

    // Into members of so many rows, without and with query tiles.
    void cut(Slice& slice, const int64_t (&most_rows)[2]) const {
        std::vector<Member> whole;
        whole.swap(slice.members);
        slice.members.reserve(whole.size());
        slice.items = 0;
        for (size_t i = 0, parts; i < whole.size(); i += parts) {
            parts = whole[i].ends ? 1 : 2;
            const int64_t most = most_rows[in_query_tiles(whole[i])];
            for (int64_t first = 0; first < whole[i].rows; first += most) {
                for (size_t part = i; part < i + parts; ++part) {
                    Member some = whole[part];
                    some.first_row = first;
                    some.rows = std::min(most, some.rows - first);
                    some.carried = slice.carried.count();
                    slice.items += some.splits() * slice.heads;
                    slice.members.push_back(some);
                }
                const Member& last = slice.members.back();
                if (!last.one_split()) slice.carried.add(last.rows);
            }
        }
    }

    // The tasks from a position on, as many as fit a wave.
    Wave take(const Slice& slice, Position& next) const {
        Wave wave;
        if (!add_tasks(slice, next, wave)) {
            const int64_t items = int64_t(wave.tasks.size()) * slice.heads;
            const size_t some = size_t(items_of_wave(items, slice.team) / slice.heads);
            if (some > 0 && some < wave.tasks.size()) {
                const Task& task = wave.tasks[some];
                if (task.split != next.split) next = {task.split};
                next.place = task.place;
                wave.shares.resize(size_t(task.first));
                wave.tasks.resize(some);
            }
        }
        for (Task& task : wave.tasks) {
            const int first = wave.shares[size_t(task.first)].member;
            int64_t& most = wave.most_rows[in_query_tiles(slice.members[size_t(first)])];
            most = std::max(most, task.rows);
            task.waiting = wave.waiting.count();
            wave.waiting.add(task.rows);
            add_links(slice, task, wave);
        }
        std::stable_sort(wave.links.begin(), wave.links.end(), [&](const Link& a, const Link& b) {
            return carried(slice, a) < carried(slice, b);
        });
        for (size_t i = 0; i < wave.links.size(); ++i) {
            wave.shares[size_t(wave.links[i].share)].link = int(i);
        }
        if (slice.team > 1) put_long_ones_first(wave);
        return wave;
    }

    static void put_long_ones_first(Wave& wave) {
        std::vector<Task>& tasks = wave.tasks;
        std::stable_sort(tasks.begin(), tasks.end(),
                         [](const Task& a, const Task& b) { return a.seconds > b.seconds; });
        size_t first = 0;
        for (size_t i = 1; i < tasks.size(); ++i) {
            if (are_alike(tasks[first].seconds, tasks[i].seconds)) continue;
            wave.unlike.push_back(i);
            first = i;
        }
    }

    // Moves the position behind them. False: there is no memory for more.
    bool add_tasks(const Slice& slice, Position& next, Wave& wave) const {
        size_t rows = 0;
        for (; next.split <= slice.last_split; next = {next.split + 1}) {
            if (next.order.empty()) next.order = members_of(slice, next.split);
            while (next.place < next.order.size()) {
                const Task task = first_task(slice, next, int(wave.shares.size()));
                rows += size_t(task.rows);
                const bool fits = rows * row_bytes(slice) <= kWaitingBytes &&
                                  wave.shares.size() + size_t(task.count) <= kMostShares;
                if (!wave.tasks.empty() && !fits) return false;
                for (int i = 0; i < task.count; ++i) {
                    wave.shares.push_back({next.order[next.place++]});
                }
                wave.tasks.push_back(task);
            }
        }
        return true;
    }

    static size_t carried(const Slice& slice, const Link& link) {
        return slice.members[size_t(link.member)].carried;
    }

    size_t row_bytes(const Slice& slice) const { return size_t(slice.heads) * partial_bytes_; }

    // The rows, not head_dim, lie along the vector lanes.
    bool in_query_tiles(const Member& member) const {
        return member.sequence.q_len * call_.group > functions_.decode.most_rows;
    }

    size_t kernel_bytes(const Block& block, bool in_tiles) const {
        return (in_tiles ? functions_.scratch_bytes : functions_.decode.scratch_bytes)(block);
    }
    // One thread's memory for a task.
    size_t scratch_bytes(int64_t rows, bool in_tiles) const {
        if (rows == 0) return 0;
        Block block = call_.shared_block();
        block.row_count = int(rows);
        block.in_span = true;
        Scratch scratch;
        BlockMemory(rows, kernel_bytes(block, in_tiles), scratch);
        return scratch.used();
    }
    // For any task.
    size_t scratch_bytes(const Wave& wave) const {
        return std::max(scratch_bytes(wave.most_rows[0], false),
                        scratch_bytes(wave.most_rows[1], true));
    }

    Member member(const Sequence& sequence, bool starts, bool ends) const {
        Member member{};
        member.sequence = sequence;
        member.rows = sequence.q_len * call_.group;
        member.starts = starts;
        member.ends = ends;
        member.key = call_.offset(call_.args.key, sequence.batch);
        member.value = call_.offset(call_.args.value, sequence.batch);
        const Interval seen = call_.interval(sequence, 0, sequence.q_len - 1);
        member.begin = seen.begin;
        member.end = seen.end;
        member.first_split = member.begin / kSplitKeys;
        member.last_split =
            std::max((member.end + kSplitKeys - 1) / kSplitKeys - 1, member.first_split);
        return member;
    }

    // The members that have this split, neighbours those who may attend to it together.
    std::vector<int> members_of(const Slice& slice, int64_t split) const {
        std::vector<int> order;
        for (size_t i = 0; i < slice.members.size(); ++i) {
            const Member& member = slice.members[i];
            if (member.first_split <= split && split <= member.last_split) order.push_back(int(i));
        }
        const auto before = [&](int a, int b) {
            return compare(slice.members[size_t(a)], slice.members[size_t(b)], split) < 0;
        };
        // Most often they are in order: each has keys of its own.
        if (!std::is_sorted(order.begin(), order.end(), before)) {
            std::stable_sort(order.begin(), order.end(), before);
        }
        return order;
    }

    // The task of as many members as may attend together, from a position on.
    Task first_task(const Slice& slice, const Position& at, int share) const {
        const auto member = [&](size_t i) -> const Member& {
            return slice.members[size_t(at.order[i])];
        };
        const Interval all = {at.split * kSplitKeys, (at.split + 1) * kSplitKeys};
        const int64_t most_rows = slice.most_together[in_query_tiles(member(at.place))];
        const int64_t most = members_of_task(slice.items, slice.team);
        Task task{at.split, at.place, share, 0, 0, 0, 0};
        Interval keys = {all.end, all.begin};
        double pairs = 0;
        for (size_t i = at.place; i < at.order.size(); ++i, ++task.count) {
            if (i > at.place) {
                if (task.count == most || task.rows + member(i).rows > most_rows) break;
                if (!together(member(i - 1), member(i), at.split)) break;
            }
            const int64_t begin = std::clamp(member(i).begin, all.begin, all.end);
            const int64_t end = std::clamp(member(i).end, begin, all.end);
            keys = {std::min(keys.begin, begin), std::max(keys.end, end)};
            pairs += double(member(i).rows * (end - begin));
            task.rows += member(i).rows;
        }
        task.seconds = costs_.attend(double(keys.end - keys.begin), pairs);
        return task;
    }

    // Whether neighbours in a split's order share keys there. Query tiles have the pages of one
    // row; without them, one page that both see is enough.
    bool together(const Member& a, const Member& b, int64_t split) const {
        if (call_.args.pages == nullptr || in_query_tiles(a)) return compare(a, b, split) == 0;
        if (place(a) != place(b)) return false;
        const Interval columns = columns_of(std::max({a.begin, b.begin, split * kSplitKeys}),
                                            std::min({a.end, b.end, (split + 1) * kSplitKeys}));
        for (int64_t column = columns.begin; column < columns.end; ++column) {
            if (page(a, column) == page(b, column)) return true;
        }
        return false;
    }

    // 0: both have the same keys, and as many queries. Sorting by it makes neighbours of sequences
    // whose first pages are the same, and lets the first part of a sequence come before the other.
    int64_t compare(const Member& a, const Member& b, int64_t split) const {
        const auto mine = place(a), other = place(b);
        if (mine != other) return mine < other ? -1 : 1;
        if (call_.args.pages == nullptr) return 0;
        const Interval columns = columns_of(split * kSplitKeys, (split + 1) * kSplitKeys);
        for (int64_t column = columns.begin; column < columns.end; ++column) {
            const int64_t x = page(a, column), y = page(b, column);
            if (x != y) return x < y ? -1 : 1;
        }
        if (a.ends != b.ends) return a.ends ? 1 : -1;
        return a.sequence.shift - b.sequence.shift;
    }

    using Placed = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
    static Placed place(const Member& member) {
        const Sequence& s = member.sequence;
        return {s.q_len, s.kv_start, s.kv_len, s.key_offset, member.key, member.value};
    }

    // The columns of the page table that hold these keys.
    Interval columns_of(int64_t begin, int64_t end) const {
        const int64_t keys = call_.args.page_keys;
        return {begin / keys, std::min((end + keys - 1) / keys, call_.args.page_columns)};
    }

    int64_t page(const Member& member, int64_t column) const {
        return call_.args.pages[member.sequence.batch * call_.args.page_columns + column];
    }

    static void add_links(const Slice& slice, const Task& task, Wave& wave) {
        int64_t row = 0;
        for (int share = task.first; share < task.first + task.count; ++share) {
            const int index = wave.shares[size_t(share)].member;
            const Member& member = slice.members[size_t(index)];
            if (!member.one_split()) {
                wave.links.push_back({index, share, task.split, task.waiting, row});
            }
            row += member.rows;
        }
    }

    // Whether no link comes before this one, or in an earlier wave.
    static bool is_first(const Slice& slice, const Wave& wave, size_t link) {
        return link == 0 ||
               carried(slice, wave.links[link - 1]) != carried(slice, wave.links[link]);
    }

    Block block(const Slice& slice, const Member& member, int64_t head, Row* rows) const {
        Block block = call_.shared_block();
        call_.set_keys(block, member.sequence, slice.first_head + head);
        block.in_span = true;
        block.rows = rows;
        block.row_count = int(member.rows);
        return block;
    }
    void set_rows(const Slice& slice, const Member& member, int64_t head, Row* rows) const {
        call_.set_rows(rows, int(member.rows), member.sequence, slice.first_head + head,
                       member.first_row);
    }

    char* waiting(const Work& work, size_t place, int64_t head) const {
        return work.waiting + work.wave.waiting.offset(head, place, partial_bytes_);
    }

    // memory: scratch_bytes() of the item. next: what the thread comes to afterwards; its task may
    // be null.
    void attend(const Work& work, const Item& item, const Item& next, char* memory,
                const Stop& stop) const {
        const Slice& slice = work.slice;
        const Task& task = *item.task;
        const int64_t head = item.head;
        const Share* const shares = work.wave.shares.data() + task.first;
        const auto member = [&](int i) -> const Member& {
            return slice.members[size_t(shares[i].member)];
        };
        const bool in_tiles = in_query_tiles(member(0));
        Block whole = block(slice, member(0), head, nullptr);
        whole.row_count = int(task.rows);
        Scratch scratch(memory);
        const BlockMemory mine(task.rows, kernel_bytes(whole, in_tiles), scratch);
        char* const partials = waiting(work, task.waiting, head);
        lend(partials, task.rows * int64_t(partial_bytes_));
        Row* rows = mine.rows;
        for (int i = 0; i < task.count; rows += member(i++).rows) {
            set_rows(slice, member(i), head, rows);
        }
        const int64_t begin = task.split * kSplitKeys, end = begin + kSplitKeys;
        for (Row* row = mine.rows; row < rows; ++row) {
            row->begin = std::clamp(row->begin, begin, end);
            row->end = std::clamp(row->end, row->begin, end);
        }
        whole.rows = mine.rows;
        whole.scratch = mine.kernel;
        whole.stop = stop;
        if (next.task != nullptr && !in_tiles) set_next_keys(work, next, whole);
        (in_tiles ? functions_.attend : functions_.decode.attend)(whole, partials);
        char* partial = partials;
        rows = mine.rows;
        for (int i = 0; i < task.count; ++i) {
            if (shares[i].link < 0) {
                functions_.decode.finish(block(slice, member(i), head, rows), partial);
            }
            rows += member(i).rows;
            partial += size_t(member(i).rows) * partial_bytes_;
        }
    }

    void set_next_keys(const Work& work, const Item& next, Block& whole) const {
        if (call_.args.pages != nullptr) return;
        const int index = work.wave.shares[size_t(next.task->first)].member;
        const Member& member = work.slice.members[size_t(index)];
        const int64_t first = std::max(next.task->split * kSplitKeys, member.begin);
        if (first >= member.end) return;
        const KeyRows key = block(work.slice, member, next.head, nullptr).key;
        whole.next_key = static_cast<const char*>(key.data) +
                         first * key.stride * int64_t(size_of(call_.args.key.dtype));
        whole.next_keys = member.end - first;
    }

    // Merges what a task has given, as far as it can be. memory: scratch_bytes() of it.
    void merge_all_of(const Work& work, const Task& task, int64_t head, char* memory) const {
        for (int i = task.first; i < task.first + task.count; ++i) {
            const int link = work.wave.shares[size_t(i)].link;
            if (link >= 0) merge(work, size_t(link), head, memory);
        }
    }

    // Merges a partial that is there now, if those before it are merged, and then those behind it
    // that only waited for this.
    void merge(const Work& work, size_t link, int64_t head, char* memory) const {
        const auto& links = work.wave.links;
        const auto ready = [&] {
            std::atomic<char>& missing =
                work.missing[link * size_t(work.slice.heads) + size_t(head)];
            return missing.fetch_sub(1, std::memory_order_acq_rel) == 1;
        };
        while (ready()) {
            add(work, links[link], head, memory);
            if (++link == links.size() || is_first(work.slice, work.wave, link)) return;
        }
    }

    // Adds a partial to what is carried. memory: scratch_bytes() of it.
    void add(const Work& work, const Link& link, int64_t head, char* memory) const {
        const Slice& slice = work.slice;
        const Member& member = slice.members[size_t(link.member)];
        const size_t bytes = size_t(member.rows) * partial_bytes_;
        char* const into =
            work.carried + slice.carried.offset(head, member.carried, partial_bytes_);
        char* const partial =
            waiting(work, link.waiting, head) + size_t(link.first_row) * partial_bytes_;
        Row* const rows = Scratch(memory).take<Row>(member.rows);
        const Block own = block(slice, member, head, rows);
        if (member.starts && link.split == member.first_split) {
            lend(into, int64_t(bytes));
            std::memcpy(into, partial, bytes);
        } else {
            functions_.decode.merge(own, into, partial);
        }
        if (!member.ends || link.split < member.last_split) return;
        set_rows(slice, member, head, rows);
        functions_.decode.finish(own, into);
    }

    const Call& call_;
    const Functions& functions_;
    const size_t partial_bytes_;  // of a row of one head
    const DecodeCosts costs_;
    int64_t heads_;  // of a slice, at most
};

// Whether there is anything to compute and to store.
bool has_results(const AttentionArgs& args) {
    return args.q_heads > 0 && args.q_len > 0 &&
           (args.value_head_dim > 0 || args.lse.data != nullptr || args.softmax != nullptr ||
            args.scores != nullptr);
}

}  // namespace

bool decode(const Call& call, Interrupt interrupt) {
    if (!has_results(call.args)) return true;
    const Decode decode(call);
    Patience patience(interrupt);
    return decode.each_slice([&](const Slice& slice) {
        if (slice.members.empty()) return !patience.ended();
        const Memory carried = allocate(decode.carried_bytes(slice));
        return decode.each_wave(slice, [&](const Wave& wave) {
            return !patience.ended() && decode.run(slice, wave, carried.get(), interrupt);
        });
    });
}

void plan_decode(const Call& call, Plan& plan) {
    plan.decodes = true;
    if (!has_results(call.args)) return;
    const Decode decode(call);
    int slices = 0;
    plan.threads = 1, plan.scratch_bytes = 0;
    decode.each_slice([&](const Slice& slice) {
        plan.threads = std::max(plan.threads, slice.team);
        int waves = 0;
        decode.each_wave(slice, [&](const Wave& wave) {
            plan.scratch_bytes = std::max(plan.scratch_bytes,
                                          decode.carried_bytes(slice) + decode.bytes(slice, wave));
            return ++waves < kMostLooks;
        });
        return ++slices < kMostLooks;
    });
}

void schedule_decode(const Call& call, Schedule& schedule) {
    if (!has_results(call.args)) return;
    const Decode decode(call);
    decode.each_slice([&](const Slice& slice) {
        return decode.each_wave(slice, [&](const Wave& wave) {
            decode.add_phases(slice, wave, schedule);
            schedule.scratch_bytes = std::max(
                schedule.scratch_bytes, decode.carried_bytes(slice) + decode.bytes(slice, wave));
            return true;
        });
    });
}

}  // namespace fastattn
