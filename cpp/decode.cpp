// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call that decodes, that is, with few queries. Here the keys are cut,
// into splits of fixed length, so that one head keeps every core busy. A split gives a partial for
// each row, and a row's partials are merged in order. Sequences that hold some of the same keys in
// a split, be it in an array that is broadcast or in the same pages, are attended together: these
// keys are read once. Called by attention.cpp; calls the kernel's table (kernel/kernel.h) through
// parallel_for.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "split.h"

namespace fastattn {
namespace {

constexpr int64_t kItemsPerThread = 2;     // that sharing leaves, so that all threads have work
constexpr size_t kCarriedBytes = 2 << 20;  // of what is merged so far
constexpr size_t kWaitingBytes = 4 << 20;  // of partials that are not merged yet
constexpr int64_t kMostTasks = 1 << 16;    // in a list

// Places for partials in memory, one after the other. Each holds some rows; each head has the same.
class Places {
    std::vector<size_t> first_rows_;  // of each place, among the rows of a head
    size_t rows_ = 0;                 // of a head

   public:
    void add(size_t rows) {
        first_rows_.push_back(rows_);
        rows_ += rows;
    }
    void widen_last(size_t rows) { rows_ += rows; }

    size_t count() const { return first_rows_.size(); }
    size_t rows() const { return rows_; }
    size_t bytes(size_t heads, size_t row_bytes) const {
        return heads * (rows_ * row_bytes + first_rows_.size() * kRedZone);
    }
    size_t offset(size_t head, size_t place, size_t row_bytes) const {
        return bytes(head, row_bytes) + first_rows_[place] * row_bytes + place * kRedZone;
    }
};

// A sequence that is decoded, or a part of one.
struct Member {
    Sequence sequence;
    size_t carried;                   // whose place in Slice::carried: that of both parts
    bool starts, ends;                // whether no part comes before it, behind it
    int64_t begin, end;               // the keys that some of its rows see
    int64_t first_split, last_split;  // that hold them; one at least
    bool one_split() const { return starts && ends && first_split == last_split; }
};

// Members that attend to a split together; for each head.
struct Task {
    int64_t split;
    int first, count;  // in Tasks::order
};

// The sequences that are worked on at a time.
struct Slice {
    std::vector<Member> members;
    Places carried;       // of each sequence
    bool merges = false;  // some sequence has more than one split
    int64_t first_split = INT64_MAX, last_split = 0;
    int64_t splits = 0;  // of all members together
    double seconds = 0;
    int team = 1;
};

// The tasks of some splits.
struct Tasks {
    std::vector<int> order;  // of members
    Places waiting;          // of each task
    std::vector<Task> list;
    int64_t most_rows = 0, most_rows_in_tiles = 0;  // of a task, without and with query tiles
};

class Decode {
   public:
    explicit Decode(const Call& call)
        : call_(call),
          functions_(call.functions),
          partial_bytes_(functions_.decode.partial_bytes(call.shared_block())) {}

    // The sequences that are decoded, from batch element `next` on, as many as fit a slice.
    Slice take(int64_t& next) const {
        Slice slice;
        for (; next < call_.batches; ++next) {
            const Sequence sequence = call_.sequence(next);
            if (sequence.q_len == 0 || !call_.decodes(sequence.q_len)) continue;
            const size_t more = size_t(sequence.q_len * call_.group);
            const bool fits =
                (slice.carried.rows() + more) * heads() * partial_bytes_ <= kCarriedBytes;
            if (!slice.members.empty() && !fits) break;
            const bool parts = call_.has_first_part(next);
            if (parts) add_member(slice, call_.first_part(next), true, false);
            add_member(slice, sequence, !parts, true);
            slice.carried.add(more);
        }
        slice.team = team_size(slice.splits * call_.args.kv_heads, slice.seconds, call_.threads);
        return slice;
    }

