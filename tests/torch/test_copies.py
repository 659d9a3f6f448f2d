# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a patched function are copied, saved and sent without ours."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

import fastattn.torch as ft
from tests.torch.problems import EXACT, F, near, rand


class Holds(torch.nn.Module):
    """Takes the function when it is made."""

    def __init__(self):
        super().__init__()
        self.function = F.scaled_dot_product_attention
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.function(x * self.scale, x, x, is_causal=True)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.promise("patch-restores")
@pytest.mark.parametrize("way", WAYS)
def test_modules_that_hold_the_function(way):
    x = rand(1, 2, 5, 8)
    expected = EXACT(x, x, x, is_causal=True)
    p = ft.patch()
    module = Holds()
    another = WAYS[way](module)
    near(another(x), expected)
    assert p.report()["answered"] == 1
    with ft.patch() as inner:  # what is loaded is what stands there now
        WAYS[way](module)(x)
    assert inner.report()["answered"] == int(way not in ("deepcopy", "copy"))
    p.close()
    answered = p.report()["answered"]
    for closed in (module, another, WAYS[way](module)):
        near(closed(x), expected)
        assert p.report()["answered"] == answered
    assert pickle.loads(pickle.dumps(module)).function is EXACT


def attend_in_child(module, x):
    """Return the result, and whether torch's own has computed it."""
    return module(x).detach(), module.function is EXACT


def test_modules_that_hold_the_function_are_sent():
    x = rand(1, 2, 5, 8)
    with ft.patch():
        module = Holds()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            out, torchs_own = pool.apply(attend_in_child, (module, x))
    near(out, EXACT(x, x, x, is_causal=True))
    assert torchs_own


def test_a_patch_is_neither_copied_nor_saved():
    with ft.patch() as p:
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="must not be copied or saved: it holds a switch"):
                way(p)
