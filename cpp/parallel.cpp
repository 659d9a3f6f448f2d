// SPDX-License-Identifier: Apache-2.0
//
// parallel_for over OpenMP. libgomp ties a pool of threads to the thread that enters a parallel
// region and hangs in a forked child that enters one on a thread whose pool stayed in the parent.
// So no caller ever enters a region: an owner thread does, made when first needed, and made anew
// after a fork. The caller waits meanwhile, and looks every 50 ms whether the user wants to stop.
// libgomp also ends the process that cannot have another thread: the owner tries that out before.
#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::milliseconds(50);  // between two looks at Ctrl-C
constexpr auto kRetry = std::chrono::seconds(1);           // after threads could not be had
constexpr double kTeamSeconds = 10e-6;                     // what waking a team costs
// Whatever the usual size is: libgomp puts some 200 bytes there for every thread that it makes.
constexpr size_t kOwnerStack = 2 << 20;

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

struct Job {
    int64_t items;
    int threads;  // that work; the team may have more, but no more than most_threads
    int most_threads;
    const Body* body;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};
    bool done = false;
};

bool job_stopped(void* job) {
    return static_cast<Job*>(job)->stopped.load(std::memory_order_relaxed);
}

void work(Job& job, int worker) {
    if (worker >= job.threads) return;
    const DefaultModes modes;
    const Stop stop{job_stopped, &job};
    for (;;) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items || job_stopped(&job)) return;
        (*job.body)(item, worker, stop);
    }
}

// stack: in bytes, 0 for the usual size. False: the thread could not be made.
bool make_thread(pthread_t& thread, size_t stack, void* (*run)(void*), void* argument) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    if (stack > 0) pthread_attr_setstacksize(&attributes, stack);
    const bool made = pthread_create(&thread, &attributes, run, argument) == 0;
    pthread_attr_destroy(&attributes);
    return made;
}

// The stack size that libgomp takes from the environment for its threads; 0: the usual one.
size_t openmp_stack() {
    const char* text = std::getenv("OMP_STACKSIZE");
    if (text == nullptr) text = std::getenv("GOMP_STACKSIZE");
    size_t number = 0;
    char unit = 'K';
    if (text == nullptr || std::sscanf(text, "%zu %c", &number, &unit) < 1) return 0;
    switch (std::toupper(static_cast<unsigned char>(unit))) {
        case 'B':
            return number;
        case 'M':
            return number << 20;
        case 'G':
            return number << 30;
        default:
            return number << 10;
    }
}

struct Probe {
    std::mutex* gate;
    pthread_t handle;
    pid_t id;
};

void* wait_at_gate(void* argument) {
    Probe& probe = *static_cast<Probe*>(argument);
    probe.id = pid_t(syscall(SYS_gettid));
    const std::lock_guard<std::mutex> lock(*probe.gate);
    return nullptr;
}

// How many of so many more threads like libgomp's the process can have, beside what memory libgomp
// then needs. They are made, exist all at once, and are gone from the kernel's count in the end.
int try_threads(int wanted) {
    const std::unique_ptr<char[]> records(new (std::nothrow) char[(64 + size_t(wanted)) << 10]);
    const std::unique_ptr<Probe[]> probes(new (std::nothrow) Probe[size_t(wanted)]);
    if (records == nullptr || probes == nullptr) return 0;
    std::mutex gate;
    gate.lock();
    const size_t stack = openmp_stack();
    int made = 0;
    for (; made < wanted; ++made) {
        Probe& probe = probes[size_t(made)];
        probe.gate = &gate;
        if (!make_thread(probe.handle, stack, wait_at_gate, &probe)) break;
    }
    gate.unlock();
    const pid_t process = getpid();
    for (int i = 0; i < made; ++i) {
        const Probe& probe = probes[size_t(i)];
        pthread_join(probe.handle, nullptr);
        while (syscall(SYS_tgkill, process, probe.id, 0) == 0) sched_yield();
    }
    return made;
}

// The thread that enters parallel regions. Never destroyed: it may outlive main().
class Owner {
   public:
    Owner() : pid_(getpid()) {}

    bool is_of_this_process() const { return pid_ == getpid(); }

    // One call at a time; a caller that finds the owner busy does its work itself.
    std::mutex& busy() { return busy_; }

    // False: no thread could be made, or a signal handler has forked and this is the child.
    bool run(Job& job, Interrupt interrupt) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!started_) {
            pthread_t thread;
            if (!make_thread(thread, kOwnerStack, serve_jobs, this)) return false;
            pthread_detach(thread);
            started_ = true;
        }
        job_ = &job;
        wake_.notify_one();
        while (!done_.wait_for(lock, kPatience, [&] { return job.done; })) {
            if (interrupt.requested == nullptr || job.stopped) continue;
            lock.unlock();
            if (interrupt.requested()) job.stopped = true;
            if (!is_of_this_process()) return false;
            lock.lock();
        }
        return true;
    }

   private:
    static void* serve_jobs(void* owner) { static_cast<Owner*>(owner)->serve(); }

    [[noreturn]] void serve() {
        omp_set_dynamic(0);  // the team is as large as it is said to be
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return job_ != nullptr; });
            Job& job = *job_;
            job_ = nullptr;
            lock.unlock();
            resize(job);
            if (team_ == 1) {
                work(job, 0);
            } else {
#pragma omp parallel num_threads(team_)
                work(job, omp_get_thread_num());
            }
            lock.lock();
            job.done = true;
            done_.notify_one();
        }
    }

    // Sets team_ for the job, to fewer threads than it asks for if they cannot be had. A team stays
    // as it is for a job of fewer threads: libgomp would end the others and soon make them again.
    void resize(const Job& job) {
        if (team_ > job.most_threads) team_ = job.threads;
        if (team_ >= job.threads || Clock::now() < retry_) return;
        const int missing = job.threads - team_;
        const int had = try_threads(missing + 1) - 1;  // one to spare
        team_ += std::max(had, 0);
        if (had < missing) retry_ = Clock::now() + kRetry;
    }

    const pid_t pid_;
    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    bool started_ = false;
    int team_ = 1;  // the owner, and the threads that libgomp keeps for it
    Clock::time_point retry_{};
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

// CPUs that the control groups' quota is worth, rounded up; 0: no quota.
int quota() {
    const char* forced = std::getenv("FASTATTN_CGROUP_ROOT");
    const std::string root = forced != nullptr ? forced : "/sys/fs/cgroup";
    double cpus = std::numeric_limits<double>::infinity();
    const auto limit_to = [&](double limit, double period) {
        if (limit > 0 && period > 0) cpus = std::min(cpus, limit / period);
    };
    // Version 2: this process's group and those around it.
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

// A positive whole number, or 0.
int number_in(const char* variable) {
    const char* text = std::getenv(variable);
    if (text == nullptr) return 0;
    char* rest = nullptr;
    const long number = std::strtol(text, &rest, 10);
    const bool whole = rest != text && (*rest == '\0' || *rest == ',');  // OMP_NUM_THREADS=4,2
    return whole && number > 0 && number <= kMostThreads ? int(number) : 0;
}

// OpenMP is asked for the affinity: with OMP_PROC_BIND it has bound the calling thread to one CPU.
int usable_cpus() {
    static const int limit = quota();
    const int cpus = omp_get_num_procs();
    return limit > 0 ? std::min(cpus, limit) : cpus;
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
            const int most = get_num_threads();
            Job job{items, std::min(threads, most), most, &body};
            if (the_owner.run(job, interrupt) || job.stopped) return !job.stopped;
        }
    }
    return run_serially(items, interrupt, body);
}

}  // namespace fastattn
