import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers
from omegaconf import OmegaConf
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from med3dvlm import DCFormerConfig, Med3DVLMConfig
from med3dvlm.train.models import vision_config_fields
from med3dvlm.train.recipe import (
    check_packages,
    check_places,
    find_recipe,
    load_recipe,
    packaged_recipes,
    save_recipe,
)
from med3dvlm.train.stages import without_free_settings


ROOT = ["data.root=data", "model.start_from=somewhere"]


def load(name, *overrides):
    alone = "contrastive" in name or "language" in name
    return load_recipe(name, [*(ROOT[:1] if alone else ROOT), *overrides])


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_recipe_of_the_package_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.training["output_dir"]
    fields = {**recipe.training, "deepspeed": None, "bf16": False, "use_cpu": True, "report_to": "none"}
    TrainingArguments(**fields)


@pytest.mark.parametrize(
    "name, batch_size, epochs, learning_rate, weight_decay",
    [
        ("paper/contrastive", 64, 100, 1e-4, 0.1),
        ("paper/projector", 16, 3, 1e-4, 0.0),
        ("paper/finetune", 8, 5, 5e-5, 0.0),
    ],
)
def test_the_papers_numbers(name, batch_size, epochs, learning_rate, weight_decay):
    """Xin et al. 2025, Section 3.4."""
    recipe = load_recipe(name)
    training = recipe.training
    assert recipe.num_devices == 8
    assert training["per_device_train_batch_size"] == batch_size and training["num_train_epochs"] == epochs
    assert training["learning_rate"] == learning_rate and training["weight_decay"] == weight_decay
    assert training["optim"] == "adamw_torch" and training["lr_scheduler_type"] == "cosine"
    assert training["warmup_steps"] == 0.03  # below 1 a share of all steps
    assert training["bf16"] is True and training["deepspeed"] == "zero2"
    assert training["eval_strategy"] == "epoch"
    assert training["save_strategy"] == "steps" and training["save_steps"] == 500  # an epoch takes an hour and more


def test_the_papers_models_and_tasks():
    contrastive, projector, finetune = (
        load_recipe(f"paper/{stage}") for stage in ("contrastive", "projector", "finetune")
    )
    vision = vision_config_fields(contrastive.model.vision)
    assert vision.depths == DCFormerConfig.from_variant("small").depths and tuple(vision.image_size) == (128, 256, 256)
    assert contrastive.model.text_encoder == "medicalai/ClinicalBERT"
    assert contrastive.model.dual_encoder == {"projection_dim": 768, "loss_type": "sigmoid"}
    assert contrastive.data.identical_reports == "distinct"
    assert projector.model.language_model == "Qwen/Qwen2.5-7B-Instruct"
    defaults = Med3DVLMConfig()
    for name, value in projector.model.projector.items():
        expected = getattr(defaults, name)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name
    assert projector.trained == ["multi_modal_projector"] and not projector.lora
    assert projector.data.tasks == ["report", "closed_vqa", "open_vqa"]  # without yes/no questions
    assert finetune.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    assert finetune.trained == ["multi_modal_projector"] and "yes_no_vqa" in finetune.data.tasks


def test_ablations_differ_from_the_paper_in_one_thing():
    paper = load_recipe("paper/projector")
    rows = {
        "mlp_2": ("mlp", None, 544),
        "low_high_mlp_2": ("low_high_mlp", None, 800),
        "mixer_1": ("mixer", [128], 768),
        "mixer_2": ("mixer", [192, 128], 768),
    }
    for name, (projector_type, low_level_tokens, max_text_length) in rows.items():
        recipe = load_recipe(f"paper/ablations/{name}")
        assert recipe.model.projector["projector_type"] == projector_type
        assert low_level_tokens is None or recipe.model.projector["low_level_tokens"] == low_level_tokens
        assert {**recipe.training, "output_dir": ""} == {**paper.training, "output_dir": ""}
        assert recipe.data == dataclasses.replace(paper.data, max_text_length=max_text_length)
        # The text has the same room in every row, however many tokens a volume takes.
        assert max_text_length - Med3DVLMConfig(**recipe.model.projector).image_seq_length == 512
    clip, vit = load_recipe("paper/ablations/dcformer_clip"), load_recipe("paper/ablations/vit3d_clip")
    assert clip.model.dual_encoder["loss_type"] == vit.model.dual_encoder["loss_type"] == "softmax"
    assert vision_config_fields(vit.model.vision)["model_type"] == "vit3d"


