"""The command `med3dvlm`. Heavy imports wait until a command needs them, so that help comes at once."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import (
    JsonOption,
    ModelOption,
    bad_input_is_an_answer,
    check_answers_questions,
    check_device,
    check_model_name,
    count_processes,
    end_with_torchrun,
    hush_progress_bars,
    in_options_of_the_command,
    is_to_be_launched,
    launch,
    require_extra,
    step,
)
from .evaluation.commands import evaluate_app


app = typer.Typer(
    name="med3dvlm",
    help="Vision-language models for 3D medical images.\n\nFor research only: not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """
    Runs the command line; exit code 2 with one clear line for wrong use and bad input, 1 where data were checked or prepared and
    have faults, 130 when interrupted.
    """
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


LicenseNameOption = Annotated[str | None, typer.Option(help="With --license other: its name, such as qwen-research.")]
LicenseLinkOption = Annotated[str | None, typer.Option(help="With --license other: where its text is.")]
SIZE_METAVAR = "DEPTH HEIGHT WIDTH"
LICENSE_OPTIONS = {"license": "--license", "license_name": "--license-name", "license_link": "--license-link"}


@app.command()
def ask(
    scan: Annotated[Path, typer.Argument(help="NIfTI file (.nii or .nii.gz).", show_default=False)],
    question: Annotated[
        str, typer.Argument(help='What to ask, e.g. "Is there a pleural effusion?".', show_default=False)
    ],
    model: ModelOption,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="model's, or 256")
    ] = None,
    intensity_mode: Annotated[
        str | None,
        typer.Option(
            help="How values are scaled: auto, window (CT in HU), percentile (MR), minmax or none.",
            show_default="model's",
        ),
    ] = None,
    hu_range: Annotated[
        str | None,
        typer.Option(
            help="CT window: a name such as lung, or LOWER,UPPER in HU, e.g. -160,240.", show_default="model's"
        ),
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help="Directions in which width, height and depth grow in what the model gets, e.g. LPS or RAS; none keeps the "
            "file's axes.",
            show_default="model's",
        ),
    ] = None,
    volume_index: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D series, from 0.")] = None,
    device: Annotated[
        str, typer.Option(help="Where to run, e.g. cpu or cuda.", show_default="cuda if there is one")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """
    Answer a question about a scan.

    Prints the answer, and on stderr a report of what was done to the scan before the model saw it: check there that the
    orientation, the voxel size and the intensity window are what you expect.

    Example: med3dvlm ask chest.nii.gz "Is there a pleural effusion?" --model org/med3dvlm --hu-range soft_tissue
    """
    options_here = {
        name: f"--{name.replace('_', '-')}" for name in ("hu_range", "intensity_mode", "orientation", "volume_index")
    }
    with bad_input_is_an_answer(**options_here):
        if not question.strip():
            raise ValueError("Expected a question, got an empty one.")
        model = check_model_name(model)
        options = {
            "intensity_mode": intensity_mode,
            "hu_range": parse_hu_range(hu_range),
            "orientation": orientation,
            "volume_index": volume_index,
        }
        options = {name: value for name, value in options.items() if value is not None}

        with step("importing"):
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

            from ..processing.image_processing_med3dvlm import format_preprocessing_report
        hush_progress_bars()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        check_answers_questions(model)
        # The scan first: one that cannot be used is refused before a large model is loaded.
        with step(f"preparing {scan}"):
            processor = AutoProcessor.from_pretrained(model)
            inputs, report = _prepare_question(processor, scan, question, options)
        warnings = [in_options_of_the_command(warning, **options_here) for warning in report["warnings"]]
        typer.echo(f"\n{format_preprocessing_report({**report, 'warnings': warnings})}\n", err=True)
        with step(f"loading {model}"):
            generator = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval().to(device)
        max_new_tokens = max_new_tokens or generator.generation_config.max_new_tokens or 256
        streamer = None if as_json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with step("answering"), torch.inference_mode():
            generated = generator.generate(
                **inputs.to(device, dtype=generator.dtype), max_new_tokens=max_new_tokens, streamer=streamer
            )
        if as_json:
            new_tokens = generated[0, inputs["input_ids"].shape[1] :]
            answer = processor.tokenizer.decode(new_tokens, skip_special_tokens=True)
            typer.echo(json.dumps({"question": question, "answer": answer, "model": model, "preprocessing": report}))


def _prepare_question(
    processor: Any, scan: Path, question: str, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """
    Inputs of the model, and the report of what was done to the scan, by the given options of the image processor.

    Raises:
        ValueError: the scan or the question cannot be used, or the options would scale a prepared volume once more.
    """
    from .data.preparation_record import MADE_BY, PREPARED, is_of_slices, read_preparation_record

    if processor.image_token in question:
        raise ValueError(f"The question must not contain {processor.image_token!r}, which stands for a scan.")
    record = read_preparation_record(scan)
    if record is not None:
        if "hu_range" in options or options.get("intensity_mode", "none") != "none":
            raise ValueError(
                f"{scan}: written by `{MADE_BY}`, so it is cropped and scaled already, and is taken as it is: leave out "
                "--intensity-mode and --hu-range, or ask about the scan it was made from."
            )
        options = {**options, **PREPARED}
    content = [{"type": "image", "path": str(scan)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={**options, "return_report": True},
    )
    (report,) = inputs.pop("preprocessing_report")
    if record is not None:
        report["warnings"].append(f"Written by `{MADE_BY}`: cropped and scaled before, so at most resized now.")
        if is_of_slices(record):
            report["warnings"].append("Made of slices: lengths are pixels, left and right a convention.")
            # Its affine counts pixels, which is not what these say.
            report["is_orientation_known"] = False
            report.update(dict.fromkeys(("source_spacing", "oriented_spacing", "spacing", "affine")))
    return inputs, report


def parse_hu_range(text: str | None) -> str | list[float] | None:
    """
    A window's name, or its two numbers.

    Raises:
        ValueError: there is a comma, but not two numbers.
    """
    if text is None or "," not in text:
        return text
    try:
        lower, upper = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--hu-range: expected a name or LOWER,UPPER in HU such as -160,240, got {text!r}."
        ) from error
    return [lower, upper]


@app.command()
def publish(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a saved model with its processor, or a Hub repository.", show_default=False),
    ],
    destination: Annotated[
        str, typer.Argument(help="New folder or, with --push, Hub repository `org/name`.", show_default=False)
    ],
    push: Annotated[bool, typer.Option("--push", help="Publish to the Hub instead of a folder.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: publish to a private repository only.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a model that is there, on the Hub also the card of a repository."),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Licence of the weights, as the Hub names it; needed with --push.",
            show_default="that of the folder's card",
        ),
    ] = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    base_model: Annotated[
        list[str] | None, typer.Option(help="Repository the weights come from; may be repeated.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Data set on the Hub they saw; may be repeated.")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            help="Code of a language it reads and writes, such as de; may be repeated.",
            show_default="that of the folder's card, or en",
        ),
    ] = None,
    training_data: Annotated[str | None, typer.Option(help="What the model was trained on, for its card.")] = None,
    notes: Annotated[str | None, typer.Option(help="What a reader of the card must know first.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Publish a model so that it loads anywhere.

    Writes weights (safetensors), processor, tokenizer, chat template, a model card and the code that loads them, which
    needs nothing but torch, transformers and, to read files, nibabel. A folder appears only when it is complete. What the
    card of a published folder says, results of evaluations among it, is carried over unless you give a new value. Adapters, as of
    the stage finetune, go through med3dvlm merge, which publishes the whole.

    Example: med3dvlm publish published/med3dvlm org/med3dvlm --push --license apache-2.0
    """
    options_here = {**LICENSE_OPTIONS, "base_model": "--base-model", "language": "--language"}
    with bad_input_is_an_answer(overwrite="--overwrite", **options_here):
        model = check_model_name(model)
        if private and not push:
            raise ValueError("--private concerns a repository on the Hub: add --push, or leave it out.")
        with step("importing"):
            from ..hub_cards.publish import publish as publish_model
        hush_progress_bars()
        fields: dict[str, Any] = {
            "license": license,
            "license_name": license_name,
            "license_link": license_link,
            "base_model": base_model or None,
            "datasets": dataset or None,
            "language": language or None,
            "training_data": training_data,
            "notes": notes,
        }
        with step(f"publishing {model} to {destination}"):
            place = publish_model(
                model, destination, push_to_hub=push, private=private or None, overwrite=overwrite, **fields
            )
        typer.echo(json.dumps({"model": model, "published": str(place)}) if as_json else str(place))


