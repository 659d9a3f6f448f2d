# SPDX-License-Identifier: Apache-2.0
"""What docs/adoptions.md tells users of other packages to write, run against these packages.

Each package runs in a process of its own, since the lines hold until it ends. ADOPTED_PACKAGES may
name a folder with packages that cannot be installed beside this torch: pip install --no-deps
--target makes one. A test is skipped where its package is in neither place.
"""

import functools
import importlib.machinery
import math
import os
import sys
import tempfile
from unittest import mock

import numpy as np
import pytest

from tests.adoptions.packages import (
    PAGE,
    anemoi_layer,
    lines,
    tabicl,
    tabpfn,
    triangle_attention,
)
from tests.support.child import run

TOLERANCE = 1e-5  # of probabilities, of what layers give, and of gradients as shares of the largest
MATTERS = 0.01  # by so much, at least, a result changes with another attention

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no docs beside the tests")


def in_child(package, function, *arguments):
    """Return what the function returns in a process that finds the package."""
    folder = os.environ.get("ADOPTED_PACKAGES", "")
    if importlib.machinery.PathFinder.find_spec(package, [folder, *sys.path]) is None:
        pytest.skip(f"needs {package}")
    return run(function, *arguments, env={"PYTHONPATH": folder}, timeout=240)


def zeros(query, key, value, *_, **how):
    """Stand in attention's place."""
    return 0 * averages(query, key, value, **how)


def averages(query, key, value, *_, length=-2, heads=-3, **__):
    """Stand in attention's place: what it gives where all scores are alike."""
    group = query.shape[heads] // value.shape[heads]
    mean = value.mean(length, keepdim=True).repeat_interleave(group, heads)
    return mean.expand(*query.shape[:-1], value.shape[-1])


def others(place, name, call, theirs, **how):
    """Return by how much the result of a call changes with another attention in the place."""
    changes = {}
    for other in zeros, averages:
        with mock.patch.object(place, name, functools.partial(other, **how)):
            changes[other.__name__] = difference(theirs, call())
    return changes


def difference(x, y):
    """Return the largest difference of two arrays or tensors."""
    x, y = (np.asarray(z.detach() if hasattr(z, "detach") else z) for z in (x, y))
    return float(np.abs(x - y).max())


def results_and_gradients(module, call):
    """Return what a call of the module gives, and the gradients of the module's weights."""
    module.zero_grad()
    out = call()
    (out * out.detach().cos()).sum().backward()
    return [out, *(weight.grad for weight in module.parameters())]


def differences(theirs, ours):
    """Return the largest difference of the results, and of gradients as a share of the largest."""
    (out, *theirs), (our_out, *ours) = theirs, ours
    shares = (
        difference(x, y) / max(float(x.abs().max()), 1e-3)
        for x, y in zip(theirs, ours, strict=True)
    )
    return {"ours": difference(out, our_out), "gradients": max(shares)}


def check(found):
    """Check that ours gave the result, and that neither of the others would have."""
    assert found["ours"] <= TOLERANCE
    assert found.get("gradients", 0) <= TOLERANCE
    assert found["zeros"] >= MATTERS
    assert found["averages"] >= MATTERS


def tabpfn_with_ours(architecture, sizes):
    import torch
    from tabpfn.architectures.shared.attention_backends import recorded_attention_backends

    import fastattn.torch

    exactly, usually = (tabpfn(architecture, 60, x, **sizes) for x in (torch.float32, "auto"))
    theirs, theirs_usually = exactly(), usually()
    exec("".join(lines("TabPFN")), {})
    with recorded_attention_backends() as backends:
        ours, ours_usually = exactly(), usually()
    return {
        "backends": sorted({backend.name if backend else "" for backend in backends}),
        "ours": difference(theirs, ours),
        "usually": [difference(theirs, x) for x in (ours_usually, theirs_usually)],
        **others(fastattn.torch, "attention", exactly, theirs),
    }


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("tabpfn_v3_5", {"nlayers": 2, "embed_dim": 64}), ("tabpfn_v2_6", {"nlayers": 2})],
)
def test_tabpfn(architecture, sizes):
    found = in_child("tabpfn", tabpfn_with_ours, architecture, sizes)
    assert found["backends"] == ["fastattn"]
    check(found)
    ours, theirs = found["usually"]  # in bfloat16 where the CPU has instructions for it
    assert ours <= 2 * theirs + TOLERANCE


