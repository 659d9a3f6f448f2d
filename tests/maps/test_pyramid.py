# SPDX-License-Identifier: Apache-2.0
"""The map of a long text is made of the weights' sums over blocks, and of their largest."""
# ruff: noqa: E501 - the tables have a line per case

import itertools
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import maps

RNG = np.random.default_rng(0)
TOKENS = ["O", "ne", *(["Ġup", "on", "Ġa", "Ġti", "me", "."] * 60)[:298]]
LEVELS = {"chapters": [0, 100, 200], "lines": range(0, 300, 20), "tokens": range(300)}


def problem(n=300, heads=2):
    return RNG.standard_normal((2, heads, n, 16), np.float32) * 2


@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_are_means_of_the_weights(is_causal):
    query, key = problem()
    found = maps.pyramid(query, key, TOKENS, levels=LEVELS, is_causal=is_causal, softcap=5.0)
    weights = fastattn.attention_weights(query, key, is_causal=is_causal, softcap=5.0)
    whole = maps.show(weights, TOKENS)
    assert found.words[:2] == ("O", "ne")
    assert found.words[2:] == whole.queries[1:]
    assert found.special == ((0,) if is_causal else ())
    starts = np.array([0, 1, *(i for i in range(2, 300) if TOKENS[i][0] in "Ġ.")])
    assert [x.name for x in found.levels] == list(LEVELS)
    for level, given in zip(found.levels, LEVELS.values(), strict=True):
        begins = np.unique(np.searchsorted(starts, list(given), side="right") - 1)
        assert_array_equal(level.queries, begins)
        assert_array_equal(level.keys, np.union1d(begins, [0, 1]))
        assert set(found.levels[0].queries) <= set(level.queries)
        sums = np.add.reduceat(weights, starts[level.queries], axis=1)
        sums = np.add.reduceat(sums, starts[level.keys], axis=2)
        rows = np.diff([*starts[level.queries], 300])
        assert_allclose(level.shares, sums / rows[:, None], atol=1e-5)
    if is_causal:
        assert_allclose(found.sink, weights[:, 1:, 0].mean(axis=1), atol=1e-5)
        share = int(100 * found.sink.mean() + 0.5)
        text = f'{share} % of the attention goes to the first token, "O"'
        assert found.sink_text() == text
        assert str(found).endswith(f"; 2 heads. {text}.")


def test_links_are_the_largest_weights():
    query, key = problem()
    tokens = [f" w{i}" for i in range(300)]
    found = maps.pyramid(query, key, tokens, top=3, layers=[7, 8], heads=[1, 5])
    weights = fastattn.attention_weights(query, key, is_causal=True)
    assert_array_equal(found.top_keys[:, 200], np.argsort(-weights[:, 200])[:, :3])
    assert_allclose(found.top_weights[:, 200], -np.sort(-weights[:, 200])[:, :3], atol=1e-6)
    assert_array_equal(found.top_keys[:, 0], [[0, -1, -1]] * 2)
    links = found.links("w200")
    assert [x.share for x in links] == sorted((x.share for x in links), reverse=True)
    for link in links:
        head = {(7, 1): 0, (8, 5): 1}[link.layer, link.head]
        assert link.share == pytest.approx(weights[head, 200, int(link.key[1:])], abs=1e-6)
    assert found.links(0) == []
    assert repr(found) == "<LongMap: 300 words, 2 heads>"
    for count, error, message in (
        (0, ValueError, "count must be at least 1, got 0"),
        (None, TypeError, "count must be an int, not NoneType"),
    ):
        with pytest.raises(error) as caught:
            found.links("w200", count)
        assert str(caught.value) == message


def test_numbers_of_heads_may_be_arrays():
    query, key = problem()
    options = {"layers": np.array([1, 2]), "heads": np.array([3, 4])}
    found = maps.pyramid(query, key, TOKENS, **options)
    assert (found.layers, found.heads) == ((1, 2), (3, 4))
    assert json.dumps(found.data())
    assert found.html()


