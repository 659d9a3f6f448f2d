// SPDX-License-Identifier: Apache-2.0
//
// The machine's limits, against which the benchmark measures: multiply-adds in registers, and
// reading memory. Measured with the variant in use and all threads.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>

#include "kernel/kernel.h"
#include "parallel.h"
#include "platform.h"

namespace fastattn {
namespace {

double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double measure_fma(Dtype dtype, double seconds) {
    const Kernel& variant = kernel();
    const auto fma = dtype == Dtype::kFloat64    ? variant.float64.fma
                     : dtype == Dtype::kBFloat16 ? variant.fma_bfloat16
                                                 : variant.float32.fma;
    const int threads = get_num_threads();
    std::vector<double> rates;
    int64_t rounds = 10000;
    const double end = now() + seconds;
    do {
        std::vector<double> flops(size_t(threads), 0.0);
        const double start = now();
        parallel_for(threads, threads, {},
                     [&](int64_t item, int, const Stop&) { flops[size_t(item)] = fma(rounds); });
        const double took = now() - start;
        if (took < 2e-3) {  // so long that starting the threads does not count
            rounds *= 2;
            continue;
        }
        double all = 0;
        for (const double part : flops) all += part;
        rates.push_back(all / took);
    } while (now() < end || rates.empty());
    std::nth_element(rates.begin(), rates.begin() + long(rates.size() / 2), rates.end());
    return rates[rates.size() / 2];
}

double measure_read(int64_t bytes, int repeats) {
    constexpr int64_t each = 8 << 20;
    const int64_t items = std::max<int64_t>(bytes / each, 1);
    const size_t all = size_t(items * each);
    const std::unique_ptr<char, void (*)(void*)> data(
        static_cast<char*>(allocate_aligned(4096, all)), &free_aligned);
    if (data == nullptr) throw std::bad_alloc();
    prefer_large_pages(data.get(), all);
    std::memset(data.get(), 0, all);
    const int threads = int(std::min<int64_t>(items, get_num_threads()));
    const Kernel& variant = kernel();  // may throw, which must not happen below
    std::vector<double> rates;
    for (int i = 0; i < std::max(repeats, 1); ++i) {
        const double start = now();
        parallel_for(items, threads, {}, [&](int64_t item, int, const Stop&) {
            volatile double sink = variant.read(data.get() + item * each, each);
            (void)sink;
        });
        rates.push_back(double(all) / (now() - start));
    }
    std::nth_element(rates.begin(), rates.begin() + long(rates.size() / 2), rates.end());
    return rates[rates.size() / 2];
}

}  // namespace fastattn
