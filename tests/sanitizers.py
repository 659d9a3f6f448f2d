# SPDX-License-Identifier: Apache-2.0
"""Builds the extension with sanitizers, and runs in it the fuzzers and the tests that they suit.

And shows that they see: in a copy of the sources faults are planted, each with a call that meets
it, and must be reported at that line. Run by .ci/sanitize in an environment that has what building
and testing need. What was run is printed at the end; the exit status says whether all is well.

ASan and UBSan see all of the C++; ASan also sees overruns between the parts of scratch memory
(cpp/scratch.h). TSan sees it with teams of std::thread instead of OpenMP (cpp/parallel.cpp).
Python itself and NumPy are as they always are: the sanitizers' libraries are loaded before them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests"
SOURCES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "cpp", "src", "python")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__")
SHOWN = 40  # lines of a report, from the first of these on
BEGINS = r"ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:|^E  |^FAILED|Error: "
PRELUDE = """
import numpy as np, fastattn
fastattn.set_num_threads(4)
def ones(*shape): return np.ones(shape, np.float32)
def gradients(q, k):
    fastattn.set_num_threads(1)  # a fault of the other pass is not met
    out, lse = fastattn.attention(q, k, k, return_lse=True)
    fastattn.set_num_threads(4)
    fastattn.attention_backward(out, q, k, k, out, lse)
"""


@dataclass(frozen=True)
class Fault:
    """A line of a source as it is and with a fault, a call that meets it, and what is reported."""

    what: str
    source: str
    right: str
    wrong: str
    call: str
    report: str


@dataclass(frozen=True)
class Sanitizer:
    """A build: the compiler's flags, libraries to load first, settings, and what is run in it."""

    flags: str
    libraries: tuple[str, ...]
    settings: dict[str, str]
    share: float  # of the time for fuzzing
    tests: tuple[str, ...]  # pytest's arguments
    faults: tuple[Fault, ...]


@dataclass
class Outcome:
    """What came of a build."""

    built: float = 0.0
    cases: int = 0
    tests: int = 0
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


