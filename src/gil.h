// SPDX-License-Identifier: Apache-2.0
//
// Work without Python's lock, and how it takes the lock again.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <optional>

#include "platform.h"

namespace fastattn {

namespace py = pybind11;

inline bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

// Takes the GIL by the function given. While the interpreter ends, only the thread that ends it can
// have it. Before Python 3.14 another one that asks is unwound, which C++ frames would not let
// pass; it waits for the end of the process instead, as it does since then.
template <class Take>
auto take_gil(const Take& take) {
    if (interpreter_is_ending()) sleep_forever();
    try {
        return take();
    } catch (const abi::__forced_unwind&) {  // it began to end just now
        sleep_forever();
    }
}

// Takes the GIL for a moment, in the thread that handles signals; a signal's exception stays set
// for the caller to throw.
inline bool signal_arrived() {
    if (!is_main_thread() || interpreter_is_ending()) return false;
    const PyGILState_STATE state = take_gil([] { return PyGILState_Ensure(); });
    const bool arrived = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return arrived;
}

// Runs work without the GIL; not by pybind11's guard, for what take_gil() says. A thread that has
// the GIL while the interpreter ends is the one that ends it, in some object's destructor: it keeps
// it, and nobody else could get it.
template <class Work>
auto without_gil(const Work& work) {
    if (interpreter_is_ending()) return work();
    PyThreadState* const state = PyEval_SaveThread();
    std::optional<decltype(work())> result;
    std::exception_ptr failure;
    try {
        result = work();
    } catch (...) {
        failure = std::current_exception();
    }
    take_gil([&] { PyEval_RestoreThread(state); });
    if (failure) std::rethrow_exception(failure);
    return *result;
}

}  // namespace fastattn