    // The tasks of the splits from `next` on, as many as fit a list.
    Tasks tasks(const Slice& slice, int64_t& next) const {
        Tasks tasks;
        for (; next <= slice.last_split; ++next) {
            if (int64_t(tasks.order.size() + slice.members.size()) > kMostTasks &&
                !tasks.order.empty()) {
                break;
            }
            add_tasks(slice, next, tasks);
        }
        for (const Task& task : tasks.list) {
            const Member& member = slice.members[size_t(tasks.order[size_t(task.first)])];
            int64_t& most = in_query_tiles(member) ? tasks.most_rows_in_tiles : tasks.most_rows;
            most = std::max(most, task.count * int64_t(rows(member)));
        }
        return tasks;
    }

    // One thread's memory, for any of the tasks.
    size_t scratch_bytes(const Tasks& tasks) const {
        return std::max(scratch_bytes(tasks.most_rows, false),
                        scratch_bytes(tasks.most_rows_in_tiles, true));
    }

    size_t carried_bytes(const Slice& slice) const {
        return slice.carried.bytes(heads(), partial_bytes_);
    }
    size_t waiting_bytes(const Tasks& tasks) const {
        return std::min(kWaitingBytes, tasks.waiting.bytes(heads(), partial_bytes_)) + kRedZone +
               size_t(std::max(tasks.most_rows, tasks.most_rows_in_tiles)) * partial_bytes_;
    }

    bool run(const Slice& slice, Interrupt interrupt) const {
        const Memory carried = allocate(carried_bytes(slice));
        for (int64_t next = slice.first_split; next <= slice.last_split;) {
            if (!run(slice, tasks(slice, next), carried.get(), interrupt)) return false;
        }
        return true;
    }

   private:
    // In waves: no more partials may wait to be merged than there is memory for.
    bool run(const Slice& slice, const Tasks& tasks, char* carried, Interrupt interrupt) const {
        const int64_t count = int64_t(tasks.list.size()), all = count * call_.args.kv_heads;
        const int team = slice.team;
        const size_t scratch = scratch_bytes(tasks);
        const auto waiting = [&](int64_t item) {
            return tasks.waiting.offset(size_t(item / count), size_t(item % count), partial_bytes_);
        };
        const size_t waiting_size = waiting_bytes(tasks);
        const Memory memory = allocate(scratch * size_t(team) + waiting_size);
        char* const partials = memory.get() + scratch * size_t(team);

        for (int64_t first = 0, last = 0; first < all; first = last) {
            const size_t before = waiting(first);
            while (last < all && waiting(last) - before < kWaitingBytes) ++last;
            const auto attend = [&](int64_t index, int worker, const Stop& stop) {
                const int64_t item = first + index;
                char* const mine = memory.get() + size_t(worker) * scratch;
                attend_task(slice, tasks, item, mine, partials + (waiting(item) - before), stop);
                take_back(mine, scratch);
            };
            const auto merge = [&](int64_t, int, const Stop&) {
                for (int64_t item = first; item < last; ++item) {
                    merge_task(slice, tasks, item, partials + (waiting(item) - before), carried,
                               memory.get());
                }
                take_back(memory.get(), scratch);
            };
            take_back(partials, waiting_size);
            if (team == 1) {  // a small call: one trip
                const auto both = [&](int64_t, int, const Stop& stop) {
                    for (int64_t index = 0; index < last - first; ++index) attend(index, 0, stop);
                    merge(0, 0, stop);
                };
                if (!parallel_for(1, 1, interrupt, both)) return false;
            } else {
                if (!parallel_for(last - first, team, interrupt, attend)) return false;
                if (slice.merges) parallel_for(1, 1, {}, merge);
            }
        }
        return true;
    }

    size_t heads() const { return size_t(call_.args.kv_heads); }
    size_t rows(const Member& member) const { return size_t(member.sequence.q_len * call_.group); }

    // The rows, not head_dim, lie along the vector lanes.
    bool in_query_tiles(const Member& member) const {
        return int64_t(rows(member)) > functions_.decode.most_rows;
    }

