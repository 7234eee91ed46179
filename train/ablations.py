"""The ablation tables of the paper in small: losses, encoders and projectors on phantoms, several seeds each.

`python -m med3dvlm.train.ablations FOLDER` makes a study, trains every variant with the recipes `phantom/*`, and prints means and
spreads over the seeds. A call that was ended is continued by the same call.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from .demo import WITHOUT_SIMILAR_REPORTS
from .files import write_atomically, write_json_atomically
from .phantoms.scores import score_answers, score_retrieval
from .phantoms.study import write_study
from .recipe import load_recipe
from .stages import run_recipe


# One question about a volume at a time, in batches of 32.
ONE_QUESTION_AT_A_TIME = ["data.questions_per_volume=1", "training.per_device_train_batch_size=32"]
# The same for all variants, whatever the recipes do for their scores: the plain losses, at rates that suit all.
STAGE_SETTINGS: dict[str, list[str]] = {
    "language": ONE_QUESTION_AT_A_TIME,
    "contrastive": ["training.learning_rate=1.5e-3", *WITHOUT_SIMILAR_REPORTS],
    "projector": ["training.learning_rate=2.0e-3", *ONE_QUESTION_AT_A_TIME],
}
# What each variant replaces in `phantom/contrastive`. DCFormer is the smallest, and the ViT3D has as many parameters, within a
# factor of 2.
ENCODERS: dict[str, list[str]] = {
    "DCFormer + SigLIP": ["model.vision.variant=nano"],
    "DCFormer + CLIP": ["model.vision.variant=nano", "model.dual_encoder.loss_type=softmax"],
    "ViT3D + CLIP": [
        "model.dual_encoder.loss_type=softmax",
        "model.vision.variant=null",
        "model.vision.layer_scale_init_value=null",
        "model.vision.model_type=vit3d",
        "model.vision.patch_size=[16, 16, 16]",
        "model.vision.hidden_size=128",
        "model.vision.num_hidden_layers=4",
        "model.vision.num_attention_heads=4",
        "model.vision.head_dim=32",
        "model.vision.intermediate_size=512",
    ],
}
# And in `phantom/projector`.
PROJECTORS: dict[str, list[str]] = {
    "2xMLP": ["model.projector={projector_type: mlp, projector_depth: 2}"],
    "2xMLP-H": ["model.projector={projector_type: low_high_mlp, projector_depth: 2}"],
    "1xMixer-H": ["model.projector={projector_type: mixer, low_level_tokens: [8], high_level_tokens: [4]}"],
    "2xMixer-H": ["model.projector={projector_type: mixer, low_level_tokens: [8, 8], high_level_tokens: [4, 4]}"],
}
# Steps of each stage, no more than the recipes say: what is compared is how far each variant gets with the same work.
STEPS = {"language": 1600, "contrastive": 600, "projector": 500}
RETRIEVAL_SCORES = ("deduplicated R@1 of 100, volume to report", "deduplicated R@1 of 100, report to volume")
BLIND = ", blind"
NUM_ASKED = 100  # held-out cases that are asked about
ANSWER_SCORES = ("open VQA, mean", "closed VQA, mean", "report, ROUGE-1")


def run_ablations(
    output: Path,
    num_cases: int,
    seeds: list[int],
    steps: dict[str, int],
    overrides: list[str],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """
    Trains and scores every variant with every seed.

    Args:
        output (`Path`):
            Folder for all that is made.
        num_cases (`int`):
            Phantoms of the study, the same for all.
        seeds (`list[int]`):
            Of weights and order.
        steps (`dict[str, int]`):
            Training steps by stage, see `STEPS`.
        overrides (`list[str]`):
            What else replaces values of the recipes, for all variants.

    Returns:
        For "encoders" and "projectors", and each variant, a `dict` of scores for each seed.
    """
    study, cache = output / "phantoms", output / "cache"

    def train(stage: str, name: str, changes: list[str], seed: int) -> Path:
        folder = output / stage / name.replace(" ", "").replace("+", "_") / f"seed{seed}"
        values = [
            f"data.root={study}",
            f"data.cache={cache}",
            f"training.output_dir={folder}",
            f"training.seed={seed}",
        ]
        values += [f"training.max_steps={steps[stage]}", "training.eval_strategy=no"]
        return run_recipe(load_recipe(f"phantom/{stage}", [*values, *STAGE_SETTINGS[stage], *changes, *overrides]))

    write_study(study, num_cases, seed=0)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {"encoders": {}, "projectors": {}}
    language_model = train("language", "small", [], 0)
    for seed in seeds:
        encoders = {}
        for name, changes in ENCODERS.items():
            encoders[name] = train("contrastive", name, changes, seed)
            results["encoders"].setdefault(name, []).append(cached_scores(encoders[name], study, cache))
        base = encoders["DCFormer + SigLIP"]
        for name, changes in PROJECTORS.items():
            starts = [f"model.start_from={base}", f"model.language_model={language_model}"]
            published = train("projector", name, [*starts, *changes], seed)
            results["projectors"].setdefault(name, []).append(cached_scores(published, study, cache))
    return results


def cached_scores(published: Path, study: Path, cache: Path) -> dict[str, float]:
    """Scores of a published model on the held-out phantoms and those of the blind control, kept beside it."""
    from ..hub_cards.publish import load_model
    from ..modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
    from ..processing.processing_med3dvlm import Med3DVLMProcessor
    from .data.cache import VolumeCache

    path = published.parent / "held_out_scores.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {*RETRIEVAL_SCORES} <= set(known) and not {*ANSWER_SCORES} <= set(known):  # none, or by the names of before
        model, processor = load_model(str(published)), Med3DVLMProcessor.from_pretrained(published)
        volumes = VolumeCache(cache, processor.image_processor)
        if isinstance(model, DCFormerSiglipModel):
            rows = score_retrieval(model, processor, study, volumes)
        else:
            rows, _ = score_answers(model, processor, study, volumes, NUM_ASKED)
        known = {row["score"]: row["value"] for row in rows}
        known |= {f"{row['score']}{BLIND}": row["blind"] for row in rows}
        write_json_atomically(known, path)
    return known


def format_ablations(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Mean and spread (standard deviation) over the seeds, and the mean of the blind control, in percent, as Markdown tables."""
    lines = []
    for part, names in {"encoders": RETRIEVAL_SCORES, "projectors": ANSWER_SCORES}.items():
        lines += [f"| {part} | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        for variant, seeds in results[part].items():
            cells = []
            for name in names:
                values = [100 * scores[name] for scores in seeds]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                blind = 100 * statistics.mean(scores[f"{name}{BLIND}"] for scores in seeds)
                cells.append(f"{statistics.mean(values):.1f}{spread} (blind {blind:.1f})")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m med3dvlm.train.ablations", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for all that is made")
    parser.add_argument("--cases", type=int, default=1600, help="phantoms (default 1600)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    for stage, number in STEPS.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=number, help=f"training steps (default {number})")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces values of all recipes")
    options = parser.parse_args(arguments)
    steps = {stage: getattr(options, f"{stage}_steps") for stage in STEPS}
    results = run_ablations(options.output, options.cases, list(range(options.seeds)), steps, options.overrides)
    table = format_ablations(results)
    write_atomically(table.encode(), options.output / "ablations.md")
    print(table)


if __name__ == "__main__":
    main()


__all__ = ["ENCODERS", "PROJECTORS", "format_ablations", "run_ablations"]
