"""
Loads published folders the way a stranger does, and says what came of it.

    python clean_environment.py FOLDER [FOLDER ...] SCAN

Meant for an environment with torch, transformers, nibabel and pillow and nothing else: every Auto class and the
pipeline are tried on SCAN, with the network blocked and with every file that is opened for writing watched. In an
environment that has more, `--hide med3dvlm peft` makes packages impossible to import; `--installed` does the reverse and
uses the installed package. `--save` and `--expect` carry the outputs from one to the other, compared bit for bit.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


MESSAGE = "Is there a pleural effusion ?"


def watch(allowed):
    """Refuses sockets; returns the list in which files opened for writing outside of `allowed` will appear."""
    written = []

    def audit(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
            raise RuntimeError(f"{event} {arguments}: the network was used")
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = os.path.abspath(arguments[0])
            if not path.startswith((*map(str, allowed), "/dev/", "/proc/")) and "__pycache__" not in path:
                written.append(path)

    sys.addaudithook(audit)
    return written


def outputs_of(folder, scan):
    """Every Auto class that fits the folder, on one scan: `(names of what was loaded, {name: tensor or text})`."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

    def load(auto_class, **kwargs):
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)
        classes[auto_class.__name__] = f"{type(loaded).__module__}.{type(loaded).__name__}"
        return loaded

    classes, outputs = {}, {}
    config = load(AutoConfig)
    image_processor = load(AutoImageProcessor)
    outputs["pixel_values"] = image_processor(scan, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if config.model_type == "med3dvlm":
            base, model = load(AutoModel), load(transformers.AutoModelForImageTextToText)
            load(transformers.AutoModelForMultimodalLM)
            processor, tokenizer = load(AutoProcessor), load(AutoTokenizer)
            content = [{"type": "image", "path": scan}, {"type": "text", "text": MESSAGE}]
            chat = [{"role": "user", "content": content}]
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            outputs["input_ids"] = inputs["input_ids"]
            outputs["tokenizer"] = tokenizer(MESSAGE, return_tensors="pt")["input_ids"]
            outputs["last_hidden_state"] = base(**inputs).last_hidden_state
            outputs["logits"] = model(**inputs).logits
            outputs["generated"] = model.generate(**inputs, max_new_tokens=6)
            pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
            classes["pipeline"] = f"{type(pipe).__module__}.{type(pipe).__name__}"
            options = {"max_new_tokens": 6, "return_full_text": False}
            outputs["chat answer"] = pipe(text=chat, **options)[0]["generated_text"]
            plain = f"{processor.image_token} {MESSAGE}"
            outputs["plain answer"] = pipe(images=scan, text=plain, **options)[0]["generated_text"]
        elif config.model_type == "dcformer_siglip":
            model, processor = load(AutoModel), load(AutoProcessor)
            load(AutoTokenizer)
            zero_shot = load(transformers.AutoModelForZeroShotImageClassification)
            inputs = processor(images=scan, text=[MESSAGE, "No ."], padding=True, return_tensors="pt")
            outputs["logits_per_image"] = model(**inputs).logits_per_image
            outputs["zero-shot"] = zero_shot(**inputs).logits_per_image
        else:
            model = load(AutoModel)
            result = model(outputs["pixel_values"], output_hidden_states=True)
            outputs["pooler_output"], outputs["last_stage"] = result.pooler_output, result.hidden_states[-1]
            if "AutoBackbone" in config.auto_map:
                # `AutoBackbone.from_pretrained` of transformers takes names on the Hub only, no folder.
                backbone = transformers.AutoBackbone.from_config(config, trust_remote_code=True).eval()
                classes["AutoBackbone"] = f"{type(backbone).__module__}.{type(backbone).__name__}"
                backbone.load_state_dict(model.state_dict())
                outputs["feature_map"] = backbone(outputs["pixel_values"]).feature_maps[-1]
    return classes, outputs


def resave(folder, destination):
    """Saves again what was loaded with the folder's own code."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    kind = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
    model_class = AutoModelForImageTextToText if kind == "med3dvlm" else AutoModel
    processor_class = AutoProcessor if kind in ("med3dvlm", "dcformer_siglip") else AutoImageProcessor
    for auto_class in (model_class, processor_class):
        auto_class.from_pretrained(folder, trust_remote_code=True).save_pretrained(destination)


def run_card(folder, scan):
    """Runs the first example of the folder's card as it stands, on `scan`."""
    card = (Path(folder) / "README.md").read_text()
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    code = code.replace("path/to/this/folder", str(folder)).replace("scan.nii.gz", str(scan))
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=4"), "README.md", "exec"), {})


def same(left, right):
    import torch

    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("scan", metavar="SCAN")
    parser.add_argument("--hide", nargs="*", default=[], help="packages that must not be importable")
    parser.add_argument("--installed", action="store_true", help="use the installed package")
    parser.add_argument("--save", help="file for the outputs")
    parser.add_argument("--expect", help="file with the outputs to expect")
    parser.add_argument("--resave", help="folder for what was loaded, saved again")
    parser.add_argument("--cards", action="store_true", help="run the example of each card")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as home:
        # Before anything of Hugging Face is imported: its caches are decided then.
        os.environ.update(HF_HOME=home, HF_HUB_OFFLINE="1", TORCHINDUCTOR_CACHE_DIR=home)
        allowed = [home, *(str(Path(path).absolute()) for path in (arguments.save, arguments.resave) if path)]
        written = watch(allowed)
        sys.modules.update(dict.fromkeys(arguments.hide))  # None there: neither imported nor found
        if arguments.installed:
            import med3dvlm
        else:
            try:
                import med3dvlm  # noqa: F401
            except ModuleNotFoundError:
                print("ok    med3dvlm cannot be imported")
            else:
                sys.exit("FAIL  med3dvlm can be imported: use a fresh environment, or --hide med3dvlm")
        import torch

        torch.set_num_threads(1)  # sums of several threads need not come out the same twice
        expected = torch.load(arguments.expect) if arguments.expect else {}
        results, failures = {}, []
        for folder in map(Path, arguments.folders):
            classes, results[folder.name] = outputs_of(str(folder), arguments.scan)
            origin = "med3dvlm" if arguments.installed else "transformers_modules"
            for name, loaded in classes.items():
                is_ours = loaded.partition(".")[0] == origin or name in ("AutoTokenizer", "pipeline")
                print(f"{'ok   ' if is_ours else 'FAIL '} {folder.name}: {name} gives {loaded}")
                failures += [] if is_ours else [f"{folder.name}: {name} gives {loaded}"]
            for name, value in results[folder.name].items():
                text = repr(value) if isinstance(value, str) else f"{tuple(value.shape)} {value.dtype}"
                verdict = "ok   "
                if folder.name in expected and not same(value, expected[folder.name][name]):
                    verdict = "FAIL "
                    failures.append(f"{folder.name}: {name} differs from the installed package's")
                compared = ", equal to the bit" if folder.name in expected and verdict == "ok   " else ""
                print(f"{verdict} {folder.name}: {name} {text}{compared}")
            if arguments.resave:
                resave(str(folder), Path(arguments.resave) / folder.name)
            if arguments.cards:
                run_card(folder, arguments.scan)
                print(f"ok    {folder.name}: the card's example runs")
        if arguments.save:
            torch.save(results, arguments.save)
        print(f"{'FAIL ' if written else 'ok   '} files written elsewhere: {json.dumps(sorted(set(written)))}")
        if written or failures:
            sys.exit("\n".join(["FAIL", *failures, *written]))
    print("ok    all of it, with the network blocked")


if __name__ == "__main__":
    main()
