"""`make demo`: speak a sample archive, transcribe it, score it against its own scripts.

The archive is synthesised speech, so its word error rate says that the whole path works,
not how well real calls will be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pyarrow import parquet
from rich.console import Console

from jobs.sample_archive import make_sample_archive
from transcribe import run
from transcribe.config import RunConfig
from transcribe.ending import process_of
from transcribe.errors import TranscribeError
from transcribe.progress import print_summary
from transcribe.score import Score, score_texts


def demo(
    folder: Annotated[Path, typer.Argument(help="Where archive and output go.")] = Path("demo"),
) -> None:
    """Make a sample archive, transcribe it and show how to read the result."""
    console = Console()
    archive, out = folder / "archive", folder / "out"
    try:
        console.print(f"Speaking a sample archive into {archive} ...")
        reference = make_sample_archive(archive)
        result = run.transcribe(
            RunConfig(str(archive), str(out), speakers=("agent", "customer"), max_failed=1.0),
            address=None,
            console=console,
        )
        score = _score(reference, out / "transcripts")
    except TranscribeError as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    _show(console, result, score, out)


def _score(reference: Path, transcripts: Path) -> Score:
    """Word error rate over the recordings whose script is known."""
    table = parquet.read_table(transcripts, columns=["uri", "text"]).to_pydict()
    heard = dict(zip(table["uri"], table["text"], strict=True))
    entries = [json.loads(line) for line in reference.read_text(encoding="utf-8").splitlines()]
    spoken = [entry for entry in entries if entry["text"]]
    return score_texts(
        [entry["text"] for entry in spoken],
        [heard.get(entry["uri"], "") for entry in spoken],
        ["en"] * len(spoken),
    )


def _show(console: Console, result: dict[str, Any], score: Score, out: Path) -> None:
    if result["recordings"]:
        print_summary(console, result)
    console.print(
        f"Word error rate against the scripts: {score.wer:.1%} of {score.words:,} words"
        " (synthetic voices)\n\nOpen the transcripts:",
        highlight=False,
    )
    files = f"{out}/transcripts/*.parquet"
    for line in (
        f"""  duckdb:  duckdb.sql("SELECT uri, status, text FROM '{files}'")""",
        f"""  pandas:  pandas.read_parquet("{out}/transcripts")""",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    with process_of():
        typer.run(demo)
