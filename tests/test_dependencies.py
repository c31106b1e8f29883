"""pyproject.toml declares what is imported, and what is installed here is within its bounds."""

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()
}
GRAPHS = EXTRAS["onnx"] + EXTRAS["openvino"]
OF_EXTRAS = {"quantized": "quant", "adapters": "adapters"}  # files of vtwcli.models
ALWAYS = [Requirement(line) for line in PROJECT["dependencies"]]
EVERY = ALWAYS + GRAPHS + EXTRAS["quant"] + EXTRAS["adapters"]
BESIDE = {"vtw_ort", "vtw_pixels"}  # lie beside run_onnx.py in an exported directory


def imported(file):
    """The packages that a file imports, wherever in it, but the standard library's and those of this repository."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
    own = {"vtwcli", "tests", *BESIDE, *(path.stem for path in (ROOT / "tests/benchmarks").glob("*.py"))}
    return names - set(sys.stdlib_module_names) - own


def undeclared(files, requirements):
    """What is imported and in none of the requirements, with a file that imports it."""
    declared = {canonicalize_name(one.name) for one in requirements}
    homes = metadata.packages_distributions()
    return {
        name: str(file.relative_to(ROOT))
        for file in files
        for name in imported(file)
        if not declared & {canonicalize_name(home) for home in homes.get(name, [name])}
    }


def needs_onnx(file):
    parts = file.relative_to(ROOT).parts
    return "onnx" in parts or "web" in parts or file.stem == "ort" or "ort" in parts


def test_the_package_declares_what_it_imports():
    files = sorted((ROOT / "vtwcli").rglob("*.py"))
    assert len(files) > 100
    plugin = ROOT / "vtwcli/lmms_eval.py"  # only lmms-eval loads it, which brings tqdm
    assert undeclared([plugin], ALWAYS).keys() <= {"lmms_eval", "tqdm"}
    extra = {ROOT / f"vtwcli/models/{name}.py": EXTRAS[key] for name, key in OF_EXTRAS.items()}
    plain = [file for file in files if not needs_onnx(file) and file not in (*extra, plugin)]
    assert undeclared(plain, ALWAYS) == {}
    for file, requirements in extra.items():
        assert undeclared([file], ALWAYS + requirements) == {}
    assert undeclared(filter(needs_onnx, files), ALWAYS + GRAPHS) == {}


def test_the_tests_declare_what_they_import():
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert undeclared(files, EVERY + EXTRAS["test"]) == {}


@pytest.mark.parametrize(
    "requirement",
    [*EVERY, *EXTRAS["test"][1:]],
    ids=lambda requirement: requirement.name,
)
def test_what_is_installed_is_within_the_bounds(requirement):
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert requirement.specifier.contains(installed, prereleases=True)
