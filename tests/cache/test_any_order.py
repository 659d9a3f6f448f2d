# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a cache, in any order: hypothesis looks for an order that breaks it."""

import copy

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import PagedKVCache
from tests.cache.problems import NAN, assert_same_state, pickled, reopened, state


class Machine(RuleBasedStateMachine):
    """Caches beside lists of tokens."""

    PAGES = None

    def __init__(self):
        super().__init__()
        self.cache = PagedKVCache(1, 2, pages=self.PAGES)
        self.model = {}  # id: (tokens of head_dim 4: key and value; how many are evicted)
        self.rng = np.random.default_rng(0)

    def pages_unshared(self, extra=()):
        lengths = {i: len(tokens) for i, (tokens, _) in self.model.items()}
        for i, count in extra:
            lengths[i] += count
        return sum(-(-lengths[i] // 128) - begin // 128 for i, (_, begin) in self.model.items())

    def draw_ids(self, data):
        return data.draw(st.lists(st.sampled_from([*self.model]), unique=True, min_size=1))

    @rule()
    def add(self):
        self.model[self.cache.add()] = (np.zeros((0, 4), np.float32), 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def share(self, data):
        prefix = data.draw(st.sampled_from([*self.model]))
        tokens, begin = self.model[prefix]
        length = data.draw(st.none() | st.integers(begin, len(tokens)))
        added = self.cache.add(prefix, length)
        self.model[added] = (tokens[:length], begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from([*self.model]))
        self.cache.free(sequence)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.sampled_from([1, 2, 5, 90, 128, 200]))
    def append(self, data, tokens):
        ids = self.draw_ids(data)
        counts = [data.draw(st.integers(0, tokens) | st.just(tokens)) for _ in ids]
        new = self.rng.normal(size=(len(ids), 1, tokens, 4)).astype(np.float32)
        for b, count in enumerate(counts):
            new[b, :, count:] = NAN
        before = state(self.cache)
        try:
            self.cache.append(new[..., :2], new[..., 2:], counts, sequences=ids)
        except MemoryError:
            assert self.PAGES is not None
            assert self.pages_unshared(zip(ids, counts, strict=True)) > self.PAGES
            assert_same_state(self.cache, before)
            return
        for b, (sequence, count) in enumerate(zip(ids, counts, strict=True)):
            old, begin = self.model[sequence]
            self.model[sequence] = (np.concatenate([old, new[b, 0, :count]]), begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        ids = self.draw_ids(data)
        lengths = [data.draw(st.integers(self.model[i][1], len(self.model[i][0]))) for i in ids]
        self.cache.truncate(lengths, sequences=ids)
        for sequence, length in zip(ids, lengths, strict=True):
            tokens, begin = self.model[sequence]
            self.model[sequence] = (tokens[:length], begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), keep=st.integers(0, 300))
    def evict(self, data, keep):
        ids = self.draw_ids(data)
        self.cache.evict(keep, sequences=ids)
        for sequence in ids:
            tokens, begin = self.model[sequence]
            self.model[sequence] = (tokens, max(begin, len(tokens) - keep))

    @rule(again=st.sampled_from([reopened, pickled, copy.copy, copy.deepcopy]))
    def reopen(self, again):
        before = state(self.cache)
        self.cache = again(self.cache)
        if self.PAGES is None:
            before["free"] *= 0
        assert_same_state(self.cache, before)

    @precondition(lambda self: self.model)
    @rule(q_len=st.sampled_from([1, 3, 20]), window=st.none() | st.integers(0, 200))
    def attend(self, q_len, window):
        query = self.rng.normal(size=(len(self.model), 1, q_len, 2)).astype(np.float32)
        options = {"window": None if window is None else (window, 0), "return_lse": True}
        result = self.cache.attend(query, **options)
        for b, (tokens, begin) in enumerate(self.model.values()):
            expected = fastattn.reference.attention(
                query[b],
                tokens[None, begin:, :2],
                tokens[None, begin:, 2:],
                is_causal=True,
                query_offset=len(tokens) - q_len - begin,
                **options,
            )
            for got, right in zip(result, expected, strict=True):
                assert_allclose(got[b], right, atol=2e-5)

    @invariant()
    def counts(self):
        assert self.cache.sequences == [*self.model]
        assert_array_equal(self.cache.lengths, [len(x) for x, _ in self.model.values()])
        assert_array_equal(self.cache.begins, [begin for _, begin in self.model.values()])
        assert self.cache.used_pages <= self.pages_unshared()
        pages = self.cache.used_pages + self.cache.free_pages
        assert self.cache.nbytes == pages * 128 * (2 + 2) * 4
        if self.PAGES is not None:
            assert self.cache.used_pages + self.cache.free_pages == self.PAGES

    def teardown(self):
        for sequence in [*self.model]:
            self.cache.free(sequence)
        assert self.cache.used_pages == 0


class FixedMachine(Machine):
    PAGES = 6


few = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestGrowing = Machine.TestCase
TestGrowing.settings = few
TestFixed = FixedMachine.TestCase
TestFixed.settings = few
