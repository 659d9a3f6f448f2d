// SPDX-License-Identifier: Apache-2.0
//
// All that fastattn asks of the operating system and the processor is asked here: a port changes
// platform.h, platform.cpp and how parallel.cpp makes threads. One thing is left outside: src/gil.h
// catches the forced unwinding by which the system ends a thread. Called by src/ and by all of cpp/
// but the kernel.
#pragma once

#include <cfenv>
#include <cstddef>
#include <cstdint>

namespace fastattn {

int process_id();
int thread_id();                 // of the calling thread; no other one of the system has it
bool is_main_thread();           // the one that the process began with
bool thread_sleeps(int thread);  // of this process, by its thread_id(); false: or there is none
[[noreturn]] void sleep_forever();

// In a loop that waits for another thread: leaves the core to its sibling for a moment.
inline void pause_core() {
#if defined(__SSE2__)
    __builtin_ia32_pause();
#endif
}

// Null: there is no memory. The alignment is a power of two, and bytes a multiple of it.
void* allocate_aligned(size_t alignment, size_t bytes);
void free_aligned(void* memory);

// Asks for large pages behind memory that nothing has touched yet.
void prefer_large_pages(void* memory, size_t bytes);

// Some CPUs, by the system's numbers; a system that has others is asked for none.
struct CpuSet {
    static constexpr int kMost = 1024;
    uint64_t words[kMost / 64] = {};

    int count() const;
    void add(int cpu);
    void add(const CpuSet& others);
    CpuSet without(int cpu) const;
    bool operator==(const CpuSet&) const = default;
};

int current_cpu();           // of the calling thread; -1: the system does not tell
CpuSet cpus_of(int thread);  // that a thread may run on, by its thread_id(); 0: the calling one;
                             // empty: the system does not tell
bool run_on(int thread, const CpuSet& cpus);  // false: it stays as it is
int cores_of(const CpuSet& cpus);             // that they belong to; 0: the system does not tell

// The CPUs that the process's control groups let it use by their quota, rounded up; 0: no quota.
int cpu_quota();

// Whether the CPU has a feature, and the system keeps its registers; the name is a literal, as in
// the compiler's -m<name>.
#define FASTATTN_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)

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

}  // namespace fastattn
