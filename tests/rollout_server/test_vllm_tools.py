"""Tool calls in the formats of several models, read by vLLM's parsers."""

import json

import pytest

from common.lifecycle import UserError
from rollout_server.gateway.tools import Parsed
from rollout_server.vllm_tools import VllmTools
from tests.rollout_server.gateway.builders_gateway import a_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hermes", 'Well. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        ("qwen3_xml", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
        ("llama4_pythonic", "[add(a=1)]"),
        ("pythonic", "[add(a=1)]"),
    ],
)
def test_formats_of_tool_calls_are_read_by_vllms_parsers(name: str, said: str):
    parser = VllmTools(name, a_tokenizer())
    [call] = parser.parse(said, TOOLS).calls
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
    assert parser.parse("no call at all", TOOLS).calls == ()


def test_a_parser_that_vllm_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(UserError, match=r"no such parser; it has: .*hermes"):
        VllmTools("herms", a_tokenizer())


def test_a_parser_for_other_tokenizers_is_refused_at_the_start():
    with pytest.raises(UserError, match=r"llama3_json: .*python_tag"):
        VllmTools("llama3_json", a_tokenizer())


def test_what_makes_a_parser_raise_is_no_call(caplog):
    parser = VllmTools("hermes", a_tokenizer())
    parser._kind = None
    assert parser.parse("<tool_call>", TOOLS) == Parsed(content="<tool_call>")
    assert "cannot read" in caplog.text
