"""What a request is refused with: a status, and a text in the shape of OpenAI's errors."""

from typing import Any

_KINDS = {404: "not_found_error", 403: "permission_error"}


class Refusal(Exception):
    """A request that is not answered; the others go on.

    Attributes:
        status: The HTTP status.
        code: What a program tells it by.
        param: The field of the request that it is about.
    """

    def __init__(
        self, text: str, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        """Take what is to be told."""
        super().__init__(text)
        self.status, self.code, self.param = status, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Of the response: when to come again, if that helps."""
        return {"Retry-After": "1"} if self.status == 503 else {}

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        content = {
            "message": str(self),
            "type": _KINDS.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": content}
