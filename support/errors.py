"""The one exception whose message is meant for the user, and not for the developer."""
import contextlib
import difflib


class UserError(ValueError):
    """Something the user can mend: one line that names the flag or file and says what to do."""

    def __str__(self):
        # The message stays one line even where the name of a file holds a line break.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


def nearest(word, choices, n=1):
    """"nearest: …" with the n choices that are most like a mistyped word, "" where none is. Case
    and leading dashes do not count."""
    choices = {choice.lstrip("-"): choice for choice in choices}
    near = difflib.get_close_matches(word.lstrip("-").lower(), choices, n, cutoff=0.65)
    return f"nearest: {', '.join(choices[word] for word in near)}" if near else ""


@contextlib.contextmanager
def as_user_error(prefix):
    """Turn a ValueError or TypeError raised inside into a UserError whose message is `prefix`,
    the flag or file to blame, followed by the original message."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{prefix}{error}")
