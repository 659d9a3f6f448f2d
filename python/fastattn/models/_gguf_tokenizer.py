# SPDX-License-Identifier: Apache-2.0
"""How is a text split into tokens? The metadata of a GGUF file say it.

The file has the tokens, the pairs that merge, and the name of a rule by which a text is cut into
words before that. The rules are those of llama.cpp, and their expressions of the models' makers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn.models._file import Natural, is_unicode, needed, one_of, shown, value

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEY, MODEL = "tokenizer.ggml", "tokenizer.ggml.model"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens
USUAL_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # of SentencePiece
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in its tokens
MOST_LETTERS, MOST_MERGES = 256, 4_000_000  # of a token, and of all: wrong files are soon refused
KINDS = {"integers": "iu", "floats": "f"}  # of arrays, as NumPy names them

# A text is cut by one expression, then each piece by the next: what matches is a piece, and so is
# what is between two matches.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ONE_DIGIT, THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALCON = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
WORDS = {
    "default": FALCON,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (ONE_DIGIT,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (THREE_DIGITS,)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (THREE_DIGITS,)),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # Merges need not make them.


def tokenizer_of(metadata: Mapping[str, Any], vocabulary: int) -> Tokenizer:
    """Return the tokenizer of a file, whose embeddings have so many rows."""
    kind = one_of(MODEL, value(metadata, MODEL, str), ("gpt2", "llama"))
    tokens = _tokens(metadata, vocabulary)
    tokenizer, begins = (_of_bytes if kind == "gpt2" else _of_pieces)(metadata, tokens)
    types = _numbers(metadata, "token_type", len(tokens), "integers")
    added = needed("tokenizers").AddedToken
    for special, wanted in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        whole = np.flatnonzero(np.isin(types, wanted)).tolist()
        tokenizer.add_tokens([added(tokens[i], normalized=False, special=special) for i in whole])
    ends = []
    for name, usual in (("bos", begins), ("eos", False)):
        wanted = value(metadata, f"{KEY}.add_{name}_token", bool, usual)
        found = special_id(metadata, name) if wanted else None
        ends.append(None if found is None else tokens[found])
    _add_ends(tokenizer, *ends)
    return tokenizer


def special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Return the id of the token of a name, as bos, if the file has one."""
    key = f"{KEY}.{name}_token_id"
    usual = USUAL_IDS.get(name) if metadata[MODEL] == "llama" else None
    found: int | None = value(metadata, key, Natural, usual)
    if found is not None and found >= (count := len(metadata[f"{KEY}.tokens"])):
        raise ValueError(f"{key} must be below {count}, as there are tokens, got {found}")
    return found


def _tokens(metadata: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Return the tokens, each at the place that is its id."""
    tokens = _strings(metadata, "tokens")
    if not 0 < len(tokens) <= vocabulary:
        rule = f"1 to {vocabulary} strings, as there are embeddings"
        raise ValueError(f"{KEY}.tokens must be {rule}, got {len(tokens)}")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        rule = "must be distinct strings, got"
        raise ValueError(f"{KEY}.tokens {rule} {shown.repr(twice)} more than once")
    return tokens


def _of_bytes(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Return a tokenizer that merges bytes, which are letters in the file; whether it adds bos."""
    tokenizers = needed("tokenizers")
    rule = one_of(f"{KEY}.pre", metadata.get(f"{KEY}.pre", "default"), WORDS)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(x.split(" ")) for x in _strings(metadata, "merges")]
    try:
        model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=rule in WHOLE_WORDS)
    except Exception as error:  # it raises nothing narrower
        for x in merges:
            if len(x) != 2 or not {*x, x[0] + x[1]} <= vocabulary.keys():
                said = "must be pairs of tokens, with a space between, that make a token"
                found = shown.repr(" ".join(x))
                raise ValueError(f"{KEY}.merges {said}, got {found}") from None
        raise ValueError(f"{KEY}.merges is refused: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    pre_tokenizers = tokenizers.pre_tokenizers
    cuts = [pre_tokenizers.Split(tokenizers.Regex(x), "isolated") for x in WORDS[rule]]
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_letters])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer, rule in WHOLE_WORDS


def _of_pieces(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Return a tokenizer that merges characters, as SentencePiece does; whether it adds bos.

    The file has no merges: two pieces merge if that makes a token, that of the highest score first.
    """
    tokenizers = needed("tokenizers")
    if (longest := max(map(len, tokens))) > MOST_LETTERS:
        rule = f"strings of at most {MOST_LETTERS} characters"
        raise ValueError(f"{KEY}.tokens must be {rule}, got {longest}")
    scores = _numbers(metadata, "scores", len(tokens), "floats")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    best = np.argsort(-scores, kind="stable").tolist()
    words = [tokens[i] for i in best]
    halves = ((x[:i], x[i:]) for x in words for i in range(1, len(x)))
    pairs = (x for x in halves if x[0] in vocabulary and x[1] in vocabulary)
    merges = list(itertools.islice(pairs, MOST_MERGES + 1))
    if len(merges) > MOST_MERGES:
        raise ValueError(f"{KEY}.tokens must merge in at most {MOST_MERGES} ways, and do not")
    unknown = special_id(metadata, "unknown")
    model = tokenizers.models.BPE(
        *(vocabulary, merges),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = value(metadata, f"{KEY}.add_space_prefix", bool, True)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    before = [normalizers.Replace(" ", SPACE)]
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer, True


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    """Return an array of strings of the file."""
    key = f"{KEY}.{name}"
    found: list[str] = value(metadata, key, list)
    try:
        "".join(found).encode()
    except (TypeError, UnicodeEncodeError):
        at = next(i for i, x in enumerate(found) if not isinstance(x, str) or not is_unicode(x))
        said = f"a list of strings in UTF-8, got {shown.repr(found[at])} at {at}"
        raise ValueError(f"{key} must be {said}") from None
    return found


def _numbers(metadata: Mapping[str, Any], name: str, count: int, kind: str) -> NDArray[Any]:
    """Return an array of numbers of the file, one for each token; zeros where there is none."""
    key = f"{KEY}.{name}"
    found: Any = metadata.get(key, np.zeros(count, "i4" if kind == "integers" else "f4"))
    if not isinstance(found, np.ndarray) or found.dtype.kind not in KINDS[kind]:
        raise ValueError(f"{key} must be an array of {kind}, got {shown.repr(found)}")
    if len(found) != count:
        raise ValueError(f"{key} must have {count} numbers, as tokens, got {len(found)}")
    return found


def _add_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let a tokenizer put these tokens around a text, and no others."""
    sides = {"bos": bos, "eos": eos}
    named = []
    for side, token in sides.items():
        if token is not None:
            if (found := tokenizer.token_to_id(token)) is None:
                rule = f"{side}_token must be a token of the vocabulary"
                raise ValueError(f"{rule}, got {shown.repr(token)}")
            named.append({"id": side, "ids": [found], "tokens": [token]})
    single = [x for x in ("bos", "$A", "eos") if sides.get(x, x) is not None]
    processors = needed("tokenizers").processors
    tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=named)