    size_t kernel_bytes(const Block& block, bool in_tiles) const {
        return (in_tiles ? functions_.scratch_bytes : functions_.decode.scratch_bytes)(block);
    }
    size_t scratch_bytes(int64_t row_count, bool in_tiles) const {
        if (row_count == 0) return 0;
        Block block = call_.shared_block();
        block.row_count = int(row_count);
        Scratch scratch;
        BlockMemory(row_count, kernel_bytes(block, in_tiles), scratch);
        return scratch.used();
    }

    void add_member(Slice& slice, const Sequence& sequence, bool starts, bool ends) const {
        Member member{sequence, slice.carried.count(), starts, ends, 0, 0, 0, 0};
        find_splits(member);
        slice.first_split = std::min(slice.first_split, member.first_split);
        slice.last_split = std::max(slice.last_split, member.last_split);
        slice.splits += member.last_split - member.first_split + 1;
        slice.merges |= !member.one_split();
        slice.seconds += call_.seconds(sequence);
        slice.members.push_back(member);
    }

    // Positions grow with the queries, and so do both ends of what they see.
    void find_splits(Member& member) const {
        const Sequence& sequence = member.sequence;
        member.end = call_.interval(sequence, sequence.q_len - 1).end;
        member.begin = std::min(call_.interval(sequence, 0).begin, member.end);
        member.first_split = member.begin / kSplitKeys;
        member.last_split =
            std::max((member.end + kSplitKeys - 1) / kSplitKeys - 1, member.first_split);
    }

