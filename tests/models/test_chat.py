# SPDX-License-Identifier: Apache-2.0
"""Templates say what transformers makes of them, and hostile ones are an error, soon."""

import re
import resource
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
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ [1] | tojson(true, 0) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index0 % 3 == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "macros": "{% macro say(m) %}[{{ m.role }}]{{ caller() if caller }}{% endmacro %}"
    "{% for m in messages if m.role == 'user' %}{{ say(m) }}{% endfor %}{{ 'ab' + 'c' }}"
    "{{ 'x' | indent(4, first=true) }}{{ 'x\ny' | indent(width=2) }}"
    "{{ messages[1:] | length }}{{ messages | map(attribute='role') "
    "| join(', ') }}{{ 'a-b'.split('-') | list }}"
    "{{ dict(a=1)['a'] + 3000000000 }}"
    "{{ 7 % 4 * 3 }}{{ [1] + [2] }}{{ (1, 'a') + (none,) }}{{ messages[::-1] | length }}",
    "roles": "{% if (messages[0].role == 'assistant') != (1 % 2 == 0) %}{{ raise_exception('no') }}"
    "{% endif %}{% set system, rest = messages[0], messages[1:] %}{{ system['content'] | string }}"
    "{% for m in rest | selectattr('role', 'equalto', 'user') | list %}{{ m.get('name', 'x') }}"
    "{{ m.content.strip().split('\n')[-1].lstrip('{').rstrip('}') | upper }}{{ loop.length }}"
    "{{ loop.last }}{{ loop.cycle('a', 'b') }}{{ m.content.replace('*', '<>') }}"
    "{{ m.content | replace(' ', '__', 1) }}{{ m.content | replace('', '.') }}{% endfor %}"
    "{% for key, value in messages[0].items() %}{{ key }}={{ value | default('', true) }}"
    "{% endfor %}{{ ', '.join(messages | map(attribute='role') | unique | sort) }}",
    "think": "{% set x = '<think>\nHm.</think> Yes' %}"
    "{% if '</think>' in x and x.startswith('<') %}"
    "{{ x.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}|"
    "{{ x.split('</think>') | last | trim }}{{ x.removeprefix('<') | trim('Y') | safe }}"
    "{% endif %}{% set note %}{{ x | length }}{% endset %}{{ note ~ 1 ~ none ~ [1, 'a'] }}"
    "{% set sep = joiner(', ') %}{{ sep() }}a{{ sep() }}b{{ [1, {'a': 'é<'}] | tojson }}"
    "{{ {'b': 1, 'a': [1, 2]} | tojson(indent=4, sort_keys=true, separators=(',', ' : ')) }}"
    "{{ {'b': 1} | dictsort }}{{ [3, 1] | sort | first }}{{ 3 | int }}{{ '2' | float }}",
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


NAMES = "{% set n = namespace(x=x) %}{% for i in range(99) %}{% set n.x = n.x @ n.x %}{% endfor %}"
# Texts of 2^17 and 2^7 characters, of which nothing else may be as long as their product.
TEXTS = "{% set n = namespace(x='a') %}{% for i in range(17) %}{% if i == 7 %}{% set n.y = n.x %}"
TEXTS += "{% endif %}{% set n.x = n.x + n.x %}{% endfor %}{% set x, y = n.x, n.y %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
# Lists of lists, which are short, but whose text is not.
LISTS = "{% set n = namespace(x=x) %}{% for i in range(60) %}{% set n.x = @ %}{% endfor %}{{ n.x }}"
NESTED = "{% macro f(n, x) %}{% if n %}{{ f(n - 1, @) }}{% else %}{{ x }}{% endif %}{% endmacro %}"
STEPS = "it must take at most 10000500 steps"
NUMBER = f"its numbers must be at most {2**63}"
DEEP = "maximum recursion depth exceeded"
RANGE = "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."
CUT = "{% for i in range(9999) %}{% set z = x[1:] @ %}{% endfor %}"


