// SPDX-License-Identifier: Apache-2.0
//
// parallel_for over workers of our own. They are made when they are first needed, and anew after a
// fork. A call takes those that are free, and more of them between two of its items as other calls
// let them go; where none is free, the caller works alone. The caller is a worker beside them: it
// begins at once, while the others wake, waits for none that has not begun when the work is done,
// and looks every 50 ms whether the user wants to stop.
//
// Not over OpenMP, because libgomp ties a pool to the thread that enters a parallel region, hangs
// in a forked child that enters one, wakes the whole pool for any team, waits for the last sleeper,
// lets its threads spin for milliseconds after a region, gives them the affinity of one thread, and
// ends a process that cannot have another one.
//
// Callers whose thread has such a pool anyway, which is awake (use_pool_of_caller), do enter
// regions, of 50 ms at most, and look between two of them. A signal handler that forks then does so
// outside.
#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif

#include "platform.h"

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::milliseconds(50);  // between two looks at Ctrl-C
constexpr auto kSpin =
    std::chrono::microseconds(50);  // before a thread sleeps: waking takes as long
constexpr auto kLongSpin = std::chrono::microseconds(200);  // where more calls follow
constexpr auto kRetry = std::chrono::seconds(1);            // after a thread could not be had
constexpr auto kLookAgain = std::chrono::milliseconds(5);   // whether OpenMP's threads are awake
constexpr double kLongItem = 0.05;                          // seconds
constexpr size_t kStack = 1 << 20;  // of a worker, in bytes; the kernel's memory is on the heap
constexpr int kRoused = 4;          // workers that one thread rouses: those rouse others

struct Job {
    int64_t items;
    int helpers;  // beside the caller, at most
    const Body* body;
    Hints hints{};
    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};
    // Of workers:
    std::atomic<int> joined{0}, away{0};  // that have begun; that are to come or have not left
    std::atomic<int> roused{0};           // the first that nobody has tried to rouse
    bool placed = false;
    int cpu = -1;   // of the caller
    CpuSet cpus{};  // for the others
};

bool job_stopped(void* job) {
    return static_cast<Job*>(job)->stopped.load(std::memory_order_relaxed);
}

// worker: 0 is the caller. Before each item it asks whether it may begin one.
template <class May>
void work(Job& job, int worker, const Stop& stop, const May& may_begin) {
    if (worker > job.helpers) return;
    const DefaultModes modes;
    while (may_begin()) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items || stop.requested(stop.context)) return;
        (*job.body)(item, worker, stop);
    }
}