def test_numbers_keep_their_type_and_overrides_reach_every_level():
    recipe = load(
        "phantom/contrastive", "training.learning_rate=1e-4", "data.num_train=5", "model.vision.variant=tiny"
    )
    assert recipe.training["learning_rate"] == 1e-4 and isinstance(recipe.training["learning_rate"], float)
    assert recipe.data.num_train == 5 and recipe.model.vision["variant"] == "tiny"


def test_numbers_may_be_whole_and_what_may_be_missing_null():
    values = ["learning_rate=1", "max_grad_norm=0.5", "save_total_limit=null", "tf32=null", "disable_tqdm=true"]
    training = load("paper/contrastive", *(f"training.{value}" for value in values), "training.bf16=auto").training
    assert (training["learning_rate"], training["save_total_limit"], training["bf16"]) == (1, None, "auto")


def test_epochs_count_where_steps_are_taken_back_and_steps_go_before_epochs(tmp_path):
    epochs = load("phantom/finetune", "training.num_train_epochs=3", "training.max_steps=-1")
    assert (epochs.training["num_train_epochs"], epochs.training["max_steps"]) == (3, -1)
    save_recipe(load("paper/finetune", "training.max_steps=5"), tmp_path / "recipe.yaml")
    saved = load_recipe(tmp_path / "recipe.yaml", ["training.seed=1"])
    assert (saved.training["num_train_epochs"], saved.training["max_steps"]) == (5, 5)


def test_epochs_of_a_file_do_not_count_beside_steps_of_its_base(tmp_path):
    own = tmp_path / "own.yaml"
    (tmp_path / "above.yaml").write_text("base: own.yaml\ntraining: {seed: 1}\n")
    own.write_text("base: phantom/finetune\ntraining: {num_train_epochs: 3}\n")
    for path in (own, tmp_path / "above.yaml"):
        with pytest.raises(ValueError, match="`training.max_steps` 1280: add training.max_steps=-1"):
            load_recipe(path, ["training.seed=2"])
        for max_steps in (-1, 5):
            assert load_recipe(path, [f"training.max_steps={max_steps}"]).training["max_steps"] == max_steps
    own.write_text("base: phantom/finetune\ntraining: {num_train_epochs: 3, max_steps: -1}\n")
    assert load_recipe(tmp_path / "above.yaml").training["num_train_epochs"] == 3
    own.write_text("base: phantom/finetune\ntraining: {max_steps: 7}\n")
    with pytest.raises(ValueError, match="`training.max_steps` 7: add training.max_steps=-1"):
        load_recipe(own, ["training.num_train_epochs=3"])


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_a_run_that_is_half_done_may_go_on_with_less_memory(name):
    kwargs = f"training.{name}_kwargs={{use_reentrant: false}}"
    recipe, less = load("paper/finetune"), load("paper/finetune", f"training.{name}=true", kwargs)
    assert less.training[name] and less.changed == recipe.changed
    assert without_free_settings(less.training) == without_free_settings(recipe.training)


def test_what_the_workers_of_stage_1_read_ahead_is_what_the_recipe_says():
    recipe = load_recipe("paper/contrastive")
    names = ("dataloader_num_workers", "dataloader_prefetch_factor", "per_device_train_batch_size")
    volume = 4 * math.prod(recipe.model.vision["image_size"])  # bytes in float32
    needed = volume * math.prod(recipe.training[name] for name in names) / 1e9
    stated = re.search(r"([\d.]+) GB of /dev/shm for each", find_recipe("paper/contrastive").read_text())
    for_four = re.search(r"/dev/shm, (\d+) GB for 4 processes", (LAUNCH / "slurm.sbatch").read_text())
    assert needed <= float(stated[1]) <= 17.2 and 4 * needed <= float(for_four[1])
    assert "\n#SBATCH --mem=0\n" in (LAUNCH / "slurm.sbatch").read_text()


