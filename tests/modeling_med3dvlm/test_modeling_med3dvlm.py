import copy

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
)

from med3dvlm import Med3DVLMConfig, Med3DVLMForConditionalGeneration, Med3DVLMModel
from med3dvlm.modeling_med3dvlm import modeling_med3dvlm
from med3dvlm.modeling_med3dvlm.modeling_med3dvlm import CACHE_NAME, Med3DVLMImageFeatures
from med3dvlm.train.models import add_lora


TEXT = [11, 12, 13]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_vlm()


def one_volume(model, seed=0, text=TEXT):
    input_ids = tiny.text_with_volumes(model.config, [10], 1, text)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": tiny.random_volumes(1, seed),
    }


def padded_batch(model):
    """One text with a volume, a longer one with two, and one without, padded on the left."""
    rows = [
        tiny.text_with_volumes(model.config, [10], 1, TEXT)[0],
        tiny.text_with_volumes(model.config, [10, 14], 1, [15], 1, TEXT)[0],
        torch.tensor([20, 21, 22, 23]),
    ]
    length = max(map(len, rows))
    input_ids = torch.stack([nn.functional.pad(row, (length - len(row), 0), value=tiny.PAD_TOKEN_ID) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "pixel_values": tiny.random_volumes(3, seed=5)}, rows


def generate(model, **inputs):
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **inputs}
    return model.generate(**settings)[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else None


def test_image_tokens_take_the_places_of_the_placeholders(model):
    inputs = one_volume(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    image_tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[0, 1 : 1 + model.config.image_seq_length] = image_tokens[0]
    expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.logits, expected)
    assert torch.equal(outputs.image_hidden_states, image_tokens)


def test_image_features_are_the_towers_last_two_stages_projected(model):
    volumes = tiny.random_volumes(2)
    features = model.get_image_features(volumes, output_hidden_states=True)
    stages = model.model.vision_tower(volumes, output_hidden_states=True).hidden_states
    low, high = (stage.flatten(2).transpose(1, 2) for stage in stages[-2:])
    assert torch.equal(features.low_level_states, low) and torch.equal(features.high_level_states, high)
    assert torch.equal(features.pooler_output, model.model.multi_modal_projector(low, high))
    assert features.pooler_output.shape == (2, model.config.image_seq_length, 32)
    assert len(features.hidden_states) == 5
    assert model.get_image_features(volumes).hidden_states is None


@pytest.mark.parametrize("layers", [(1, -1), (-2, 0)])
def test_streams_are_the_layers_that_the_configuration_names(layers):
    model = tiny.tiny_vlm(vision_config=tiny.tiny_vit3d_config(), vision_feature_layers=layers)
    volumes = tiny.random_volumes(2)
    features = model.get_image_features(volumes)
    states = model.model.vision_tower(volumes, output_hidden_states=True).hidden_states
    low, high = (states[layer] for layer in layers)
    assert torch.equal(features.low_level_states, low) and torch.equal(features.high_level_states, high)


def test_places_of_image_tokens_are_on_the_device_of_the_embeddings(model):
    input_ids = one_volume(model)["input_ids"]
    embeds, image_tokens = torch.empty(1, 12, 32, device="meta"), torch.empty(1, 8, 32, device="meta")
    mask = model.model.get_placeholder_mask(input_ids, embeds, image_tokens)
    assert mask.device.type == "meta" and mask.shape == (1, 12, 1)


def test_features_of_another_model_are_refused(model):
    inputs = one_volume(model)
    del inputs["pixel_values"]
    features = Med3DVLMImageFeatures(pooler_output=torch.zeros(1, 8, 64))
    with pytest.raises(ValueError, match="as wide as the embeddings of the text, 32, got 64: .* another model"):
        model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("has_volume", [True, False])
def test_generation_returns_the_hidden_states_of_the_language_model(model, has_volume):
    inputs = one_volume(model) if has_volume else {"input_ids": torch.tensor([[10, *TEXT]])}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    outputs = model.generate(**inputs, **options, output_hidden_states=True, return_dict_in_generate=True)
    assert len(outputs.hidden_states) == 3
    for states in outputs.hidden_states:
        assert len(states) == 3 and all(isinstance(state, torch.Tensor) for state in states)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prefill_chunk_size": 4}],
    ids=lambda settings: next(iter(settings)),
)
def test_volumes_that_the_text_does_not_show_are_refused_by_every_way_to_answer(model, settings):
    inputs = one_volume(model)
    inputs["pixel_values"] = tiny.random_volumes(2)
    with pytest.raises(ValueError, match="8 image placeholders.*16 image tokens"):
        generate(model, **inputs, **settings)
    features = model.get_image_features(inputs.pop("pixel_values"))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="8 image placeholders.*16 image tokens"):
        model.generate(**inputs, mm_encoder_outputs={"image": features}, max_new_tokens=2, **settings)


