// SPDX-License-Identifier: Apache-2.0
//
// See platform.h. This is Linux.
#include "platform.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

namespace fastattn {
namespace {

// What follows the prefix in the first line of the file that begins with it.
std::string line_after(const std::string& prefix, const std::string& path) {
    char line[4096];
    std::string rest;
    FILE* const file = std::fopen(path.c_str(), "re");
    while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
        if (std::strncmp(line, prefix.c_str(), prefix.size()) != 0) continue;
        rest = line + prefix.size();
        if (rest.ends_with('\n')) rest.pop_back();
        break;
    }
    if (file != nullptr) std::fclose(file);
    return rest;
}

}  // namespace

int process_id() { return getpid(); }

int thread_id() { return int(syscall(SYS_gettid)); }

bool is_main_thread() { return thread_id() == process_id(); }

bool thread_exists(int thread) { return syscall(SYS_tgkill, process_id(), thread, 0) == 0; }

void yield() { sched_yield(); }

void sleep_forever() {
    for (;;) pause();
}

void* allocate_aligned(size_t alignment, size_t bytes) {
    return std::aligned_alloc(alignment, bytes);
}

void free_aligned(void* memory) { std::free(memory); }

void prefer_large_pages(void* memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

int cpu_quota() {
    const char* forced = std::getenv("FASTATTN_CGROUP_ROOT");
    const std::string root = forced != nullptr ? forced : "/sys/fs/cgroup";
    double cpus = std::numeric_limits<double>::infinity();
    const auto limit_to = [&](double limit, double period) {
        if (limit > 0 && period > 0) cpus = std::min(cpus, limit / period);
    };
    // Version 2: this process's control group and those around it.
    std::string group = line_after("0::", "/proc/self/cgroup");
    for (;;) {
        double limit = 0, period = 0;
        const std::string line = line_after("", root + group + "/cpu.max");
        if (std::sscanf(line.c_str(), "%lf %lf", &limit, &period) == 2) limit_to(limit, period);
        if (group.empty()) break;
        group.erase(std::min(group.rfind('/'), group.size() - 1));
    }
    limit_to(std::atof(line_after("", root + "/cpu/cpu.cfs_quota_us").c_str()),
             std::atof(line_after("", root + "/cpu/cpu.cfs_period_us").c_str()));
    return std::isfinite(cpus) ? int(std::min(std::ceil(cpus), 1e6)) : 0;
}

}  // namespace fastattn
