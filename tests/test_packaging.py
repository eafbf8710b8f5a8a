"""The package holds what the tree holds, installs under one name, and stays readable."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import gradstore

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LONGEST = 400


def folders() -> dict[str, Path]:
    """Every package that the tree holds, by its import name."""
    mapped = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
    found = {}
    for name, top in mapped.items():
        for folder in {path.parent for path in top.rglob("*.py")}:
            found[".".join([name, *folder.relative_to(top).parts])] = folder
    return found


def sources() -> list[Path]:
    return sorted(path for folder in folders().values() for path in folder.glob("*.py"))


def test_packages_are_the_folders_that_hold_python() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders())
    assert all((folder / "__init__.py").is_file() for folder in folders().values())


def test_every_data_file_is_declared() -> None:
    declared = SETUPTOOLS["package-data"]
    for name, folder in folders().items():
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                patterns = declared.get(name, [])
                assert any(path.match(pattern) for pattern in patterns), f"{path} is left out"


def test_the_wheel_holds_all_of_it_under_one_name(tmp_path: Path) -> None:
    try:
        major = int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        major = 0
    if major < 77:
        pytest.skip("building without isolation needs setuptools >= 77 in this environment")
    tree = tmp_path / "tree"  # setuptools leaves its build folder where it builds
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout, so what belongs to the tree is not known")
    for name in listed.stdout.splitlines():
        if (source := ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "would be ignored" not in built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert archive.read(info).split() == [b"gradstore"]
        entry_points = archive.read(info.replace("top_level", "entry_points")).decode()
        metadata = archive.read(info.replace("top_level.txt", "METADATA")).decode()
    assert "gradstore = gradstore.cli.main:main" in entry_points
    assert f"\nVersion: {gradstore.__version__}\n" in metadata
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in folders().items()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {
        "gradstore/cli/main.py",
        "gradstore/data/train.jsonl",
        "gradstore/data/holdout.jsonl",
        "gradstore/schemas/0001_catalog.sql",
        "gradstore/schemas/receipt.schema.json",
        "gradstore/py.typed",
    } <= names


def test_the_reference_of_the_api_has_every_package() -> None:
    [listed] = re.findall(
        r"^MODULES := .*gradstore\.,(.*)\)$", (ROOT / "Makefile").read_text(), re.M
    )
    inner = {"gradstore", "gradstore.cli", "gradstore.data", "gradstore.schemas"}
    packages = {name.removeprefix("gradstore.") for name in folders().keys() - inner}
    modules = {path.stem for path in (ROOT / "gradstore").glob("*.py")}
    assert packages <= set(listed.split()) <= packages | modules


def test_migrations_are_numbered_without_gap_or_repeat() -> None:
    names = sorted(path.name for path in (ROOT / "schemas").glob("*.sql"))
    assert all(re.fullmatch(r"\d{4}_[a-z_]+\.sql", name) for name in names)
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


def test_python_dash_m_works_in_the_source_tree() -> None:
    command = [sys.executable, "-m", "gradstore", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"gradstore, version {gradstore.__version__}\n"


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## .*{re.escape(gradstore.__version__)}\b", changelog, re.MULTILINE)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


def test_command_line_modules_import_each_other_relatively() -> None:
    named = re.compile(r"^\s*(from|import) gradstore\.cli\b", re.MULTILINE)
    assert not [path for path in sources() if named.search(path.read_text("utf-8"))]
