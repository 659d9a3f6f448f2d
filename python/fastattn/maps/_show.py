# SPDX-License-Identifier: Apache-2.0
"""Anybody's weights, or a model and a text, become a map of words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import as_array, is_integer, whole_number
from fastattn.maps import _words
from fastattn.maps._html import bounded
from fastattn.maps._map import Map
from fastattn.maps._words import Choice, Words, merged
from fastattn.nn import Floats

if TYPE_CHECKING:
    from fastattn.models import Decoder, Encoder, Transcriber, Translator

    Numbers = int | Sequence[int] | None

ROUNDING = 0.01  # of the sum of a row in half precision
FORMS = (
    "weights must be (queries, keys), (heads, queries, keys) or (layers, heads, queries, keys), or "
    "a list of layers of one text"
)


@overload
def show(
    weights: Decoder | Encoder | Translator,
    tokens: str,
    key_tokens: None = None,
    *,
    generate: int = 0,
    layers: Numbers = None,
    heads: Numbers = None,
    word: Choice | None = None,
    title: str | None = None,
) -> Map: ...
@overload
def show(
    weights: Transcriber,
    tokens: str | os.PathLike[str] | ArrayLike,
    key_tokens: None = None,
    *,
    layers: Numbers = None,
    heads: Numbers = None,
    word: Choice | None = None,
    title: str | None = None,
) -> Map: ...
@overload
def show(
    weights: ArrayLike | Sequence[Any],
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    is_special: Sequence[bool] | None = None,
    layers: Numbers = None,
    heads: Numbers = None,
    word: Choice | None = None,
    title: str | None = None,
) -> Map: ...
def show(
    weights: Any,
    tokens: Any,
    key_tokens: Any = None,
    *,
    is_special: Any = None,
    generate: int = 0,
    layers: Numbers = None,
    heads: Numbers = None,
    word: Choice | None = None,
    title: str | None = None,
) -> Map:
    """Return a map of where the heads look: of a model that reads a text, or of weights.

    Parameters
    ----------
    weights : Decoder, Encoder, Translator, Transcriber or array
        A model of `fastattn.models`; or probabilities of shape (queries, keys), (heads, queries,
        keys) or (layers, heads, queries, keys), or a list of layers whose batch, if they have one,
        is 1, as transformers, torch and BertViz give them.
    tokens : str or sequence of str
        The text that the model reads, or the sound that a Transcriber writes of, whose moments are
        the keys, in seconds. Or the tokens of the queries, spelt as byte-level BPE, SentencePiece
        or WordPiece spell them, or with the spaces before them, or whole words.
    key_tokens : sequence of str, optional
        The tokens of the keys, if those are of another text (cross-attention).
    is_special : sequence of bool, optional
        Which of the keys' tokens stand for no word. By default those that look like it: [CLS],
        [SEP], [PAD], <s>, </s>, <pad>, <bos>, <eos> and ``<|...|>``.
    generate : int
        How many tokens the model adds to the text, the likeliest ones. The map then shows what it
        looked at when it wrote each of them.
    layers, heads : int or sequence of int, optional
        Which ones the map has; by default all.
    word : str, int or (str, int), optional
        The word that is asked about: itself, its index, or ``("he", 2)``, the second of them.
    title : str, optional
        The heading of the page.

    Returns
    -------
    Map

    Raises
    ------
    TypeError, ValueError
        The tokens do not match the weights, weights are no probabilities, layers, heads or the word
        are not there, or the word is there several times; the text is empty, longer than the
        model's context, or too long for a map of so many heads; key_tokens of a model.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import maps
    >>> rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.2, 0], [0.2, 0.6, 0.1, 0.1]]
    >>> weights = np.array(rows)
    >>> found = maps.show(weights, ["Then", "ĠI", "van", "Ġcame"], word="came")
    >>> [(x.query, x.key, round(x.share, 2)) for x in found.links()]
    [('came', 'Ivan', 0.7)]
    >>> found.sink_text()
    '47 % of the attention goes to the first token, "Then"'
    """
    options = {"layers": layers, "heads": heads, "word": word, "title": title}
    if hasattr(weights, "capture"):
        for name, given in (("key_tokens", key_tokens), ("is_special", is_special)):
            if given is not None:
                raise ValueError(f"{name} must not be given with a model, which knows them")
        for name, of_source in (("transcribe", _of_sound), ("translate", _of_translation)):
            if hasattr(weights, name):
                if generate:
                    kind = type(weights).__name__
                    raise ValueError(f"generate must be 0 with a {kind}, got {generate}")
                return of_source(weights, tokens, **options)
        return _of_model(weights, tokens, whole_number("generate", generate), **options)
    if generate:
        raise ValueError(f"generate needs a model, got {type(weights).__name__}")
    return _of_arrays(weights, tokens, key_tokens, is_special, **options)


def _of_arrays(
    given: Any,
    tokens: Any,
    key_tokens: Any,
    is_special: Any,
    *,
    layers: Any,
    heads: Any,
    **options: Any,
) -> Map:
    """Return the map of weights and tokens."""
    all_layers = _layers(given)
    shape = (len(all_layers), *all_layers[0].shape)
    of_queries = _words.checked("tokens", tokens)
    of_keys = of_queries if key_tokens is None else _words.checked("key_tokens", key_tokens)
    for name, texts, count, axis in (
        ("tokens", of_queries, shape[2], "queries"),
        ("tokens" if key_tokens is None else "key_tokens", of_keys, shape[3], "keys"),
    ):
        if len(texts) != count:
            rule = f"as many as weights have {axis}, {count}"
            raise ValueError(f"{name} must be {rule}, got {len(texts)}")
    chosen = [
        _chosen(name, x, shape[axis], "weights")
        for axis, (name, x) in enumerate((("layers", layers), ("heads", heads)))
    ]
    dtype = np.result_type(*{x.dtype for x in all_layers})
    if dtype.kind not in "fV":
        raise TypeError(f"weights must be floats, not {dtype}")
    weights = np.empty((len(chosen[0]), len(chosen[1]), *shape[2:]), np.float32)
    for i, layer in enumerate(chosen[0]):
        weights[i] = _probabilities(all_layers[layer][chosen[1]], i)
    special = _words.special_of(of_keys, is_special)
    of_rows = special if key_tokens is None else _words.special_of(of_queries, None)
    rows = merged(_words.pieces_of_tokens(of_queries), of_rows)
    columns = merged(_words.pieces_of_tokens(of_keys), special)
    is_causal = key_tokens is None and not any(np.triu(x, 1).any() for x in weights)
    positions = range(len(of_keys)) if key_tokens is None else None
    return _made(weights, rows, columns, positions, chosen, is_causal=is_causal, **options)


def _of_model(
    model: Any, text: Any, generate: int, *, layers: Any, heads: Any, **options: Any
) -> Map:
    """Return the map of a model that reads a text, and may go on with it."""
    chosen = _chosen_heads(model._model.config, layers, heads)
    writes = hasattr(model, "generate_ids")
    if generate < 0 or (generate and not writes):
        rule = "at least 0" if writes else "0 with an encoder, which does not write"
        raise ValueError(f"generate must be {rule}, got {generate}")
    ids, pieces = _read(model, text)
    first = len(ids) - 1 if generate else 0  # The row of a token writes the one behind it.
    bounded(len(chosen[0]) * len(chosen[1]), generate or len(ids), len(ids) + generate)
    written: list[int] = []
    with model.capture(layers=chosen[0], heads=chosen[1], rows=slice(first, None)) as captured:
        if writes:
            written = list(model.generate_ids(ids, max_new_tokens=max(generate, 1), temperature=0))
        else:
            model.encode([text])
    weights = captured.weights
    if generate:
        if not written:
            raise ValueError("text must go on for generate, and the model ends it at once")
        ids = [*ids, *written]
        pieces += _words.pieces_of_ids(model.detokenize, ids, len(pieces))
        # The last token was written, not read: nothing looked at it.
        weights = np.zeros((*weights.shape[:2], len(written), len(ids)), np.float32)
        weights[..., :-1] = captured.weights[:, :, : len(written), : len(ids) - 1]
        first += 1
    added = model._tokenizer.get_added_tokens_decoder()
    apart = {i for i, x in added.items() if x.special and not _words.WORDLIKE.fullmatch(x.content)}
    special = [i in apart for i in ids]
    rows = merged(pieces[first:], special[first:])
    runs = "model.score(text).perplexity" if writes else "model.encode([text])"
    return _made(
        weights,
        rows,
        merged(pieces, special),
        range(first, len(ids)),
        chosen,
        is_causal=writes,
        generated=len(rows.words) if generate else 0,
        code=f"with model.ablate([({{layer}}, {{head}})]): print({runs})",
        **options,
    )


def _chosen_heads(config: Any, layers: Any, heads: Any) -> list[Any]:
    """Return the numbers of the layers and heads that a map of a model has."""
    return [
        _chosen("layers", layers, config.num_hidden_layers, "the model"),
        _chosen("heads", heads, config.num_attention_heads, "the model"),
    ]


def _of_sound(model: Any, audio: Any, *, layers: Any, heads: Any, **options: Any) -> Map:
    """Return the map of what a model looks at as it writes down what is said."""
    from fastattn.maps._sound import heard

    chosen = _chosen_heads(model._model.parts["cross"].config, layers, heads)
    weights, rows, columns = heard(model, audio, *chosen)
    code = "with model.ablate([({layer}, {head})]): print(model.transcribe(audio))"
    return _made(weights, rows, columns, None, chosen, is_causal=False, code=code, **options)


def _of_translation(model: Any, text: Any, *, layers: Any, heads: Any, **options: Any) -> Map:
    """Return the map of what a model looks at in a text as it translates it."""
    chosen = _chosen_heads(model._model.parts["cross"].config, layers, heads)
    source = model.tokenize(text)
    ((best,),) = model.translate([text], n_best=1)
    if not best.ids:
        raise ValueError("text must have a translation for a map, and the model gives it none")
    bounded(len(chosen[0]) * len(chosen[1]), len(best.ids), len(source))
    with model.capture(layers=chosen[0], heads=chosen[1]) as captured:
        model.logits(source, best.ids)
    tokens = model._tokenizer.encode(text).tokens
    return _made(
        captured.weights[:, :, :-1],  # The last row writes the end.
        merged(_words.pieces_of_ids(model.detokenize, best.ids, 0), [False] * len(best.ids)),
        merged(_words.pieces_of_tokens(tokens), _words.special_of(tokens, None)),
        None,
        chosen,
        is_causal=False,
        code="with model.ablate([({layer}, {head})]): print(model.translate([text]))",
        **options,
    )


def _read(model: Any, text: Any) -> tuple[list[int], list[str]]:
    """Return a text's tokens as the model is fed, and the part of the text that each adds."""
    from fastattn.models._tokens import unicode_text

    text = unicode_text("text", text)
    if not text.strip():
        raise ValueError(f"text must have a word, got {text!r}")
    if hasattr(model, "max_position_embeddings"):
        limit = model.max_position_embeddings
    else:
        limit = model.max_seq_length
        text = model._prompt(model._default_prompt) + text
        text = text.lower() if model._lower_case else text
    encoding = model._tokenizer.encode(text)
    rest = (x.special_tokens_mask for x in encoding.overflowing)
    if (count := len(encoding.ids) + sum(x.count(0) for x in rest)) > limit:
        raise ValueError(f"text must be at most {limit} tokens, the model's context, got {count}")
    pieces = _words.pieces_of_text(text, encoding.offsets)
    added = zip(encoding.special_tokens_mask, encoding.tokens, pieces, strict=True)
    return encoding.ids, [name if is_added else piece for is_added, name, piece in added]


