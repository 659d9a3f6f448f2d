# SPDX-License-Identifier: Apache-2.0
"""Every public call that takes options shows those of its table, and each of them arrives."""

import functools
import importlib
import inspect
import re

import numpy as np
import pytest

import fastattn
from fastattn._options import NO_OPTIONS, AttentionOptions, Options, ScoreOptions, WeightOptions

ALL = tuple(Options._fields)
OF_DROPOUT = ("dropout_p", "seed", "head_offset", "batch_offset")
OF_WEIGHTS = tuple(name for name in ALL if name not in OF_DROPOUT)
KNOWN_TO_CACHES = ("query_offset", "kv_lengths", "key_offset")
OF_CACHES = tuple(name for name in OF_WEIGHTS if name not in KNOWN_TO_CACHES)
PACKED = ("cu_seqlens_q", "cu_seqlens_kv")
OPERANDS = ("query", "key", "value")
SAVED = ("grad_out", *OPERANDS, "out", "lse")
OF_GRADIENTS = ("grad_lse", "return_dbias", "return_dsinks")
RESULTS = ("return_lse", "out")
MORE_RESULTS = (*RESULTS, "lse", "accumulate")
GRADIENTS = (*OF_GRADIENTS, "grads", "accumulate")
OF_CACHE_CALLS = ("query_offset", "return_lse", "return_column_sums", "out")
STATISTICS = ("entropy", "column_sums", "row_weights", "top", "blocks", "maximum")
CAUSAL = {"is_causal": True}
# By name, what stands before the options, the options, what stands after them, and the defaults
# that differ from those of `attention`.
DOORS = {
    "attention": (OPERANDS, ALL, MORE_RESULTS, {}),
    "varlen_attention": ((*OPERANDS, *PACKED), ALL, MORE_RESULTS, {}),
    "attention_backward": (SAVED, ALL, (*PACKED, *GRADIENTS), {}),
    "attention_weights": (("query", "key"), OF_WEIGHTS, (), {}),
    "attention_statistics": (("query", "key"), OF_WEIGHTS, STATISTICS, {}),
    "maps.rollout": (("layers",), OF_WEIGHTS, ("tokens", "direction"), {"is_causal": None}),
    "explain": (OPERANDS, ALL, ("threads",), {}),
    "KVCache.attend": (("self", "query"), OF_CACHES, OF_CACHE_CALLS, CAUSAL),
    "PagedKVCache.attend": (("self", "query"), OF_CACHES, ("sequences", *OF_CACHE_CALLS), CAUSAL),
    "reference.attention": (OPERANDS, ALL, (*MORE_RESULTS, "compute_dtype", "batch_index"), {}),
    "reference.varlen_attention": (
        (*OPERANDS, *PACKED),
        ALL,
        (*MORE_RESULTS, "compute_dtype"),
        {},
    ),
    "reference.attention_backward": (SAVED, ALL, (*PACKED, *GRADIENTS, "compute_dtype"), {}),
    "reference.attention_weights": (("query", "key"), OF_WEIGHTS, ("compute_dtype",), {}),
    "reference.attention_statistics": (("query", "key"), OF_WEIGHTS, STATISTICS, {}),
    "torch.attention": (OPERANDS, ALL, RESULTS, {}),
    "torch.varlen_attention": ((*OPERANDS, *PACKED), ALL, RESULTS, {}),
    "cuda.attention": (OPERANDS, ALL, (*RESULTS, "stream"), {}),
    "cuda.attention_backward": (SAVED, ALL, (*OF_GRADIENTS, "deterministic", "stream"), {}),
    "cuda.explain": (OPERANDS, ALL, (), {}),
}
# What a call must be given beside its operands.
NEEDED = {"attention_statistics": {"entropy": True}, "maps.rollout": CAUSAL}
# JAX's signature, in its words; tests/attention/test_sdpa.py has PyTorch's.
OF_JAX = ("bias", "mask", "scale", "is_causal", "query_seq_lengths", "key_value_seq_lengths")
OF_JAX += ("local_window_size", "implementation", "return_residual")