def unsafe(kind, name):
    return f"access to attribute '{name}' of '{kind}' object is unsafe."


HOSTILE = {
    "syntax": ("{% for %}", "Expected an expression, got 'end of statement block'"),
    "unclosed": ("{{ 'a", 'unexpected char "\'" at 3'),
    "no filter": ("{{ 1 | none }}", "No filter named 'none'."),
    "files": ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    "classes": ("{{ ''.__class__.__mro__ }}", unsafe("str", "__class__")),
    "globals": ("{{ raise_exception.__globals__.x }}", unsafe("function", "__globals__")),
    "attr": ("{{ (messages | attr('__class__')).x }}", "No filter named 'attr'."),
    "mapped": (
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
        unsafe("dict", "__class__"),
    ),
    "self": ("{{ self.__init__.__globals__ }}", unsafe("TemplateReference", "__init__")),
    "change": ("{{ messages.append(1) }}", unsafe("list", "append")),
    "namespace as it is made": (
        "{{ namespace(**{'__class__': 1}).__class__.x }}",
        unsafe("Names", "__class__"),
    ),
    "namespace": (
        "{% set n = namespace() %}{% set n.__len__ = 1 %}{{ n.__len__() }}",
        unsafe("Names", "__len__"),
    ),
    "namespace as a method": (
        "{% set n = namespace(**{'__self__': 'a', '__name__': 'ljust'}) %}{{ n(99) }}",
        "'Names' object is not callable",
    ),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "it may not compute int ** int"),
    "long range": ("{% for i in range(999999) %}{% endfor %}", RANGE),
    "loops": ("{% set r = range(100000) %}" + "{% for i in r %}" * 4 + "{% endfor %}" * 4, STEPS),
    "loop of a string": (TEXTS + "{% for a in x %}{% for b in y %}{% endfor %}{% endfor %}", STEPS),
    "length of loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% if loop.length %}{% break %}"
        "{% endif %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "recursive loop": (
        "{% for a in [1] recursive %}{{ loop([2]) }}{% endfor %}",
        "it may not have recursive loops",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "calls": (TWICE, STEPS),
    "output": (TEXTS + "{% for i in range(99999) %}{{ x }}{% endfor %}", STEPS),
    "output of a block": (
        TEXTS + "{% set z %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
        STEPS,
    ),
    "output of a macro": (
        TEXTS
        + "{% macro f() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
        STEPS,
    ),
    "output of itself": ("{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}", STEPS),
    "product": ("{{ 'a' * 999999999999 }}", "it may not compute str * int"),
    "product of a list": ("{{ [1] * 99999999 }}", "it may not compute list * int"),
    "product from the left": ("{{ 99999999 * 'a' }}", "it may not compute int * str"),
    "doubling": (NAMES.replace("x=x", "x='aa'").replace("@", "+"), STEPS),
    "doubling by ~": (NAMES.replace("x=x", "x='aa'").replace("@", "~"), STEPS),
    "many by ~": (TEXTS + "{% set z = x" + " ~ x" * 9999 + " %}", STEPS),
    "tower": ("{{ 9 ** 9 ** 9 }}", "it may not compute int ** int"),
    "squares": (NAMES.replace("x=x", "x=9").replace("@", "*"), NUMBER),
    "long numbers": (TEXTS + "{{ (x ~ '') | int(base=16) }}", NUMBER),
    "lists": (LISTS.replace("x=x", "x=[1]").replace("@", "[n.x, n.x]"), STEPS),
    "tuples": (LISTS.replace("x=x", "x=(1,)").replace("@", "(n.x, n.x)"), STEPS),
    "dicts": (LISTS.replace("x=x", "x={}").replace("@", "dict(a=n.x, b=n.x)"), STEPS),
    "views": (LISTS.replace("x=x", "x=1").replace("@", "{1: n.x, 2: n.x}.values()"), STEPS),
    "namespaces": (LISTS.replace("x=x", "x=1").replace("@", "namespace(a=n.x, b=n.x)"), None),
    "lists of lists": (LISTS.replace("x=x", "x=[1]").replace("@", "[n.x] + [n.x]"), STEPS),
    "comparison": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
        STEPS,
    ),
    "arguments": (NESTED.replace("@", "[x, x]") + "{{ f(60, 1) }}", STEPS),
    "more arguments": (
        "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f() }}",
        "it may not have varargs",
    ),
    "copies": (TEXTS + CUT.replace("@", ""), STEPS),
    "filtered copies": (TEXTS + CUT.replace("x[1:] @", "x | upper"), STEPS),
    "mapped copies": (
        TEXTS + "{% set z = range(9999) | map('replace', '', x) | list %}",
        STEPS,
    ),
    "replace": (TEXTS + "{{ x.replace('a', y) }}", STEPS),
    "replace nothing": (TEXTS + "{{ x.replace('', y) }}", STEPS),
    "replace as a filter": (TEXTS + "{{ x | replace(old='a', new=y) }}", STEPS),
    "mapped replace": (TEXTS + "{{ [x] | map('replace', 'a', y) | list }}", STEPS),
    "join": (TEXTS + "{{ y.join(x) }}", STEPS),
    "join as a filter": (TEXTS + "{{ x | join(y) }}", STEPS),
    "mapped join": (TEXTS + "{{ [x] | map('join', y) | list }}", STEPS),
    "strip": (TEXTS + "{{ x.strip('b' ~ x) }}", STEPS),
    "trim": (TEXTS + "{{ x | trim('b' ~ x) }}", STEPS),
    "separators": (TEXTS + "{{ x | list | tojson(separators=(y, y)) }}", STEPS),
    "translate": ("{{ 'a'.translate({97: 'b'}) }}", unsafe("str", "translate")),
    "wordwrap": ("{{ 'a' | wordwrap(1) }}", "No filter named 'wordwrap'."),
    "width": ("{{ '%999999999d' % 1 }}", "it may not compute str % int"),
    "width of format": ("{{ '{:>999999999}'.format(1) }}", unsafe("str", "format")),
    "center": ("{{ 'a' | center(999999999) }}", "No filter named 'center'."),
    "ljust": ("{{ 'a'.ljust(999999999) }}", unsafe("str", "ljust")),
    "indent": (TEXTS + "{{ x | replace('a', '\\n') | indent(999999999, blank=true) }}", STEPS),
    "json": ("{% for i in range(9999) %}{{ [[1]] | tojson(indent=999999999) }}{% endfor %}", None),
    "round": ("{{ 1.5 | round(999999999, 'ceil') }}", "No filter named 'round'."),
    "date": (TEXTS + "{{ strftime_now(x | replace('a', '%999999999c')) }}", None),
    "long": ("a" * 1_000_001, "it must have at most 1000000 characters"),
    "nested": ("{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", DEEP),
    "long sum": ("{{ 1" + "+1" * 99999 + " }}", DEEP),
    "lipsum": ("{{ lipsum(n=999999999) }}", "'lipsum' is undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name):
    template, said = HOSTILE[name]
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if said is None:
        assert len(render(template, HELLO, {})) < 10_000_000
    else:
        with pytest.raises(ValueError, match=f"^the chat template failed: {re.escape(said)}"):
            render(template, HELLO, {})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert time.monotonic() - begin < 20


def test_time(monkeypatch):
    monkeypatch.setattr("fastattn.models._sandbox.MOST_SECONDS", 0.5)
    slow = (
        "{% set x = x | list %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}"
    )
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^the chat template failed: it must take at most 0.5 sec"
    ):
        render(TEXTS + slow, HELLO, {})
    assert time.monotonic() - begin < 5


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "fastattn.models._sandbox", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastattn\[models\]'$"):
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
