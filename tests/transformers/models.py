# SPDX-License-Identifier: Apache-2.0
"""Tiny models of random weights, what they read, and whether two are alike."""

import torch
import transformers

import fastattn
import fastattn.torch
import fastattn.transformers

fastattn.transformers.register()
transformers.logging.set_verbosity_error()

VOCABULARY = 61
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # attention that depends on the tokens
    **SPECIAL,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
# Class of the model, of its config, and what the config is given.
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER
        | {
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER
        | {
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        DECODER
        | {
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 128,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
            **SPECIAL,
        },
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    ),
}
ENCODERS = {
    "bert": (
        "BertModel",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
        },
    )
}
MIXED = {  # our attention in some of the layers alone
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        SEQ2SEQ | {"attention_type": "original_full", "max_position_embeddings": 64},
    ),
    "git": (
        "GitForCausalLM",
        "GitConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            **SPECIAL,
        },
    ),
}
ALL = DECODERS | ENCODER_DECODERS | ENCODERS | MIXED


def model_of(name, implementation, **changes):
    """Return a model in eval mode; the same weights for any implementation."""
    model, config, settings = ALL[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**settings | changes)
    config._attn_implementation = implementation
    made = getattr(transformers, model)(config).eval()
    assert made.config._attn_implementation == implementation
    return made


def tokens(batch=2, length=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=rng)


def padding(side, lengths=(24, 17), length=24):
    """Return what tells tokens from padding."""
    seen = torch.arange(length) < torch.tensor(lengths)[:, None]
    return (seen.flip(-1) if side == "left" else seen).long()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(models, rows=..., **inputs):
    """Compare the first of what models return, and the gradients, by those rows alone."""
    results = [model(**inputs)[0][rows] for model in models]
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    weights = torch.linspace(-1, 1, results[0].numel()).reshape(results[0].shape)
    for result in results:
        (result * weights).mean().backward()
    theirs, ours = map(gradients, models)
    assert theirs.keys() == ours.keys()
    assert theirs
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE, msg=name)


def record(monkeypatch, name="attention"):
    """Return a list that gets the keywords of each call of a function of fastattn.torch."""
    calls = []
    attention = getattr(fastattn.torch, name)

    def attend(*tensors, **keywords):
        calls.append({n: x for n, x in keywords.items() if x is not None})
        return attention(*tensors, **keywords)

    monkeypatch.setattr(fastattn.torch, name, attend)
    return calls