@app.command(epilog=f"Launch files: {Path(__file__).parent / 'recipes' / 'launch'}")
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="YAML file, or the name of a recipe of this package, such as paper/contrastive.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Replaces values, e.g. data.root=/data training.learning_rate=2e-4.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one for each GPU, at least 1")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Train a stage: contrastive, projector or finetune; or language, for a small language model before them.

    The same command goes on where an earlier start was ended, even if it was killed. The result is the folder `published`
    in the recipe's training.output_dir, from which the next stage starts. Several machines: run this command under
    torchrun, accelerate or SLURM, see the launch files, whose folder is named below.

    Example: med3dvlm train paper/contrastive data.root=/data/m3d training.output_dir=runs/contrastive
    """
    with bad_input_is_an_answer():
        require_extra("train", "accelerate", "datasets", "matplotlib", "omegaconf", "peft")
        from .recipe import check_packages, check_places, load_recipe, trackers_of

        loaded = load_recipe(recipe, overrides)
        if "tensorboard" in trackers_of(loaded.training):
            require_extra("train", "tensorboard")
        check_places(loaded)  # before processes are started, whose errors come with much else
        check_packages(loaded)
        use_cpu = bool(loaded.training.get("use_cpu"))
        if is_to_be_launched(processes, use_cpu, needs_launcher=bool(loaded.training.get("deepspeed"))):
            command = ["train", recipe, *(overrides or []), *(["--json"] if as_json else [])]
            raise typer.Exit(code=launch(count_processes(processes, use_cpu), command))
        end_with_torchrun()
        with step("importing"):
            from .stages import run_recipe
        hush_progress_bars()
        # Trainer prints its losses.
        elsewhere = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with elsewhere:
            published = run_recipe(loaded)
        if int(os.environ.get("RANK", 0)) == 0:
            typer.echo(json.dumps({"recipe": recipe, "published": str(published)}) if as_json else str(published))


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or repository of an adapter.", show_default=False)],
    destination: Annotated[str, typer.Argument(help="New folder for the whole model.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, as the Hub names it.", show_default="that of the adapter's card"),
    ] = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Merge an adapter into its base model, and publish the whole.

    The card of the merged model says what the cards of both say of training data; scores of either are left out.

    Example: med3dvlm merge runs/finetune/published published/med3dvlm
    """
    with bad_input_is_an_answer(overwrite="--overwrite", **LICENSE_OPTIONS):
        require_extra("train", "peft")
        with step("importing"):
            from .merge import merge_adapter
        hush_progress_bars()
        with step(f"merging {adapter}"):
            place = merge_adapter(
                adapter,
                destination,
                overwrite=overwrite,
                license=license,
                license_name=license_name,
                license_link=license_link,
            )
        typer.echo(json.dumps({"adapter": adapter, "published": place}) if as_json else place)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="File or folder of the original, or with --to-original a folder of ours.", show_default=False
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    to_original: Annotated[
        bool,
        typer.Option(
            "--to-original", help="Convert the other way: an encoder or dual encoder of ours for the original."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Folder or config.json of the text model the weights were trained from, if none lies beside them."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of the tokenizer, if none lies beside the weights.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Alpha of a LoRA run, which its file does not say.", show_default="32")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, as the Hub names it.", show_default="unknown")
    ] = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Convert weights of the original implementation to a published folder, with the same numbers.

    Takes pretrained_ViT.bin (also M3D-CLIP's), the folder DCFormer_SigLIP, mm_projector.bin, model_with_lora.bin, and the
    merged folder Med3DVLM-Qwen-2.5-7B; which it is, is read from the files. Every tensor finds its place or nothing is
    written. Hashes of the source stand in conversion.json and on the card. Needs the memory of one shard; a call that was
    interrupted, or killed, is continued by the same call.

    Example: med3dvlm convert downloads/Med3DVLM-Qwen-2.5-7B published/med3dvlm-original
    """
    options_here = {name: f"--{name.replace('_', '-')}" for name in ("config", "tokenizer", "lora_alpha", "overwrite")}
    with bad_input_is_an_answer(**options_here, **LICENSE_OPTIONS):
        of_our_folder = (config, tokenizer, lora_alpha, license, license_name, license_link)
        if to_original and any(option is not None for option in of_our_folder):
            raise ValueError(
                "--to-original takes no other option than --overwrite: all the others concern our folder."
            )
        with step("importing"):
            from ..modeling_med3dvlm.convert_original import convert as convert_weights
            from ..modeling_med3dvlm.convert_original import convert_to_original
        hush_progress_bars()
        with step(f"converting {source}"):
            if to_original:
                record = convert_to_original(source, destination, overwrite=overwrite)
            else:
                record = convert_weights(
                    source,
                    destination,
                    config=config,
                    tokenizer=tokenizer,
                    lora_alpha=lora_alpha,
                    overwrite=overwrite,
                    license=license or "unknown",
                    license_name=license_name,
                    license_link=license_link,
                )
        if as_json:
            typer.echo(json.dumps({**record, "destination": str(destination)}))
            return
        typer.echo(f"{destination}: {record['kind']}, {record['tensors']} tensors")
        for assumption in record.get("assumptions", []):
            typer.echo(f"assumed: {assumption}", err=True)


prepare_app = typer.Typer(
    name="prepare", help="Prepare data for training, and check it.", no_args_is_help=True, add_completion=False
)
app.add_typer(prepare_app)
app.add_typer(evaluate_app)


@prepare_app.command("m3d-cap")
def prepare_m3d_cap_command(
    source: Annotated[
        Path, typer.Argument(help="Folder of case folders: series of PNG or JPEG slices, or NIfTI files, and a text.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder for the volumes, usually ROOT/M3D_Cap_npy.")],
    image_size: Annotated[
        tuple[int, int, int],
        typer.Option(help="Voxels of a volume.", metavar=SIZE_METAVAR, show_default="128 256 256"),
    ] = (128, 256, 256),
    splits: Annotated[
        Path | None,
        typer.Option(
            help="An M3D_Cap.json, elsewhere than the one to be written, whose splits and order are kept.",
            show_default="drawn by --seed",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits; later calls take the same.")] = 0,
    accept_jpg: Annotated[
        bool, typer.Option("--accept-jpg", help="Take .jpg slices too, which the original leaves out.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes to work in; 0 for none beside this one.", show_default="one for each core"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Prepare M3D-Cap: case folders of slices become volumes of one size in [0, 1], with their reports and M3D_Cap.json.

    The steps are those of the original preparation. A call that was interrupted, or killed, is continued by the same call.
    Whatever is left out, a slice, a series or a case, stands with its reason in preparation_report.csv and .json. Exit code
    1 if something failed, 2 for wrong use.

    Example: med3dvlm prepare m3d-cap M3D_Cap_raw data/M3D_Cap_npy --splits M3D_Cap_raw/M3D_Cap.json
    """
    with bad_input_is_an_answer(image_size="--image-size", num_workers="--workers"):
        require_extra("train", "datasets")
        from .data.prepare import format_preparation_report, prepare_m3d_cap

        report = prepare_m3d_cap(
            source,
            destination,
            image_size=image_size,
            num_workers=workers,
            progress=sys.stderr.isatty(),
            splits=splits,
            seed=seed,
            accept_jpg=accept_jpg,
        )
        typer.echo(json.dumps(report.to_dict()) if as_json else format_preparation_report(report))
        if not report.is_ok:
            raise typer.Exit(code=1)


@prepare_app.command("check")
def prepare_check_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder in the layout of M3D, a manifest (.csv, .jsonl), NIfTI files, or a cache of volumes."
        ),
    ],
    volumes: Annotated[
        str,
        typer.Option(
            help="What the volumes are: prepared (of one size and in [0, 1]), scans (not), or auto (found out from the files)."
        ),
    ] = "auto",
    image_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels of prepared volumes.", metavar=SIZE_METAVAR, show_default="the most frequent"),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read headers only: damage, NaN and values are not found.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads that read volumes, not processes.", show_default="one for each core, up to 8"
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file for all that was found.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Check a data set before training on it.

    Every volume is read: whether it is one 3D volume, finite, not constant, and a prepared one of the right size and in
    [0, 1]. Missing files, empty reports and answers, answers that contradict their choice, and volumes, cases or identical
    voxels in two splits are errors. Exit code 1 if there is one, 2 for wrong use; warnings are fine.

    Example: med3dvlm prepare check data --report check.json
    """
    with bad_input_is_an_answer(volumes="--volumes", image_size="--image-size", num_workers="--workers"):
        require_extra("train", "datasets")
        from .data.check import check_study, format_check_report

        found = check_study(
            folder,
            volumes=volumes,  # type: ignore[arg-type]
            image_size=image_size,
            fast=fast,
            num_workers=workers,
            progress=sys.stderr.isatty(),
            report_path=report,
        )
        typer.echo(json.dumps(found.to_dict()) if as_json else format_check_report(found))
        if not found.is_ok:
            raise typer.Exit(code=1)


@app.command()
def phantom(
    destination: Annotated[Path, typer.Argument(help="Folder for the study.", show_default=False)],
    cases: Annotated[int, typer.Option(min=1, help="Cases of all splits together.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")] = 0,
    validation: Annotated[
        int | None, typer.Option(min=0, help="Cases for validation.", show_default="a twentieth, at most 100")
    ] = None,
    test: Annotated[
        int | None, typer.Option(min=0, help="Cases for the test.", show_default="a tenth, at most 200")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes to work in.", show_default="one for each core")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Make a study of phantoms: CT-like scans with reports and questions, in the layouts of M3D.

    Each case is a chest and abdomen in HU with one lesion (4 kinds, 6 organs, upper or lower part, small or large), in one
    of 4 planes and 4 contrast phases, with its own voxel size and storage order. Its report and ten questions follow from
    what was drawn; answers are balanced, so that a question alone tells nothing. labels.csv says which organ of each test
    case holds the lesion, for med3dvlm evaluate zero-shot. The same seed gives the same files; a call that was interrupted
    is continued by the same call.

    Example: med3dvlm phantom phantoms --cases 1600 --seed 0
    """
    with bad_input_is_an_answer(num_workers="--workers"):
        from .phantoms.study import write_study

        summary = write_study(
            destination,
            cases,
            seed,
            num_validation=validation,
            num_test=test,
            num_workers=workers,
            progress=sys.stderr.isatty(),
        )
        if as_json:
            typer.echo(json.dumps(summary))
            return
        counts = ", ".join(f"{count} {split}" for split, count in summary["num_cases"].items())
        typer.echo(
            f"{summary['destination']}: {counts}; {summary['num_reports']} different reports, "
            f"{summary['num_bytes'] / 1e6:.0f} MB of scans, {summary['num_made']} made now"
        )


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder for benchmark.json, benchmark.md and encoder.png.")] = Path(
        "benchmark"
    ),
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure: machine, encoder, training, preparation, generation, questions or profile; may be repeated.",
            show_default="all",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it, such as cpu or cuda:0.")] = "cpu",
    runs: Annotated[int, typer.Option(min=1, help="Calls of each function, in turns.")] = 7,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Size of the DCFormer, from nano to large; may be repeated.", show_default="small"),
    ] = None,
    image_size: Annotated[
        tuple[int, int, int],
        typer.Option(help="Voxels of a volume.", metavar=SIZE_METAVAR, show_default="128 256 256"),
    ] = (128, 256, 256),
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Volumes at once; may be repeated.", show_default="1")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Factor on every axis of the size, for the encoder; may be repeated.", show_default="1"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Precision: float32 or bfloat16 (autocast); may be repeated.",
            show_default="both; float32 on a CPU that does not multiply bfloat16",
        ),
    ] = None,
    training_size: Annotated[
        tuple[int, int, int],
        typer.Option(help="Voxels of volumes in the training step.", metavar=SIZE_METAVAR, show_default="64 128 128"),
    ] = (64, 128, 128),
    scan_shape: Annotated[
        tuple[int, int, int],
        typer.Option(help="Voxels of the scan to prepare.", metavar="X Y Z", show_default="512 512 300"),
    ] = (512, 512, 300),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that torch uses.", show_default="torch's choice")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Measure speed and memory on this machine, on random weights: nothing is downloaded.

    The encoder beside its plain formulation, Vit3D and the machine's roofline; a training step; preparing a scan, beside
    SimpleITK and MONAI where they are installed; an answer beside the bare language model; several questions about one
    volume; the operations that the encoder's time goes to. The defaults take some minutes on two cores.

    Example: med3dvlm bench --section encoder --variant nano --variant small --scale 1 --scale 0.5
    """
    with bad_input_is_an_answer(image_size="--image-size"):
        check_device(device)
        with step("importing"):
            import torch

            from ..configuration.configuration_dcformer import DCFORMER_VARIANTS
            from ..modeling_med3dvlm.fused_dcformer import multiplies_bfloat16
            from .benchmarks.report import run_benchmark, to_markdown
            from .benchmarks.sections import DTYPES, SECTIONS, Settings
        for option, given, known in (
            ("--section", section, SECTIONS),
            ("--variant", variant, DCFORMER_VARIANTS),
            ("--dtype", dtype, DTYPES),
        ):
            for value in given or []:
                if value not in known:
                    raise ValueError(f"{option}: expected one of {', '.join(known)}, got {value!r}.")
        if threads is not None:
            torch.set_num_threads(threads)
        torch_device = torch.device(device)
        if torch_device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {device}: expected cpu or cuda, whose times can be measured here.")
        if not dtype and not multiplies_bfloat16(torch_device.type):
            dtype = ["float32"]
            typer.echo("This CPU does not multiply bfloat16: measuring float32 only.", err=True)
        settings = Settings(
            device=torch_device,
            runs=runs,
            dtypes=tuple(dtype or DTYPES),
            variants=tuple(variant or ("small",)),
            image_size=image_size,
            batch_sizes=tuple(batch_size or (1,)),
            scales=tuple(scale or (1.0,)),
            training_size=training_size,
            scan_shape=scan_shape,
        )
        results = run_benchmark(
            settings, section or list(SECTIONS), output, lambda title: typer.echo(f"{title} ...", err=True)
        )
        typer.echo(json.dumps(results) if as_json else to_markdown(results))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for what the demonstration makes.")] = Path("demo_output"),
    cases: Annotated[
        int | None, typer.Option(min=60, help="Number of phantoms.", show_default="900; with --full 4600")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of phantoms and training.")] = 0,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Train as long as the recipes phantom/* say, on as many phantoms as they are made for: about an hour and a "
            "half on two cores.",
        ),
    ] = False,
) -> None:
    """
    Show the whole way on phantoms: no download, no file of your own.

    Makes phantoms, trains the three stages on a small model, publishes it, loads it back in a process that cannot import
    this package, asks it about a held-out phantom and a real MRI that nibabel carries, and prints what it scores, beside
    chance and the blind control. The same command goes on where an earlier one was ended.
    """
    with bad_input_is_an_answer():
        require_extra("train", "accelerate", "datasets", "matplotlib", "omegaconf", "peft", "tensorboard")
        require_extra("eval", "evaluate", "rouge_score", "sacrebleu")
        with step("importing"):
            from .demo import run_demo
        hush_progress_bars()
        run_demo(output, cases, seed, full)


if __name__ == "__main__":
    main()
