"""The one exception for mistakes a user can mend: programs print its message as one line and exit with code 2."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""
