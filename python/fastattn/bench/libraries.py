# SPDX-License-Identifier: Apache-2.0
"""How each library computes a case, at its best.

Called by worker.py, in a process that holds one library alone; calls.py has fastattn's own calls,
rivals.py those of operators that are installed apart, gpu_libraries.py those of all on a GPU.
Every library gets its natural layout (the conversion is not counted) and its fastest operator that
expresses the case. What need not be repeated (building, compiling, binding a dense mask) is done
before the clock starts. A library that cannot express a case raises Unsupported.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastattn.bench import gpu_libraries, rivals
from fastattn.bench.calls import CALLS, Prepared, as_views
from fastattn.bench.cases import Array, Case, Inputs, numpy_dtype
from fastattn.bench.operands import (
    additive,
    all_masks,
    module,
    plainly_causal,
    require,
    require_plain_scores,
    require_scores,
    tensor,
    tokens_first,
)


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment that holds every library to `threads`, if its process starts in it."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return dict.fromkeys(names, str(threads))  # NPROC is XLA's (jax)


def _fastattn(case: Case, inputs: Inputs, threads: int) -> Prepared:
    module("fastattn").set_num_threads(threads)
    return CALLS[case.call](case, inputs)


def _numpy(case: Case, inputs: Inputs, threads: int) -> Prepared:
    """Compute softmax(Q K^T) V by matmul, without avoidable copies; BLAS decides the threads."""
    require_plain_scores(case)
    require(case, "float32", "float64", otherwise="has no BLAS for {}")
    require_scores(case)
    query, key, value, *_ = inputs
    kv_heads = key.shape[1]
    grouped = (case.batch, kv_heads, case.groups, case.q_len, case.head_dim)
    queries = query.reshape(grouped) * query.dtype.type(case.head_dim**-0.5)
    keys, values = key[:, :, None].swapaxes(-1, -2), value[:, :, None]
    mask = all_masks(case, inputs)
    if mask is not None:
        mask = additive(mask, case.dtype)
        heads = mask.shape[1]
        mask = mask.reshape(
            mask.shape[0], *((1, 1) if heads == 1 else grouped[1:3]), *mask.shape[2:]
        )

    def call() -> Any:
        scores = queries @ keys
        if mask is not None:
            scores += mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        return scores @ values

    return Prepared(call, lambda out: out.reshape(case.output_shape), "softmax(Q @ K.T) @ V")


def _torch(case: Case, inputs: Inputs, threads: int) -> Prepared:
    require_plain_scores(case)
    torch = module("torch")
    torch.set_num_threads(threads)

    if case.call == "views":
        inputs = as_views(inputs)
    query, key, value = map(tensor, inputs[:3])
    options: dict[str, Any] = {}
    if plainly_causal(case, inputs):
        options["is_causal"] = True
    elif (mask := all_masks(case, inputs)) is not None:
        options["attn_mask"] = tensor(mask)
    if case.groups > 1:
        options["enable_gqa"] = True
    attention = torch.nn.functional.scaled_dot_product_attention
    if inputs.grad_out is not None:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out, grad_out = attention(*leaves, **options), tensor(inputs.grad_out)

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

        return Prepared(backward, lambda grads: grads[0].double().numpy(), "autograd.grad")

    def call() -> Any:
        with torch.inference_mode():
            return attention(query, key, value, **options)

    how = f"scaled_dot_product_attention({', '.join(options)})"
    return Prepared(call, lambda out: out.double().numpy(), how)


def _jax(case: Case, inputs: Inputs, threads: int) -> Prepared:
    require_plain_scores(case)
    jax = module("jax")
    require(case, "float32", "bfloat16")
    operands = {
        name: jax.numpy.asarray(tokens_first(x))
        for name, x in zip(("query", "key", "value"), inputs[:3], strict=True)
    }
    mask = inputs.mask if inputs.bias is None else all_masks(case, inputs)
    flags: dict[str, Any] = {"is_causal": case.is_causal, "local_window_size": case.window}
    if case.at_end:  # the flags count from the first key
        mask, flags = all_masks(case, inputs), {}
    if mask is not None:
        operands["mask" if mask.dtype == bool else "bias"] = jax.numpy.asarray(mask)

    def attention(operands: dict[str, Any]) -> Any:
        return jax.nn.dot_product_attention(**operands, **flags)

    compiled = jax.jit(attention).lower(operands).compile()

    def call() -> Any:
        return compiled(operands).block_until_ready()

    return Prepared(
        call, lambda out: np.asarray(out).transpose(0, 2, 1, 3), "jax.nn.dot_product_attention"
    )


def _openvino(case: Case, inputs: Inputs, threads: int) -> Prepared:
    require_plain_scores(case)
    openvino, op = module("openvino"), module("openvino.opset13")
    require(case, "float32", "bfloat16", otherwise="computes {} as another type")
    query, key, value, *_ = inputs
    is_causal = plainly_causal(case, inputs)
    mask = None if is_causal else all_masks(case, inputs)
    heads = key.shape[1]
    grouped = case.groups > 1
    # The operator wants as many key heads as query heads. Where heads have no mask of their own,
    # the queries of a group fold into one long query for free; elsewhere the model repeats K, V.
    folded = grouped and not is_causal and (mask is None or mask.shape[1] == 1)
    if folded:
        query = query.reshape(case.batch, heads, case.groups * case.q_len, case.head_dim)
        if mask is not None and mask.shape[2] > 1:
            mask = np.tile(mask, (1, 1, case.groups, 1))
    arrays = [query, key, value] + ([] if mask is None else [mask])
    in_half = case.dtype == "bfloat16"

    def kind(x: Array) -> Any:
        return openvino.Type.bf16 if x.dtype.name == "bfloat16" else openvino.Type(x.dtype)

    parameters = [op.parameter(x.shape, kind(x)) for x in arrays]

    def repeated(x: Any) -> Any:
        batch, heads, tokens, dim = x.shape
        wide = op.constant(np.array([batch, heads, case.groups, tokens, dim]))
        flat = op.constant(np.array([batch, heads * case.groups, tokens, dim]))
        ahead = op.unsqueeze(x, op.constant(np.array([2])))
        return op.reshape(op.broadcast(ahead, wide, "BIDIRECTIONAL"), flat, False)

    operands: list[Any] = list(parameters)
    if grouped and not folded:
        operands[1:3] = [repeated(x) for x in parameters[1:3]]
    result = op.scaled_dot_product_attention(*operands, causal=is_causal)
    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if in_half else "f32",
    }
    model = openvino.Core().compile_model(openvino.Model([result], parameters), "CPU", hints)
    request = model.create_infer_request()
    for i, x in enumerate(arrays):
        plain = x.view(np.int16) if x.dtype.name == "bfloat16" else x  # the bits alone
        request.set_input_tensor(i, openvino.Tensor(plain, openvino.Shape(x.shape), kind(x)))

    def call(_held: object = arrays) -> Any:  # the tensors do not keep the arrays alive
        request.infer()
        return request.get_output_tensor(0)

    how = "opset13.scaled_dot_product_attention"
    if grouped:
        how += " (group folded into q_len)" if folded else " (K and V repeated)"

    def to_numpy(out: Any) -> Array:
        result: Array = out.data.view(numpy_dtype(case.dtype)).reshape(case.output_shape)
        return result

    return Prepared(call, to_numpy, how)


class _OnnxModel(NamedTuple):
    """One operator that expresses the case, with the arrays that it reads."""

    operator: str
    inputs: str  # names with commas between; an empty one is left out
    arrays: dict[str, Array]
    outputs: dict[str, tuple[int, ...]]
    attributes: dict[str, int]
    domain: str = "com.microsoft"
    in_place: dict[str, str] = {}  # outputs that are the memory of an input  # noqa: RUF012


def _onnx_flat(inputs: Inputs) -> dict[str, Array]:
    """Lay query, key and value out as (batch, seq, heads * head_dim)."""
    names = ("query", "key", "value")
    arrays = (tokens_first(x) for x in inputs[:3])
    return {k: x.reshape(*x.shape[:2], -1) for k, x in zip(names, arrays, strict=True)}


def _onnx_group_query(case: Case, inputs: Inputs) -> _OnnxModel | None:
    """
    GroupQueryAttention: causal always, with a left window; takes the new keys, returns all.

    In decoding all lie in a cache, to which it adds the new ones in place.
    """
    left, right = case.window if case.window is not None else (None, None)
    if case.q_len < case.kv_len:
        last = case.q_len == 1 or (case.is_causal and case.at_end and not case.lengths)
        fits = last and case.window is None
    else:
        fits = not case.lengths and (right == 0 or (case.is_causal and right is None))
    if case.dtype == "float64" or case.bias or not fits:
        return None
    lengths = np.array(case.lengths or (case.kv_len,) * case.batch, np.int32)
    names, new, past = "query,key,value,,,lengths,total", inputs, {}
    if case.q_len < case.kv_len:
        names = "query,key,value,past_key,past_value,lengths,total"
        past = {"past_key": inputs.key, "past_value": inputs.value}
        at = lengths[:, None] + np.arange(-case.q_len, 0)
        key, value = (np.take_along_axis(x, at[:, None, :, None], 2) for x in past.values())
        new = inputs._replace(key=key, value=value)
    arrays = _onnx_flat(new) | past
    arrays["lengths"] = lengths - 1
    arrays["total"] = lengths.max(keepdims=True)
    cache = inputs.key.shape
    return _OnnxModel(
        "GroupQueryAttention",
        names,
        arrays,
        {"out": arrays["query"].shape, "all_keys": cache, "all_values": cache},
        {
            "num_heads": case.q_heads,
            "kv_num_heads": cache[1],
            "local_window_size": -1 if left is None else left + 1,  # counts the query itself
        },
        in_place=dict(zip(("all_keys", "all_values"), past, strict=False)),
    )


def _onnx_multi_head(case: Case, inputs: Inputs) -> _OnnxModel | None:
    """MultiHeadAttention: as many key heads as query heads; any mask, as one that is added."""
    if case.dtype == "float64" or case.groups > 1:
        return None
    arrays = _onnx_flat(inputs)
    if case.q_len < case.kv_len:  # the layout of a cache, which is read as it lies
        arrays |= {"key": inputs.key, "value": inputs.value}
    names = "query,key,value"
    attributes = {"num_heads": case.q_heads}
    if case.lengths and not (case.is_causal or case.window or case.bias):
        seen = np.arange(case.kv_len) < np.array(case.lengths)[:, None]
        arrays["padding"] = seen.astype(np.int32)
        names += ",,padding"
    elif plainly_causal(case, inputs):
        attributes["unidirectional"] = 1
    elif (mask := all_masks(case, inputs)) is not None:
        arrays["added"] = additive(mask, case.dtype)
        names += ",,,added"
    outputs = {"out": arrays["query"].shape}
    return _OnnxModel("MultiHeadAttention", names, arrays, outputs, attributes)


def _onnx_attention(case: Case, inputs: Inputs) -> _OnnxModel | None:
    """Attention of opset 23: any heads, float64 too; a mask has all rows, heads broadcast."""
    arrays = dict(zip(("query", "key", "value"), inputs[:3], strict=True))
    is_causal = plainly_causal(case, inputs)
    mask = None if is_causal else all_masks(case, inputs)
    if mask is not None:
        rows = (*mask.shape[:2], case.q_len, case.kv_len)
        arrays["mask"] = np.ascontiguousarray(np.broadcast_to(mask, rows))
    outputs = {"out": inputs.query.shape}
    attributes = {"is_causal": int(is_causal)}
    return _OnnxModel("Attention", ",".join(arrays), arrays, outputs, attributes, domain="")


ONNX_OPERATORS = (_onnx_group_query, _onnx_multi_head, _onnx_attention)


def _onnx_session(model: _OnnxModel, case: Case, threads: int) -> Prepared:
    onnxruntime, helper = module("onnxruntime"), module("onnx.helper")
    types = helper.np_dtype_to_tensor_dtype
    declared = [
        helper.make_tensor_value_info(name, types(x.dtype), x.shape)
        for name, x in model.arrays.items()
    ]
    results = [
        helper.make_tensor_value_info(name, types(numpy_dtype(case.dtype)), shape)
        for name, shape in model.outputs.items()
    ]
    names = model.inputs.split(","), list(model.outputs)
    node = helper.make_node(model.operator, *names, domain=model.domain, **model.attributes)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "case", declared, results)
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(x) for k, x in model.arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in model.outputs:
        if name in model.in_place:
            binding.bind_ortvalue_output(name, values[model.in_place[name]])
        else:
            binding.bind_output(name, "cpu")

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding

    def to_numpy(binding: Any) -> Array:
        out: Array = binding.get_outputs()[0].numpy()
        if model.domain:
            out = out.reshape(case.batch, case.q_len, case.q_heads, case.head_dim)
            out = out.transpose(0, 2, 1, 3)
        return out

    return Prepared(call, to_numpy, model.operator)


def _onnxruntime(case: Case, inputs: Inputs, threads: int) -> Prepared:
    """Try each operator that can express the case, and keep the fastest."""
    require_plain_scores(case)
    require(case, "float32", "float64", "float16")
    if case.window is not None and case.window[1] > 0:
        require_scores(case)  # no operator with a mask is fused
    best: tuple[float, _OnnxModel] | None = None
    failures = []
    for build in ONNX_OPERATORS:
        model = build(case, inputs)
        if model is None:
            continue
        try:
            seconds = _seconds(_onnx_session(model, case, threads).call)
        except Exception as error:  # the next operator may do it; all reasons are reported
            failures.append(f"{model.operator}: {error}")
            continue
        if best is None or seconds < best[0]:
            best = (seconds, model)
    if best is None:
        raise RuntimeError("; ".join(failures))
    # A session of its own, so that nothing of the trials lies in its memory pool.
    return _onnx_session(best[1], case, threads)


def _seconds(call: Callable[[], Any]) -> float:
    """Time the fastest of five calls, or the first that took long."""
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
        if samples[-1] > 0.1:
            break
    return min(samples)


# In the order in which a report shows them.
PREPARE: dict[str, Callable[[Case, Inputs, int], Prepared]] = {
    "fastattn": _fastattn,
    "torch": _torch,
    **rivals.PREPARE,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "jax": _jax,
    "numpy": _numpy,
}
LIBRARIES = {"cpu": PREPARE, "cuda": gpu_libraries.PREPARE}  # by device
BESIDE_TORCH = "fastattn-torch"  # the process of fastattn for cases whose arrays are tensors
WORKERS = LIBRARIES | {"cpu": PREPARE | {BESIDE_TORCH: _fastattn}}
NEEDS = {
    BESIDE_TORCH: ("torch", "fastattn"),
    **dict.fromkeys(rivals.PREPARE, ("torch",)),
    "onnxruntime": ("onnxruntime", "onnx"),
    "torch-flash": ("torch",),
    "torch-cudnn": ("torch",),
    "torch-efficient": ("torch",),
    "triton": ("torch", "triton"),
}


def missing(library: str) -> list[str]:
    """Name what `library` needs and this Python lacks."""
    needed = NEEDS.get(library, (library,))
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if library in rivals.PREPARE and rivals.operators(library) is None:
        absent.append(rivals.DISTRIBUTIONS[library])
    return absent
