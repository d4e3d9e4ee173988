"""What a failure means to the user: one message and an exit code."""

from __future__ import annotations

import errno

from hawqkit.errors import FileError, HawqkitError

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
MOST_PROBLEMS = 18  # of a file: more would not fit one screen

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command to go on",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command to go on",
    errno.EACCES: "permission denied; choose a place that you may write to",
    errno.EPERM: "permission denied; choose a place that you may write to",
    errno.EFBIG: "the file is too large for this file system or your limit; choose another place",
    errno.EROFS: "the file system is read-only; choose a place that you may write to",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
    errno.EEXIST: "a file of this name is in the way",
    errno.ENAMETOOLONG: "the name is too long for the file system",
}


def explain_failure(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code of an expected failure; None where the traceback is needed."""
    if isinstance(error, FileError):
        return _file_message(error), error.exit_code
    if isinstance(error, HawqkitError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and error.errno in _REASONS:
        place = error.filename2 or error.filename
        return f"error: {f'{place}: ' if place else ''}{_REASONS[error.errno]}.", FAILED
    # safetensors and the tokenizers' library report a full disk in their own exceptions' text.
    if "No space left on device" in str(error) or "os error 28" in str(error):
        return f"error: {_REASONS[errno.ENOSPC]}.", FAILED
    return None


def _file_message(error: FileError) -> str:
    lines = str(error).split("\n")
    first = lines[: MOST_PROBLEMS + 1]
    more = len(lines) - len(first)
    return "\n".join(["error: " + first[0], *first[1:], *([f"  and {more} more."] if more else [])])
