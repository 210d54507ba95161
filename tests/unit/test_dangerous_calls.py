"""No call in this package hands foreign data to something that would run it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for d in ("transcribe", "jobs", "cluster") for p in (ROOT / d).rglob("*.py"))

BUILTIN = {"eval", "exec", "compile", "__import__"}  # as methods they are others' (model.eval())
# Called by any of these names, whatever they were imported as part of.
RUNS_CODE = {
    "system", "popen", "getoutput", "getstatusoutput",
    "spawnl", "spawnlp", "spawnv", "spawnvp", "execl", "execlp", "execv", "execvp", "execvpe",
    "read_pickle", "unsafe_load", "full_load", "mktemp", "extractall",
}  # fmt: skip
OF_A_MODULE = {
    ("pickle", "load"), ("pickle", "Unpickler"), ("torch", "load"), ("yaml", "load"),
    ("torch", "hub"), ("np", "load"), ("numpy", "load"), ("joblib", "load"),
}  # fmt: skip
TURNED_ON = {"shell", "trust_remote_code", "allow_pickle"}
TURNED_OFF = {"verify", "verify_ssl", "check_hostname", "weights_only"}


def dangers(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in OF_A_MODULE:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTIN | RUNS_CODE:
                found.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in RUNS_CODE:
                found.append(node.func.attr)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", keyword.value)
                if keyword.arg in TURNED_ON and value is not False:
                    found.append(f"{keyword.arg}={value}")
                if keyword.arg in TURNED_OFF and value is not True:
                    found.append(f"{keyword.arg}={value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_foreign_is_run(path: Path) -> None:
    assert dangers(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_what_is_unpickled_is_our_own() -> None:
    """Between this package's own processes; never a file, an object or a download."""
    using = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pickle"
    }
    assert using <= {"distributed.py", "isolation.py"}


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run(x, shell=True)", "os.system(x)", "eval(x)", "torch.load(f)",
        "pickle.load(f)", "AutoModel.from_pretrained(m, trust_remote_code=True)",
        "requests.get(u, verify=False)", "tar.extractall(p)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert dangers(ast.parse(code)) != []
