"""The one error type for failures a user can cause and mend.

Every message says what was found, what was expected, and the next step. Command lines print it as one
`error:` line and exit with 1; anything else that escapes is a defect of ours and keeps its traceback.
"""


class DgemmaError(Exception):
    """A bad input: found, expected, next step, in one line."""

    def __str__(self):
        # A library's own message, quoted in ours, may have several lines.
        return " ".join(super().__str__().split())


class ContextError(DgemmaError):
    """Prompt and answer do not fit the model's context."""
