"""The catalogue of machines: what an hour of one costs, how fast its devices recognise.

Owns the form of `cluster/prices.yaml` and of the files that `--prices` names. Looks nothing up
live. Knows nothing of archives, runs or Ray.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from transcribe import storage
from transcribe.errors import Fatal

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Entry):
    """US dollars per hour of one machine, and where the figure is from."""

    usd: Positive
    date: datetime.date
    source: str


class Machine(_Entry):
    """A machine type that can be rented.

    Attributes:
        gpu: Ray's name of its GPU type (`L4`, `A100`, ...); None without GPUs.
        gpus: number of them.
    """

    name: str
    gpu: str | None = None
    gpus: Annotated[int, Field(ge=0)]
    cpus: Annotated[int, Field(ge=1)]
    region: str
    on_demand: Price
    spot: Price | None = None


class Speed(_Entry):
    """Seconds of speech that one device recognises a second, for one model.

    Attributes:
        device: a GPU's type, or `cpu` for one core.
        model: the model's name, without the owner on a hub.
        basis: who measured; everything but `measured` is a rough guide to this program.
    """

    device: str
    model: str
    rtfx: Positive
    basis: Literal["measured", "published", "estimated"]
    source: str


class Catalogue(_Entry):
    """All that is known of machines.

    Several prices of one machine are kinds of it: `g2-standard-4` on demand,
    `g2-standard-4:spot` at the spot price.
    """

    machines: tuple[Machine, ...]
    speeds: tuple[Speed, ...] = ()

    def kinds(self) -> dict[str, tuple[Machine, Price]]:
        """Every priced kind of machine by its name, on demand before spot."""
        found: dict[str, tuple[Machine, Price]] = {}
        for machine in self.machines:
            found[machine.name] = (machine, machine.on_demand)
            if machine.spot is not None:
                found[f"{machine.name}:spot"] = (machine, machine.spot)
        return found

    def usd_per_hour(self, kind: str) -> float | None:
        """Price of a kind of machine; None if it is not in the catalogue."""
        entry = self.kinds().get(kind)
        return entry[1].usd if entry else None

    def speed(self, device: str, model: str) -> Speed | None:
        """What is known of a model on a device, the best founded figure first."""
        name = model.rstrip("/").rpartition("/")[2]
        of_both = [s for s in self.speeds if (s.device, s.model) == (device, name)]
        order = ("measured", "published", "estimated")
        return min(of_both, key=lambda s: order.index(s.basis), default=None)


def load_catalogue(file: str | None = None, overrides: Iterable[str] = ()) -> Catalogue:
    """Read the project's catalogue, or the one that the user names.

    Args:
        file: local path or URL of a file of the same form; None takes `cluster/prices.yaml`.
        overrides: prices of single kinds, each as `KIND=USD`.

    Raises:
        Fatal: the file is missing, or not a catalogue; an override is not of that form.
    """
    if file is None:
        where = "cluster/prices.yaml"
        text = resources.files("cluster").joinpath("prices.yaml").read_bytes()
    else:
        where = storage.absolute(file)
        text = _read(where)
    try:
        content = yaml.safe_load(text)
        wanted = {k: v for k, v in content.items() if not k.startswith("x-")}
        catalogue = Catalogue.model_validate(wanted)
    except (yaml.YAMLError, AttributeError, ValidationError) as error:
        raise Fatal(f"--prices {where} is not a price catalogue ({_why(error)}).") from None
    for override in overrides:
        catalogue = _overridden(catalogue, override)
    return catalogue


def price_list(
    price_per_hour: float | None, machine_type: str | None
) -> Callable[[str], float | None]:
    """Kind of machine -> US dollars per hour, or None if nobody knows.

    Args:
        price_per_hour: counts for every machine; None asks the catalogue.
        machine_type: kind that machines count as which the catalogue does not know.

    Raises:
        Fatal: `machine_type` is not in the catalogue.
    """
    if price_per_hour is not None:
        return lambda kind: price_per_hour
    catalogue = load_catalogue()
    otherwise = catalogue.usd_per_hour(machine_type) if machine_type is not None else None
    if machine_type is not None and otherwise is None:
        known = ", ".join(catalogue.kinds())
        raise Fatal(f"--machine-type {machine_type!r} is not in the price catalogue ({known}).")

    def price(kind: str) -> float | None:
        found = catalogue.usd_per_hour(kind)
        return otherwise if found is None else found

    return price


def _read(url: str) -> bytes:
    if not storage.exists(url):
        raise Fatal(f"--prices {url}: there is no such file.")
    return storage.read(url)


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}"
    if isinstance(error, AttributeError):
        return "not a mapping with `machines`"
    return str(error).partition("\n")[0]


def _overridden(catalogue: Catalogue, override: str) -> Catalogue:
    kind, separator, figure = override.partition("=")
    try:
        usd = float(figure) if separator else 0.0
    except ValueError:
        usd = 0.0
    if not 0 < usd < float("inf"):
        raise Fatal(f"--price {override!r}: write it as KIND=USD, like g2-standard-4:spot=0.25.")
    if kind not in catalogue.kinds():
        known = ", ".join(catalogue.kinds())
        raise Fatal(f"--price {override!r}: no machine {kind!r} in the catalogue; it has {known}.")
    price = Price(usd=usd, date=datetime.datetime.now(datetime.UTC).date(), source="--price")
    name, _, market = kind.partition(":")
    column: dict[str, Any] = {"spot" if market else "on_demand": price}
    machines = [m.model_copy(update=column) if m.name == name else m for m in catalogue.machines]
    return catalogue.model_copy(update={"machines": tuple(machines)})
