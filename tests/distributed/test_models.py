# SPDX-License-Identifier: Apache-2.0
"""Models over ranks that are processes: the calls, and the commands as mpiexec starts them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import _launched
from tests.distributed import launch
from tests.models import test_bert, test_llama
from tests.support.decoders import write

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", exc_type=ImportError)

LENGTH = 200
PATIENCE = 60
TEXT = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 101, LENGTH))
made = test_bert.made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a decoder with random weights, of words with spaces between them."""
    sizes = test_llama.SIZES | dict(max_position_embeddings=LENGTH)
    found = write(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**sizes))
    tokenizer = tokenizers.Tokenizer.from_file(str(found / "tokenizer.json"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(found / "tokenizer.json"))
    return found


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(TEXT)
    return file


def run(*arguments, ranks, program=("-m", "fastattn"), cwd=None):
    """Return the status, stdout and stderr of a command over ranks, or of one process."""
    command = [sys.executable, *program, *map(str, arguments)]
    if ranks is not None:
        launch.needs("mpi")
        command = ["mpiexec", "--oversubscribe", "-n", str(ranks), *command]
    env = os.environ | launch.SETTINGS
    how = dict(capture_output=True, text=True, check=False, env=env, cwd=cwd)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=PATIENCE, **how)
    return done.returncode, done.stdout, done.stderr


def scored(comm, folder):
    return models.load(folder).score(TEXT, comm=comm, method="gather").log_probabilities


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_score_over_processes(engine, folder, tmp_path):
    expected = models.load(folder).score(TEXT).log_probabilities
    for found in launch.values(engine, 2, scored, str(folder), folder=tmp_path):
        assert_array_equal(found, expected)


def test_score_prints_once_what_one_process_prints(folder, book):
    alone = run("score", book, "--model", folder, ranks=None)
    assert alone[0] == 0
    assert alone[1].startswith("perplexity ")
    for ranks in (1, 3):
        assert run("score", book, "--model", folder, ranks=ranks) == alone
    status, out, err = run("score", book, "--tokens", "--model", folder, ranks=2)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == LENGTH + 1
    assert out.endswith(alone[1])


def test_embed_prints_once_what_one_process_prints(made, tmp_path):
    file = tmp_path / "vectors.npy"
    texts = ["the cat sat on the mat . " * 5, "a dog ran", ""]
    assert run("embed", *texts, "--output", file, "--model", made, ranks=3) == (0, "", "")
    vectors = models.load(made).encode(texts)
    assert_allclose(np.load(file), vectors, rtol=0, atol=1e-5 * abs(vectors).max())


LONG = f"text must be at most {LENGTH} tokens, the model's context, got {LENGTH + 1}"


@pytest.mark.parametrize(
    ("file", "model", "error"),
    [
        ("absent.txt", None, "[Errno 2] No such file or directory: 'absent.txt'"),
        ("-", None, "there must be a FILE over ranks, whose stdin may have no end"),
        ("book.txt", "absent", "absent is neither a folder nor a file"),
        ("long.txt", None, LONG),
    ],
    ids=["no file", "stdin", "no model", "long"],
)
def test_errors_are_said_once_and_end_every_rank(folder, book, file, model, error):
    (book.parent / "long.txt").write_text(f"{TEXT} w1")
    done = run("score", file, "--model", model or folder, ranks=3, cwd=book.parent)
    assert done[:2] == (2, "")
    assert done[2].count("fastattn: error: ") == 1
    assert f"fastattn: error: {error}" in done[2]
    assert "Traceback" not in done[2]


FAILING = """
import sys
from mpi4py import MPI
from fastattn import __main__, models
class Decoder(models.Decoder):
    def __init__(self): pass
    def score(self, text, **over):
        if MPI.COMM_WORLD.rank == 1:
            raise {error}
        MPI.COMM_WORLD.Barrier()  # for ever
def load(name):
    if {loads} or MPI.COMM_WORLD.rank != 1:
        return Decoder()
    raise {error}
models.load = load
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("loads", "error", "said"),
    [
        (False, "OSError('no disk')", "fastattn: error: rank 1: no disk\n"),
        (True, "MemoryError('8 GB')", "error: rank 1: the memory is too small for it: 8 GB\n"),
        (True, "TypeError('a bug')", "TypeError: a bug\n"),
    ],
)
def test_an_error_of_one_rank_ends_all(loads, error, said, book):
    program = FAILING.format(loads=loads, error=error)
    status, out, err = run("score", book, ranks=2, program=("-c", program))
    assert status == 2
    assert out == ""
    assert err.count(said) == 1


@pytest.mark.parametrize(
    ("mpi4py", "error"),
    [
        (None, "4 ranks were started, and need mpi4py: import of mpi4py halted; .*"),
        (1, "4 ranks were started, and need mpi4py of the same MPI, and it knows 1"),
    ],
)
def test_ranks_that_mpi4py_does_not_know(mpi4py, error, monkeypatch):
    """The same work is not done four times; the first rank says why."""
    for name in [x for launcher in _launched.LAUNCHERS for x in launcher]:
        monkeypatch.delenv(name, raising=False)
    if mpi4py is not None:
        world = SimpleNamespace(size=mpi4py)
        mpi4py = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world))
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert _launched.world().over == {}  # No launcher says so half.
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(ImportError, match=f"^{error}$"):
        _launched.world()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    with pytest.raises(SystemExit) as raised:
        _launched.world()
    assert raised.value.code == 0
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert _launched.world().is_first