def test_a_saved_recipe_repeats_the_run(tmp_path):
    recipe = load("phantom/finetune", "training.seed=7")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_what_differs_from_the_recipe_of_the_description_is_known_and_saved(tmp_path):
    values = "base: paper/projector\ntraining: {learning_rate: 2.0e-4, output_dir: here}\n"
    (tmp_path / "own.yaml").write_text(values)
    recipe = load_recipe(tmp_path / "own.yaml", ["data.root=elsewhere", "training.weight_decay=0.0"])
    assert (recipe.begun_from, recipe.changed) == ("paper/projector", {"training.learning_rate": "0.0002"})
    save_recipe(recipe, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml", ["model.projector.projector_type=mlp"])
    assert again.begun_from == "paper/projector"
    assert again.changed == {**recipe.changed, "model.projector.projector_type": "mlp"}
    # What says of itself what it is has nothing changed.
    (tmp_path / "described.yaml").write_text("base: saved.yaml\ndescription: Numbers of our own.\n")
    described = load_recipe(tmp_path / "described.yaml")
    assert (described.begun_from, described.changed, described.num_devices) == ("described.yaml", {}, None)
    for name in ("paper/projector", tmp_path / "saved.yaml"):
        ours = load_recipe(name, ["description=Ours.", "training.learning_rate=1"])
        assert (ours.changed, ours.num_devices) == ({}, None)
    # What a saved recipe says of itself is not believed: one of an earlier version says nothing, one may be edited.
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "saved.yaml"))
    for edit in ({}, {"begun_from": "paper/projector", "changed": {}, "num_devices": 8}):
        older = {name: value for name, value in saved.items() if name not in ("begun_from", "changed", "num_devices")}
        OmegaConf.save(OmegaConf.create({**older, **edit}), tmp_path / "older.yaml")
        older_recipe = load_recipe(tmp_path / "older.yaml")
        assert (older_recipe.begun_from, older_recipe.changed) == (recipe.begun_from, recipe.changed)
        assert older_recipe.num_devices == 8
    back = load_recipe(tmp_path / "saved.yaml", ["training.learning_rate=1e-4"])
    assert back.changed == {}