def test_a_text_that_is_continued_may_show_volumes_that_were_read_before(model):
    first = tiny.text_with_volumes(model.config, [10], 1, TEXT)
    whole = torch.cat([first, tiny.text_with_volumes(model.config, [14], 1, TEXT)], dim=1)
    volumes = tiny.random_volumes(2)
    expected = generate(model, input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=volumes)
    cache = getattr(model(input_ids=first, pixel_values=volumes[:1], use_cache=True), CACHE_NAME)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": volumes[1:]}
    assert torch.equal(generate(model, **inputs, **{CACHE_NAME: cache}), expected)


def two_turns(model, num_texts=1, is_padded=False):
    """Chats of two turns with a volume each, their masks, the length of the first turn, and its keys and values."""
    turns = [tiny.text_with_volumes(model.config, [start], 1, TEXT).repeat(num_texts, 1) for start in (10, 14)]
    if is_padded:  # in the first text only
        begin = torch.full((num_texts, 1), 20)
        begin[0] = tiny.PAD_TOKEN_ID
        turns[0] = torch.cat([begin, turns[0]], dim=1)
    whole, length = torch.cat(turns, dim=1), turns[0].shape[1]
    mask = (whole != tiny.PAD_TOKEN_ID).long()
    factors = torch.tensor([1.0, 50.0, -50.0, 200.0])[: 2 * num_texts]  # the answers differ
    volumes = tiny.random_volumes(2 * num_texts, seed=4) * factors.view(-1, 1, 1, 1, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    begun = model(
        input_ids=turns[0],
        attention_mask=mask[:, :length],
        position_ids=positions[:, :length],
        pixel_values=volumes[::2],
        use_cache=True,
    )
    return whole, mask, length, volumes, getattr(begun, CACHE_NAME)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "top_k": 1}], ids=["beams", "sampled"])
@pytest.mark.parametrize(
    "num_texts, is_whole, is_padded",
    [(1, True, False), (1, False, False), (2, True, False), (2, False, False), (2, True, True)],
)
def test_a_chat_goes_on_with_its_own_new_volume_in_every_answer(model, num_texts, is_whole, is_padded, settings):
    """As without a cache, whether the whole chat is given or the new turn alone."""
    whole, mask, length, volumes, cache = two_turns(model, num_texts, is_padded)
    options = {"attention_mask": mask, "num_return_sequences": 2, **settings}
    expected = generate(model, input_ids=whole, pixel_values=volumes, **options)
    assert len({tuple(answer) for answer in expected.tolist()}) >= num_texts
    cache.batch_repeat_interleave(2)
    input_ids = whole if is_whole else whole[:, length:]
    answers = generate(model, input_ids=input_ids, pixel_values=volumes[1::2], **options, **{CACHE_NAME: cache})
    assert torch.equal(answers, expected)


@pytest.mark.parametrize("is_whole", [True, False])
def test_volumes_that_a_later_turn_lacks_or_repeats_are_refused(model, is_whole):
    whole, mask, length, volumes, cache = two_turns(model)
    inputs = {"input_ids": whole if is_whole else whole[:, length:], "attention_mask": mask, CACHE_NAME: cache}
    with pytest.raises(ValueError, match="has 8 image placeholders .*no volume was given"):
        generate(model, **inputs)
    with pytest.raises(
        ValueError,
        match=f"after the {length} tokens in the cache, the 2 volumes have 16 .* Volumes of earlier turns are in the cache: pass only .*`attention_mask`",
    ):
        generate(model, **inputs, pixel_values=volumes)


