import pytest
import tiny
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from transformers import AutoModel, AutoModelForZeroShotImageClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling

from med3dvlm import DCFormerSiglipConfig, DCFormerSiglipModel
from med3dvlm.train.trainers import OUTPUTS_OF_A_BATCH


GROUPS = torch.tensor([3, 8, 1, 3, 2])  # the first and the fourth report are identical


def inputs(images=2, texts=2):
    input_ids = torch.randint(8, 99, (texts, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[0, 4:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "pixel_values": tiny.random_volumes(images)}


@pytest.mark.parametrize("text_type", ["bert", "distilbert"])
def test_logits_are_scaled_similarities_of_unit_vectors(text_type):
    model = tiny.tiny_siglip(text_type=text_type)
    outputs = model(**inputs(images=3, texts=2))
    assert outputs.loss is None and outputs.logits_per_image.shape == (3, 2)
    for embeds in (outputs.image_embeds, outputs.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    expected = 10 * outputs.image_embeds @ outputs.text_embeds.T - 10  # the initial temperature and offset of SigLIP
    torch.testing.assert_close(outputs.logits_per_image, expected)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)


def test_what_a_validation_keeps_are_the_vectors_of_texts_and_then_of_volumes():
    outputs = tiny.tiny_siglip()(**inputs(), return_loss=True)
    assert next(iter(outputs)) == "loss"
    assert [name for name in outputs if name not in ("loss", *OUTPUTS_OF_A_BATCH)] == ["text_embeds", "image_embeds"]


def test_features_are_projections_of_the_pooled_towers():
    model = tiny.tiny_siglip()
    batch = inputs()
    image_features = model.get_image_features(batch["pixel_values"])
    pooled = model.vision_model(batch["pixel_values"]).last_hidden_state.mean(dim=(2, 3, 4))
    torch.testing.assert_close(image_features.pooler_output, model.visual_projection(pooled))
    text_features = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    first = model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    torch.testing.assert_close(text_features.pooler_output, model.text_projection(first))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_parts_are_of_one_dtype_whatever_their_configurations_remember(part, tmp_path):
    config = DCFormerSiglipConfig(**tiny.tiny_siglip().config.to_dict())
    getattr(config, part).dtype = torch.bfloat16  # as that of a pretrained part
    model = DCFormerSiglipModel(config).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(**inputs()).logits_per_image.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = DCFormerSiglipModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_mean_pooling_leaves_padding_out():
    model = tiny.tiny_siglip(text_pooling="mean")
    batch = inputs()
    shorter = model.get_text_features(batch["input_ids"][:1, :4]).pooler_output
    padded = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[:1]
    torch.testing.assert_close(shorter, padded)


def test_scalars_have_one_dimension_and_the_softmax_loss_has_no_offset():
    assert tiny.tiny_siglip().logit_scale.shape == tiny.tiny_siglip().logit_bias.shape == (1,)
    model = tiny.tiny_siglip(loss_type="softmax")
    assert model.logit_bias is None
    assert model.logit_scale.item() == pytest.approx(2.659260)


def test_every_weight_is_trained_by_the_loss():
    model = tiny.tiny_siglip().train()
    model(**inputs(), return_loss=True).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_loss_needs_pairs():
    with pytest.raises(ValueError, match="got 3 volumes and 2 texts"):
        tiny.tiny_siglip()(**inputs(images=3), return_loss=True)


def test_encoders_may_lie_on_different_devices(monkeypatch):
    model = tiny.tiny_siglip()
    features = BaseModelOutputWithPooling(pooler_output=torch.empty(2, 20, device="meta"))
    monkeypatch.setattr(model, "get_text_features", lambda *args, **kwargs: features)
    outputs = model(**inputs())
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert outputs[name].is_meta, name


def test_attentions_of_both_encoders_are_returned():
    model = tiny.tiny_siglip(vision_config=tiny.tiny_vit3d_config())
    model.set_attn_implementation("eager")
    outputs = model(**inputs(), output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.vision_model_output.attentions] == [(2, 2, 13, 13)] * 3
    assert [tuple(weights.shape) for weights in outputs.text_model_output.attentions] == [(2, 2, 6, 6)] * 2


def test_vit3d_serves_as_the_volume_encoder():
    model = tiny.tiny_siglip(vision_config=tiny.tiny_vit3d_config())
    assert model(**inputs(), return_loss=True).loss.isfinite()


def test_save_and_load_is_exact_to_the_bit(tmp_path):
    model = tiny.tiny_siglip()
    nn.init.constant_(model.logit_scale, 1.25)
    model.save_pretrained(tmp_path)
    for auto_class in (DCFormerSiglipModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, DCFormerSiglipModel)
        assert torch.equal(loaded(**inputs()).logits_per_image, model(**inputs()).logits_per_image)


def model_to_train(mode, **overrides):
    """In evaluation mode, or in training with synchronised statistics: without those each process has its own."""
    model = tiny.tiny_siglip(vision_config=tiny.tiny_dcformer_config(sync_batch_norm=mode == "training"), **overrides)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # Double precision: the gradients of biases that a normalisation removes are zero but for rounding.
    return model.double().train(mode == "training")


def assert_close_by_name(ours, expected, **tolerances):
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def state_after_the_backward_pass(model):
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.vision_model.named_buffers())


EXCHANGES_AND_MODES = [("gather", "evaluation"), ("gather", "training"), ("ring", "training")]


def train_on_a_share(rank, result):
    own = [slice(0, 3), slice(3, 5)][rank]
    batch = {name: tensor[own] for name, tensor in inputs(images=5, texts=5).items()}
    outcomes = []
    for exchange, mode in EXCHANGES_AND_MODES:
        model = model_to_train(mode, loss_exchange=exchange, loss_chunk_size=2)
        parallel = nn.parallel.DistributedDataParallel(model)  # kept until after the backward pass, which it averages
        loss = parallel(**batch, text_group_ids=GROUPS[own], return_loss=True).loss
        loss.backward()
        dist.all_reduce(loss.detach_())
        outcomes.append((loss / 2, *state_after_the_backward_pass(model)))
    torch.save(outcomes, f"{result}{rank}")


def test_data_parallel_training_of_two_processes_equals_one_process(tmp_path):
    run_processes(train_on_a_share, 2, tmp_path, tmp_path / "result")
    results = [torch.load(tmp_path / f"result{rank}") for rank in range(2)]
    for index, (_, mode) in enumerate(EXCHANGES_AND_MODES):
        model = model_to_train(mode)
        loss = model(**inputs(images=5, texts=5), text_group_ids=GROUPS, return_loss=True).loss
        loss.backward()
        gradients, buffers = state_after_the_backward_pass(model)
        for result in results:
            their_loss, their_gradients, their_buffers = result[index]
            torch.testing.assert_close(their_loss, loss.detach())  # the loss itself is always in float32
            assert_close_by_name(their_gradients, gradients, atol=2e-6, rtol=1e-5)
            assert_close_by_name(their_buffers, buffers)
