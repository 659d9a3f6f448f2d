# SPDX-License-Identifier: Apache-2.0
"""Folders of Marian with random weights, and what transformers says and writes of them."""

import numpy as np

END, PAD, WORDS = 0, 1, 60
SIZES = dict(vocab_size=WORDS, d_model=48, encoder_layers=2, decoder_layers=3)
SIZES |= dict(encoder_attention_heads=4, decoder_attention_heads=6, encoder_ffn_dim=56)
SIZES |= dict(decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=END)
SIZES |= dict(decoder_start_token_id=PAD, forced_eos_token_id=END)


def write(folder, dtype="float32", generation=None, end=0.0, **changes):
    """Write a folder whose every weight is random, and whose words are w2...; return it.

    `end` is added to the logit of the token that ends a text.
    """
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MarianConfig(**SIZES | changes)
    model = transformers.MarianMTModel(config)
    for name, x in model.named_parameters():
        if "embed_positions" not in name:
            x.data += (0.1 if "layers" in name else 1) * torch.randn(x.shape)
    model.final_logits_bias += torch.randn(model.final_logits_bias.shape)
    model.final_logits_bias[0, END] += end
    usual = dict(bad_words_ids=[[PAD]], max_length=40)
    model.generation_config.update(**usual | (generation or {}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(2, config.vocab_size)} | {"</s>": END, "<pad>": PAD}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w2"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def texts(count, longest=20, seed=0):
    """Return texts of unequal lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [" ".join(f"w{i}" for i in rng.integers(2, WORDS, n)) for n in lengths]


def of_transformers(folder):
    """Return the model of transformers, which computes in float32."""
    import transformers

    return transformers.MarianMTModel.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()


def logits(model, source, target):
    """Return what transformers says behind each token of a target, and how all heads attend."""
    import torch

    with torch.inference_mode():
        return model(
            input_ids=torch.tensor(source)[None],
            decoder_input_ids=torch.tensor(target)[None],
            output_attentions=True,
        )


def generate(model, sources, beams, **options):
    """Return the tokens and the scores of what transformers writes of each source, padded."""
    import torch

    pad, longest = model.config.pad_token_id, max(map(len, sources))
    ids = torch.tensor([[*x, *[pad] * (longest - len(x))] for x in sources])
    mask = torch.arange(longest) < torch.tensor([[len(x)] for x in sources])
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            num_beams=beams,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    written = [[i for i in x if i not in (END, pad)] for x in found.sequences[:, 1:].tolist()]
    scores = [0.0] * len(written) if beams == 1 else found.sequences_scores.tolist()
    both = list(zip(written, scores, strict=True))
    return [both[i : i + beams] for i in range(0, len(both), beams)]
