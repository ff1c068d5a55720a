"""What a request can be refused for, with the HTTP status that says so."""

from bayou.errors import BadFile, BadInput, BayouError, DamagedFile, Unsupported, WrongBase


class Refused(BayouError):
    """A request that gets no answer, or no further one. `status` is HTTP's, `code` a word for programs."""

    def __init__(self, message: str, status: int = 400, code: str = "bad_request", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def unknown_model(name: str) -> Refused:
    """404, as OpenAI's."""
    return Refused(
        f"the model {name!r:.120} does not exist; GET /v1/models lists those that do", 404, "model_not_found", "model"
    )


def busy(waiting: int) -> Refused:
    """429: the queue is full."""
    return Refused(f"{waiting} requests are waiting, which is the limit; try again in a moment", 429, "queue_full")


_STATUS = (
    (WrongBase, 409, "wrong_base"),
    (DamagedFile, 422, "damaged_file"),
    (BadFile, 422, "bad_file"),
    (Unsupported, 422, "unsupported"),
    (BadInput, 400, "bad_request"),
)


def refusal(error: BayouError, *hidden: tuple[object, str]) -> Refused:
    """The refusal that an error of a delta's file means. hidden: (path, name): clients are told names only."""
    if isinstance(error, Refused):
        return error
    message = str(error)
    for path, name in hidden:
        message = message.replace(str(path), name)
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Refused(message, status, code)
    return Refused(message, 400, "bad_request")
