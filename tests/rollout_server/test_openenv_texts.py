"""What a text becomes as an action, and an observation as a text."""

import pytest

from rollout_server.environments.openenv_texts import (
    ActionSchema,
    BadAction,
    UnmappableSchema,
    observation_text,
    tool_call,
    tool_instructions,
)

METADATA = {"metadata": {"type": "object"}}


def a_schema(required=None, **fields):
    return ActionSchema({"properties": METADATA | fields, "required": list(fields) if required is None else required})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ({"type": "string"}, " 4\n", " 4\n"),
        ({}, "4", "4"),
        ({"type": "integer"}, " 4\n", 4),
        ({"type": "number"}, "-0.5", -0.5),
        ({"type": "boolean"}, "true", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "4", "4"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "4", 4),
    ],
)
def test_a_text_becomes_the_value_of_the_one_field_that_an_action_needs(field, text, value):
    assert a_schema(only=field).action(text) == {"only": value}


def test_optional_fields_are_left_to_the_environment():
    schema = a_schema(["answer"], answer={"type": "string"}, note={"type": "string"})
    assert schema.action("42") == {"answer": "42"}


def test_the_only_field_is_taken_also_where_it_is_optional():
    assert a_schema([], answer={"type": "string"}).action("42") == {"answer": "42"}


def test_an_action_of_several_fields_is_read_as_json():
    schema = a_schema(row={"type": "integer"}, column={"type": "integer"})
    assert schema.action('{"row": 1, "column": 2}') == {"row": 1, "column": 2}
    with pytest.raises(BadAction, match="an action must be a JSON object"):
        schema.action("the corner")


@pytest.mark.parametrize("text", ["four", "", "{", "[" * 100_000])
def test_a_text_that_is_no_number_is_a_bad_action_where_a_number_is_wanted(text):
    with pytest.raises(BadAction, match="the action must be integer"):
        a_schema(only={"type": "integer"}).action(text)


@pytest.mark.parametrize("schema", [{}, {"properties": 3}, {"properties": METADATA}])
def test_a_schema_without_fields_asks_for_a_parser(schema):
    with pytest.raises(UnmappableSchema):
        ActionSchema(schema)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "add", "arguments": {"a": 1}}',
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call> Done.',
        '<tool_call>{"tool_name": "add", "parameters": {"a": 1}}</tool_call><tool_call>{"name": "x"}</tool_call>',
    ],
)
def test_a_tool_call_is_found_in_the_forms_that_models_write(text):
    schema = a_schema(tool_name={"type": "string"}, arguments={"type": "object"}, type={"const": "call_tool"})
    assert schema.is_tool_call
    assert schema.action(text) == {"type": "call_tool", "tool_name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize("text", ["I add.", "[]", '{"name": 3}', '{"arguments": {}}', '{"name": "a", "arguments": []}'])
def test_what_is_no_tool_call_is_a_bad_action(text):
    with pytest.raises(BadAction):
        tool_call(text)


def test_the_policy_is_told_the_tools_and_how_to_call_one():
    text = tool_instructions([{"name": "add", "input_schema": {}}])
    assert text.splitlines()[:2] == ["Tools:", '{"name": "add", "input_schema": {}}']
    call = text.splitlines()[-1].removeprefix("Call one with ")
    assert tool_call(call.replace("...", '"add"', 1).replace("{...}", "{}"))["tool_name"] == "add"


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"metadata": {"a": 1}, "text": "hello", "reward": 0, "done": False}, "hello"),
        ({"question": "1+1?", "score": None, "correct_answer": None}, "1+1?"),
        ({"prompt": "play", "info": "x", "legal": ["a"]}, "play"),
        (
            {"prompt": "play", "messages": [{"sender_id": 0, "content": "hi"}, {"content": "ho"}]},
            "hi\nho",
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, [{"role": "user", "content": "hi"}]),
        ({"board": [1, 2], "turn": "x"}, '{"board": [1, 2], "turn": "x"}'),
        ({}, "{}"),
        ({"tool_name": "add", "result": {"data": 3, "content": []}, "error": None}, "3"),
        ({"tool_name": "add", "result": {"content": [{"type": "text", "text": "three"}]}}, "three"),
        ({"tool_name": "add", "result": "three"}, "three"),
        (
            {"tool_name": "add", "error": {"error_type": "not_found", "message": "no add"}},
            "not_found: no add",
        ),
    ],
)
def test_the_policy_reads_the_text_of_an_observation_or_all_of_it_as_json(observation, text):
    assert observation_text(observation) == text
