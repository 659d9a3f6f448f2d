# SPDX-License-Identifier: Apache-2.0
"""Cases of test_modes.py: classes of tensors that override what torch's functions do, or do not."""

import pytest
import torch

import fastattn
import fastattn.torch as ft
from tests.torch.problems import DIRECT, EXACT, F, both, near, patched, rand, small_operands


def numbers(x):
    return x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x


class Negated(torch.Tensor):
    """Its attention is the negative: of the function that stands in torch.nn.functional."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return -F.scaled_dot_product_attention(*map(numbers, args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class NegatedByTable(torch.Tensor):
    """Likewise, of the functions in a table that was made when its module was imported."""

    TABLE = {EXACT: lambda *args, **kwargs: -EXACT(*map(numbers, args), **kwargs)}  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.TABLE:
            return cls.TABLE[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Declines(NegatedByTable):
    """Likewise, and declines what is not in the table."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.TABLE:
            return cls.TABLE[func](*args, **(kwargs or {}))
        return NotImplemented


class NegatedRaw(torch.Tensor):
    """Likewise, of the function that stands in torch.nn.functional, to which it hands its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return -func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


class KnowsOurs(torch.Tensor):
    """Likewise, of a function of fastattn.torch."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = func(*map(numbers, args), **{k: numbers(x) for k, x in (kwargs or {}).items()})
        return -out if func in (ft.attention, DIRECT) else out


def functions():
    query, key, value = small_operands()
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    for kind in (Negated, NegatedByTable, Declines, NegatedRaw):

        def check(sdpa, kind=kind):
            out = sdpa(query.as_subclass(kind), key, value)
            assert type(out) is torch.Tensor
            near(out, -EXACT(query, key, value))

        check(EXACT)
        counts = int(kind is Negated), {f"type {kind.__name__}": 1 + (kind is NegatedRaw)}
        patched(check, *counts)
        with ft.patch() as outer:
            patched(check, *counts)
        assert outer.report()["answered"] == 0
        words = "no implementation found" if kind is Declines else "overrides __torch_function__"
        for name, x in {
            "mask": rand(5, 7),
            "bias": rand(5, 7),
            "sinks": rand(2),
            "alibi_slopes": rand(2),
            "kv_lengths": torch.tensor([3]),
            "query_offset": torch.tensor([3]),
        }.items():
            options = {"query_offset": 0, name: x.as_subclass(kind)}
            with pytest.raises(TypeError, match=words):
                ft.attention(query, key, value, **options)
            with pytest.raises(TypeError):
                fastattn.attention(query, key, value, **options)
        starts = torch.tensor([0, 5])
        with pytest.raises(TypeError, match=words):
            ft.varlen_attention(*packed, starts.as_subclass(kind), starts)
        for function in (DIRECT, ft.attention):
            for place in range(3):
                tensors = [query, key, value]
                tensors[place] = tensors[place].as_subclass(kind)
                with pytest.raises(TypeError, match=words):
                    function(*tensors)
        with pytest.raises(TypeError, match=words):
            DIRECT(query, key, value, attn_mask=rand(5, 7).as_subclass(kind))
    for function in (DIRECT, ft.attention):
        near(function(query.as_subclass(KnowsOurs), key, value), -EXACT(query, key, value))


def operators():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    tensors = small_operands()
    two = [TwoTensor(x, 2 * x) for x in tensors]
    expected = [EXACT(*tensors), EXACT(*(2 * x for x in tensors))]
    bias = TwoTensor(rand(5, 7), rand(5, 7, seed=1))

    def check(sdpa):
        out = sdpa(*two)
        near(out.a, expected[0])
        near(out.b, expected[1])

    both(check, 0, {"type TwoTensor": 1})
    out = ft.attention(*two, bias=bias)
    near(out.b, EXACT(*(2 * x for x in tensors), attn_mask=bias.b))
    with pytest.raises(TypeError, match="query must be a tensor that NumPy can read"):
        fastattn.attention(*two)

    def shapes(sdpa):
        with FakeTensorMode():
            x = torch.empty(1, 2, 5, 8)
            mask = torch.empty(5, 5, dtype=torch.bool)
            assert sdpa(x, x, x, mask, 0.5).shape == x.shape

    both(shapes, 0, {"type FakeTensor": 1})


def nothing():
    class Named(torch.Tensor):
        pass

    query, key, value = small_operands()

    def check(sdpa):
        out = sdpa(query.as_subclass(Named), key, value)
        assert type(out) is Named
        near(numbers(out), EXACT(query, key, value))

    both(check, 0, {"type Named": 1})
    mask = rand(5, 7)
    out = ft.attention(query, key, value, mask=mask.as_subclass(Named))
    assert type(out) is Named
    near(numbers(out), EXACT(query, key, value, attn_mask=mask))
    out = fastattn.attention(query, key, value, mask=mask.as_subclass(Named))
    near(out, EXACT(query, key, value, attn_mask=mask))