def tabicl_with_ours():
    from torch.nn import functional

    attention = "scaled_dot_product_attention"
    with tempfile.TemporaryDirectory() as folder:
        predict = tabicl(folder, 60, embed_dim=64, icl_num_blocks=2)
    with mock.patch.object(functional, attention, wraps=getattr(functional, attention)) as counted:
        theirs = predict()
    names = {}
    exec("".join(lines("TabICL")), names)
    ours, report = predict(), names["patch"].report()
    names["patch"].close()
    return {
        "calls": [counted.call_count, report["answered"], report["left"]],
        "ours": difference(theirs, ours),
        "closed": difference(theirs, predict()),
        **others(functional, attention, predict, theirs),
    }


def test_tabicl():
    found = in_child("tabicl", tabicl_with_ours)
    asked, answered, left = found["calls"]
    assert asked == answered > 0
    assert left == {}
    assert found["closed"] == 0
    check(found)


LAYERS = {
    "nothing": {},
    "window": {"window_size": 20},
    "window -1": {"window_size": -1, "softcap": 0.0},
    "softcap": {"softcap": 0.5, "window_size": 40},
    "slopes": {"use_alibi_slopes": True},
}


def anemoi_with_ours():
    install, version = lines("Anemoi")
    names = {}
    exec(install, names)
    found = {case: anemoi_with(**options) for case, options in LAYERS.items()}
    exec(version, names)
    return found | {"rotary": anemoi_with(use_rotary_embeddings=True)}


def anemoi_with(**options):
    import torch

    import fastattn.flash_attn

    torch.manual_seed(2)
    heads, tokens, batch, width = 3, 150, 2, 48
    layer, call = anemoi_layer(heads, width, **options)
    call = functools.partial(call, torch.randn(batch * tokens, width), batch)
    found = {"function": layer.attention.attention is fastattn.flash_attn.flash_attn_func}
    ours = results_and_gradients(layer, call)
    layer.attention.attention = definition
    theirs = results_and_gradients(layer, call)
    found |= differences(theirs, ours)
    found |= others(layer.attention, "attention", call, theirs[0], length=-3, heads=-2)
    if not options.keys() - {"window_size"}:  # what anemoi's other implementation does too
        implementation = {"attention_implementation": "scaled_dot_product_attention"}
        _, dense = anemoi_layer(heads, width, **options, **implementation)
        found["dense"] = difference(dense(*call.args), ours[0])
    return found


def definition(q, k, v, *, causal, window_size, dropout_p, softcap, alibi_slopes):
    """Compute what anemoi asks of flash-attn, by the formula."""
    import torch

    assert not causal
    assert dropout_p == 0
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance.abs()
    left, right = window_size
    far = ((left >= 0) & (distance < -left)) | ((right >= 0) & (distance > right))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(far, -torch.inf).softmax(-1), v)


@pytest.fixture(scope="module")
def found_of_anemoi():
    return in_child("anemoi", anemoi_with_ours)


@pytest.mark.parametrize("case", [*LAYERS, "rotary"])
def test_anemoi(found_of_anemoi, case):
    found = found_of_anemoi[case]
    assert found["function"]
    check(found)
    assert ("dense" in found) == (case in ("nothing", "window"))
    assert found.get("dense", 0) <= TOLERANCE


def triangle_with_ours(package):
    import torch

    import fastattn.torch

    torch.manual_seed(2)
    layer = triangle_attention(package, width=12, heads=3, head_dim=8)
    x = torch.randn(2, 20, 20, 12)
    mask = (torch.rand(2, 20, 20) > 0.2).float()
    mask[0, 3] = 0  # nothing is left of the row: theirs average it, which nobody needs
    used = mask.any(-1)[..., None, None]
    theirs = results_and_gradients(layer, lambda: layer(x, mask) * used)
    function, *places = lines("OpenFold3 and Boltz")
    exec(function + next(x for x in places if package in x), {})
    ours = results_and_gradients(layer, lambda: layer(x, mask) * used)
    changes = others(fastattn.torch, "attention", lambda: layer(x, mask) * used, theirs[0])
    return differences(theirs, ours) | changes


@pytest.mark.parametrize("package", ["openfold3", "boltz"])
def test_triangle_attention(package):
    check(in_child(package, triangle_with_ours, package))
