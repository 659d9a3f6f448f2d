# SPDX-License-Identifier: Apache-2.0
"""The fuzzers of fuzz/: they run, and each kind of them sees a fault of the kind it is for."""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn.models import _checkpoint, _gguf, _safetensors
from tests.fuzz import command

FUZZ = Path(command.__file__).parent
pytestmark = pytest.mark.usefixtures("threads")


def fuzz(*arguments):
    """Run the command line; return its exit status and what it wrote."""
    line = [sys.executable, str(FUZZ), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.promise("garbage-never-crashes", "result-is-the-definition")
@pytest.mark.promise("cache-attends-to-what-it-holds", "linear-rows-are-alone")
def test_some_cases_of_each_kind():
    count = 30 * len(command.KINDS)
    code, said = fuzz("--cases", count)
    assert code == 0, said
    assert re.search(rf"{count} cases of seed 0 with .*, 0 failures", said)
    for kind in command.KINDS:
        assert re.search(rf"^  {kind} +30 cases$", said, re.MULTILINE)


def test_torch():
    pytest.importorskip("torch")
    code, said = fuzz("--only", "torch", "--cases", 8, "--isas", fastattn.info()["isa"])
    assert code == 0, said


class Plant:
    """Puts faults in the place of what fastattn does."""

    def __init__(self, monkeypatch):
        self.put = monkeypatch.setattr

    def function(self, name, fault):
        """Let fastattn's function be fault(the right one, *its arguments)."""
        right = getattr(fastattn, name)
        self.put(fastattn, name, lambda *args, **options: fault(right, *args, **options))

    def method(self, kind, name, fault):
        """Likewise a method."""
        right = getattr(kind, name)
        self.put(kind, name, lambda self, *args, **options: fault(right, self, *args, **options))


def causal_off_by_one(right, *operands, **options):
    if options.get("is_causal"):
        offset = options.get("query_offset")
        options["query_offset"] = (0 if offset is None else offset) + 1
    return right(*operands, **options)


def a_bit_of_three_threads(right, *operands, **options):
    result = right(*operands, **options)
    out = result[0] if isinstance(result, tuple) else result
    if fastattn.get_num_threads() == 3 and out.size:
        out.view(f"u{out.itemsize}")[..., -1, -1] ^= 1
    return result


def no_softcap(right, *operands, **options):
    return right(*operands, **options | {"softcap": None})


def dv_a_little_large(right, *arguments, **options):
    dq, dk, dv, *rest = right(*arguments, **options)
    return dq, dk, (dv * dv.dtype.type(1.02)).astype(dv.dtype), *rest


def no_gradient_of_lse(right, *arguments, **options):
    return right(*arguments, **options | {"grad_lse": None})


def sinks_the_wrong_way(right, *arguments, **options):
    *grads, last = right(*arguments, **options)
    return *grads, -last if options["return_dsinks"] else last


def one_evicted_too_few(right, cache, keep, **options):
    return right(cache, np.asarray(keep) + 1, **options)


def indices_ignored(right, cache, indices):
    return right(cache, np.arange(cache.batch))


def one_token_too_few(right, cache, prefix=None, length=None):
    if length is not None and length > cache.begins[cache.sequences.index(prefix)]:
        length -= 1
    return right(cache, prefix, length)


def a_key_of_the_next_sequence(right, query, key, value, q_starts, kv_starts, **options):
    kv_starts = np.array(kv_starts)
    if len(kv_starts) > 2 and kv_starts[1] < kv_starts[2]:
        kv_starts[1] += 1
    return right(query, key, value, q_starts, kv_starts, **options)


def sinks_in_each_part(right, *parts, sinks=None):
    return right(*parts)


def strongest_in_another_order(right, *operands, **options):
    found = right(*operands, **options)
    if found.top_keys is None:
        return found
    return found._replace(top_keys=found.top_keys[..., ::-1])


def rows_all_alike(right, *operands, row_weights=None, **options):
    return right(*operands, **options)


def a_bit_of_few_rows(right, x, weight, bias=None):
    out = right(x, weight, bias)
    if len(x) <= 4 and out.size:
        out.view("u4")[-1, -1] ^= 1
    return out


def no_bias(right, x, weight, bias=None):
    return right(x, weight)


def nothing_refused(right, *arguments, **options):
    try:
        return right(*arguments, **options)
    except ValueError:
        return None


def another_error(right, *arguments, **options):
    try:
        return right(*arguments, **options)
    except TypeError as error:
        raise RuntimeError from error


def nothing_checked(right, *arguments):
    pass


def nowhere(place):
    return contextlib.nullcontext()


def cache_of(paged):
    return fastattn.PagedKVCache if paged else fastattn.KVCache


FAULTS = {
    "attention: causal": lambda plant: plant.function("attention", causal_off_by_one),
    "attention: threads": lambda plant: plant.function("attention", a_bit_of_three_threads),
    "attention: softcap": lambda plant: plant.function("attention", no_softcap),
    "backward: dv": lambda plant: plant.function("attention_backward", dv_a_little_large),
    "backward: lse": lambda plant: plant.function("attention_backward", no_gradient_of_lse),
    "backward: sinks": lambda plant: plant.function("attention_backward", sinks_the_wrong_way),
    "varlen: keys": lambda plant: plant.function("varlen_attention", a_key_of_the_next_sequence),
    "varlen: dv": lambda plant: plant.function("attention_backward", dv_a_little_large),
    "cache: evict": lambda plant: plant.method(cache_of(False), "evict", one_evicted_too_few),
    "cache: reorder": lambda plant: plant.method(cache_of(False), "reorder", indices_ignored),
    "paged: fork": lambda plant: plant.method(cache_of(True), "add", one_token_too_few),
    "merge: sinks": lambda plant: plant.function("merge", sinks_in_each_part),
    "statistics: top": lambda plant: plant.function(
        "attention_statistics", strongest_in_another_order
    ),
    "statistics: rows": lambda plant: plant.function("attention_statistics", rows_all_alike),
    "statistics: softcap": lambda plant: plant.function("attention_statistics", no_softcap),
    "linear: rows": lambda plant: plant.function("linear", a_bit_of_few_rows),
    "linear: threads": lambda plant: plant.function("linear", a_bit_of_three_threads),
    "linear: bias": lambda plant: plant.function("linear", no_bias),
    "invalid: accepted": lambda plant: plant.function("attention", nothing_refused),
    "invalid: error": lambda plant: plant.function("attention", another_error),
    "gguf: end": lambda plant: plant.method(_gguf._Parser, "check_end", nothing_checked),
    "safetensors: accepted": lambda plant: plant.put(_safetensors, "_refuse", nothing_checked),
    "checkpoint: kinds": lambda plant: plant.put(_checkpoint, "check", nothing_checked),
    "checkpoint: no place": lambda plant: plant.put(_checkpoint, "within", nowhere),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, monkeypatch, capsys):
    kind = name.split(":")[0]
    if kind not in command.KINDS:
        pytest.skip(f"{kind} needs tokenizers")
    FAULTS[name](Plant(monkeypatch))
    failed = next(
        (
            n
            for n in range(150)
            if not command.run(kind, 1, n, fastattn.info()["isa"], shrink=False)
        ),
        None,
    )
    assert failed is not None
    said = capsys.readouterr().out
    assert said.startswith(f"FAILED {kind}, case {failed}: ")
    again = re.search(r"python tests/fuzz (.*--case \d+)$", said, re.MULTILINE)[1].split()
    monkeypatch.setenv("FASTATTN_ISA", "")  # which it sets, for a process that has not started yet
    assert command.main(again) == 1
    monkeypatch.undo()
    assert command.main(again) == 0


def test_a_failure_is_made_smaller(monkeypatch, capsys):
    Plant(monkeypatch).function("attention", no_softcap)
    numbers = (n for n in range(150) if not command.run("attention", 1, n, shrink=False))
    spec = command.spec_of("attention", 1, next(numbers))
    small = command.shrunk("attention", spec, command.attempt("attention", spec))
    assert [*small["options"]] == ["softcap"]
    assert small["q_len"] == 1
    assert small["kv_len"] <= 3
    assert command.attempt("attention", small) is not None
    assert len(str(small)) < len(str(spec))


CHILD = """
import os, sys, time
sys.path.insert(0, {tests!r})
import fastattn
from fuzz.command import main
right = fastattn.attention
def attention(query, *rest, **options):
    if query.shape[-2] == 2:
        {fault}
    return right(query, *rest, **options)
fastattn.attention = attention
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("fault", "died"),
    [
        ("os.kill(os.getpid(), 11)", "the process died of signal 11"),
        ("os._exit(66)", "exit status 66"),
        ("time.sleep(1000)", "no end after 4 s"),
    ],
    ids=["signal", "exit", "hang"],
)
def test_a_child_that_dies(fault, died, monkeypatch, capfd):
    """It is named as a failure, and the next child goes on behind it."""
    monkeypatch.setattr(command, "SHRINKING", 0)
    numbers = range(60)
    expected = [n for n in numbers if command.spec_of("attention", 2, n)["q_len"] == 2][:2]
    if "sleep" in fault:
        del expected[1]
    isa = fastattn.info()["isa"]
    line = ["--only", "attention", "--seed", "2", "--isas", isa, "--patience", "4"]
    asked = command.parser().parse_args([*line, "--cases", str(expected[-1] + 2)])
    program = (sys.executable, "-c", CHILD.format(tests=str(FUZZ.parent), fault=fault))
    begin = time.monotonic()
    assert command.supervise(asked, program) == 1
    assert time.monotonic() - begin < 60
    said = capfd.readouterr().out
    for n in expected:
        assert f"FAILED attention, case {n}: {died}" in said
        assert f"--only attention --isas {isa} --seed 2 --case {n}\n" in said
    assert f"{expected[-1] + 2} cases of seed 2" in said
    assert f"{len(expected)} failures" in said, said


def test_what_it_cannot_do():
    code, said = fuzz("--only", "attention,guessing")
    assert code == 1
    assert "guessing is not one of attention, backward" in said
