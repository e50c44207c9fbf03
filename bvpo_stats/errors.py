"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user gave cannot work; the message says what is wrong and what to do about it.

    The command line prints the message on stderr and exits with code 2, without a traceback unless ``--debug`` is
    given. Library code raises it for bad input only, never for its own faults.
    """
