"""The command `med3dvlm`. Heavy imports wait until a command needs them, so that help comes at once."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    name="med3dvlm",
    help="Vision-language models for 3D medical images.\n\nFor research only: not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder of a published model, or a Hub repository `org/name`.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """Runs the command line; exit code 2 with one clear line for wrong use and bad input, 130 when interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


# How the options of Python functions, which messages name, are called here.
OPTIONS_HERE = {
    "`volume_index`": "--volume-index",
    "`overwrite=True`": "--overwrite",
    "pass `license`": "pass --license",
}


@contextmanager
def bad_input_is_an_answer() -> Iterator[None]:
    """Turns the errors that tell a user what to do into a line on stderr and exit code 2. Others are faults of ours."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        message = str(error)
        for there, here in OPTIONS_HERE.items():
            message = message.replace(there, here)
        typer.echo(f"med3dvlm: {message}", err=True)
        raise typer.Exit(code=2) from error


def hush_progress_bars() -> None:
    """Leaves out the progress bars of transformers where no one watches: in files and pipes they are noise."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


@contextmanager
def step(message: str) -> Iterator[None]:
    """Says on stderr what is being done, and how long it took."""
    typer.echo(f"{message} ...", err=True)
    start = time.perf_counter()
    yield
    typer.echo(f"{message}: done in {time.perf_counter() - start:.1f} s", err=True)


def check_model_name(model: str) -> str:
    """
    Raises:
        FileNotFoundError: `model` can only be a folder, and there is none of that name, or no model in it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{model}: expected a published model, the folder has no config.json.")
        return str(path)
    is_repository = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.exists()
    if not is_repository:
        raise FileNotFoundError(
            f"{model}: expected a folder with a published model or a Hub repository `org/name`; there is no such folder."
        )
    return model


def check_answers_questions(model: str) -> None:
    """
    Raises:
        ValueError: the model is of another kind than those that answer.
    """
    from transformers import AutoConfig

    if (Path(model) / "adapter_config.json").exists():
        return  # its base model answers
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type != "med3dvlm":
        raise ValueError(
            f"{model}: expected a vision-language model (model_type 'med3dvlm'), got {model_type!r}, which answers no "
            "questions."
        )


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: torch cannot use the device.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: it cannot be used here ({error}). Try cpu.") from error


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
        typer.Option(help="auto, window (CT in HU), percentile (MR), minmax or none.", show_default="model's"),
    ] = None,
    hu_range: Annotated[
        str | None,
        typer.Option(
            help="CT window: a name such as lung, or LOWER,UPPER in HU, e.g. -160,240.", show_default="model's"
        ),
    ] = None,
    orientation: Annotated[
        str | None, typer.Option(help="Voxel order given to the model; none keeps the file's.", show_default="model's")
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
    with bad_input_is_an_answer():
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
            if processor.image_token in question:
                raise ValueError(f"The question must not contain {processor.image_token!r}, which stands for a scan.")
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
        typer.echo(f"\n{format_preprocessing_report(report)}\n", err=True)
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
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, as the Hub names it; needed with --push.", show_default="unknown"),
    ] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(help="Repository the weights come from; may be repeated.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Data set on the Hub they saw; may be repeated.")] = None,
    training_data: Annotated[str | None, typer.Option(help="What the model was trained on, for its card.")] = None,
    notes: Annotated[str | None, typer.Option(help="What a reader of the card must know first.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Publish a model so that it loads anywhere.

    Writes weights (safetensors), processor, tokenizer, chat template, a model card and the code that loads them, which
    needs nothing but torch, transformers and, to read files, nibabel. A folder appears only when it is complete.

    Example: med3dvlm publish runs/finetune/checkpoint-900 published/med3dvlm --base-model Qwen/Qwen2.5-7B-Instruct
    """
    with bad_input_is_an_answer():
        model = check_model_name(model)
        if private and not push:
            raise ValueError("--private concerns a repository on the Hub: add --push, or leave it out.")
        with step("importing"):
            from ..hub_cards.publish import publish as publish_model
        hush_progress_bars()
        fields: dict[str, Any] = {
            "license": license or "unknown",
            "base_model": base_model or None,
            "datasets": dataset or None,
            "training_data": training_data,
            "notes": notes,
        }
        with step(f"publishing {model} to {destination}"):
            place = publish_model(
                model, destination, push_to_hub=push, private=private or None, overwrite=overwrite, **fields
            )
        typer.echo(json.dumps({"model": model, "published": str(place)}) if as_json else str(place))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for what the demonstration makes.")] = Path("demo_output"),
) -> None:
    """
    Show the whole way on an embedded default: no download, no file of your own.

    Makes a tiny untrained model, publishes it, and asks the published folder about a real MRI that nibabel carries, in a
    process that cannot import this package. The answer means nothing: the model has learnt nothing.
    """
    with bad_input_is_an_answer():
        from .demo import run_demo

        hush_progress_bars()
        run_demo(output)


if __name__ == "__main__":
    main()
