import json

import pytest
import torch
from typer.testing import CliRunner

from med3dvlm.modeling_med3dvlm import fused_dcformer
from med3dvlm.train.benchmarks import report
from med3dvlm.train.benchmarks.report import draw, run_benchmark, to_markdown
from med3dvlm.train.benchmarks.sections import SECTIONS, Settings
from med3dvlm.train.cli import app


LANGUAGE_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TINY = Settings(
    device=torch.device("cpu"),
    runs=1,
    variants=("nano",),
    image_size=(32, 32, 48),
    scales=(1.0, 0.5),
    training_size=(16, 32, 48),
    scan_shape=(20, 24, 16),
    questions=(2,),
    new_tokens=2,
    language_sizes=LANGUAGE_SIZES,
)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    """The limits of the machine take seconds to measure."""
    limits = {"matmul": 1e9, "convolution": 1e9, "copy": 1e9}
    monkeypatch.setattr("med3dvlm.train.benchmarks.sections.measure_limits", lambda *args: limits)


def test_every_section_measures_and_is_written(tmp_path):
    told = []
    results = run_benchmark(TINY, list(SECTIONS), tmp_path, told.append)
    assert told == [report.TITLES[name] for name in SECTIONS]
    assert json.loads((tmp_path / "benchmark.json").read_text()) == results
    assert (tmp_path / "encoder.png").read_bytes().startswith(b"\x89PNG")
    fused = [row for row in results["encoder"] if row["path"] == "fused"]
    assert [row["image_size"] for row in fused] == [[32, 32, 48]] * 2 + [[16, 16, 24]] * 2
    for row in fused:
        assert 0 < row["max_relative_error"] < (1e-5 if row["dtype"] == "float32" else 5e-2)
        assert row["volumes_per_s"] == pytest.approx(1 / row["seconds"])
    assert {row["path"] for row in results["training"]} == {"plain", "ours"}
    whole = [row for row in results["generation"] if row["part"] == "whole answer"]
    assert [row["encoder_calls"] for row in whole] == [1, 1]
    assert results["questions"][0]["questions"] == 2
    for what in ("forward pass, fused", "training step"):
        shares = [row["share"] for row in results["profile"] if row["what"] == what]
        assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
    text = (tmp_path / "benchmark.md").read_text()
    assert all(f"## {title}" in text for title in report.TITLES.values())


def test_tables_leave_out_what_no_row_has():
    rows = [{"path": "ours", "seconds": 0.0123, "speedup": None}, {"path": "other", "seconds": 1.0, "speedup": None}]
    results = {"machine_description": {"processor": "P"}, "runs": 3, "preparation": rows}
    lines = to_markdown(results).splitlines()
    assert "| path | ms |" in lines and "| ours | 12 |" in lines and "| other | 1000 |" in lines
    assert draw(results) == {}


def test_unknown_sections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected sections out of machine, .*got 'engine'"):
        run_benchmark(TINY, ["engine"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "huge"], "--variant: expected one of nano"),
        (["--section", "engine"], "--section: expected one of machine"),
        (["--dtype", "float16"], "--dtype: expected one of float32, bfloat16"),
    ],
)
def test_command_refuses_unknown_names(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2 and message in result.stderr


def test_command_measures_one_section(tmp_path):
    arguments = [
        "--section",
        "preparation",
        "--runs",
        "1",
        "--image-size",
        "8",
        "8",
        "8",
        "--scan-shape",
        "20",
        "24",
        "16",
    ]
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path), "--json", *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "benchmark.json").read_text())["preparation"]
    assert rows[0]["path"] == "ours" and rows[0]["image_size"] == [8, 8, 8]


@pytest.mark.parametrize(
    "is_multiplied, arguments, expected",
    [
        (True, [], ["float32", "bfloat16"]),
        (False, [], ["float32"]),
        (False, ["--dtype", "bfloat16"], ["bfloat16"]),
    ],
)
def test_bfloat16_is_measured_where_the_machine_multiplies_it_or_by_request(
    monkeypatch, tmp_path, is_multiplied, arguments, expected
):
    monkeypatch.setattr(fused_dcformer, "multiplies_bfloat16", lambda device_type: is_multiplied)
    arguments = ["bench", "--output", str(tmp_path), "--section", "machine", *arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "benchmark.json").read_text())["machine"]
    assert [row["dtype"] for row in rows] == expected
    assert ("does not multiply bfloat16" in result.stderr) == (not is_multiplied and len(arguments) == 5)
