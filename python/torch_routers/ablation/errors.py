"""The one error that the command line shows without a traceback."""


class AblationError(Exception):
    """Something that the user can put right; the message says how."""