@pytest.mark.parametrize("has_volume", [True, False])
def test_a_new_turn_alone_without_the_mask_that_tells_so_is_refused(model, has_volume):
    whole, _, length, volumes, cache = two_turns(model)
    inputs = {"input_ids": whole[:, length:], "pixel_values": volumes[1:]}
    if not has_volume:
        inputs = {"input_ids": torch.tensor([[14, *TEXT]])}
    num_tokens = inputs["input_ids"].shape[1]
    with pytest.raises(
        ValueError,
        match=f"holds {length} tokens, the text has {num_tokens}: pass the whole chat, or the new turn with an `attention_mask`",
    ):
        generate(model, **inputs, **{CACHE_NAME: cache})


@pytest.mark.parametrize("are_of_new_tokens", [False, True])
def test_a_later_turn_without_a_volume_is_answered_from_the_cache(model, are_of_new_tokens):
    whole, _, length, volumes, cache = two_turns(model)
    input_ids = torch.cat([whole[:, :length], torch.tensor([[14, *TEXT]])], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = generate(model, **inputs, pixel_values=volumes[:1])
    if are_of_new_tokens:
        inputs["position_ids"] = torch.arange(length, input_ids.shape[1])[None]
    assert torch.equal(generate(model, **inputs, **{CACHE_NAME: cache}), expected)


def test_answers_depend_on_the_volume(model):
    assert not torch.allclose(model(**one_volume(model, 0)).logits[:, -1], model(**one_volume(model, 1)).logits[:, -1])


def test_loss_is_the_mean_cross_entropy_of_the_next_tokens(model):
    inputs = one_volume(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    outputs = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits[0, -4:-1], inputs["input_ids"][0, -3:])
    torch.testing.assert_close(outputs.loss, expected)
    counted = model(**inputs, labels=labels, num_items_in_batch=6).loss
    torch.testing.assert_close(counted, expected * 3 / 6)


@pytest.mark.parametrize("num_items", [None, 6])
def test_scoring_only_what_is_learnt_gives_the_same_loss_and_gradients(model, num_items):
    (inputs, _), options = padded_batch(model), {} if num_items is None else {"num_items_in_batch": num_items}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, :-3] = -100  # three tokens of one text, all of the others
    is_before = torch.zeros_like(labels, dtype=torch.bool)
    is_before[:, :-1] = labels[:, 1:] != -100
    results = []
    for positions in (0, is_before):
        model.zero_grad()
        outputs = model(**inputs, labels=labels, logits_to_keep=positions, **options)
        outputs.loss.backward()
        results.append((outputs, [parameter.grad.clone() for parameter in model.parameters()]))
    model.zero_grad()
    (whole, whole_gradients), (kept, kept_gradients) = results
    assert kept.logits.shape == (int(is_before.sum()), model.config.text_config.vocab_size)
    torch.testing.assert_close(kept.logits, whole.logits[is_before])
    torch.testing.assert_close(kept.loss, whole.loss)
    torch.testing.assert_close(kept_gradients, whole_gradients)


def test_several_volumes_go_to_their_own_places(model):
    input_ids = tiny.text_with_volumes(model.config, [10], 1, [14], 1, TEXT)
    volumes = tiny.random_volumes(2)
    logits = model(input_ids=input_ids, pixel_values=volumes).logits
    swapped = model(input_ids=input_ids, pixel_values=volumes.flip(0)).logits
    assert not torch.allclose(logits, swapped)
    adjacent = tiny.text_with_volumes(model.config, [10], 2, TEXT)
    assert model(input_ids=adjacent, pixel_values=volumes).logits.isfinite().all()


