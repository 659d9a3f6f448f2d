# SPDX-License-Identifier: Apache-2.0
"""What is a model told of a conversation? Its checkpoint's template, written in Jinja, says it.

A template comes with a file, so it runs in Jinja's sandbox; its loops, calls, sums, products and
its text are bounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from fastattn._arguments import unicode_text

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_STEPS = 1_000_000  # rounds of loops, and calls
MOST_CHARACTERS = 10_000_000
MOST_NUMBER = 2**63
MOST_DIGITS = 100  # of a number, and spaces before a line
HIDDEN = "names in a namespace may not begin with _"
# What makes a long text of a short one, and chats do not need.
FILTERS = {"batch", "center", "format", "slice"}
METHODS = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """Return the text of a conversation whose next message is the assistant's.

    Parameters
    ----------
    template : str
        In Jinja, as Hugging Face's tokenizers have it.
    messages : sequence of mappings
        With the keys role and content.
    special : mapping of str
        The special tokens that the template may name, as bos_token.

    Raises
    ------
    ModuleNotFoundError
        jinja2 is not installed.
    ValueError
        The template is wrong, refuses the messages, or does what it may not.
    """
    environment = _environment()
    text, size = [], 0
    given = dict(messages=[dict(x) for x in messages], tools=None, documents=None)
    try:
        parts = environment.from_string(template).generate(
            **special, **given, add_generation_prompt=True
        )
        for part in parts:
            text.append(part)
            size += len(part)
            if size > MOST_CHARACTERS:
                raise ValueError(f"its text must be at most {MOST_CHARACTERS} characters")
    except Exception as error:  # whatever Python does with what a template says
        said = str(error) or type(error).__name__
        raise ValueError(f"the chat template failed: {said}") from error
    return "".join(text)


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is no conversation."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dict, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must be at least one, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dict, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{i}] must have the key {key!r}, and has not")
            unicode_text(f"messages[{i}][{key!r}]", message[key])


def _environment() -> Environment:
    """Return what templates of Hugging Face expect, for one of them."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension
        from jinja2.filters import do_indent, do_round
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError:
        absent = "chat needs the package jinja2: pip install fastattn[models]"
        raise ModuleNotFoundError(absent, name="jinja2") from None

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, which counts steps, and computes no text that is too large."""

        intercepted_binops = frozenset(["+", "*", "**", "%"])
        steps = 0

        def step(self) -> None:
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise SecurityError(f"it must take at most {MOST_STEPS} steps")

        def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
            """Yield the items of a loop."""
            for x in items:
                self.step()
                yield x

        def bounded(self, *values: Any, product: bool = False) -> Any:
            """Return the last of values, whose sum or product may be computed."""
            sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in values]
            most = MOST_CHARACTERS if any(hasattr(x, "__len__") for x in values) else MOST_NUMBER
            if (math.prod(sizes) if product else sum(sizes)) > most:
                raise SecurityError(f"it must compute nothing larger than {most}")
            return values[-1]

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            """Return the template's tree, with a filter around what loops run over and ~ joins."""
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "rounds", [], [], None, None)
            for joined in tree.find_all(nodes.Concat):
                parts = (nodes.Filter(x, "string", [], [], None, None) for x in joined.nodes)
                joined.nodes = [nodes.Filter(x, "bounded", [], [], None, None) for x in parts]
            if any(name.attr.startswith("_") for name in tree.find_all(nodes.NSRef)):
                raise SecurityError(HIDDEN)
            return tree

        def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
            self.step()
            if (name := getattr(function, "__name__", None)) in METHODS:
                raise SecurityError(f"it may not call {name}")
            return super().call(context, function, *args, **options)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or (operator == "%" and isinstance(left, str)):
                raise SecurityError(f"it may not compute {type(left).__name__} {operator}")
            if operator != "%":
                self.bounded(left, right, product=operator == "*")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """The tag that marks the assistant's part, for training: it is what is in it."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def namespace(*values: Any, **more: Any) -> Namespace:
        found = dict(*values, **more)
        if any(str(name).startswith("_") for name in found):
            raise SecurityError(HIDDEN)
        return Namespace(found)

    def indent(x: str, width: int = 4, *args: Any, **options: Any) -> str:
        return do_indent(x, min(width, MOST_DIGITS), *args, **options)

    def rounded(x: float, precision: int = 0, *args: Any, **options: Any) -> float:
        return do_round(x, min(precision, MOST_DIGITS), *args, **options)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        indent = None if indent is None else min(indent, MOST_DIGITS)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **more)

    found = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    found.filters = {name: x for name, x in found.filters.items() if name not in FILTERS}
    found.filters |= {
        "tojson": tojson,
        "indent": indent,
        "round": rounded,
        "rounds": found.rounds,
        "bounded": found.bounded,
    }
    found.globals = {name: found.globals[name] for name in ("range", "dict", "cycler", "joiner")}
    found.globals |= {
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return found
