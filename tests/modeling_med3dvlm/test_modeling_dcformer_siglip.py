import pytest
import tiny
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from med3dvlm import DCFormerSiglipModel


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


def test_features_are_projections_of_the_pooled_towers():
    model = tiny.tiny_siglip()
    batch = inputs()
    image_features = model.get_image_features(batch["pixel_values"])
    pooled = model.vision_model(batch["pixel_values"]).last_hidden_state.mean(dim=(2, 3, 4))
    torch.testing.assert_close(image_features.pooler_output, model.visual_projection(pooled))
    text_features = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    first = model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    torch.testing.assert_close(text_features.pooler_output, model.text_projection(first))


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


def train_on_a_share(rank, exchange, result):
    model = tiny.tiny_siglip(loss_exchange=exchange, loss_chunk_size=2)
    batch = {name: tensor[[slice(0, 3), slice(3, 5)][rank]] for name, tensor in inputs(images=5, texts=5).items()}
    parallel = nn.parallel.DistributedDataParallel(model)  # kept until after the backward pass, which it averages
    loss = parallel(**batch, return_loss=True).loss
    loss.backward()
    dist.all_reduce(loss.detach_())
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"loss": loss / 2, "gradients": gradients}, result)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_data_parallel_training_of_two_processes_equals_one_process(exchange, tmp_path):
    # Batch normalisation in evaluation mode: in training its statistics are, by design, those of one process.
    run_processes(train_on_a_share, 2, tmp_path, exchange, tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    model = tiny.tiny_siglip()
    loss = model(**inputs(images=5, texts=5), return_loss=True).loss
    loss.backward()
    torch.testing.assert_close(result["loss"], loss.detach())
    for name, parameter in model.named_parameters():
        gradient = result["gradients"][name]
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
