# SPDX-License-Identifier: Apache-2.0
"""How loud is each pitch at each moment? The log-mel spectrogram, as Whisper hears a sound."""

from __future__ import annotations

import functools

import numpy as np

from fastattn.nn import Floats

RATE = 16000  # samples in a second
WINDOW, HOP = 400, 160  # samples: what a frame sees, and how far the next one is
FRAMES = RATE // HOP  # in a second
BLOCK = 3000  # frames that are computed at once
FLOOR = 1e-10  # of a power
RANGE = 8.0  # powers of ten below the loudest, which are silence
LINEAR = 1000.0  # hertz, up to which pitch grows in proportion, and beyond with the logarithm
PITCH_OF_LINEAR, PITCHES_PER_FACTOR = 15, 27 / np.log(6.4)
HIGHEST = PITCH_OF_LINEAR + PITCHES_PER_FACTOR * np.log(RATE / 2 / LINEAR)


def log_mel(samples: Floats, bands: int) -> Floats:
    """Return the loudness of a sound in bands of pitch: its logarithm, about -1 to 1.

    Parameters
    ----------
    samples : array of shape (samples,)
        `RATE` of them in a second.
    bands : int

    Returns
    -------
    ndarray of shape (len(samples) // HOP, bands)
    """
    frames = len(samples) // HOP
    out = np.empty((frames, bands), np.float32)
    # A frame is in the middle of what it sees: first of the sound's reflection, last of silence.
    silence = np.zeros(WINDOW, np.float32)
    reflected = np.concatenate([samples[:WINDOW], silence])[WINDOW // 2 : 0 : -1]
    padded = np.concatenate([reflected, samples, silence])
    seen = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]
    fade = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    for begin in range(0, frames, BLOCK):
        waves = np.fft.rfft(seen[begin : begin + BLOCK] * fade)
        power = (waves.real**2 + waves.imag**2).astype(np.float32)
        found = power @ _bands(bands)
        out[begin : begin + BLOCK] = np.log10(np.maximum(found, FLOOR))
    if frames:
        np.maximum(out, out.max() - np.float32(RANGE), out=out)
    out += 4
    out /= 4
    return out


@functools.cache
def _bands(count: int) -> Floats:
    """Return how much each band hears of each frequency, triangles of Slaney's: (frequency, band).

    Slaney 1998, Auditory Toolbox, section on filter banks.
    """
    pitches = np.linspace(0, HIGHEST, count + 2)
    edges = np.where(
        pitches < PITCH_OF_LINEAR,
        pitches * LINEAR / PITCH_OF_LINEAR,
        LINEAR * np.exp((pitches - PITCH_OF_LINEAR) / PITCHES_PER_FACTOR),
    )
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    areas = (edges[2:] - edges[:-2]) / 2
    return np.asarray(triangles / areas, np.float32)
