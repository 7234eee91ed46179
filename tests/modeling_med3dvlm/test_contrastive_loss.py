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


def plain_sigmoid_loss(images, texts, logit_scale, logit_bias, ids=None):
    """SigLIP, Algorithm 1, word for word: loops over pairs. Texts with the same id are one report; the last may be unpaired."""
    ids = range(len(texts)) if ids is None else ids
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if ids[i] == ids[j] else -1
            total = total - nn.functional.logsigmoid(sign * (logit_scale.exp() * (image @ text) + logit_bias))
    return total.squeeze() / len(images)


def plain_softmax_loss(images, texts, logit_scale, logit_bias, ids=None):
    """CLIP, Figure 3; with ids the target is spread evenly over the texts of a group. The last texts may be unpaired."""
    ids = range(len(texts)) if ids is None else ids
    labels = torch.tensor([[float(one == other) for other in ids] for one in ids[: len(images)]])
    logits, paired = logit_scale.exp() * images @ texts.T, slice(len(images))
    of_images = nn.functional.cross_entropy(logits, labels / labels.sum(dim=1, keepdim=True))
    labels = labels[:, paired]
    of_texts = nn.functional.cross_entropy(logits[:, paired].T, labels / labels.sum(dim=1, keepdim=True))
    return (of_images + of_texts) / 2


PLAIN = {"sigmoid": plain_sigmoid_loss, "softmax": plain_softmax_loss}
# The texts of a group lie apart, so that they are in different chunks and on different processes.
GROUPS = [7, -3, 7, 0, -3, 7, 11, 0]


def leaves(batch_size, seed=0, unpaired=0):
    images, texts = unit_vectors(batch_size, seed), unit_vectors(batch_size + unpaired, seed + 1)
    scalars = torch.tensor([1.5]), torch.tensor([-2.0])
    return [tensor.requires_grad_() for tensor in (images, texts, *scalars)]


def loss_and_gradients(loss_function, batch_size, loss_type, unpaired=0):
    tensors = leaves(batch_size, unpaired=unpaired)
    bias = tensors[3] if loss_type == "sigmoid" else None
    loss = loss_function(*tensors[:3], bias)
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in tensors if tensor.grad is not None]


def assert_same_loss_and_gradients(ours, theirs, name=""):
    (loss, gradients), (expected, expected_gradients) = ours, theirs
    torch.testing.assert_close(loss, expected, msg=lambda m: f"{name}: {m}")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 64])
