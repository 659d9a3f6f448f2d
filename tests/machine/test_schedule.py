# SPDX-License-Identifier: Apache-2.0
"""How many threads would share a call: of machines that nobody here has.

benchmarks/schedule.py computes it; here it is tried on schedules whose times one can count, and
then guards all cases of the suites.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn import _core, explain
from fastattn.bench import cases
from fastattn.bench.calls import CALLS
from tests.support.correctness import assert_same_bits
from tests.support.problems import make_problem

SCRIPT = Path(__file__).parents[2] / "benchmarks/schedule.py"
MIB = 2**20
NUMBERS = (1, 2, 3, 8, 17, 32, 48, 64, 96, 128, 192, 256)


@pytest.fixture(scope="module")
def simulator():
    """Return benchmarks/schedule.py as a module."""
    if not SCRIPT.exists():
        pytest.skip("no benchmarks beside the tests")
    spec = importlib.util.spec_from_file_location("schedule_of_benchmarks", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def phase(simulator, threads, *items):
    """Make a phase of items, each some steps: seconds, or (seconds, place, turn)."""
    steps = [step if isinstance(step, tuple) else (step, -1, 0) for item in items for step in item]
    seconds, place, turn = zip(*steps, strict=True)
    first = np.cumsum([0, *map(len, items)])
    return simulator.Phase(threads, first, *map(np.array, (seconds, place, turn)))


def end(simulator, threads, *items):
    return simulator.finished(phase(simulator, threads, *items), [0.0] * threads)


def test_items_go_to_threads_that_are_free(simulator):
    assert end(simulator, 1, *[[1.0]] * 10) == 10
    assert end(simulator, 4, *[[1.0]] * 10) == 3
    assert end(simulator, 4, *[[1.0]] * 2) == 1
    assert end(simulator, 2, [4.0], *[[1.0]] * 4) == 4  # the long one first
    assert end(simulator, 2, *[[1.0]] * 4, [4.0]) == 6
    assert end(simulator, 2, [], [1.0, 2.0], [], [], [2.5]) == 3
    late = phase(simulator, 2, *[[1.0]] * 4)
    assert simulator.finished(late, [0.0, 2.5]) == 3.5


def test_turns_make_threads_wait(simulator):
    # Neighbours share a place. Who visits it last waits for who visits it first, and so on.
    chain = [[(1.0, i, 1), (1.0, i + 1, 0)] for i in range(8)]
    assert end(simulator, 8, *chain) == 9
    assert end(simulator, 8, *(steps[::-1] for steps in chain)) == 2
    assert end(simulator, 1, *chain) == 16
    # All have turns at the same places: nobody waits who is a step behind the one before.
    assert end(simulator, 4, *([(1.0, j, i) for j in range(5)] for i in range(4))) == 5
    assert end(simulator, 2, [(3.0, 0, 0)], [(1.0, 0, 1), 1.0], [1.0]) == 4
    assert end(simulator, 2, [(1.0, 0, 5), 1.0], [(3.0, 0, 5)]) == 3  # equal turns do not wait
    with pytest.raises(ValueError, match="never ends"):
        end(simulator, 1, [(1.0, 0, 1)], [(1.0, 0, 0)])


def test_a_bad_schedule_fails_the_guard(simulator):
    def used(*items, threads=32):
        plan = simulator.Plan(0, [phase(simulator, threads, *items)])
        return {n: simulator.usage([plan], n) for n in simulator.LEAST}

    assert simulator.faults("equal", used(*[[1e-2]] * 960, threads=96)) == []
    few = simulator.faults("few", used(*[[1e-2]] * 3, threads=3))
    assert few == ["few: 9 % of 32 threads, not 85 %", "few: 3 % of 96 threads, not 70 %"]
    assert len(simulator.faults("long at the end", used(*[[1e-3]] * 960, [1.0], threads=96))) == 2
    chain = [[(1e-3, i, 1), (1e-3, i + 1, 0)] for i in range(960)]
    assert len(simulator.faults("chain", used(*chain, threads=96))) == 2
    # What is too small for so many threads must use those that it has.
    assert used([1e-5], threads=1)[96] == (1e-5, 1, 1.0, True)
    assert used([1e-5], threads=8)[96].efficiency <= 1 / 8


def test_predictions_use_what_was_recorded(simulator):
    one = phase(simulator, 2, [1.0, 3.0], [(2.0, 0, 0)], [2.0])
    plan = simulator.Plan(0, [one._replace(first_step=np.zeros(1, int)), one])
    recorded = [np.array([8.0, 6.0, 6.0])]
    parts = simulator._spread(one, recorded[0])
    assert parts.tolist() == [2, 6, 6, 6]
    recordings = [simulator._Recording(recorded, beside) for beside in (0.5, 0.25, 9.0)]
    for waking in (simulator.WAKING_SECONDS, simulator.RISING_SECONDS):
        predicted = simulator._predicted([plan], recordings, waking)
        assert predicted == pytest.approx(12 + waking + 0.5)
    other = simulator.Plan(0, [one._replace(first_step=np.array([0, 2, 4]))])
    with pytest.raises(ValueError, match="3 items ran, of 2"):
        simulator._predicted([other], recordings, 0.0)


def test_the_guard_has_few_exceptions(simulator):
    assert simulator.LEAST == {32: 0.85, 96: 0.70}
    assert len(simulator.EXCEPTIONS) <= 3
    plan = simulator.Plan(0, [phase(simulator, 32, *[[1.0]] * 32)])
    used = {n: simulator.usage([plan], n) for n in simulator.LEAST}
    assert simulator.faults("a-case", used) == ["a-case: 33 % of 96 threads, not 70 %"]
    assert simulator.faults("draft-2-gqa-f32", used) == [
        "draft-2-gqa-f32: 33 % of 96 threads, not 66 %"
    ]
    assert simulator.faults("decode-4k", used) == []


@pytest.mark.promise("many-cores-are-used")
def test_suites_use_machines_with_many_cores(simulator):
    wrong, planned = [], 0
    for job in simulator.suite_jobs():
        used = {
            n: simulator.usage(plans, n)
            for n, plans in simulator.planned(job, list(simulator.LEAST))
            if plans
        }
        planned += bool(used)
        wrong += simulator.faults(job.name, used) if used else []
    assert wrong == []
    assert planned > 60


def items_that_ran(call):
    """Return how many items each loop of a call has."""
    _core.record_items(True)
    try:
        call()
        return [len(items) for items in _core.recorded_items()]
    finally:
        _core.record_items(False)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_planned_runs(simulator, threads, call):
    if call in cases.TENSOR_CALLS:
        pytest.importorskip("torch")
    lengths = (640, 200, 512) if call in ("kv_lengths", "varlen", "one by one") else ()
    of_cache = call in ("cache", "append", "pages")
    case = cases.Case(
        "a-case",
        1 if of_cache else 640,
        4000 if of_cache else 640,
        4,
        64,
        2,
        batch=3,
        lengths=lengths,
        call=call,
        is_causal=not lengths,
        at_end=of_cache,
    )
    job = simulator.of_case(case)
    prepared = job.prepare(True)
    for n, plans in simulator.planned(job, (1, 3)):
        assert len(plans) == {"append": 0, "one by one": 3}.get(call, 1)
        threads(n)
        phases = [phase for plan in plans for phase in plan.phases]
        assert items_that_ran(prepared) == [len(phase.first_step) - 1 for phase in phases]
        assert all(1 <= phase.threads <= n for phase in phases)
        assert all((phase.seconds >= 0).all() for phase in phases)
        assert simulator.duration(plans) <= sum(plan.seconds for plan in plans) + 1e-4


@pytest.mark.parametrize("bias", [None, (1, 2, 9, 9), (300, 2, 9, 9)], ids=str)
def test_what_is_planned_of_short_gradients_runs(simulator, threads, bias):
    operands = make_problem(9, 9, 16, heads=2, batch=(300,))
    options = {"bias": None if bias is None else np.zeros(bias, np.float32)}
    out, lse = fastattn.attention(*operands, return_lse=True, **options)

    def call():
        fastattn.attention_backward(
            out, *operands, out, lse, return_dbias=bias is not None, **options
        )

    for n in (1, 3, 96):
        (plan,) = simulator.plans_of(call, n)
        if n < 96:
            threads(n)
            assert items_that_ran(call) == [len(phase.first_step) - 1 for phase in plan.phases]
        assert len(plan.phases) == (2 if bias == (1, 2, 9, 9) else 1)
        assert (plan.phases[0].threads > 1) == (n > 1)


def test_planning_computes_nothing():
    query, key, value = make_problem(300, 300, heads=2)
    out = np.full_like(query, 7)

    def call():
        fastattn.attention(query, key, value, out=out)
        fastattn.attention(query, key, value, out=out)

    assert len(_core.schedule(call, 96)) == 2
    assert (out == 7).all()

    def fail():
        call()
        raise KeyError("planned")

    with pytest.raises(KeyError, match="planned"):
        _core.schedule(fail, 96)
    assert (out == 7).all()
    expected = fastattn.attention(query, key, value)
    call()
    assert_same_bits(out, expected)


@pytest.mark.promise("explain-says-what-runs")
def test_explain_with_threads(threads):
    operands = make_problem(2048, 2048, heads=12)
    for n in NUMBERS:
        threads(n)
        assert explain(*operands) == explain(*operands, threads=n)
    threads(2)
    assert explain(*operands, threads=96)["threads"] == 96
    assert explain(*operands)["threads"] == 2
    ((scratch_bytes, phases),) = _core.schedule(lambda: fastattn.attention(*operands), 96)
    assert explain(*operands, threads=96)["scratch_bytes"] == scratch_bytes
    assert phases[0][0] == 96


# (q_heads, kv_heads, q_len, kv_len, head_dim, value_head_dim)
SIZES = {
    "bert": (12, 12, 512, 512, 64, 64),
    "long": (2, 1, 65536, 65536, 64, 64),
    "one head": (1, 1, 128, 100_000, 128, 128),
    "few queries": (1, 1, 17, 1_000_000, 64, 64),
    "wide": (8, 8, 4096, 4096, 576, 512),
    "decode": (32, 8, 1, 8192, 128, 128),
    "decode each": (32, 32, 1, 32768, 128, 128),
    "draft": (32, 8, 16, 8192, 128, 128),
    "MLA decode": (128, 1, 1, 8192, 576, 512),
    "MLA draft": (128, 1, 4, 8192, 576, 512),
    "MLA": (128, 128, 2048, 2048, 192, 128),
}


@pytest.mark.promise("forward-memory")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_memory_at_any_number_of_threads(isa, size, dtype):
    q_heads, kv_heads, q_len, kv_len, head_dim, value_head_dim = SIZES[size]
    query = np.zeros((q_heads, q_len, head_dim), dtype)
    key = np.zeros((kv_heads, kv_len, head_dim), dtype)
    value = np.zeros((kv_heads, kv_len, value_head_dim), dtype)
    for options in ({}, {"window": (256, 0), "query_offset": kv_len - q_len}):
        most = {
            n: explain(query, key, value, threads=n, **options)["scratch_bytes"] / MIB
            for n in NUMBERS
        }
        assert max(most.values()) <= 16, most
