"""Nothing that crosses a boundary is run: no pickle, no code from files, safetensors only.

Reads the syntax tree of every file of the package. What may be there all the same is listed with
its reason, and must still be there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "symbiosis"

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Reading with them runs what is read."""

CALLS = {
    "eval", "exec", "compile", "__import__", "execfile",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "pandas.read_pickle", "runpy.run_path", "runpy.run_module",
    "importlib.util.spec_from_file_location", "os.system", "os.popen", "subprocess.getoutput",
}  # fmt: skip

FALSE_ONLY = {"trust_remote_code", "allow_pickle", "shell"}
TRUE_ONLY = {"weights_only", "use_safetensors"}
"""Arguments that may only be given this one way."""


ALLOWED: dict[tuple[str, str], str] = {
    ("client/remote_weight.py", "multiprocessing.reduction"): (
        "registers how a handle goes to a DataLoader's worker, a child of the same program"
    ),
    ("client/remote_weight.py", "multiprocess.reduction"): "the same for the workers of datasets",
}


def findings(text: str, name: str = "sample.py") -> Iterator[tuple[str, str]]:
    """(file, what) for everything in a file that should not be there."""
    for node in ast.walk(ast.parse(text)):
        for found in _of(node):
            if (name, found) not in ALLOWED:
                yield name, found


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _runs(alias.name))
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if _runs(module):
            yield module
        for alias in node.names:
            if f"{module}.{alias.name}" in CALLS or alias.name in MODULES:
                yield f"{module}.{alias.name}"
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.FunctionDef) and node.name in ("__setstate__", "find_class"):
        yield node.name


def _of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in CALLS:
        yield called
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    for argument, value in given.items():
        constant = value.value if isinstance(value, ast.Constant) else None
        if (argument in FALSE_ONLY and constant is not False) or (
            argument in TRUE_ONLY and constant is not True
        ):
            yield f"{argument}={ast.unparse(value)}"
    automatic = called.startswith("Auto") and called.endswith(".from_pretrained")
    if automatic and "trust_remote_code" not in given:
        yield f"{called} without trust_remote_code=False"


def _runs(module: str) -> bool:
    return module.split(".")[0] in MODULES or module.endswith(".reduction")


def test_the_package() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    found = [
        finding
        for file in files
        for finding in findings(file.read_text(), str(file.relative_to(SOURCE)))
    ]
    assert not found


def test_what_is_allowed_is_still_there() -> None:
    """An exception that nobody needs any more would let the next one in."""
    for name, what in ALLOWED:
        assert what in (SOURCE / name).read_text(), f"{what} in {name}: delete the exception"


@pytest.mark.parametrize(
    "sample",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "import dill, os",
        "import marshal",
        "from multiprocessing.reduction import ForkingPickler",
        "def late():\n    import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "np.fromfile(path, allow_pickle=True)",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "AutoConfig.from_pretrained(folder)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=wanted)",
        "cls.from_pretrained(folder, use_safetensors=False)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "class A:\n    def __setstate__(self, state): ...",
    ],
)
def test_a_planted_sample_is_found(sample: str) -> None:
    assert list(findings(sample))


@pytest.mark.parametrize(
    "sample",
    [
        "import json",
        "model.eval()",
        "re.compile('x')",
        "yaml.safe_load(text)",
        "safetensors.torch.load(data)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=False)",
    ],
)
def test_what_is_harmless_is_not(sample: str) -> None:
    assert not list(findings(sample))
