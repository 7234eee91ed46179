"""
Peak memory of a conversion, against its largest shard.

    python tests/modeling_med3dvlm/bench_convert.py [--gigabytes 6] [--shard-gigabytes 1]

Writes a vision-language model in the original's layout, with as many layers of Qwen2.5-7B's sizes as the size asks for,
to a temporary folder, converts it in a process of its own and compares two tensors of every shard to the bit. Twice the
size must be free on the disk. The peak is the process's largest resident size, mapped pages included, over what it was
after the imports. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

# `ru_maxrss` would begin with the size of the process that started this one; the kernel's own mark can be set back.
CONVERT = """
import json, pathlib, sys, time
from med3dvlm.modeling_med3dvlm.convert_original import convert

def high_water_mark():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

pathlib.Path("/proc/self/clear_refs").write_text("5")
baseline, start = high_water_mark(), time.perf_counter()
convert(sys.argv[1], sys.argv[2])
print(json.dumps({"baseline": baseline, "peak": high_water_mark(), "seconds": time.perf_counter() - start}))
"""
VOCABULARY = 4096
SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer of Qwen2."""
    width, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], 128
    keys = SIZES["num_key_value_heads"] * head
    shapes = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, rows in (("q_proj", width), ("k_proj", keys), ("v_proj", keys)):
        shapes |= {f"self_attn.{name}.weight": (rows, width), f"self_attn.{name}.bias": (rows,)}
    shapes["self_attn.o_proj.weight"] = (width, width)
    shapes |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    shapes["mlp.down_proj.weight"] = (width, inner)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def write_source(folder: Path, gigabytes: float, shard_gigabytes: float) -> int:
    """A merged folder of about that size, shard by shard; returns the bytes of the largest shard."""
    import golden_cases
    import original_files
    import torch
    from safetensors.torch import save_file

    num_layers = max(1, round(gigabytes * 1e9 / 466e6))
    width = SIZES["hidden_size"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(num_layers):
        shapes |= layer_shapes(layer)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}
    golden = golden_cases.find_golden("vlm")
    widths = {64: width, 32: width // 2}
    for name, shape in golden.meta["layout"].items():
        if name.startswith("model.vision_tower."):
            shapes[name] = tuple(shape)
        elif name.startswith("model.mm_projector."):  # 64 tokens stay 64, the width 64 grows
            is_token_mlp = ".mlp1." in name
            shapes[name] = tuple(shape) if is_token_mlp else tuple(widths.get(size, size) for size in shape)

    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if groups[-1] and size + num_bytes > shard_gigabytes * 1e9:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    weight_map, largest = {}, 0
    for index, names in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        state = {}
        for number, name in enumerate(names):
            if name.endswith("num_batches_tracked"):
                state[name] = torch.tensor(number)
            else:  # a pattern of its own for each tensor, quickly made
                count = torch.Size(shapes[name]).numel()
                pattern = torch.randn(4099, generator=torch.Generator().manual_seed(1000 * index + number))
                state[name] = pattern.bfloat16().repeat(-(-count // 4099))[:count].reshape(shapes[name])
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        largest = max(largest, (folder / file).stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**original_files.vlm_config(), **SIZES, "num_hidden_layers": num_layers, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    words = [f"w{index}" for index in range(VOCABULARY - 1)]
    original_files.word_tokenizer([*words, original_files.IMAGE_TOKEN], eos_token="w1").save_pretrained(folder)
    return largest


def check_bytes(source: Path, destination: Path) -> int:
    """Compares the first and the last tensor of every source shard with the converted one; returns how many."""
    from safetensors import safe_open

    from med3dvlm.modeling_med3dvlm.original_layout import vision_language_layout

    layout, checked = vision_language_layout("mixer"), 0
    weight_map = json.loads((destination / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            for name in (names[0], names[-1]):
                (ours,), change = layout.find(name)
                with safe_open(destination / weight_map[ours], framework="pt") as other:
                    expected = change.to_ours(opened.get_tensor(name), None)[0]
                    assert other.get_tensor(ours).equal(expected), name
                checked += 1
    return checked


def measure(gigabytes: float, shard_gigabytes: float) -> dict[str, float]:
    """
    Converts a model of `gigabytes` in shards of `shard_gigabytes`.

    Returns:
        `dict`: bytes of the largest shard, baseline and peak, their ratio, and seconds.
    """
    needed = 2.2e9 * gigabytes
    folder = Path(tempfile.mkdtemp(prefix="bench_convert"))
    try:
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
        (folder / "source").mkdir()
        largest = write_source(folder / "source", gigabytes, shard_gigabytes)
        result = subprocess.run(
            [sys.executable, "-c", CONVERT, str(folder / "source"), str(folder / "ours")],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        figures = json.loads(result.stdout.splitlines()[-1])
        checked = check_bytes(folder / "source", folder / "ours")
        total = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
    finally:
        shutil.rmtree(folder)
    ratio = (figures["peak"] - figures["baseline"]) / largest
    return {**figures, "largest_shard": largest, "total": total, "ratio": ratio, "tensors_compared": checked}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--shard-gigabytes", type=float, default=1)
    arguments = parser.parse_args()
    figures = measure(arguments.gigabytes, arguments.shard_gigabytes)
    print(
        f"{figures['total'] / 1e9:.2f} GB, largest shard {figures['largest_shard'] / 1e9:.2f} GB: peak "
        f"{figures['peak'] / 1e9:.2f} GB, {figures['baseline'] / 1e9:.2f} GB of it after the imports, that is "
        f"{figures['ratio']:.2f} times the largest shard above them; {figures['seconds']:.0f} s, "
        f"{figures['tensors_compared']} tensors compared"
    )
