# SPDX-License-Identifier: Apache-2.0
"""What tests of evictions share: a cache beside what it should hold, and options of calls."""

import numpy as np
import pytest

from fastattn import KVCache, PagedKVCache, reference
from tests.cache.problems import held, problem
from tests.support.correctness import assert_same_bits, assert_within_gate

OPTIONS = {
    "plain": {},
    "not causal": {"is_causal": False},
    "window": {"window": (30, 0)},
    "window over the gap": {"window": (290, 3)},
    "softcap and scale": {"softcap": 5.0, "scale": 0.4},
    "slopes": {"alibi_slopes": np.array([0.5, 0.1, 0.0, 0.03])},
    "sinks": {"sinks": np.array([0.0, 2.0, -1.0, 5.0], np.float32)},
    "mask": {"mask": "bool"},
    "float mask": {"mask": "float"},
    "bias": {"bias": "float"},
    "a bias for all rows": {"bias": "row"},
    "mask, slopes and window": {"mask": "bool", "alibi_slopes": np.ones(4) / 50, "window": (99, 9)},
}
closed_up_or_not = pytest.mark.parametrize("renumber", [False, True], ids=["gap", "closed up"])


class Beside:
    """A cache, and for each sequence which of all tokens it has, in order, and where they stand."""

    def __init__(self, cache, key, value):
        self.cache, self.key, self.value = cache, key, value
        self.batch = len(key)
        self.tokens = [np.zeros(0, int)] * self.batch
        self.positions = [np.zeros(0, int)] * self.batch
        self.count = 0
        self.rng = np.random.default_rng(0)

    def append(self, count):
        new = slice(self.count, self.count + count)
        lengths = self.cache.lengths
        self.cache.append(self.key[:, :, new], self.value[:, :, new])
        for b in range(self.batch):
            self.tokens[b] = np.append(self.tokens[b], np.arange(new.start, new.stop))
            self.positions[b] = np.append(self.positions[b], lengths[b] + np.arange(count))
        self.count += count

    def evict(self, keep, keep_first=0, renumber=False):
        self.cache.evict(keep, keep_first=keep_first, renumber=renumber)
        keeps, firsts = (np.broadcast_to(x, self.batch) for x in (keep, keep_first))
        for b in range(self.batch):
            n = len(self.tokens[b])
            stays = (self.positions[b] < firsts[b]) | (np.arange(n) >= n - keeps[b])
            self.tokens[b], self.positions[b] = self.tokens[b][stays], self.positions[b][stays]
            if renumber:
                self.positions[b] = np.arange(stays.sum())

    def options(self, query, options):
        """Return the options with masks and biases of random numbers."""
        shape = (*query.shape[:3], int(self.cache.lengths.max()))
        options = dict(options)
        for name in {"mask", "bias"} & {*options}:
            numbers = self.rng.normal(size=shape[2:] if options[name] == "row" else shape)
            options[name] = numbers > -0.5 if options[name] == "bool" else numbers.astype("f4")
        return options

    def dense(self, b, query, dtype, options):
        """Return a sequence's keys and values at all positions, and its options with a mask."""
        length = int(self.cache.lengths[b])
        own = {"is_causal": True, "query_offset": length - query.shape[2]} | options
        there = np.zeros(length, bool)
        there[self.positions[b]] = True
        operands = []
        for x in (self.key, self.value):
            whole = np.zeros((x.shape[1], length, x.shape[3]), np.float64)
            whole[:, there] = held(x[b][:, self.tokens[b]], dtype)
            operands.append(whole if dtype == np.int8 else whole.astype(dtype))
        for name in {"mask", "bias"} & {*own}:
            shape = (*query.shape[:3], int(self.cache.lengths.max()))
            own[name] = np.broadcast_to(own[name], shape)[b, ..., :length]
        mask = own.get("mask", True)
        is_bool = np.asarray(mask).dtype == bool
        own["mask"] = mask & there if is_bool else np.where(there, mask, -np.inf).astype("f4")
        return operands, own

    def check(self, query, dtype, **options):
        """Assert that the results are those of a mask over all positions."""
        options = self.options(query, options)
        result = self.cache.attend(query, return_lse=True, **options)
        for b in range(self.batch):
            operands, own = self.dense(b, query, dtype, options)
            assert_within_gate(tuple(x[b] for x in result), query[b], *operands, **own)

    def check_sums(self, query, dtype, **options):
        """Assert that the column sums are those of a mask over all positions; return them."""
        options = self.options(query, options)
        out, lse, sums = self.cache.attend(
            query, return_lse=True, return_column_sums=True, **options
        )
        plain = self.cache.attend(query, return_lse=True, **options)
        assert_same_bits(out, plain[0])
        assert_same_bits(lse, plain[1])
        for b in range(self.batch):
            operands, own = self.dense(b, query, dtype, options)
            length = int(self.cache.lengths[b])
            exact = (x.astype(np.float64) for x in (query[b], operands[0]))
            weights = reference.attention_weights(*exact, **own)
            np.testing.assert_allclose(
                sums[b, :, :length], weights.sum(axis=1), rtol=2e-5, atol=2e-6
            )
            gone = np.ones(sums.shape[2], bool)
            gone[self.positions[b]] = False
            assert (sums[b, :, gone] == 0).all()
        return sums

    def check_short(self, query, dtype):
        """Assert that the results are those of a short call, with the tokens that are left."""
        result = self.cache.attend(query, return_lse=True)
        for b in range(self.batch):
            kept = [held(x[b][:, self.tokens[b]], dtype) for x in (self.key, self.value)]
            offset = len(self.tokens[b]) - query.shape[2]
            own = tuple(x[b] for x in result)
            assert_within_gate(own, query[b], *kept, is_causal=True, query_offset=offset)


def beside(dtype, tokens, q_len=1, *, kind=KVCache, batch=2, **options):
    """Return a query, and a cache beside what it should hold."""
    query, key, value = problem(dtype, tokens, q_len, batch=batch)
    if kind is KVCache:
        cache = KVCache(batch, 2, 16, value_head_dim=24, dtype=dtype, **options)
    else:
        cache = PagedKVCache(2, 16, value_head_dim=24, dtype=dtype, **options)
        for _ in range(batch):
            cache.add()
    return query, Beside(cache, key, value)
