// SPDX-License-Identifier: Apache-2.0
//
// Which variant of the kernel runs: the best that this CPU can run, or the one that FASTATTN_ISA
// names. variants.inc is written by CMake, a line per variant, best first, with the CPU features
// that its objects were compiled for: the flags and the check cannot differ.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel/kernel.h"
#include "platform.h"

namespace fastattn {
namespace {

struct Variant {
    const Kernel* kernel;
    std::string missing;  // the CPU features that it needs and this CPU lacks
};

std::vector<Variant> detect() {
    std::vector<Variant> variants;
#define FASTATTN_FEATURE(feature) \
    if (!FASTATTN_CPU_HAS(feature)) missing += missing.empty() ? feature : ", " feature;
#define FASTATTN_VARIANT(name, features)                        \
    {                                                           \
        std::string missing;                                    \
        features variants.push_back({&kernel_##name, missing}); \
    }
#include "variants.inc"
#undef FASTATTN_VARIANT
#undef FASTATTN_FEATURE
    return variants;
}

// Leaked on purpose: a call may still run while the process exits. No lock, which a fork in another
// thread would leave behind.
const std::vector<Variant>& variants() {
    static std::atomic<const std::vector<Variant>*> all{nullptr};
    const std::vector<Variant>* found = all.load(std::memory_order_acquire);
    if (found == nullptr) {
        const auto* const fresh = new std::vector<Variant>(detect());
        if (all.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
    }
    return *found;
}

const Kernel& find(const std::string& name) {
    std::string choices;
    for (const Variant& variant : variants()) {
        if (name == variant.kernel->isa) {
            if (variant.missing.empty()) return *variant.kernel;
            throw std::runtime_error("this CPU cannot run FASTATTN_ISA='" + name + "' (missing " +
                                     variant.missing + ")");
        }
        choices = variant.kernel->isa + (choices.empty() ? "" : ", " + choices);
    }
    throw std::invalid_argument("FASTATTN_ISA='" + name + "' is not one of: " + choices);
}

const Kernel& choose() {
    const char* forced = std::getenv("FASTATTN_ISA");
    if (forced != nullptr && *forced != '\0') return find(forced);
    for (const Variant& variant : variants()) {
        if (variant.missing.empty()) return *variant.kernel;
    }
    throw std::runtime_error("this build has no kernel for this CPU");
}

std::atomic<const Kernel*> current{nullptr};

}  // namespace

const Kernel& kernel() {
    const Kernel* chosen = current.load(std::memory_order_acquire);
    if (chosen == nullptr) {
        // What set_isa() has stored meanwhile, and is then in `chosen`, wins.
        const Kernel* const best = &choose();
        if (current.compare_exchange_strong(chosen, best, std::memory_order_acq_rel)) return *best;
    }
    return *chosen;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.push_back(variant.kernel->isa);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) {
        if (variant.missing.empty()) names.push_back(variant.kernel->isa);
    }
    return names;
}

std::string isa() { return kernel().isa; }

void set_isa(const std::string& name) { current.store(name.empty() ? nullptr : &find(name)); }

}  // namespace fastattn
