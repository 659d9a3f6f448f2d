# SPDX-License-Identifier: Apache-2.0
"""A PyTorch with a GPU, and a fastattn.cuda, that are none: what they do takes as long as one says.

A `World` is the GPU and its host, each with a clock: the host asks, which takes it some time, and
the GPU does one thing after the other, never before it was asked. Results are computed by
definition, and only when someone looks. `Torch` and `cuda` are what a process sees of it.
"""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np

from fastattn import reference
from fastattn.bench import worker
from fastattn.bench.gpu import FLUSH_BYTES, PRODUCT_ROWS
from fastattn.bench.measure import Failure

RECORD_SECONDS = 1e-6  # of the host, for an event
EXTRA_BYTES = 1 << 20  # that every attention takes beside its result
MATMUL_RATE, COPY_RATE = 700e12, 4e12
MODULES = (
    "torch",
    "torch.nn.attention",
    "torch.nn.attention.flex_attention",
    "torch._functorch.config",
    "fastattn.cuda",
)


class World:
    """The clocks; how long each attention takes the GPU, and the host to ask for it."""

    def __init__(self, gpu_seconds, host_seconds):
        self.gpu_seconds, self.host_seconds = gpu_seconds, host_seconds
        self.host = self.gpu = 0.0
        self.done = []  # the names of what the GPU was asked

    def run(self, name, gpu_seconds=None):
        self.host += self.host_seconds.get(name, 5e-6)
        self.gpu = max(self.gpu, self.host) + (gpu_seconds or self.gpu_seconds[name])
        self.done.append(name)

    def synchronize(self):
        self.host = max(self.host, self.gpu)

    def perf_counter(self):
        self.host += 1e-9  # so that a loop until a time has come ends
        return self.host


class Event:
    def __init__(self, world):
        self.world = world

    def record(self):
        self.world.host += RECORD_SECONDS
        self.world.gpu = self.at = max(self.world.gpu, self.world.host)
        self.world.done.append("event")

    def synchronize(self):
        self.world.host = max(self.world.host, self.at)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Tensor:
    """An array, or how it is computed."""

    def __init__(self, torch, compute, name=""):
        self.torch, self.compute, self.name = torch, compute, name

    def numpy(self):
        return self.compute()

    def view(self, dtype):
        return Tensor(self.torch, lambda: self.compute().view(dtype))

    def to(self, device):
        assert device == "cuda"
        return self

    def double(self):
        return Tensor(self.torch, lambda: self.compute().astype(np.float64))

    def cpu(self):
        self.torch.world.synchronize()
        return self

    def requires_grad_(self):
        return self

    def sum(self):
        self.torch.world.run("flush", FLUSH_BYTES / COPY_RATE)

    def copy_(self, source):
        self.torch.world.run("copy", 2 * FLUSH_BYTES / COPY_RATE)


