# SPDX-License-Identifier: Apache-2.0
"""`fastattn bench --device cuda`: it counts and times rightly on a GPU that a test makes up.

What is made up is in fake_torch.py; how long its attentions take is known here, and so is what the
command must then say. The command's other parts are in test_bench.py.
"""
# ruff: noqa: E501 - the tables have a line per case

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn import __main__
from fastattn.bench import cases, gpu, gpu_libraries, libraries, measure, report, worker
from fastattn.bench.accuracy import expected, max_error, sampled
from fastattn.bench.cases import Case, Floor, promise_of_h200
from tests.programs import fake_torch
from tests.programs.test_bench import PATIENCE, by_name
from tests.support import child

GPU_SECONDS = {
    "wgmma": 1e-3,
    "mma": 1.6e-3,
    "flash": 1.25e-3,
    "cudnn": 0.8e-3,
    "efficient": None,  # has no kernel
    "flex": 2e-3,
    "wgmma backward": 3e-3,
    "flash backward": 4e-3,
    "cudnn backward": 2.5e-3,
    "flex backward": 9e-3,
}
HOST_SECONDS = {"wgmma": 30e-6, "mma": 30e-6, "flash": 12e-6, "cudnn": 25e-6, "flex": 90e-6}
LIBRARIES = ["fastattn", "torch-flash", "torch-cudnn", "torch-efficient"]
SIZE = {"head_dim": 128, "dtype": "bfloat16", "device": "cuda"}
PLAIN = Case("plain", 96, 96, 2, **SIZE, batch=2)
SMALL = [
    PLAIN,
    replace(PLAIN, name="causal", is_causal=True),
    replace(PLAIN, name="by-mma", isa="mma", libraries=("fastattn",)),
    replace(PLAIN, name="backward", call="backward"),
    replace(PLAIN, name="backward-causal", call="backward", is_causal=True),
    Case("decode", 1, 96, 4, **SIZE, kv_heads=2, bound_by=("read",)),
    replace(PLAIN, name="launch", call="launch", bound_by=()),
]


@pytest.fixture
def world(monkeypatch):
    """Put a GPU that is made up, and its host's clock, in the place of the real ones."""
    made_up = fake_torch.World(GPU_SECONDS, HOST_SECONDS)
    monkeypatch.setattr(measure, "Member", fake_torch.member_in_this_process(made_up, monkeypatch))
    monkeypatch.setattr(measure.Bench, "_disturbance", lambda self, since: 0.0)
    for module in (worker, gpu):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made_up.perf_counter))
    monkeypatch.setitem(cases.SUITES_OF, "cuda", {"gpu": SMALL})
    monkeypatch.setitem(sys.modules, "torch", fake_torch.Torch(made_up))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    return made_up


@pytest.fixture
def bench(world):
    """Return a run of small cases on it."""
    pace = measure.Pace(rounds=2, turn_seconds=0.02)

    def run(*chosen, names=LIBRARIES):
        each = measure.Bench(names, 1, pace, lambda text: None, "cuda")
        return list(each.run(chosen))

    return run


# ---- What is measured


def test_cases_of_a_gpu():
    assert len({case.name for case in cases.GPU}) == len(cases.GPU)
    for case in cases.GPU:
        assert case.device == "cuda"
        assert case.dtype == "bfloat16"
        assert case.call in cases.GPU_CALLS
        assert case.floor.speedups.keys() <= libraries.LIBRARIES["cuda"].keys()
        if case.name.startswith(("fwd", "bwd")):
            assert case.batch * case.q_len == 16384
            assert case.q_heads * case.head_dim == 2048
    assert set(cases.GPU_QUICK) <= {case.name for case in cases.GPU}
    assert {(x.q_len, x.is_causal) for x in cases.GPU if x.name.startswith("fwd")} == {
        (tokens, is_causal) for tokens in (512, 2048, 8192, 16384) for is_causal in (False, True)
    }


