"""A small NeMo Gym resources server that does what it is told, good or bad. The wire is that of nemo-gym 0.7.0.

Like the real one it takes a request without a cookie, or with one that it does not know, for the first of a new
session, and says 200: its reward is then 0. And it goes on after the end of an episode.
"""

import base64
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.rollout_server.http_twin import REWARDS, Dies, Hangs, HttpTwin, Request, reply

ROUTES = {"verify": ("seed_session", "verify", "close_session", "add", "secret"), "step": ("reset", "step", "close")}


@dataclass
class NemoGymTwin:
    """An action: what the policy said, as "ACTION ARGUMENT"."""

    style: str = "verify"
    info: dict[str, Any] = field(default_factory=dict)  # of /reset
    cookie: str = "Twin___twin={}; path=/; Max-Age=1209600; httponly; samesite=lax"
    sessions: dict[str, list[str]] = field(default_factory=dict)  # the routes that each one has used
    bodies: list[tuple[str, Any]] = field(default_factory=list)
    tool_status: int = 200
    http: HttpTwin = field(init=False)
    _by_cookie: dict[str, str] = field(default_factory=dict)
    _names: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.http = HttpTwin(self.answer)

    @property
    def url(self) -> str:
        return f"nemo-gym+http://127.0.0.1:{self.http.port}"

    async def answer(self, request: Request) -> bytes:
        route = request.head.split(" ")[1].removeprefix("/")
        session = self.session_of(request.head)
        is_known = session in self.sessions
        session = session if is_known else f"session {next(self._names)}"
        cookie = "Set-Cookie: " + self.cookie.format(signed(session)) + "\r\n" if self.cookie else ""
        if route not in ROUTES[self.style]:
            return reply('{"detail":"Not Found"}', status=404, headers=cookie)
        self.sessions.setdefault(session, []).append(route)
        self._by_cookie[signed(session).lower()] = session  # http_twin writes headers in small letters
        self.bodies.append((route, request.json))
        if route == "add" and self.tool_status != 200:
            return reply("told to", status=self.tool_status, headers=cookie)
        return reply(self.said(route, request.json, is_known=is_known), headers=cookie)

    def session_of(self, head: str) -> str:
        line = next((line for line in head.split("\r\n") if line.startswith("cookie:")), "")
        return self._by_cookie.get(line.rpartition("twin=")[2], "")

    def said(self, route: str, body: Any, *, is_known: bool) -> str:
        match route:
            case "reset":
                return json.dumps({"observation": "do", "info": self.info})
            case "add":
                return json.dumps({"sum": body["a"] + body["b"]})
            case "verify":
                return done(words_of(body)) if is_known else json.dumps({"reward": 0.0, "mask_sample": False})
            case "step":
                return done(words_of(body)) if is_known else json.dumps({"reward": -1.0, "terminated": True})
        return "{}"


def signed(session: str) -> str:
    """As Starlette does: base64, then a time and a signature."""
    return base64.b64encode(json.dumps({"session_id": session}).encode()).decode() + ".awiHeg.NaNRFI5qB3jicwk5xZRDVLR"


def words_of(body: Any) -> str:
    """The text of the response's last message."""
    texts = [item["content"][0]["text"] for item in body["response"]["output"] if item["type"] == "message"]
    return texts[-1] if texts else ""


def done(text: str) -> str:
    action, _, argument = text.partition(" ")
    match action:
        case "hang" | "block":
            raise Hangs
        case "die":
            raise Dies
        case "raw":
            return argument
        case "say":
            return json.dumps({"observation": argument, "reward": 0.25, "terminated": False, "truncated": False})
    value = REWARDS.get(action, argument)
    return f'{{"reward": {value}, "mask_sample": false, "observation": null, "terminated": true, "info": {{}}}}'


@asynccontextmanager
async def a_nemo_gym_server(**fields: Any) -> AsyncIterator[NemoGymTwin]:
    twin = NemoGymTwin(**fields)
    await twin.http.start(0)
    try:
        yield twin
    finally:
        await twin.http.stop()
