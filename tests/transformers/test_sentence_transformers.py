# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers packs texts under `fastattn_flash`: the same embeddings, and gradients."""

import pytest
import torch
import transformers

from tests.transformers.models import DECODER, ENCODERS, record

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [" ".join("abcdefgh"[i % 8] for i in range(n)) for n in (3, 30, 1, 17, 8)]
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
KINDS = {
    "bert": transformers.BertConfig(**ENCODERS["bert"][2]),
    "xlm-roberta": transformers.XLMRobertaConfig(
        **SIZES, num_attention_heads=4, initializer_range=0.2, pad_token_id=1
    ),
    "modernbert": transformers.ModernBertConfig(
        **SIZES,
        num_attention_heads=4,
        initializer_range=0.2,
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
    ),
    "qwen3": transformers.Qwen3Config(**DECODER),
    "gemma3": transformers.Gemma3TextConfig(
        **DECODER, sliding_window=6, use_bidirectional_attention=True
    ),
}


MIXING = transformers.MobileBertConfig(
    **SIZES, num_attention_heads=4, embedding_size=16, intra_bottleneck_size=32, pad_token_id=0
)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """Return where a tiny model lies."""
    return saved(KINDS[request.param], tmp_path_factory.mktemp(request.param))


def saved(config, place):
    """Save a model of random weights, with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2} | {x: i for i, x in enumerate("abcdefgh", 3)}
    letters = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(place)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(place)
    return str(place)


def loaded(folder, implementation, pooling="mean"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(folder, model_kwargs={"attn_implementation": implementation})
    pool = Pooling(words.get_embedding_dimension(), pooling_mode=pooling)
    return SentenceTransformer(modules=[words, pool], device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_embeddings(monkeypatch, folder, pooling):
    expected = loaded(folder, "sdpa", pooling).encode(TEXTS)
    calls, others = record(monkeypatch, "varlen_attention"), record(monkeypatch)
    found = loaded(folder, "fastattn_flash", pooling).encode(TEXTS)
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()
    if "gemma3" not in folder:  # whose functions of what is seen are its own
        assert (len(calls), others) == (2, [])  # one a layer, for all texts
        assert not any("mask" in call for call in calls)


def test_gradients(folder):
    models = [loaded(folder, x) for x in ("eager", "fastattn_flash")]
    for model in models:
        features = model.preprocess(TEXTS)
        assert ("cu_seq_lens_q" in features) == (model is models[1])
        model(features)["sentence_embedding"].square().mean().backward()
    theirs, ours = ({n: p.grad for n, p in x.named_parameters()} for x in models)
    for name, expected in theirs.items():
        if expected is not None:
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_a_model_that_mixes_neighbours(monkeypatch, tmp_path):
    """Outside attention, texts beside each other in a row would mix too, unless padded."""
    place = saved(MIXING, tmp_path)
    model, expected = loaded(place, "fastattn_flash"), loaded(place, "sdpa").encode(TEXTS)
    model[0].unpad_inputs = False
    calls = record(monkeypatch)
    assert abs(model.encode(TEXTS) - expected).max() <= 1e-5 * abs(expected).max()
    assert len(calls) == 2
