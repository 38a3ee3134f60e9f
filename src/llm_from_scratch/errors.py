"""Every exception of this package, and a text on one line for their messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def one_line(value: object, limit: int | None = 200) -> str:
    """The text of a value on one line of at most `limit` characters."""
    return " ".join(line.strip() for line in str(value).splitlines() if line.strip())[:limit]


def first_line(error: object) -> str:
    """The first line of an error's text: what follows is often advice on a library's settings."""
    return one_line(str(error).strip().partition("\n")[0]) or repr(error)


def listed(numbers: list[int]) -> str:
    """Ascending whole numbers as text: 0 to 3, 6, 8 to 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextlib.contextmanager
def shared_by_all() -> Iterator[None]:
    """Around checks of the settings alone: every process of a run finds the same mistake, and rank 0 reports it."""
    try:
        yield
    except UserError as error:
        raise SharedError(str(error)) from None


class UserError(ValueError):
    """A mistake the user can fix. The message states what was wrong, what was expected and what to do."""


class AccessError(UserError):
    """A file could not be read, for a reason outside of its content: the network, the disk, a missing package."""


class SharedError(UserError):
    """A mistake that every process of a run finds: rank 0 reports it."""


class DamagedError(UserError):
    """Files with other contents than were written."""


class SaveError(UserError):
    """A file or checkpoint could not be written. The previous one is untouched; `__cause__` is the OSError."""


class OtherRunError(UserError):
    """A mirror that holds the checkpoints of another run."""


class DataError(UserError):
    """Token data that does not have the expected form, or no longer has it."""


class TrainingError(RuntimeError):
    """The run cannot continue. The message states the step, the reason and what to try."""


class NotFiniteError(TrainingError):
    """Numbers that stay non-finite: the run rolls back to its last checkpoint."""


class MemoryShortError(TrainingError):
    """Not even the smallest micro-batch fits in memory. Weights and moments are as after the last step."""


class PeerMemoryError(MemoryError):
    """Another process ran out of memory in this step: all processes repeat it with smaller micro-batches."""


class Interrupted(Exception):
    """A stop request ended an evaluation. Nothing changed; a resumed run repeats the evaluation."""


class EngineError(RuntimeError):
    """The decoding engine is closed or has failed."""


class OutputError(RuntimeError):
    """Standard output cannot be written. `__cause__` is the OSError."""


class Removed(Exception):
    """A filter removes a document; the text is the reason."""


class CannotRecord(RuntimeError):
    """A model's decode step cannot be recorded, or a record differs from the model. The model's own forward runs."""


class EncoderDiffersError(Exception):
    """The fast encoder's ids differ from the tokenizer's. The tokenizer's own encoder continues."""


class StopForward(Exception):
    """Ends a forward pass when the rest is not needed."""


class ApiError(Exception):
    """An error response of the server. param: the wrong field. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
