"""`python -m tests.system.agent_server PORT`: an agent server whose agents do the quickstart's task by the gateway."""

import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from learner.demo.task import reward

CLIENT = web.AppKey("client", aiohttp.ClientSession)


async def run(request: web.Request) -> web.Response:
    asked = await request.json()
    prompt = asked["task"]["prompt"]
    url = f"{asked['session_url']}/completions"
    async with request.app[CLIENT].post(url, json={"prompt": prompt, "max_tokens": 64}) as answer:
        answer.raise_for_status()
        said = (await answer.json())["choices"][0]["text"]
    return web.json_response({"reward": reward(prompt, said, asked["task"])})


async def client(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app[CLIENT]:
        yield


def main() -> None:
    app = web.Application()
    app.router.add_post("/run", run)
    app.cleanup_ctx.append(client)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
