#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How each library runs MiniLM and SmolLM2, at its best, in a process that holds nothing else.

models.py starts it, once for each library and model, and sends requests through a socket. What is
imported counts as that library's, so all imports but NumPy's are where they are needed.
"""

import functools
import inspect
import os
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

MOST_TOKENS = 512  # that MiniLM knows positions for
OPSET = 23  # the first that has attention as one operator, which both runtimes make use of
ENCODER, DECODER, TOKENIZER = "encoder.onnx", "decoder.onnx", "decoder_tokenizer.json"
PRODUCTS = "linear", "linears", "through"
ATTENTION = ("attend", "multi_head_attention")
SETTLE_SECONDS, QUIET_SECONDS = 1.0, 0.02  # at most; how long a quiet process is watched
WARM_SECONDS = 0.05  # a shorter call is not counted the first time of a turn


class Fastattn:
    """What both models of fastattn have in common."""

    def __init__(self, place, _exported, threads):
        import fastattn.models

        fastattn.set_num_threads(threads)
        self.model = fastattn.models.load(place)

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return list(self.model.tokenize(text))

    def profile(self, task, *arguments):
        """Return the seconds of a task, and of them those in each function that it calls.

        A function's seconds are without those of the functions in it.
        """
        import fastattn.models._encoder as encoder
        from fastattn import _linear, nn

        owners = [x for name, x in sys.modules.items() if name.startswith("fastattn.")]
        functions = [x for name in nn.__all__ if inspect.isfunction(x := vars(nn)[name])]
        functions += [_linear.through, encoder.Encoder._tokenize]
        owners.append(encoder.Encoder)
        if (context := sys.modules.get("fastattn.models._context")) is not None:
            functions.append(context.Reading.attend)
            owners.append(context.Reading)
        seconds, inner = Counter(), [0.0]

        def timed(function):
            @functools.wraps(function)
            def call(*arguments, **options):
                inner.append(0.0)
                begin = time.perf_counter()
                try:
                    return function(*arguments, **options)
                finally:
                    took = time.perf_counter() - begin
                    seconds[function.__name__] += took - inner.pop()
                    inner[-1] += took

            return call

        replaced = []
        for function in functions:
            wrapper = timed(function)
            for owner in owners:
                names = [name for name, x in vars(owner).items() if x is function]
                replaced += [(owner, name, function, wrapper) for name in names]
        for owner, name, _, wrapper in replaced:
            setattr(owner, name, wrapper)
        try:
            begin = time.perf_counter()
            getattr(self, task)(*arguments)
            total = time.perf_counter() - begin
        finally:
            for owner, name, function, _ in replaced:
                setattr(owner, name, function)
        return total, dict(seconds)


class FastattnEncoder(Fastattn):
    """Packed: there are no batches to choose."""

    def encode(self, texts, _batch=None):
        """Return the embeddings of texts."""
        return self.model.encode(texts)

    def first(self, text):
        """Answer a text."""
        self.encode([text])


class FastattnDecoder(Fastattn):
    """Weights as the file has them. No token ends the text, so that there are as many as asked."""

    def first(self, text):
        """Give the first token of a text's continuation."""
        self.prefill(self.tokenize(text))

    def prefill(self, ids):
        """Read a prompt, and give the first token after it."""
        self.begin(ids, 1)

    def begin(self, ids, count):
        """Read a prompt, and return the first of the tokens after it."""
        self.stream = self.model.generate_ids(ids, max_new_tokens=count, temperature=0, stop_ids=())
        return next(self.stream)

    def finish(self):
        """Return the other tokens."""
        return list(self.stream)

    def last_logits(self, ids):
        """Return the logits after the last token."""
        return self.logits(ids)[-1]

    def logits(self, ids):
        """Return the logits after each token."""
        return self.model.logits(ids)

    def greedy(self, ids, count):
        """Return the tokens that follow, and the seconds of each but the first."""
        tokens = [self.begin(ids, count)]
        begin = time.perf_counter()
        tokens += self.finish()
        return tokens, (time.perf_counter() - begin) / (count - 1)

    def decode(self, ids, count):
        """Return the seconds of each token but the first."""
        return self.greedy(ids, count)[1]