def _made(
    tokens: Floats,
    rows: Words,
    columns: Words,
    positions: range | None,
    chosen: Sequence[Any],
    *,
    is_causal: bool,
    word: Any,
    title: Any,
    generated: int = 0,
    code: str = "",
) -> Map:
    """Return the map of words that the weights of tokens say.

    In a causal map the first token is a column apart, whatever word it begins: it is looked at for
    want of anything else.
    """
    starts, names, special = list(columns.starts), list(columns.words), set(columns.special)
    if is_causal and 0 not in special:
        if tokens.shape[3] > 1 and 1 not in starts:
            starts.insert(1, 1)
            names.insert(0, f"{columns.first}...")
            special = {k + 1 for k in special}
        special.add(0)
    places = None
    if positions is not None:  # A word's place is that of its last token.
        lasts = [positions[x - 1] for x in [*rows.starts[1:], len(positions)]]
        places = tuple((np.searchsorted(starts, lasts, side="right") - 1).tolist())
    of_special = np.isin(np.arange(tokens.shape[2]), [rows.starts[k] for k in rows.special])
    is_first = is_causal and positions is not None and positions[0] == 0
    has_choice = _words.rows_with_choice(of_special, is_first)
    lengths = np.diff([*rows.starts, tokens.shape[2]])
    weights = np.empty((*tokens.shape[:2], len(rows.words), len(names)), np.float32)
    sink = np.empty(tokens.shape[:2], np.float32)
    for i, layer in enumerate(tokens):  # float64 takes twice the memory: of one layer at a time
        sums = np.add.reduceat(layer, starts, axis=2, dtype=np.float64)
        means = np.add.reduceat(sums, list(rows.starts), axis=1) / lengths[:, None]
        weights[i] = np.minimum(means, 1)
        shares = sums[..., sorted(special)].sum(axis=2)[:, has_choice].mean(axis=1)
        sink[i] = np.minimum(shares, 1)
    return Map(
        queries=rows.words,
        keys=tuple(names),
        weights=weights,
        layers=tuple(chosen[0].tolist()),
        heads=tuple(chosen[1].tolist()),
        special=tuple(sorted(special)),
        special_queries=tuple(sorted(rows.special)),
        sink=sink,
        sink_names=_words.sink_names(
            columns.first if is_causal and 0 not in columns.special else None,
            [columns.words[k] for k in sorted(columns.special)],
        ),
        positions=places,
        is_causal=is_causal,
        generated=generated,
        word=None if word is None else _words.place(rows.words, word),
        title="Where the heads look" if title is None else title,
        code=code,
    )


