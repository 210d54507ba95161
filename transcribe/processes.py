"""Which process of this machine it is, and whether it has ended, as /proc tells."""

from __future__ import annotations

from pathlib import Path


def started(pid: int) -> str:
    """Tells a process from a later one with its number; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def child_named(name: str, parent: int) -> int | None:
    """Number of a process that `parent` has started; None where there is none."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            told, rest = stat.read_text().partition("(")[2].rsplit(")", 1)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if told == name and int(rest.split()[1]) == parent:
            return int(stat.parent.name)
    return None
