"""What installing and importing the package gives."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import med3dvlm


ROOT = Path(__file__).parents[1]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", med3dvlm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(med3dvlm, name) is not None
    assert name in dir(med3dvlm)


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse((ROOT / "med3dvlm" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for statement in block.body:
        (alias,) = statement.names
        assert alias.asname == alias.name  # which makes it public in a package with `py.typed`
        seen[alias.name] = statement.module
    assert seen == med3dvlm._MODULE_OF


def test_one_version_stands_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{med3dvlm.__version__}"\n' in project
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == med3dvlm.__version__


# The original's own files, which may import all, and which nothing in the folders below may import: they are not shipped.
OF_THE_ORIGINAL = re.compile(r"(original_\w+|convert_original)")
# What the files of a folder may import of this package, by CONTRIBUTING.md.
MAY_IMPORT = {
    "configuration": (),
    "modeling_med3dvlm": ("configuration",),
    "processing": (),
    "hub_cards": ("configuration", "modeling_med3dvlm", "processing"),
    "train/data": ("processing", "train.prompts", "train.files", "train.processes", "train.naming"),
    "train/benchmarks": ("configuration", "modeling_med3dvlm", "processing", "train.files", "train.processes"),
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_what_contributing_says(folder):
    package = folder.replace("/", ".").split(".")
    allowed = (".".join(package), *MAY_IMPORT[folder])
    paths = [path for path in (ROOT / folder).glob("*.py") if not OF_THE_ORIGINAL.fullmatch(path.stem)]
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            level = getattr(node, "level", 0)
            module = getattr(node, "module", None)
            # Of `from ..folder import name`, the name may be a module too.
            names = [".".join(filter(None, (module, alias.name))) for alias in node.names]
            if level == 0:
                assert not [name for name in names if name.split(".")[0] == "med3dvlm"], (path, names)
                continue
            for name in names:
                target = ".".join([*package[: len(package) - level + 1], name])
                assert any(target == place or target.startswith(f"{place}.") for place in allowed), (path, target)
                assert not any(map(OF_THE_ORIGINAL.fullmatch, target.split("."))), (path, target)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Med4DVLM'"):
        med3dvlm.Med4DVLM  # noqa: B018


def test_importing_loads_neither_torch_nor_any_other_heavy_module():
    heavy = "{'torch', 'nibabel', 'numpy', 'peft', 'datasets', 'deepspeed', 'typer'}"
    code = f"import transformers, sys; before = set(sys.modules); import med3dvlm; print((set(sys.modules) - before) & {heavy})"
    assert run(code) == "set()"


def test_importing_touches_no_network_and_writes_no_file():
    code = """
import sys
import transformers
def refuse(event, arguments):
    if event.startswith("socket.") or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        raise RuntimeError(f"{event} {arguments}")
sys.dont_write_bytecode = True
sys.addaudithook(refuse)
import med3dvlm
print("ok")
"""
    assert run(code) == "ok"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The names in the source distribution, and in the wheel that is built from it."""
    pytest.importorskip("build", reason="building the distributions needs `build`")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"  # a copy: building leaves files that the next build would pick up
    made = ("build", "dist", "*.egg-info", "__pycache__", "runs", "demo_output", "phantom_scores")
    ignored = (".git", ".venv*", ".*_cache", "goldens", *made)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    return packed, set(zipfile.ZipFile(wheel).namelist())


def test_source_distribution_holds_what_the_targets_of_make_and_the_readme_need(distributions):
    packed, _ = distributions
    for folder in ("tests", "docs", "hub_cards", "train"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        files = {name for name in files if "__pycache__" not in name and "/goldens/" not in name}
        assert files <= packed, folder
    expected = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"}
    assert packed >= expected | {"pyproject.toml", ".pre-commit-config.yaml"}
    assert not [name for name in packed if name.endswith(".pyc")]


def test_wheel_holds_every_module_and_nothing_else(distributions):
    _, names = distributions
    packaged = {name for name in names if name.endswith(".py")}
    folders = ("configuration", "modeling_med3dvlm", "processing", "hub_cards", "train")
    expected = {
        f"med3dvlm/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (ROOT / folder).rglob("*.py")
    }
    assert packaged == expected | {"med3dvlm/__init__.py"}
    assert "med3dvlm/py.typed" in names
    templates = {f"med3dvlm/hub_cards/templates/{path.name}" for path in (ROOT / "hub_cards" / "templates").iterdir()}
    assert templates <= names
    recipes = {path for path in (ROOT / "train" / "recipes").rglob("*") if path.is_file()}
    assert {f"med3dvlm/{path.relative_to(ROOT).as_posix()}" for path in recipes} <= names and len(recipes) > 15
    evaluation = {
        "published_results.json",
        *(f"prompts/{path.name}" for path in ROOT.glob("train/evaluation/prompts/*")),
    }
    data = {f"med3dvlm/train/evaluation/{name}" for name in evaluation}
    assert data <= names and len(evaluation) > 1
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    recipe_files = {f"med3dvlm/{path.relative_to(ROOT).as_posix()}" for path in recipes}
    assert others == templates | recipe_files | data | {"med3dvlm/py.typed"}


def test_the_hooks_of_pre_commit_are_the_tools_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert not [repo["repo"] for repo in hooks if "ruff" in repo["repo"]]
    (local,) = (repo for repo in hooks if repo["repo"] == "local")
    assert {hook["entry"].split()[0] for hook in local["hooks"]} == {"ruff", "mypy"}
    assert {hook["language"] for hook in local["hooks"]} == {"system"}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    "options, end", [([], '-e ".[dev]"'), (["TRANSFORMERS=transformers==5.23.0"], '"transformers==5.23.0"')]
)
def test_make_installs_another_transformers_where_one_is_named(options, end):
    command = ["make", "-n", "test", "VENV=/nowhere/at/all", *options]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in printed.splitlines() if ".[dev]" in line)
    assert line.rstrip().endswith(end)
