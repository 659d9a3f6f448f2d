# SPDX-License-Identifier: Apache-2.0
"""`KVCache` and `PagedKVCache`: any sequence of operations, beside lists of arrays.

A spec has the cache's sizes and a list of operations, each a name and its arguments; `Model` does
naively what the cache does. An operation that is refused must leave all as it was.
"""

import contextlib
import copy
import io
import pickle

import numpy as np

import fastattn
from tests.fuzz import attention
from tests.fuzz.compare import dtype_of, same
from tests.fuzz.problem import HALVES, LAYOUTS, chance, choice, generator, laid_out, number, often

PAGE = 128
COUNTS = ((0, 1, 1, 1, 2, 3, 17), (64, 100, 127, 128, 129, 130), (255, 257, 400))
Q_LENS = ((1, 1, 1, 2, 3), (5, 16, 17, 24), (40, 49))
KEPT = ((0, 1, 20, 100, 128, 129), (200, 300), (2**61,))


def draw_sizes(rng):
    """Draw what both kinds of cache have."""
    dtype = choice(rng, (*HALVES, "float32", "float32", "int8"))
    spec = {
        "dtype": dtype,
        "kv_heads": choice(rng, (1, 1, 2, 3)),
        "group": choice(rng, (1, 1, 2, 4, 17)),
        "head_dim": often(rng, (1, 2, 3, 4, 7, 8, 16), (24, 33, 64), (80, 128, 129)),
        "value_dim": often(rng, (1, 2, 3, 5, 8, 16), (24, 33, 64), (128, 257)),
        "data": number(rng),
        "threads": int(rng.integers(1, 6)),
    }
    if dtype == "int8" and chance(rng, 0.4):
        spec["kv_dtype"] = choice(rng, HALVES)
    spec["query_dtype"] = choice(rng, ("float32", spec.get("kv_dtype", dtype)))
    if spec["query_dtype"] == "int8":
        spec["query_dtype"] = "float32"
    return spec


def draw_attend(rng):
    """Draw a call of attend."""
    options = {}
    if chance(rng, 0.25):
        options["is_causal"] = False
    if chance(rng, 0.25):
        options["window"] = [choice(rng, (None, 0, 5, 130)), choice(rng, (None, 0, 3))]
    if chance(rng, 0.2):
        options["softcap"] = choice(rng, (0.5, 30.0))
    if chance(rng, 0.2):
        options["scale"] = choice(rng, (0.3, -0.5, 0))
    for name in ("sinks", "alibi_slopes", "mask", "bias"):
        if chance(rng, 0.15):
            options[name] = choice(rng, ("heads", "each"))
    return {
        "do": "attend",
        "q_len": often(rng, *Q_LENS),
        "layout": choice(rng, LAYOUTS),
        "options": options,
        "sums": chance(rng, 0.3),
        "placed": chance(rng, 0.2),
        "number": number(rng),
    }


def draw_append(rng):
    """Draw a call of append, for any number of sequences."""
    return {
        "do": "append",
        "tokens": often(rng, *COUNTS),
        "ragged": chance(rng, 0.4),
        "layout": choice(rng, LAYOUTS),
        "number": number(rng),
    }


def draw_cache(rng):
    """Draw the life of a KVCache."""
    spec = draw_sizes(rng) | {"batch": int(rng.integers(1, 5))}
    if chance(rng, 0.4):
        spec["capacity"] = often(rng, (1, 20, 128, 129), (257, 300), (600,))
    others = ("truncate", "evict", "reorder", "reopen", "copy")
    spec["operations"] = []
    for _ in range(rng.integers(2, 14)):
        kind = choice(rng, ("append",) * 4 + ("attend",) * 3 + others)
        spec["operations"].append(draw_operation(rng, kind))
    spec["operations"].append(draw_attend(rng))
    return spec


