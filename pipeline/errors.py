"""What can go wrong for a user, one class per remedy, each with its own exit code.

A message is one line: what is wrong, the legal range, the value found, and what to do.
`pipeline.command_line` prints it and exits; a traceback appears only with ``--debug``.

| code | meaning |
|---|---|
| 0 | done |
| 1 | an unexpected fault in Patchseed itself (please report it) |
| 2 | ConfigError: flags, a configuration file, or a resume that contradicts them |
| 3 | DataError: the input is missing, empty, ambiguous or of the wrong kind |
| 4 | WeightsError: weights that cannot be had or do not fit the architecture |
| 5 | StorageError: the output cannot be written, is taken, or is not empty |
| 6 | TooManyBadImages: the work is complete, but more inputs failed than allowed |
| 7 | ClusterError: Ray could not be reached, or the work died inside it |
| 8 | TrainingDiverged: a loss or gradient is not finite; finished epochs are kept |
| 9 | AllTrialsFailed: no trial of a sweep came to its end; the reasons are in its table |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; the resume command is printed |
| 141 | who read the output went away, as `| head` does; nothing is printed |
"""

import re


class PatchseedError(Exception):
    """A fault the user can mend; the message says how."""

    exit_code = 1


class ConfigError(PatchseedError):
    """A flag or a configuration value outside its legal range."""

    exit_code = 2


class DataError(PatchseedError):
    """Input that is missing, empty, ambiguous or of the wrong kind."""

    exit_code = 3


class WeightsError(PatchseedError):
    """Weights that cannot be had, or that do not fit the architecture they were given for."""

    exit_code = 4


class StorageError(PatchseedError):
    """A place that cannot be read or written, is in use by another job, or is not empty."""

    exit_code = 5


class TooManyBadImages(PatchseedError):
    """The job finished and its output is whole, but too many inputs could not be used."""

    exit_code = 6


class ClusterError(PatchseedError):
    """Ray could not be reached, has too few resources, or the work died inside it."""

    exit_code = 7


class TrainingDiverged(PatchseedError):
    """A loss or a gradient is not finite; finished epochs are kept."""

    exit_code = 8


class AllTrialsFailed(PatchseedError):
    """No trial of a sweep came to its end; its table holds the reason of each."""

    exit_code = 9


def one_line(fault: BaseException | str, limit: int = 300) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def without_secrets(text: str) -> str:
    """``text`` with user:password@, signed queries and AWS keys blotted out."""
    # A secret key may itself hold a slash, so a colon reaches over slashes to the last @.
    text = re.sub(r"(?<=://)([^/@:\s]*:\S*|[^/@\s]*)@", "***@", text)
    signed = r"((?:X-Amz-|X-Goog-|AWS|Signature)[A-Za-z_-]*=)[^&\s]+"
    return re.sub(signed, r"\1***", text, flags=re.IGNORECASE)
