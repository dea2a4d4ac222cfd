"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave; the message is one line that says what is wrong and how to mend it.

    The command line prints it as ``error: ...`` and leaves with exit code 2, without a traceback.
    """
