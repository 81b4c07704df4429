"""The one error that is the user's to mend; and any error in one line."""


class BadInput(ValueError):
    """What is wrong, where, and what would be right, in one line. The command line exits with 2."""


def one_line(error: Exception) -> str:
    """What it says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