class BatchedEncoder:
    """Pads the texts of a batch to the longest, as a library does that cannot pack them."""

    def encode(self, texts, batch=None):
        """Return the embeddings; all in one batch as they are given, or sorted by length."""
        order = range(len(texts))
        if batch is not None:
            order = sorted(order, key=lambda i: len(texts[i]))
        out = None
        for begin in range(0, len(texts), batch or len(texts)):
            chosen = order[begin : begin + (batch or len(texts))]
            states, mask = self.states([texts[i] for i in chosen])
            if out is None:
                out = np.empty((len(texts), states.shape[-1]), np.float32)
            for i, x, length in zip(chosen, states, mask.sum(axis=1), strict=True):
                out[i] = x[:length].mean(axis=0)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def first(self, text):
        """Answer a text."""
        self.encode([text])


class TransformersEncoder(BatchedEncoder):
    """On torch, with its scaled_dot_product_attention."""

    def __init__(self, place, _exported, threads):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.mode = torch.inference_mode
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModel.from_pretrained(
            place, attn_implementation="sdpa", dtype=torch.float32
        )
        self.model = model.eval()

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return self.tokenizer(text, truncation=True, max_length=MOST_TOKENS)["input_ids"]

    def states(self, texts):
        """Return the states of padded texts, and where there is a token."""
        options = {"padding": True, "truncation": True, "max_length": MOST_TOKENS}
        given = self.tokenizer(texts, return_tensors="pt", **options)
        with self.mode():
            states = self.model(**given).last_hidden_state
        return states.numpy(), given["attention_mask"].numpy()


class ExportedEncoder(BatchedEncoder):
    """Tokens for a model that torch.onnx exported."""

    def __init__(self, place, exported, threads):
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(place) / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding()
        self.open(Path(exported) / ENCODER, threads)

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return self.tokenizer.encode(text).ids

    def states(self, texts):
        """Return the states of padded texts, and where there is a token."""
        encoded = self.tokenizer.encode_batch(texts)
        ids, mask = (
            np.array([getattr(x, key) for x in encoded]) for key in ("ids", "attention_mask")
        )
        return self.run({"input_ids": ids, "attention_mask": mask}), mask


class OnnxruntimeEncoder(ExportedEncoder):
    """The CPU's provider, all optimisations, which are the default."""

    def open(self, path, threads):
        """Load the model."""
        self.session = onnx_session(path, threads)

    def run(self, inputs):
        """Call the model."""
        return self.session.run(None, inputs)[0]


class OpenvinoEncoder(ExportedEncoder):
    """Compiled for latency, with float32 as the precision's hint."""

    def open(self, path, threads):
        """Load the model."""
        self.request = openvino_model(path, threads).create_infer_request()

    def run(self, inputs):
        """Call the model."""
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)[0]


class SteppingDecoder:
    """Asks for the most likely token, one after the other; a library has `reset` and `step`."""

    def first(self, text):
        """Give the first token of a text's continuation."""
        self.prefill(self.tokenize(text))

    def prefill(self, ids):
        """Read a prompt, and give the first token after it."""
        int(self.last_logits(ids).argmax())

    def last_logits(self, ids):
        """Return the logits after the last token."""
        self.reset()
        return self.step(ids)

    def greedy(self, ids, count):
        """Return the tokens that follow, and the seconds of each but the first."""
        tokens = [int(self.last_logits(ids).argmax())]
        begin = time.perf_counter()
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1:]).argmax()))
        return tokens, (time.perf_counter() - begin) / (count - 1)

    def decode(self, ids, count):
        """Return the seconds of each token but the first."""
        return self.greedy(ids, count)[1]


