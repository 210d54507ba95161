"""`python -m jobs.benchmark`: the same as `transcribe bench`."""

from __future__ import annotations

import typer

from transcribe.cli import bench


def main() -> None:
    """Parse the same flags as `transcribe bench` and exit with its code."""
    app = typer.Typer(
        add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
    )
    app.command()(bench)
    app()


if __name__ == "__main__":
    main()
