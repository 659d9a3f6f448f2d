# SPDX-License-Identifier: Apache-2.0
"""What is a model told of a conversation? Its checkpoint's template, written in Jinja, says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.models._tokens import unicode_text

MOST_STEPS = 10_000_000  # of a template
STEPS_EACH = 100  # and so many more for each character of the messages


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
    try:
        from fastattn.models._sandbox import Sandbox
    except ImportError:
        absent = "chat needs the package jinja2: pip install 'fastattn[models]'"
        raise ModuleNotFoundError(absent, name="jinja2") from None
    steps = MOST_STEPS + STEPS_EACH * sum(len(x["content"]) for x in messages)
    given = dict(messages=[dict(x) for x in messages], tools=None, documents=None)
    try:
        return (
            Sandbox(steps)
            .from_string(template)
            .render(**special, **given, add_generation_prompt=True)
        )
    except Exception as error:  # whatever Python does with what a template says
        said = str(error) or type(error).__name__
        raise ValueError(f"the chat template failed: {said}") from error


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
