"""The commands `med3dvlm evaluate ...`. Heavy imports wait until a command needs them."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..command_line import (
    JsonOption,
    bad_input_is_an_answer,
    check_device,
    check_model_name,
    count_processes,
    hush_progress_bars,
    is_to_be_launched,
    launch,
    require_extra,
    step,
)
from ..data.layout import SPLITS, TASKS
from .settings import TEXT_METRICS, EvaluationSettings, MetricOptions, Work


evaluate_app = typer.Typer(
    name="evaluate",
    help="Score a model, or the answers of any system, next to chance level and a blind control (another case's volume).",
    no_args_is_help=True,
    add_completion=False,
)

DEFAULT_METRICS = ",".join(TEXT_METRICS)

ScoredModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder of a published model, or a Hub repository `org/name`.", show_default=False
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="Folder in the layout of M3D, or a manifest (.csv, .jsonl).", show_default=False
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output", "--out", "-o", help="Folder of the evaluation; one begun before is continued.", show_default=False
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split to evaluate: train, validation or test.")]
CasesOption = Annotated[
    int | None, typer.Option("--cases", min=1, help="Use only the first N cases of each task.", show_default="all")
]
BlindOption = Annotated[
    bool,
    typer.Option("--blind/--no-blind", help="Ask every question again with another case's volume, as a control."),
]
SystemOption = Annotated[
    str | None, typer.Option("--name", help="Name of the system in the tables.", show_default="that of the model")
]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
MetricsOption = Annotated[
    str,
    typer.Option(
        help="Metrics of texts, with commas between them. Clinical ones are extras that need packages of their own: ratescore, "
        "green, radgraph_f1."
    ),
]
BertModelOption = Annotated[
    str | None,
    typer.Option(help="Encoder of BERTScore, by name or folder.", show_default="roberta-large, as in the original"),
]
BertLayersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Layer of the encoder, for one that bert_score does not know.", show_default=False),
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option(
        "--predictions",
        help='Answers of any system in place of a model: JSON lines with "id" and "prediction"; the ids are those of '
        "references.jsonl, which `evaluate references` writes.",
        show_default=False,
    ),
]
BlindPredictionsOption = Annotated[
    Path | None,
    typer.Option(
        "--blind-predictions", help="Answers of that system with the volume of another case.", show_default=False
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Questions, or pairs, at a time.")]
DeviceOption = Annotated[
    str, typer.Option(help="Where to run, e.g. cpu or cuda.", show_default="cuda if there is one")
]
DtypeOption = Annotated[str, typer.Option(help="Precision of the model: auto, float32, bfloat16 or float16.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Folder of a cache of processed volumes.", show_default="volumes are not kept")
]
PreparedOption = Annotated[bool, typer.Option("--prepared", help="The volumes are prepared: in [0, 1] already.")]
PublishedOption = Annotated[
    Path | None,
    typer.Option(
        "--published",
        help="JSON file of published figures for the tables.",
        show_default="the package's, for M3D",
    ),
]
CaseNamesOption = Annotated[
    bool, typer.Option("--show-case-names", help="Write the names of cases into the HTML report.")
]
LabellerOption = Annotated[
    str | None,
    typer.Option(
        help='"module:function" that labels reports (a dict of 1, 0 or None for each): F1 of labels.',
        show_default=False,
    ),
]
SkipBrokenOption = Annotated[
    bool,
    typer.Option(
        "--skip-broken",
        help="Leave out samples whose scan is missing or unreadable or that lack a text, and list them in skipped.jsonl. All scans "
        "are read first for this, once per folder.",
    ),
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one for each GPU, at least 1")
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a report in retrieval.")]


@evaluate_app.command("retrieval")
def evaluate_retrieval_command(
    data: DataOption,
    out: OutputOption,
    model: ScoredModelOption = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings of any system in place of a model: safetensors with image_embeds and text_embeds, in the order "
            "of the data, of all or of those that galleries have.",
            show_default=False,
        ),
    ] = None,
    name: SystemOption = None,
    split: SplitOption = "test",
    cases: CasesOption = None,
    blind: BlindOption = True,
    max_text_length: LengthOption = 512,
    batch_size: BatchOption = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    published: PublishedOption = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Recall at 1, 5 and 10 of a dual encoder, volume to report and report to volume.

    As in the paper, in galleries of the first 100, 500, 1000 and 2000 pairs; beside it the recall that counts an identical
    report as a match, the blind control and chance.

    Example: med3dvlm evaluate retrieval --model org/dcformer-siglip --data data/m3d --out evaluation/retrieval
    """
    with bad_input_is_an_answer():
        require_eval_extra()
        source = check_source(model, embeddings, "--embeddings")
        settings = make_settings(
            data,
            ("report",),
            split=split,
            num_cases=cases,
            blind=blind,
            max_text_length=max_text_length,
            dtype=dtype,
            prepared=prepared,
        )
        start_processes_if_needed(processes, device)
        with step("importing"):
            from .runner import evaluate_retrieval
        hush_progress_bars()
        result = evaluate_retrieval(
            out, settings, source, embeddings, system=name, work=make_work(batch_size, device, cache, skip_broken)
        )
        text = show(result, out, published, None, False, None)
        if result:
            typer.echo(json.dumps(result) if as_json else text)


