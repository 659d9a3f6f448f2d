# SPDX-License-Identifier: Apache-2.0
"""Random calls of everything public, held against the definition and the promises; see --help.

    python tests/fuzz --seconds 60
    python tests/fuzz --only attention,paged --seed 7 --cases 1000
    python tests/fuzz --only cache --seed 7 --case 123 --isas avx2

`command.py` runs the cases in child processes, so that a crash is a failure with a name. A kind of
case is a module: `draw(rng)` returns a spec, which is plain JSON, and `check(spec)` raises if what
it asks for comes out wrong. `problem.py` makes arrays of a spec, `definition.py` says what is right
and `compare.py` how near is near enough. It needs NumPy and fastattn; ml_dtypes for bfloat16,
tokenizers and jinja2 for checkpoints, and PyTorch for the kind that is named so.
"""