void work(Job& job, int worker, const Stop& stop) {
    work(job, worker, stop, [] { return true; });
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

// The CPUs for so many threads: those of the calling one, or, where it is bound to fewer, those of
// the process. OpenMP may have bound its first thread, and knows which others there are.
CpuSet cpus_for(int threads) {
    CpuSet cpus = cpus_of(0);
    if (cpus.count() == 0 || cpus.count() >= threads) return cpus;
    cpus.add(cpus_of(process_id()));
    for (int place = 0; place < omp_get_num_places(); ++place) {
        int ids[CpuSet::kMost];
        const int count = omp_get_place_num_procs(place);
        if (count > CpuSet::kMost) continue;
        omp_get_place_proc_ids(place, ids);
        for (int i = 0; i < count; ++i) cpus.add(ids[i]);
    }
    return cpus;
}

class Workers;

// A thread that waits for jobs.
struct alignas(64) Worker {
    Workers* all;
    std::atomic<Job*> job{nullptr};  // offered, and not begun; or kTaken; null: the worker is free
    std::atomic<bool> sleeps{false};
    std::atomic<int> thread{0};  // its thread_id()
    // With the mutex:
    std::mutex mutex;
    std::condition_variable wake;
    bool moved = false;  // it may not run on all of them now

    CpuSet cpus{};  // that it may run on; for itself alone
};

alignas(Job) char taken;
Job* const kTaken = reinterpret_cast<Job*>(&taken);

// The workers of a process. Never destroyed: they may outlive main().
class Workers {
   public:
    bool is_of_this_process() const { return process_ == process_id(); }

    // False: a signal handler has forked and this is the child, where the workers are not.
    bool run(Job& job, Interrupt interrupt) {
        Caller caller{job, interrupt};
        caller.process = process_;
        int recruits = 0;
        const auto recruit_more = [&] {
            if (recruits < job.helpers && job.next.load(std::memory_order_relaxed) < job.items &&
                !caller.in_child && !job_stopped(&job)) {
                recruits += recruit(job, job.helpers - recruits);
            }
            return true;
        };
        work(job, 0, {caller_stopped, &caller}, recruit_more);
        if (recruits == 0) return !caller.in_child;
        if (caller.in_child) return false;
        const auto all_left = [&] { return job.away.load(std::memory_order_acquire) == 0; };
        const int size = size_.load(std::memory_order_acquire);
        for (int i = 0; i < size && !all_left(); ++i) {
            Job* offered = &job;
            if (workers_[i]->job.compare_exchange_strong(offered, nullptr)) --job.away;
        }
        spin_until(all_left);
        if (all_left()) return true;
        std::unique_lock<std::mutex> lock(mutex_);
        while (!left_.wait_for(lock, kPatience, all_left)) {
            lock.unlock();
            ask(caller);
            if (caller.in_child) return false;
            lock.lock();
        }
        return true;
    }

   private:
    // Offers the job to so many of the workers, as far as they are free, and returns to how many.
    // As many workers as the job has helpers are looked at, and made where they are missing:
    // callers at the same time do not add up.
    int recruit(Job& job, int wanted) {
        if (!job.placed) {
            job.placed = true;
            job.cpu = current_cpu();
            job.cpus = cpus_for(1 + job.helpers);
        }
        int found = 0;
        const int size = size_.load(std::memory_order_acquire);
        for (int i = 0; i < std::min(job.helpers, size) && found < wanted; ++i) {
            found += offer(*workers_[i], job);
        }
        if (found > 0) {
            job.roused = 0;
            rouse_some(job);
        }
        if (found < wanted && size < job.helpers) found += make(job, wanted - found);
        return found;
    }

    bool offer(Worker& worker, Job& job) {
        if (worker.job.load(std::memory_order_relaxed) != nullptr) return false;
        ++job.away;
        Job* none = nullptr;
        if (worker.job.compare_exchange_strong(none, &job)) return true;
        --job.away;
        return false;
    }

    // Makes workers that begin with the job. Returns how many could be made.
    int make(Job& job, int wanted) {
        const std::unique_lock<std::mutex> lock(making_, std::try_to_lock);
        if (!lock.owns_lock() || Clock::now() < retry_) return 0;
        int made = 0;
        for (; made < wanted; ++made) {
            const int size = size_.load(std::memory_order_relaxed);
            if (size >= job.helpers) break;
            Worker* const worker = new (std::nothrow) Worker;
            if (worker == nullptr) break;
            worker->all = this;
            worker->job = &job;
            worker->cpus = job.cpus;
            ++job.away;
            if (!make_thread(worker)) {
                --job.away;
                delete worker;
                retry_ = Clock::now() + kRetry;
                break;
            }
            workers_[size] = worker;
            size_.store(size + 1, std::memory_order_release);
        }
        return made;
    }

    static bool make_thread(Worker* worker) {
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes) != 0) return false;
        pthread_attr_setstacksize(&attributes, kStack);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        sigset_t every, before;  // signals are for the threads of the program
        sigfillset(&every);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGPROF}) sigdelset(&every, fault);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        pthread_t thread;
        const bool made = pthread_create(&thread, &attributes, serve_jobs, worker) == 0;
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
        return made;
    }

    static void* serve_jobs(void* argument) {
        Worker& worker = *static_cast<Worker*>(argument);
        worker.all->serve(worker);
    }

    [[noreturn]] void serve(Worker& me) {
        me.thread = thread_id();
        run_on(0, me.cpus);
        Clock::duration spin = kSpin;
        for (;;) {
            const auto offered = [&] { return me.job.load() != nullptr; };
            spin_until(offered, spin);
            if (!offered()) sleep_until(me, offered);
            Job* job = me.job.load();
            if (job == nullptr || !me.job.compare_exchange_strong(job, kTaken)) continue;
            if (me.cpus != job->cpus) run_on(0, me.cpus = job->cpus);
            spin = job->hints.more ? kLongSpin : kSpin;
            if (job->next.load(std::memory_order_relaxed) < job->items) rouse_some(*job);
            work(*job, 1 + job->joined.fetch_add(1), {job_stopped, job});
            me.job = nullptr;
            if (job->away.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
            const std::lock_guard<std::mutex> lock(mutex_);  // the job is no more
            left_.notify_all();
        }
    }

    template <class Offered>
    static void sleep_until(Worker& me, const Offered& offered) {
        std::unique_lock<std::mutex> lock(me.mutex);
        me.sleeps = true;
        me.wake.wait(lock, [&] { return offered() || me.moved; });
        me.sleeps = false;
        if (std::exchange(me.moved, false)) run_on(0, me.cpus);
    }

    // Wakes some of those to whom the job is offered, away from the CPUs of threads that work now:
    // the system likes to wake one there, where it waits for milliseconds, even if others are idle.
    void rouse_some(Job& job) {
        const int size = size_.load(std::memory_order_acquire), here = current_cpu();
        for (int roused = 0; roused < kRoused;) {
            const int i = job.roused.fetch_add(1);
            if (i >= size) return;
            Worker& worker = *workers_[i];
            if (worker.job.load() != &job || !worker.sleeps.load()) continue;
            {
                const std::lock_guard<std::mutex> lock(worker.mutex);
                if (worker.sleeps &&
                    run_on(worker.thread, job.cpus.without(job.cpu).without(here))) {
                    worker.moved = true;
                }
            }
            worker.wake.notify_one();
            ++roused;
        }
    }

    const int process_ = process_id();
    std::atomic<int> size_{0};
    Worker* workers_[kMostThreads] = {};
    std::mutex making_;
    Clock::time_point retry_{};
    std::mutex mutex_;
    std::condition_variable left_;  // some job
};

