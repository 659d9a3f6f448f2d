# SPDX-License-Identifier: Apache-2.0
"""What is captured is what transformers shows, and changes no bit; heads can be taken away."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import models, nn
from fastattn.models._context import Context
from tests.support.decoders import write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

WHAT = ["weights", "top", "column_sums", "entropy", "maximum", "hidden", "query", "key", "value"]
WORDS = [f"w{i}" for i in range(101)]
SIZES = dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=6, max_position_embeddings=96)
GROUPED = SIZES | dict(num_key_value_heads=2)
SLIDING = dict(use_sliding_window=True, sliding_window=11, max_window_layers=1)
GPT2 = dict(vocab_size=101, n_positions=96, n_embd=48, n_layer=3, n_head=6)
KINDS = {
    "llama": (transformers.LlamaConfig, GROUPED, "model.layers.{}.self_attn.o_proj.weight"),
    "mistral": (transformers.MistralConfig, GROUPED | dict(sliding_window=11), None),
    "qwen2": (transformers.Qwen2Config, GROUPED | SLIDING, None),
    "gpt2": (
        *(transformers.GPT2Config, GPT2 | dict(scale_attn_by_inverse_layer_idx=True)),
        "h.{}.attn.c_proj.weight",
    ),
    "bert": (transformers.BertConfig, SIZES, "encoder.layer.{}.attention.output.dense.weight"),
}
IDS = np.random.default_rng(0).integers(1, 101, 70)
TEXT = " ".join(WORDS[i] for i in IDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a model of each kind, whose words are w0 ... w100."""
    found = {}
    for kind, (config, sizes, _) in KINDS.items():
        folder = found[kind] = tmp_path_factory.mktemp(kind)
        if kind == "bert":
            torch.manual_seed(0)
            config = config(**sizes, initializer_range=0.2)
            transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        else:
            write(folder, config(**sizes))
        words = tokenizers.models.WordLevel({x: i for i, x in enumerate(WORDS)}, "w0")
        tokenizer = tokenizers.Tokenizer(words)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
    return found


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(folders, kind):
    return models.load(folders[kind])


@pytest.fixture
def llama(folders):
    return models.load(folders["llama"])


def run(model, text=TEXT):
    """Return what a model says of a text."""
    if isinstance(model, models.Encoder):
        return model.encode([text])
    return model.logits(model.tokenize(text))


def test_weights_and_states_are_those_of_transformers(folders, kind, model):
    theirs = transformers.AutoModel.from_pretrained(
        folders[kind], dtype="float32", attn_implementation="eager"
    )
    with torch.inference_mode():
        asked = dict(output_attentions=True, output_hidden_states=True)
        expected = theirs.eval()(torch.tensor(IDS)[None], **asked)
    with model.capture(what=["weights", "hidden"]) as captured:
        run(model)
    assert captured.ids == IDS.tolist()
    assert_array_equal(captured.rows, np.arange(70))
    weights = np.stack([x[0] for x in expected.attentions])
    assert_allclose(captured.weights, weights, rtol=0, atol=1e-5)
    hidden, states = captured.hidden, np.stack([x[0] for x in expected.hidden_states])
    if kind != "bert":  # transformers shows the last states behind the norm
        hidden[-1] = model._model.norm(model._model.last_norm, hidden[-1])
    for found, x in zip(hidden, states, strict=True):
        assert_allclose(found, x, rtol=0, atol=1e-5 * abs(x).max())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_weights_follow_from_the_queries_and_keys(kind, model):
    with model.capture(what=WHAT) as captured:
        run(model)
    shape = (3, 6, 70, 8)
    assert captured.query.shape == captured.key.shape == captured.value.shape == shape
    weights = fastattn.attention_weights(captured.query, captured.key, is_causal=kind == "llama")
    assert_allclose(captured.weights, weights, rtol=0, atol=1e-6)


