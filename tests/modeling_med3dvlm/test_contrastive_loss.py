from functools import partial

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn

from med3dvlm import contrastive_loss


WIDTH = 6


def unit_vectors(count, seed):
    vectors = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(vectors, dim=-1).float()


def plain_sigmoid_loss(images, texts, logit_scale, logit_bias):
    """SigLIP, Algorithm 1, word for word: loops over pairs."""
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if i == j else -1
            total = total - nn.functional.logsigmoid(sign * (logit_scale.exp() * (image @ text) + logit_bias))
    return total.squeeze() / len(images)


def plain_softmax_loss(images, texts, logit_scale, logit_bias):
    """CLIP, Figure 3."""
    logits = logit_scale.exp() * images @ texts.T
    labels = torch.arange(len(images))
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


PLAIN = {"sigmoid": plain_sigmoid_loss, "softmax": plain_softmax_loss}


def leaves(batch_size, seed=0):
    images, texts = unit_vectors(batch_size, seed), unit_vectors(batch_size, seed + 1)
    scalars = torch.tensor([1.5]), torch.tensor([-2.0])
    return [tensor.requires_grad_() for tensor in (images, texts, *scalars)]


def loss_and_gradients(loss_function, batch_size, loss_type):
    tensors = leaves(batch_size)
    bias = tensors[3] if loss_type == "sigmoid" else None
    loss = loss_function(*tensors[:3], bias)
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in tensors if tensor.grad is not None]


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 64])
def test_loss_equals_the_published_formula(loss_type, chunk_size):
    ours = partial(contrastive_loss, loss_type=loss_type, chunk_size=chunk_size)
    loss, gradients = loss_and_gradients(ours, 5, loss_type)
    expected, expected_gradients = loss_and_gradients(PLAIN[loss_type], 5, loss_type)
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_half_precision_features_lose_nothing_in_the_loss():
    images, texts, scale, bias = leaves(5)
    loss = contrastive_loss(images.bfloat16(), texts.bfloat16(), scale, bias)
    expected = contrastive_loss(images.bfloat16().float(), texts.bfloat16().float(), scale, bias)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_unequal_numbers_of_volumes_and_texts_are_refused():
    with pytest.raises(ValueError, match="got 2 volumes and 3 texts"):
        contrastive_loss(unit_vectors(2, 0), unit_vectors(3, 1), torch.zeros(1))


def compute_on_a_share(rank, batch_sizes, settings, result):
    start, stop = sum(batch_sizes[:rank]), sum(batch_sizes[: rank + 1])
    outcomes = []
    for loss_type, exchange, chunk_size in settings:
        images, texts, scale, bias = leaves(sum(batch_sizes))
        loss = contrastive_loss(
            images[start:stop],
            texts[start:stop],
            scale,
            bias if loss_type == "sigmoid" else None,
            loss_type,
            exchange,
            chunk_size,
        )
        loss.backward()
        gradients = [tensor.grad for tensor in (images, texts, scale, bias) if tensor.grad is not None]
        for tensor in (loss := loss.detach(), *gradients):  # what data parallelism does: the mean over processes
            dist.all_reduce(tensor)
            tensor /= len(batch_sizes)
        outcomes.append((loss, gradients))
    if rank == 0:
        torch.save(outcomes, result)


@pytest.mark.parametrize("batch_sizes", [(4, 4), (5, 2), (2, 3, 1)], ids=str)
def test_many_processes_give_the_loss_and_gradients_of_one(batch_sizes, tmp_path):
    settings = [
        (loss_type, exchange, chunk_size)
        for loss_type in ("sigmoid", "softmax")
        for exchange in ("gather", "ring")
        for chunk_size in (None, 3)  # 3 divides neither a process's batch nor the global one: an uneven last chunk
    ]
    result = tmp_path / "result.pt"
    run_processes(compute_on_a_share, len(batch_sizes), tmp_path, batch_sizes, settings, result)
    for (loss_type, exchange, chunk_size), (loss, gradients) in zip(settings, torch.load(result), strict=True):
        expected, expected_gradients = loss_and_gradients(PLAIN[loss_type], sum(batch_sizes), loss_type)
        name = f"{loss_type}, {exchange}, chunks of {chunk_size}"
        torch.testing.assert_close(loss, expected, msg=lambda m, n=name: f"{n}: {m}")
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, msg=lambda m, n=name: f"{n}: {m}")


def record_the_largest_matrix(rank, exchange, chunk_size, result):
    sizes = []
    original = nn.functional.softplus
    nn.functional.softplus = lambda logits: sizes.append(logits.numel()) or original(logits)
    images, texts, scale, bias = leaves(8)
    own = slice(4 * rank, 4 * rank + 4)
    contrastive_loss(images[own], texts[own], scale, bias, exchange=exchange, chunk_size=chunk_size)
    if rank == 0:
        torch.save(max(sizes), result)


@pytest.mark.parametrize(
    "exchange, chunk_size, expected", [("gather", None, 4 * 8), ("ring", None, 4 * 4), ("gather", 3, 4 * 3)]
)
def test_no_process_builds_the_global_matrix(exchange, chunk_size, expected, tmp_path):
    """Two processes with 4 pairs each hold their own rows times one block of columns, never 8 x 8 logits."""
    result = tmp_path / "result.pt"
    run_processes(record_the_largest_matrix, 2, tmp_path, exchange, chunk_size, result)
    assert torch.load(result) == expected


def test_model_uses_the_loss_of_its_configuration():
    for loss_type in ("sigmoid", "softmax"):
        model = tiny.tiny_siglip(loss_type=loss_type)
        input_ids = torch.randint(8, 99, (3, 5))
        outputs = model(input_ids=input_ids, pixel_values=tiny.random_volumes(3), return_loss=True)
        expected = PLAIN[loss_type](outputs.image_embeds, outputs.text_embeds, model.logit_scale, model.logit_bias)
        torch.testing.assert_close(outputs.loss, expected)
