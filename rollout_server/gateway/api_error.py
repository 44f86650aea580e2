"""ApiError: what an agent is told when its request is not granted, in the form of OpenAI's and Anthropic's APIs."""

from typing import Any


class ApiError(Exception):
    """status: of HTTP. code: for programs; message: for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message[:1000]

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"type": "error", "error": {"message": self.message, "type": kind, "param": None, "code": self.code}}