def test_padded_batch_gives_the_logits_of_single_texts(model):
    batch, rows = padded_batch(model)
    logits = model(**batch).logits
    volumes = batch["pixel_values"].split([1, 2, 0])
    for index, (row, own) in enumerate(zip(rows, volumes)):
        alone = model(input_ids=row[None], pixel_values=own if len(own) else None).logits[0]
        torch.testing.assert_close(logits[index, -len(row) :], alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padded_batch_generates_what_single_texts_do(model, settings):
    batch, rows = padded_batch(model)
    together = generate(model, **batch, **settings)
    volumes = batch["pixel_values"].split([1, 2, 0])
    for index, (row, own) in enumerate(zip(rows, volumes)):
        inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        alone = generate(model, **inputs, **({"pixel_values": own} if len(own) else {}), **settings)
        assert torch.equal(together[index], alone[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_keys_and_values_go_on_under_the_names_of_both_transformers(model, name):
    inputs = one_volume(model)
    whole = model(**inputs).logits
    begun = model(**{**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": None}, use_cache=True)
    kept = getattr(begun, CACHE_NAME)
    rest = model(input_ids=inputs["input_ids"][:, -2:], **{name: kept}, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, -2:])
    assert getattr(rest, CACHE_NAME).get_seq_length() == inputs["input_ids"].shape[1]


def test_keys_and_values_under_two_names_are_refused(model):
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match="`past_key_values` or `cache`, not both"):
        model(input_ids=torch.tensor([[10]]), past_key_values=cache, cache=cache)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_pages_of_continuous_batching_go_on_under_their_own_name(model, name, monkeypatch):
    class Received(Exception):
        pass

    def receive(**kwargs):
        raise Received(kwargs)

    monkeypatch.setattr(modeling_med3dvlm, "CACHE_NAME", name)  # of either transformers
    monkeypatch.setattr(model.model.language_model, "forward", receive)
    pages = object()
    with pytest.raises(Received) as caught:
        model(input_ids=torch.tensor([[10, *TEXT]]), cache=pages)
    (received,) = caught.value.args
    assert received["cache"] is pages and "past_key_values" not in received


def test_greedy_decoding_is_the_argmax_of_the_whole_text_each_time(model):
    inputs = one_volume(model)
    generated = generate(model, **inputs)
    input_ids = inputs["input_ids"]
    for token in generated[0]:
        assert model(input_ids=input_ids, pixel_values=inputs["pixel_values"]).logits[0, -1].argmax() == token
        input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=lambda settings: next(iter(settings)),
)
def test_every_cache_gives_the_same_answer(model, settings):
    inputs = one_volume(model)
    assert torch.equal(generate(model, **inputs, **settings), generate(model, **inputs))


def test_assisted_decoding_gives_the_greedy_answer(model):
    inputs = one_volume(model)
    text_config = copy.deepcopy(model.config.text_config)
    text_config.image_token_id = None
    assistant = AutoModelForCausalLM.from_config(text_config).eval()
    assert torch.equal(generate(model, **inputs, assistant_model=assistant), generate(model, **inputs))


def test_an_assistant_that_reads_volumes_is_refused(model):
    with pytest.raises(ValueError, match="reads text alone as `assistant_model`, .*`prompt_lookup_num_tokens`"):
        generate(model, **one_volume(model), assistant_model=model)


def test_prompt_lookup_gives_the_greedy_answer(model):
    inputs = one_volume(model)  # drafts are copied from the prompt, placeholders included, and must be rejected
    assert torch.equal(generate(model, **inputs, prompt_lookup_num_tokens=3), generate(model, **inputs))


def test_forward_is_captured_as_one_graph(model):
    inputs = one_volume(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_sampling_follows_the_seed_and_returns_several_answers(model):
    batch, _ = padded_batch(model)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(generate(model, **batch, do_sample=True, num_return_sequences=2))
    assert answers[0].shape == (6, 6) and torch.equal(*answers)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampled"])
def test_several_volumes_keep_their_order_in_every_returned_sequence(model, settings):
    """Two texts of two volumes each: as where the image tokens stand in the embeddings of the text already."""
    row, length = tiny.text_with_volumes(model.config, [10], 1, [14], 1, TEXT), model.config.image_seq_length
    input_ids = row.repeat(2, 1)
    factors = torch.tensor([1.0, 50.0, -50.0, 200.0])  # the answers differ
    volumes = tiny.random_volumes(4, seed=4) * factors.view(4, 1, 1, 1, 1)
    tokens = model.get_image_features(volumes).pooler_output

    def embeds_of(order):
        embeds = model.get_input_embeddings()(input_ids).detach()
        for text, (first, second) in enumerate(order):
            embeds[text, 1 : 1 + length] = tokens[first]
            embeds[text, 2 + length : 2 + 2 * length] = tokens[second]
        return embeds

    def answers_to(**prompts):
        """Two answers to each text, and the scores of the first token in every sequence, of beams too."""
        torch.manual_seed(0)
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "num_return_sequences": 2,
            **settings,
        }
        options |= {
            "attention_mask": torch.ones_like(input_ids),
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        outputs = model.generate(**prompts, **options)
        return outputs.sequences[:, -6:], outputs.logits[0]

    answers, scores = answers_to(input_ids=input_ids, pixel_values=volumes)
    expected_answers, expected_scores = answers_to(inputs_embeds=embeds_of([(0, 1), (2, 3)]))
    assert torch.equal(answers, expected_answers) and answers.shape == (4, 6)
    assert len({tuple(answer) for answer in answers.tolist()}) == 4
    torch.testing.assert_close(scores, expected_scores)
    for order in ([(1, 0), (3, 2)], [(2, 3), (0, 1)], [(0, 2), (1, 3)]):  # the order tells
        _, others = answers_to(inputs_embeds=embeds_of(order))
        assert ((others - scores).abs().amax(dim=1) > 0.01).all()


def test_volumes_are_encoded_once_for_a_whole_answer(model):
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, **one_volume(model), num_beams=2)
    handle.remove()
    assert len(calls) == 1


def test_features_encoded_before_serve_in_place_of_the_volumes(model):
    inputs = one_volume(model)
    expected, expected_answer = model(**inputs).logits, generate(model, **inputs)
    features = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)
    assert torch.equal(generate(model, **inputs, mm_encoder_outputs={"image": features}), expected_answer)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_features_serve_any_number_of_questions(model, options):
    row = tiny.text_with_volumes(model.config, [10], 1, TEXT)
    inputs = {"input_ids": row.repeat(2, 1), "attention_mask": torch.ones_like(row).repeat(2, 1)}
    volumes = tiny.random_volumes(2) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1, 1)  # the answers differ
    features = model.get_image_features(volumes)
    tokens = features.pooler_output.clone()
    expected = generate(model, **inputs, pixel_values=volumes, **options)
    assert not torch.equal(*expected.chunk(2))
    for _ in range(2):
        assert torch.equal(generate(model, **inputs, mm_encoder_outputs={"image": features}, **options), expected)
        assert torch.equal(features.pooler_output, tokens)


