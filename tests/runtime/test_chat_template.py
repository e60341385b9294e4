"""Chat templates give what transformers gives, and cannot do more than write text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorwright.errors import UsageError
from tensorwright.runtime.chat_template import ChatTemplate
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.text import CHAT_TEMPLATE, write_tokenizer

CHATML = CHAT_TEMPLATE
LOOPS = (
    "{%- for m in messages -%}\n  {% if loop.index0 > 1 %}{% break %}{% endif %}\n"
    "  {%- set text = m['content'] | trim %}\n"
    "  [{{ m.role | upper }}]{{ text }}{% generation %}!{% endgeneration %}\n{% endfor %}"
    "{{ {'b': [1, '<é>'], 'a': none} | tojson }}{{ [1] | tojson(indent=2) }}{{ eos_token }}"
)
TOOLS = (
    "{% if tools %}{{ tools[0] | tojson }}"
    "{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}{{ extra }}"
)
NAMESPACE = (
    "{% set ns = namespace(system='none', n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% else %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
    "{{ ns.system }} {{ ns.n }}{% if messages[-1].role is not defined %}x{% endif %}{{ dict(a=1).a }}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief. <&> "},
    {"role": "user", "content": " hi how are you? 🦄\n"},
    {"role": "assistant", "content": "fine"},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("source", [CHATML, LOOPS, TOOLS, NAMESPACE])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_same_text_as_transformers(tmp_path: Path, source: str, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, chat_template=source, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    settings: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, "extra": "more"}
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **settings)
    tokenizer = Tokenizer.load(tmp_path)
    text = ChatTemplate.of(tokenizer).render(MESSAGES, **settings)
    assert text == expected
    assert tokenizer.encode_chat(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_raise_exception_becomes_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Roles must alternate"):
        template("{{ raise_exception('Roles must alternate') }}").render(MESSAGES)


def test_the_time_can_be_asked() -> None:
    assert template("{{ strftime_now('%Y') }}").render(MESSAGES).startswith("2")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'passwd' %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 9999 }}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% set a = 'a' * 1000000 %}{% for i in range(100) %}{{ a }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ nothing() }}",
    ],
)
def test_what_a_template_must_not_do(source: str) -> None:
    with pytest.raises(UsageError, match="refuses these messages"):
        template(source).render(MESSAGES)


def test_a_template_that_is_no_jinja_is_named_with_its_line() -> None:
    with pytest.raises(UsageError, match="'default' is not jinja2: line 2"):
        template("a\n{% if %}")


def test_without_a_template_the_way_out_is_told() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        ChatTemplate({}, {})


def test_tools_choose_their_template() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert both.render(MESSAGES) == "plain"
    assert both.render(MESSAGES, tools=[{"name": "f"}]) == "tools"
    assert ChatTemplate({"rag": "only"}, {}).render(MESSAGES) == "only"


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "hi"}], [{"role": 3}], [{"role": "user", "x": {1}}]])
def test_messages_of_another_form(messages: list[Any]) -> None:
    with pytest.raises(UsageError, match="message"):
        template(CHATML).render(messages)


def test_the_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert template("{{ messages[0].content[0].text }}").render(messages) == "hi"
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
