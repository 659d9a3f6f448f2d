// SPDX-License-Identifier: Apache-2.0
//
// parallel_for over OpenMP. libgomp ties a pool of threads to the thread that enters a parallel
// region and hangs in a forked child that enters one on a thread whose pool stayed in the parent.
// So no caller enters a region: an owner thread does, which is made when it is first needed, and
// anew after a fork. The caller is a worker beside that team: it begins at once, while the others
// wake, and looks every 50 ms whether the user wants to stop. libgomp also ends a process that
// cannot have another thread: the owner tries that out before.
//
// Callers whose thread has a pool anyway (use_pool_of_caller) do enter regions, of 50 ms at most,
// and look between two of them. A signal handler that forks then does so outside.
#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "platform.h"

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::milliseconds(50);  // between two looks at Ctrl-C
constexpr auto kSpin =
    std::chrono::microseconds(50);  // before a thread sleeps: waking takes as long
constexpr auto kLongSpin = std::chrono::microseconds(200);  // where more calls follow
constexpr auto kRetry = std::chrono::seconds(1);            // after threads could not be had
// In bytes, whatever the default is: libgomp puts some 200 there for every thread that it makes.
constexpr size_t kOwnerStack = 2 << 20;

struct Job {
    int64_t items;
    int helpers;       // beside the caller
    int most_helpers;  // of the team, which may have more threads than the job
    const Body* body;
    bool more = false;  // calls follow
    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};
    std::atomic<bool> done{false};  // the team has left
};

bool job_stopped(void* job) {
    return static_cast<Job*>(job)->stopped.load(std::memory_order_relaxed);
}

// worker: 0 is the caller. No item is begun after the end.
void work(Job& job, int worker, const Stop& stop,
          Clock::time_point end = Clock::time_point::max()) {
    if (worker > job.helpers) return;
    const DefaultModes modes;
    while (end == Clock::time_point::max() || Clock::now() < end) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items || stop.requested(stop.context)) return;
        (*job.body)(item, worker, stop);
    }
}

// The caller at work. It is asked about Ctrl-C inside the kernel, between two key tiles.
struct Caller {
    Job& job;
    Interrupt interrupt;
    Clock::time_point asked = Clock::now();
    int process = 0;        // that the team belongs to; 0: there is none
    bool in_child = false;  // a signal handler has forked: the team is not here
};

void ask(Caller& caller) {
    if (caller.interrupt.requested == nullptr || job_stopped(&caller.job)) return;
    caller.asked = Clock::now();
    if (caller.interrupt.requested()) caller.job.stopped = true;
    caller.in_child = caller.process != 0 && process_id() != caller.process;
}

bool caller_stopped(void* context) {
    Caller& caller = *static_cast<Caller*>(context);
    if (!caller.in_child && Clock::now() - caller.asked >= kPatience) ask(caller);
    return job_stopped(&caller.job) || caller.in_child;
}

template <class Condition>
void spin_until(const Condition& condition, Clock::duration most = kSpin) {
    const auto end = Clock::now() + most;
    while (!condition() && Clock::now() < end) pause_core();
}

// Runs body(thread) on so many threads, of which the calling one is 0. ThreadSanitizer does not see
// how libgomp makes its threads wait for each other and would take what they do in turn for races;
// in its build, they are those of the standard library.
template <class Work>
void run_team(int threads, const Work& body) {
#if defined(__SANITIZE_THREAD__)
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
    body(0);
    for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num());
#endif
}

// stack: in bytes; 0: the default. False: the thread could not be made.
bool make_thread(pthread_t& thread, size_t stack, void* (*run)(void*), void* argument) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    if (stack > 0) pthread_attr_setstacksize(&attributes, stack);
    const bool made = pthread_create(&thread, &attributes, run, argument) == 0;
    pthread_attr_destroy(&attributes);
    return made;
}

// The stack size that libgomp takes from the environment for its threads; 0: the default.
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
    int id;
};

void* wait_at_gate(void* argument) {
    Probe& probe = *static_cast<Probe*>(argument);
    probe.id = thread_id();
    const std::lock_guard<std::mutex> lock(*probe.gate);
    return nullptr;
}

// Makes threads like libgomp's, all at once, and ends them: how many of the `wanted` ones can the
// process have, beside the memory that libgomp then needs? The system counts none of them any more.
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
    for (int i = 0; i < made; ++i) {
        const Probe& probe = probes[size_t(i)];
        pthread_join(probe.handle, nullptr);
        while (thread_exists(probe.id)) yield();
    }
    return made;
}

// The thread that enters parallel regions. Never destroyed: it may outlive main().
class Owner {
   public:
    Owner() : process_(process_id()) {}

    bool is_of_this_process() const { return process_ == process_id(); }

    // One call at a time; a caller that finds the owner busy does its work itself.
    std::mutex& busy() { return busy_; }