@evaluate_app.command("report")
def evaluate_report_command(
    data: DataOption,
    out: OutputOption,
    model: ScoredModelOption = None,
    predictions: PredictionsOption = None,
    blind_predictions: BlindPredictionsOption = None,
    name: SystemOption = None,
    split: SplitOption = "test",
    cases: CasesOption = None,
    blind: BlindOption = True,
    max_new_tokens: TokensOption = 256,
    metrics: MetricsOption = DEFAULT_METRICS,
    bertscore_model: BertModelOption = None,
    bertscore_layers: BertLayersOption = None,
    labeller: LabellerOption = None,
    batch_size: BatchOption = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    published: PublishedOption = None,
    show_case_names: CaseNamesOption = False,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Reports, scored with BLEU-1, ROUGE-1, METEOR and BERTScore as in the paper, and with ROUGE-L and BLEU-4 of the corpus.

    Example: med3dvlm evaluate report --model org/med3dvlm --data data/m3d --out evaluation/report
    """
    with bad_input_is_an_answer():
        answer_and_score(
            ("report",),
            data,
            out,
            model=model,
            predictions=predictions,
            blind_predictions=blind_predictions,
            system=name,
            split=split,
            num_cases=cases,
            blind=blind,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            prepared=prepared,
            metrics=metrics,
            bertscore_model=bertscore_model,
            bertscore_layers=bertscore_layers,
            labeller=labeller,
            batch_size=batch_size,
            device=device,
            cache=cache,
            skip_broken=skip_broken,
            published=published,
            show_case_names=show_case_names,
            processes=processes,
            as_json=as_json,
        )


@evaluate_app.command("vqa")
def evaluate_vqa_command(
    data: DataOption,
    out: OutputOption,
    model: ScoredModelOption = None,
    predictions: PredictionsOption = None,
    blind_predictions: BlindPredictionsOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Some of closed_vqa,open_vqa,yes_no_vqa.", show_default="all that the split has"),
    ] = None,
    name: SystemOption = None,
    split: SplitOption = "test",
    cases: CasesOption = None,
    blind: BlindOption = True,
    max_new_tokens: TokensOption = 64,
    metrics: MetricsOption = DEFAULT_METRICS,
    bertscore_model: BertModelOption = None,
    bertscore_layers: BertLayersOption = None,
    batch_size: BatchOption = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    published: PublishedOption = None,
    show_case_names: CaseNamesOption = False,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Questions: open ones with the metrics of reports, closed and yes/no ones by accuracy, by type of question.

    A closed answer is right by the letter it begins with; beside it stands the original evaluation's rule, for which the
    letter and a full stop may stand anywhere. All questions about a volume share its encoding.

    Example: med3dvlm evaluate vqa --model org/med3dvlm --data data/m3d --out evaluation/vqa
    """
    with bad_input_is_an_answer():
        answer_and_score(
            read_questions(tasks) if tasks else None,
            data,
            out,
            model=model,
            predictions=predictions,
            blind_predictions=blind_predictions,
            system=name,
            split=split,
            num_cases=cases,
            blind=blind,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            prepared=prepared,
            metrics=metrics,
            bertscore_model=bertscore_model,
            bertscore_layers=bertscore_layers,
            batch_size=batch_size,
            device=device,
            cache=cache,
            skip_broken=skip_broken,
            published=published,
            show_case_names=show_case_names,
            processes=processes,
            as_json=as_json,
        )


@evaluate_app.command("all")
def evaluate_all_command(
    data: DataOption,
    out: OutputOption,
    model: ScoredModelOption = None,
    dual_encoder: Annotated[
        str | None,
        typer.Option("--dual-encoder", help="Published dual encoder, for retrieval.", show_default="no retrieval"),
    ] = None,
    name: SystemOption = None,
    split: SplitOption = "test",
    cases: CasesOption = None,
    blind: BlindOption = True,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest report, in tokens; answers have at most 64.")
    ] = 256,
    max_text_length: LengthOption = 512,
    metrics: MetricsOption = DEFAULT_METRICS,
    bertscore_model: BertModelOption = None,
    bertscore_layers: BertLayersOption = None,
    batch_size: BatchOption = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    published: PublishedOption = None,
    show_case_names: CaseNamesOption = False,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    All of the paper's tables: retrieval, reports and questions, in the folders retrieval, report and vqa.

    Each is continued where an earlier call was ended, and is what the command of its name makes.

    Example: med3dvlm evaluate all --model org/med3dvlm --dual-encoder org/dcformer-siglip --data data/m3d --out evaluation
    """
    with bad_input_is_an_answer():
        require_eval_extra()
        if model is None:
            raise ValueError("Expected --model, the vision-language model, and --dual-encoder for retrieval.")
        source = check_model_name(model)
        encoder = None if dual_encoder is None else check_model_name(dual_encoder)
        options = {"split": split, "num_cases": cases, "blind": blind, "dtype": dtype, "prepared": prepared}
        make_settings(data, ("report",), **options)
        names = read_names("--metrics", metrics)
        start_processes_if_needed(processes, device)
        with step("importing"):
            from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
            from ...modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
            from .asked import questions_of
            from .clinical import CLINICAL_METRICS, build_clinical_metrics
            from .loading import check_kind, device_of_process, find_model, start_processes
            from .runner import build_text_metrics, evaluate_answers, evaluate_retrieval
        hush_progress_bars()
        metric_options = MetricOptions(names, bertscore_model, bertscore_layers)
        # Before hours of retrieval: what is missing or does not fit is to be known now.
        work = make_work(batch_size, device, cache, skip_broken)
        state = start_processes(work)
        check_kind(find_model(source), Med3DVLMForConditionalGeneration)
        if encoder is not None:
            check_kind(find_model(encoder), DCFormerSiglipModel)
        build_text_metrics(metric_options, ("report",), device_of_process(work), state.is_main_process)
        build_clinical_metrics([name for name in metric_options.names if name in CLINICAL_METRICS])
        parts: dict[str, dict[str, Any]] = {}
        texts = []
        if encoder is not None:
            settings = make_settings(data, ("report",), max_text_length=max_text_length, **options)
            parts["retrieval"] = evaluate_retrieval(out / "retrieval", settings, encoder, system=name, work=work)
            texts.append(show(parts["retrieval"], out / "retrieval", published, None, False, None))
        asked: list[tuple[str, tuple[str, ...], int]] = [("report", ("report",), max_new_tokens)]
        if questions := questions_of(data, split, skip_broken):
            asked.append(("vqa", questions, min(64, max_new_tokens)))
        else:
            typer.echo(f"{data} has no questions in the split {split!r}: there is no part vqa.", err=True)
        for part, tasks, longest in asked:
            settings = make_settings(data, tasks, max_new_tokens=longest, **options)
            parts[part] = evaluate_answers(
                out / part, settings, source, system=name, metrics=metric_options, work=work
            )
            texts.append(show(parts[part], out / part, published, work, show_case_names, source))
        if all(parts.values()):
            typer.echo(json.dumps(parts) if as_json else "\n".join(texts))


@evaluate_app.command("zero-shot")
def evaluate_zero_shot_command(
    labels: Annotated[
        Path,
        typer.Option(
            help="CSV with the column image, or case, and one of 1, 0 or nothing for each class.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder for the scores.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Published dual encoder, a folder or a Hub repository.", show_default=False
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON: for each class a list of prompts, or positive and negative lists.",
            show_default="the organs of phantoms",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Study whose cases the labels name, if they name no files.", show_default=False
        ),
    ] = None,
    split: SplitOption = "test",
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Labels of other volumes, to choose thresholds with; with --data, of cases of its split validation.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How similarities become probabilities: sigmoid, 'against negatives' or 'among classes'.",
            show_default="sigmoid, if the model has its loss",
        ),
    ] = None,
    max_text_length: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Volumes, or prompts, at a time.")] = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Zero-shot classification with a dual encoder: AUROC, F1 and accuracy of each class, told from prompts alone.

    Example: med3dvlm evaluate zero-shot -m org/dcformer-siglip --prompts findings.yaml --labels labels.csv -o evaluation/zero_shot
    """
    with bad_input_is_an_answer():
        require_eval_extra()
        require_extra("train", "omegaconf")
        require_extra("eval", "sklearn")
        source = check_model_name(model)
        settings = make_settings(
            data or "", ("report",), split=split, dtype=dtype, prepared=prepared, max_text_length=max_text_length
        )
        with step("importing"):
            from .one_process import evaluate_zero_shot
        hush_progress_bars()
        work = make_work(batch_size, device, cache, skip_broken)
        content = evaluate_zero_shot(out, settings, source, labels, prompts, validation, rule, work)
        typer.echo(json.dumps(content) if as_json else (out / "README.md").read_text(encoding="utf-8"))


@evaluate_app.command("dependence")
def evaluate_dependence_command(
    data: DataOption,
    out: Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder for the result.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Published model of either kind, a folder or a Hub repository.", show_default=False
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="What is asked, with commas between tasks.",
            show_default="report,closed_vqa; report for a dual encoder",
        ),
    ] = None,
    split: SplitOption = "test",
    cases: Annotated[int, typer.Option("--cases", min=2, help="Use only the first N cases of each task.")] = 50,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens, of a model that answers.")
    ] = 256,
    max_text_length: Annotated[int, typer.Option(min=2, help="Most tokens of a report, for a dual encoder.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffling.")] = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    prepared: PreparedOption = False,
    skip_broken: SkipBrokenOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Does the model look at the volume? Asks again with blank, shuffled, mirrored and by one voxel shifted volumes, and with those
    of another case, and says what changes and whether it should.

    Example: med3dvlm evaluate dependence -m org/med3dvlm -d data/m3d -o evaluation/dependence
    """
    with bad_input_is_an_answer():
        require_eval_extra()
        source = check_model_name(model)
        settings = make_settings(
            data,
            read_names("--tasks", tasks) if tasks else (),
            split=split,
            num_cases=cases,
            max_new_tokens=max_new_tokens,
            max_text_length=max_text_length,
            dtype=dtype,
            prepared=prepared,
        )
        with step("importing"):
            from .one_process import evaluate_dependence
        hush_progress_bars()
        work = make_work(batch_size, device, cache, skip_broken)
        content = evaluate_dependence(out, settings, source, seed, work)
        typer.echo(json.dumps(content) if as_json else (out / "README.md").read_text(encoding="utf-8"))


@evaluate_app.command("card")
def evaluate_card_command(
    model: Annotated[Path, typer.Argument(help="Folder of the published model.", show_default=False)],
    evaluations: Annotated[list[Path], typer.Argument(help="Folders of its evaluations.", show_default=False)],
    dataset_name: Annotated[
        str | None, typer.Option(help="Name of the data set, for readers.", show_default="the name of its folder")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The data set on the Hub, `organisation/name`, or a word for what is not there.",
            show_default="made of its name",
        ),
    ] = None,
) -> None:
    """
    Put the results of evaluations into a model card: into its model-index, which the Hub reads, and as tables for readers.

    The evaluations must be of the files in the folder: those of other weights, of a repository, or of a file of answers are
    refused, and the card stays as it is.

    Doing it again replaces what was there of the same task, data set and split. Scores of a part of a split are marked as such.

    Example: med3dvlm evaluate card published/med3dvlm evaluation/vqa evaluation/report --dataset-name M3D --dataset GoodBaiBai88/M3D-VQA
    """
    with bad_input_is_an_answer():
        require_train_extra()
        from ...hub_cards.model_index import add_results_to_card
        from .folders import DEPENDENCE, SCORES, ZERO_SHOT, check_scores_are_of, describe_source

        for folder in evaluations:
            others = [name for name in (ZERO_SHOT, DEPENDENCE) if (folder / name).is_file()]
            if others:
                raise ValueError(
                    f"{folder}: {others[0]} does not go into cards. Expected a folder that `med3dvlm evaluate` retrieval, report "
                    "or vqa filled."
                )
            if not (folder / SCORES).is_file():
                raise FileNotFoundError(
                    f"{folder}: there are no scores. Expected a folder that `med3dvlm evaluate` filled."
                )
        if not model.is_dir():
            raise FileNotFoundError(f"{model}: expected the folder of a published model, there is no such folder.")
        results = [json.loads((folder / SCORES).read_text(encoding="utf-8")) for folder in evaluations]
        with step(f"comparing {model} with what was evaluated"):
            content = describe_source(str(model))["sha256"]
        for folder, result in zip(evaluations, results):
            check_scores_are_of(model, folder, result["settings"]["model"], content)
        for result in results:
            settings = result["settings"]
            name = dataset_name or name_of_data(settings["data"])
            word = re.sub(r"[^\w.]+", "-", name).strip("-")
            card = add_results_to_card(model, result, name, dataset or word, split=settings["split"])
        typer.echo(str(card))


@evaluate_app.command("references")
def evaluate_references_command(
    data: DataOption,
    out: Annotated[Path, typer.Argument(help="JSON lines file.", show_default=False)],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="What is asked, with commas between tasks.",
            show_default="report, and all questions that the split has",
        ),
    ] = None,
    split: SplitOption = "test",
    cases: CasesOption = None,
    skip_broken: Annotated[
        bool,
        typer.Option(
            "--skip-broken", help="Leave samples out that lack a text, and do not look whether their scans are there."
        ),
    ] = False,
) -> None:
    """
    Write what is asked, with ids, for a system that this package does not run: it answers each line, and `--predictions`
    scores the answers. One file of answers serves `evaluate report` and `evaluate vqa`.

    Example: med3dvlm evaluate references references.jsonl --data data/m3d --tasks report
    """
    with bad_input_is_an_answer():
        require_train_extra()
        from dataclasses import asdict

        from ..files import write_json_lines
        from .asked import questions_of, read_asked

        asked = read_names("--tasks", tasks) if tasks else ("report", *questions_of(data, split, skip_broken))
        settings = make_settings(data, asked, split=split, num_cases=cases)
        references = read_asked(settings, Work(skip_broken=skip_broken)).references
        write_json_lines([asdict(reference) for reference in references], out)
        typer.echo(f"{out}: {len(references)} lines")


def name_of_data(data: str) -> str:
    """The name of a study's folder, which is often named by its manifest, or from within."""
    path = Path(os.path.abspath(Path(data).expanduser()))  # noqa: PTH100 (links stay: the folder is named as given)
    return path.parent.name if path.suffix.lower() in (".csv", ".jsonl") else path.name


