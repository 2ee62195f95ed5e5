"""The one exception whose text is meant for a person, not for a debugger."""


class UserError(Exception):
    """Something the user can put right, said in a sentence.

    The sentence gives the value, the rule it breaks and the nearest valid value or
    what to do next. `main.py` prints it without a traceback and exits with status 2.
    """