def call_named(name):
    """Return a public call of fastattn; skip the test if its framework is not installed."""
    first, *rest = name.split(".")
    if first in ("torch", "jax", "cuda", "maps"):
        if first not in ("cuda", "maps"):
            pytest.importorskip(first)
        found = importlib.import_module(f"fastattn.{first}")
    else:
        found = getattr(fastattn, first)
    for each in rest:
        found = getattr(found, each)
    return found


@pytest.mark.parametrize("name", DOORS)
def test_signature(name):
    before, options, after, defaults = DOORS[name]
    parameters = inspect.signature(call_named(name)).parameters
    kinds = inspect.Parameter
    assert tuple(parameters) == (*before, *options, *after)
    for each, parameter in parameters.items():
        assert parameter.kind == (
            kinds.POSITIONAL_OR_KEYWORD if each in before else kinds.KEYWORD_ONLY
        )
    for option in options:
        assert parameters[option].default == defaults.get(option, getattr(NO_OPTIONS, option))
        assert parameters[option].annotation not in (kinds.empty, "Any")


def test_signature_of_jax():
    parameters = inspect.signature(call_named("jax.dot_product_attention")).parameters
    assert tuple(parameters) == (*OPERANDS, *OF_JAX)
    of_backward = inspect.signature(call_named("jax.dot_product_attention_backward")).parameters
    forward_only = ("query_seq_lengths", "implementation", "return_residual")
    assert tuple(of_backward) == (*SAVED, *(x for x in OF_JAX if x not in forward_only))


def test_tables():
    assert tuple(x for x in ALL if x in ScoreOptions.__annotations__) == OF_CACHES
    assert tuple(x for x in ALL if x in WeightOptions.__annotations__) == OF_WEIGHTS
    assert set(AttentionOptions.__annotations__) == set(ALL)


def test_operators_have_every_option():
    pytest.importorskip("torch")
    from fastattn.torch._operator import ARGUMENTS, STARTS
    from fastattn.torch._options import TensorOptions

    in_parts = {"has_window", "left", "right"}
    assert (set(ARGUMENTS) - {*STARTS, *in_parts}) | {"window"} == set(ALL)
    assert set(TensorOptions.__annotations__) == set(ALL)


def arguments_of(name):
    """Return a call that has no fault, and its arguments before the options."""
    x = np.ones((2, 3, 4), np.float32)
    if name.endswith("KVCache.attend"):
        cache = getattr(fastattn, name.split(".")[0])
        cache = cache(1, 2, 4) if cache is fastattn.KVCache else cache(2, 4)
        if isinstance(cache, fastattn.PagedKVCache):
            cache.add()
        cache.append(x[None], x[None])
        return cache.attend, (x[None],)
    if name.startswith("torch."):
        torch = pytest.importorskip("torch")
        x = torch.ones((2, 3, 4))
    starts = [0, 2]
    lse = np.zeros((2, 3), np.float32)
    given = {"self": None, "lse": lse, "layers": [(x, x)], **dict.fromkeys(PACKED, starts)}
    call = functools.partial(call_named(name), **NEEDED.get(name, {}))
    return call, tuple(given.get(each, x) for each in DOORS[name][0])


CHECKED = [name for name in DOORS if not name.startswith(("reference", "cuda"))]  # no GPU is here


@pytest.mark.parametrize("name", CHECKED)
def test_each_option_arrives(name):
    """None is lost on the way: a wrong one is refused by its name."""
    call, arguments = arguments_of(name)
    call(*arguments)
    for option in DOORS[name][1]:
        wrong = {"dropout_p": 2.0, "seed": -1}.get(option, "wrong")
        with pytest.raises((TypeError, ValueError), match=f"^{option} must be"):
            call(*arguments, **{option: wrong})


@pytest.mark.parametrize("name", DOORS)
def test_unknown_option(name):
    """It is refused in the words of Python, under the name of the call."""
    call, arguments = arguments_of(name)
    called = re.sub("^(reference|torch|cuda|maps)\\.", "", name)
    _, options, after, _ = DOORS[name]
    for wrong in ("causal", *(x for x in ALL if x not in (*options, *after))):
        with pytest.raises(TypeError) as error:
            call(*arguments, **{wrong: None})
        words = f"{called}() got an unexpected keyword argument {wrong!r}"
        assert str(error.value) == words
