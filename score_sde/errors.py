"""The one exception for mistakes a user can mend: programs print its message as one line and exit with code 2."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""


def one_line(error: Exception, limit: int = 200) -> str:
    """An exception's message, without line breaks and of at most `limit` characters; its type if it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