@by_name([x for x in cases.GPU if x.bound_by == ("arithmetic",)])
def test_work_is_as_papers_count_it(case):
    usual = 4 * case.q_len**2 * case.head_dim * case.q_heads * case.batch
    usual *= 2.5 if case.call == "backward" else 1
    [(limit, flops)] = cases.work(case).items()
    assert limit == "matmul"
    if case.is_causal:  # half, and the diagonal whole
        assert flops == pytest.approx(usual / 2 * (1 + 1 / case.q_len))
    else:
        assert flops == usual


def test_decoding_is_held_to_a_copy():
    case = {x.name: x for x in cases.GPU}["decode-16k-x16"]
    keys, rows = 2 * 16 * 8 * 16384 * 128, 2 * 16 * 32 * 128
    assert cases.work(case) == {"copy": 2 * (keys + rows)}


# ---- The clock


@pytest.mark.parametrize("library", ["fastattn", "torch-flash", "torch-cudnn", "triton"])
@by_name([x for x in SMALL if x.isa is None])
def test_time_is_that_of_the_gpu(case, library, world, bench):
    form = {"fastattn": "wgmma", "triton": "flex"}.get(library, library[6:])
    backward = " backward" if case.call == "backward" else ""
    seconds = HOST_SECONDS[form] if case.call == "launch" else GPU_SECONDS[form + backward]
    [result] = bench(case, names=list(dict.fromkeys(("fastattn", library))))
    outcome = result["libraries"][library]
    assert outcome["seconds"] == pytest.approx(seconds, rel=1e-3)
    assert outcome["max_error"] < 4e-2
    assert outcome["extra_bytes"] == fake_torch.EXTRA_BYTES
    limits = {"matmul": fake_torch.MATMUL_RATE, "copy": fake_torch.COPY_RATE}
    assert result["limits"] == pytest.approx({x: limits[x] for x in cases.work(case)})
    if case.call == "launch":
        assert outcome["percent"] is None
    else:
        [(limit, amount)] = result["work"].items()
        percent = 100 * amount / limits[limit] / seconds
        assert outcome["percent"] == pytest.approx(percent, rel=1e-3)


def test_keys_of_decoding_are_cold(world, bench):
    for case in SMALL:
        world.done.clear()
        [result] = bench(case, names=["fastattn"])
        samples = sum(len(x["samples"]["fastattn"]) for x in result["rounds"])
        flushed = ",".join(world.done).count("flush,event,wgmma,event")
        assert flushed == (samples if case.name == "decode" else 0)
        assert world.done.count("flush") == flushed


def test_a_worse_result_is_seen(world, bench, monkeypatch):
    attention = fake_torch.Torch.attention

    def wrong(self, query, key, value, **how):
        return attention(self, query, key, value, **(how | {"is_causal": False}))

    monkeypatch.setattr(fake_torch.Torch, "attention", wrong)
    [result] = bench(SMALL[1], names=["fastattn"])
    assert result["libraries"]["fastattn"]["max_error"] > 0.1


def test_how_libraries_are_asked(bench):
    results = {x["name"]: x["libraries"] for x in bench(*SMALL, names=[*LIBRARIES, "triton"])}
    hows = {
        (name, library): outcome.get("how") or outcome["failure"]
        for name, outcomes in results.items()
        for library, outcome in outcomes.items()
    }
    assert list(results["by-mma"]) == ["fastattn"]
    assert hows["plain", "fastattn"] == "cuda.attention(): wgmma"
    assert hows["by-mma", "fastattn"] == "cuda.attention(): mma"
    assert hows["backward", "fastattn"] == "cuda.attention_backward(): wgmma"
    sdpa = "scaled_dot_product_attention"
    assert hows["causal", "torch-flash"] == f"{sdpa}(is_causal), FLASH_ATTENTION"
    assert hows["decode", "torch-cudnn"] == f"{sdpa}(enable_gqa), CUDNN_ATTENTION"
    assert hows["plain", "torch-efficient"] == "No available kernel. Aborting execution."
    assert hows["decode", "triton"] == "torch.compile(flex_attention)(enable_gqa)"
    flex = "torch.compile(flex_attention)(block_mask)"
    assert hows["backward-causal", "triton"] == f"autograd.grad of {flex}"