class Torch(ModuleType):
    """The module as one process sees it."""

    __version__ = "2.99"
    float32, bfloat16 = np.float32, ml_dtypes.bfloat16

    def __init__(self, world, uuid="", kernel="wgmma"):
        super().__init__("torch")
        self.__spec__ = SimpleNamespace(name="torch")
        self.world, self.backend, self.peak, self.resets = world, None, 0, 0
        self.version = SimpleNamespace(cuda="13.0")
        properties = SimpleNamespace(
            name="NVIDIA H200",
            major=9,
            minor=0,
            multi_processor_count=132,
            total_memory=141 << 30,
            uuid=uuid,
        )
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            get_device_properties=lambda number: properties,
            empty_cache=lambda: None,
            memory_allocated=lambda: 1000,
            max_memory_allocated=lambda: self.peak,
            reset_peak_memory_stats=lambda: setattr(self, "peak", 1000),
            synchronize=world.synchronize,
            Event=lambda enable_timing: Event(world),
        )
        attention = SimpleNamespace(
            sdpa_kernel=self.sdpa_kernel,
            SDPBackend=SimpleNamespace(
                **{f"{x}_ATTENTION": x.lower() for x in ("FLASH", "CUDNN", "EFFICIENT")}
            ),
        )
        functional = SimpleNamespace(scaled_dot_product_attention=self.attention)
        self.nn = SimpleNamespace(attention=attention, functional=functional)
        self.autograd = SimpleNamespace(grad=self.grad)
        self.compiler = SimpleNamespace(reset=lambda: setattr(self, "resets", self.resets + 1))
        flex = SimpleNamespace(create_block_mask=block_mask, flex_attention="flex_attention")
        self.config = SimpleNamespace(donated_buffer=True)
        cuda = ModuleType("fastattn.cuda")
        cuda.attention = lambda *x, **how: self.attention(*x, name=kernel, **how)
        cuda.attention_backward = self.backward(kernel)
        cuda.explain = lambda *x, **how: {"kernel": kernel, "gradients": kernel}
        self.modules = dict(zip(MODULES, (self, attention, flex, self.config, cuda), strict=True))

    def from_numpy(self, x):
        return Tensor(self, lambda: x)

    def ones(self, size, dtype, device):
        return Tensor(self, None)

    def randn(self, shape, dtype, device):
        assert (shape, dtype) == ((PRODUCT_ROWS, PRODUCT_ROWS), self.bfloat16)
        return Tensor(self, None)

    def empty_like(self, x):
        return Tensor(self, None)

    def matmul(self, a, b, out):
        self.world.run("matmul", 2 * PRODUCT_ROWS**3 / MATMUL_RATE)

    @contextlib.contextmanager
    def sdpa_kernel(self, backend):
        self.backend = backend
        yield
        raise AssertionError("the backend is to stay")

    def attention(self, query, key, value, name=None, return_lse=False, enable_gqa=None, **how):
        name = name or self.backend
        if self.world.gpu_seconds[name] is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        q, k, v = (x.compute() for x in (query, key, value))
        assert (q.shape[1] > k.shape[1]) == bool(enable_gqa) or name not in ("flash", "cudnn")
        self.world.run(name)
        self.peak = max(self.peak, 1000 + q.nbytes + EXTRA_BYTES)

        def compute():
            wide = (x.astype(np.float64) for x in (q, k, v))
            return reference.attention(*wide, **how).astype(q.dtype)

        out = Tensor(self, compute, name)
        out.inputs, out.how = (q, k, v), how
        return (out, "lse") if return_lse else out

    def grad(self, out, leaves, grad_out, retain_graph):
        assert retain_graph
        return self.gradients(out.name, grad_out, out.inputs, out.how)

    def backward(self, kernel):
        def attention_backward(grad_out, query, key, value, out, lse, **how):
            assert lse == "lse"
            return self.gradients(kernel, grad_out, out.inputs, how)

        return attention_backward

    def gradients(self, name, grad_out, inputs, how):
        self.world.run(f"{name} backward")
        self.peak = max(self.peak, 1000 + 3 * inputs[0].nbytes + EXTRA_BYTES)

        def compute():
            wide = (x.astype(np.float64) for x in (grad_out.compute(), *inputs))
            grads = reference.attention_backward(*wide, None, None, **how)
            return grads[0].astype(inputs[0].dtype)

        return Tensor(self, compute), None, None

    def compile(self, function, dynamic, fullgraph):
        assert (function, dynamic, fullgraph) == ("flex_attention", False, True)

        def compiled(*operands, block_mask=None, enable_gqa=False):
            return self.attention(*operands, name="flex", is_causal=bool(block_mask))

        return compiled


def block_mask(mask, batch, heads, q_len, kv_len, device):
    """Return whether it is the causal mask, which is the only one that is asked for."""
    seen = [[mask(batch, heads, i, j) for j in range(kv_len)] for i in range(q_len)]
    assert np.array_equal(seen, np.tri(q_len, kv_len, dtype=bool))
    assert device == "cuda"
    return True


def member_in_this_process(world, monkeypatch, torch=Torch):
    """Return a class in the place of measure.Member, whose workers are objects of this process."""

    class Member:
        def __init__(self, library, threads, isa, device):
            self.torch = torch(world, kernel=isa or "wgmma")
            self.worker = worker.Worker(library, threads, device)

        def ask(self, patience, request, *arguments):
            for name, module in self.torch.modules.items():
                monkeypatch.setitem(sys.modules, name, module)
            try:
                answer = getattr(self.worker, request)(*arguments)
                self.worker.settle()
            except Exception as error:
                raise Failure(worker._reason(error)) from error
            return answer

        def ticks(self):
            return 0

        def close(self):
            pass

    return Member