def test_base_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "first.yaml").write_text("base: paper/projector\ntraining: {seed: 1, output_dir: here}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\ntraining: {seed: 2}\n")
    recipe = load_recipe(tmp_path / "second.yaml")
    assert recipe.training["seed"] == 2 and recipe.training["output_dir"] == "here" and recipe.stage == "projector"


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("paper/contrastve", "", "Did you mean 'paper/contrastive'"),
        ("paper/projector", "data.rot=x", r"`data.rot` is not a recipe key. Did you mean `data.root`\?"),
        (
            "paper/projector",
            "training.learning_rat=1",
            r"is not a field of .* Did you mean `training.learning_rate`\?",
        ),
        ("paper/projector", "stage=projecter", r"did you mean 'projector'\?"),
        ("paper/projector", "data.volumes=raw", "`data.volumes` must be one of 'scans', 'prepared'"),
        ("paper/projector", "data.augmentation=flip", "`data.augmentation` must be one of"),
        ("paper/projector", "data.tasks=[reports]", r"did you mean 'report'\?"),
        ("paper/projector", "data.num_validation=many", "Value 'many'.*could not be converted to Integer"),
        ("paper/projector", "trained=[]", "Nothing is to be trained"),
        ("paper/projector", "model.start_from=null", "starts from the result of the stage before"),
        ("paper/finetune", "trained=[language_model]", "exclude each other"),
        ("paper/contrastive", "trained=[vision_tower]", "trains the whole dual encoder"),
        ("paper/contrastive", "data.tasks=[open_vqa]", "must be \\[report\\]"),
        ("paper/contrastive", "data.root=''", "`data.root` is empty"),
        ("paper/contrastive", "training.output_dir=null", "`training.output_dir` is empty"),
        ("paper/contrastive", "text_learning_rate=-1", "`text_learning_rate` must not be negative, got -1"),
        ("paper/finetune", "text_learning_rate=1e-4", "the stage 'finetune' has none"),
        ("phantom/language", "model.language_model=null", "needs `model.language_model`"),
        ("phantom/language", "trained=[language_model]", "trains all of `model.language_model`"),
        ("phantom/language", "model.start_from=runs", "trains all of `model.language_model`"),
        ("paper/contrastive", "data.similar_reports=-1", "`data.similar_reports` must be 0 or more, got -1"),
        ("paper/projector", "data.similar_reports=4", "for the stage 'contrastive'"),
        ("paper/contrastive", "data.similar_reports=4", "needs `data.identical_reports: match`"),
        ("paper/contrastive", "model.vision=null", "`model.vision` must be the name .* got None"),
        ("paper/projector", "model.vision=folder", "for a new dual encoder, in the stage 'contrastive'"),
        ("pretrained/contrastive", "model.start_from=folder", "without `model.start_from`: leave one of them out"),
        (
            "pretrained/contrastive",
            "model.vision.variant=nano",
            "`model.vision` is the name .*phantom.*, which has no fields",
        ),
        ("paper/projector", "data.questions_per_volume=0", "`data.questions_per_volume` must be 1 or more, got 0"),
        ("paper/contrastive", "data.questions_per_volume=2", "'contrastive' asks nothing"),
        (
            "paper/contrastive",
            "training.label_smoothing_factor=0.1",
            "no labels to smooth: leave out `training.label_smoothing_factor`",
        ),
        ("paper/contrastive", "learning_rate", "Expected an override `key=value`"),
        (
            "paper/contrastive",
            "training.train_sampling_strategy=group_by_length",
            "`training.train_sampling_strategy` must be one of 'random', 'sequential'; got 'group_by_length'",
        ),
        (
            "paper/contrastive",
            "training.push_to_hub=true",
            "`training.push_to_hub`: .*FOLDER org/name --push --license",
        ),
        ("paper/contrastive", "training.hub_model_id=org/name", "`training.hub_model_id`: a run is not uploaded"),
        (
            "paper/contrastive",
            "training.resume_from_checkpoint=runs/contrastive/checkpoint-500",
            "goes on by itself in its `training.output_dir`.*`model.start_from`",
        ),
        (
            "paper/contrastive",
            "training.auto_find_batch_size=true",
            "smaller `training.per_device_train_batch_size`, or training.activation_checkpointing=true",
        ),
        ("paper/finetune", "training.fsdp=full_shard", "exclude each other.*training.deepspeed=null"),
        (
            "paper/contrastive",
            "training.dataloader_num_workers=0",
            "is for workers.* training.dataloader_prefetch_factor=null",
        ),
        ("paper/finetune", "training.report_to=[wand]", r"`training.report_to` must .*'wand' \(did you mean 'wandb'"),
        ("paper/finetune", "training.report_to=[none, tensorboard]", "`training.report_to` must .*; got 'none'"),
        ("paper/finetune", "training.report_to=true", "`training.report_to` must be one of .*; got True"),
        ("phantom/finetune", "training.num_train_epochs=3", "`training.max_steps` 1280: add training.max_steps=-1"),
        ("phantom/finetune", "training={num_train_epochs: 3}", "`training.max_steps` 1280: add training.max_steps=-1"),
        (
            "paper/contrastive",
            "training.dataloader_drop_last=flase",
            "`training.dataloader_drop_last` must be true or false; got 'flase'",
        ),
        ("paper/contrastive", "training.learning_rate=high", "`training.learning_rate` must be a number; got 'high'"),
        ("paper/contrastive", "training.learning_rate=true", "`training.learning_rate` must be a number; got True"),
        ("paper/contrastive", "training.max_steps=1e3", "`training.max_steps` must be a whole number; got 1000.0"),
        ("paper/contrastive", "training.save_total_limit=all", "must be a whole number or null; got 'all'"),
        ("paper/contrastive", "training.fp16=auto", "`training.fp16` must be true or false; got 'auto'"),
        ("paper/finetune", "lora.rank=8", "^`lora`: .*unexpected keyword argument 'rank'"),
        ("paper/projector", "model.projector.projector_type=qformer", "^`model.projector`: .*'mhsa'.*got qformer$"),
        (
            "paper/finetune",
            "model.projector.projector_depth=0",
            "^`model.projector`: `projector_depth` must be at least",
        ),
        ("paper/contrastive", "model.dual_encoder.loss_type=triplet", "^`model.dual_encoder`: .*got triplet$"),
        (
            "paper/contrastive",
            "model.vision.image_size=[64,64]",
            "^`model.vision`: `image_size` must be three positive",
        ),
        ("paper/projector", "model.dtype=bf16", r"'float16'; got 'bf16' \(did you mean 'bfloat16'"),
        (
            "paper/projector",
            "model.dtype=auto",
            "`model.dtype` must be one of 'float32', 'bfloat16', 'float16'; got 'auto'",
        ),
        ("paper/projector", "model.dtype=int8", "`model.dtype` must be one of .* got 'int8'"),
    ],
)
def test_what_cannot_be_is_refused(name, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_recipe(name, [override] if override else [])


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping of keys to values"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("stage: [\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "own.yaml").write_text("base: own.yaml\n")
    with pytest.raises(ValueError, match="is its own `base`"):
        load_recipe(tmp_path / "own.yaml")


def test_the_home_folder_is_known_in_places_where_no_shell_replaces_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe("paper/projector", ["model.start_from=~/runs/published", "model.language_model=org/model"])
    assert recipe.model.start_from == str(tmp_path / "runs" / "published")
    assert recipe.model.language_model == "org/model"


def test_places_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="`data.root` data: there is no such folder or manifest"):
        check_places(load_recipe("paper/projector"))
    (tmp_path / "data").mkdir()
    with pytest.raises(
        FileNotFoundError, match="`model.start_from` runs/contrastive/published.*stage before finished"
    ):
        check_places(load_recipe("paper/projector"))
    elsewhere = f"lies elsewhere.*model.start_from=FOLDER; a relative path starts at {re.escape(str(tmp_path))}"
    with pytest.raises(FileNotFoundError, match=elsewhere):
        check_places(load_recipe("paper/projector"))
    check_places(load_recipe("paper/projector", ["model.start_from=org/encoder"]))
    check_places(load_recipe("paper/contrastive"))
    with pytest.raises(
        FileNotFoundError, match="`model.vision` runs/phantom/contrastive/published.*stage before finished"
    ):
        check_places(load_recipe("pretrained/contrastive", ["data.root=data"]))


