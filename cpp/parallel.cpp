// SPDX-License-Identifier: Apache-2.0
//
// parallel_for over OpenMP. libgomp ties a pool of threads to the thread that enters a parallel
// region and hangs in a forked child that enters one on a thread whose pool stayed in the parent.
// So no caller ever enters a region: an owner thread does, made when first needed, and made anew
// after a fork. The caller waits meanwhile, and looks every 50 ms whether the user wants to stop.
#include "parallel.h"

#include <omp.h>
#include <sched.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::milliseconds(50);  // between two looks at Ctrl-C
constexpr double kTeamSeconds = 10e-6;                     // what waking a team costs
constexpr int kSpareThreads = 2;  // not asked of a system that is short of them

struct Job {
    int64_t items;
    int threads;
    const Body* body;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};
    bool done = false;
};

bool job_stopped(void* job) {
    return static_cast<Job*>(job)->stopped.load(std::memory_order_relaxed);
}

// The default floating-point modes, while it lives. A result does not depend on those of the
// caller, or of the thread that made this one: subnormal numbers flushed to zero, say.
class DefaultModes {
#if defined(__SSE__)
   public:
    DefaultModes() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1f80); }
    ~DefaultModes() { __builtin_ia32_ldmxcsr(saved_); }

   private:
    unsigned saved_;
#else
   public:
    DefaultModes() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultModes() { std::fesetenv(&saved_); }

   private:
    std::fenv_t saved_;
#endif
};

void work(Job& job, int worker) {
    const DefaultModes modes;
    const Stop stop{job_stopped, &job};
    for (;;) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items || job_stopped(&job)) return;
        (*job.body)(item, worker, stop);
    }
}

// The thread that enters parallel regions. Never destroyed: it may outlive main().
class Owner {
   public:
    Owner() : pid_(getpid()) {}

    bool is_of_this_process() const { return pid_ == getpid(); }

    // One call at a time; a caller that finds the owner busy does its work itself.
    std::mutex& busy() { return busy_; }

    // False: no thread could be made.
    bool run(Job& job, Interrupt interrupt) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!started_) {
            try {
                std::thread(&Owner::serve, this).detach();
            } catch (const std::system_error&) {
                return false;
            }
            started_ = true;
        }
        job_ = &job;
        wake_.notify_one();
        while (!done_.wait_for(lock, kPatience, [&] { return job.done; })) {
            if (interrupt.requested == nullptr) continue;
            lock.unlock();
            if (interrupt.requested()) job.stopped = true;
            lock.lock();
        }
        return true;
    }

   private:
    // libgomp ends the process if it cannot make a thread. So before its pool grows, as many are
    // made here as it will want, and one to spare: their stacks are then at hand. Returns for how
    // many of `threads` that went well.
    int can_be_made(int threads) {
        if (threads > pool_) {
            std::vector<std::thread> trial;
            std::mutex waiting;
            std::unique_lock<std::mutex> all_alive(waiting);
            try {
                trial.reserve(size_t(threads - pool_) + 1);
                while (trial.size() < trial.capacity()) {
                    trial.emplace_back([&] { waiting.lock(), waiting.unlock(); });
                }
            } catch (const std::exception&) {
                threads = std::max(1, pool_ + int(trial.size()) - kSpareThreads);
            }
            all_alive.unlock();
            for (std::thread& thread : trial) thread.join();
        }
        return pool_ = threads;
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return job_ != nullptr; });
            Job& job = *job_;
            job_ = nullptr;
            lock.unlock();
            const int threads = can_be_made(job.threads);
#pragma omp parallel num_threads(threads)
            work(job, omp_get_thread_num());
            lock.lock();
            job.done = true;
            done_.notify_one();
        }
    }

    const pid_t pid_;
    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int pool_ = 1;  // threads of the last team, this one included: libgomp keeps them
    bool started_ = false;
};

std::atomic<Owner*> owner{nullptr};