    void add_tasks(const Slice& slice, int64_t split, Tasks& tasks) const {
        std::vector<int>& order = tasks.order;
        const size_t begin = order.size();
        for (size_t i = 0; i < slice.members.size(); ++i) {
            const Member& member = slice.members[i];
            if (member.first_split <= split && split <= member.last_split) {
                order.push_back(int(i));
            }
        }
        const auto member = [&](size_t place) -> const Member& {
            return slice.members[size_t(order[place])];
        };
        if (order.size() - begin > 1) {
            std::stable_sort(order.begin() + int64_t(begin), order.end(), [&](int a, int b) {
                return compare(slice.members[size_t(a)], slice.members[size_t(b)], split) < 0;
            });
        }
        const int64_t items = slice.splits * call_.args.kv_heads;
        const int64_t most_members = items / (slice.team * kItemsPerThread);
        for (size_t i = begin; i < order.size(); ++i) {
            if (i > begin && together(member(i - 1), member(i), split)) {
                Task& before = tasks.list.back();
                const int64_t count = before.count + 1;
                if (count * int64_t(rows(member(i))) <= kMostTogether && count <= most_members) {
                    ++before.count;
                    tasks.waiting.widen_last(rows(member(i)));
                    continue;
                }
            }
            tasks.list.push_back({split, int(i), 1});
            tasks.waiting.add(rows(member(i)));
        }
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

    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> place(const Member& member) const {
        const Sequence& s = member.sequence;
        return {s.q_len, s.kv_start, s.kv_len, call_.offset(call_.args.key, s.batch),
                call_.offset(call_.args.value, s.batch)};
    }

    // The columns of the page table that hold these keys.
    Interval columns_of(int64_t begin, int64_t end) const {
        const int64_t keys = call_.args.page_keys;
        return {begin / keys, std::min((end + keys - 1) / keys, call_.args.page_columns)};
    }

    int64_t page(const Member& member, int64_t column) const {
        return call_.args.pages[member.sequence.batch * call_.args.page_columns + column];
    }

    Block block(const Member& member, int64_t kv_head, Row* rows_here, int64_t count) const {
        Block block = call_.shared_block();
        call_.set_keys(block, member.sequence, kv_head);
        block.rows = rows_here;
        block.row_count = int(count);
        return block;
    }

    // memory: scratch_bytes() of it; partials: where those of the task's rows go.
    void attend_task(const Slice& slice, const Tasks& tasks, int64_t item, char* memory,
                     char* partials, const Stop& stop) const {
        const int64_t kv_head = item / int64_t(tasks.list.size());
        const Task& task = tasks.list[size_t(item) % tasks.list.size()];
        const auto member = [&](int i) -> const Member& {
            return slice.members[size_t(tasks.order[size_t(task.first + i)])];
        };
        const bool in_tiles = in_query_tiles(member(0));
        const int64_t each = int64_t(rows(member(0))), count = each * task.count;
        Block whole = block(member(0), kv_head, nullptr, count);
        Scratch scratch(memory);
        const BlockMemory mine(count, kernel_bytes(whole, in_tiles), scratch);
        lend(partials, count * int64_t(partial_bytes_));
        for (int i = 0; i < task.count; ++i) {
            call_.set_rows(mine.rows + i * each, int(each), member(i).sequence, kv_head, 0);
        }
        const int64_t begin = task.split * kSplitKeys, end = begin + kSplitKeys;
        for (Row* row = mine.rows; row < mine.rows + count; ++row) {
            row->begin = std::clamp(row->begin, begin, end);
            row->end = std::clamp(row->end, row->begin, end);
        }
        whole.rows = mine.rows;
        whole.scratch = mine.kernel;
        whole.stop = stop;
        (in_tiles ? functions_.attend : functions_.decode.attend)(whole, partials);
        for (int i = 0; i < task.count; ++i) {
            if (!member(i).one_split()) continue;
            const Block own = block(member(i), kv_head, mine.rows + i * each, each);
            functions_.decode.finish(own, partials + size_t(i * each) * partial_bytes_);
        }
    }

    // Adds the partials of a task to what is carried. memory: scratch_bytes() of it.
    void merge_task(const Slice& slice, const Tasks& tasks, int64_t item, char* partials,
                    char* carried, char* memory) const {
        const size_t kv_head = size_t(item) / tasks.list.size();
        const Task& task = tasks.list[size_t(item) % tasks.list.size()];
        for (int i = task.first; i < task.first + task.count; ++i) {
            const Member& member = slice.members[size_t(tasks.order[size_t(i)])];
            const size_t bytes = rows(member) * partial_bytes_;
            char* const into =
                carried + slice.carried.offset(kv_head, member.carried, partial_bytes_);
            char* const partial = partials + size_t(i - task.first) * bytes;
            if (member.one_split()) continue;
            Row* const rows_here = Scratch(memory).take<Row>(int64_t(rows(member)));
            const Block own = block(member, int64_t(kv_head), rows_here, int64_t(rows(member)));
            if (member.starts && task.split == member.first_split) {
                lend(into, int64_t(bytes));
                std::memcpy(into, partial, bytes);
            } else {
                functions_.decode.merge(own, into, partial);
            }
            if (!member.ends || task.split < member.last_split) continue;
            call_.set_rows(rows_here, own.row_count, member.sequence, int64_t(kv_head), 0);
            functions_.decode.finish(own, into);
        }
    }

    const Call& call_;
    const Functions& functions_;
    const size_t partial_bytes_;  // of a row of one head
};

}  // namespace

bool decode(const Call& call, Interrupt interrupt) {
    if (call.args.q_heads == 0) return true;
    const Decode decode(call);
    for (int64_t next = 0; next < call.batches;) {
        const Slice slice = decode.take(next);
        if (!slice.members.empty() && !decode.run(slice, interrupt)) return false;
    }
    return true;
}

void plan_decode(const Call& call, Plan& plan) {
    plan.decodes = true;
    if (call.args.q_heads == 0) return;
    const Decode decode(call);
    int64_t batch = 0;
    const Slice slice = decode.take(batch);
    if (slice.members.empty()) return;
    int64_t split = slice.first_split;
    plan.threads = slice.team;
    const Tasks tasks = decode.tasks(slice, split);
    plan.scratch_bytes = decode.scratch_bytes(tasks) * size_t(plan.threads) +
                         decode.carried_bytes(slice) + decode.waiting_bytes(tasks);
}

void schedule_decode(const Call& call, Schedule& schedule) {
    Plan plan;
    plan_decode(call, plan);
    schedule.phases.push_back({plan.threads, {{{call.seconds()}}}});
}

}  // namespace fastattn