bool never_stopped(void*) { return false; }

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

const int process_of_load = process_id();  // a child of it may have none of its OpenMP threads
std::atomic<bool> pool_in_use{false};      // by one caller at a time
thread_local bool pool_of_caller = false;
thread_local int pool_thread = 0;  // a thread_id() of that pool; 0: not known

// A region ends when the last sleeper has come, which may be later than the caller alone would end.
bool pool_is_awake() {
    thread_local Clock::time_point looked{};
    thread_local bool awake = true;
    const auto now = Clock::now();
    if (now - looked < kLookAgain) return awake;
    looked = now;
    awake = pool_thread == 0 || !thread_sleeps(pool_thread);
    return awake;
}

// Works in the calling thread's own pool; alone while another call does so. That pool stays as
// large as its thread wants it to be: libgomp would end what a smaller team leaves out, and make it
// again for the next operator.
bool run_in_pool_of_caller(Job& job, Interrupt interrupt) {
    const int team = std::max(1 + job.helpers, omp_get_max_threads());
    Caller caller{job, interrupt};
    caller.process = process_of_load;
    int* const second = &pool_thread;
    while (job.next < job.items && !job.stopped && !caller.in_child) {
        if (pool_in_use.exchange(true)) {
            Caller alone{job, interrupt};
            work(job, 0, {caller_stopped, &alone}, [] { return pool_in_use.load(); });
            caller.in_child = process_id() != process_of_load;
            continue;
        }
        const auto end = Clock::now() + kPatience;
        run_team(team, [&](int thread) {
            if (thread == 1) *second = thread_id();
            work(job, thread, {never_stopped, nullptr}, [&] { return Clock::now() < end; });
        });
        pool_in_use = false;
        if (Clock::now() >= end) ask(caller);
    }
    Caller child{job, interrupt};
    if (caller.in_child) work(job, 0, {caller_stopped, &child});  // what no region has begun
    return !job.stopped;
}

std::atomic<Workers*> workers{nullptr};

