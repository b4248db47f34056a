"""The one exception whose message is meant for the user, and not for the developer."""
import contextlib


class UserError(ValueError):
    """Something the user can mend: one line that names the flag or file and says what to do."""

    def __str__(self):
        # The message stays one line even where the name of a file holds a line break.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


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
