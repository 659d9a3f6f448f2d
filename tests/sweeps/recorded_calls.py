#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Random calls of everything public, recorded: a refactoring changes no bit and no word.

Record before a change, compare after it::

    python tests/sweeps/recorded_calls.py record before.json
    python tests/sweeps/recorded_calls.py compare before.json --expect "old words=new words"

A record has, for every call, a digest of the bits that came back, or the words of the error, and
the warnings; and the signature of every public function. The calls are those of the fuzzers' cases
and of cases of the drop-ins, which depend on the kind of case, its number and the instruction set
alone; many are made again with a mistake. The file takes nothing private of fastattn, so that it
records any two builds: PYTHONPATH chooses one. `--expect` says which words changed on purpose.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

import fastattn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.fuzz import attention, backward, caches, command, invalid, problem, varlen
from tests.fuzz import torch_gradients as gradients
from tests.fuzz.compare import dtype_of
from tests.fuzz.problem import chance, choice

SETTINGS = {"FASTATTN_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
SETTINGS |= {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
MODULES = ("", ".reference", ".torch", ".jax", ".flash_attn", ".transformers", ".cuda")
# How many cases of each kind there are, for each instruction set: of the fuzzers, and of this file.
FUZZED = {"attention": 60, "backward": 50, "varlen": 22, "torch": 50}
FUZZED |= {"cache": 12, "paged": 12, "merge": 12, "invalid": 80}
OTHERS = {
    "beside": 50,
    "torch_modules": 22,
    "flash_attn": 40,
    "flash_kvcache": 16,
    "jax": 12,
    "models": 1,
}
ONCE = {"sizes": 1, "signatures": 1}  # for one instruction set
FREE = "annotations of "  # a text that begins so may change
MISTAKES = 0.15  # how often a call is made again with a mistake
JUNK = (None, True, -1, 2, 1.5, np.nan, "a", [], (1,), {}, np.zeros(3), np.ones((2, 3, 4), int))


class Tape:
    """The calls of a case, as texts; those that a recorded call makes itself are not recorded."""

    def __init__(self):
        self.texts, self.rng, self.inside = [], None, False

    def note(self, name, *results):
        """Record results."""
        self.texts.append(f"{name}: " + " ".join(map(told, results)))

    def call(self, name, function, *args, **kwargs):
        """Call a function; record its result, or its error, and its warnings and files."""
        self.inside = True
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                result = error
            files = [x.getvalue() for x in args if isinstance(x, io.BytesIO)]
            self.note(name, result, *files, *(f"{x.category.__name__}: {x.message}" for x in heard))
        self.inside = False
        return result

    def recorded(self, name, function):
        """Return a function that does the same and is recorded; it is called wrongly, too."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            if self.inside or self.rng is None:
                return function(*args, **kwargs)
            result = self.call(name, function, *args, **kwargs)
            keeps = "Cache." in name or "out" in kwargs or not name.startswith("fastattn")
            if not keeps and chance(self.rng, MISTAKES):
                given = {**dict(enumerate(args)), **kwargs}
                given[choice(self.rng, [*given, "nonsense"])] = choice(self.rng, JUNK)
                args = [given.pop(i) for i in range(len(args))]
                self.call(f"{name}, mistaken", function, *args, **given)
            if isinstance(result, Exception):
                raise result
            return result

        return call


tape = Tape()


def told(x):
    """Return a text that differs if a bit does; addresses of memory are left out."""
    if isinstance(x, BaseException):
        x = f"{type(x).__name__}: {x}"
    if isinstance(x, bytes):
        x = f"{len(x)} bytes {hashlib.sha256(x).hexdigest()[:16]}"
    if isinstance(x, str):
        return re.sub(r"0x[0-9a-f]{6,}", "0x...", x)
    if isinstance(x, dict):
        return "{" + ", ".join(f"{told(k)}: {told(v)}" for k, v in x.items()) + f"}} {x}"
    if isinstance(x, tuple | list):
        return f"({', '.join(map(told, x))})"
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return type(x).__name__ if " object at 0x" in repr(x) else told(repr(x))
    text = f"{type(x).__name__} {x.dtype} {tuple(x.shape)}"
    if isinstance(x, torch.Tensor):
        text += f" {x.stride()} {x.requires_grad}"
        x = gradients.array(x)
    return f"{text} {told(np.asarray(x).tobytes())}"


def functions():
    """Yield every public function and class, and its methods: where, its name and the whole one."""
    for module in (importlib.import_module(f"fastattn{name}") for name in MODULES):
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", 0) == module.__name__]
        for name in sorted(getattr(module, "__all__", own)):
            x = getattr(module, name)
            if name.startswith("_") or not callable(x):
                continue
            yield module, name, f"{module.__name__}.{name}"
            for method in dir(x) if inspect.isclass(x) else ():
                if method == "__init__" or not method.startswith("_"):
                    yield x, method, f"{module.__name__}.{name}.{method}"


def drawn(rng, number, draw=problem.draw):
    """Draw a spec; the first ones have one option each, in every dtype."""
    spec = draw(rng)
    if number < len(problem.OPTIONS) * len(problem.FLOATS):
        dtype, option = divmod(number, len(problem.OPTIONS))
        name = problem.OPTIONS[option]
        while name not in spec["options"]:
            spec = draw(rng)
        alone = (name, "seed") if name == "dropout_p" else (name,)
        spec["options"] = {name: spec["options"][name] for name in alone}
        spec["dtype"] = problem.FLOATS[dtype]
        if spec["dtype"] != "float32":
            spec.pop("kv_dtype", None)
    return spec


def fuzzed(kind, rng, number, count):
    """Run a case of the fuzzers."""
    module, most = command.module_of(kind), len(problem.OPTIONS) * len(problem.FLOATS)
    alone = kind in ("attention", "backward", "varlen", "torch")
    spec = drawn(rng, number * max(1, most // count) if alone else most, module.draw)
    checks = [name for name in spec.get("checks", ()) if name != "others"]  # `beside` has them
    module.check(spec | {"checks": checks, "threads": 2})


def pages(run):
    """Record what a cache says of itself; say nothing of its pages."""
    tape.note(f"fastattn.{type(run.cache).__name__}", run.cache, run.cache.nbytes)
    return 0, 0


# Cases that the fuzzers do not have


def some(rng, **options):
    """Return some of the options."""
    return {name: x for name, x in options.items() if chance(rng, 0.3)}


def differentiated(function, *args, **options):
    """Record a recorded function's gradients."""
    with contextlib.suppress(Exception):
        result = function(*args, **options)
        out = result[0] if isinstance(result, tuple) else result
        torch.autograd.backward(out, torch.randn(out.shape).to(out.dtype))
        given = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        tape.note("gradients", *(x.grad for x in given if x.requires_grad))


def beside(rng, number):
    """Record the functions beside `attention`, and the doors to a GPU for what is on none."""
    p = problem.Problem(drawn(rng, number) | {"threads": 2})
    query, key, value = p.operands
    names = {"scale", "is_causal", "mask"} & {*p.options}
    sdpa = {"attn_mask" if name == "mask" else name: p.options[name] for name in names}
    seen = {n: x for n, x in p.options.items() if n not in ("dropout_p", "seed")}
    small = () if np.prod(p.pairs) > 1e5 else (fastattn.reference.attention,)
    for function in (fastattn.explain, fastattn.cuda.explain, fastattn.cuda.attention, *small):
        with contextlib.suppress(Exception):
            function(query, key, value, **p.options)
    fastattn.dropout_mask(query, key, dropout_p=0.3, seed=number)
    fastattn.attention_weights(query, key, **seen)
    fastattn.scaled_dot_product_attention(query, key, value, enable_gqa=p.heads > 1, **sdpa)


def torch_modules(rng, number):
    """Record packed tensors, and a layer under a patched torch."""
    torch.manual_seed(number)
    p = varlen.Packed(drawn(rng, 2 * number, varlen.draw))
    options = {n: x for n, x in p.options.items() if isinstance(x, np.ndarray)}
    options = {n: np.array(x, x.dtype.newbyteorder("=")) for n, x in options.items()}
    options = p.options | {n: gradients.tensor(x) for n, x in options.items()}
    packed = [gradients.tensor(np.array(x, order="C")).requires_grad_() for x in p.operands]
    differentiated(fastattn.torch.varlen_attention, *packed, *p.starts, **options)

    heads = number % 3 + 1
    layer = torch.nn.TransformerEncoderLayer(heads * 8, heads, 32, 0.0, batch_first=True)
    x = torch.randn(2, number + 1, heads * 8, requires_grad=True)
    with fastattn.torch.patch() as patch:
        hidden = torch.rand(x.shape[:2]) < 0.2
        differentiated(tape.recorded("patched layer", layer), x, src_key_padding_mask=hidden)
        patch.report()


def flash_sizes(rng, number):
    """Seed torch; return sizes and dtype of a call of flash-attn, and options of it."""
    torch.manual_seed(number)
    batch, kv_heads, group, dim = (choice(rng, x) for x in ((1, 3), (1, 2), (1, 4), (8, 64)))
    q_len, kv_len = (int(x) for x in rng.integers(1, 60, 2))
    options = {"alibi_slopes": torch.rand(*choice(rng, ((), (batch,))), kv_heads * group)}
    options["window_size"] = (int(rng.integers(-1, 20)), int(rng.integers(-1, 5)))
    options = some(rng, softmax_scale=0.3, softcap=5.0, causal=True, **options)
    dtype = getattr(torch, problem.FLOATS[number % 4])
    return (batch, q_len, kv_len, kv_heads, kv_heads * group, dim, dtype), options


def flash_attn(rng, number):
    """Record flash-attn's functions: arrays in one or apart, with padding or without."""
    (batch, q_len, kv_len, kv_heads, heads, dim, dtype), options = flash_sizes(rng, number)
    form, padded = choice(rng, ("", "kvpacked", "qkvpacked")), chance(rng, 0.5)
    options |= some(rng, dropout_p=0.2, deterministic=True, return_attn_probs=True)
    query = torch.randn(batch, q_len, heads, dim, dtype=dtype)
    key, value, own = torch.randn(3, batch, kv_len, kv_heads, dim, dtype=dtype)
    given = [query, torch.stack([key, value], 2)] if form else [query, key, value]
    given = [torch.stack([own, key, value], 2)] if form == "qkvpacked" else given
    sizes = []
    if padded:
        masks = [torch.rand(x.shape[:2]) < 0.7 for x in given[:2]]
        padded = [fastattn.flash_attn.unpad_input(x, masks[x is not given[0]]) for x in given]
        fastattn.flash_attn.pad_input(padded[0][0], padded[0][1], *masks[0].shape)
        given, sizes = [x[0] for x in padded], [x[i] for i in (2, 3) for x in padded[:2]]
    name = "_".join(x for x in ("flash_attn", "varlen" if sizes else "", form, "func") if x)
    given = [x.requires_grad_() for x in given]
    differentiated(getattr(fastattn.flash_attn, name), *given, *sizes, **options)


def flash_kvcache(rng, number):
    """Record flash-attn's call of a cache."""
    (batch, q_len, _, kv_heads, heads, dim, dtype), options = flash_sizes(rng, number)
    query = torch.randn(batch, q_len, heads, dim, dtype=dtype)
    cached = torch.randn(2, 2 * batch, 128, kv_heads, dim, dtype=dtype)
    lengths = torch.from_numpy(rng.integers(9, 60, batch))
    order = torch.from_numpy(rng.permutation(2 * batch).astype(np.int32))
    options |= some(rng, return_softmax_lse=True, cache_seqlens=lengths, cache_leftpad=lengths // 9)
    rows = {"cache_batch_idx": order[:batch]}
    options |= choice(rng, ({}, rows, {"block_table": order.reshape(batch, 2)}))
    if chance(rng, 0.6):
        new = torch.randn(2, batch, int(rng.integers(1, 9)), kv_heads, dim, dtype=dtype)
        options |= {"k": new[0], "v": new[1], "cache_seqlens": lengths}
        turns = torch.randn(2, 256, dim // 4, dtype=dtype)
        options |= choice(rng, ({}, {"rotary_cos": turns[0], "rotary_sin": turns[1]}))
    with contextlib.suppress(Exception):
        fastattn.flash_attn.flash_attn_with_kvcache(query, *cached, **options)
    tape.note("flash_attn's cache", cached)


def of_jax(rng, number):
    """Record the door to JAX and its gradients, and NumPy's for arrays of JAX."""
    batch, q_len, kv_len = (int(rng.integers(1, most)) for most in (3, 40, 140))
    heads, group, dim = (choice(rng, sizes) for sizes in ((1, 2), (1, 4), (4, 8)))
    pairs, dtype = (batch, heads * group, q_len, kv_len), dtype_of(problem.FLOATS[number % 4])
    shapes = [(batch, q_len, heads * group, dim), *[(batch, kv_len, heads, dim)] * 2]
    shapes += [pairs] * chance(rng, 0.4)  # a bias
    given = [jax.numpy.asarray(rng.standard_normal(x).astype(dtype)) for x in shapes]
    options = {"mask": rng.random(pairs) < 0.7, "local_window_size": (5, 7), "scale": 0.3}
    options["query_seq_lengths"] = rng.integers(0, q_len + 1, batch)
    options["key_value_seq_lengths"] = rng.integers(0, kv_len + 1, batch)
    options = some(rng, is_causal=True, **options)
    call = functools.partial(fastattn.jax.dot_product_attention, **options)

    def differentiate():
        out, pull = jax.vjp(jax.jit(call) if chance(rng, 0.3) else call, *given)
        return out, pull(out * out)

    call(*given, **some(rng, return_residual=True))
    tape.call("gradients of fastattn.jax", differentiate)
    fastattn.attention(*(x.swapaxes(1, 2) for x in given[:3]))


def models(rng, number):
    """Record small models of transformers."""
    fastattn.transformers.register()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for kind in ("Llama", "Mistral", "Gemma2"):
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**sizes, sliding_window=6, pad_token_id=0)
        config._attn_implementation = "fastattn"
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        ids = torch.from_numpy(rng.integers(1, 64, (2, 13)))
        given = {"attention_mask": (torch.arange(13) >= torch.tensor([[0], [3]])).long()}
        tape.call(f"{kind} of transformers", model, ids, labels=ids, **given).loss.backward()
        tape.note("gradients of a model", *(x.grad for x in model.parameters()))
        tape.call(f"{kind} writes", model.generate, ids, max_new_tokens=5, **given)


def sizes(rng, number):
    """Record wrong numbers of threads, and wrong sizes of caches."""
    for n in (*JUNK, 1, 2):
        tape.call("fastattn.set_num_threads", fastattn.set_num_threads, n)
        tape.note("fastattn.get_num_threads", fastattn.get_num_threads())
        for kind, right in ((fastattn.KVCache, (2, 2, 4)), (fastattn.PagedKVCache, (2, 4))):
            for i in range(len(right)):
                tape.call(f"{kind.__name__}()", kind, *right[:i], n, *right[i + 1 :])
            for name in ("capacity", "pages", "page_size", "dtype", "value_head_dim"):
                tape.call(f"{kind.__name__}()", kind, *right, **{name: n})


def signatures(rng, number):
    """Record every public name, its parameters and their annotations."""
    for owner, name, whole in functions():
        x = getattr(owner, name)
        own = inspect.signature(x) if callable(x) else inspect.Signature()
        plain = [x.replace(annotation=x.empty) for x in own.parameters.values()]
        without = own.replace(parameters=plain, return_annotation=own.empty)
        tape.note(f"signature of {whole}", type(x).__name__, str(without))
        tape.note(f"{FREE}{whole}", str(own))


# Records


def record_one(isa, kinds):
    """Return the record of this process, which has one instruction set."""
    torch.set_num_threads(2)
    for owner, name, whole in [*functions(), (torch.autograd, "backward", "torch's backward")]:
        x = inspect.getattr_static(owner, name)
        if inspect.isfunction(x) and "_num_threads" not in name:
            setattr(owner, name, tape.recorded(whole, x))
    caches.Run.pages = pages
    invalid.refused = lambda call, arguments, *_: tape.call("invalid", call, **arguments)
    attention.near = backward.near = lambda *_: None
    gradients.near = lambda name, got, *_: tape.note(f"torch's {name}", got)
    record = {}
    for kind, count in kinds.items():
        for number in range(count):
            seeds = [number, zlib.crc32(kind.encode())]
            rng, tape.rng = np.random.default_rng(seeds), np.random.default_rng([*seeds, 1])
            tape.texts = record[f"{isa} {kind} {number}"] = []
            try:
                if kind in FUZZED:
                    fuzzed(kind, rng, number, count)
                else:
                    (of_jax if kind == "jax" else globals()[kind])(rng, number)
            except Exception as error:
                tape.note(f"end of a case of {kind}", error)
    return record


def record_all(only):
    """Return the record of every instruction set that the CPU has."""
    isas = fastattn.info()["isas"]

    def child(isa):
        kinds = FUZZED | OTHERS | (ONCE if isa == isas[0] else {})
        kinds = {name: n for name, n in kinds.items() if not only or name in only}
        line = [sys.executable, __file__, "one", json.dumps([isa, kinds])]
        environment = os.environ | SETTINGS | {"FASTATTN_ISA": isa}
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(collections.ChainMap(*pool.map(child, isas)))


def compare(old, new, expected):
    """Print which calls agree; return how many do not."""
    calls, alike, faults = collections.Counter(), collections.Counter(), 0
    for case in {**old, **new}:
        pairs = itertools.zip_longest(old.get(case, ()), new.get(case, ()), fillvalue="nothing")
        for i, (was, now) in enumerate(pairs):
            for words in expected:
                was = was.replace(*words.split("=", 1))
            name = (now if was == "nothing" else was).split(":")[0]
            name = re.sub(r"^(signature|annotations) of .*", r"\1", name)
            calls[name] += 1
            alike[name] += was == now
            if was != now:
                faults += not was.startswith(FREE)
                print(f"{case}, call {i}:\n  was {was[:600]}\n  now {now[:600]}")
    for name, count in sorted(calls.items()):
        print(f"{name:50} {count:6} calls {alike[name]:6} alike")
    print(f"{calls.total()} calls, {alike.total()} alike, {faults} faults: {fastattn.__file__}")
    return faults


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("record", "compare", "one"))
    parser.add_argument("file")
    parser.add_argument("--expect", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--only", type=lambda text: text.split(","), help="kinds of cases")
    asked = parser.parse_args()
    if asked.what == "one":
        print("\n" + json.dumps(record_one(*json.loads(asked.file))))
        return 0
    record = record_all(asked.only)
    if asked.what == "record":
        Path(asked.file).write_text(json.dumps(record, indent=0))
        print(f"{sum(map(len, record.values()))} calls of {fastattn.__file__}")
        return 0
    old = json.loads(Path(asked.file).read_text())
    kept = {case: x for case, x in old.items() if not asked.only or case.split()[1] in asked.only}
    return int(compare(kept, record, asked.expect) > 0)


if __name__ == "__main__":
    sys.exit(main())
