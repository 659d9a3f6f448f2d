# SPDX-License-Identifier: Apache-2.0
"""Layouts: who has which positions."""

import numpy as np
import pytest

import fastattn.distributed as fd


@pytest.mark.parametrize("total", [0, 1, 7, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("layout_of", [fd.contiguous, fd.zigzag])
def test_each_position_has_one_rank(layout_of, total, ranks):
    layout = layout_of(total, ranks)
    assert layout.total == total
    assert layout.ranks == ranks
    positions = [layout.positions(rank) for rank in range(ranks)]
    assert tuple(map(len, positions)) == layout.lengths
    np.testing.assert_array_equal(np.sort(np.concatenate(positions)), np.arange(total))
    whole = np.arange(total * 6).reshape(2, total, 3)
    parts = [layout.take(whole, rank) for rank in range(ranks)]
    np.testing.assert_array_equal(layout.join(parts), whole)
    for part, own in zip(parts, positions, strict=True):
        np.testing.assert_array_equal(part, whole[:, own])


def test_zigzag_shares_causal_work():
    layout = fd.zigzag(64, 4)
    assert {int(layout.positions(rank).sum()) for rank in range(4)} == {64 * 63 // 2 // 4}


def test_torch_cuts_so_too(torch):
    chunks = torch.arange(48).chunk(6)
    for rank in range(3):
        own = torch.cat([chunks[rank], chunks[5 - rank]]).numpy()
        np.testing.assert_array_equal(fd.zigzag(48, 3).positions(rank), own)


def test_equal_layouts():
    assert fd.contiguous([3, 4]) == fd.Layout([[(0, 1), (1, 3), (3, 3)], [(3, 7)]])
    assert hash(fd.contiguous([3, 4])) == hash(fd.Layout([[(0, 3)], [(3, 7)]]))
    assert fd.contiguous([3, 4]) != fd.contiguous([4, 3])
    assert fd.contiguous(8, 1) == fd.zigzag(8, 1)
    assert repr(fd.contiguous(100, 50)).endswith(".. 50 ranks))")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "spans must be those of 1 rank or more, got none"),
        ([[(0, 4)], [(3, 7)]], "spans must not overlap, got position 3 of ranks 0 and 1"),
        ([[(0, 4)], [(0, 4)]], "spans must not overlap, got position 0 of ranks 0 and 1"),
        ([[(0, 4)], [(5, 7)]], "spans must miss no position, got none that has 4..4"),
        ([[(2, 4)]], "spans must miss no position, got none that has 0..1"),
        ([[(0, 4), (-1, 2)]], "spans must have 0 <= start <= stop, got (-1, 2) of rank 0"),
        ([[], [(4, 2)]], "spans must have 0 <= start <= stop, got (4, 2) of rank 1"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(ValueError, match="spans") as raised:
        fd.Layout(spans)
    assert str(raised.value) == message


@pytest.mark.parametrize("span", [3, (1,), (0, 2.0), (False, 2), "ab"])
def test_spans_that_are_no_pairs(span):
    with pytest.raises(TypeError) as raised:
        fd.Layout([[span]])
    assert str(raised.value) == f"spans must be pairs of integers (start, stop), got {span!r}"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fd.contiguous(8, None), TypeError, "ranks must be an int, not NoneType"),
        (lambda: fd.contiguous(8, 0), ValueError, "ranks must be 1 or more, got ranks=0"),
        (lambda: fd.zigzag(-1, 2), ValueError, "total must be 0 or more, got total=-1"),
        (lambda: fd.zigzag(8.0, 2), TypeError, "total must be an int, not float"),
        (
            lambda: fd.contiguous([3, 4], 3),
            ValueError,
            "ranks must be the number of lengths in total, 2, got ranks=3",
        ),
        (
            lambda: fd.contiguous([3, -4]),
            ValueError,
            "total must be lengths of 0 or more, got -4",
        ),
        (
            lambda: fd.contiguous("ab"),
            TypeError,
            "total must be an int or a sequence of them, got 'a'",
        ),
        (
            lambda: fd.contiguous(8, 2).positions(2),
            ValueError,
            "rank must be within 0..1, got 2",
        ),
        (
            lambda: fd.contiguous(8, 2).positions(None),
            TypeError,
            "rank must be an int, not NoneType",
        ),
        (
            lambda: fd.contiguous(8, 2).take(np.zeros((8, 7)), 0, axis=1),
            ValueError,
            "x must have the layout's total, 8, along axis 1, got x.shape=(8, 7)",
        ),
        (
            lambda: fd.contiguous(8, 2).join([np.zeros(4), np.zeros(3)], axis=0),
            ValueError,
            "parts must have the layout's lengths, (4, 4), along axis 0, got (4, 3)",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message
