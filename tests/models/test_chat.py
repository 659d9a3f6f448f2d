# SPDX-License-Identifier: Apache-2.0
"""Templates say what transformers makes of them, and hostile ones are an error, soon."""

import re
import sys
import time

import pytest

from fastattn.models._chat import checked_messages, render

pytest.importorskip("jinja2")

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": " Привет, 你好 😀\n"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "{{ 7 * 7 }}"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
    {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}
{% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama": "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}[{{ ns.n }}/{{ m.role.upper() }}] {{ m.content | trim ~ eos_token }}"
    "{% endfor %}",
    "tools": "{% if tools is not none %}tools{% endif %}{% if documents is defined %}d{% endif %}"
    "{{ tools is defined }}{{ unknown is defined }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index0 % 3 == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "macros": "{% macro say(m) %}[{{ m.role }}]{{ caller() if caller }}{% endmacro %}"
    "{% for m in messages if m.role == 'user' %}{{ say(m) }}{% endfor %}{{ 'ab' * 3 + 'c' }}"
    "{{ 'x' | indent(4, first=true) }}{{ 'x\ny' | indent(width=2) }}"
    "{{ messages[1:] | length }}{{ messages | map(attribute='role') "
    "| join(', ') }}{{ 'a-b'.split('-') | list }}"
    "{{ dict(a=1)['a'] + 3000000000 }}"
    "{{ 2.345 | round(1, method='floor') }}{{ 2.345 | round(precision=2) }}{{ 7 % 4 * 3 }}",
    "date": "{{ strftime_now('%Y-%m-%d')[:3] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["hello", "talk"])
def test_texts_are_those_of_transformers(name, messages):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", exc_type=ImportError)
    (expected,), _ = utils.render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL
    )
    assert render(TEMPLATES[name], messages, SPECIAL) == expected


def test_a_template_refuses():
    template = "{{ raise_exception('roles must alternate: ' ~ messages[0].role) }}"
    with pytest.raises(ValueError, match=r"^the chat template failed: roles must alternate: user$"):
        render(template, HELLO, {})


LONG = "'aaaaaaaaaaaaaaaa'"
NAMES = "{% set n = namespace(x=x) %}{% for i in range(99) %}{% set n.x = n.x @ n.x %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
STEPS = "it must take at most 1000000 steps"
SIZE = "it must compute nothing larger than 10000000"
NUMBER = f"it must compute nothing larger than {2**63}"
DEEP = "maximum recursion depth exceeded"
TEXT = "its text must be at most 10000000 characters"
RANGE = "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."
HIDDEN = "names in a namespace may not begin with _"


def unsafe(kind, name):
    return f"access to attribute '{name}' of '{kind}' object is unsafe."


HOSTILE = {
    "syntax": ("{% for %}", "Expected an expression, got 'end of statement block'"),
    "unclosed": ("{{ 'a", 'unexpected char "\'" at 3'),
    "no filter": ("{{ 1 | none }}", "No filter named 'none'."),
    "files": ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    "classes": ("{{ ''.__class__.__mro__ }}", unsafe("str", "__class__")),
    "globals": ("{{ raise_exception.__globals__.x }}", unsafe("function", "__globals__")),
    "attr": ("{{ (messages | attr('__class__')).x }}", unsafe("list", "__class__")),
    "self": ("{{ self.__init__.__globals__ }}", unsafe("TemplateReference", "__init__")),
    "change": ("{{ messages.append(1) }}", unsafe("list", "append")),
    "namespace as it is made": ("{{ namespace(**{'__class__': 1}) }}", HIDDEN),
    "namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", HIDDEN),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "it may not compute int **"),
    "long range": ("{% for i in range(999999) %}{% endfor %}", RANGE),
    "loops": ("{% set r = range(100000) %}" + "{% for i in r %}" * 4 + "{% endfor %}" * 4, STEPS),
    "loop of a string": (
        "{% for a in 'a' * 1000000 %}{% for b in 'bc' %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "recursive loop": (
        "{% for a in ['b', 'c'] recursive %}{{ loop(['d', 'e']) }}{% endfor %}",
        DEEP,
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "calls": (TWICE, STEPS),
    "output": ("{% for i in range(99999) %}{{ " + LONG + " * 99 }}{% endfor %}", TEXT),
    "product": ("{{ 'a' * 999999999999 }}", SIZE),
    "product of a list": ("{{ [1] * 99999999 }}", SIZE),
    "product from the left": ("{{ 99999999 * 'a' }}", SIZE),
    "doubling": (NAMES.replace("x=x", "x='aa'").replace("@", "+"), SIZE),
    "doubling by ~": (NAMES.replace("x=x", "x='aa'").replace("@", "~"), SIZE),
    "tower": ("{{ 9 ** 9 ** 9 }}", "it may not compute int **"),
    "squares": (NAMES.replace("x=x", "x=9").replace("@", "*"), NUMBER),
    "set block": (
        "{% set x %}{% for i in range(9) %}a{% endfor %}{% endset %}{{ x * 9999999 }}",
        SIZE,
    ),
    "width": ("{{ '%999999999d' % 1 }}", "it may not compute str %"),
    "width of format": ("{{ '{:>999999999}'.format(1) }}", "it may not call format"),
    "center": ("{{ 'a' | center(999999999) }}", "No filter named 'center'."),
    "ljust": ("{{ 'a'.ljust(999999999) }}", "it may not call ljust"),
    "indent": ("{{ ('a\\n' * 99999) | indent(999999999) }}", TEXT),
    "json": ("{% for i in range(9999) %}{{ [[1]] | tojson(indent=999999999) }}{% endfor %}", None),
    "round": ("{{ 1.5 | round(999999999, 'ceil') }}" * 2, None),
    "nested": ("{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", DEEP),
    "long sum": ("{{ 1" + "+1" * 99999 + " }}", DEEP),
    "lipsum": ("{{ lipsum(n=999999999) }}", "'lipsum' is undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name):
    template, said = HOSTILE[name]
    begin = time.monotonic()
    if said is None:
        assert len(render(template, HELLO, {})) < 10_000_000
    else:
        with pytest.raises(ValueError, match=f"^the chat template failed: {re.escape(said)}"):
            render(template, HELLO, {})
    assert time.monotonic() - begin < 20


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install fastattn\[models\]$"):
        render(CHATML, HELLO, {})


CONTENT = "messages[0]['content']"


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("Hello", TypeError, "messages must be a list of dict, got str"),
        (HELLO[0], TypeError, "messages must be a list of dict, got dict"),
        ([], ValueError, "messages must be at least one, got none"),
        (["Hello"], TypeError, "messages[0] must be a dict, got str"),
        (
            [*HELLO, {"role": ""}],
            ValueError,
            "messages[1] must have the key 'content', and has not",
        ),
        ([{"content": "a"}], ValueError, "messages[0] must have the key 'role', and has not"),
        ([HELLO[0] | {"content": None}], TypeError, f"{CONTENT} must be a str, got NoneType"),
        ([{"role": 1, "content": "a"}], TypeError, "messages[0]['role'] must be a str, got int"),
        (
            [HELLO[0] | {"content": "\ud800"}],
            ValueError,
            f"{CONTENT} must be Unicode, got '\\ud800'",
        ),
    ],
)
def test_wrong_messages(messages, error, message):
    with pytest.raises(error) as refused:
        checked_messages(messages)
    assert str(refused.value) == message
