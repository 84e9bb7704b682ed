"""Errors a user can act on.

Every mistake a user can make ends in one `RecjaxError`: what is wrong, where, what was expected and how to mend
it. The command line prints the message without a traceback and exits with status 2 (`--debug` shows the
traceback). Programming errors stay ordinary Python exceptions. This module imports nothing, so that the commands
can report a mistake before any heavy import.

Exit statuses of every verb: 0 done, 2 a mistake of the user, 130 interrupted from the keyboard, `INTERRUPTED` told to
stop, saved, and to be started again, `TRY_AGAIN` the other processes of a run are not there; anything else is a fault
of the program or of the machine. Launchers start again after the two, and after a death by a signal.
"""

INTERRUPTED = 143  # 128 + SIGTERM: also what a shell says of a process that SIGTERM ended before it could save
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class RecjaxError(Exception):
    """One clear message: `what` is wrong, `where`, what was `expected` and how to `mend` it."""

    def __init__(self, what: str, *, where: str = "", expected: str = "", mend: str = "") -> None:
        self.what, self.where, self.expected, self.mend = what, where, expected, mend
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """Everything, a line each; without what libraries on the way (gin) append to an exception."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where:    {self.where}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.mend:
            lines.append(f"  mend:     {self.mend}")
        return "\n".join(lines)


class ConfigError(RecjaxError):
    """A recipe, macro, binding or flag that cannot be used."""


class DataError(RecjaxError):
    """A data directory, file, column or row that cannot be used."""


class ExamplesError(RecjaxError):
    """Prepared examples that are missing, damaged or made for something else."""


class MeshError(RecjaxError):
    """A mesh or sharding that does not fit the devices or the batch."""


class ClusterError(RecjaxError):
    """Processes of a run that are missing, or that do not go together."""


class CheckpointError(RecjaxError):
    """A checkpoint that is missing, damaged or belongs to another model or vocabulary."""


class TrainingError(RecjaxError):
    """Training that cannot go on, such as a loss that is not a number."""


class ArtifactError(RecjaxError):
    """An artifact (arrays passed between stages) that is missing, damaged or made for something else."""


class BundleError(RecjaxError):
    """An exported bundle that is missing, damaged or of another version."""


class UnservableError(RecjaxError):
    """A model that cannot answer from a history of items alone."""


class RequestError(RecjaxError):
    """A serving request that cannot be answered; `status` is the HTTP status code."""

    def __init__(self, what: str, *, status: int = 422, where: str = "", expected: str = "", mend: str = "") -> None:
        self.status = status
        super().__init__(what, where=where, expected=expected, mend=mend)