ADDRESS = Sanitizer(
    flags="address,undefined,float-cast-overflow",
    # libstdc++ too: ASan looks for the function that throws exceptions when it is loaded.
    libraries=("libasan.so", "libstdc++.so"),
    settings={
        # Leaks: the interpreter and NumPy keep much until the process ends, and so do we on purpose
        # (dispatch.cpp, parallel.cpp). tests/machine/test_memory.py counts what calls leave behind.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    share=0.6,
    # Not those that measure the process's memory, or have little time for a long call.
    tests=(
        *("api/test_arguments.py", "api/test_arrays.py", "api/test_dlpack.py"),
        *(
            "attention/test_spans.py",
            "attention/test_statistics.py",
            "cache",
            "machine/test_threads.py",
            "models/test_linear.py",
            "models/test_nn.py",
        ),
        *("-k", "not memory and not giants and not fork_in_a_signal_handler"),
    ),
    faults=(
        Fault(
            "an overrun from one part of scratch memory into the next, decoding",
            "cpp/kernel/decode.h",
            "score_scale[r] = T(1);",
            "score_scale[r + V::padded(rows)] = T(1);",
            "x = ones(1, 400, 8); fastattn.attention(x[:, :1], x, x)",
            r"use-after-poison(.|\n)*WRITE of size 4(.|\n)*kernel/decode\.h",
        ),
        Fault(
            "an overrun from one part of scratch memory into the next, short problems",
            "cpp/kernel/short.h",
            "* share).store(factor + c);",
            "* share).store(factor + c + most_width());",
            "x = ones(1, 20, 8); fastattn.attention(x, x, x)",
            r"use-after-poison(.|\n)*WRITE of size(.|\n)*kernel/short\.h",
        ),
        Fault(
            "an overrun from one part of scratch memory into the next, gradients",
            "cpp/kernel/backward.h",
            "for (int64_t w = rows.words; w < rows.pitch; ++w) to[w] = T(0);",
            "for (int64_t w = rows.words; w <= rows.pitch; ++w) to[w] = T(0);",
            "x = ones(1, 400, 8); gradients(x, x)",
            r"use-after-poison(.|\n)*WRITE of size 4(.|\n)*kernel/backward\.h",
        ),
        Fault(
            "an overrun from one part of scratch memory into the next, of a linear layer",
            "cpp/kernel/linear.h",
            "for (int64_t k = begin; k < end; k += kStep) {",
            "for (int64_t k = begin; k <= end; k += kStep) {",
            "from fastattn import nn; nn.linear(ones(9, 32), ones(3, 32))",
            r"use-after-poison(.|\n)*WRITE of size(.|\n)*kernel/linear\.h",
        ),
        Fault(
            "an overrun of an array",
            "cpp/kernel/online_softmax.h",
            "store_some(x, value_head_dim - d, out + d);",
            "store_some(x, lanes, out + d);",
            "x = ones(1, 400, 5); fastattn.attention(x, x, x)",
            r"heap-buffer-overflow(.|\n)*WRITE of size 16(.|\n)*online_softmax\.h",
        ),
        Fault(
            "a signed overflow",
            "cpp/call.cpp",
            "const int64_t position = i + s.offset;",
            "const int64_t position = i + 4 * s.offset;",
            "x = ones(1, 400, 8); fastattn.attention(x, x, x, query_offset=2**61, is_causal=True)",
            r"call\.cpp.*signed integer overflow",
        ),
    ),
)
THREAD = Sanitizer(
    flags="thread",
    libraries=("libtsan.so",),
    # What libraries that are not instrumented do with memory is not ours to judge.
    settings={"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1"},
    share=0.4,
    # Not those that count OpenMP's threads or fork: TSan does not know a child's threads.
    tests=(
        *("attention/test_spans.py", "machine/test_threads.py"),
        *("models/test_linear.py", "models/test_nn.py"),
        *("-k", "concurrent or interrupt or threads_and_storage or threads_change or packed"),
    ),
    faults=(
        Fault(
            "a race: threads that share their scratch memory",
            "cpp/attention.cpp",
            "return memory + size_t(worker) * thread_bytes_;",
            "return memory + size_t(worker) * 0;",
            "x = ones(2, 8, 300, 64); fastattn.attention(x, x, x)",
            r"data race(.|\n)*call\.cpp",
        ),
        Fault(
            "a race: a partial that is merged before it is to be seen",
            "cpp/decode.cpp",
            "return missing.fetch_sub(1, std::memory_order_acq_rel) == 1;",
            "return missing.fetch_sub(1, std::memory_order_relaxed) == 1;",
            "fastattn.set_num_threads(8); "  # fewer leave all merging to one
            "x = ones(1, 20000, 64); fastattn.attention(ones(1, 1, 64), x, x)",
            r"data race(.|\n)*decode\.cpp",
        ),
        Fault(
            "a race: the next block's turn before the last one's sums are to be seen",
            "cpp/backward.cpp",
            "turns_[turn.place].store(turn.next, std::memory_order_release);",
            "turns_[turn.place].store(turn.next, std::memory_order_relaxed);",
            "gradients(ones(2, 300, 64), ones(2, 2000, 64))",
            r"data race(.|\n)*kernel/backward\.h",
        ),
    ),
)


def say(text):
    """Print a line at once: what runs next may take minutes."""
    print(text, flush=True)


def run(command, sanitizer, site, **more):
    """Run a Python program in the build that lies in a folder; return its status and output."""
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for library in sanitizer.libraries
    ]
    env = os.environ | sanitizer.settings | {"LD_PRELOAD": " ".join(found)}
    env |= {"PYTHONPATH": str(site), "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **more,
    )
    return done.returncode, done.stdout


