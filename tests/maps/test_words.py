# SPDX-License-Identifier: Apache-2.0
"""Tokens of every spelling become the words that a reader sees; a word is found by what it is."""
# ruff: noqa: E501, RUF001 - the tables have a line per case, in many scripts

import numpy as np
import pytest

from fastattn import maps
from fastattn.maps import _words


def words(tokens, **options):
    """Return the words that a map has of tokens, beside the first token."""
    weights = np.full((len(tokens), len(tokens)), 1 / len(tokens))
    return list(maps.show(weights, tokens, **options).queries)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param(["Y", "esterday", "Ġhe", "Ġwas", "Ġti", "red", "."], "Yesterday he was tired .", id="bytes"),
        pytest.param(["Gr", "Ã¶", "ÃŁ", "e", "ĠðŁĺ", "Ģ", "Ġok"], "Größe 😀 ok", id="parts of characters"),
        pytest.param(["ĠðŁĺ", "Ġok"], "� ok", id="half a character"),
        pytest.param(["Ċ", "Ċ", "The", "Ġend"], r"\n \n The end", id="lines"),
        pytest.param(["▁He", "▁ate", "▁cr", "è", "me", ",", "▁too"], "He ate crème , too", id="SentencePiece"),
        pytest.param(["▁a", "<0xE2>", "<0x82>", "<0xAC>", "▁b"], "a € b", id="bytes of SentencePiece"),
        pytest.param(["un", "##believ", "##ably", "so", ",", "he"], "unbelievably so , he", id="WordPiece"),
        pytest.param(["He", " don", "'t", " sl", "eep"], "He don't sleep", id="spaces before"),
        pytest.param(["He", "does", "not", "sleep"], "He does not sleep", id="words"),
        pytest.param(["[CLS]", "he", "##ro", "[SEP]", "[PAD]"], "[CLS] hero [SEP] [PAD]", id="special"),
        pytest.param(["<|im_start|>", "user", "Ċ", "Hi"], r"<|im_start|> user Ċ Hi", id="no mark at all"),
        pytest.param(["##", "he"], "## he", id="nothing but the mark"),
    ],
)  # fmt: skip
def test_tokens_become_words(tokens, expected):
    assert words(tokens) == expected.split(" ")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param(["U", ".", " ", "3", ".", "1", "4"], ["U", ".", "3", ".", "14"], id="a space leads a number"),
        pytest.param(["всё", " ", "ё", "", "лка"], ["всё", "ёлка"], id="a space leads a word"),
        pytest.param([",", " ", " ", " (", "x"], [",", "(", "x"], id="spaces lead"),
        pytest.param([" ", "a", " "], ["a", "' '"], id="nothing to lead"),
        pytest.param(["a", "\n ", ")", "\n", "b"], ["a", "\\n", ")", "\\n", "b"], id="a line is a word"),
        pytest.param(["ह", "", "ि", "न", "्द", "ी", " म", "े", "ं"], ["हिन्दी", "में"], id="Hindi"),
        pytest.param(["ด", "ี", "", "ม", "า", "ก"], ["ดีมาก"], id="Thai"),
        pytest.param(["م", "َ", "ر", "ْح", "ب", "ً", "ا", " ب", "كم"], ["مَرْحبًا", "بكم"], id="Arabic"),
        pytest.param(["ros", "e", "\u0301", "", " ok"], ["rose\u0301", "ok"], id="decomposed"),
        pytest.param(["(", "e", "\u0301", ")"], ["(", "e\u0301", ")"], id="a mark is no letter"),
        pytest.param(["\u0301", "a", "\n", "\u0301"], ["\u0301", "a", "\\n", "\u0301"], id="a mark on nothing"),
        pytest.param(["👨", "\u200d", "👩", " ❤", "\ufe0f", "a"], ["👨\u200d👩", "❤\ufe0f", "a"], id="emoji"),
        pytest.param(["می", "\u200c", "روم"], ["می\u200cروم"], id="Persian"),
        pytest.param(["don", "’", "", "t", " l", "'", "eau"], ["don’t", "l'eau"], id="apostrophes"),
        pytest.param([" '", "q", "'", " a", "'", ".", "'", "s"], ["'", "q", "'", "a", "'.'", "s"], id="quotes"),
        pytest.param(["我", "爱", "", "北京", "。"], ["我", "爱", "北京", "。"], id="Chinese"),
        pytest.param([" ", "コ", "ー", "ヒー", "人", "々", " が"], ["コー", "ヒー", "人々", "が"], id="Japanese"),
    ],
)  # fmt: skip
def test_pieces_become_words(pieces, expected):
    assert list(_words.merged(pieces, [False] * len(pieces)).words) == expected


