import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import typer
from m3d_layout import write_cap
from nibabel.testing import data_path
from safetensors.torch import load_file
from tiny import build_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from med3dvlm.train.cli import app, parse_hu_range
from med3dvlm.train.command_line import require_extra
from med3dvlm.train.data.collate import ConversationCollator
from med3dvlm.train.data.dataset import ConversationBuilder, ProcessedVolumes, StudyDataset
from med3dvlm.train.data.manifest import read_manifest, write_example_manifest
from med3dvlm.train.data.preparation_record import MADE_BY
from med3dvlm.train.data.prepare import encode_prepared_volume
from med3dvlm.train.phantoms import study
from med3dvlm.train.recipe import STAGES, load_recipe


README = Path(__file__).parents[2] / "README.md"
SCAN = str(Path(data_path) / "anatomical.nii")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in build_tiny_model():
        part.save_pretrained(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_ask_prints_the_answer_and_reports_on_stderr(folder):
    result = run("ask", SCAN, "What is this?", "--model", folder, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.strip()) > 0
    assert "33 x 41 x 25 voxels of int16, 2 x 2 x 2 mm, axes LAS" in result.stderr
    assert "orientation LPS" in result.stderr
    assert "intensity" in result.stderr and "answering: done in" in result.stderr


def test_ask_prints_one_json_object(folder):
    result = run(
        "ask", SCAN, "What is this?", "--model", folder, "--json", "--hu-range=-160,240", "--max-new-tokens", 5
    )
    assert "--hu-range was given but not used" in result.stderr  # of an MR
    assert "pass --intensity-mode window with it" in result.stderr
    answer = json.loads(result.stdout)
    assert set(answer) == {"question", "answer", "model", "preprocessing"}
    assert answer["preprocessing"]["source_shape"] == [33, 41, 25]
    plain = run("ask", SCAN, "What is this?", "--model", folder, "--max-new-tokens", 5)
    assert answer["answer"].strip() == plain.stdout.strip()


def test_ask_takes_the_options_of_a_scan(folder, tmp_path):
    ct = nibabel.Nifti1Image(np.random.default_rng(0).integers(-1000, 900, (12, 14, 16)).astype(np.int16), np.eye(4))
    nibabel.save(ct, tmp_path / "ct.nii.gz")
    options = ("--model", folder, "--json", "--max-new-tokens", 2)
    report = json.loads(run("ask", tmp_path / "ct.nii.gz", "?", "--hu-range", "lung", *options).stdout)[
        "preprocessing"
    ]
    assert report["intensity_mode"] == "window" and report["intensity_range"] == [-1350, 150]
    report = json.loads(run("ask", tmp_path / "ct.nii.gz", "?", "--orientation", "none", *options).stdout)[
        "preprocessing"
    ]
    assert report["orientation"] != "LPS"
    series = Path(data_path) / "example4d.nii.gz"
    report = json.loads(run("ask", series, "?", "--volume-index", 1, *options).stdout)["preprocessing"]
    assert report["source_shape"][-1] == 2


def test_ask_takes_a_prepared_volume_as_it_is(folder, tmp_path):
    scan = tmp_path / "prepared.nii.gz"
    values = torch.rand(16, 24, 20, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25  # neither 0 nor 1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]
    scan.write_bytes(encode_prepared_volume(values, affine, True, True, {"made_by": MADE_BY}))
    of_slices = tmp_path / "of_slices.nii.gz"
    record = {"made_by": MADE_BY, "source": {"source_entries": "a digest"}}
    of_slices.write_bytes(encode_prepared_volume(values, affine, False, False, record))
    options = (scan, "?", "--model", folder, "--max-new-tokens", 2)
    result = run("ask", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert f"Written by `{MADE_BY}`: cropped and scaled before" in result.stderr
    report = json.loads(result.stdout)["preprocessing"]
    assert report["intensity_mode"] == "none" and report["intensity_range"] == [0, 1]
    assert report["crop_box"] == [[0, 16], [0, 24], [0, 20]]
    assert report["is_orientation_known"] and report["spacing"] is not None
    result = run("ask", of_slices, *options[1:], "--json")
    report = json.loads(result.stdout)["preprocessing"]
    assert not report["is_orientation_known"]
    assert [report[key] for key in ("source_spacing", "oriented_spacing", "spacing", "affine")] == [None] * 4
    assert "Made of slices: lengths are pixels, left and right a convention." in result.stderr
    assert "not known, axes LPS (not stated by the file)" in result.stderr and " mm" not in result.stderr
    for wish in (("--hu-range", "lung"), ("--intensity-mode", "minmax")):
        refused = run("ask", *options, *wish)
        assert refused.exit_code == 2 and "is taken as it is: leave out --intensity-mode" in refused.stderr
    assert run("ask", *options, "--intensity-mode", "none").exit_code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ask", "missing.nii.gz", "?", "--model", "FOLDER"), "missing.nii.gz"),
        (("ask", __file__, "?", "--model", "FOLDER"), "NIfTI"),
        (("ask", SCAN, "?", "--model", "./nowhere"), "there is no such folder"),
        (("ask", SCAN, "?", "--model", str(Path(__file__).parent)), "no config.json"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--hu-range", "lungs"), "lung"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--hu-range", "1,x"), "LOWER,UPPER"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--intensity-mode", "windw"), "--intensity-mode must be one of"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--orientation", "LPX"), "--orientation must"),
        (("ask", Path(data_path) / "example4d.nii.gz", "?", "--model", "FOLDER"), "series of 2"),
        (("ask", Path(data_path) / "example4d.nii.gz", "?", "--model", "FOLDER"), "--volume-index"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--device", "cuda:7"), "cannot be used here"),
        (("ask", SCAN, "?", "--model", "FOLDER", "--device", "abacus"), "Try cpu"),
        (("ask", SCAN, " ", "--model", "FOLDER"), "got an empty one"),
        (("ask", SCAN, "What is <image>?", "--model", "FOLDER"), "must not contain '<image>'"),
        (("ask", SCAN, "?", "--model", "ENCODER"), "'dcformer', which answers no questions"),
        (("ask", SCAN, "?"), "--model"),
        (("publish", "ADAPTER", "DESTINATION"), "an adapter, not a whole model. Merge it first"),
        (("publish", "FOLDER", "org/model", "--push"), "pass --license"),
        (("ask",), "Missing argument"),
        (("publish", "FOLDER", "DESTINATION", "--private"), "--push"),
        (("publish", "./nowhere", "DESTINATION"), "there is no such folder"),
        (("publish", "FOLDER", "FOLDER"), "overwrite"),
        (("answer", SCAN), "No such command"),
    ],
    ids=str,
)
def test_wrong_use_and_bad_input_end_with_code_2_and_one_clear_line(arguments, message, folder, tmp_path):
    places = {"FOLDER": folder, "DESTINATION": str(tmp_path / "published")}
    for name, file in {"ENCODER": "config.json", "ADAPTER": "adapter_config.json"}.items():
        places[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"model_type": "dcformer"}')
    result = run(*(places.get(str(argument), argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_ask_answers_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, processor = build_tiny_model()
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), settings).save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    result = run("ask", SCAN, "?", "--model", tmp_path / "adapter", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr


def test_scan_is_refused_before_the_model_is_loaded(folder, tmp_path):
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(folder) / name, tmp_path)  # all but the weights
    shutil.copy(Path(folder) / "chat_template.jinja", tmp_path)
    series = run("ask", Path(data_path) / "example4d.nii.gz", "?", "--model", tmp_path)
    assert series.exit_code == 2 and "series of 2" in series.stderr and "loading" not in series.stderr


def test_publish_makes_a_folder_that_loads(folder, tmp_path):
    destination = tmp_path / "published"
    result = run("publish", folder, destination, "--license", "mit", "--dataset", "org/data", "--notes", "Untrained.")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(destination)
    card = (destination / "README.md").read_text()
    assert "license: mit" in card and "org/data" in card and "Untrained." in card
    assert run("publish", folder, destination).exit_code == 2
    again = run("publish", folder, destination, "--overwrite", "--json")
    assert json.loads(again.stdout)["published"] == str(destination)
    assert run("ask", SCAN, "?", "--model", destination, "--max-new-tokens", 2).exit_code == 0


def test_publish_names_no_option_that_it_does_not_have(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    processor = build_tiny_model()[1]
    processor.image_processor.image_size = [32, 64, 64]
    processor.save_pretrained(tmp_path / "model")
    result = run("publish", tmp_path / "model", tmp_path / "published")
    assert result.exit_code == 2
    assert "The model's `image_size` is (32, 64, 96)" in result.stderr and "--image-size" not in result.stderr


def test_what_was_said_of_a_folder_goes_along_with_it(folder, tmp_path):
    said = ("--language", "de", "--language", "en", "--license", "mit", "--training-data", "Phantoms.")
    assert run("publish", folder, tmp_path / "first", *said).exit_code == 0
    assert run("publish", tmp_path / "first", tmp_path / "second", "--notes", "Small.").exit_code == 0
    assert run("publish", tmp_path / "second", tmp_path / "third", "--language", "fr").exit_code == 0
    for name, languages in (("second", "language:\n- de\n- en\n"), ("third", "language:\n- fr\n")):
        card = (tmp_path / name / "README.md").read_text()
        assert languages in card and "license: mit\n" in card and "Phantoms." in card and "> Small.\n" in card


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("ask",),
        ("publish",),
        ("demo",),
        ("train",),
        ("merge",),
        ("phantom",),
        ("prepare",),
        ("prepare", "m3d-cap"),
        ("prepare", "check"),
        ("convert",),
        ("bench",),
        *(("evaluate", name) for name in ("retrieval", "report", "vqa", "all", "zero-shot", "dependence", "card")),
    ],
)
def test_help_teaches(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout and len(result.stdout) > 400


def commands_of(command, name="med3dvlm"):
    """Each command, by the words it is called with."""
    yield name, command
    for subname, subcommand in getattr(command, "commands", {}).items():
        yield from commands_of(subcommand, f"{name} {subname}")


def test_help_of_options_is_more_than_a_fragment():
    commands = dict(commands_of(typer.main.get_command(app)))
    assert "med3dvlm prepare check" in commands
    for name, command in commands.items():
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert not re.match("(Of|Its|The same) ", text), (name, parameter.name, text)


def test_bench_refuses_devices_whose_work_it_could_not_wait_for():
    result = run("bench", "--device", "meta")
    assert result.exit_code == 2 and "--device meta: expected cpu or cuda" in result.stderr


def test_publish_is_shown_on_a_whole_model_and_sends_adapters_to_merge():
    shown = {"help": run("publish", "--help").stdout, "README": README.read_text()}
    for text in shown.values():
        assert (
            "med3dvlm publish published/med3dvlm org/med3dvlm --push" in text and "publish runs/finetune" not in text
        )
    assert "med3dvlm merge" in shown["help"]
    written = re.findall(r"^med3dvlm (?:publish|merge) (\S+) (\S+)", shown["README"], flags=re.MULTILINE)
    assert len({destination for _, destination in written}) == len(written) > 3  # none replaces another's result
    for checkpoint in re.findall(r"runs/projector/checkpoint-(\d+)", shown["README"]):
        assert int(checkpoint) % load_recipe("paper/projector").training["save_steps"] == 0


def test_help_of_train_names_all_stages_and_where_its_files_are():
    text = run("train", "--help").stdout
    assert all(stage in text for stage in STAGES)
    folder = re.search(r"Launch files: (.*)", text, flags=re.DOTALL)[1]
    assert (Path("".join(folder.split())) / "slurm.sbatch").is_file()


def test_training_without_deepspeed_is_refused_before_processes_are_started(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find_spec(name, *rest)
    )
    result = run("train", "paper/contrastive", f"data.root={tmp_path}")
    assert result.exit_code == 2 and "training.deepspeed=null training.bf16=auto" in result.stderr


ON_CPU = (
    "training.bf16=false",
    "training.use_cpu=true",
    "training.dataloader_num_workers=0",
    "training.report_to=none",
)


def test_own_scans_are_learnt_as_the_readme_says(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_example_manifest("example")
    shutil.copytree(folder, "org/med3dvlm")
    lines = [line for line in README.read_text().splitlines() if re.match("med3dvlm .*(manifest.csv|/own)", line)]
    commands = [
        shlex.split(line.replace("manifest.csv", "example/manifest.csv").replace("scans/b", "example/scan_1"), True)[
            1:
        ]
        for line in lines
    ]
    more = {
        "train": ["training.deepspeed=null", *ON_CPU, "training.num_train_epochs=2", "training.eval_strategy=no"],
        "ask": ["--max-new-tokens", "2"],
        "evaluate": ["--no-blind", "--max-new-tokens", "2"],
    }
    assert [command[0] for command in commands] == ["prepare", "train", "merge", "ask", "evaluate"]
    for command in commands:
        result = run(*command, *more.get(command[0], []))
        assert result.exit_code == 0, result.stdout + result.stderr
    before, after = (load_file(f"{place}/model.safetensors") for place in ("org/med3dvlm", "published/own"))
    changed = {
        name.split(".")[1] for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))
    }
    assert changed == {"multi_modal_projector", "language_model"}
    processor = AutoProcessor.from_pretrained("published/own")
    samples = read_manifest("example/manifest.csv", "train")
    dataset = StudyDataset(samples, ProcessedVolumes(processor.image_processor), ConversationBuilder())
    batch = ConversationCollator(processor)([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        losses = [
            float(AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()(**batch).loss)
            for place in ("org/med3dvlm", "published/own")
        ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("volumes", ["prepared", "scans"])
def test_the_card_of_a_stage_says_whether_it_saw_pictures(volumes, tmp_path):
    write_cap(tmp_path / "data", {"train": ["1", "2"]})
    result = run(
        "train",
        "phantom/contrastive",
        f"data.root={tmp_path / 'data'}",
        f"data.volumes={volumes}",
        f"training.output_dir={tmp_path / 'run'}",
        "model.vision={variant: null, image_size: [32, 64, 96], hidden_sizes: [4, 6, 8, 10, 12], depths: [1, 1, 1, 1, 1]}",
        "model.text_encoder={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}",
        *("model.whiten_text=false", "data.similar_reports=0", "data.cache=null", "training.max_steps=1"),
        *("training.per_device_train_batch_size=2", "training.eval_strategy=no", *ON_CPU),
    )
    assert result.exit_code == 0, result.stderr
    card = (tmp_path / "run" / "published" / "README.md").read_text()
    is_prepared = volumes == "prepared"
    assert ("8-bit pictures without HU" in card, "cannot be turned back" in card) == (is_prepared, not is_prepared)


def test_weights_that_are_cut_off_end_with_code_2_and_one_clear_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (
        ("ask", SCAN, "?", "--model", tmp_path / "model"),
        ("publish", tmp_path / "model", tmp_path / "x"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert f"{tmp_path / 'model'}: its weights are truncated or damaged" in result.stderr


def test_a_missing_extra_is_installed_from_the_clone():
    with pytest.raises(
        ImportError, match=r"Missing packages: no_such_module. .*clone.*pip install \"\.\[train\]\""
    ) as caught:
        require_extra("train", "json", "no_such_module")
    assert "med3dvlm[" not in str(caught.value)  # no index has a package of that name


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("matplotlib", (), "Missing packages: matplotlib."),
        ("tensorboard", (), "Missing packages: tensorboard."),
        ("tensorboard", ("training.report_to=[wandb, tensorboard]",), "Missing packages: tensorboard."),
        ("tensorboard", ("training.report_to=none",), "`data.root` nowhere: there is no such folder"),
    ],
)
def test_what_a_run_needs_at_its_end_is_looked_for_at_its_beginning(name, overrides, message, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest)
    )
    result = run("train", "phantom/language", "data.root=nowhere", *overrides)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("text, expected", [(None, None), ("lung", "lung"), ("-160,240", [-160.0, 240.0])])
def test_hu_range_is_a_name_or_two_numbers(text, expected):
    assert parse_hu_range(text) == expected


def test_commands_need_no_tool_of_developers():
    code = "import sys; sys.modules.update(pytest=None, ruff=None, build=None); import med3dvlm.train.demo as demo"
    code += "; assert demo.SCAN.exists(); import med3dvlm.train.cli, med3dvlm.hub_cards.publish"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options, cases", [([], 900), (["--full"], 4600), (["--full", "--cases", 1000], 1000)])
def test_demo_makes_as_many_phantoms_as_its_training_is_for(options, cases, tmp_path, monkeypatch):
    made = []

    def write_study(destination, num_cases, *arguments, **rest):
        made.append(num_cases)
        raise OSError("enough")

    monkeypatch.setattr(study, "write_study", write_study)
    assert run("demo", "--output", tmp_path, *options).exit_code == 2
    assert made == [cases]


@pytest.mark.slow
def test_demo_trains_asks_and_scores(tmp_path):
    result = run("demo", "--output", tmp_path / "demo", "--cases", 60)
    assert result.exit_code == 0, result.stderr
    for stage in ("language", "contrastive", "projector", "finetune"):
        assert f"Stage {stage}:" in result.stdout and (tmp_path / "demo" / stage / "curves.png").exists()
    assert "anatomical.nii, a real MRI" in result.stdout and "| closed VQA, mean |" in result.stdout
    assert (tmp_path / "demo" / "model" / "modeling_med3dvlm.py").exists()
    assert (tmp_path / "demo" / "answers.png").stat().st_size > 10_000


def test_phantom_writes_a_study_that_check_accepts(tmp_path):
    result = run("phantom", tmp_path / "study", "--cases", 12, "--validation", 2, "--test", 3, "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "7 train, 2 validation, 3 test" in result.stdout
    checked = run("prepare", "check", tmp_path / "study", "--workers", 1, "--json")
    assert checked.exit_code == 0, checked.stdout
    scan = max((tmp_path / "study").rglob("*.nii.gz"))
    scan.write_bytes(scan.read_bytes()[:-1000])  # the header is whole
    checked = run("prepare", "check", tmp_path / "study", "--workers", 1)
    assert checked.exit_code == 1 and "headers only" not in checked.stdout
    fast = run("prepare", "check", tmp_path / "study", "--workers", 1, "--fast")
    assert fast.exit_code == 0 and "headers only" in fast.stdout, fast.stdout
    again = run("phantom", tmp_path / "study", "--cases", 13, "--workers", 1)
    assert again.exit_code == 2 and "other settings" in again.stderr


def test_prepare_m3d_cap_lists_what_it_leaves_out(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "goldens"))
    from make_slices import make_slices

    make_slices(str(tmp_path / "raw"), 0)
    size = ("--image-size", 8, 16, 12)
    result = run("prepare", "m3d-cap", tmp_path / "raw", tmp_path / "M3D_Cap_npy", *size, "--workers", 0)
    assert result.exit_code == 1  # two case folders of the golden have no series
    assert (tmp_path / "M3D_Cap_npy" / "M3D_Cap.json").exists()
    assert "no series" in (tmp_path / "M3D_Cap_npy" / "preparation_report.csv").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("train", "paper/contrastve"), "Did you mean 'paper/contrastive'"),
        (("train", "phantom/contrastive", "data.rot=x"), "Did you mean `data.root`"),
        (("train", "paper/projector", "model.projector.projector_type=qformer"), "got qformer\n"),
        (("train", "phantom/contrastive", "data.root=nowhere", "training.output_dir=OUT"), "nowhere"),
        (("train", "phantom/projector", "model.start_from=nowhere", "training.output_dir=OUT"), "phantoms"),
        (("merge", "nowhere", "DESTINATION"), "nowhere"),
        (("prepare", "check", "nowhere"), "nowhere"),
        (("prepare", "m3d-cap", "nowhere", "DESTINATION"), "nowhere"),
    ],
    ids=str,
)
def test_training_commands_refuse_bad_input_with_one_clear_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
