"""Chat templates as models carry them: what they render, where they are found, and what a hostile one may cost."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from llm_from_scratch.core.chat import ChatTemplate, chat_in, read_template
from llm_from_scratch.core.tokenizer import HFTokenizer, Tokenizer
from llm_from_scratch.errors import UserError

# of the kind that models carry: conditions, loops with their state, filters, white space control, an error
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
{{ bos_token if loop.first else '' }}<|im_start|>{{ message['role'] }}{{ '[' ~ message.name ~ ']' if message.name }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{- {'é': messages | length} | tojson }}
{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ eos_token }}{% endif %}"""
CONVERSATIONS = [
    [{"role": "user", "content": " Hi <b>there</b> & 'you' \n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é?"}],
    [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


def test_a_template_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = HFTokenizer.train(["hello there " * 50], 300).backend(special_is_text=False)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_name(str(tmp_path)).chat
    assert ours is not None
    for messages in CONVERSATIONS:
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == wanted
    odd = [{"role": "tool", "content": "x"}]
    with pytest.raises(UserError, match="unknown role tool"):
        ours.render(odd)
    with pytest.raises(Exception, match="unknown role tool"):
        theirs.apply_chat_template(odd, tokenize=False)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].content.format(a=messages) | attr('__class__') }}{{ 1/0 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack):
    with pytest.raises(UserError, match="rejects"):
        ChatTemplate(attack).render([{"role": "user", "content": "{a.__class__}"}])


def test_places_of_templates(tmp_path):
    def found(eot: str = "<eot>") -> ChatTemplate | None:
        return chat_in(tmp_path, eot, 9)[0]

    assert found() is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}|{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "</s>"}}))
    assert found().render([]) == "<eot>|</s>" and found("").render([]) == "|</s>"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert found().render([]) == "beside"
    (tmp_path / "mine").write_text("{{ eos_token }}mine")
    assert read_template(str(tmp_path / "mine"), eos="!").render([]) == "!mine"
    (tmp_path / "mine").write_text("{% if %}")
    for file in (tmp_path / "mine", tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="chat template"):
            read_template(str(file))
    config.write_text("[")
    with pytest.raises(UserError, match="cannot read"):
        found()


def test_ends_equal_the_folder(tmp_path):
    assert chat_in(tmp_path, "", 9) == (None, frozenset())
    HFTokenizer.train(["ab ba " * 50], 270).backend(special_is_text=False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))  # as transformers, if alone
    assert chat_in(tmp_path, "", 9)[1] == {4, 5}
    for written, ids in ((3, {3}), ([1, 2, 9999], {1, 2}), (None, set()), ("x", set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert chat_in(tmp_path, "", 9)[1] == ids
        assert Tokenizer.from_name(str(tmp_path)).end_ids == ids | {0}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config"):
        chat_in(tmp_path, "", 9)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    LOOPS,
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ ('x' * messages | length) | center(10**9) }}",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        *HOSTILE,
        "{{ 'x' * 10**10 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ range(99999) | map('string') | join(messages[0].content * 99999) | length }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{{ " + "[" * 9000 + "]" * 9000 + " }}",
        "{{ 9 ** (9 ** (9 ** messages | length)) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ lipsum(n=100000) }}",
        "{{ (messages * 99999) | tojson(indent=99999) | length }}",
        "{{ dict(a=range(99999) | list) | tojson | urlize | wordwrap(1) | indent(99999) }}",
        "{{ strftime_now('%Y' * 10**8) }}",
        "{{ ''.join(cycler.__init__.__globals__) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages | map(attribute='__class__') | list | first | attr('mro') }}{{ 1 / 0 }}",
        "{% import '/etc/passwd' as x %}",
    ],
    ids=lambda attack: attack[:40],
)
def test_hostile_templates_are_refused_in_bounded_time_and_memory(attack):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(UserError, match="the chat template"):
        ChatTemplate(attack).render([{"role": "user", "content": "{a.__class__}" * 99}])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
def test_a_template_has_limited_memory():
    template = ChatTemplate("x")
    template.start()
    assert template.process is not None
    limits = Path(f"/proc/{template.process.pid}/limits").read_text()
    assert int(limits.partition("Max address space")[2].split()[0]) <= 200 << 20


def test_template_and_ends_are_stored_with_the_tokenizer(tmp_path):
    tokenizer = HFTokenizer.train(["ab ba " * 50], 270)
    before = tokenizer.fingerprint()
    tokenizer.chat, tokenizer.ends = ChatTemplate("{{ bos_token }}é", "<s>", "</s>"), frozenset({7, 3})
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat is not None and again.chat.render([]) == "<s>é"
    assert (again.chat.eos, again.ends, again.fingerprint()) == ("</s>", {3, 7}, before)
    meta = json.loads((tmp_path / "tokenizer.meta.json").read_text())
    for field, wrong in (("chat", {"template": 3}), ("chat", {"template": 3, "bos_token": "", "eos_token": ""}),
                         ("chat", 5), ("ends", [9999]), ("ends", ["x"])):  # fmt: skip
        (tmp_path / "tokenizer.meta.json").write_text(json.dumps(meta | {field: wrong}))
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path)
