"""The one error that is the user's to mend."""


class BadInput(ValueError):
    """What is wrong, where, and what would be right, in one line. The command line exits with 2."""