// After a fork the parent's owner is abandoned, not touched: its mutexes may be locked for ever.
Owner& owner_of_this_process() {
    Owner* current = owner.load(std::memory_order_acquire);
    while (current == nullptr || !current->is_of_this_process()) {
        Owner* const fresh = new Owner;
        if (owner.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
    }
    return *current;
}

// The caller does everything. Ctrl-C: asked from inside the kernel, between two key tiles.
struct Serial {
    Interrupt interrupt;
    Clock::time_point asked = Clock::now();
    bool stopped = false;
};

bool serial_stopped(void* context) {
    Serial& serial = *static_cast<Serial*>(context);
    if (serial.stopped || serial.interrupt.requested == nullptr) return serial.stopped;
    const auto now = Clock::now();
    if (now - serial.asked < kPatience) return false;
    serial.asked = now;
    return serial.stopped = serial.interrupt.requested();
}

bool run_serially(int64_t items, Interrupt interrupt, const Body& body) {
    const DefaultModes modes;
    Serial serial{interrupt};
    const Stop stop{serial_stopped, &serial};
    for (int64_t item = 0; item < items && !serial.stopped; ++item) body(item, 0, stop);
    return !serial.stopped;
}

std::string first_line(const std::string& path) {
    char line[64] = "";
    if (std::FILE* const file = std::fopen(path.c_str(), "r")) {
        if (std::fgets(line, sizeof line, file) == nullptr) line[0] = '\0';
        std::fclose(file);
    }
    return line;
}

// CPUs that the control group's quota is worth, rounded up; 0: no quota.
int quota() {
    const char* forced = std::getenv("FASTATTN_CGROUP_ROOT");
    const std::string root = forced != nullptr ? forced : "/sys/fs/cgroup";
    double limit = 0, period = 0;
    const std::string v2 = first_line(root + "/cpu.max");  // "max 100000" or "150000 100000"
    if (!v2.empty()) {
        if (std::sscanf(v2.c_str(), "%lf %lf", &limit, &period) != 2) return 0;
    } else {
        limit = std::atof(first_line(root + "/cpu/cpu.cfs_quota_us").c_str());
        period = std::atof(first_line(root + "/cpu/cpu.cfs_period_us").c_str());
    }
    return limit > 0 && period > 0 ? int(std::min(std::ceil(limit / period), 1e6)) : 0;
}

// A positive whole number, or 0.
int number_in(const char* variable) {
    const char* text = std::getenv(variable);
    if (text == nullptr) return 0;
    char* rest = nullptr;
    const long number = std::strtol(text, &rest, 10);
    const bool whole = rest != text && (*rest == '\0' || *rest == ',');  // OMP_NUM_THREADS=4,2
    return whole && number > 0 && number <= kMostThreads ? int(number) : 0;
}

int usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    const bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    const int cpus = known ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
    static const int limit = quota();
    return std::max(1, limit > 0 ? std::min(cpus, limit) : cpus);
}

std::atomic<int> wanted_threads{0};

}  // namespace

void set_num_threads(int threads) { wanted_threads = threads; }

// An explicit wish wins: set_num_threads, FASTATTN_NUM_THREADS, OMP_NUM_THREADS. The OpenMP setting
// is read on the caller's thread, where threadpoolctl and others leave theirs.
int get_num_threads() {
    if (const int wanted = wanted_threads) return wanted;
    static const int ours = number_in("FASTATTN_NUM_THREADS");
    if (ours > 0) return ours;
    static const bool openmp_set = number_in("OMP_NUM_THREADS") > 0;
    const int openmp = std::min(omp_get_max_threads(), kMostThreads);
    return openmp_set ? openmp : std::min(openmp, usable_cpus());
}

int team_size(int64_t items, double seconds) {
    if (items <= 1 || seconds < 2 * kTeamSeconds || omp_in_parallel()) return 1;
    return int(std::min<int64_t>(items, get_num_threads()));
}

bool parallel_for(int64_t items, int threads, Interrupt interrupt, const Body& body) {
    if (threads > 1) {
        Owner& the_owner = owner_of_this_process();
        std::unique_lock<std::mutex> lock(the_owner.busy(), std::try_to_lock);
        if (lock.owns_lock()) {
            Job job{items, threads, &body};
            if (the_owner.run(job, interrupt)) return !job.stopped;
        }
    }
    return run_serially(items, interrupt, body);
}

}  // namespace fastattn
