"""What can a user's request end in, and with which exit code?

Every error that speaks to the user says what was asked, what is possible and what to do; the command line prints its
text alone."""

EXIT_OK, EXIT_OTHER, EXIT_SETTINGS, EXIT_DATA, EXIT_TRY_AGAIN = 0, 1, 2, 3, 75
EXIT_INTERRUPTED = 130  # by a person, and not finished: what goes on elsewhere has an outcome of its own


class UserError(Exception):
    """An error whose text is meant for the user; no stack trace is shown."""

    exit_code = EXIT_OTHER


class SettingsError(UserError, ValueError):
    """The run file or an override asks for something that is not a setting, or not allowed."""

    exit_code = EXIT_SETTINGS


class Unsupported(SettingsError):
    """Asked for something DistCA cannot compute exactly; the text says what would work."""


class DataError(UserError):
    """A source, file or row that cannot be trained on; the text names it."""

    exit_code = EXIT_DATA


class TryAgain(UserError):
    """Stopped, but the work is safe or the cause may pass: the same command can be run again."""

    exit_code = EXIT_TRY_AGAIN


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough to stand within a sentence."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]
