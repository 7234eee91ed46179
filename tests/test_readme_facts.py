"""What the README says beside its snippets: settings and defaults, names of files, messages, and forms of files."""

import re
import runpy
from pathlib import Path

from m3d_layout import vqa_row, write_cap, write_vqa
from transformers.processing_utils import ImagesKwargs

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.processing.image_processing_med3dvlm import CT_WINDOWS, INTENSITY_MODES, Med3DVLMImageProcessorKwargs
from med3dvlm.train.data.layout import CAP_INDEX, VQA_SPLITS
from med3dvlm.train.data.m3d import VQA_TASKS, read_m3d_vqa
from med3dvlm.train.evaluation.zero_shot import read_labels, read_prompts


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = " ".join((ROOT / "hub_cards" / "benchmarks" / "README.md").read_text(encoding="utf-8").split())


def as_written(value):
    if isinstance(value, list):
        return f"[{', '.join(f'{number:g}' for number in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_every_option_of_the_image_processor_stands_with_its_default():
    names = (Med3DVLMImageProcessorKwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()) | {"do_resize"}
    assert len(names) == 9
    for name in names:
        default = as_written(getattr(Med3DVLMImageProcessor, name, None))
        assert f"`{name}` (`{default}`" in README, name
    assert all(f'`"{mode}"`' in README for mode in INTENSITY_MODES)
    assert f"or a name: {', '.join(CT_WINDOWS)})" in README


def test_the_files_of_m3d_are_those_that_the_readers_open(tmp_path):
    tree = set(re.findall(r"^data/(\S+)", README, flags=re.MULTILINE))
    assert CAP_INDEX in tree
    write_cap(tmp_path, {"train": ["1"], "validation": ["2"], "test": ["3"]})
    files = {name for name in tree if name.endswith(".csv")}
    assert len(files) == 4
    for name in files:
        answer = {"Answer": "Yes", "Answer Choice": "A", "Choice A": "Yes", "Choice B": "No"} if "_yn_" in name else {}
        write_vqa(tmp_path, Path(name).name, [{**vqa_row(), **answer}])
    for split in VQA_SPLITS:
        tasks = VQA_TASKS if split == "train" else VQA_TASKS[:2]
        assert len(read_m3d_vqa(tmp_path, split, tasks)) == len(tasks)


def test_messages_are_those_of_the_code():
    table = README.partition("## When something goes wrong")[2].partition("\n## ")[0]
    quoted = [match[1] for match in re.finditer(r'^\| "([^"]+)"', table, flags=re.MULTILINE)]
    assert len(quoted) >= 6
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("*/*.py") if path.parent.name != "tests"]
    for message in quoted:
        # A message may run over several literals of the source.
        assert any(message in re.sub(r'" *\n\s*f?"', "", source) for source in sources), message


def test_prompts_and_labels_have_the_form_that_is_read(tmp_path):
    (yaml,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "findings.yaml").write_text(yaml)
    (labels,) = re.findall(r"```text\n(image,pleural.*?)```", README, flags=re.DOTALL)
    (tmp_path / "labels.csv").write_text(labels)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/a.nii.gz").touch()
    prompts = read_prompts(tmp_path / "findings.yaml")
    names = [entry.name for entry in prompts]
    assert prompts[0].negative and [entry.labels for entry in read_labels(tmp_path / "labels.csv", names).volumes] == [
        {"pleural effusion": 1, "cyst of the liver": 0}
    ]


def test_a_troubled_reader_finds_the_versions_of_transformers():
    from med3dvlm.configuration.transformers_version import REQUIREMENT

    # cmd.exe takes no single quotes.
    assert f'`pip install -U "{REQUIREMENT}"`' in README and "transformers 5.23 or 5.24" in README
    assert "pip install '" not in README and "pip install -U '" not in README


def test_the_message_about_transformers_has_the_quotes_of_all_shells(monkeypatch, caplog):
    import transformers

    from med3dvlm.configuration.transformers_version import REQUIREMENT

    monkeypatch.setattr(transformers, "__version__", "9.9.9")
    runpy.run_path(str(ROOT / "configuration" / "transformers_version.py"))
    assert f'pip install "{REQUIREMENT}"' in caplog.text


def test_the_cache_of_volumes_is_as_the_readme_says():
    from med3dvlm.train.data.cache import CACHE_DTYPES
    from med3dvlm.train.recipe import DataRecipe

    (paragraph,) = re.findall(r"^\*\*A cache of volumes\*\*.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert DataRecipe().cache_dtype == "float16" and CACHE_DTYPES["float16"][1] == 2.0**-12
    assert "float16, with an error of a value in [0, 1] of at most 2**-12" in paragraph
    assert set(CACHE_DTYPES) == {"float16", *re.findall(r"`(float32|uint8)`", paragraph)}
    measured = re.findall(r"at (\d\.\d) a second from scans|at (\d\.\d) from the cache", BENCHMARKS)
    assert {number for pair in measured for number in pair if number} == {"2.7", "7.9"}
    assert "7.9 volumes of 128 x 256 x 256 per second instead of 2.7" in paragraph
    assert re.search(
        r"^med3dvlm train paper/finetune data\.root=manifest\.csv .*data\.cache=", README, flags=re.MULTILINE
    )