def answer_and_score(
    tasks: tuple[str, ...] | None,
    data: str,
    out: Path,
    *,
    model: str | None,
    predictions: Path | None,
    blind_predictions: Path | None,
    system: str | None,
    metrics: str,
    bertscore_model: str | None,
    bertscore_layers: int | None,
    labeller: str | None = None,
    batch_size: int,
    device: str,
    cache: Path | None,
    skip_broken: bool,
    published: Path | None,
    show_case_names: bool,
    processes: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """What `evaluate report` and `evaluate vqa` have in common. `settings` are further fields of [`EvaluationSettings`]."""
    require_eval_extra()
    source = check_source(model, predictions, "--predictions")
    make_settings(data, tasks or (), **settings)  # what is wrong is said once, not by each process
    names = read_names("--metrics", metrics)
    start_processes_if_needed(processes, device)
    with step("importing"):
        from .asked import questions_of
        from .runner import evaluate_answers
    hush_progress_bars()
    asked = make_settings(data, tasks or questions_of(data, settings["split"], skip_broken), **settings)
    options = MetricOptions(names, bertscore_model, bertscore_layers, labeller)
    work = make_work(batch_size, device, cache, skip_broken)
    result = evaluate_answers(out, asked, source, predictions, blind_predictions, system, options, work)
    text = show(result, out, published, work, show_case_names, source)
    if result:
        typer.echo(json.dumps(result) if as_json else text)


def read_names(option: str, text: str) -> tuple[str, ...]:
    """
    Names with commas between them; blanks around them do not count.

    Raises:
        ValueError: a name is empty, or stands there twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    repeated = [name for place, name in enumerate(names) if name in names[:place]]
    if repeated or not all(names):
        problem = f"{repeated[0]!r} stands there twice" if repeated else "one is empty"
        raise ValueError(f"{option}: expected names with commas between them, got {text!r}: {problem}.")
    return names


def read_questions(tasks: str) -> tuple[str, ...]:
    """
    Raises:
        ValueError: the tasks are not of the form of [`read_names`], or reports are among them.
    """
    names = read_names("--tasks", tasks)
    if "report" in names:
        raise ValueError(
            "--tasks: `evaluate vqa` asks questions, got report. `med3dvlm evaluate report` takes the reports."
        )
    return names


def require_train_extra() -> None:
    """
    What reads studies and folders of evaluations.

    Raises:
        ImportError: a package is missing.
    """
    require_extra("train", "accelerate", "datasets")


def require_eval_extra() -> None:
    """
    Raises:
        ImportError: a package is missing.
    """
    require_extra("train", "accelerate", "datasets", "matplotlib")
    require_extra("eval", "evaluate", "bert_score", "nltk", "rouge_score", "sacrebleu")


def check_source(model: str | None, file: Path | None, option: str) -> str | None:
    """
    Raises:
        ValueError: not exactly one of a model and a file is given.
    """
    if (model is None) == (file is None):
        raise ValueError(f"Expected either --model or {option}.")
    return None if model is None else check_model_name(model)


def start_processes_if_needed(processes: int | None, device: str) -> None:
    """
    Runs the same command in several processes and exits, if several are asked for, or there are several GPUs and none of them
    was named.
    """
    if device:
        check_device(device)
    use_cpu = device not in ("", "cuda")
    if is_to_be_launched(processes, use_cpu):
        command = list(sys.argv[1:])
        if "--processes" in command:
            place = command.index("--processes")
            del command[place : place + 2]
        command = [argument for argument in command if not argument.startswith("--processes=")]
        raise typer.Exit(code=launch(count_processes(processes, use_cpu), command))


def make_settings(data: str, tasks: tuple[str, ...], **fields: Any) -> EvaluationSettings:
    """
    Raises:
        FileNotFoundError: there are no such data.
        ValueError: a task, split or precision is not known.
    """
    if not Path(data).expanduser().exists():
        raise FileNotFoundError(
            f"{data}: there is no such study. Expected a folder in the layout of M3D, or a manifest."
        )
    for kind, value, choices in (
        *(("task", task, TASKS) for task in tasks),
        ("--split", fields.get("split", "test"), SPLITS),
        ("--dtype", fields.get("dtype", "auto"), ("auto", "float32", "bfloat16", "float16")),
    ):
        if value not in choices:
            raise ValueError(f"{kind}: expected one of {', '.join(choices)}, got {value!r}.")
    return EvaluationSettings(data=data, tasks=tasks, **fields)  # type: ignore[arg-type]


def make_work(batch_size: int, device: str, cache: Path | None, skip_broken: bool = False) -> Work:
    """How the work is done."""
    return Work(batch_size, device, None if cache is None else str(cache), sys.stderr.isatty(), skip_broken)


def show(
    result: dict[str, Any],
    out: Path,
    published: Path | None,
    work: Work | None,
    show_case_names: bool,
    model: str | None,
) -> str:
    """Draws and writes what readers look at, and returns the tables; nothing in a process that is not the first."""
    if not result:
        return ""
    from .presentation import present

    with step(f"tables, plots and report in {out}"):
        return present(out, published, work, show_case_names, model)


__all__ = ["evaluate_app"]
