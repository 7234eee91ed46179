import re

import pytest

from med3dvlm import DCFormerSiglipConfig, Med3DVLMConfig
from med3dvlm.modeling_med3dvlm.modeling_dcformer_siglip import VISION_MODELS
from med3dvlm.train.ablations import ENCODERS, PROJECTORS, STAGE_SETTINGS, format_ablations
from med3dvlm.train.models import vision_config_fields
from med3dvlm.train.recipe import load_recipe


def test_encoders_differ_in_loss_and_volume_encoder_alone():
    weights = {}
    same = STAGE_SETTINGS["contrastive"]
    plain = load_recipe("phantom/contrastive", [*same, *ENCODERS["DCFormer + SigLIP"]])
    assert plain.data.similar_reports == 0
    for name, changes in ENCODERS.items():
        recipe = load_recipe("phantom/contrastive", [*same, *changes])
        assert recipe.training == plain.training and recipe.data == plain.data, name
        config = DCFormerSiglipConfig(
            vision_config=vision_config_fields(recipe.model.vision), **recipe.model.dual_encoder
        )
        assert config.loss_type == ("sigmoid" if "SigLIP" in name else "softmax")
        model = VISION_MODELS[config.vision_config.model_type]._from_config(config.vision_config)
        assert type(model).__name__ == ("Vit3DModel" if "ViT3D" in name else "DCFormerModel")
        weights[name] = model.num_parameters()
    assert max(weights.values()) < 2 * min(weights.values()), weights


def test_projectors_are_those_of_the_papers_table():
    kinds = {}
    for name, changes in PROJECTORS.items():
        recipe = load_recipe("phantom/projector", changes)
        config = Med3DVLMConfig(vision_config={"image_size": [64, 64, 64]}, **recipe.model.projector)
        mixers = len(config.low_level_tokens) if config.projector_type == "mixer" else None
        kinds[name] = (config.projector_type, mixers)
    assert kinds == {
        "2xMLP": ("mlp", None),
        "2xMLP-H": ("low_high_mlp", None),
        "1xMixer-H": ("mixer", 1),
        "2xMixer-H": ("mixer", 2),
    }


def test_one_question_at_a_time_whatever_the_recipes_do():
    for stage in ("language", "projector"):
        recipe = load_recipe(f"phantom/{stage}", STAGE_SETTINGS[stage])
        assert (recipe.data.questions_per_volume, recipe.training["per_device_train_batch_size"]) == (1, 32)


def test_tables_give_mean_and_spread():
    def scores(value):
        names = ("deduplicated R@1 of 100, volume to report", "deduplicated R@1 of 100, report to volume")
        names += ("open VQA, mean", "closed VQA, mean", "report, ROUGE-1")
        return {**dict.fromkeys(names, value), **{f"{name}, blind": value / 10 for name in names}}

    results = {"encoders": {"A": [scores(0.5), scores(0.6), scores(0.7)]}, "projectors": {"B": [scores(0.25)]}}
    table = format_ablations(results)
    assert "| A | 60.0 ± 10.0 (blind 6.0) | 60.0 ± 10.0 (blind 6.0) |" in table
    assert "| B | 25.0 (blind 2.5) | 25.0 (blind 2.5) | 25.0 (blind 2.5) |" in table
    assert re.search(r"\| encoders \|.*\n\| --- \| ---: \| ---: \|", table)


def test_a_variant_that_is_no_recipe_is_refused():
    with pytest.raises(ValueError, match="not a recipe key"):
        load_recipe("phantom/contrastive", ["model.visoin.variant=null"])
