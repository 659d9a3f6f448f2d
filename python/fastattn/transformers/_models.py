# SPDX-License-Identifier: Apache-2.0
"""Which models may have our attention: `register`, and what it lets transformers accept and refuse.

Who asks for "flash" in a name, such as sentence-transformers, packs texts instead of padding them,
and asks transformers for the functions behind the name: so there is a second one.

A layer that computes attention in its own way would go on doing so, and add our bool mask to its
scores as a number: 1 where it should be 0, 0 where it should be -inf. Nothing would fail. So a
model is refused when it is made, and by `set_attn_implementation`, if its source shows such layers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    modeling_flash_attention_utils,
)

from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.transformers._attention import attention
from fastattn.transformers._mask import mask

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME, FLASH = NAMES = ("fastattn", "fastattn_flash")


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to transformers, in this process.

    Models that are loaded with it, or told by ``model.set_attn_implementation("fastattn")``,
    compute attention here, on the CPU. More than once does nothing.

    ``"fastattn_flash"`` is the same, under a name that tells others to pack texts, not to pad them:
    ``SentenceTransformer(folder, model_kwargs={"attn_implementation": "fastattn_flash"})``.

    What is not supported is an error, never another computation: a model that does not use
    transformers' AttentionInterface, or not in all of its layers, when it is made or told; when it
    runs, another device, sparse attention by indices, sinks per token, chunks within sequences that
    only cu_seq_lens_q tells apart, a mask made for other lengths, continuous batching.

    See Also
    --------
    fastattn.torch.patch : for models that call torch's function themselves.

    References
    ----------
    https://huggingface.co/docs/transformers/attention_interface

    Examples
    --------
    >>> import fastattn.transformers, transformers
    >>> fastattn.transformers.register()
    >>> config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=10)
    >>> model = transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    """
    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    _refuse_models()
    _answer_for_flash()


@functools.cache
def _refuse_models() -> None:
    """Let transformers refuse models that compute attention in their own way, as for sdpa."""
    accepted = PreTrainedModel.get_correct_attn_implementation
    set_implementation = PreTrainedModel.set_attn_implementation

    @functools.wraps(accepted)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention in NAMES:
            _refuse(type(self), requested_attention)
        return accepted(self, requested_attention, *args, **kwargs)

    @functools.wraps(set_implementation)
    def set_checked(self: Any, attn_implementation: str | dict[str, Any], **kwargs: Any) -> None:
        parts = [m for m in self.modules() if isinstance(m, PreTrainedModel)]
        before = {id(m.config): (m.config, m.config._attn_implementation_internal) for m in parts}
        try:
            set_implementation(self, attn_implementation, **kwargs)
            if attn_implementation in NAMES:  # transformers would warn, and go on without
                _refuse(type(self), attn_implementation)
            for part in parts:
                if part.config._attn_implementation in NAMES:
                    _refuse(type(part), part.config._attn_implementation)
        except ValueError:
            for config, implementation in before.values():
                config._attn_implementation_internal = implementation
            raise

    PreTrainedModel.get_correct_attn_implementation = checked
    PreTrainedModel.set_attn_implementation = set_checked


