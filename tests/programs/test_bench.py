# SPDX-License-Identifier: Apache-2.0
"""The command line: a benchmark that counts rightly and survives its libraries; the self-test.

Calls fastattn.bench and `python -m fastattn`; no test depends on how long anything takes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn import __main__, _selftest, reference
from fastattn.bench import cases, libraries, measure, report, rivals
from fastattn.bench.accuracy import expected, max_error, sampled
from fastattn.bench.calls import CALLS, as_views
from fastattn.bench.cases import Case, Floor, promise
from fastattn.bench.libraries import PREPARE, missing
from fastattn.bench.operands import Unsupported

PATIENCE = 60
SMALL = [
    Case("plain", 70, 70, 2, 64),
    Case("batched", 33, 65, 2, 64, batch=3),
    Case("long-queries", 90, 33, 2, 64, batch=2),
    Case("causal", 70, 70, 2, 64, is_causal=True),
    Case("causal-gqa", 70, 70, 4, 64, kv_heads=2, is_causal=True),
    Case("gqa", 70, 70, 4, 64, kv_heads=2),
    Case("decode", 1, 90, 4, 64, kv_heads=2, bound_by=("read",)),
    Case("decode-each", 1, 90, 4, 64),
    Case("decode-ragged", 1, 90, 4, 64, kv_heads=2, batch=3, lengths=(90, 7, 41)),
    Case("draft", 5, 90, 4, 64, kv_heads=2, is_causal=True, at_end=True),
    Case("padded", 70, 70, 2, 64, batch=2, lengths=(70, 41)),
    Case("added", 70, 70, 2, 64, bias=True),
    Case("padded-added", 70, 70, 2, 64, batch=2, bias=True, lengths=(70, 41)),
    Case("window", 70, 70, 2, 64, window=(9, 4)),
    Case("left-window", 70, 70, 2, 64, window=(9, 0)),
    Case("double", 70, 70, 2, 16, dtype="float64"),  # onnxruntime rounds the scale of others
    *(
        Case(f"{name}-{dtype}", *sizes, 4, 64, kv_heads=2, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for name, sizes in (("half", (70, 70)), ("decode", (1, 90)))
    ),
    Case("views", 70, 70, 4, 64, kv_heads=2, is_causal=True, call="views"),
    Case("half-causal", 70, 70, 4, 64, dtype="bfloat16", is_causal=True),
    Case("half-draft", 5, 90, 4, 64, 2, 3, dtype="bfloat16", is_causal=True, at_end=True),
    Case("half-window", 70, 70, 2, 64, dtype="bfloat16", window=(9, 0)),
    Case("half-padded", 70, 70, 2, 64, batch=2, dtype="bfloat16", lengths=(70, 41)),
]
PACKED = {"lengths": (70, 41, 3), "batch": 3, "ragged_queries": True}
OWN = [  # the other ways in which fastattn is asked
    Case("into", 70, 70, 2, 16, batch=2, bias=True, lengths=(70, 41), call="into"),
    Case("into-filled", 70, 70, 2, 16, call="into filled"),
    Case("lengths", 1, 90, 4, 16, batch=2, lengths=(90, 41), call="kv_lengths"),
    Case("packed", 70, 70, 2, 16, **PACKED, call="varlen"),
    Case("packed-causal", 70, 70, 2, 16, **PACKED, is_causal=True, call="varlen"),
    Case("one-by-one", 70, 70, 2, 16, **PACKED, call="one by one"),
    Case("cache", 1, 90, 4, 16, kv_heads=2, call="cache"),
    Case("cache-draft", 5, 90, 4, 16, is_causal=True, at_end=True, call="cache"),
    Case("cache-int8", 1, 90, 4, 16, cache_dtype="int8", call="cache"),
    Case("append", 1, 90, 4, 16, kv_heads=2, bound_by=(), call="append"),
    Case("pages", 1, 200, 4, 16, kv_heads=2, batch=3, call="pages"),
    Case("pages-shared", 1, 200, 4, 16, kv_heads=2, batch=3, shared=150, call="pages"),
    Case("tensors", 1, 90, 4, 16, kv_heads=2, call="tensors"),
    Case("tensors-torch", 1, 90, 4, 16, kv_heads=2, call="tensors to fastattn.torch"),
    Case("drop-in", 20, 20, 4, 16, is_causal=True, call="drop-in"),
    Case("slept", 20, 20, 4, 16, sleep_ms=1, before="numpy"),
    Case("after-torch", 20, 20, 4, 16, before="torch"),
]
SCORES = [
    Case("softcap", 70, 70, 4, 32, kv_heads=2, is_causal=True, softcap=2.0),
    Case("alibi", 70, 70, 4, 32, is_causal=True, alibi=True),
    Case("alibi-draft", 5, 90, 4, 32, is_causal=True, at_end=True, alibi=True),
    Case("sinks", 1, 90, 4, 32, kv_heads=2, sinks=True),
    Case("sinks-window", 70, 70, 4, 32, kv_heads=2, window=(9, 0), sinks=True),
]
OF_VLLM = [  # what it has calls for too
    *SCORES,
    *(replace(x, head_dim=32) for x in OWN if x.call in ("kv_lengths", "varlen", "pages")),
]
BOUNDS = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 4e-2, "int8": 0.1}
UNKNOWN = {  # what a library does not compute in
    "vllm": ("float64",),
    "pace": ("float64", "float32", "float16"),
    "onnxruntime": ("bfloat16",),
    "openvino": ("float64", "float16"),
    "jax": ("float64", "float16"),
    "numpy": ("bfloat16", "float16"),
}
REFUSED = {  # what it cannot express, and what it says
    "vllm": {
        **dict.fromkeys(("added", "padded-added"), "knows no mask that is added"),
        "window": "no window whose sides differ",
    },
    "pace": {"half-bfloat16": "is always causal", "half-padded": "knows no mask"},
}
EVERY = [case for suite in cases.SUITES.values() for case in suite]


def by_name(items):
    return pytest.mark.parametrize("case", items, ids=lambda case: case.name)


def options(case, inputs):
    """Return what `attention` is told of a case."""
    return {
        "mask": inputs.mask,
        "bias": inputs.bias,
        "is_causal": case.is_causal,
        "window": case.window,
        "query_offset": case.query_offset,
    } | cases.score_options(case)


@pytest.fixture
def member():
    """Start the worker of a library; end it afterwards."""
    started = []

    def start(library, isa=None):
        if absent := missing(library):
            pytest.skip(f"{' and '.join(absent)} not installed")
        started.append(measure.Member(library, 2, isa))
        return started[-1]

    yield start
    for each in started:
        each.close()


# ---- What is measured


@by_name(SMALL + OWN)
def test_flops_count_visible_pairs(case):
    inputs = cases.make_inputs(case)
    query = np.ones((case.batch, 1, case.q_len, 1))
    weights = fastattn.attention_weights(
        query,
        np.ones((case.batch, 1, case.kv_len, 1)),
        mask=inputs.mask,
        is_causal=case.is_causal,
        window=case.window,
        query_offset=case.query_offset,
    )
    if case.ragged_queries:
        weights = [x[:, :n] for x, n in zip(weights, case.lengths, strict=True)]
    pairs = sum(np.count_nonzero(x) for x in weights)
    assert cases.visible_pairs(case) == pairs
    assert cases.flops(case) == 4 * case.head_dim * case.q_heads * pairs


def test_bytes_count_what_is_read_once():
    result = 3 * 4 * 2 * 16  # of (batch, q_heads, q_len, head_dim)
    case = Case("bytes", 2, 90, 4, 16, kv_heads=2, batch=3, bound_by=("read",))
    token = 2 * 2 * 16  # a key and a value of each kv_head
    assert cases.work(case) == {"read": 4 * (2 * result + 3 * 90 * token)}
    for changes, expected_bytes in (
        ({"dtype": "bfloat16"}, 2 * (2 * result + 3 * 90 * token)),
        ({"dtype": "float16", "cache_dtype": "int8"}, 2 * 2 * result + 3 * 90 * token),
        ({"lengths": (90, 7, 41)}, 4 * (2 * result + (90 + 7 + 41) * token)),
        ({"shared": 80}, 4 * (2 * result + (80 + 3 * 10) * token)),
    ):
        assert cases.bytes_moved(replace(case, **changes)) == expected_bytes
    packed = Case("packed", 70, 70, 2, 16, **PACKED)
    assert cases.bytes_moved(packed) == 4 * 4 * (70 + 41 + 3) * 2 * 16


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        ("float64", "float64"),
        ("float32", "float32"),
        ("float16", "float32"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_work_is_named_by_its_limit(dtype, limit):
    case = Case("work", 1, 90, 4, 16, dtype=dtype)
    flops = {limit: cases.flops(case)}
    read = {"read": cases.bytes_moved(case)}
    for bound_by, amounts in (
        (("arithmetic",), flops),
        (("read",), read),
        (("read", "arithmetic"), read | flops),
        ((), {}),
    ):
        assert cases.work(replace(case, bound_by=bound_by)) == amounts


def test_what_is_shared_is_the_same():
    _, key, value, *_ = cases.make_inputs(OWN[-1])
    for x in (key, value):
        assert (x[1:, :, :150] == x[:1, :, :150]).all()
        assert (x[1:, :, 150:] != x[:1, :, 150:]).any(axis=(1, 2, 3)).all()


@by_name(SMALL + SCORES)
def test_sampled_rows_are_those_of_the_definition(case):
    inputs = cases.make_inputs(case)
    wide = [x.astype(np.float64) for x in inputs[:3]]
    full = reference.attention(*wide, **options(case, inputs))
    np.testing.assert_allclose(expected(case), full[np.ix_(*sampled(case))], rtol=1e-12)


def test_names_are_unique_and_sizes_sound():
    assert len({case.name for case in EVERY}) == len(EVERY)
    for case in EVERY:
        assert case.q_heads % (case.kv_heads or case.q_heads) == 0
        assert not case.lengths or len(case.lengths) == case.batch
        assert cases.shrunk(case).kv_len <= 64
        assert case.call in CALLS
        assert ("baseline" in case.floor.speedups) == (case.baseline is not None)
        assert case.floor.speedups.keys() <= {"best", "baseline", *PREPARE} - {"fastattn"}
        if case.libraries:
            assert case.floor.speedups.keys() <= {"best", "baseline", *case.libraries}
    assert set(cases.QUICK) <= {case.name for case in cases.FAMILIAR}


def test_processes_make_the_same_inputs():
    first, second = (cases.make_inputs(SMALL[7]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


# ---- The libraries


@pytest.mark.parametrize("library", PREPARE)
def test_library_computes_attention(library, member):
    worker = member(library)
    for case in SMALL:
        if case.dtype in UNKNOWN.get(library, ()):
            with pytest.raises(measure.Failure, match=f" {case.dtype}"):
                worker.ask(PATIENCE, "prepare", case)
            continue
        if reason := REFUSED.get(library, {}).get(case.name):
            with pytest.raises(measure.Failure, match=reason):
                worker.ask(PATIENCE, "prepare", case)
            continue
        _, rows = worker.ask(PATIENCE, "prepare", case)
        assert max_error(rows, expected(case)) < BOUNDS[case.dtype], case
        assert all(seconds > 0 for seconds in worker.ask(PATIENCE, "measure", 0.0)), case


@by_name(OF_VLLM)
def test_vllm_computes_what_few_can(case, member):
    _, rows = member("vllm").ask(PATIENCE, "prepare", case)
    assert max_error(rows, expected(case)) < BOUNDS[case.dtype]


def test_pace_has_sinks(member):
    case = replace(SCORES[-1], dtype="bfloat16")
    _, rows = member("pace").ask(PATIENCE, "prepare", case)
    assert max_error(rows, expected(case)) < BOUNDS[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case("first", 5, 90, 2, 32, is_causal=True),  # its queries stand at the first keys
        Case("padded", 70, 70, 2, 32, batch=2, lengths=(70, 41), is_causal=True),
    ],
    ids=lambda case: case.name,
)
def test_vllm_wants_the_last_query_at_the_last_key(case, member):
    with pytest.raises(measure.Failure, match="wants the last query at the last key"):
        member("vllm").ask(PATIENCE, "prepare", case)


@pytest.mark.parametrize("library", ["vllm", "pace"])
@pytest.mark.parametrize("window", [(None, 3), (3, None), (9, 4)])
def test_rivals_know_no_window_whose_sides_differ(library, window):
    case = Case("sides", 70, 70, 2, 32, dtype="bfloat16", window=window)
    with pytest.raises(Unsupported, match="knows no window whose sides differ"):
        PREPARE[library](case, cases.make_inputs(case), 2)


@by_name(SCORES)
@pytest.mark.parametrize("library", [x for x in PREPARE if x not in ("fastattn", "vllm")])
def test_scores_that_a_library_does_not_know_are_refused(library, case):
    case = replace(case, sinks=case.sinks and library != "pace")  # which has them
    for name in cases.score_options(case):
        with pytest.raises(Unsupported, match=f"knows no {name}$"):
            PREPARE[library](case, cases.make_inputs(case), 2)


@pytest.mark.parametrize("library", rivals.PREPARE)
def test_rivals_are_found_in_folders_of_their_own(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if "site-packages" not in x])
    distribution = rivals.DISTRIBUTIONS[library]
    package = tmp_path / distribution / library
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    assert distribution in missing(library)  # without operators it is of no use
    assert __main__.main(["bench", "--libraries", library]) == 2
    assert f"{distribution}: run benchmarks/rivals.sh" in capsys.readouterr().err
    files = ("_C.abi3.so", "_C_AVX512.abi3.so", "_C_AVX2.abi3.so")
    for file in (*files, "libzentorch.so", "lib/libpace_cpp.so"):
        (package / file).touch()
    about = tmp_path / distribution / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.2.3\n")
    assert distribution not in missing(library)
    assert rivals.operators(library).is_relative_to(package)
    assert measure.description([library], 2)["versions"][library] == "1.2.3"


def test_views_are_laid_out_as_a_model_does():
    inputs = cases.make_inputs(SMALL[1])
    for x, y in zip(inputs[:3], as_views(inputs)[:3], strict=True):
        assert np.array_equal(x, y)
        assert y.swapaxes(1, 2).flags.c_contiguous


@by_name(OWN + SCORES)
def test_ways_to_ask_fastattn(case):
    if case.call in cases.TENSOR_CALLS:
        pytest.importorskip("torch")
    prepared = CALLS[case.call](case, cases.make_inputs(case))
    prepared.call()  # a call must leave what the next one needs
    rows = prepared.to_numpy(prepared.call())[np.ix_(*sampled(case))]
    assert max_error(rows, expected(case)) < BOUNDS[case.cache_dtype or case.dtype]


@by_name([x for x in SMALL if x.q_len < x.kv_len and x.dtype != "bfloat16"])
def test_each_operator_of_onnxruntime_decodes(case):
    if absent := missing("onnxruntime"):
        pytest.skip(f"{' and '.join(absent)} not installed")
    models = [build(case, cases.make_inputs(case)) for build in libraries.ONNX_OPERATORS]
    assert models[0] is None or models[0].in_place  # it need not copy the cache
    for model in filter(None, models):
        prepared = libraries._onnx_session(model, case, 2)
        rows = prepared.to_numpy(prepared.call())[np.ix_(*sampled(case))]
        assert max_error(rows, expected(case)) < BOUNDS[case.dtype], model.operator


@pytest.mark.parametrize("isa", fastattn.info()["isas"])
def test_worker_runs_the_instruction_set(isa, member):
    worker = member("fastattn", isa)
    assert worker.ask(PATIENCE, "probe", "float32", 0.01) > 0
    environ = (Path("/proc") / str(worker._process.pid) / "environ").read_bytes()
    assert f"FASTATTN_ISA={isa}".encode() in environ.split(b"\0")


def test_extra_memory_is_measured(member):
    case = Case("memory", 1024, 1024, 4, 64)
    scores = 4 * case.q_heads * case.q_len * case.kv_len
    ours, of_numpy = (
        member(library).ask(PATIENCE, "prepare", case)[0]["extra_bytes"]
        for library in ("fastattn", "numpy")
    )
    if ours is None:
        pytest.skip("this system does not tell the peak")
    assert ours < 4 << 20
    assert 0.9 * scores < of_numpy < 3 * scores


# ---- What goes wrong in a worker


def test_an_error_is_an_answer(member):
    worker = member("fastattn")
    with pytest.raises(measure.Failure, match="kv_heads"):
        worker.ask(PATIENCE, "prepare", Case("bad", 8, 8, 3, 8, kv_heads=2))
    assert worker.ask(PATIENCE, "prepare", SMALL[0])


def test_a_call_that_cannot_fit_is_an_answer(member):
    with pytest.raises(measure.Failure, match="not enough memory"):
        member("numpy").ask(PATIENCE, "prepare", Case("huge", 2**21, 2**21, 1, 1))


def test_a_dead_worker_is_replaced(member):
    worker = member("numpy")
    worker.ask(PATIENCE, "prepare", SMALL[0])
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(measure.Failure, match="killed"):
        worker.ask(PATIENCE, "measure", 0.0)
    assert worker.ask(PATIENCE, "prepare", SMALL[0])


def test_a_slow_worker_is_given_up(member):
    worker = member("numpy")
    with pytest.raises(measure.Failure, match=r"no answer within 0\.01 s"):
        worker.ask(0.01, "prepare", SMALL[0])
    assert worker.ask(PATIENCE, "prepare", SMALL[0])


def test_a_broken_import_is_a_reason():
    with pytest.raises(measure.Failure, match=r"exit status 1: ModuleNotFoundError: .*abacus"):
        measure.Member("abacus", 2).ask(PATIENCE, "prepare", SMALL[0])


def test_an_instruction_set_that_is_not_there_is_a_reason(member):
    with pytest.raises(measure.Failure, match="abacus"):
        member("fastattn", "abacus").ask(PATIENCE, "prepare", SMALL[0])


def test_a_run_goes_on_without_a_library_that_fails(monkeypatch):
    ask = measure.Member.ask

    def failing(self, patience, request, *arguments):
        if self._who[0] == "numpy":
            raise measure.Failure("it rains")
        return ask(self, patience, request, *arguments)

    monkeypatch.setattr(measure.Member, "ask", failing)
    pace = measure.Pace(rounds=2, quiet_seconds=0, turn_seconds=0.01)
    bench = measure.Bench(["fastattn", "numpy"], 2, pace, lambda text: None)
    try:
        [result] = bench.run([SMALL[0]])
    finally:
        bench.close()
    assert result["libraries"]["numpy"] == {"failure": "it rains"}
    assert [list(x["samples"]) for x in result["rounds"]] == [["fastattn"]] * pace.rounds
    assert result["libraries"]["fastattn"]["percent"] > 0


@pytest.fixture
def answers(monkeypatch):
    """Replace the workers: limits of 1e9, and calls that take a second, in float32 two."""

    def ask(self, library, isa, request, *arguments):
        if request == "probe":
            return 1e9
        if request == "prepare":
            asked[library] = arguments[0]
            rows = np.zeros((*map(len, sampled(arguments[0])), 16))
            return {"how": "call", "first_seconds": 0.1, "extra_bytes": 0}, rows
        return [2.0 if asked[library].dtype == "float32" else 1.0]

    asked = {}
    monkeypatch.setattr(measure.Bench, "_ask", ask)
    monkeypatch.setattr(measure.Bench, "_disturbance", lambda self, since: 0.0)
    return asked


def test_baseline_takes_turns_with_its_case(answers):
    case = Case("half", 70, 70, 2, 16, dtype="float16", libraries=("fastattn",))
    case = replace(case, baseline=replace(case, name="in float32", dtype="float32"))
    bench = measure.Bench(["fastattn", "numpy"], 2, measure.Pace(rounds=2), lambda text: None)
    [result] = bench.run([case])
    assert answers == {"fastattn": case, "baseline": case.baseline}
    assert [list(x["samples"]) for x in result["rounds"]] == [["fastattn", "baseline"]] * 2
    ours, other = result["libraries"].values()
    assert other["speedup"] == 2
    assert other["percent"] == ours["percent"] / 2
    assert other["how"] == "call, in float32"


def test_tensors_have_processes_with_torch(monkeypatch):
    pytest.importorskip("torch")
    case = next(case for case in EVERY if case.call == "tensors")
    case, other = (replace(x, kv_len=90) for x in (case, case.baseline))
    pace = measure.Pace(rounds=1, quiet_seconds=0, turn_seconds=0.01)
    with closing(measure.Bench(["fastattn"], 2, pace, lambda text: None)) as bench:
        [result] = bench.run([replace(case, baseline=other)])
        for member in bench._members.values():
            command = Path(f"/proc/{member._process.pid}/cmdline").read_text()
            assert "import torch, fastattn;" in command  # its threads are torch's then
    ours, theirs = result["libraries"].values()
    assert ours["how"].startswith("fastattn.attention behind an operator of torch")
    assert theirs["how"].startswith("fastattn.torch.attention behind an operator of torch")
    assert max(ours["max_error"], theirs["max_error"]) < BOUNDS["float32"]


@pytest.mark.parametrize("bound_by", [("arithmetic",), ("read",), ("read", "arithmetic"), ()])
def test_limit_is_the_sum_of_what_bounds(bound_by, answers):
    case = Case("sum", 2, 90, 4, 16, dtype="bfloat16", bound_by=bound_by)
    bench = measure.Bench(["fastattn"], 2, measure.Pace(rounds=1), lambda text: None)
    [result] = bench.run([case])
    amounts = cases.work(case)
    assert result["limits"] == dict.fromkeys(amounts, 1e9)
    percent = result["libraries"]["fastattn"]["percent"]
    assert percent == (pytest.approx(sum(amounts.values()) / 1e7) if bound_by else None)


# ---- What is shown


def outcome(seconds, **changes):
    """Return what measure.py says of one library."""
    return {
        "how": "call",
        "first_seconds": seconds,
        "extra_bytes": 3 << 20,
        "max_error": 1.25e-7,
        "seconds": seconds,
        "percent": 0.08 / seconds,
        "speedup": seconds / 1e-3,
    } | changes


def a_run(floor=Floor()):  # noqa: B008
    """Return a run of one case in which jax failed."""
    ours = outcome(1e-3)
    del ours["speedup"]
    result = {
        "name": "a-case",
        "isa": None,
        "title": "A case\nof two lines",
        "work": {"float32": 8e8},
        "pairs": 1000,
        "limits": {"float32": 1e12},
        "rounds": [{"disturbance": 0.01, "rates": {"float32": 1e12}, "samples": {}}],
        "floor": asdict(floor),
        "libraries": {
            "fastattn": ours,
            "baseline": outcome(0.9e-3),
            "torch": outcome(1.5e-3),
            "onnxruntime": outcome(1.2e-3),
            "jax": {"failure": "not enough memory"},
            "numpy": outcome(1.1e-3),
        },
    }
    return {
        "suite": "floors",
        "command": "fastattn bench",
        "machine": dict(fastattn.info()),
        "versions": {"fastattn": "1", "torch": "2"},
        "limits": {"float32": 1e12, "float64": 5e11, "bfloat16": 2e12, "read": 3e10},
        "results": [result],
    }  # fmt: skip


def test_table_of_markdown():
    text = report.table(a_run(), markdown=True)
    header, ruler, row = text.splitlines()[:3]
    assert header.count("|") == ruler.count("|") == row.count("|")
    assert "**80 % (1.00 ms)**" in row
    assert "1.20x onnxruntime" in row  # neither numpy nor the baseline is a peer
    assert "A case, of two lines" in row
    assert "- [1]" in row
    assert "[1] jax: not enough memory" in text
    assert "1000 GFLOP/s fp32 FMA, 500 GFLOP/s fp64 FMA, 2000 GFLOP/s bf16 dot" in text
    assert "30 GB/s memory read" in text


def test_block_has_a_line_per_library():
    lines = report.block(a_run()["results"][0]).splitlines()
    assert lines[0] == "a-case: A case, of two lines"
    assert re.split("  +", lines[4]) == [
        *("torch", "1.50 ms", "53 %", "1.50x as fast", "1.2e-07", "3.0 MiB", "call")
    ]
    assert lines[6].endswith("not enough memory")


@pytest.mark.parametrize(
    ("floor", "verdict"),
    [
        (promise(80.0, best=1.2), "met"),
        (promise(81.9), "within 2 points"),
        (promise(82.1), "missed"),
        (promise(best=1.21), "within 2 points"),
        (promise(torch=1.4), "met"),
        (promise(torch=1.4, onnxruntime=1.23), "missed"),
        (promise(torch=1.51, best=1.2), "within 2 points"),
        (promise(numpy=1.2), "missed"),
        (promise(80.0, jax=1.0), "not measured"),
        (promise(openvino=1.0), "not measured"),
        (promise(baseline=0.89), "met"),
        (promise(baseline=0.95), "missed"),
        (promise(extra_mebibytes=3.0), "met"),
        (promise(extra_mebibytes=2.0), "missed"),
    ],
)
def test_verdict_on_a_floor(floor, verdict):
    text, kept = report.floors(a_run(floor))
    assert text.splitlines()[1].endswith("  " + verdict)
    assert kept == (verdict in ("met", "within 2 points"))


def test_floors_name_their_peers():
    text, _ = report.floors(a_run(promise(torch=1.4, baseline=1 / 1.05)))
    assert "1.50x torch, 0.90x baseline  1.4x, 0.952x" in text
    assert report.floors(a_run()) == ("", True)


def test_growth_is_time_per_pair():
    row = report.growth(a_run()).splitlines()[1]
    assert re.split("  +", row)[1:] == ["1000", "900", "1500", "1200", "-", "1100"]


def test_noise_is_said():
    run = a_run()
    noisy = json.loads(json.dumps(run["results"][0]))
    noisy["limits"]["float32"] = 7e11
    run["results"].append(noisy)
    noisy["rounds"][0]["disturbance"] = 0.5
    text = report.table(run, markdown=False)
    assert "its limit varied from 700 to 1000 GFLOP/s fp32 FMA" in text
    assert "Other programs disturbed 1 of 2 rounds" in text


def test_units():
    durations = [report.duration(x) for x in (12.3, 1.0, 0.9999, 123.4e-6, 4.5e-6)]
    assert durations == ["12.3 s", "1.00 s", "1000 ms", "123 us", "4.50 us"]
    assert [report.memory(x) for x in (None, 0, 3 << 20, 5 << 30)] == [
        "-",
        "0.0 MiB",
        "3.0 MiB",
        "5.0 GiB",
    ]


def test_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from fastattn.bench import chart

    chart.save(a_run(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_chart_names_the_version_of_a_rival():
    pytest.importorskip("matplotlib")
    from fastattn.bench import chart

    run = {"machine": {"version": "1"}, "versions": {"torch": "2", "vllm": "3"}}
    assert [chart._named(run, x) for x in ("fastattn", "torch", "vllm")] == [
        "fastattn 1",
        "torch 2",
        "vllm 3",
    ]


# ---- The commands


def command(*arguments):
    return [sys.executable, "-m", "fastattn", *arguments]


def test_bench_from_end_to_end(tmp_path):
    kept = tmp_path / "run.json"
    arguments = ("bench", "--case", "tiny", "--libraries", "numpy", "--quick", "--markdown")
    done = subprocess.run(
        command(*arguments, "--json", str(kept)), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| case | fastattn | numpy |")
    assert "tiny" in done.stderr
    run = json.loads(kept.read_text())
    assert run["limits"].keys() == {"float32", "float64", "bfloat16", "read"}
    assert run["machine"]["isa"] in run["machine"]["isas"]
    [result] = run["results"]
    assert list(result["libraries"]) == ["fastattn", "numpy"]
    for a_round in result["rounds"]:
        assert a_round["rates"]["float32"] > 0
        assert all(min(a_round["samples"][library]) > 0 for library in result["libraries"])
    again = subprocess.run(
        command("bench", "--from", str(kept), "--markdown"), capture_output=True, text=True
    )
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "nothing"), "--case must be one of bert-128, .*, got nothing"),
        (("--libraries", "abacus"), "--libraries must be of fastattn, .*, got abacus"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--from", "no-such-file"), "no-such-file"),
    ],
)
def test_bench_refuses(arguments, message, capsys):
    assert __main__.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert __main__.main(["bench", "--plot", "x.png"]) == 2
    assert "pip install 'fastattn[bench]'" in capsys.readouterr().err


def test_interrupt_ends_the_workers():
    process = subprocess.Popen(
        command("bench", "--case", "tiny", "--case", "growth-64k", "--libraries", "numpy"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("numpy "):  # the first case is done, the next one takes long
            break
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert "speed-up" in rest  # the table of what was done
    time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_info(capsys):
    assert __main__.main(["info"]) == 0
    assert fastattn.info()["cpu"] in capsys.readouterr().out


def test_selftest_passes(monkeypatch, capsys):
    monkeypatch.setattr(_selftest, "SIZES", _selftest.SIZES[:4])
    assert __main__.main(["selftest"]) == 0
    text = capsys.readouterr().out
    assert "all is well" in text
    for isa in fastattn.info()["isas"]:
        assert f"{isa}, float32" in text
        assert f"{isa}, float64" in text


def test_selftest_fails(monkeypatch, capsys):
    attention = fastattn.attention
    monkeypatch.setattr(_selftest, "SIZES", _selftest.SIZES[:1])
    monkeypatch.setattr(
        fastattn, "attention", lambda *a, **k: attention(*a, **k) * np.float32(1.001)
    )
    assert __main__.main(["selftest"]) == 1
    assert "FAILED: no feature at (1, 1, 1, 1, 1, 1)" in capsys.readouterr().out
