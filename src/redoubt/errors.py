"""What a user did wrong, in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one line that names the key or the file, says what is wrong and what to do. The command
    line prints it without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
