"""A short training run of a tiny vision-language model, guarded as a long one is, and the same in processes of its own."""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any


sys.modules["torchvision"] = None  # type: ignore[assignment]

import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from med3dvlm.train.checkpoints import (
    CheckpointGuard,
    StopOnSignal,
    done_by_first_process,
    prepare_resume,
    train_or_finish,
)


NUM_SAMPLES = 7  # an odd number, so that an epoch ends with a smaller batch
ZERO_2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 5e6},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 1000000,
}


class Samples(torch.utils.data.Dataset):
    """Texts with a volume, made on demand."""

    def __init__(self, config: Any):
        self.config = config

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = tiny.text_with_volumes(self.config, [10], 1, [20 + index, 30, 40])[0]
        labels = input_ids.masked_fill(input_ids == tiny.IMAGE_TOKEN_ID, -100)
        volume = tiny.random_volumes(1, seed=index, image_size=self.config.vision_config.image_size)[0]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": volume}


class Signaller(TrainerCallback):
    """Sends this process a signal during a step, and says in a file which step has ended."""

    def __init__(self, at_step: int | None, progress: Path | None):
        self.at_step, self.progress = at_step, progress

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.write_text(str(state.global_step))


def make_arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    fields = {
        "max_steps": 6,
        "save_steps": 1,
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**fields, **overrides})


def train(
    output_dir: Path,
    settings: dict[str, Any] | None = None,
    signal_at: int | None = None,
    progress: Path | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **overrides: Any,
) -> tuple[Trainer, StopOnSignal, str | None]:
    """Runs or resumes the training; returns the trainer, the callback for signals, and the checkpoint resumed from."""
    torch.set_num_threads(1)
    args = make_arguments(output_dir, **overrides)
    checkpoint = prepare_resume(args, settings)
    # Dropout, so that a random state that is not restored shows in the loss.
    model = tiny.tiny_vlm(
        vision_config=tiny.tiny_vit3d_config(image_size=(8, 16, 24), patch_size=(4, 8, 8)),
        text_config={"attention_dropout": 0.1},
    )
    stop = StopOnSignal()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Samples(model.config),
        callbacks=[*callbacks, CheckpointGuard(settings), stop, Signaller(signal_at, progress)],
    )
    train_or_finish(trainer, checkpoint)
    return trainer, stop, checkpoint


def read_trace(trainer: Trainer) -> list[list[float]]:
    """Step, loss and gradient norm of every step, also of those before a resume."""
    return [
        [entry["step"], entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry
    ]


def train_in_process(output_dir: Path, rank: int, world_size: int, zero_2: bool, arguments: dict[str, Any]) -> None:
    """
    What one of `world_size` processes does, in an environment such as torchrun gives, but that they meet in a file: a free port
    may be another's when it is used. When training ends it writes `trace-RANK.json` into the output folder, and exits as
    [`StopOnSignal`] advises: with 143 if SIGTERM ended it.
    """
    os.setsid()
    with (output_dir / f"output-{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # accelerate asks for them; nothing connects
    if zero_2:
        import deepspeed.ops

        # Its shared memory operation takes minutes to compile; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        arguments = {**arguments, "deepspeed": ZERO_2}
    exit_code = 1
    try:
        if world_size > 1:  # Trainer and DeepSpeed take a group that is there
            meeting_place = f"file://{output_dir}/rendezvous"
            torch.distributed.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world_size)
        trainer, stop, checkpoint = train(output_dir, progress=output_dir / f"progress-{rank}", **arguments)
        report = {"trace": read_trace(trainer), "step": trainer.state.global_step, "resumed_from": checkpoint}
        (output_dir / f"trace-{rank}.json").write_text(json.dumps(report))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        exit_code = stop.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without taking the interpreter down piece by piece: gloo's threads can hang or abort there.
        os._exit(exit_code)


def wait_for_the_first(rank: int, folder: Path, seconds: float, limit: float) -> None:
    """What one of two processes does whose communication has a time limit, shorter than the first one works."""
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2, timeout=timedelta(seconds=limit)
    )

    def work() -> str:
        time.sleep(seconds)
        (folder / f"worked-{rank}").touch()
        return "done"

    def fail() -> str:
        raise FileNotFoundError("scan.nii.gz is missing")

    results = [done_by_first_process(work)]
    try:
        done_by_first_process(fail)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