class TransformersDecoder(SteppingDecoder):
    """On torch, with its scaled_dot_product_attention; called directly, not by generate()."""

    def __init__(self, place, _exported, threads, dtype="float32"):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.new_cache = torch, transformers.DynamicCache
        self.model, self.tokenizer = transformers_decoder(place, dtype)

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return self.tokenizer(text)["input_ids"]

    def reset(self):
        """Forget all tokens."""
        self.cache = self.new_cache(config=self.model.config)

    def step(self, ids):
        """Read tokens; return the logits after the last."""
        with self.torch.inference_mode():
            given = self.torch.tensor([ids])
            out = self.model(given, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy()

    def logits(self, ids):
        """Return the logits after each token."""
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()


class TransformersHalfDecoder(TransformersDecoder):
    """Weights and arithmetic in bfloat16."""

    def __init__(self, place, exported, threads):
        super().__init__(place, exported, threads, "bfloat16")


class ExportedDecoder(SteppingDecoder):
    """A model that torch.onnx exported, whose inputs and outputs are the keys and values too."""

    def __init__(self, _place, exported, threads):
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(exported) / TOKENIZER))
        self.open(Path(exported) / DECODER, threads)

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return self.tokenizer.encode(text).ids


class OnnxruntimeDecoder(ExportedDecoder):
    """Keys and values stay values of the library from one call to the next."""

    def open(self, path, threads):
        """Load the model."""
        import onnxruntime

        self.session, self.value = onnx_session(path, threads), onnxruntime.OrtValue
        self.inputs = [x.name for x in self.session.get_inputs()]
        self.outputs = [x.name for x in self.session.get_outputs()]
        self.shapes = [x.shape for x in self.session.get_inputs()[1:]]

    def reset(self):
        """Forget all tokens."""
        empty = (np.empty((1, shape[1], 0, shape[3]), np.float32) for shape in self.shapes)
        self.past = [self.value.ortvalue_from_numpy(x) for x in empty]

    def step(self, ids):
        """Read tokens; return the logits after the last."""
        given = [self.value.ortvalue_from_numpy(np.array([ids])), *self.past]
        named = dict(zip(self.inputs, given, strict=True))
        logits, *self.past = self.session.run_with_ort_values(self.outputs, named)
        return logits.numpy()[0, -1]


class OpenvinoDecoder(ExportedDecoder):
    """Two requests take turns: the keys and values that one wrote are what the other reads."""

    def open(self, path, threads):
        """Load the model."""
        model = openvino_model(path, threads)
        self.requests = [model.create_infer_request() for _ in range(2)]
        self.shapes = [x.partial_shape for x in model.inputs[1:]]

    def reset(self):
        """Forget all tokens."""
        heads_and_dims = ((x[1].get_length(), x[3].get_length()) for x in self.shapes)
        self.past = [np.empty((1, heads, 0, dim), np.float32) for heads, dim in heads_and_dims]

    def step(self, ids):
        """Read tokens; return the logits after the last."""
        self.requests.reverse()
        request = self.requests[0]
        request.infer([np.array([ids]), *self.past], share_inputs=True, share_outputs=True)
        logits, *self.past = (x.data for x in request.output_tensors)
        return logits[0, -1]


class LlamaCppDecoder(SteppingDecoder):
    """Weights as the file has them; activations are rounded to 8 bits, as llama.cpp does."""

    def __init__(self, place, _exported, threads):
        import llama_cpp

        self.library = llama_cpp
        self.model = llama_cpp.Llama(
            str(place),
            n_ctx=1024,
            n_batch=MOST_TOKENS,
            n_ubatch=MOST_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def tokenize(self, text):
        """Return the ids of a text's tokens."""
        return self.model.tokenize(text.encode(), add_bos=False)

    def reset(self):
        """Forget all tokens."""
        self.model.reset()

    def step(self, ids):
        """Read tokens; return the logits after the last."""
        self.model.eval(ids)
        pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),)).copy()


