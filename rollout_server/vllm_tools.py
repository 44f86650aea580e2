"""VllmTools: tool calls read by vLLM's own parsers, one for each format that models use."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from common.lifecycle import UserError
from rollout_server.gateway.tools import Call, Parsed
from rollout_server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class VllmTools:
    """gateway.tools.ToolParser. Made after the engine: importing vLLM reads the environment that the engine sets."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """Takes seconds, for the import. Raises UserError for a name that vLLM does not know, and where the parser
        does not go with the tokenizer."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        try:
            self._kind = ToolParserManager.get_tool_parser(name)
        except KeyError as error:
            known = ", ".join(sorted({*ToolParserManager.lazy_parsers, *ToolParserManager.tool_parsers}))
            raise UserError(f"--tool-parser {name}: vLLM has no such parser; it has: {known}") from error
        try:
            self._kind(tokenizer, [])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--tool-parser {name}: {error}") from error
        self._request = ChatCompletionRequest
        self._tokenizer = tokenizer
        self._name = name

    def __repr__(self) -> str:
        return f"<VllmTools {self._name}>"

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """See ToolParser. Where a parser raises there is no call."""
        try:
            request = self._request(model="policy", messages=[], tools=[dict(tool) for tool in tools])
            found = self._kind(self._tokenizer, request.tools).extract_tool_calls(text, request=request)
        except Exception as error:  # noqa: BLE001 - whatever a parser raises for what no model of its kind says
            logger.warning("vLLM's parser %s cannot read what the policy said: %r", self._name, error)
            return Parsed(content=text)
        calls = tuple(Call(name=call.function.name, arguments=call.function.arguments) for call in found.tool_calls)
        if not found.tools_called or not calls:
            return Parsed(content=text)
        return Parsed(content=found.content or "", calls=calls)