def test_a_layer_follows_from_what_is_captured(llama):
    with llama.capture(what=WHAT) as captured:
        run(llama)
    assert_array_equal(captured.key[:, 0], captured.key[:, 2])  # they read the same head
    assert_array_equal(captured.value[:, 3], captured.value[:, 5])
    seen = (captured.weights[0] @ captured.value[0]).swapaxes(0, 1).reshape(70, 48)
    model, layer = llama._model, "model.layers.0"
    x = captured.hidden[0] + nn.linear(seen, model.weights[f"{layer}.self_attn.o_proj.weight"])
    network = [f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")]
    normed = model.norm(f"{layer}.post_attention_layernorm", x)
    expected = x + model.gated_feed_forward(network, normed)
    assert_allclose(expected, captured.hidden[1], rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("rows", "positions"),
    [
        (None, range(70)),
        ([69, 3, 4, 5, 40, 3, 95], [3, 4, 5, 40, 69]),
        (slice(None, None, 3), range(0, 70, 3)),
        (slice(60, 2**70), range(60, 70)),
        (slice(7), range(7)),
        (slice(69, None), [69]),
    ],
)
def test_statistics_of_chosen_layers_heads_and_rows(kind, model, rows, positions):
    with model.capture(what=["weights", "query", "hidden"]) as whole:
        run(model)
    chosen = dict(layers=[2, 0], heads=[5, 1, 2], rows=rows)
    with model.capture(**chosen, what=WHAT, top=5) as captured:
        run(model)
    positions = list(positions)
    assert_array_equal(captured.rows, positions)
    assert_array_equal(captured.layers, [2, 0])
    assert_array_equal(captured.heads, [5, 1, 2])
    place = np.ix_([2, 0], [5, 1, 2], positions)
    weights = captured.weights
    assert weights.dtype == np.float32
    assert_allclose(weights, whole.weights[place], rtol=0, atol=1e-6)
    assert_array_equal(captured.query, whole.query[place])
    assert_array_equal(captured.hidden, whole.hidden[:, positions])
    assert_allclose(captured.column_sums, weights.sum(axis=2), rtol=0, atol=1e-5)
    assert_allclose(captured.maximum, weights.max(axis=3), rtol=0, atol=1e-6)
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    assert_allclose(captured.entropy, -(weights * logs).sum(axis=3), rtol=0, atol=1e-5)
    keys, largest = captured.top_keys, captured.top_weights
    assert keys.dtype == np.int64
    assert_allclose(largest, -np.sort(-weights, axis=3)[..., :5], rtol=0, atol=1e-6)
    assert_allclose(
        np.where(keys < 0, 0, np.take_along_axis(weights, keys, axis=3)), largest, rtol=0, atol=1e-6
    )
    assert_array_equal(keys < 0, largest == 0)


def test_a_long_text_is_read_in_parts(folders):
    model = models.load(folders["llama"])
    model.max_position_embeddings = 2048
    ids = np.random.default_rng(1).integers(0, 101, 1100)
    with model.capture(layers=[1], heads=[4], what=WHAT) as captured:
        model.logits(ids)
    assert captured.weights.shape == (1, 1, 1100, 1100)
    expected = fastattn.attention_weights(captured.query, captured.key, is_causal=True)
    assert_allclose(captured.weights, expected, rtol=0, atol=1e-6)
    assert captured.hidden.shape == (4, 1100, 48)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("rows", [None, slice(18, None, 2)])
def test_generated_tokens_are_captured_as_they_are_read(model, rows):
    options = dict(max_new_tokens=20, stop_ids=[], temperature=1, seed=3)
    expected = list(model.generate_ids(IDS[:20], **options))
    with model.capture(rows=rows, what=WHAT) as captured:
        steps, found = model.generate_ids(IDS[:20], **options), []
        for count, token in enumerate(steps):
            found.append(token)
            assert captured.weights.shape[3] == 20 + count
    assert found == expected
    assert captured.ids == [*IDS[:20].tolist(), *found[:-1]]  # The last one is never read.
    with model.capture(rows=rows, what=WHAT) as whole:
        model.logits(captured.ids)
    assert_array_equal(captured.rows, whole.rows)
    for name in (*WHAT[2:], "weights", "top_weights"):
        x = getattr(whole, name)
        assert_allclose(getattr(captured, name), x, rtol=0, atol=1e-5 * abs(x).max())
    weights = captured.weights
    assert not weights[np.broadcast_to(np.arange(39) > captured.rows[:, None], weights.shape)].any()


def test_no_bit_changes(kind, model):
    before = run(model)
    with model.capture(what=WHAT):
        assert_array_equal(run(model), before)
    assert model._model.observers == ()
    assert_array_equal(run(model), before)


def test_what_is_not_asked_is_none(llama):
    with llama.capture(what="entropy") as captured:
        run(llama)
    others = ("weights", "top_keys", "top_weights", "column_sums", "maximum", "hidden", "query")
    assert [getattr(captured, x) for x in (*others, "key", "value")] == [None] * 9
    assert captured.entropy.shape == (3, 6, 70)


def test_captures_may_be_nested(llama):
    with llama.capture() as outer, llama.capture(layers=[1], heads=[2]) as inner:
        run(llama)
    assert_allclose(outer.weights[1:2, 2:3], inner.weights, rtol=0, atol=1e-6)


def test_options_that_a_layer_gives_attention(llama, monkeypatch):
    options = dict(softcap=2.0, sinks=np.arange(6, dtype=np.float32), window=(8, 0), scale=0.4)

    class Optioned(Context):
        def attend(self, *given, **more):
            return super().attend(*given, **more | options)

    monkeypatch.setattr(llama._model, "context", lambda n: Optioned(n, 3, 2, 8))
    for heads in (None, [4, 1]):
        with llama.capture(heads=heads, what=["weights", "query", "key"]) as captured:
            list(llama.generate_ids(IDS[:30], max_new_tokens=3, stop_ids=[]))
        of_heads = options | {"sinks": options["sinks"][captured.heads]}
        asked = captured.query, captured.key
        expected = fastattn.attention_weights(*asked, **of_heads, is_causal=True)
        assert_allclose(captured.weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("ablated", [[(1, 4)], [(0, 0), (2, 5), (2, 1)], "all"])
def test_a_head_that_is_ablated_is_a_zero_in_the_projection(kind, model, ablated):
    if ablated == "all":
        ablated = [(layer, head) for layer in range(3) for head in range(6)]
    before = run(model)
    with model.ablate(ablated), model.capture(what="hidden") as captured:
        found = run(model)
    assert_array_equal(run(model), before)
    assert abs(found - before).max() > 1e-3
    weights = model._model.weights
    for layer, head in ablated:
        name = KINDS[kind][2].format(layer)
        weights[name] = weights[name].copy()
        weights[name][:, 8 * head : 8 * head + 8] = 0
    with model.capture(what="hidden") as expected:
        assert_allclose(run(model), found, rtol=0, atol=1e-5 * abs(found).max())
    assert_allclose(captured.hidden, expected.hidden, rtol=0, atol=1e-5 * abs(found).max())


def test_texts_of_a_batch_lose_the_heads_that_each_loses_alone(llama, folders):
    encoder, texts = models.load(folders["bert"]), [TEXT, "w5 w6 w7", "w3"]
    with encoder.ablate([(0, 1), (1, 2)]):
        assert_array_equal(encoder.encode(texts), np.concatenate([run(encoder, x) for x in texts]))
    options = dict(max_new_tokens=8)
    with llama.ablate([(0, 1), (1, 2)]):
        together = "|".join(
            x for step in zip(*llama.generate(texts, **options), strict=True) for x in step
        )
        alone = "|".join(x for text in texts for x in llama.generate(text, **options))
    assert together == alone


def test_nothing_is_ablated(llama):
    with llama.ablate([]):
        found = run(llama)
    assert_array_equal(found, run(llama))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("row", [-1, 0, 30, -70])
def test_the_lens_ends_with_what_the_model_says(model, row):
    expected = nn.log_softmax(run(model)[row])[7]
    lens = model.logit_lens(TEXT, "w7", row=row)
    assert lens.shape == (4,)
    assert lens.dtype == np.float32
    assert lens[-1] == expected
    assert_array_equal(lens, model.logit_lens(IDS, 7, row=row))
    with model.capture(what="hidden", rows=[row % 70]) as captured:
        run(model)
    states = model._model.norm(model._model.last_norm, captured.hidden[:, 0])
    assert_array_equal(lens, nn.log_softmax(model._model.head(states))[:, 7])
    with model.ablate([(2, 0)]):
        without = model.logit_lens(IDS, 7, row=row)
    assert_array_equal(without[:3], lens[:3])
    assert without[3] != lens[3]


NAMES = ", ".join(WHAT)


@pytest.mark.parametrize(
    ("method", "given", "error", "message"),
    [
        ("capture", dict(layers=[3]), ValueError, "layers must be within 0..2, those of the model"),
        ("capture", dict(layers=[0, -1]), ValueError, "layers must be within 0..2, .*, got -1"),
        ("capture", dict(layers=[]), ValueError, "layers must be a sequence of at least one"),
        ("capture", dict(layers=1), ValueError, r"layers must be a .*, got shape \(\)"),
        ("capture", dict(layers="all"), TypeError, "layers must be an array of integers, not str"),
        ("capture", dict(heads=[6]), ValueError, "heads must be within 0..5, .*, got 6"),
        ("capture", dict(heads=[0.5]), TypeError, "heads must be integers, not float64"),
        ("capture", dict(heads=[True]), TypeError, "heads must be integers, not bool"),
        ("capture", dict(heads=[2**64 - 1]), ValueError, "heads must be within 0..5"),
        ("capture", dict(rows=[-1]), ValueError, "rows must be positions from 0 on, got -1"),
        ("capture", dict(rows=[[1]]), ValueError, r"rows must be .*, got shape \(1, 1\)"),
        ("capture", dict(rows="a"), TypeError, "rows must be an array of integers"),
        ("capture", dict(rows=slice(-3, None)), ValueError, "the start of rows must be at least 0"),
        ("capture", dict(rows=slice(5, 0, -1)), ValueError, "the step of rows must be at least 1"),
        ("capture", dict(rows=slice(0.5)), TypeError, "the stop of rows must be an int, not float"),
        ("capture", dict(what="head"), ValueError, f"what must be of {NAMES}, got 'head'"),
        ("capture", dict(what=["top", 5]), ValueError, f"what must be of {NAMES}, got 5"),
        ("capture", dict(what=()), ValueError, f"what must be at least one of {NAMES}, got none"),
        ("capture", dict(what=None), TypeError, "what must be a str or .*, not NoneType"),
        ("capture", dict(top=0), ValueError, "top must be at least 1, got 0"),
        ("capture", dict(top=2.0), TypeError, "top must be an int, not float"),
        ("ablate", dict(heads=[(3, 0)]), ValueError, "layers of heads must be within 0..2"),
        ("ablate", dict(heads=[(0, 6)]), ValueError, "heads must be within 0..5, .*, got 6"),
        ("ablate", dict(heads=[(0, -1)]), ValueError, "heads must be within 0..5, .*, got -1"),
        ("ablate", dict(heads=(0, 1)), ValueError, r"pairs of a layer and a head, got .* \(2,\)"),
        ("ablate", dict(heads=[(0, 1, 2)]), ValueError, r"pairs .*, got .* shape \(1, 3\)"),
        ("ablate", dict(heads=[(0, 1), (2,)]), TypeError, "heads must be an array of integers"),
        ("ablate", dict(heads=[(0, 0.5)]), TypeError, "must be integers, not float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_wrong_arguments(model, method, given, error, message):
    with pytest.raises(error, match=message):
        getattr(model, method)(**given)
    assert model._model.observers == ()


@pytest.mark.parametrize(
    ("text", "token", "row", "error", "message"),
    [
        (TEXT, "w1 w2", -1, ValueError, "token must be one token, got 'w1 w2', which is 2"),
        (TEXT, "", -1, ValueError, "token must be one token, got '', which is 0"),
        (TEXT, 101, -1, ValueError, "token must be within 0..100, the vocabulary, got 101"),
        (TEXT, -1, -1, ValueError, "token must be within 0..100, the vocabulary, got -1"),
        (TEXT, 1.5, -1, TypeError, "token must be integers, not float64"),
        (TEXT, None, -1, TypeError, "token must be an array of integers"),
        (TEXT, 1, 70, ValueError, r"row must be within -70..69, the text's tokens, got 70"),
        (TEXT, 1, -71, ValueError, "row must be within -70..69"),
        (TEXT, 1, 0.0, TypeError, "row must be an int, not float"),
        (TEXT + " w1" * 27, 1, 0, ValueError, "text must be at most 96 tokens"),
        ("", 1, 0, ValueError, "text must be at least 1 token, got 0"),
        ([101], 1, 0, ValueError, "text must be within 0..100, the vocabulary, got 101"),
    ],
)  # fmt: skip
def test_a_wrong_lens(llama, text, token, row, error, message):
    with pytest.raises(error, match=message):
        llama.logit_lens(text, token, row=row)


def test_one_text_is_captured_from_its_beginning(llama, folders):
    encoder = models.load(folders["bert"])
    for model, many in ((llama, lambda: list(llama.generate([TEXT, "w1"]))),
                        (encoder, lambda: encoder.encode([TEXT, "w1"]))):  # fmt: skip
        with pytest.raises(ValueError, match="capture must see one text, got 2"), model.capture():
            many()
        with model.capture() as captured:
            run(model)
            with pytest.raises(ValueError, match="on, got another behind it"):
                run(model)
        assert captured.weights.shape == (3, 6, 70, 70)
        assert_array_equal(run(model), run(model))
    steps = llama.generate_ids(IDS[:5], stop_ids=[])
    next(steps)
    with llama.capture() as captured, pytest.raises(ValueError, match="of which 5 tokens were re"):
        next(steps)
    with llama.capture(rows=[70, 80]) as short:
        run(llama)
    with pytest.raises(RuntimeError, match="rows must be of the text, which has 70 tokens"):
        _ = short.weights
    with pytest.raises(
        RuntimeError, match="weights must be asked for when the model has run in the"
    ):
        _ = captured.weights
    assert captured.ids == []
    assert captured.rows.size == 0


def test_an_error_ends_a_capture(llama):
    before = run(llama)
    said = "text must be at most 96 tokens"
    with pytest.raises(ValueError, match=said), llama.capture(), llama.ablate([(0, 0)]):
        llama.score(TEXT + " w1" * 27)
    assert_array_equal(run(llama), before)
    weights = llama._model.weights
    name = "model.layers.1.mlp.down_proj.weight"
    with llama.capture(what=["hidden", "weights"]) as captured:
        kept = weights.pop(name)
        with pytest.raises(KeyError):
            run(llama)
        weights[name] = kept
        assert captured.ids == []
        run(llama)  # What did not end was not read.
    assert captured.ids == IDS.tolist()
    assert captured.hidden.shape == (4, 70, 48)
