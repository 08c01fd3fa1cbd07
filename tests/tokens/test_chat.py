"""Chat templates: all vectors that a real Jinja2 renders, transformers as the oracle for tools, hostile templates."""

import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

from inhouse.core.errors import UsageError
from inhouse.model.tokens.chat import CHATML, ChatTemplate

pytestmark = pytest.mark.null

USER = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Weather of a <place> & "time"',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wetter in Zürich? 天气?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"sky": "blue"}'},
    {"role": "assistant", "content": "  Blue.  "},
    {"role": "user", "content": "Thanks"},
]


def vectors(realdata: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((realdata / "chat_templates" / "chat_template_vectors.json").read_text())
    return found


@pytest.mark.realdata
@pytest.mark.parametrize("number", range(30))
def test_vectors_of_llama_cpp(number: int, realdata: Path) -> None:
    """22 equal llama.cpp's own text; of 8 the file holds what a real Jinja2 does: its text, or its refusal."""
    data = vectors(realdata)
    assert len(data["cases"]) == 30
    case = data["cases"][number]
    template = ChatTemplate(case["template"], {"bos_token": case["bos_token"], "eos_token": case["eos_token"]})
    wanted = case.get("python_jinja2") or {"output": case["expected_jinja"] or case["expected_native"]}
    if "raises" in wanted:
        with pytest.raises(UsageError) as raised:
            template.render(data["messages"], add_generation_prompt=data["add_generation_prompt"])
        words = wanted["raises"].partition("(")[2][1:-2]
        assert words in raised.value.message
    else:
        text = template.render(data["messages"], add_generation_prompt=data["add_generation_prompt"])
        assert text == wanted["output"]


@pytest.mark.realdata
def test_single_template_files_equal_transformers(realdata: Path) -> None:
    """18 templates of models, each with a plain talk and one with tools, against transformers' own renderer."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle is transformers")
    files = sorted((realdata / "chat_templates").glob("*.jinja"))
    sources = {path.stem: path.read_text() for path in files}
    for folder in ("qwen2", "qwen2.5", "qwen3", "phi-3-mini", "minimind"):
        config = json.loads((realdata / "tokenizers" / folder / "tokenizer_config.json").read_text())
        sources[folder] = config["chat_template"]
    plain = [TALK[0], TALK[1], TALK[4], TALK[5]]
    rendered = 0
    for name, source in sources.items():
        for messages, tools in ((plain, None), (plain[1:], None), (TALK, TOOLS)):
            names = {"bos_token": "<s>", "eos_token": "</s>"}
            ours: Any = None
            theirs: Any = None
            try:
                theirs = utils.render_jinja_template(
                    [messages], tools=tools, chat_template=source, add_generation_prompt=True, **names
                )[0][0]
            except Exception as error:
                theirs = type(error)
            try:
                ours = ChatTemplate(source, names).render(messages, tools)
            except UsageError as error:
                ours = type(error.__cause__)
            assert ours == theirs, f"{name} with {len(messages)} messages"
            rendered += isinstance(ours, str)
    assert len(sources) >= 23
    assert rendered >= 40


def test_the_default_is_chatml_and_says_so() -> None:
    nothings: tuple[dict[str, str] | None, ...] = (None, {})
    for nothing in nothings:
        template = ChatTemplate(nothing)
        assert template.is_default
        assert template.sources == {"default": CHATML}
        text = template.render([{"role": "system", "content": "S"}, *USER])
        assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert not ChatTemplate("x").is_default
    assert ChatTemplate(None).render(USER, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def test_named_templates() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T {{ tools[0].type }}", "rag": "R {{ documents[0] }}"})
    assert template.render(USER) == "D"
    assert template.render(USER, TOOLS) == "T function"
    assert template.render(USER, template="rag", documents=["x"]) == "R x"
    with pytest.raises(UsageError, match="no chat template 'x'"):
        template.render(USER, template="x")


def test_words_that_templates_use() -> None:
    def render(source: str, **names: Any) -> str:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(USER, **names)

    assert render("{{ {'b': 'ü<', 'a': 1} | tojson }}") == '{"b": "ü<", "a": 1}'
    assert render("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
                  "{{ i }}{% endfor %}") == "013"  # fmt: skip
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"
    assert render("{% generation %}x{{ bos_token }}{% endgeneration %}") == "x<s>"
    assert render("{{ thinking }}", thinking=True) == "True"
    with pytest.raises(UsageError, match="Only two roles"):
        render("{{ raise_exception('Only two roles') }}")
    with pytest.raises(UsageError, match="line 2"):
        render("a\n{% if %}")


TWO = "{% set x=range(99999)|list %}{% set y=range(99999)|list %}"
MAPPED = "{% set a=[[]]|batch(9999, x)|first %}{% set b=[[]]|batch(9999, y)|first %}"  # no literal holds them
TREES = (
    "{% set n=namespace(a=[0], b=[0]) %}{% for i in range(27) %}{% set n.a=[n.a]+[n.a] %}{% set n.b=[n.b]+[n.b] %}"
    "{% endfor %}"
)
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10**12) %}{% endfor %}",
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{% set l = [1] * 10**9 %}",
    "power": "{% set x = 10 ** (10 ** 9) %}",
    "doubling +": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling ~": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling block": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set t %}{{n.s}}{{n.s}}{% endset %}"
    "{% set n.s = t %}{% endfor %}",
    "doubling list": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = [n.s,n.s] %}{% endfor %}{{n.s}}",
    "doubling dict": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = dict(a=n.s,b=n.s) %}{%endfor%}",
    "doubling join": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = [n.s,n.s]|join %}{% endfor %}",
    "doubling replace": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s|replace('x','xx') %}"
    "{% endfor %}",
    "doubling method": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s.replace('x','xx') %}"
    "{% endfor %}",
    "width in a format": "{{ '%1000000000d' % 1 }}",
    "width in format()": "{{ '{:>1000000000}'.format(1) }}",
    "width in an argument": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "wide center": "{{ 'x'|center(1000000000) }}",
    "wide ljust": "{{ 'x'.ljust(1000000000) }}",
    "wide indent": "{{ {'a': 1}|tojson(indent=1000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "constants": "{% set t %}{% for a in range(99999) %}" + "y" * 9000 + "{% endfor %}{% endset %}",
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "file": "{% include '/etc/passwd' %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "repeated list compared": TWO + "{{ [x]*900000 == [y]*900000 }}",
    "repeated little": TWO + "{{ [x]*300 == [y]*300 }}",
    "filled list compared": TWO + "{{ [1]|batch(9000,x)|list == [1]|batch(9000,y)|list }}",
    "mapped list compared": TWO + MAPPED + "{{ a == b }}",
    "mapped list ordered": TWO + MAPPED + "{{ a < b }}",
    "mapped list in a chain": TWO + MAPPED + "{{ 1 < 2 != 3 in [4] or a == b == a }}",
    "mapped list in a list": TWO + MAPPED + "{{ a in [b] }}",
    "mapped list not in a stream": TWO + MAPPED + "{{ a not in [b]|select }}",
    "mapped list in values": TWO + MAPPED + "{{ a in {'k': b}.values() }}",
    "mapped list is in": TWO + MAPPED + "{{ a is in [b] }}",
    "mapped list is": TWO + MAPPED + "{{ a is eq b }}",
    "mapped list selected": TWO + MAPPED + "{{ [a]|select('equalto', b)|list }}",
    "mapped list counted": TWO + MAPPED + "{{ [a].count(b) }}",
    "mapped list sorted": TWO + MAPPED + "{{ [a, b]|sort|length }}",
    "mapped list unique": TWO + MAPPED + "{{ [a, b]|unique|list|length }}",
    "mapped list changed": TWO + MAPPED + "{% for i in [a, b] %}{{ loop.changed(i) }}{% endfor %}",
    "doubling compared": TREES + "{{ n.a == n.b }}",
    "doubling in": TREES + "{{ n.a in [n.b] }}",
    "long list searched": TWO + "{% for i in x %}{{ (i ~ 'z') in x }}{% endfor %}",
    "long text searched": "{% set s = 'x' * 9000000 %}{% for i in range(99999) %}{{ 'y' in s }}{% endfor %}",
    "long text compared": "{% set s='x'*9000000 %}{% set t='x'*9000000 %}{% for i in range(99999) %}{{s==t}}{%endfor%}",
    "long text cut": "{% set s = 'x' * 9000000 %}{% for i in range(99999) %}{{ s[1:]|length }}{% endfor %}",
    "tuple as a key": "{% set t=((1,)*90000,)*90000 %}{{ {t: 1} }}",
    "tuple as an index": "{% set t=(1,)*900000 %}{% set d={} %}{% for i in range(99999) %}{{ d[t] }}{% endfor %}",
    "tuple got": "{% set t=(1,)*900000 %}{% set d={} %}{% for i in range(99999) %}{{ d.get(t) }}{% endfor %}",
    "lists added up": "{{ ([range(9999)|list]*5000)|sum(start=[])|length }}",
    "stream joined": "{{ (['a'*1000000]|batch(9999, 'a'*1000000)|first|select|join)|length }}",
    "list joined": "{{ ''.join(['a'*1000000]|batch(9999, 'a'*1000000)|first)|length }}",
    "tabs": "{{ ('\t'*1000000).expandtabs(9999)|length }}",
    "lines indented": "{{ ('\n'*1000000)|indent(9999)|length }}",
    "lines wrapped": "{{ ('x'*1000000)|wordwrap(1, wrapstring='y'*10000)|length }}",
    "fields of a format": "{{ ('{0}'*9000).format('x'*1000000)|length }}",
    "printf of a list": TWO + MAPPED + "{{ '%s' % [a, b] }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big')|length }}",
    "translation": "{{ ('a'*1000000).translate({97: 'b'*100000})|length }}",
    "division": "{% set a = 2**60000 %}{% set b = a*a*a*a*a*a*a*a %}{{ b*b // (b+1) }}",
    "namespace printed": TWO
    + "{% set n=namespace(x=[x,x]) %}{{ range(99999)|map('default', n)|map('replace','','')|list"
    "|length }}{{ ([n]*90000)|string|length }}",
    "type error": "{{ none + 'a' }}",
    "undefined": "{{ foo.bar }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_with_a_clear_error(name: str) -> None:
    begun = time.process_time()
    with pytest.raises(UsageError, match="chat template"):
        ChatTemplate(HOSTILE[name]).render([dict(message) for message in USER])
    assert time.process_time() - begun < 10


def test_comparisons_mean_what_they_mean_in_jinja() -> None:
    """Against a plain Jinja2: metering changes no truth value."""
    plain = jinja2.Environment()
    sides = ["1", "2.5", "'a'", "'ab'", "[1,2]", "(1,)", "{'a': 1}", "v", "range(3)",
             "{'a': 1}.values()", "{'a': 1}.items()", "{'a': 1}.keys()", "[1, 2]|select"]  # fmt: skip
    ops = ("==", "!=", "<", ">=", "in", "not in", "is eq", "is in")
    compared = 0
    for left, op, right in itertools.product(sides, ops, sides):
        source = f"{{{{ {left} {op} ({right}) }}}}"
        try:
            wanted = plain.from_string(source).render(v=[1, 2])
        except TypeError:
            with pytest.raises(UsageError, match="TypeError"):
                ChatTemplate(source).render([], v=[1, 2])
            continue
        assert ChatTemplate(source).render([], v=[1, 2]) == wanted, source
        compared += 1
    assert compared > 600
    chains = "{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 1 in [1] == true }}{{ 'abcdef'[1:-1:2] }}{{ v[:1] }}{{ [1,2]|sum }}"
    tail = "{{ [{'n': 2}, {'n': 3}]|sum('n', 1) }}{{ [3,1,2]|sort }}{{ {('a', v|length): 1} }}{{ 'x'.split('x') }}"
    assert ChatTemplate(chains + tail).render([], v=[1, 2]) == plain.from_string(chains + tail).render(v=[1, 2])


def test_a_long_conversation_is_within_the_budget(realdata: Path) -> None:
    source = (realdata / "chat_templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": "word " * 200} for n in range(2001)]
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(messages, TOOLS * 20)
    assert text.count("word") == 200 * 2001


def test_threads_share_a_template() -> None:
    template = ChatTemplate(None)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: template.render([{"role": "user", "content": str(n)}]), range(200)))
    assert texts == [f"<|im_start|>user\n{n}<|im_end|>\n<|im_start|>assistant\n" for n in range(200)]


def test_jinja2_is_imported_by_the_first_rendering_only() -> None:
    code = (
        "import sys\n"
        "import inhouse.model.tokens.chat as chat, inhouse.model.tokens.load, inhouse.model.tokens.detokenize\n"
        "template = chat.ChatTemplate(None)\n"
        "print('jinja2' in sys.modules)\n"
        "template.render([])\n"
        "print('jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