def test_embeddings_serve_in_place_of_ids(model):
    inputs = one_volume(model)
    expected, expected_answer = model(**inputs).logits, generate(model, **inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(**inputs, inputs_embeds=embeds).logits, expected)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, inputs_embeds=embeds, **settings), expected_answer)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_handed_to_the_parts(attention):
    overrides = {"vision_config": tiny.tiny_vit3d_config()}
    config = tiny.tiny_vlm_config(**overrides)
    model = Med3DVLMForConditionalGeneration._from_config(config, attn_implementation=attention)
    assert model.model.language_model.config._attn_implementation == attention
    assert model.model.vision_tower.config._attn_implementation == attention


def test_attention_implementations_agree(tmp_path, model):
    model.save_pretrained(tmp_path)
    logits = [
        Med3DVLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)(
            **one_volume(model)
        ).logits
        for attention in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_checkpointing_keeps_loss_and_gradients():
    plain = tiny.tiny_vlm().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    inputs = one_volume(plain)
    for model in (plain, checkpointed):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_gradients_for_checkpointing_begin_at_the_text_not_in_the_volume_encoder():
    model = tiny.tiny_vlm().train().requires_grad_(False)
    model.enable_input_require_grads()
    inputs = one_volume(model)
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad
    assert not model.model.vision_tower(inputs["pixel_values"]).last_hidden_state.requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_every_weight_is_trained():
    model = tiny.tiny_vlm().train()
    inputs = one_volume(model)
    inputs["pixel_values"] = tiny.random_volumes(1).repeat(1, 1, 1, 1, 1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_save_and_load_is_exact_to_the_bit(tmp_path, model):
    model.save_pretrained(tmp_path)
    inputs = one_volume(model)
    expected = model(**inputs).logits
    for auto_class in (
        Med3DVLMForConditionalGeneration,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    ):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, Med3DVLMForConditionalGeneration)
        assert torch.equal(loaded(**inputs).logits, expected)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is Med3DVLMModel
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_base_models_checkpoint_lacks_only_the_head(tmp_path, model):
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 missing in the checkpoint: lm_head.weight"):
        Med3DVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_tied_embeddings_share_one_tensor_and_survive(tmp_path):
    model = tiny.tiny_vlm(text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(**one_volume(model)).logits, model(**one_volume(model)).logits)
    model.model.save_pretrained(tmp_path / "base")  # the head is the embedding: nothing is missing
    Med3DVLMForConditionalGeneration.from_pretrained(tmp_path / "base")


