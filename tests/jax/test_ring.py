# SPDX-License-Identifier: Apache-2.0
"""The ring of examples/ring_in_jax.py gives what attention to the whole sequence gives.

JAX is told before it starts how many devices the CPU is: the cases of a count run in one process.
"""

import functools
import re
import runpy
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fastattn
from tests.support.child import ROOT, run

EXAMPLE = ROOT / "examples" / "ring_in_jax.py"
PAGE = ROOT / "docs" / "distributed.md"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="no examples beside the tests")

BATCH, HEAD_DIM = 2, 16
CASES = {  # the length, the heads of queries and keys, is_causal, the dtype
    "full": (48, 4, 4, False, "float32"),
    "causal": (48, 4, 4, True, "float32"),
    "grouped heads": (48, 6, 2, False, "float32"),
    "causal, grouped heads": (80, 6, 2, True, "float32"),
    "causal, half precision": (80, 4, 2, True, "bfloat16"),
    "causal, many rows": (1024, 2, 1, True, "float32"),
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 2.0**-7}  # as often as it is rounded


def heads_first(x):
    return np.asarray(x, np.float32).swapaxes(1, 2)


def problem(case):
    """Return query, key, value and grad_out; and out and the gradients of the whole."""
    length, q_heads, kv_heads, is_causal, dtype = CASES[case]
    rng = np.random.default_rng(len(case))
    *arrays, grad_out = (
        jnp.asarray(rng.standard_normal((BATCH, length, heads, HEAD_DIM)), dtype)
        for heads in (q_heads, kv_heads, kv_heads, q_heads)
    )
    inputs = [heads_first(x) for x in arrays]
    out, lse = fastattn.attention(*inputs, is_causal=is_causal, return_lse=True)
    grads = fastattn.attention_backward(
        heads_first(grad_out), *inputs, out, lse, is_causal=is_causal
    )
    return (*arrays, grad_out), (out, *grads)


def farthest(results, expected, order):
    """Return the largest difference of each from the whole, relative to the largest number."""
    whole = [x[:, :, np.asarray(order)] for x in expected]
    return [
        float(abs(heads_first(x) - right).max() / abs(right).max())
        for x, right in zip(results, whole, strict=True)
    ]


def difference(case, devices):
    """Return how far out and gradients are from those of the whole."""
    length, _, _, is_causal, dtype = CASES[case]
    (*arrays, grad_out), expected = problem(case)
    example = runpy.run_path(str(EXAMPLE))
    mesh, attend = example["sharded_attention"](devices, is_causal)
    order = example["zigzag"](length, devices)
    sharding = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    *rows, of_out = (jax.device_put(x[:, order], sharding) for x in (*arrays, grad_out))
    function = jax.jit(functools.partial(example["results_and_gradients"], attend))
    results = function(rows, of_out)
    for x in results:
        assert x.dtype == dtype
        assert x.sharding.is_equivalent_to(sharding, 4)
    text = function.lower(rows, of_out).compile().as_text()
    assert devices == 1 or "collective-permute(" in text
    assert not any(f"{name}(" in text for name in ("all-gather", "all-reduce", "all-to-all"))
    return farthest(results, expected, order)


def differences(devices):
    """Return what each case found, or raised."""
    jax.config.update("jax_platforms", "cpu")
    assert jax.device_count() == devices
    found = {}
    for case in CASES:
        try:
            found[case] = difference(case, devices)
        except Exception:
            found[case] = traceback.format_exc()
    return found


def env_of(devices):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_ring_is_attention_to_the_whole(devices):
    found = run(differences, devices, env=env_of(devices), timeout=280)
    for case, each in found.items():
        assert isinstance(each, list), each
        assert max(each) < TOLERANCES[CASES[case][4]], (case, each)


def test_chunks_that_devices_do_not_have():
    zigzag = runpy.run_path(str(EXAMPLE))["zigzag"]
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"^length must be a multiple of 2 \* devices = 4, got 6"):
        zigzag(6, 2)


def differences_of_the_page():
    """Return how far the page's lines, which are run here, are from the whole."""
    jax.config.update("jax_platforms", "cpu")
    case = "causal, grouped heads"
    arrays, expected = problem(case)
    example = runpy.run_path(str(EXAMPLE))
    names = dict(zip(("query", "key", "value", "grad_out"), arrays, strict=True))
    names |= {"jax": jax, "length": CASES[case][0]}
    names |= {name: example[name] for name in ("ring_attention", "zigzag")}
    exec(re.search(r"## JAX\n.*?```\n(.*?)```", PAGE.read_text(), re.S)[1], names)
    return farthest([names[x] for x in ("out", "dq", "dk", "dv")], expected, names["order"])


@pytest.mark.skipif(not PAGE.exists(), reason="no pages beside the tests")
def test_the_lines_of_the_page():
    found = run(differences_of_the_page, env=env_of(4), timeout=100)
    assert max(found) < TOLERANCES["float32"]