def errors_of_torch():
    """Return errors of the real PyTorch, its CPU for a GPU, and which backends are then allowed."""
    torch = importlib.import_module("torch")
    tensor = gpu_libraries.tensor
    gpu_libraries.tensor = lambda x, device: tensor(x)
    errors = []
    for case in SMALL:
        inputs = cases.make_inputs(case)
        prepared = libraries.LIBRARIES["cuda"]["torch-flash"](case, inputs, 1)
        prepared.call()
        rows = prepared.to_numpy(prepared.call())[np.ix_(*sampled(case))]
        errors.append(max_error(rows, expected(case)))
    allowed = [torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled()]
    return errors, allowed


def test_torch_is_asked_what_it_can_answer():
    pytest.importorskip("torch")
    errors, allowed = child.run(errors_of_torch, timeout=2 * PATIENCE)
    assert len(errors) == len(SMALL)
    assert max(errors) < 4e-2
    assert allowed == [True, False]  # the backend stays forced


def test_compiling_is_done_before_the_clock_starts(world):
    torch = fake_torch.Torch(world)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in torch.modules.items():
            patch.setitem(sys.modules, name, module)
        libraries.LIBRARIES["cuda"]["triton"](PLAIN, cases.make_inputs(PLAIN), 1)
    assert world.done == ["flex"]
    assert torch.resets == 1
    assert torch.config.donated_buffer is False


# ---- What is missing


def no_gpu(text):
    def init():
        raise RuntimeError(text)

    return SimpleNamespace(is_available=lambda: False, init=init)