def hide_packages(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def test_a_deepspeed_that_is_not_there_is_told_with_the_remedy(monkeypatch):
    recipe = load_recipe("paper/contrastive")
    without = load_recipe("paper/contrastive", ["training.deepspeed=null", "training.bf16=auto"])
    hide_packages(monkeypatch, "deepspeed")
    with pytest.raises(
        ImportError, match=r"'zero2' needs the package deepspeed.*training.deepspeed=null training.bf16=auto"
    ):
        check_packages(recipe)
    check_packages(without)


def test_a_tracker_that_is_not_there_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["mlflow"])
    recipe = load_recipe("paper/finetune", ["training.deepspeed=null", "training.report_to=[tensorboard, wandb]"])
    with pytest.raises(ImportError, match="names 'wandb', which .* not find here.*training.report_to=tensorboard"):
        check_packages(recipe)
    for names in ("mlflow", "none", "[]", "[all]"):
        check_packages(load_recipe("paper/finetune", ["training.deepspeed=null", f"training.report_to={names}"]))


def test_the_default_tracker_is_looked_for_too(monkeypatch):
    hide_packages(monkeypatch, "tensorboard", "tensorboardX")
    with pytest.raises(ImportError, match="names 'tensorboard', which .*training.report_to=none"):
        check_packages(load_recipe("paper/finetune", ["training.deepspeed=null"]))


