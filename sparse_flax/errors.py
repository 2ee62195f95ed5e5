"""The one exception whose text is meant for a person, and others in a sentence."""


class UserError(Exception):
    """Something the user can put right, said in a sentence.

    The sentence gives the value, the rule it breaks and the nearest valid value or
    what to do next. `main.py` prints it without a traceback and exits with status 2.
    """


def one_line(text: object) -> str:
    """Return a text, or an error's, without line breaks: to quote it in a sentence."""
    return " ".join(str(text).split())