def test_loss_equals_the_published_formula(loss_type, chunk_size, grouped):
    groups = GROUPS[:5] if grouped else None
    ids = torch.tensor(groups) if grouped else None
    ours = partial(contrastive_loss, loss_type=loss_type, chunk_size=chunk_size, text_group_ids=ids)
    plain = partial(PLAIN[loss_type], ids=groups)
    assert_same_loss_and_gradients(loss_and_gradients(ours, 5, loss_type), loss_and_gradients(plain, 5, loss_type))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_texts_without_a_volume_are_negatives_of_all(loss_type, chunk_size, grouped):
    groups = GROUPS if grouped else None  # two of the unpaired ones are the reports of volumes
    ids = torch.tensor(groups) if grouped else None
    options = {"loss_type": loss_type, "chunk_size": chunk_size, "text_group_ids": ids}
    ours = loss_and_gradients(partial(contrastive_loss, **options, num_unpaired_texts=3), 5, loss_type, unpaired=3)
    plain = loss_and_gradients(partial(PLAIN[loss_type], ids=groups), 5, loss_type, unpaired=3)
    assert_same_loss_and_gradients(ours, plain)
    assert ours[1][1][5:].abs().amin(dim=1).all()  # and learn from it


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
def test_groups_of_one_change_nothing_and_others_do(loss_type):
    def outcome(ids):
        ids = None if ids is None else torch.tensor(ids)
        return loss_and_gradients(partial(contrastive_loss, loss_type=loss_type, text_group_ids=ids), 5, loss_type)

    # The largest two differ in their last bit, as hashes may: a float would round it away.
    loss, gradients = outcome([4, 1, 2**62, 2**62 + 1, -1])
    assert torch.equal(loss, outcome(None)[0])
    assert_same_loss_and_gradients((loss, gradients), outcome(None))
    assert not torch.allclose(outcome([4, 1, 9, 0, 4])[0], outcome(None)[0], rtol=1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_half_precision_features_lose_nothing_in_the_loss(loss_type, chunk_size):
    images, texts, scale, bias = leaves(5)
    options = {"loss_type": loss_type, "chunk_size": chunk_size, "text_group_ids": torch.tensor(GROUPS[:5])}
    expected = contrastive_loss(images.bfloat16().float(), texts.bfloat16().float(), scale, bias, **options)
    loss = contrastive_loss(images.bfloat16(), texts.bfloat16(), scale, bias, **options)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_groups_keep_no_matrix_of_who_matches_whom_for_the_backward_pass():
    kept = []
    images, texts, scale, bias = leaves(64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        contrastive_loss(images, texts, scale, bias, chunk_size=8, text_group_ids=torch.arange(64) // 3)
    assert sum({tensor.data_ptr(): tensor.numel() for tensor in kept}.values()) < 64 * 64


@pytest.mark.parametrize("options", [{"loss_type": "triplet"}, {"exchange": "broadcast"}])
def test_unknown_losses_and_exchanges_are_refused(options):
    ((name, value),) = options.items()
    known = {"loss_type": r"\('sigmoid', 'softmax'\)", "exchange": r"\('gather', 'ring'\)"}[name]
    with pytest.raises(ValueError, match=f"`{name}` must be one of {known}, got '{value}'"):
        contrastive_loss(torch.eye(2), torch.eye(2), torch.zeros(1), **options)


def test_unequal_numbers_of_volumes_and_texts_are_refused():
    with pytest.raises(ValueError, match="got 2 volumes and 3 texts"):
        contrastive_loss(unit_vectors(2, 0), unit_vectors(3, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="got 2 volumes and 3 texts, 2 of them unpaired"):
        contrastive_loss(unit_vectors(2, 0), unit_vectors(3, 1), torch.zeros(1), num_unpaired_texts=2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
def test_autocast_does_not_reach_the_loss(loss_type):
    """A product of similarities in bfloat16 would move the loss by up to a thousandth."""
    images, texts = unit_vectors(9, 0), unit_vectors(9, 1)
    scalars = torch.tensor([2.5]), torch.tensor([-3.0])
    ids = torch.tensor([1, 2, 1, 3, 4, 5, 6, 2, 7])
    for group_ids in (None, ids):
        expected = contrastive_loss(images, texts, *scalars, loss_type=loss_type, text_group_ids=group_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = contrastive_loss(images, texts, *scalars, loss_type=loss_type, text_group_ids=group_ids)
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_other_numbers_of_group_ids_are_refused(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected `text_group_ids` of shape \(2,\), got .*one id for each text"):
        contrastive_loss(unit_vectors(2, 0), unit_vectors(2, 1), torch.zeros(1), text_group_ids=ids)


def compute_on_a_share(rank, batch_sizes, unpaired_sizes, settings, result):
    total, unpaired = sum(batch_sizes), sum(unpaired_sizes)
    rows = list(range(sum(batch_sizes[:rank]), sum(batch_sizes[: rank + 1])))
    first = total + sum(unpaired_sizes[:rank])
    text_rows = [*rows, *range(first, first + unpaired_sizes[rank])]
    outcomes = []
    for loss_type, exchange, chunk_size, grouped in settings:
        images, texts, scale, bias = leaves(total, unpaired=unpaired)
        loss = contrastive_loss(
            images[rows],
            texts[text_rows],
            scale,
            bias if loss_type == "sigmoid" else None,
            loss_type,
            exchange,
            chunk_size,
            torch.tensor(GROUPS)[text_rows] if grouped else None,
            unpaired_sizes[rank],
        )
        loss.backward()
        gradients = [tensor.grad for tensor in (images, texts, scale, bias) if tensor.grad is not None]
        for tensor in (loss := loss.detach(), *gradients):  # what data parallelism does: the mean over processes
            dist.all_reduce(tensor)
            tensor /= len(batch_sizes)
        outcomes.append((loss, gradients))
    if rank == 0:
        torch.save(outcomes, result)


@pytest.mark.parametrize(
    ("batch_sizes", "unpaired_sizes"),
    [
        ((5,), (0,)),
        pytest.param((4, 4), (0, 0), marks=pytest.mark.slow),
        pytest.param((5, 2), (0, 0), marks=pytest.mark.slow),
        ((2, 3, 1), (0, 0, 0)),
        ((2, 2), (1, 3)),
    ],
    ids=str,
)
def test_many_processes_give_the_loss_and_gradients_of_one(batch_sizes, unpaired_sizes, tmp_path):
    settings = [
        (loss_type, exchange, chunk_size, grouped)
        for loss_type in ("sigmoid", "softmax")
        for exchange in ("gather", "ring")
        for chunk_size in (None, 3)  # 3 divides neither a process's batch nor the global one: an uneven last chunk
        for grouped in (False, True)
    ]
    result = tmp_path / "result.pt"
    run_processes(compute_on_a_share, len(batch_sizes), tmp_path, batch_sizes, unpaired_sizes, settings, result)
    total, unpaired = sum(batch_sizes), sum(unpaired_sizes)
    for (loss_type, exchange, chunk_size, grouped), outcome in zip(settings, torch.load(result), strict=True):
        plain = partial(PLAIN[loss_type], ids=GROUPS[: total + unpaired] if grouped else None)
        expected = loss_and_gradients(plain, total, loss_type, unpaired)
        name = f"{loss_type}, {exchange}, chunks of {chunk_size}, {'with' if grouped else 'without'} groups"
        assert_same_loss_and_gradients(outcome, expected, name)


LARGEST_MATRIX = {("gather", None): 4 * 8, ("ring", None): 4 * 4, ("gather", 3): 4 * 3}


def record_the_largest_matrix(rank, result):
    sizes = []
    original = nn.functional.softplus
    nn.functional.softplus = lambda logits: sizes.append(logits.numel()) or original(logits)
    images, texts, scale, bias = leaves(8)
    own, largest = slice(4 * rank, 4 * rank + 4), {}
    for exchange, chunk_size in LARGEST_MATRIX:
        sizes.clear()
        contrastive_loss(images[own], texts[own], scale, bias, exchange=exchange, chunk_size=chunk_size)
        largest[exchange, chunk_size] = max(sizes)
    if rank == 0:
        torch.save(largest, result)


def test_no_process_builds_the_global_matrix(tmp_path):
    """Two processes with 4 pairs each hold their own rows times one block of columns, never 8 x 8 logits."""
    result = tmp_path / "result.pt"
    run_processes(record_the_largest_matrix, 2, tmp_path, result)
    assert torch.load(result) == LARGEST_MATRIX


@pytest.mark.parametrize("groups", [None, [5, 2, 5]])
def test_model_uses_the_loss_of_its_configuration(groups):
    ids = None if groups is None else torch.tensor(groups)
    for loss_type in ("sigmoid", "softmax"):
        model = tiny.tiny_siglip(loss_type=loss_type)
        batch = {"input_ids": torch.randint(8, 99, (3, 5)), "pixel_values": tiny.random_volumes(3)}
        outputs = model(**batch, text_group_ids=ids, return_loss=True)
        embeds = outputs.image_embeds, outputs.text_embeds
        expected = PLAIN[loss_type](*embeds, model.logit_scale, model.logit_bias, groups)
        torch.testing.assert_close(outputs.loss, expected)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.randint(8, 99, (2, 5))])
        ids = None if groups is None else torch.tensor([*groups, 2, 4])
        outputs = model(**batch, text_group_ids=ids, num_unpaired_texts=2, return_loss=True)
        embeds = outputs.image_embeds, outputs.text_embeds
        expected = PLAIN[loss_type](*embeds, model.logit_scale, model.logit_bias, groups and [*groups, 2, 4])
        torch.testing.assert_close(outputs.loss, expected)
        ids = None if groups is None else torch.tensor(groups)


def test_groups_have_no_effect_without_a_loss():
    model = tiny.tiny_siglip()
    batch = {"input_ids": torch.randint(8, 99, (3, 5)), "pixel_values": tiny.random_volumes(2)}
    outputs = model(**batch, text_group_ids=torch.zeros(7, dtype=torch.long))
    assert outputs.loss is None
    assert torch.equal(outputs.logits_per_image, model(**batch).logits_per_image)