def build(sanitizer, folder, faults=()):
    """Build the extension of a copy of the sources; return the folder to import it from."""
    sources, site = folder / "sources", folder / "site"
    sources.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, sources / name)
    for fault in faults:
        change(sources / fault.source, re.escape(fault.right), fault.wrong)
    if faults:  # one instruction set, in which to see them all
        change(sources / "CMakeLists.txt", r"( *fastattn_add_kernel\(avx.*\n)+", "")
    # Not stripped: a report is to name files and lines.
    settings = (
        f"build-dir={folder / 'build'}",
        "install.strip=false",
        f"cmake.define.FASTATTN_SANITIZE={sanitizer.flags}",
    )
    command = [sys.executable, *["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]]
    command += ["--target", site, sources, *(f"-C{setting}" for setting in settings)]
    subprocess.run(command, check=True)
    return site


def change(path, pattern, text):
    """Replace what a pattern matches, once in the file."""
    old = path.read_text()
    new, count = re.subn(pattern, lambda _: text, old)
    if count != 1 or new == old:
        sys.exit(f"{path.name} has {count} times, not once, what is to be changed: {pattern}")
    path.write_text(new)


def fuzz(sanitizer, site, seconds, seed, outcome):
    """Run the fuzzers."""
    command = [FOLDER / "fuzz", "--seconds", seconds, "--seed", seed]
    status, output = run(command, sanitizer, site)
    total = re.search(r"^(\d+) cases", output, re.M)
    outcome.cases = int(total[1]) if total else 0
    if status or not outcome.cases:
        outcome.wrong.append(f"the fuzzers (status {status})\n{output}")


def test(sanitizer, site, outcome):
    """Run the tests."""
    tests = [FOLDER / x if (FOLDER / x).exists() else x for x in sanitizer.tests]
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*options, "-c", ROOT / "pyproject.toml", *tests]
    status, output = run(command, sanitizer, site, cwd=ROOT)
    total = re.search(r"(\d+) passed", output)
    outcome.tests = int(total[1]) if total else 0
    if status or not outcome.tests:
        outcome.wrong.append(f"the tests (status {status})\n{output}")
    lines = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import sanitizers"
    status, output = run(["-c", f"{lines}; sanitizers.call_at_once()"], sanitizer, site)
    outcome.tests += 1
    if status:
        outcome.wrong.append(f"calls at once (status {status})\n{output}")


def call_at_once():
    """Call from some threads at once, half of them in pools of their own; compare the bits."""
    import numpy as np

    import fastattn
    from fastattn import _core

    rng, barrier, wrong = np.random.default_rng(0), threading.Barrier(4), []
    sizes = ((1, 3000, 16, "f4"), (100, 100, 8, "f4"), (40, 300, 8, "f8"), (16, 1100, 8, "f2"))
    problems = [
        [rng.standard_normal((2, 2, n, dim)).astype(dtype) for n in (q_len, kv_len)]
        for q_len, kv_len, dim, dtype in sizes
    ]

    def compute(query, key):
        out, lse = fastattn.attention(query, key, key, return_lse=True)
        gradients = fastattn.attention_backward(out, query, key, key, out, lse)
        return [x.tobytes() for x in (out, lse, *gradients[:3])]

    fastattn.set_num_threads(1)
    expected = [compute(*problem) for problem in problems]
    fastattn.set_num_threads(3)

    def call(number):
        _core.use_pool_of_caller(number % 2 == 0)
        barrier.wait()
        for _ in range(20):
            wrong.extend(i for i, p in enumerate(problems) if compute(*p) != expected[i])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"other bits of problems {wrong}"


def look(sanitizer, site, outcome):
    """Meet each planted fault."""
    for fault in sanitizer.faults:
        status, output = run(["-c", PRELUDE + fault.call], sanitizer, site)
        if status and re.search(fault.report, output):
            outcome.seen.append(fault.what)
        else:
            outcome.wrong.append(f"{fault.what} was not seen (status {status})\n{output}")


def main():
    """Run everything."""
    parser = argparse.ArgumentParser("python tests/sanitizers.py", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480, help="of fuzzing, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzers")
    parser.add_argument("--only", choices=("address", "thread"), help="one of the builds")
    asked = parser.parse_args()
    outcomes = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, sanitizer in (("address", ADDRESS), ("thread", THREAD)):
            if asked.only not in (None, name):
                continue
            outcome = outcomes[sanitizer.flags] = Outcome()
            began = time.monotonic()
            say(f"--- {sanitizer.flags}: building")
            site = build(sanitizer, Path(temporary) / name)
            planted = build(sanitizer, Path(temporary) / f"{name}-planted", sanitizer.faults)
            outcome.built = time.monotonic() - began
            say(f"--- {sanitizer.flags}: planted faults")
            look(sanitizer, planted, outcome)
            began = time.monotonic()
            say(f"--- {sanitizer.flags}: tests")
            test(sanitizer, site, outcome)
            say(f"--- {sanitizer.flags}: fuzzing")
            fuzz(sanitizer, site, asked.seconds * sanitizer.share, asked.seed, outcome)
            outcome.seconds = time.monotonic() - began
    for flags, outcome in outcomes.items():
        report(flags, outcome)
    return int(any(outcome.wrong for outcome in outcomes.values()))


def report(flags, outcome):
    """Print what came of a build."""
    say(
        f"{flags}: {outcome.cases} cases and {outcome.tests} tests in {outcome.seconds:.0f} s, "
        f"built in {outcome.built:.0f} s, {len(outcome.wrong)} wrong"
    )
    for what in outcome.seen:
        say(f"  planted and seen: {what}")
    for what in outcome.wrong:
        name, *lines = what.splitlines()
        first = next((i for i, line in enumerate(lines) if re.search(BEGINS, line)), 0)
        say("\n    ".join([f"  WRONG: {name}", *lines[first : first + SHOWN]]))


if __name__ == "__main__":
    sys.exit(main())
