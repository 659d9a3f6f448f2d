# SPDX-License-Identifier: Apache-2.0
"""A WAV file gives the sound that is in it, and a damaged one an error."""

import io
import os
import struct
import tracemalloc
import wave

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn.models import _wav
from tests.support.speech import wav

SOUND = np.linspace(-1, 1, 1000, endpoint=False)
STORED = {  # by format and bits
    (1, 8): np.floor(SOUND * 128 + 128).astype("u1"),
    (1, 16): np.round(SOUND * 2**15).astype("<i2"),
    (1, 24): np.round(SOUND * 2**23).astype("<i4").view("u1").reshape(-1, 4)[:, :3],
    (1, 32): np.round(SOUND * 2**31).astype("<i4"),
    (3, 32): SOUND.astype("<f4"),
    (3, 64): SOUND.astype("<f8"),
}
DATA = STORED[1, 16].tobytes()


@pytest.mark.parametrize(("kind", "bits"), STORED)
def test_every_kind_of_number_is_between_minus_1_and_1(kind, bits, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(STORED[kind, bits].tobytes(), kind, rate=44100, bits=bits))
    found = _wav.read(path)
    assert found.rate == 44100
    assert found.samples.dtype == np.float32
    assert_allclose(found.samples, SOUND, rtol=0, atol=1 / 2 ** min(bits - 1, 24))


def test_files_of_the_standard_library_are_read_and_channels_are_mixed():
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((2, 2, 16000, 0, "NONE", ""))
        writer.writeframes(np.array([[2**14, 0], [-(2**15), 2**14]], "<i2").tobytes())
    found = _wav.of_bytes(file.getvalue())
    assert_array_equal(found.samples, np.float32([0.25, -0.25]))
    assert found.rate == 16000


def test_numbers_that_are_not_finite_stay_so():
    data = np.array([[np.inf, -np.inf], [3e38, 3e38], [np.nan, 0], [1, 0]], "<f4").tobytes()
    found = _wav.of_bytes(wav(data, 3, channels=2, bits=32)).samples
    assert_array_equal(np.isfinite(found), [False, False, False, True])


def test_other_chunks_are_passed_over():
    data = wav(b"\x80\xff\x00", bits=8, before=b"LIST\x03\0\0\0abc\0", behind=b"\0LIST\0\0\0\0")
    assert_array_equal(_wav.of_bytes(data).samples, np.float32([0, 127 / 128, -1]))


def test_what_was_written_to_a_pipe_says_no_size():
    for size in (0x7FFFF000, 0xFFFFFFFF):
        assert len(_wav.of_bytes(wav(DATA, size=size)).samples) == 1000


def test_the_extensible_format_says_the_real_one_further_behind():
    form = struct.pack("<HHIIHHHHIH14s", 0xFFFE, 1, 16000, 64000, 4, 32, 22, 32, 0, 3, b"")
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", 4000)
    data = b"RIFF\0\0\0\0WAVE" + chunks + STORED[3, 32].tobytes()
    assert_array_equal(_wav.of_bytes(data).samples, STORED[3, 32])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it must begin as a WAV file, RIFF....WAVE, got b''"),
        (b"ID3\x04" + bytes(99), "it must begin as a WAV file, .*, got b'ID3.*'"),
        (wav(DATA)[:-1], r"chunk b'data' must end within the 2043 bytes .*, got 2044: .* cut off"),
        (wav(DATA)[:40], "chunk b'data' must .*: .* cut off|it must have a chunk b'data' .*"),
        (wav(DATA)[:30], "chunk b'fmt ' must end within the 30 bytes of the file, got 36: .*"),
        (wav(DATA)[:12], "it must have a chunk b'fmt ' of at least 16 bytes, got none"),
        (wav(DATA, kind=2), "its numbers must be integers .*, got format 2 of 16 bits"),
        (wav(DATA, bits=12), "its numbers must be integers .*, got format 1 of 12 bits"),
        (wav(DATA, kind=3, bits=16), "its numbers must be .*, got format 3 of 16 bits"),
        (wav(DATA, kind=0xFFFE), "its numbers must be .*, got format 0 of 16 bits"),
        (wav(DATA, channels=0), "channels and rate must be above 0, got 0 and 16000"),
        (wav(DATA, rate=0), "channels and rate must be above 0, got 1 and 0"),
        (wav(DATA[:-1]), "its sound must be whole samples of 2 bytes, got 1 left over"),
        (wav(DATA, channels=3), "its sound must be whole samples of 6 bytes, got 2 left over"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(data, message, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{path}: (?:{message})$"):
        _wav.read(path)


def test_many_chunks_take_no_memory():
    data = wav(DATA, before=b"".join(b"%04x\0\0\0\0" % i for i in range(60_000)))
    tracemalloc.start()
    assert len(_wav.of_bytes(data).samples) == 1000
    assert tracemalloc.get_traced_memory()[1] < len(data)
    tracemalloc.stop()


def test_no_more_than_is_allowed_is_read(monkeypatch):
    monkeypatch.setattr(_wav, "LARGEST", 1000)
    end, begin = os.pipe()
    os.write(begin, wav(DATA))
    os.close(begin)
    path = f"/dev/fd/{end}"
    with pytest.raises(ValueError, match=f"^{path}: it must be at most 1000 bytes, got more$"):
        _wav.read(path)
    os.close(end)


def test_numbers_of_all_channels_are_counted(monkeypatch):
    monkeypatch.setattr(_wav, "LONGEST", 999)
    with pytest.raises(ValueError, match=r"^its sound must be at most 999 numbers, got 1000$"):
        _wav.of_bytes(wav(DATA, channels=2))


def test_any_bytes_give_a_sound_or_an_error():
    rng, whole = np.random.default_rng(0), np.frombuffer(wav(DATA[:100]), np.uint8)
    outcomes = set()
    for _ in range(2000):
        data = whole[: rng.integers(len(whole) + 1)].copy() if rng.integers(2) else whole.copy()
        for place in rng.integers(0, max(len(data), 1), rng.integers(4)):
            data[place : place + 1] = rng.choice([0, 1, 2, 255, rng.integers(256)])
        try:
            assert _wav.of_bytes(data.tobytes()).samples.dtype == np.float32
            outcomes.add("sound")
        except ValueError as error:
            outcomes.add(str(error)[:20])
    assert len(outcomes) > 5