MISSING = {
    "torch": (None, "--device cuda needs PyTorch, which is not installed: pip install torch"),
    "CUDA": ({"version": SimpleNamespace(cuda=None), "__version__": "2.99+cpu"}, "--device cuda needs a PyTorch that was built for CUDA, this is 2.99+cpu: https://pytorch.org/get-started"),
    "GPU": ({"cuda": no_gpu("No CUDA GPUs are available")}, "--device cuda found no GPU (No CUDA GPUs are available): see nvidia-smi, CUDA_VISIBLE_DEVICES"),
    "driver": ({"cuda": no_gpu("Found no NVIDIA driver on your system. Please check that " + 99 * "x")}, "--device cuda found no GPU (Found no NVIDIA driver on your system): see nvidia-smi, CUDA_VISIBLE_DEVICES"),
    "working GPU": ({"cuda": SimpleNamespace(is_available=lambda: False, init=lambda: None)}, "--device cuda found no GPU (none is visible): see nvidia-smi, CUDA_VISIBLE_DEVICES"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_said(changes, text, world, monkeypatch, capsys):
    def changed(world, **more):
        torch = fake_torch.Torch(world, **more)
        for name, value in (changes or {}).items():
            setattr(torch, name, value)
        if changes is None:
            torch.modules["torch"] = None
        return torch

    monkeypatch.setattr(
        measure, "Member", fake_torch.member_in_this_process(world, monkeypatch, changed)
    )
    assert __main__.main(["bench", "--device", "cuda", "--case", "plain"]) == 2
    assert capsys.readouterr() == ("", f"fastattn bench: {text}\n")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_a_worker_without_a_gpu():
    """In a process of its own, with whatever PyTorch there is."""
    member = measure.Member("fastattn", 1, "mma", "cuda")
    try:
        with pytest.raises(measure.Failure, match=r"^--device cuda (needs|found no GPU)"):
            member.ask(PATIENCE, "describe")
        environ = (Path("/proc") / str(member._process.pid) / "environ").read_bytes()
    finally:
        member.close()
    assert b"FASTATTN_CUDA_KERNEL=mma" in environ.split(b"\0")
    assert b"FASTATTN_ISA=mma" not in environ.split(b"\0")


def test_out_of_memory_is_said_shortly():
    text = "CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total capacity of 23 GiB"
    assert worker._reason(RuntimeError(text)) == "not enough memory"


@pytest.mark.promise("cpu-needs-no-gpu")
def test_the_cpu_needs_nothing_of_a_gpu():
    code = (
        "import sys; from fastattn.__main__ import main; from fastattn.bench import measure; "
        "measure.QUICK_PACE = measure.Pace(rounds=1, most_rounds=1, turn_seconds=0.01); "
        "main(['bench', '--case', 'one-by-one', '--libraries', 'numpy', '--quick']); "
        "print(sorted({'torch', 'numba', 'cuda', 'fastattn.cuda'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "familiar"), "--suite must be one of gpu with --device cuda, got familiar"),
        (("--case", "bert-128"), "--case must be one of plain, .*, got bert-128"),
        (("--libraries", "openvino"), "--libraries must be of fastattn, torch-flash, .*, triton, "),
        (("--libraries", "triton"), "--libraries: triton needs triton: pip install it"),
    ],
)
def test_bench_refuses(arguments, message, world, capsys):
    assert __main__.main(["bench", "--device", "cuda", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_suite_of_gpus_is_not_for_the_cpu(capsys):
    assert __main__.main(["bench", "--suite", "gpu"]) == 2
    assert "--suite must be one of familiar, " in capsys.readouterr().err


# ---- What the GPU is called


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            'echo "560.35.03, 1980, 3201, [N/A]"',
            {"driver": "560.35.03", "clock_mhz": "1980", "memory_clock_mhz": "3201"},
        ),
        ("exit 6", {}),
        ("", {}),
    ],
)
def test_what_nvidia_smi_tells(script, found, tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    asked = "--id=GPU-1-2 --query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    check = f'[ "$*" = "{asked} --format=csv,noheader,nounits" ] || exit 9\n'
    command.write_text(f"#!/bin/sh\n{check}{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu.asked_of_nvidia_smi("1-2") == found
    assert gpu.asked_of_nvidia_smi("") == {}


def test_heading_names_the_gpu():
    machine = dict(fastattn.info()) | {
        "gpu": "NVIDIA H200",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "gpu_memory_bytes": 141 << 30,
        "cuda": "13.0",
        "driver": "560.35.03",
        "clock_mhz": "1980",
        "memory_clock_mhz": "3201",
        "power_limit_w": "700.00",
    }
    text = report.heading({"machine": machine, "versions": {}, "limits": {"matmul": 7.1e14}})
    assert text.splitlines()[0] == (
        "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 141.0 GiB, "
        "at most 1980 MHz, 3201 MHz memory, 700.00 W, driver 560.35.03, CUDA 13.0"
    )
    assert text.endswith("limits: 710 TFLOP/s bf16 matrix product")


# ---- From end to end


FLOORS = {  # and the verdict
    "plain": (promise_of_h200(0.0185, speedups={"torch-flash": 1.2}), "met"),
    "causal": (promise_of_h200(0.1), "missed"),
    "decode": (promise_of_h200(percent=1e-4), "met"),
    "launch": (promise_of_h200(launch_microseconds=17.7), "within 2 points"),
}


def test_bench_from_end_to_end(world, tmp_path, monkeypatch, capsys):
    suite = [replace(x, floor=FLOORS.get(x.name, (Floor(),))[0]) for x in SMALL]
    monkeypatch.setitem(cases.SUITES_OF, "cuda", {"gpu": suite})
    kept = tmp_path / "run.json"
    assert __main__.main(["bench", "--device", "cuda", "--check", "--json", str(kept)]) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == (
        "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 141.0 GiB, CUDA 13.0"
    )
    assert lines[1].endswith(f"Python {sys.version.split()[0]}")
    assert ", 1 threads, " in lines[1]
    assert re.search(r"fastattn \S+, torch .*numba-cuda .*cuda-bindings", lines[2])
    assert lines[3] == "left out: triton, which needs triton"
    assert lines[4] == "limits: 700 TFLOP/s bf16 matrix product, 4000 GB/s memory copy"
    tflops = cases.flops(PLAIN) / 1e12
    block = said[said.index("plain\n") :].splitlines()
    columns = ["time", "rate", "of limit", "fastattn is", "max error", "extra memory"]
    assert re.split("  +", block[1].strip()) == columns
    assert re.split("  +", block[3])[:5] == [
        *("torch-flash", "1.25 ms", f"{tflops / 1.25e-3:.2f} TFLOP/s"),
        *("0.0 %", "1.25x as fast"),
    ]
    assert re.search(r"\nplain +0\.02 TFLOP/s \((1\.00 m|1000 u)s\) .* 0\.80x torch-cudnn ", said)
    assert re.search(r"\nlaunch +30\.0 us +12\.0 us +25\.0 us +- \[1\] +0\.40x torch-flash ", said)
    for name, (_, verdict) in FLOORS.items():
        assert re.search(rf"\n{name} .*  {verdict}(\n|$)", said), name
    assert re.search(r"\nlaunch .*  \+18\.0 us  17\.7 us  ", said)

    run = json.loads(kept.read_text())
    assert run["device"] == "cuda"
    assert run["machine"]["gpu"] == "NVIDIA H200"
    assert [x["name"] for x in run["results"]] == [x.name for x in SMALL]
    assert __main__.main(["bench", "--from", str(kept), "--check"]) == 1
    again = capsys.readouterr().out
    assert said.endswith(again)

    run["machine"]["gpu"] = "NVIDIA L4"
    kept.write_text(json.dumps(run))
    assert __main__.main(["bench", "--from", str(kept), "--check"]) == 0
    assert re.search(r"\ncausal .*  for H200: missed\n", capsys.readouterr().out)
    assert __main__.main(["bench", "--from", str(kept), "--markdown"]) == 0
    assert re.search(
        r"^\| plain \| \*\*0\.02 TFLOP/s \(.*?s\)\*\* \|", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize(
    ("floor", "verdict"),
    [
        (promise_of_h200(500), "met"),
        (promise_of_h200(509), "within 2 points"),
        (promise_of_h200(511), "missed"),
        (promise_of_h200(500, speedups={"torch-flash": 1.03}), "missed"),
        (promise_of_h200(launch_microseconds=20.1), "met"),
        (promise_of_h200(launch_microseconds=19.7), "within 2 points"),
        (promise_of_h200(launch_microseconds=10), "missed"),
    ],
)
def test_verdict_on_a_floor(floor, verdict):
    outcome = {"percent": 50.0, "extra_bytes": 0}
    result = {
        "name": "case",
        "device": "cuda",
        "isa": None,
        "work": {"matmul": 5e11},
        "limits": {},
        "rounds": [],
        "floor": asdict(floor),
        "libraries": {
            "fastattn": outcome | {"seconds": 1e-3},
            "torch-flash": outcome | {"seconds": 0.98e-3, "speedup": 1.0},
            "torch-cudnn": outcome | {"seconds": 2e-3, "speedup": 2.0},
        },
    }
    for name in ("NVIDIA H200", "NVIDIA H200 NVL"):
        text, kept = report.floors({"results": [result], "machine": {"gpu": name}})
        assert text.splitlines()[1].endswith("  " + verdict)
        assert kept == (verdict != "missed")
    text, kept = report.floors({"results": [result], "machine": {"gpu": "NVIDIA A100"}})
    assert text.endswith(f"  for H200: {verdict}")
    assert kept


def test_chart_is_drawn(world, bench, tmp_path):
    pytest.importorskip("matplotlib")
    from fastattn.bench import chart

    run = {
        "device": "cuda",
        "results": bench(*SMALL),
        "machine": {"gpu": "NVIDIA H200", "version": "1"},
        "versions": {"fastattn": "1", "torch": "2"},
    }
    chart.save(run, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert chart._named(run, "torch-flash") == "torch-flash 2"
