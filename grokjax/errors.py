"""What an error of a library says, for a sentence of ours."""


def first_line(error: BaseException) -> str:
    """The first line of a message, without the full stop at its end; the error's type where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
