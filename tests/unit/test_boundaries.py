"""What modules may know, checked on their source; and that the command starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "transcribe").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path, tree in TREES.items()
        if any(name == package or name.startswith(f"{package}.") for name in _imports(tree))
    }


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("ray", {"transcribe/distributed.py"}),
        ("fsspec", {"transcribe/storage.py"}),
        ("gcsfs", {"transcribe/storage.py"}),
        # Between processes of ours, never from a file: the one to Ray's, the other to its child.
        ("pickle", {"transcribe/distributed.py", "transcribe/isolation.py"}),
        ("typer", {"transcribe/cli.py"}),
    ],
)
def test_a_package_is_known_where_it_belongs(package: str, owners: set[str]) -> None:
    library = {name for name in _importers(package) if name.startswith("transcribe/")}
    assert library == owners
    if package != "typer":  # jobs/ has command lines of its own
        peers = {"jobs/benchmark/ray_example.py"}  # somebody else's way, to be compared with
        assert _importers(package) - peers == library


@pytest.mark.parametrize("package", ["dill", "cloudpickle", "joblib", "shelve", "marshal"])
def test_nothing_unpickles_by_another_door(package: str) -> None:
    assert _importers(package) == set()


def test_code_beside_weights_is_never_run() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            named = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
            if named and isinstance(node.value, ast.Constant) and node.value.value is False:
                continue  # said, because transformers otherwise asks the terminal
            spelled = isinstance(node, ast.Constant) and node.value == "trust_remote_code"
            assert not (named or spelled), path
            # torch.load unpickles, and so do numpy.load and pandas when they are asked to.
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path


def test_pure_modules_import_no_machinery() -> None:
    """Arithmetic stays testable without storage, Ray, models or a tokenizer."""
    pure = ["assemble", "batching", "config", "errors", "report", "rows", "schema", "shards"]
    for name in pure:
        found = set(_imports(TREES[ROOT / "transcribe" / f"{name}.py"]))
        roots = {each.split(".")[0] for each in found}
        assert not roots & {"ray", "fsspec", "torch", "ctranslate2", "transformers", "rich"}, name
        assert not {"transcribe.storage", "transcribe.distributed", "transcribe.run"} & found, name


def test_the_command_starts_without_anything_heavy() -> None:
    code = (
        "import sys, transcribe.cli;"
        "print(*{'torch', 'ray', 'numpy', 'pyarrow', 'av', 'ctranslate2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == []


def test_a_ray_that_does_not_come_up_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from transcribe import distributed
    from transcribe.errors import Fatal

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(distributed.ray, "init", late)
    with pytest.raises(Fatal, match="could not be started on this machine"):
        distributed.connect(None, workers=1)