// After a fork the parent's workers are abandoned, not touched: mutexes may be locked for ever.
Workers& workers_of_this_process() {
    Workers* current = workers.load(std::memory_order_acquire);
    while (current == nullptr || !current->is_of_this_process()) {
        Workers* const fresh = new Workers;
        if (workers.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) {
            return *fresh;
        }
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

// Asks at the first time. A static variable would do the same behind a lock, which hangs in a child
// that was forked meanwhile.
template <class Ask>
int once(std::atomic<int>& answer, const Ask& ask) {
    int known = answer.load(std::memory_order_relaxed);
    if (known < 0) answer = known = ask();
    return known;
}
std::atomic<int> quota{-1}, threads_of_ours{-1}, threads_of_openmp{-1};

// OpenMP is asked for the affinity: with OMP_PROC_BIND it has bound the calling thread to one CPU.
// Of a core's siblings one counts, as for PyTorch: two share the units that multiply.
int usable_cpus() {
    const int limit = once(quota, cpu_quota);
    const int cpus = omp_get_num_procs(), cores = cores_of(cpus_for(cpus));
    const int most = cores > 0 ? std::min(cpus, cores) : cpus;
    return limit > 0 ? std::min(most, limit) : most;
}

std::atomic<int> wanted_threads{0}, begun_again{0};

// See record_items(). Of the thread; never destroyed.
thread_local std::vector<std::vector<double>>* recording = nullptr;

bool work_alone(int64_t items, Interrupt interrupt, const Body& body) {
    Job job{items, 0, &body};
    Caller caller{job, interrupt};
    work(job, 0, {caller_stopped, &caller});
    return !job.stopped;
}

bool record(int64_t items, Interrupt interrupt, const Body& body) {
    std::vector<double> seconds(size_t(items), 0.0);
    const bool finished =
        work_alone(items, interrupt, [&](int64_t item, int worker, const Stop& stop) {
            const auto start = Clock::now();
            body(item, worker, stop);
            seconds[size_t(item)] = std::chrono::duration<double>(Clock::now() - start).count();
        });
    if (recording != nullptr) recording->push_back(std::move(seconds));
    return finished;
}

}  // namespace

void use_pool_of_caller(bool use) { pool_of_caller = use; }

void set_num_threads(int threads) { wanted_threads = threads; }

// An explicit wish wins: set_num_threads, FASTATTN_NUM_THREADS, OMP_NUM_THREADS. The OpenMP setting
// is read on the caller's thread, where threadpoolctl and others leave theirs.
int get_num_threads() {
    if (const int wanted = wanted_threads) return wanted;
    const int ours = once(threads_of_ours, [] { return number_in("FASTATTN_NUM_THREADS"); });
    if (ours > 0) return ours;
    const bool openmp_set =
        once(threads_of_openmp, [] { return number_in("OMP_NUM_THREADS"); }) > 0;
    const int openmp = std::min(omp_get_max_threads(), kMostThreads);
    return openmp_set ? openmp : std::min(openmp, usable_cpus());
}

int times_begun_again() { return begun_again.load(std::memory_order_relaxed); }

void throw_begun_again() {
    throw std::runtime_error(
        "a call that accumulates was interrupted by a fork: what it adds to is lost in the child");
}

bool Patience::ended() {
    const auto now = Clock::now();
    if (asked_ == Clock::time_point()) asked_ = now;
    if (interrupt_.requested == nullptr || now - asked_ < kPatience) return false;
    asked_ = now;
    return interrupt_.requested();
}

void record_items(bool on) {
    if (on && recording == nullptr) recording = new std::vector<std::vector<double>>;
    if (!on) delete std::exchange(recording, nullptr);
}

std::vector<std::vector<double>> recorded_items() {
    return recording == nullptr ? std::vector<std::vector<double>>{}
                                : std::exchange(*recording, {});
}

int threads_at_hand() { return omp_in_parallel() ? 1 : get_num_threads(); }

bool parallel_for(int64_t items, int threads, Interrupt interrupt, const Body& body,
                  const Hints& hints) {
    if (recording != nullptr) return record(items, interrupt, body);
    if (threads > 1 && !omp_in_parallel()) {
        Job job{items, std::min(threads, kMostThreads) - 1, &body, hints};
        if (pool_of_caller && process_id() == process_of_load && hints.item_seconds <= kLongItem &&
            pool_is_awake()) {
            return run_in_pool_of_caller(job, interrupt);
        }
        if (workers_of_this_process().run(job, interrupt) || job.stopped) return !job.stopped;
        ++begun_again;
    }
    return work_alone(items, interrupt, body);
}

}  // namespace fastattn
