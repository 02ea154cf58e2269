"""What can go wrong in an export, for the command line to turn into a line and an exit status."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be done as asked. The message says why and what would help."""

    exit_status = 2


class ParityError(ExportError):
    """The graphs do not do what the model does, within the bounds. The message has the figures; nothing was written."""

    exit_status = 1