def draw_paged(rng):
    """Draw the life of a PagedKVCache."""
    spec = draw_sizes(rng) | {"page_size": choice(rng, (PAGE, PAGE, PAGE, 2 * PAGE))}
    if chance(rng, 0.4):
        spec["pages"] = int(rng.integers(1, 12))
    spec["from_pages"] = "pages" in spec and chance(rng, 0.5)
    others = ("add", "fork", "fork", "free", "truncate", "evict", "reopen", "copy")
    spec["operations"] = [{"do": "add"}]
    for _ in range(rng.integers(3, 18)):
        kind = choice(rng, ("append",) * 5 + ("attend",) * 3 + others)
        operation = draw_operation(rng, kind)
        if kind in ("append", "attend", "truncate", "evict"):
            operation["some"] = chance(rng, 0.5)
        spec["operations"].append(operation)
    spec["operations"].append(draw_attend(rng) | {"some": False})
    return spec


def draw_operation(rng, kind):
    """Draw the arguments of an operation."""
    if kind == "append":
        return draw_append(rng)
    if kind == "attend":
        return draw_attend(rng)
    operation = {"do": kind, "number": number(rng)}
    if kind == "evict":
        operation["keep"] = often(rng, *KEPT)
        operation["keep_first"] = choice(rng, (0, 0, 1, 4, 100, 130, 300))
        operation["renumber"] = chance(rng, 0.3)
    return operation


class Sequence:
    """The keys and values of one sequence, as lists; those of an evicted token are None.

    begin: of the newest tokens; first: how many at the start are apart from them; moved: whether
    tokens may lie elsewhere than their positions say.
    """

    def __init__(self, key=(), value=(), begin=0, first=0, moved=False):
        self.key, self.value = list(key), list(value)
        self.begin, self.first, self.moved = begin, first, moved

    def __len__(self):
        return len(self.key)

    def copy(self, length=None):
        """Return a sequence that begins as this one does."""
        return Sequence(self.key[:length], self.value[:length], self.begin, self.first, self.moved)

    def held(self):
        """Tell of each position whether its token is there."""
        return np.array([x is not None for x in self.key], bool)

    def evict(self, keep, keep_first, renumber):
        """Forget tokens; False: they would be in three parts, and all stay."""
        held, position = self.held(), np.arange(len(self))
        from_behind = held[::-1].cumsum()[::-1]
        stays = held & ((position < keep_first) | (from_behind <= keep))
        lost = np.flatnonzero(held & ~stays)
        for part in (held & (position < self.begin), held & (position >= self.begin)):
            if self.first and np.diff(stays[part].astype(int), prepend=0).clip(0).sum() > 1:
                return False
        self.begin = max(self.begin, *(lost + 1), 0)
        self.first = int(stays[: self.begin].sum())
        self.moved |= self.first > 0 or (renumber and self.begin > 0)
        for x in (self.key, self.value):
            x[:] = [token if stay else None for token, stay in zip(x, stays, strict=True)]
            if renumber:
                x[:] = [token for token in x if token is not None]
        if renumber:
            self.begin = self.first
        return True

    def arrays(self, spec):
        """Return what is attended to, (kv_heads, tokens, dim), from the first token on."""
        results = []
        for tokens, dim in ((self.key, spec["head_dim"]), (self.value, spec["value_dim"])):
            dtype = np.float64 if spec["dtype"] == "int8" else dtype_of(spec["dtype"])
            shape = (spec["kv_heads"], dim)
            whole = [np.zeros(shape) if x is None else x for x in tokens[self.start() :]]
            results.append(np.array(whole, dtype).reshape(-1, *shape).swapaxes(0, 1))
        return results

    def start(self):
        """Return the position of the first token that is there."""
        return min(np.flatnonzero(self.held()).tolist(), default=self.begin)


def held(x, dtype):
    """Return the numbers that a cache of the dtype keeps of tokens."""
    if dtype != "int8":
        return x
    x = x.astype(np.float32)
    scale = abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    whole = np.rint(x / np.where(scale == 0, 1, scale))
    return whole.astype(np.float64) * scale


