"""A complete agent server: an agent with a tool, written with the official openai client as for any other model.

pip install openai starlette uvicorn
python agent_server.py --port 8070
learner --model Qwen/Qwen3-0.6B --env agent+http://127.0.0.1:8070/run --data sums.jsonl
"""

import argparse
import json
import math

import openai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

PRODUCT = {
    "type": "function",
    "function": {
        "name": "product",
        "description": "the product of numbers",
        "parameters": {
            "type": "object",
            "properties": {"numbers": {"type": "array", "items": {"type": "number"}}},
            "required": ["numbers"],
        },
    },
}
MAX_TURNS = 4


def use(arguments: str) -> str:
    try:
        return str(math.prod(float(number) for number in json.loads(arguments)["numbers"]))
    except (ValueError, TypeError, KeyError) as error:
        return f"error: {error}"  # for the policy to read, and to learn from


async def run(request: Request) -> JSONResponse:
    asked = await request.json()
    task = asked["task"]  # the row of --data
    chat = [{"role": "user", "content": task["prompt"]}]
    async with openai.AsyncOpenAI(base_url=asked["base_url"], api_key=asked["api_key"]) as client:
        for _ in range(MAX_TURNS):
            reply = await client.chat.completions.create(model=asked["model"], messages=chat, tools=[PRODUCT])
            message = reply.choices[0].message
            chat.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            chat += [
                {"role": "tool", "tool_call_id": call.id, "content": use(call.function.arguments)}
                for call in message.tool_calls
            ]
    return JSONResponse({"reward": float(task["answer"] in (message.content or ""))})


app = Starlette(routes=[Route("/run", run, methods=["POST"])])

if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, default=8070)
    uvicorn.run(app, host="127.0.0.1", port=arguments.parse_args().port, log_level="warning")