def _layers(given: Any) -> list[Any]:
    """Return weights as layers, each an array of heads, queries and keys."""
    is_list = isinstance(given, (list, tuple))
    for i, x in enumerate(given if is_list else ()):
        if x is None:
            raise TypeError(f"weights[{i}] must be an array of numbers, not NoneType")
    if is_list and given and _axes(given[0]) >= 2:
        layers = [
            _of_one_text(as_array(f"weights[{i}]", _plain(x), "numbers"))
            for i, x in enumerate(given)
        ]
        shapes = {x.shape for x in layers}
        if len(shapes) > 1:
            got = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"{FORMS}, got shapes {got}")
        shape = (len(layers), *layers[0].shape)
    else:
        weights = as_array("weights", _plain(given), "numbers")
        shape = weights.shape
        if weights.ndim == 5:
            layers = [_of_one_text(x) for x in weights]
            shape = (len(layers), *shape[2:])
        elif 2 <= weights.ndim <= 4:
            layers = list(weights.reshape((1,) * (4 - weights.ndim) + shape))
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise ValueError(f"{FORMS}, got shape {shape}")
    bounded(len(layers) * layers[0].shape[0], *layers[0].shape[1:])
    return layers


def _axes(x: Any) -> int:
    """Return how many axes an array has, or lists that stand for one."""
    if isinstance(x, (list, tuple)):
        return 1 + (_axes(x[0]) if x else 0)
    return int(getattr(x, "ndim", 0))