@functools.cache
def _answer_for_flash() -> None:
    """Let transformers find what it looks for behind a name with "flash" in it."""
    adjusted = PreTrainedModel._check_and_adjust_attn_implementation
    imported = modeling_flash_attention_utils._lazy_imports

    @functools.wraps(adjusted)
    def unchanged(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation == FLASH:  # transformers would take another for some models
            return self.get_correct_attn_implementation(FLASH)
        return adjusted(self, attn_implementation, *args, **kwargs)

    @functools.wraps(imported)
    def ours(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != FLASH:
            return imported(implementation, *args, **kwargs)
        utils = modeling_flash_attention_utils
        pad_input, unpad_input = utils._pad_input, utils._unpad_input
        return flash_attn_func, flash_attn_varlen_func, None, pad_input, unpad_input

    PreTrainedModel._check_and_adjust_attn_implementation = unchanged
    modeling_flash_attention_utils._lazy_imports = ours


def _refuse(model: Any, name: str) -> None:
    """Refuse a class of models in which some layer does not ask for attention."""
    layer = _own_attention(model, name)
    if _asks_for_attention(model) and layer is None:
        return
    where = "" if layer is None else f" in {layer}"
    raise ValueError(
        f"{model.__name__} does not support attn_implementation='{name}': it computes attention in "
        f"its own way{where}, without transformers' AttentionInterface"
    )


def _asks_for_attention(model: Any) -> bool:
    """Tell whether a class of models, or one that it extends, uses the AttentionInterface."""
    return any(
        issubclass(c, PreTrainedModel)
        and c is not PreTrainedModel
        and c._can_set_attn_implementation()
        for c in model.__mro__
    )


@functools.cache
def _own_attention(model: type, name: str) -> str | None:
    """Return the name of a class in a model that does not ask for attention, if there is one.

    It adds a mask to scores by itself, or chooses its layers from a table of implementations that
    does not have ours. Of all classes of modules that the source of the model names, and theirs.
    """
    met, waiting = set(), [model]
    while waiting:
        kind = waiting.pop()
        if kind in met or kind is PreTrainedModel or kind.__module__.startswith("torch."):
            continue
        met.add(kind)
        waiting += [base for base in kind.__bases__ if issubclass(base, nn.Module)]
        source = _classes_of(kind.__module__).get(kind.__name__)
        if source is not None:
            names = vars(sys.modules[kind.__module__])
            if _adds_mask(source) or _chooses_from_table(source, names):
                return kind.__name__
            if name == FLASH and _never_asks(source, names):  # and gets the mask of flash-attn
                return kind.__name__
            waiting += _modules_named(source, names)
    return None


@functools.cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """Return the source of each class of a Python module; none if it cannot be read."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _modules_named(source: ast.ClassDef, names: dict[str, Any]) -> Iterator[type[nn.Module]]:
    """Yield the classes of modules that a class names, in tables of them too."""
    for method in source.body:
        if isinstance(method, ast.FunctionDef) and method.name == "_init_weights":
            continue  # it names the layers of all models in the file
        for node in ast.walk(method):
            found = names.get(node.id) if isinstance(node, ast.Name) else None
            for x in found.values() if isinstance(found, dict) else (found,):
                if isinstance(x, type) and issubclass(x, nn.Module):
                    yield x


def _chooses_from_table(source: ast.ClassDef, names: dict[str, Any]) -> bool:
    """Tell whether a class looks its implementation up in a dict that does not have ours."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and isinstance(node.slice, ast.Attribute)
        and node.slice.attr == "_attn_implementation"
        and isinstance(names.get(node.value.id), dict)
        and NAME not in names[node.value.id]
        for node in ast.walk(source)
    )


def _never_asks(source: ast.ClassDef, names: dict[str, Any]) -> bool:
    """Tell whether a class looks for attention among the interface's attributes: it has none."""
    return any(
        isinstance(node, ast.Call)
        and _named(node.func) == "getattr"
        and isinstance(names.get(_named(node.args[0])), AttentionInterface)
        for node in ast.walk(source)
    )


def _adds_mask(source: ast.ClassDef) -> bool:
    """Tell whether a class adds a mask that it is given to what it takes the softmax of."""
    if any(isinstance(n, ast.Attribute) and n.attr == "get_interface" for n in ast.walk(source)):
        return False  # it asks for attention, or is asked for `eager`
    for method in ast.walk(source):
        if not isinstance(method, ast.FunctionDef):
            continue
        arguments = (*method.args.args, *method.args.kwonlyargs)
        masks = {x.arg for x in arguments if "mask" in x.arg}
        softmax, added = False, False
        for node in ast.walk(method):
            if isinstance(node, ast.Assign) and _named(node.value) in masks:
                masks |= {_named(x) for x in node.targets}
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                softmax |= name == "softmax"
            elif isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
                terms = (
                    (node.value,) if isinstance(node, ast.AugAssign) else (node.left, node.right)
                )
                added |= any(_named(x) in masks for x in terms)
        if softmax and added:
            return True
    return False


def _named(x: ast.expr) -> str:
    """Return the name of what an expression is, or is a part of; "" if it has none."""
    while isinstance(x, ast.Subscript):
        x = x.value
    return x.id if isinstance(x, ast.Name) else ""
