"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in flags, files or data.

    The message is one sentence that names the flag, file or row, the value seen and the fix.
    Entry points print it on one line to stderr and exit with code 2.
    """


class SharedUserError(UserError):
    """One that every rank raises at the same point: one of a node tells it."""