def _of_one_text(layer: Any) -> Any:
    """Return a layer without its batch, which must be of one text."""
    if layer.ndim not in (3, 4) or (layer.ndim == 4 and layer.shape[0] != 1):
        raise ValueError(f"{FORMS}, got a layer of shape {layer.shape}")
    return layer if layer.ndim == 3 else layer[0]


def _plain(x: Any) -> Any:
    """Return a tensor without its gradient."""
    return x.detach() if hasattr(x, "detach") else x


def _probabilities(weights: Any, layer: int) -> Floats:
    """Return a layer of weights in float32, which must be probabilities."""
    found: Floats = weights.astype(np.float32)
    for rule, wrong in (
        ("numbers, not NaN or infinite", ~np.isfinite(found)),
        ("at least 0, being probabilities", found < 0),
    ):
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0].tolist())
            got = f"{found[place]:g} at {(layer, *place)}"
            raise ValueError(f"weights must be {rule}, got {got}")
    sums = found.sum(axis=-1, dtype=np.float64)
    if (sums > 1 + ROUNDING).any():
        place = tuple(np.argwhere(sums > 1 + ROUNDING)[0].tolist())
        rule = "probabilities, whose rows sum to at most 1"
        got = f"a sum of {sums[place]:g} at {(layer, *place)}"
        raise ValueError(f"weights must be {rule}, got {got}")
    return found


def _chosen(name: str, given: Any, count: int, whose: str) -> Any:
    """Return the numbers of layers or heads, of which there are so many; None means all."""
    if given is None:
        return np.arange(count)
    try:
        numbers = [given] if is_integer(given) else list(given)
    except TypeError:
        got = f"{type(given).__name__} {given!r:.60}"
        raise TypeError(f"{name} must be an int or a sequence of int, not {got}") from None
    if not numbers:
        raise ValueError(f"{name} must be one at least, got none")
    for i, x in enumerate(numbers):
        if not 0 <= whole_number(f"{name}[{i}]", x) < count:
            raise ValueError(f"{name} must be within 0..{count - 1}, those of {whose}, got {x}")
    return np.array(numbers, np.int64)
