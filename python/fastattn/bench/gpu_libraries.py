# SPDX-License-Identifier: Apache-2.0
"""How fastattn and each other library computes a case on a GPU, at its best.

Called by worker.py through libraries.py, in a process that holds one library alone. All work on
equal tensors of PyTorch, of shape (batch, heads, seq, head_dim), contiguous. A backward pass is
timed alone: the forward pass is done before the clock starts.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

from fastattn.bench.calls import Prepared
from fastattn.bench.cases import Array, Case, Inputs
from fastattn.bench.operands import tensor


def to_numpy(x: Any) -> Array:
    """Copy a result to the host."""
    array: Array = x.double().cpu().numpy()
    return array


def _first_to_numpy(grads: Any) -> Array:
    return to_numpy(grads[0])


def _fastattn(case: Case, inputs: Inputs, _threads: int) -> Prepared:
    cuda = importlib.import_module("fastattn.cuda")
    operands = [tensor(x, "cuda") for x in inputs[:3]]
    options = {"is_causal": True} if case.is_causal else {}
    plan = cuda.explain(*operands, **options)
    if inputs.grad_out is None:
        how = f"cuda.attention({', '.join(options)}): {plan['kernel']}"
        return Prepared(lambda: cuda.attention(*operands, **options), to_numpy, how)
    grad_out = tensor(inputs.grad_out, "cuda")
    out, lse = cuda.attention(*operands, return_lse=True, **options)

    def backward() -> Any:
        return cuda.attention_backward(grad_out, *operands, out, lse, **options)

    how = f"cuda.attention_backward({', '.join(options)}): {plan['gradients']}"
    return Prepared(backward, _first_to_numpy, how)


@functools.cache
def _forced(torch: Any, backend: str) -> contextlib.ExitStack:
    """Force a backend for the rest of the process: entering it each time would be timed."""
    attention = importlib.import_module("torch.nn.attention")
    held = contextlib.ExitStack()
    held.enter_context(attention.sdpa_kernel(getattr(attention.SDPBackend, backend)))
    return held


def _torch(backend: str, case: Case, inputs: Inputs, _threads: int) -> Prepared:
    torch = importlib.import_module("torch")
    _forced(torch, backend)
    options: dict[str, Any] = {}
    if case.is_causal:
        options["is_causal"] = True
    if case.groups > 1:
        options["enable_gqa"] = True
    attention = torch.nn.functional.scaled_dot_product_attention
    how = f"scaled_dot_product_attention({', '.join(options)}), {backend}"
    return _by_autograd(torch, functools.partial(attention, **options), inputs, how)


def _triton(case: Case, inputs: Inputs, _threads: int) -> Prepared:
    """Let torch's compiler fill in its template of a Triton kernel."""
    torch = importlib.import_module("torch")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    torch.compiler.reset()  # it keeps code for a few shapes only
    # The graph of a backward pass is used again and again: its buffers cannot be given away.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    options: dict[str, Any] = {}
    if case.is_causal:
        options["block_mask"] = flex.create_block_mask(
            lambda batch, head, row, key: row >= key,
            *(None, None, case.q_len, case.kv_len),
            device="cuda",
        )
    if case.groups > 1:
        options["enable_gqa"] = True
    compiled = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    how = f"torch.compile(flex_attention)({', '.join(options)})"
    prepared = _by_autograd(torch, functools.partial(compiled, **options), inputs, how)
    prepared.call()  # compiles
    return prepared


def _by_autograd(torch: Any, attention: Callable[..., Any], inputs: Inputs, how: str) -> Prepared:
    """Prepare the result, or its gradients by autograd."""
    operands = [tensor(x, "cuda") for x in inputs[:3]]
    if inputs.grad_out is None:
        return Prepared(lambda: attention(*operands), to_numpy, how)
    leaves = [x.requires_grad_() for x in operands]
    out, grad_out = attention(*leaves), tensor(inputs.grad_out, "cuda")

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return Prepared(backward, _first_to_numpy, f"autograd.grad of {how}")


# In the order in which a report shows them.
PREPARE: dict[str, Callable[[Case, Inputs, int], Prepared]] = {
    "fastattn": _fastattn,
    "torch-flash": functools.partial(_torch, "FLASH_ATTENTION"),
    "torch-cudnn": functools.partial(_torch, "CUDNN_ATTENTION"),
    "torch-efficient": functools.partial(_torch, "EFFICIENT_ATTENTION"),
    "triton": _triton,
}