class Run:
    """A cache and its model, and what can be done with both; `paged` says of which kind."""

    def __init__(self, spec, paged):
        self.spec, self.paged = spec, paged
        sizes = {
            "kv_heads": spec["kv_heads"],
            "head_dim": spec["head_dim"],
            "value_head_dim": spec["value_dim"],
            "dtype": dtype_of(spec["dtype"]),
        }
        if not paged:
            self.cache = fastattn.KVCache(
                batch=spec["batch"], capacity=spec.get("capacity"), **sizes
            )
            self.model = {b: Sequence() for b in range(spec["batch"])}
            return
        self.model = {}
        if not spec["from_pages"]:
            self.cache = fastattn.PagedKVCache(
                pages=spec.get("pages"), page_size=spec["page_size"], **sizes
            )
            return
        shape = (spec["pages"], spec["kv_heads"], spec["page_size"])
        arrays = {}
        for name in ("key", "value"):
            dim = spec["head_dim" if name == "key" else "value_dim"]
            fill = 99 if spec["dtype"] == "int8" else np.nan
            arrays[name] = np.full((*shape, dim), fill, sizes["dtype"])
            if spec["dtype"] == "int8":
                arrays[f"{name}_scale"] = np.full(shape, np.nan, np.float32)
        tables = np.zeros((0, 3), int)
        self.cache = fastattn.PagedKVCache.from_pages(**arrays, tables=tables, lengths=0)

    def chosen(self, rng, operation):
        """Return ids, and the argument that says so."""
        ids = [*self.model]
        if not self.paged or not operation.get("some"):
            return ids, {}
        ids = [int(i) for i in rng.permutation(ids)[: rng.integers(0, len(ids) + 1)]]
        return ids, {"sequences": ids}

    def numbers(self, rng, shape, dtype):
        """Return random numbers; values have a mean."""
        return (rng.standard_normal(shape, np.float32) + np.float32(0.5)).astype(dtype)

    def add(self, rng, operation):
        """Add an empty sequence."""
        self.model[self.cache.add()] = Sequence()

    def fork(self, rng, operation):
        """Add a sequence that begins as another."""
        if not self.model:
            return
        parent = choice(rng, [*self.model])
        tokens = self.model[parent]
        length = int(rng.integers(tokens.begin, len(tokens) + 1)) if chance(rng, 0.6) else None
        self.model[self.cache.add(parent, length)] = tokens.copy(length)

    def free(self, rng, operation):
        """Forget a sequence."""
        if self.model:
            sequence = choice(rng, [*self.model])
            self.cache.free(sequence)
            del self.model[sequence]

    def append(self, rng, operation):
        """Append tokens, if there is room for them."""
        spec, tokens = self.spec, operation["tokens"]
        ids, which = self.chosen(rng, operation)
        given = dtype_of(
            spec.get("kv_dtype", "float32" if spec["dtype"] == "int8" else spec["dtype"])
        )
        lengths = np.full(len(ids), tokens)
        if operation["ragged"]:
            lengths = rng.integers(0, tokens + 1, len(ids))
            which = which | {"lengths": lengths}
        new = []
        for dim in (spec["head_dim"], spec["value_dim"]):
            x = self.numbers(rng, (len(ids), spec["kv_heads"], tokens, dim), given)
            if chance(rng, 0.1):
                x[:, :, ::3] = 0
            new.append(x)
        for b, count in enumerate(lengths):
            for x in new:
                x[b, :, count:] = np.nan
        layouts = [operation["layout"] if "repeated" not in operation["layout"] else "plain"] * 2
        before = self.pages()
        try:
            self.cache.append(
                *(laid_out(x.copy(), y) for x, y in zip(new, layouts, strict=True)), **which
            )
        except MemoryError:
            assert not self.fits(ids, lengths), "there was room for what was appended"
            assert self.pages() == before, "pages are lost by an append that was refused"
            return
        if not self.paged and spec.get("capacity"):
            assert self.fits(ids, lengths), "more than the capacity was appended"
        for b, (sequence, count) in enumerate(zip(ids, lengths, strict=True)):
            for x, tokens_of in zip(
                new, (self.model[sequence].key, self.model[sequence].value), strict=True
            ):
                tokens_of += list(held(x[b, :, :count], spec["dtype"]).swapaxes(0, 1))

    def fits(self, ids, lengths):
        """Return whether there is certainly room for so many tokens more of each."""
        spec = self.spec
        if not self.paged:
            kept = [len(s) - s.begin + s.first for s in self.model.values()]
            return "capacity" not in spec or max(np.add(kept, lengths)) <= spec["capacity"]
        if "pages" not in spec:
            return True
        size, needed = spec["page_size"], 0
        for sequence, count in zip(ids, lengths, strict=True):
            length = len(self.model[sequence])
            if self.model[sequence].moved:
                needed += -(-count // size) + 1
                continue
            needed += -(-(length + count) // size) - -(-length // size)
            needed += bool(length % size and count)  # perhaps a copy of a shared page
        return needed <= self.cache.free_pages

    def pages(self):
        """Return what the pool says of itself."""
        pool = self.cache if self.paged else self.cache._cache
        return pool.used_pages, pool.free_pages

    def truncate(self, rng, operation):
        """Forget the last tokens."""
        ids, which = self.chosen(rng, operation)
        ends = [int(rng.integers(self.model[i].begin, len(self.model[i]) + 1)) for i in ids]
        self.cache.truncate(np.array(ends, int), **which)
        for i, end in zip(ids, ends, strict=True):
            del self.model[i].key[end:], self.model[i].value[end:]

    def evict(self, rng, operation):
        """Forget the first tokens."""
        ids, which = self.chosen(rng, operation)
        how = operation["keep"], operation.get("keep_first", 0), operation.get("renumber", False)
        after = {i: self.model[i].copy() for i in ids}
        refused = any(how[1] > len(x) or not x.evict(*how) for x in after.values())
        before = self.pages()
        try:
            self.cache.evict(how[0], keep_first=how[1], renumber=how[2], **which)
        except ValueError:
            assert refused, "an eviction was refused"
            assert self.pages() == before, "pages are lost by an eviction that was refused"
        else:
            assert not refused, "an eviction was not refused"
            self.model |= after

    def reorder(self, rng, operation):
        """Let elements of the batch go on from others."""
        indices = rng.integers(0, len(self.model), len(self.model))
        self.cache.reorder(indices)
        self.model = {b: self.model[int(i)].copy() for b, i in enumerate(indices)}

    def reopen(self, rng, operation):
        """Save and load."""
        file = io.BytesIO()
        self.cache.save(file)
        file.seek(0)
        self.cache = type(self.cache).load(file)

    def copy(self, rng, operation):
        """Go on with a copy, whatever happens to the original; or be refused one."""
        how = choice(rng, (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
        try:
            other = how(self.cache)
        except TypeError:
            return
        original, self.cache = self.cache, other
        original.truncate(original.begins)
        spec, n = self.spec, len(self.model)
        dtype = dtype_of("float32" if spec["dtype"] == "int8" else spec["dtype"])
        dims = (spec["head_dim"], spec["value_dim"])
        with contextlib.suppress(MemoryError):
            original.append(*(np.full((n, spec["kv_heads"], 20, d), 9, dtype) for d in dims))

    def attend(self, rng, operation):
        """Attend, and compare with the definition and with what has no pages."""
        spec, q_len = self.spec, operation["q_len"]
        ids, which = self.chosen(rng, operation)
        heads = spec["kv_heads"] * spec["group"]
        dtype = dtype_of(spec["query_dtype"])
        query = self.numbers(rng, (len(ids), heads, q_len, spec["head_dim"]), dtype)
        layout = operation["layout"] if "repeated" not in operation["layout"] else "plain"
        lengths = [len(self.model[i]) for i in ids]
        options = self.options(
            rng, operation["options"], heads, (len(ids), heads, q_len, max([0, *lengths]))
        )
        offsets = [n - q_len for n in lengths]
        if operation.get("placed"):
            offsets = rng.integers(-40, 300, len(ids))
            which = which | {"query_offset": offsets}
        fastattn.set_num_threads(spec["threads"])
        result = self.cache.attend(
            laid_out(query.copy(), layout), return_lse=True, **which, **options
        )
        fastattn.set_num_threads(spec["threads"] % 5 + 1)
        room = attention.room_for(result[0], rng)[0]
        got = self.cache.attend(query, return_lse=True, out=room, **which, **options)
        same("again, with other threads", got, result)
        assert got[0] is room, "out is not returned"
        sums = None
        if operation.get("sums"):
            *got, sums = self.cache.attend(
                query, return_lse=True, return_column_sums=True, **which, **options
            )
            same("with column sums", got, result)
        for b, i in enumerate(ids):
            tokens = self.model[i]
            key, value = tokens.arrays(spec)
            own = {"is_causal": True} | options
            start = tokens.start()
            own["query_offset"] = int(offsets[b]) - start
            for name in ("mask", "bias"):
                if name in own:
                    whole = np.broadcast_to(own[name], (len(ids), heads, q_len, max(lengths)))
                    own[name] = whole[b, ..., start : len(tokens)]
            if not tokens.held()[start:].all():
                own["mask"] = own.get("mask", True) & tokens.held()[start:]
            if np.ndim(own.get("alibi_slopes")) == 2:
                own["alibi_slopes"] = own["alibi_slopes"][b]
            mine = tuple(x[b] for x in result)
            attention.right(mine, [query[b], key, value], own, int8=spec["dtype"] == "int8")
            if sums is not None:
                weights = np.zeros((heads, q_len, max(lengths)))
                weights[..., start : len(tokens)] = fastattn.reference.attention_weights(
                    query[b].astype(np.float64), key.astype(np.float64), **own
                )
                np.testing.assert_allclose(sums[b], weights.sum(axis=1), rtol=1e-3, atol=1e-4)
            if spec["dtype"] != "int8" and not tokens.begin and not tokens.moved:
                alone = fastattn.attention(query[b], key, value, return_lse=True, **own)
                same(f"sequence {i} as arrays", mine, alone)

    def options(self, rng, given, heads, pairs):
        """Return the options of a call of attend."""
        options = {}
        for name, x in given.items():
            batch = (pairs[0],) if x == "each" else ()
            if name == "window":
                options[name] = tuple(x)
            elif name == "sinks":
                options[name] = rng.normal(size=heads).astype(np.float32)
            elif name == "alibi_slopes":
                options[name] = rng.random((*batch, heads)) ** 3
            elif name == "mask":
                shape = (*batch, 1, 1, pairs[3]) if batch else pairs[2:]
                options[name] = rng.random(shape) < 0.8
            elif name == "bias":
                shape = pairs if batch else (heads, 1, pairs[3])
                options[name] = rng.normal(size=shape).astype(np.float32)
            else:
                options[name] = x
        return options

    def agree(self):
        """Assert that the cache says of itself what the model says."""
        cache, model = self.cache, self.model
        if self.paged:
            assert cache.sequences == [*model], f"sequences are {cache.sequences}, not {[*model]}"
        lengths, begins = [len(s) for s in model.values()], [s.begin for s in model.values()]
        assert [*cache.lengths] == lengths, f"lengths are {cache.lengths}, not {lengths}"
        assert [*cache.begins] == begins, f"begins are {cache.begins}, not {begins}"
        first = [s.first for s in model.values()]
        assert [*cache.kept_first] == first, f"kept_first is {cache.kept_first}, not {first}"
        size = self.spec.get("page_size", PAGE)
        most = sum(
            -(-(len(s) - s.begin) // size) - (-s.first // size) + 2
            if s.moved
            else -(-len(s) // size) - s.begin // size
            for s in model.values()
        )
        used = self.pages()[0]
        assert used <= most, f"{used} pages are used for what needs {most} at most"


def check(spec):
    """Raise if something that is attended to, or said, is not what the model has."""
    run = Run(spec, paged="page_size" in spec)
    fastattn.set_num_threads(spec["threads"])
    for n, operation in enumerate(spec["operations"]):
        rng = generator(spec["data"] + operation.get("number", n), operation["do"])
        try:
            getattr(run, operation["do"])(rng, operation)
            run.agree()
        except Exception as error:
            error.add_note(f"in operation {n}, {operation['do']}")
            raise