def test_special_pieces_cut_what_else_would_not_be():
    for pieces in (["a", "", "\u0301"], [" ", "a", "b"], ["a", "'", "b"]):
        found = _words.merged(pieces, [False, True, False])
        assert (found.starts, found.special) == ((0, 1, 2), {1})
    assert _words.merged(["", ""], [True, True]).starts == (0, 1)
    assert _words.merged([], []).words == ()


def test_the_first_piece_is_shown_if_it_is_a_space():
    for piece, first in ((" ", "' '"), ("\n", r"\n"), (" a", "a"), ("", "")):
        assert _words.merged([piece, "b"], [False, False]).first == first


def test_what_no_token_stands_for_is_of_the_one_before():
    offsets = [(0, 0), (0, 4), (6, 8), (9, 10), (10, 10), (13, 14), (0, 0)]
    pieces = _words.pieces_of_text("cafe\u0301 ok [\u0301 \nb\u0301 ", offsets)
    assert pieces == ["", "cafe\u0301", " ok", " [\u0301", "", " \nb\u0301", ""]


def test_names_of_sinks_are_clean_and_bounded():
    found = _words.sink_names("\x1b[2J", ["a\u202eb", "[SEP]"])
    assert found == 'the first token, "?[2J", a?b and [SEP]'
    assert _words.sink_names("x" * 99, []) == f'the first token, "{"x" * 29}..."'
    assert (
        _words.sink_names(None, ["<\uff5cbegin▁of▁sentence\uff5c>"])
        == "<\uff5cbegin▁of▁sentence\uff5c>"
    )
    assert "\x1b" not in str(maps.show(np.eye(3), ["\x1b[2J", "b", "c"]))


def test_special_tokens_are_words_of_their_own():
    assert words(["Ġa", "b", "c"], is_special=[False, True, False]) == ["a", "b", "c"]
    assert words(["[UNK]", "a", "[MASK]"]) == ["[UNK]", "a", "[MASK]"]
    assert maps.show(np.eye(2), ["[UNK]", "[MASK]"], is_special=[False, False]).special == (0,)


def test_a_row_is_the_mean_and_a_column_the_sum():
    tokens = [" a", "b", " c", "d", " e"]
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3, 5))
    found = maps.show(weights, tokens)
    sums = np.stack([weights[..., :2].sum(-1), weights[..., 2:4].sum(-1), weights[..., 4]], -1)
    means = np.stack([sums[:, :, :2].mean(2), sums[:, :, 2:4].mean(2), sums[:, :, 4]], 2)
    np.testing.assert_allclose(found.weights, means, rtol=1e-6)
    assert found.queries == found.keys == ("ab", "cd", "e")
    assert found.positions == (0, 1, 2)


TEXT = ["He", "said", "that", "he", "saw", "her", "and", "he", "smiled"]


@pytest.mark.parametrize(
    ("word", "index"),
    [("saw", 4), ("Saw", 4), ("He", 0), (("he", 1), 3), (("he", 2), 7), (8, 8), (np.int64(0), 0)],
)
def test_a_word_is_found(word, index):
    assert maps.show(np.eye(9), TEXT, word=word).word == index


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("smile", ValueError, "word must be a word of the text, got 'smile', which is none; near it: 'smiled'"),
        ("xyzzy", ValueError, "word must be a word of the text, got 'xyzzy', which is none"),
        ("he", ValueError, "word must say which of 2: ('he', 1) is the first, got 'he'"),
        (("he", 3), ValueError, "the number of word must be within 1..2, as often as 'he' occurs, got 3"),
        (9, ValueError, "word must be within 0..8, the words, got 9"),
        (-1, ValueError, "word must be within 0..8, the words, got -1"),
        (2.0, TypeError, "word must be a word, an index, or a pair of a word and which one it is, not float"),
        (("he", "2"), TypeError, "the number of word must be an int, not str"),
    ],
)  # fmt: skip
def test_a_word_that_is_not_there_is_refused(word, error, message):
    with pytest.raises(error) as caught:
        maps.show(np.eye(9), TEXT, word=word)
    assert str(caught.value) == message
