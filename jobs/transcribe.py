"""`ray job submit ... -- python -m jobs.transcribe ARCHIVE OUT`: the same as `transcribe run`."""

from __future__ import annotations

import typer

from transcribe.cli import run
from transcribe.ending import process_of


def main() -> None:
    """Parse the same flags as `transcribe run` and exit with its code."""
    app = typer.Typer(
        add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
    )
    app.command()(run)
    with process_of():
        app()


if __name__ == "__main__":
    main()
