"""Checks of a Ray cluster launcher file, before `ray up` spends anything on it.

Owns what can be told without the cloud: Ray's own schema and completion of defaults, words that
were left to be replaced, what the bill's upper bound is, and what this machine needs for `ray up`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from transcribe.errors import Fatal
from transcribe.preflight import Check

_PLACEHOLDER = "MY-PROJECT"
_TOKEN = Path(".ray") / "auth_token"


def load_cluster_file(path: Path) -> dict[str, Any]:
    """The file's content, completed and validated by Ray.

    Raises:
        Fatal: it cannot be read, or Ray would refuse it.
    """
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise Fatal(f"{path} cannot be read as YAML ({_first_line(error)}).") from None
    if not isinstance(content, dict) or "provider" not in content:
        raise Fatal(f"{path} is no Ray cluster file: it names no provider.")
    try:
        prepared: dict[str, Any] = prepare_config(copy.deepcopy(content))
        validate_config(prepared)
    except (jsonschema.ValidationError, ValueError, KeyError, TypeError) as error:
        raise Fatal(f"{path}: Ray refuses it ({_first_line(error)}).") from None
    return prepared


def _first_line(error: BaseException) -> str:
    message = getattr(error, "message", None) or str(error)
    return str(message).strip().partition("\n")[0][:300] or type(error).__name__


def cluster_file_checks(path: Path, home: Path) -> Iterator[Check]:
    """What `ray up PATH` would meet.

    Args:
        path: the cluster file.
        home: the user's home, where Ray keeps the token.
    """
    try:
        config = load_cluster_file(path)
    except Fatal as error:
        yield Check("cluster file", "failure", str(error), "compare it with ray-cluster.yaml")
        return
    yield Check("cluster file", "ok", f"{path.name} passes Ray's schema")
    yield _placeholder_check(path)
    yield _bound_check(config)
    yield _token_check(home)
    yield _provider_check(config)


def _placeholder_check(path: Path) -> Check:
    left = [
        number
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _PLACEHOLDER in line and not line.lstrip().startswith("#")
    ]
    if not left:
        return Check("placeholders", "ok", "none left")
    lines = ", ".join(map(str, left))
    return Check(
        "placeholders",
        "failure",
        f"{_PLACEHOLDER} in lines {lines}",
        "put your project's id there",
    )


def _bound_check(config: dict[str, Any]) -> Check:
    """How many machines it may grow to, and whether it goes back to none."""
    types = config["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    kept = {name: kind["min_workers"] for name, kind in workers.items() if kind.get("min_workers")}
    most = ", ".join(f"{kind['max_workers']} {name}" for name, kind in workers.items())
    if kept:
        names = ", ".join(kept)
        return Check("size", "warning", f"{names} never goes to 0", "set min_workers: 0")
    return Check("size", "ok", f"from 0 to {config['max_workers']} machines (at most {most})")


def _token_check(home: Path) -> Check:
    if (home / _TOKEN).is_file():
        return Check("token", "ok", f"~/{_TOKEN} is there")
    return Check(
        "token", "failure", f"no ~/{_TOKEN}", "make it once: ray get-auth-token --generate"
    )


def _provider_check(config: dict[str, Any]) -> Check:
    kind = config["provider"]["type"]
    needed = {"gcp": "googleapiclient", "aws": "boto3"}.get(kind)
    if needed is None or find_spec(needed):
        return Check("provider", "ok", f"{kind} can be called from here")
    remedy = "pip install 'transcribe[cluster]'" if kind == "gcp" else f"pip install {needed}"
    return Check("provider", "failure", f"{kind} needs {needed}", remedy)
