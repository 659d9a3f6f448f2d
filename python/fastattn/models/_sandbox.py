# SPDX-License-Identifier: Apache-2.0
"""What may a template do? What chats need, within a number of steps and some seconds.

A template comes with a file, which may be hostile. It runs in Jinja's sandbox, with the filters,
methods and functions that are named here. All that it computes is counted in steps, a text by its
characters, a list or dict by all that is in it; what could make a long text of short ones is
counted before. So what it holds is bounded, and no step is long: the clock is looked at each time.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 10
MOST_NUMBER = 2**63
MOST_SOURCE = 1_000_000  # characters of a template
MOST_WIDTH = 100  # spaces before a line, and characters of a date's form
FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower "
    "map max min reject rejectattr replace reverse safe select selectattr sort string title trim "
    "unique upper"
)
METHODS = (
    "capitalize casefold count cycle endswith find get index isalnum isalpha isdigit islower "
    "isnumeric isspace isupper items join keys lower lstrip partition removeprefix removesuffix "
    "replace rstrip split splitlines startswith strip title upper values"
)
PRODUCTS = "lstrip replace rstrip strip trim"  # their steps: of the lengths of all given texts
ROUND = 10  # steps of a loop's round, of a call, and of each value that there is


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders one template, once."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, most_steps: int) -> None:
        extensions = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.left, self.most, self.end = most_steps, most_steps, time.monotonic() + MOST_SECONDS
        known = {name: self.filters[name] for name in FILTERS.split(" ")}
        known |= {"indent": indent, "join": self.join, "tojson": self.tojson}
        # The wrapper has a filter's marks, by which Jinja gives it a context.
        self.filters = {
            name: functools.update_wrapper(functools.partial(self.counted, name, x), x)
            for name, x in known.items()
        }
        self.filters |= {"made": self.made, "rounds": self.rounds}
        self.globals = {name: self.globals[name] for name in ("dict", "joiner", "range")}
        self.globals |= {"namespace": Names, "raise_exception": refuse, "strftime_now": now}
        self.finalize = self.printed

    def spend(self, steps: int) -> None:
        """Count steps."""
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"it must take at most {self.most} steps")
        if time.monotonic() > self.end:
            raise SecurityError(f"it must take at most {MOST_SECONDS} seconds")

    def made(self, x: Any) -> Any:
        """Return what was computed, which is counted with all that it holds."""
        self.spend(ROUND + len(x) if isinstance(x, str) else ROUND)
        if isinstance(x, int) and abs(x) > MOST_NUMBER:
            raise SecurityError(f"its numbers must be at most {MOST_NUMBER}")
        if isinstance(x, Collection) and not isinstance(x, str | range):
            for part in (*x, *x.values()) if isinstance(x, Mapping) else x:
                self.made(part)
        return x

    def counted(self, name: str, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return what a filter or method of that name makes, which is counted."""
        self.spend(ROUND)
        if name in PRODUCTS.split(" "):
            texts = [x for x in (*given, *options.values()) if isinstance(x, str)]
            self.spend(math.prod(len(x) + 1 for x in texts))
        return self.made(call(*given, **options))

    def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a loop."""
        for x in items:
            self.spend(ROUND)
            yield x

    @pass_context  # It is called each time, not once as the template is read.
    def printed(self, context: Any, x: Any) -> str:
        """Return the text of what is written, also into a block or a macro's result."""
        text = str(x)
        self.spend(len(text))
        return text

    def join(self, parts: Iterable[Any], between: str = "", attribute: Any = None) -> str:
        """Join texts, as the operator ~ does too."""
        of, texts = str if attribute is None else make_attrgetter(self, attribute), []
        for part in parts:
            texts.append(str(of(part)))
            self.spend(len(texts[-1]) + len(between))
        return between.join(texts)

    def tojson(
        self, x: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any
    ) -> str:
        """Return JSON, in which nothing is escaped for HTML."""
        more |= dict(ensure_ascii=ensure_ascii, indent=indent and min(indent, MOST_WIDTH))
        return self.join(json.JSONEncoder(**more).iterencode(x))

    def is_safe_attribute(self, of: Any, name: str, value: Any) -> bool:
        """Say whether a template may have an attribute: of methods, only known ones."""
        known = name in METHODS.split(" ") or not callable(value)
        return known and super().is_safe_attribute(of, name, value)

    def wrap_str_format(self, value: Any) -> None:
        """Let `str.format` be a method that is not known."""

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function, a macro or a method."""
        name, of = "", getattr(function, "__self__", None)
        # Others, as a namespace, say of themselves what the template wants.
        if isinstance(function, BuiltinMethodType | MethodType) and isinstance(of, str):
            name = function.__name__
            joins = name == "join"
            args = (*args, of) if joins else (of, *args)
            function = self.join if joins else getattr(type(of), name)
        call = functools.partial(super().call, context, function)
        return self.counted(name, call, *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, or a product or remainder of numbers."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator != "+" and not numbers):
            kinds = type(left).__name__, type(right).__name__
            raise SecurityError(f"it may not compute {kinds[0]} {operator} {kinds[1]}")
        return self.made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Return a template's tree, in which all is counted."""
        if len(source) > MOST_SOURCE:
            raise SecurityError(f"it must have at most {MOST_SOURCE} characters")
        tree: nodes.Template = Counting().visit(super()._parse(source, name, filename))
        return tree


class Counting(NodeTransformer):
    """Puts filters into a template's tree around what `Sandbox` would not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the rounds of a loop, which may not call itself."""
        if node.recursive:
            raise SecurityError("it may not have recursive loops")
        self.generic_visit(node)
        node.iter = filtered(node.iter, "rounds")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Let ~ join texts as the filter does."""
        self.generic_visit(node)
        return filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """Count the template's own text, each time it is written."""
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        """Count a list or a dict, but not the names that a tuple is assigned to."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else filtered(node, "made")

    visit_Dict = visit_Tuple = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """Count a slice, which is a copy."""
        self.generic_visit(node)
        return filtered(node, "made") if isinstance(node.arg, nodes.Slice) else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        """Refuse a macro's further arguments, which are a list that is not counted."""
        if node.name in ("varargs", "kwargs"):
            raise SecurityError(f"it may not have {node.name}")
        return node


class Generation(Extension):
    """The tag that marks the assistant's part, for training: it is what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> Any:
        """Return what is in the tag."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Names(Namespace):
    """A namespace, whose text is short whatever it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


def filtered(node: nodes.Node, name: str) -> nodes.Filter:
    """Return the node of what a filter makes of another."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def indent(x: str, width: int = 4, *args: Any, **options: Any) -> str:
    """Put spaces before lines."""
    return do_indent(x, min(width, MOST_WIDTH), *args, **options)


def refuse(message: str) -> NoReturn:
    """Say what is wrong with the conversation."""
    raise TemplateError(message)


def now(form: str) -> str:
    """Return the date and time."""
    return datetime.now().strftime(form[:MOST_WIDTH])
