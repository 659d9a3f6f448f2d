// SPDX-License-Identifier: Apache-2.0
//
// See platform.h. This is Linux.
#include "platform.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

namespace fastattn {
namespace {

std::vector<std::string> lines_of(const std::string& path) {
    char line[4096];
    std::vector<std::string> lines;
    FILE* const file = std::fopen(path.c_str(), "re");
    while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
        lines.emplace_back(line, std::strcspn(line, "\n"));
    }
    if (file != nullptr) std::fclose(file);
    return lines;
}

std::string first_line(const std::string& path) {
    const std::vector<std::string> lines = lines_of(path);
    return lines.empty() ? "" : lines[0];
}

const char* variable_or(const char* variable, const char* otherwise) {
    const char* const text = std::getenv(variable);
    return text != nullptr ? text : otherwise;
}

int first_sibling(int cpu) {
    const std::string root = variable_or("FASTATTN_CPU_ROOT", "/sys/devices/system/cpu");
    const std::string siblings =
        first_line(root + "/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    return siblings.empty() ? -1 : 1 + std::atoi(siblings.c_str());
}

}  // namespace

int process_id() { return getpid(); }

int thread_id() { return int(syscall(SYS_gettid)); }

bool is_main_thread() { return thread_id() == process_id(); }

bool thread_sleeps(int thread) {
    const std::string stat = first_line("/proc/self/task/" + std::to_string(thread) + "/stat");
    const size_t name_end = stat.rfind(") ");
    return name_end != std::string::npos && stat[name_end + 2] == 'S';
}

void sleep_forever() {
    for (;;) pause();
}

void* allocate_aligned(size_t alignment, size_t bytes) {
    return std::aligned_alloc(alignment, bytes);
}

void free_aligned(void* memory) { std::free(memory); }

void prefer_large_pages(void* memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

int CpuSet::count() const {
    int count = 0;
    for (const uint64_t word : words) count += __builtin_popcountll(word);
    return count;
}

void CpuSet::add(int cpu) {
    if (cpu >= 0 && cpu < kMost) words[cpu / 64] |= uint64_t(1) << cpu % 64;
}

void CpuSet::add(const CpuSet& others) {
    for (size_t i = 0; i < std::size(words); ++i) words[i] |= others.words[i];
}

CpuSet CpuSet::without(int cpu) const {
    CpuSet rest = *this;
    if (cpu >= 0 && cpu < kMost) {
        rest.words[cpu / 64] &= ~(uint64_t(1) << cpu % 64);
    }
    return rest;
}

int current_cpu() { return sched_getcpu(); }

CpuSet cpus_of(int thread) {
    CpuSet cpus;
    const bool told = syscall(SYS_sched_getaffinity, thread, sizeof cpus.words, cpus.words) > 0;
    return told ? cpus : CpuSet{};
}

bool run_on(int thread, const CpuSet& cpus) {
    return cpus.count() > 0 &&
           syscall(SYS_sched_setaffinity, thread, sizeof cpus.words, cpus.words) == 0;
}

int cores_of(const CpuSet& cpus) {
    // 1 + the first sibling of a CPU, -1: the system does not tell, 0: it was not asked. No lock is
    // left behind when another thread forks.
    static std::atomic<int> known[CpuSet::kMost];
    CpuSet cores;
    for (int i = 0; i < int(std::size(cpus.words)); ++i) {
        for (uint64_t word = cpus.words[i]; word != 0; word &= word - 1) {
            const int cpu = 64 * i + __builtin_ctzll(word);
            int first = known[cpu].load(std::memory_order_relaxed);
            if (first == 0) known[cpu] = first = first_sibling(cpu);
            if (first < 0) return 0;
            cores.add(first - 1);
        }
    }
    return cores.count();
}

int cpu_quota() {
    const std::string root = variable_or("FASTATTN_CGROUP_ROOT", "/sys/fs/cgroup");
    const std::string process = variable_or("FASTATTN_CGROUP_FILE", "/proc/self/cgroup");
    double cpus = std::numeric_limits<double>::infinity();
    const auto limit_to = [&](double limit, double period) {
        if (limit > 0 && period > 0) cpus = std::min(cpus, limit / period);
    };
    // A group of either version and those around it. In a container, the names may be those
    // outside.
    const auto look = [&](const std::string& hierarchy, std::string group) {
        for (;;) {
            const std::string at = root + hierarchy + group;
            double limit = 0, period = 0;
            const std::string both = first_line(at + "/cpu.max");
            if (std::sscanf(both.c_str(), "%lf %lf", &limit, &period) == 2) limit_to(limit, period);
            limit_to(std::atof(first_line(at + "/cpu.cfs_quota_us").c_str()),
                     std::atof(first_line(at + "/cpu.cfs_period_us").c_str()));
            if (group.empty()) break;
            group.erase(std::min(group.rfind('/'), group.size() - 1));
        }
    };
    look("", "");
    look("/cpu", "");
    for (const std::string& line : lines_of(process)) {  // number:controllers:/group
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const std::string group = line.substr(second + 1);
        if (controllers.empty()) look("", group);
        if (("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
        for (const std::string& hierarchy : {controllers, std::string("cpu")}) {
            look("/" + hierarchy, group);
        }
    }
    return std::isfinite(cpus) ? int(std::min(std::ceil(cpus), 1e6)) : 0;
}

}  // namespace fastattn
