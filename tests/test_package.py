"""What installing and importing the package gives."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_wheel_holds_every_module_and_nothing_else(tmp_path):
    pytest.importorskip("build", reason="building the wheel needs `build`")
    source = tmp_path / "source"  # a copy: building leaves files that the next build would pick up
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
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