def onnx_session(path, threads):
    """Return a session of onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def openvino_model(path, threads):
    """Return a compiled model of openvino."""
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino.Core().compile_model(path.with_suffix(".xml"), "CPU", hints)


def transformers_decoder(place, dtype):
    """Return the model and the tokenizer that transformers makes of a GGUF file."""
    import torch
    import transformers

    folder, name = Path(place).parent, Path(place).name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def export(encoder_place, decoder_place, folder):
    """Export both models from transformers to ONNX, and from there to OpenVINO's files."""
    import openvino
    import torch
    import transformers

    def save(model, arguments, name, inputs, outputs, dynamic_shapes):
        path = Path(folder) / name
        torch.onnx.export(
            model.eval(),
            arguments,
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            external_data=True,
            verbose=False,
        )
        converted = openvino.convert_model(path)
        openvino.save_model(converted, path.with_suffix(".xml"), compress_to_fp16=False)

    class States(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.model(**given).last_hidden_state

    class NextLogits(States):
        def forward(self, input_ids, past):
            cache = transformers.DynamicCache(config=self.model.config)
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = self.model(input_ids, **options).logits
            return logits, [(x.keys, x.values) for x in cache.layers]

    any_length = torch.export.Dim.DYNAMIC
    ids = torch.arange(1000, 1032).reshape(2, 16)
    encoder = transformers.AutoModel.from_pretrained(encoder_place, attn_implementation="sdpa")
    both = {0: any_length, 1: any_length}
    names = ["input_ids", "attention_mask"]
    save(States(encoder), (ids, torch.ones_like(ids)), ENCODER, names, ["states"], (both, both))
    decoder, tokenizer = transformers_decoder(decoder_place, "float32")
    tokenizer.backend_tokenizer.save(str(Path(folder) / TOKENIZER))
    config = decoder.config
    dim = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, 7, dim)
    layers = range(config.num_hidden_layers)
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in layers]  # one tensor is one input
    cached = [f"{x}{i}" for i in layers for x in ("key", "value")]
    save(
        NextLogits(decoder),
        (ids[:1, :5], past),
        DECODER,
        ["input_ids", *cached],
        ["logits", *(f"new_{x}" for x in cached)],
        ({1: any_length}, [({2: any_length}, {2: any_length}) for _ in layers]),
    )


LIBRARIES = {
    "encoder": {
        "fastattn": FastattnEncoder,
        "transformers": TransformersEncoder,
        "onnxruntime": OnnxruntimeEncoder,
        "openvino": OpenvinoEncoder,
    },
    "decoder": {
        "fastattn": FastattnDecoder,
        "transformers": TransformersDecoder,
        "transformers bfloat16": TransformersHalfDecoder,
        "onnxruntime": OnnxruntimeDecoder,
        "openvino": OpenvinoDecoder,
        "llama.cpp": LlamaCppDecoder,
    },
}


class Worker:
    """The requests that a process answers, and those of its library."""

    def __init__(self, kind, library, place, exported, threads, started):
        self._make = functools.partial(LIBRARIES[kind][library], place, exported, int(threads))
        self._started = float(started)
        self._library = None

    def open(self, text):
        """Load the model and answer a text; return when each was done after the start."""
        self._library = self._make()
        loaded = time.perf_counter() - self._started
        self._library.first(text)
        first = time.perf_counter() - self._started
        return {"loaded_seconds": loaded, "first_seconds": first, "first_peak_bytes": self.peak()}

    def peak(self):
        """Return the most memory that this process has had, in bytes."""
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in status if x.startswith("VmHWM:")) * 1024

    def measure(self, seconds, task, *arguments):
        """Call for this many seconds, once at least; return the seconds of each call.

        A task that times itself returns a float.
        """
        call, samples, warm = getattr(self._library, task), [], False
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            begin = time.perf_counter()
            answer = call(*arguments)
            took = time.perf_counter() - begin
            if warm or took > WARM_SECONDS:
                samples.append(answer if isinstance(answer, float) else took)
            warm = True
        return samples

    def settle(self):
        """Return when threads have stopped spinning; those of some libraries do so after a call."""
        end = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < end:
            begin = time.process_time()
            time.sleep(QUIET_SECONDS)
            if time.process_time() - begin < 0.1 * QUIET_SECONDS:
                break

    def __getattr__(self, name):
        """Answer by the library."""
        return getattr(self._library, name)


def main():
    """Answer requests until the parent is gone: (True, answer) or (False, reason)."""
    if sys.argv[1] == "export":
        export(*sys.argv[2:])
        return
    handle, *arguments = sys.argv[1:]
    connection = Connection(int(handle))
    worker = Worker(*arguments)
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            os._exit(0)  # some libraries' threads would not end
        try:
            answer = True, getattr(worker, name)(*arguments)
            worker.settle()
        except Exception as error:
            answer = False, " ".join(f"{type(error).__name__}: {error}".split())[:300]
        connection.send(answer)


if __name__ == "__main__":
    main()
