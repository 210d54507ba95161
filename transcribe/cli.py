"""The `transcribe` command: flags in, exit code out.

Owns wording of the help and the meaning of exit codes (0 done, 1 done but too many
recordings failed, 2 could not be done, 3 stopped by its budget, 130 interrupted, 143 told to end).
All work is in `run.py` and `evaluate.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from transcribe.config import EMBEDDED_MODEL, RunConfig
from transcribe.ending import ending_in_time, process_of
from transcribe.errors import TranscribeError
from transcribe.notify import Notifier, notifier
from transcribe.printable import printable

if TYPE_CHECKING:
    from transcribe.preflight import Check

app = typer.Typer(
    help="Transcribe archives of audio recordings on Ray: one Parquet row per recording.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_SPEECH = "What is heard"
_PLACE = "Where it runs"
_BUDGET = "What it may cost, and who is told"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"transcribe {version('transcribe')}")
        raise typer.Exit


@app.callback()
def _common(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version),
    ] = False,
) -> None:
    """Transcribe archives of audio recordings on Ray: one Parquet row per recording."""


# Flags that more than one command has.
_Archive = Annotated[
    str,
    typer.Argument(
        help="Recordings: a directory, a prefix (`gs://bucket/calls`), a glob, one file, or a"
        " manifest (CSV, JSONL or Parquet with a `uri` column; other columns are carried"
        " through as `metadata`).",
        metavar="ARCHIVE",
        show_default=False,
    ),
]
_Model = Annotated[
    str,
    typer.Option(
        help="The embedded model, a directory or `gs://` prefix of weights, or a hub id"
        " (`facebook/wav2vec2-base-960h`): Whisper as CTranslate2 or safetensors, CTC models"
        " (wav2vec2, HuBERT, Parakeet-CTC ...) as safetensors."
    ),
]
_Engine = Annotated[
    str | None,
    typer.Option(
        help="What runs the model: `whisper-int8` (CPU), `whisper-ctranslate2`,"
        " `whisper-transformers` or `ctc-transformers`; left out, its files and the device decide."
    ),
]
_Lm = Annotated[
    str | None,
    typer.Option(help="KenLM n-gram that helps a CTC model choose words (`.arpa`, `.bin`)."),
]
_Task = Annotated[
    str,
    typer.Option(
        help="`transcribe`, or `translate` into English (Whisper only).",
        rich_help_panel=_SPEECH,
    ),
]
_Words = Annotated[
    bool,
    typer.Option(
        "--words", help="Give every word its times and probability.", rich_help_panel=_SPEECH
    ),
]
_Language = Annotated[
    str | None,
    typer.Option(
        help="Language of all speech (`en`, `de`, ...); left out, it is detected from each"
        " recording's speech.",
        rich_help_panel=_SPEECH,
    ),
]
_Channels = Annotated[
    str,
    typer.Option(
        help="`split` keeps channels apart, `mix` averages them, `auto` splits unless they"
        " carry the same signal.",
        rich_help_panel=_SPEECH,
    ),
]
_Headerless = Annotated[
    str | None,
    typer.Option(
        help="What `.raw`, `.pcm` and other files without a header hold, as"
        " `encoding:rate:channels`: `mulaw:8000:1`, `s16le:8000:2`.",
        rich_help_panel=_SPEECH,
    ),
]
_DeviceFlag = Annotated[
    str,
    typer.Option(help="`cpu`, `cuda`, or `auto`: GPUs if there are any.", rich_help_panel=_PLACE),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        help="Engines at work at once; left out, one per GPU or core"
        " (in a cluster of CPUs, seven of eight).",
        rich_help_panel=_PLACE,
    ),
]
_ShardMinutes = Annotated[
    float | None,
    typer.Option(
        help="Audio minutes worked on and published together; left out, 1/64 of the archive,"
        " from 2 to 60 minutes.",
        rich_help_panel=_PLACE,
    ),
]


@app.command()
def run(
    archive: _Archive,
    out: Annotated[
        str,
        typer.Argument(
            help="Where transcripts and reports go: a directory or a prefix. Run the same command"
            " again to go on after an interruption or to add new recordings.",
            metavar="OUT",
            show_default=False,
        ),
    ],
    model: _Model = EMBEDDED_MODEL,
    engine: _Engine = None,
    lm: _Lm = None,
    task: _Task = "transcribe",
    words: _Words = False,
    language: _Language = None,
    channels: _Channels = "auto",
    speakers: Annotated[
        str,
        typer.Option(
            help="Who is on which channel, in channel order: `agent,customer`.",
            rich_help_panel=_SPEECH,
        ),
    ] = "",
    headerless: _Headerless = None,
    max_failed: Annotated[
        float,
        typer.Option(help="Largest share of failed recordings that still exits 0."),
    ] = 0.05,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to join (`auto` for the one on this machine). Left out: $RAY_ADDRESS"
            " if set, which a submitted job has, else an embedded Ray on this machine.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    device: _DeviceFlag = "auto",
    workers: _Workers = None,
    shard_minutes: _ShardMinutes = None,
    wait_for_workers: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for the cluster to bring up a first worker.",
            rich_help_panel=_PLACE,
        ),
    ] = 600.0,
    max_workers: Annotated[
        int | None,
        typer.Option(
            help="Engines at most, however large the cluster is or grows.", rich_help_panel=_PLACE
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            help="US dollars per hour of one machine; left out, the price catalogue is asked for"
            " the cluster's machine types.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    machine_type: Annotated[
        str | None,
        typer.Option(
            help="What machines are that do not say it themselves, as the catalogue names it:"
            " `g2-standard-4`, `g2-standard-4:spot`.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    max_spend: Annotated[
        float | None,
        typer.Option(
            help="US dollars after which the run stops at the end of a shard, with exit code 3.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    max_hours: Annotated[
        float | None,
        typer.Option(help="Hours after which it stops in the same way.", rich_help_panel=_BUDGET),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Webhook that gets JSON (with `text`, as Slack wants it) when 50, 80 and 100 % of"
            " the budget are used and when the run ends; signed if $TRANSCRIBE_NOTIFY_SECRET is"
            " set.",
            envvar="TRANSCRIBE_NOTIFY_URL",
            show_envvar=True,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    notify_command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Program that gets the same JSON on its standard input; no shell is involved.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
) -> None:
    """Transcribe ARCHIVE into OUT.

    Every recording ends as exactly one row of `OUT/transcripts/*.parquet`: `ok`, `empty` (no
    speech) or `failed` (with the reason). Recordings that have a row are not done again, but for
    those that could not be read from their store.
    """
    console = Console()
    try:
        # What the user wrote is checked before anything heavy is imported.
        names = tuple(n.strip() for n in speakers.split(",")) if speakers else ()
        config = RunConfig(
            archive=archive,
            out=out,
            model=model,
            engine=engine,  # type: ignore[arg-type]  # RunConfig checks it
            language_model=lm,
            task=task,  # type: ignore[arg-type]
            words=words,
            headerless=headerless,
            language=language,
            channels=channels,  # type: ignore[arg-type]
            speakers=names,
            device=device,  # type: ignore[arg-type]
            workers=workers,
            shard_minutes=shard_minutes,
            max_failed=max_failed,
            wait_for_workers_s=wait_for_workers,
            max_workers=max_workers,
            price_per_hour=price_per_hour,
            machine_type=machine_type,
            max_spend=max_spend,
            max_hours=max_hours,
        )
        news = notifier(notify, notify_command)
        with ending_in_time(_complain, _STAYS):
            result = _run(config, address or os.environ.get("RAY_ADDRESS"), console, news)
    except TranscribeError as error:
        _complain(error)
        raise typer.Exit(2) from None
    if result["budget_reached"]:
        why = f"Stopped: {result['budget_reached']}; {_STAYS}"
        _show(console, why)
        raise typer.Exit(3)
    raise typer.Exit(_exit_code(result, max_failed, console))


def _run(
    config: RunConfig, address: str | None, console: Console, news: Notifier
) -> dict[str, Any]:
    from transcribe import run as driver
    from transcribe.progress import print_summary

    result = driver.transcribe(config, address, console, news)
    if result["recordings"]:
        print_summary(console, result)
    elif not result["budget_reached"]:
        console.print("Nothing left to do.")
    console.file.flush()  # a signal that comes while Ray leaves ends the process without it
    return result


_STAYS = "what is published stays. Run the same command again to go on."


def _exit_code(result: dict[str, Any], max_failed: float, console: Console) -> int:
    counts = result["published"]
    total = sum(counts.values())
    share = counts["failed"] / total if total else 0.0
    if share > max_failed:
        _show(
            console,
            f"{counts['failed']} of {total} recordings in {result['out']} failed ({share:.1%}),"
            f" more than --max-failed {max_failed:.1%}. The transcripts are kept; see"
            " error_message.",
        )
    unlisted = result["unlisted_folders"]
    if unlisted:
        _show(
            console,
            f"Folders of {result['archive']} that could not be listed: {unlisted} (named above)."
            " What is in them is not transcribed; make them readable and run the same command"
            " again.",
        )
    return int(share > max_failed or bool(unlisted))


def _show(console: Console, line: str) -> None:
    """Print a line as it is: nothing in it is markup, and it is not broken."""
    console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


def _complain(message: object) -> None:
    Console(stderr=True).print(
        f"Error: {printable(str(message))}",
        style="red",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


@app.command()
def plan(
    archive: _Archive,
    out: Annotated[
        str | None,
        typer.Option(
            help="The OUT of the run to come: what is done there is left out, and the forecast is"
            " kept there, so that the run's report can say how far it was off.",
        ),
    ] = None,
    model: _Model = EMBEDDED_MODEL,
    engine: _Engine = None,
    lm: _Lm = None,
    task: _Task = "transcribe",
    words: _Words = False,
    language: _Language = None,
    channels: _Channels = "auto",
    headerless: _Headerless = None,
    device: _DeviceFlag = "auto",
    workers: _Workers = None,
    shard_minutes: _ShardMinutes = None,
    sample: Annotated[
        int,
        typer.Option(min=0, help="Headers to read, spread over the archive; 0 reads them all."),
    ] = 1_000,
    try_here: Annotated[
        bool,
        typer.Option(
            "--pilot/--no-pilot",
            help="Transcribe some minutes of the archive on this machine, to learn how much speech"
            " there is in it and how fast that goes.",
        ),
    ] = True,
    deadline: Annotated[
        float, typer.Option(metavar="HOURS", help="When it has to be ready.", min=0.01)
    ] = 24.0,
    price_per_hour: Annotated[
        float | None, typer.Option(help="US dollars per hour of this machine.")
    ] = None,
    prices_file: Annotated[
        str | None,
        typer.Option("--prices", metavar="FILE", help="Another catalogue of machines and prices."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=USD",
            help="Another price of one kind of machine: `g2-standard-4:spot=0.25`; repeatable.",
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Kinds of machines to show.")] = 8,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the forecast there as JSON.")
    ] = None,
) -> None:
    """Say what ARCHIVE holds, and how long and how much it will take, before anything is spent."""
    console = Console()
    try:
        config = RunConfig(
            archive=archive,
            out=out if out is not None else "none",
            model=model,
            engine=engine,  # type: ignore[arg-type]  # RunConfig checks it
            language_model=lm,
            task=task,  # type: ignore[arg-type]
            words=words,
            headerless=headerless,
            language=language,
            channels=channels,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            workers=workers,
            shard_minutes=shard_minutes,
            price_per_hour=price_per_hour,
        )
        from transcribe import forecast
        from transcribe.prices import load_catalogue

        made = forecast.forecast(
            config,
            out=out,
            n_sampled=sample or None,
            try_here=try_here,
            catalogue=load_catalogue(prices_file, price or ()),
            deadline_hours=deadline,
            say=partial(_show, console),
        )
        made.keep(out, json_file)
        for line in made.lines(show):
            _show(console, line)
    except TranscribeError as error:
        _complain(error)
        raise typer.Exit(2) from None


@app.command()
def status(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The OUT of a run: a directory or a prefix.", show_default=False
        ),
    ],
    watch: Annotated[
        float | None,
        typer.Option(
            min=1.0, metavar="SECONDS", help="Show it again every so often until the run ends."
        ),
    ] = None,
) -> None:
    """Show how the newest run into OUT is doing, from anywhere that OUT can be read."""
    from transcribe import status as reader

    console = Console()
    try:
        while True:
            runs, now = reader.latest(out), time.time()
            for progress in runs:
                for label, text in reader.lines(progress, now):
                    _show(console, f"{label:12}{text}")
            if watch is None or all(run.life(now) != "running" for run in runs):
                return
            time.sleep(watch)
    except TranscribeError as error:
        _complain(error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def score(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The OUT of a run: a directory or a prefix.", show_default=False
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="What was said: CSV, JSONL or Parquet with the columns `uri` (or `path`) and"
            " `reference` (or `text`), and if you like `language` and `kind`. An empty reference"
            " means that nobody speaks, null that it is not known.",
            show_default=False,
        ),
    ],
    worst: Annotated[
        int, typer.Option(min=0, help="Recordings to show in detail, most errors first.")
    ] = 10,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the score of every recording there as JSON."
        ),
    ] = None,
) -> None:
    """Compare the transcripts in OUT with what was said: word and character error rates.

    Texts are compared without case and punctuation, after Whisper's normaliser. Needs
    `pip install '.[score]'`.
    """
    console = Console()
    try:
        for line in _score(out, reference, worst, json_file):
            _show(console, line)
    except TranscribeError as error:
        _complain(error)
        raise typer.Exit(2) from None


def _score(out: str, reference: str, worst: int, json_file: str | None) -> Iterator[str]:
    from transcribe import storage
    from transcribe.evaluate import evaluate, json_bytes
    from transcribe.scoreboard import lines

    evaluation = evaluate(out, reference)
    if json_file is not None:
        storage.put(storage.absolute(json_file), json_bytes(evaluation))
    yield from lines(evaluation, worst)


@app.command()
def preflight(
    cluster: Annotated[
        str,
        typer.Argument(
            help="`local` for this machine, the address of a running cluster's head"
            " (`10.0.0.1:6379`), or the file for `ray up` (`ray-cluster.yaml`).",
            metavar="CLUSTER",
        ),
    ] = "local",
    archive: Annotated[
        str | None,
        typer.Argument(metavar="ARCHIVE", help="Try to list and read it.", show_default=False),
    ] = None,
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Try to write to it.", show_default=False)
    ] = None,
    model: Annotated[
        str, typer.Option(help="Find and check these weights, on every machine of the cluster.")
    ] = EMBEDDED_MODEL,
) -> None:
    """Try everything a job needs before it costs anything; exits 2 if something is missing."""
    console = Console()
    failed = False
    try:
        for check in _checks(cluster, archive, out, model):
            failed |= check.outcome == "failure"
            remedy = f" -> {check.remedy}" if check.remedy else ""
            line = f"{check.outcome:8}{check.name}: {check.found}{remedy}"
            _show(console, line)
    except TranscribeError as error:
        _complain(error)
        failed = True
    raise typer.Exit(2 if failed else 0)


def _checks(cluster: str, archive: str | None, out: str | None, model: str) -> Iterator[Check]:
    from cluster.cluster_file import cluster_file_checks
    from transcribe import distributed
    from transcribe import preflight as checks

    yield from checks.local_checks(model, None)
    if archive is not None:
        yield checks.archive_check(archive)
    if out is not None:
        yield checks.out_check(out)
    if cluster.endswith((".yaml", ".yml")):
        yield from cluster_file_checks(Path(cluster), Path.home())
    elif cluster != "local":
        distributed.connect(cluster, workers=None)
        try:
            yield from checks.cluster_checks(distributed.on_every_node(model, None))
        finally:
            distributed.disconnect()


@app.command()
def bench(
    out: Annotated[
        Path,
        typer.Option(help="Folder for `report.html`, `report.json` and logs.", show_default=False),
    ],
    archive: Annotated[
        str | None,
        typer.Argument(
            metavar="ARCHIVE",
            help="Recordings on this machine, as for `run`; left out, some are spoken by a"
            " synthesiser.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What is said in ARCHIVE, as for `score`; recordings it does not name are left"
            " out.",
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            help="What to speak without ARCHIVE: `calls` (5 to 600 s, many pauses), `clips` (1 to"
            " 10 s), `long` (over 10 minutes) or `codecs` (many formats)."
        ),
    ] = "calls",
    minutes: Annotated[
        float | None,
        typer.Option(help="Audio minutes to take or to speak; left out, all, or 10."),
    ] = None,
    model: Annotated[str, typer.Option(help="As for `run`.")] = EMBEDDED_MODEL,
    language: Annotated[
        str | None, typer.Option(help="Language of all speech, told to every contender.")
    ] = "en",
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
    only: Annotated[str, typer.Option(help="Names of contenders, separated by commas.")] = "",
    whole: Annotated[
        bool, typer.Option("--whole", help="Slow peers get all files too, not a quarter.")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Measure one worker on one core as well.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(help="Price of this machine per hour, to reckon cost with.")
    ] = None,
) -> None:
    """Measure this program and every installed peer on the same files, weights and cores.

    Needs `pip install '.[bench]'`.
    """
    say = partial(Console().print, highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        from jobs.benchmark.bench import Options, benchmark, table

        options = Options(
            archive=archive,
            out=out,
            reference=reference,
            shape=shape,
            minutes=minutes,
            model=model,
            language=language,
            device=device,
            rounds=rounds,
            only=[name.strip() for name in only.split(",") if name.strip()],
            whole=whole,
            scaling=scaling,
            price=price,
        )
        report = benchmark(options, say)
        say("\n".join(["", *table(report), "", f"report  {out / 'report.html'}"]))
    except ModuleNotFoundError as error:
        _complain(f"{error.name} is not installed: pip install '.[bench]'")
        raise typer.Exit(2) from None
    except TranscribeError as error:
        _complain(error)
        raise typer.Exit(2) from None
    if all(contender["not_run"] for contender in report["contenders"]):
        _complain("nothing could be measured; the table says why.")
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `transcribe` command."""
    with process_of():
        app()
