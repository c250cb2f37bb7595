"""The one exception for mistakes a user can mend: programs print its message as one line and exit with code 2."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""


def one_line(error: object, limit: int = 200) -> str:
    """The message of an exception, or any text, in one line of at most `limit` characters; its type if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