def test_blocks_by_default_are_bounded_for_many_heads():
    query, key = problem(600, 27)
    found = maps.pyramid(query, key, ["▁a"] * 600)
    assert [x.name for x in found.levels] == ["parts", "passages", "lines"]
    assert len(found.levels[-1].queries) == 300
    assert 27 * 300**2 <= 4_000_000


@pytest.mark.parametrize("n", [1, 2, 50, 5000])
def test_levels_by_default(n, tmp_path):
    query, key = problem(n, 1)
    found = maps.pyramid(query, key, ["▁a"] * n)
    for coarse, fine in itertools.pairwise(found.levels):
        assert set(coarse.queries) <= set(fine.queries)
    assert len(found.levels[-1].queries) == min(n, 1250)
    assert json.dumps(found.data())
    found.save(tmp_path / "map.html")
    assert (tmp_path / "map.html").read_text() == found.html()
    assert 'srcdoc="' in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["a"]}, "tokens must be as many as query has positions, 300, and at least 1, got 1"),
        ({"query": np.ones((300, 16))}, "query must be (heads, len, head_dim), got shape (300, 16)"),
        ({"levels": {}}, "levels must be one at least, got none"),
        ({"levels": {"a": [1]}}, "levels['a'] must be integers that begin with 0, got [1]"),
        ({"levels": {"a": [0, 300]}}, "levels['a'] must ascend, and stay below 300, the tokens"),
        ({"levels": {"a": [0, 0]}}, "levels['a'] must ascend, and stay below 300, the tokens"),
        ({"levels": {"a": [0, 7], "b": [0]}}, "levels['b'] must begin where those of 'a' begin, and none does at word 5"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"heads": [1]}, "heads must be as many as query has heads, 2, got 1"),
        ({"layers": [1]}, "layers must be as many as query has heads, 2, got 1"),
        ({"query": np.full((2, 300, 16), np.nan, np.float32)}, "query must be finite, got nan at (0, 0, 0)"),
        ({"key": np.where(np.arange(16) == 3, np.inf, np.ones((2, 300, 16)))}, "key must be finite, got inf at (0, 0, 3)"),
        ({"is_special": [True]}, "is_special must be as many as the keys, 300, got 1"),
    ],
)  # fmt: skip
def test_what_is_no_pyramid_is_refused(options, message):
    query, key = problem()
    given = {"query": query, "key": key, "tokens": TOKENS} | options
    with pytest.raises(ValueError, match="must") as caught:
        maps.pyramid(given.pop("query"), given.pop("key"), given.pop("tokens"), **given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "layers must be a sequence of int, not int"),
        ({"heads": np.array(5)}, "heads must be a sequence of int, not ndarray"),
        ({"heads": [0, 1.5]}, "heads[1] must be an int, not float"),
        ({"layers": "ab"}, "layers[0] must be an int, not str"),
        ({"levels": [0, 5]}, "levels must be a mapping of names to the tokens that blocks begin with, not list"),
        ({"top": 1.5}, "top must be an int, not float"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused(options, message):
    with pytest.raises(TypeError) as caught:
        maps.pyramid(*problem(), TOKENS, **options)
    assert str(caught.value) == message


def test_levels_of_too_many_blocks_are_refused():
    query, key = problem(3000, 1)
    with pytest.raises(ValueError, match="blocks") as caught:
        maps.pyramid(query, key, ["▁a"] * 3000, levels={"words": range(3000)})
    rule = "at most 4,000,000 blocks x blocks x heads"
    assert str(caught.value) == f"levels['words'] must be {rule}, got 9,000,000"
    with pytest.raises(ValueError, match="end in") as caught:
        maps.pyramid(query, key, ["▁a"] * 3000).save("map.png")
    assert str(caught.value) == "the file must end in .html, got 'map.png'"