def test_comet_is_found_without_a_key_and_kubeflow_told_what_it_needs(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    comet, kubeflow = (
        load_recipe("paper/finetune", ["training.deepspeed=null", f"training.report_to={name}"])
        for name in ("comet_ml", "kubeflow")
    )
    with pytest.raises(ImportError, match="kubeflow needs KUBEFLOW_TRAINER_SERVER_URL"):
        check_packages(kubeflow)
    for is_installed, is_recent in ((False, None), (True, False)):
        monkeypatch.setattr(integration_utils, "_is_comet_installed", is_installed)
        monkeypatch.setattr(integration_utils, "_is_comet_recent_enough", is_recent)
        with pytest.raises(ImportError, match="names 'comet_ml'"):
            check_packages(comet)
    monkeypatch.setattr(integration_utils, "_is_comet_recent_enough", True)
    check_packages(comet)


def test_where_deepspeed_reports_is_no_change_of_a_recipe():
    given = "{zero_optimization: {stage: 1, reduce_bucket_size: 5}, comet: {enabled: true, api_key: SECRET}}"
    recipe = load_recipe("paper/contrastive", [f"training.deepspeed={given}"])
    changed = {key: value for key, value in recipe.changed.items() if key.startswith("training.deepspeed")}
    assert changed == {"training.deepspeed.zero_optimization.stage": "1"}


def test_commands_in_ablations_write_to_folders_of_their_own():
    folders = [load_recipe(name).training["output_dir"] for name in packaged_recipes()]
    for name, path in packaged_recipes().items():
        for line in path.read_text().splitlines():
            if "ablations" in name and line.startswith("#   med3dvlm train "):
                recipe, *overrides = line.split()[3:]
                folders.append(load_recipe(recipe, overrides).training["output_dir"])
    assert len(folders) == len(packaged_recipes()) + 2 == len(set(folders))


LAUNCH = find_recipe("paper/contrastive").parents[1] / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_show_how_each_stage_starts_from_the_one_before(path):
    commands = [shlex.split(line[1:]) for line in path.read_text().splitlines() if re.match("#  .* paper/", line)]
    before = None
    for command, stage in zip(commands, ("contrastive", "projector", "finetune"), strict=True):
        place = command.index(f"paper/{stage}")
        recipe = load_recipe(command[place], command[place + 1 :])
        if before is not None:
            assert Path(recipe.model.start_from) == Path(before.training["output_dir"]) / "published"
        before = recipe


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun_two_nodes.sh"])
def test_launch_files_for_several_machines_name_the_network_of_gloo(name):
    assert "`export GLOO_SOCKET_IFNAME=" in (LAUNCH / name).read_text()


@pytest.fixture
def launch(tmp_path):
    """Runs a launch file where the programs of a cluster only say how they were called; returns the arguments of torchrun."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    programs = {
        "torchrun": f'echo "$@" > {tmp_path}/called',
        "srun": '"$@"',
        "scontrol": 'echo "first second" | tr " " "\\n"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!{bash}\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(name, **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        subprocess.run([bash, str(LAUNCH / name), "paper/contrastive"], env=environment, check=True, timeout=60)
        return (tmp_path / "called").read_text().split()

    return run


def test_two_jobs_with_the_same_first_node_meet_at_different_ports(launch):
    job = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    calls = [launch("slurm.sbatch", SLURM_JOB_ID=number, **job) for number in ("1234567", "1234568")]
    assert "--rdzv_endpoint=first:24567" in calls[0] and "--rdzv_id=1234567" in calls[0]
    assert "--rdzv_endpoint=first:24568" in calls[1] and calls[1][-2:] == ["train", "paper/contrastive"]


def test_port_and_id_of_a_run_on_two_machines_can_be_chosen(launch):
    assert {"--rdzv_endpoint=head:29500", "--rdzv_id=med3dvlm"} <= set(launch("torchrun_two_nodes.sh", HEAD="head"))
    chosen = launch("torchrun_two_nodes.sh", HEAD="head", PORT="23456", RUN_ID="other")
    assert {"--rdzv_endpoint=head:23456", "--rdzv_id=other"} <= set(chosen)