def other_text_config(model_type, **sizes):
    """A tiny language model whose parts have other names than Qwen2's."""
    fields = {"vocab_size": tiny.VOCAB_SIZE, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **fields, **sizes, tie_word_embeddings=True)


OTHER_LANGUAGE_MODELS = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
}


@pytest.mark.parametrize("model_type", OTHER_LANGUAGE_MODELS)
def test_tied_language_models_of_other_names_share_one_tensor_and_survive(model_type, tmp_path):
    config = tiny.tiny_vlm_config().to_dict()
    config["text_config"] = other_text_config(model_type, **OTHER_LANGUAGE_MODELS[model_type])
    model = Med3DVLMForConditionalGeneration(Med3DVLMConfig(**config)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    inputs = one_volume(model)
    expected, answer = model(**inputs).logits, generate(model, **inputs)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(**inputs).logits, expected) and torch.equal(generate(loaded, **inputs), answer)


def test_embeddings_of_another_width_than_hidden_states_are_refused():
    config = tiny.tiny_vlm_config().to_dict()
    sizes = {**OTHER_LANGUAGE_MODELS["opt"], "word_embed_proj_dim": 16}
    config["text_config"] = other_text_config("opt", **sizes)
    with pytest.raises(ValueError, match="as wide as its hidden states, 32, .*OPTModel are 16 wide"):
        Med3DVLMForConditionalGeneration(Med3DVLMConfig(**config))


def test_a_decoder_without_attention_is_refused():
    config = tiny.tiny_vlm_config().to_dict()
    config["text_config"] = other_text_config("mamba", hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="a decoder with attention, .* got MambaModel"):
        Med3DVLMForConditionalGeneration(Med3DVLMConfig(**config))


def test_a_bias_of_the_head_is_not_lost_in_silence(tmp_path, model):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "lm_head.bias": torch.ones(tiny.VOCAB_SIZE)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 not part of the model: lm_head.bias"):
        Med3DVLMForConditionalGeneration.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)  # the base model has no head at all


