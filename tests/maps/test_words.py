# SPDX-License-Identifier: Apache-2.0
"""Tokens of every spelling become the words that a reader sees; a word is found by what it is."""
# ruff: noqa: E501 - the tables have a line per case

import numpy as np
import pytest

from fastattn import maps


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