    // False: a signal handler has forked and this is the child, where the team is not.
    bool run(Job& job, Interrupt interrupt) {
        const bool helped = offer(job);
        if (!helped) job.helpers = 0;
        Caller caller{job, interrupt};
        if (helped) caller.process = process_;
        work(job, 0, {caller_stopped, &caller});
        if (!helped) return true;
        if (caller.in_child) return false;
        if (withdraw(job)) return true;
        spin_until([&] { return job.done.load(std::memory_order_acquire); });
        std::unique_lock<std::mutex> lock(mutex_);
        while (!done_.wait_for(lock, kPatience, [&] { return job.done.load(); })) {
            lock.unlock();
            ask(caller);
            if (caller.in_child) return false;
            lock.lock();
        }
        return true;
    }

   private:
    // False: no thread could be made.
    bool offer(Job& job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!started_) {
            pthread_t thread;
            if (!make_thread(thread, kOwnerStack, serve_jobs, this)) return false;
            pthread_detach(thread);
            started_ = true;
        }
        job_ = &job;
        wake_.notify_one();
        return true;
    }

    // True: all is done, and the owner has not even begun.
    bool withdraw(Job& job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (job_ != &job) return false;
        job_ = nullptr;
        return true;
    }

    static void* serve_jobs(void* owner) { static_cast<Owner*>(owner)->serve(); }

    [[noreturn]] void serve() {
        omp_set_dynamic(0);  // libgomp must not make the team smaller
        Clock::duration spin = kSpin;
        for (;;) {
            spin_until([&] { return job_.load(std::memory_order_relaxed) != nullptr; }, spin);
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return job_ != nullptr; });
            Job& job = *job_;
            spin = job.more ? kLongSpin : kSpin;
            job_ = nullptr;
            lock.unlock();
            resize(job);
            const Stop stop{job_stopped, &job};
            if (team_ == 1) {
                work(job, 1, stop);
            } else {
                run_team(team_, [&](int thread) { work(job, 1 + thread, stop); });
            }
            lock.lock();
            job.done = true;
            done_.notify_one();
        }
    }

    // Sets team_ for the job; to fewer threads than it asks for if the process cannot have them. A
    // team stays as it is for a job of fewer threads: libgomp would end the others and soon make
    // them again.
    void resize(const Job& job) {
        if (team_ > job.most_helpers) team_ = job.helpers;
        if (team_ >= job.helpers || Clock::now() < retry_) return;
        const int missing = job.helpers - team_;
        const int had = try_threads(missing + 1) - 1;  // one to spare
        team_ += std::max(had, 0);
        if (had < missing) retry_ = Clock::now() + kRetry;
    }

    const int process_;
    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<Job*> job_{nullptr};  // offered, and not begun
    bool started_ = false;
    int team_ = 1;  // the owner, and the threads that libgomp keeps for it
    Clock::time_point retry_{};
};

bool never_stopped(void*) { return false; }

thread_local bool pool_of_caller = false;
std::atomic<bool> pool_in_use{false};      // by one caller at a time
const int process_of_load = process_id();  // a child of it may have none of its threads

// Works in the calling thread's own pool. That pool stays as large as its thread wants it to be:
// libgomp would end what a smaller team leaves out, and make it again for the next operator.
bool run_in_pool_of_caller(Job& job, Interrupt interrupt) {
    const int team = std::max(1 + job.helpers, omp_get_max_threads());
    Caller caller{job, interrupt};
    caller.process = process_of_load;
    while (job.next < job.items && !job.stopped && !caller.in_child) {
        const auto end = Clock::now() + kPatience;
        run_team(team, [&](int thread) { work(job, thread, {never_stopped, nullptr}, end); });
        if (Clock::now() >= end) ask(caller);
    }
    Caller child{job, interrupt};
    if (caller.in_child) work(job, 0, {caller_stopped, &child});  // what no region has begun
    return !job.stopped;
}

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
    static const int limit = cpu_quota();
    const int cpus = omp_get_num_procs();
    return limit > 0 ? std::min(cpus, limit) : cpus;
}

std::atomic<int> wanted_threads{0};

}  // namespace

void use_pool_of_caller(bool use) { pool_of_caller = use; }

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

int threads_at_hand() { return omp_in_parallel() ? 1 : get_num_threads(); }

bool parallel_for(int64_t items, int threads, Interrupt interrupt, const Body& body, bool more) {
    if (threads > 1 && pool_of_caller && process_id() == process_of_load) {
        const int most = get_num_threads();
        if (most > 1 && !pool_in_use.exchange(true)) {
            Job job{items, std::min(threads, most) - 1, most - 1, &body};
            const bool finished = run_in_pool_of_caller(job, interrupt);
            pool_in_use = false;
            return finished;
        }
    } else if (threads > 1) {
        Owner& the_owner = owner_of_this_process();
        std::unique_lock<std::mutex> lock(the_owner.busy(), std::try_to_lock);
        const int most = get_num_threads();
        if (lock.owns_lock() && most > 1) {
            Job job{items, std::min(threads, most) - 1, most - 1, &body, more};
            if (the_owner.run(job, interrupt) || job.stopped) return !job.stopped;
        }
    }
    Job job{items, 0, 0, &body};
    Caller caller{job, interrupt};
    work(job, 0, {caller_stopped, &caller});
    return !job.stopped;
}

}  // namespace fastattn
