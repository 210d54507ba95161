"""What a run costs while it goes on, when it must stop, and what of it was wasted.

Pure arithmetic over what was observed: knows nothing of Ray, storage or clocks. Money is US
dollars. A machine is a node of the cluster that is paid by the hour, whatever it does; machines of
one price are of one kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

THIS_MACHINE = "this machine"
THRESHOLDS = (0.5, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class PaidMachine:
    """A machine that is up.

    Attributes:
        host: name of it, as `ShardSummary.worker` begins.
        kind: machine type as in the price catalogue, or what it is if that is not known.
        engines: how many engines of this run it can hold.
    """

    host: str
    kind: str
    engines: float


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a run may take: US dollars and hours since it began to pay for machines."""

    max_spend: float | None = None
    max_hours: float | None = None

    def reached(self, usd: float, usd_per_hour: float, hours: float, drain_hours: float) -> str:
        """Why the run must stop now, in words; empty while it may go on.

        What is being worked on is finished first, which takes `drain_hours` and costs as well:
        the limit counts as reached when it would be by then.
        """
        if self.max_spend is not None and usd + drain_hours * usd_per_hour >= self.max_spend:
            return f"--max-spend {self.max_spend:g} is used up"
        if self.max_hours is not None and hours + drain_hours >= self.max_hours:
            return f"--max-hours {self.max_hours:g} are over"
        return ""

    def used(self, usd: float, hours: float) -> float:
        """Share of the tighter limit that is used; 0 without limits."""
        shares = [0.0]
        if self.max_spend is not None:
            shares.append(usd / self.max_spend)
        if self.max_hours is not None:
            shares.append(hours / self.max_hours)
        return max(shares)


@dataclass(slots=True)
class _Kind:
    """What machines of one kind took so far."""

    seconds: float = 0.0
    engine_seconds: float = 0.0
    most: int = 0


@dataclass(slots=True)
class Meter:
    """Machine time and its price, summed over observations.

    Between two observations the machines of the first one are taken to be up.

    Attributes:
        price: US dollars per hour of a kind of machine; None if that is not known.
    """

    price: Callable[[str], float | None]
    kinds: dict[str, _Kind] = field(default_factory=dict)
    host_kinds: dict[str, str] = field(default_factory=dict)
    _up: list[PaidMachine] = field(default_factory=list)
    _at: float | None = None

    def observe(self, nodes: Iterable[PaidMachine], now_s: float) -> None:
        """Account for the time since the last observation; `nodes` are up from now on."""
        if self._at is not None:
            passed = max(0.0, now_s - self._at)
            for node in self._up:
                kind = self.kinds[node.kind]
                kind.seconds += passed
                kind.engine_seconds += passed * node.engines
        self._up, self._at = list(nodes), now_s
        for name, count in Counter(node.kind for node in self._up).items():
            kind = self.kinds.setdefault(name, _Kind())
            kind.most = max(kind.most, count)
        self.host_kinds.update({node.host: node.kind for node in self._up})

    def unpriced(self) -> list[str]:
        """Kinds of machine that were up and have no price."""
        return sorted(name for name in self.kinds if self.price(name) is None)

    @property
    def usd(self) -> float:
        """Spent so far. A kind without a price counts as the dearest one of the run."""
        return sum(k.seconds / 3600 * self._rate(name) for name, k in self.kinds.items())

    @property
    def usd_per_hour(self) -> float:
        """What the machines that are up cost now."""
        return sum(self._rate(node.kind) for node in self._up)

    def _rate(self, kind: str) -> float:
        known = self.price(kind)
        if known is not None:
            return known
        return max((p for p in map(self.price, self.kinds) if p is not None), default=0.0)

    def bill(self, busy_by_host: Mapping[str, float], startup_usd: float) -> Bill:
        """What it came to, by kind of machine.

        Args:
            busy_by_host: seconds that engines recognised, by host.
            startup_usd: spent before the first shard was begun.
        """
        busy: dict[str, float] = {}
        for host, seconds in busy_by_host.items():
            kind = self.host_kinds.get(host)
            if kind is not None:
                busy[kind] = busy.get(kind, 0.0) + seconds
        charged = {
            name: Charge(
                machines=kind.most,
                hours=kind.seconds / 3600,
                usd_per_hour=self.price(name),
                idle_share=_idle(busy.get(name, 0.0), kind.engine_seconds),
            )
            for name, kind in sorted(self.kinds.items())
        }
        return Bill(charged, startup_usd)


def _idle(busy_s: float, engine_s: float) -> float | None:
    return min(1.0, max(0.0, 1.0 - busy_s / engine_s)) if engine_s > 0 else None


@dataclass(frozen=True, slots=True)
class Charge:
    """What machines of one kind took.

    Attributes:
        machines: most of them at once.
        hours: machine hours, summed.
        usd_per_hour: price of one; None if not known.
        idle_share: engine time in which nothing was recognised; None where no engine fits.
    """

    machines: int
    hours: float
    usd_per_hour: float | None
    idle_share: float | None

    @property
    def usd(self) -> float | None:
        """Price of all its hours."""
        return None if self.usd_per_hour is None else self.hours * self.usd_per_hour

    @property
    def idle_usd(self) -> float | None:
        """Price of the idle share."""
        usd = self.usd
        return None if usd is None or self.idle_share is None else usd * self.idle_share


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run cost; without machines, nothing is known."""

    charges: Mapping[str, Charge] = field(default_factory=dict)
    startup_usd: float = 0.0

    def as_report(self, audio_s: float, wasted_shares: Mapping[str, float]) -> dict[str, Any]:
        """The keys `cost` and `machines` of report.json.

        Args:
            audio_s: recordings transcribed, seconds.
            wasted_shares: share of the engines' busy time that went into each avoidable thing.
        """
        priced = [c.usd for c in self.charges.values() if c.usd is not None]
        usd = sum(priced) if priced else None
        idle = sum(c.idle_usd or 0.0 for c in self.charges.values()) if priced else None
        hours = audio_s / 3600
        per_hour = usd / hours if usd is not None and hours > 0 else None
        busy = usd - idle if usd is not None and idle is not None else None
        return {
            "cost": {
                "usd": usd,
                "usd_per_audio_hour": per_hour,
                "usd_per_1000_audio_hours": None if per_hour is None else 1000 * per_hour,
                "idle_usd": idle,
                "startup_usd": None if usd is None else self.startup_usd,
                **{
                    f"{name}_usd": None if busy is None else busy * share
                    for name, share in wasted_shares.items()
                },
            },
            "machines": {
                kind: {
                    "machines": charge.machines,
                    "hours": charge.hours,
                    "usd_per_hour": charge.usd_per_hour,
                    "usd": charge.usd,
                    "idle_share": charge.idle_share,
                    "idle_usd": charge.idle_usd,
                }
                for kind, charge in self.charges.items()
            },
        }