@pytest.mark.parametrize("projector", ["mixer", "low_high_mlp", "mhsa"])
def test_projectors_of_two_streams_are_not_split_over_devices(projector):
    vision_config = tiny.tiny_dcformer_config(hidden_sizes=(4, 6, 8, 10, 16))  # eight heads of two channels
    with torch.device("meta"):
        config = tiny.tiny_vlm_config(projector_type=projector, vision_config=vision_config)
        model = Med3DVLMForConditionalGeneration(config)
    assert type(model.model.multi_modal_projector).__name__ in model._no_split_modules
    assert {"DCFormerLayer", "Qwen2DecoderLayer"} <= model._no_split_modules  # the parts' own stay


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings_keeps_the_answers(tied):
    model = tiny.tiny_vlm(text_config={"tie_word_embeddings": tied})
    expected = model(**one_volume(model)).logits
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 5)
    assert model.config.text_config.vocab_size == tiny.VOCAB_SIZE + 5
    logits = model(**one_volume(model)).logits
    assert logits.shape[-1] == tiny.VOCAB_SIZE + 5
    torch.testing.assert_close(logits[..., : tiny.VOCAB_SIZE], expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_device_map_places_parts_and_keeps_the_answers(tmp_path, model):
    model.save_pretrained(tmp_path)
    devices = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    for device_map in ("auto", {**devices, "lm_head": "cpu"}):
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert torch.equal(generate(loaded, **one_volume(model)), generate(model, **one_volume(model)))


LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def test_lora_trains_the_language_model_and_the_whole_projector(tmp_path):
    base = tiny.tiny_vlm()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(base, settings).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora_" in name and "language_model" in name) or "multi_modal_projector" in name for name in trained)
    projector = {name for name, _ in base.named_parameters() if "multi_modal_projector.modules_to_save" in name}
    assert projector and {f"base_model.model.{name}" for name in projector} <= trained
    inputs = one_volume(base)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(**inputs).logits
    fresh = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is Med3DVLMForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_projector_trained_in_float32_answers_in_a_bfloat16_model_without_autocast():
    model = add_lora(tiny.tiny_vlm().bfloat16(), {"r": 2}, trained=["multi_modal_projector"]).eval()
    projector = model.base_model.model.model.multi_modal_projector.modules_to_save["default"]
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}
    inputs = one_volume(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())
    assert generate(model, **inputs).shape[0] == 1


def test_first_placeholder_can_keep_its_embedding_as_in_the_original():
    model = tiny.tiny_vlm(prepend_image_token_embedding=True)
    inputs = one_volume(model)
    assert model.config.image_seq_length == 5 + 3 + 1
    image_tokens = model(**inputs).image_hidden_states
    embedding = model.get_input_embeddings().weight[tiny.IMAGE_TOKEN_ID]
    assert torch.equal(image_tokens[0, 0], embedding)
    generate(model, **inputs, num_beams=2)


@pytest.mark.parametrize("config", [tiny.tiny_vlm_config(), Med3DVLMConfig()], ids=["tiny", "paper"])
def test_model_is_built_from_its_configuration_alone(config):
    with torch.device("meta"):
        model = Med3DVLMForConditionalGeneration(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    if config.text_config.hidden_size == 3584:  # the paper's: Qwen2.5-7B, DCFormer-small and the Mixer projector
        assert sum(parameter.numel() for parameter in model.model.vision_tower.parameters()) == 18_244_800
        assert sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters()) == 47_221_248


def test_dtype_reaches_all_parts(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(**one_volume(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_parts_are_of_one_dtype_whatever_their_configurations_remember(part, tmp_path):
    config = tiny.tiny_vlm_config()
    getattr(config, part).dtype = torch.bfloat16  # as that of a pretrained part
    model = Med3DVLMForConditionalGeneration(config).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(**one_volume(model)).logits.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inputs: inputs.update(pixel_values=tiny.random_volumes(2)), "8 image placeholders.*16 image tokens"),
        (lambda inputs: inputs.update(input_ids=inputs["input_ids"][:, 3:]), "6 image placeholders.*8 image tokens"),
        (lambda inputs: inputs.pop("pixel_values"), "8 image placeholders .*no volume was given"),
        (lambda inputs: inputs.pop("input_ids"), "exactly one of `input_ids` and `inputs_embeds`"),
        (lambda inputs: inputs.update(inputs_embeds=torch.zeros(1, 12, 32)), "exactly one of"),
        (lambda inputs: inputs.update(mm_encoder_outputs={"image": object()}), "not both"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(1, 1, 32, 96, 64)), r"1, 32, 64, 96\).*got"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(1, 3, 32, 64, 96)), "`num_channels` 1 and .*got"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(1, 32, 64, 96)), "got"),
        (
            lambda inputs: inputs.update(logits_to_keep=torch.ones(12, 1, dtype=torch.bool)),
            r"mask `logits_to_keep` of shape \(1, 12\).*got \(12, 1\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, change, message):
    inputs = one_volume(model)
    del inputs["attention_mask"]
    change(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)
