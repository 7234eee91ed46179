"""
Checkpoints that survive a kill at any moment.

[`Trainer`] writes a checkpoint file by file, resumes from the highest number without looking inside, and continues
silently without optimizer or random state when only those files are missing. Here a checkpoint counts only once a marker,
written last, lists every file in it with its size.

Example:

```python
guard, stop = CheckpointGuard(settings), StopOnSignal()
trainer = Trainer(model=model, args=args, train_dataset=samples, callbacks=[guard, stop])
train_or_finish(trainer, prepare_resume(args, settings))
if stop.was_stopped:
    sys.exit(stop.exit_code)
```
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from .files import differences, only_one_at, write_json_atomically


logger = logging.get_logger(__name__)

MARKER_NAME = "COMPLETE.json"
# In the output folder: the checkpoints in it were written under the guard. The underscore keeps it off the Hub.
GUARDED_NAME = "_guarded_checkpoints.json"
LOCK_NAME = "_run.lock"
CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")

Result = TypeVar("Result")


class CheckpointGuard(TrainerCallback):
    """
    Marks each checkpoint as complete, once the files of all processes are on the disk.

    Give it to [`Trainer`] as the last callback that writes into checkpoints, and start with [`prepare_resume`].

    Under [`train_or_finish`] the marker also keeps what Trainer forgets: the losses since the last row of the log, and the loss
    and the time of the whole run. A resumed run then logs what an uninterrupted one does, and its final figures are those of
    all its starts, but for steps that were lost.

    Args:
        settings (`Mapping[str, Any]`, *optional*):
            What must stay the same for a resumed run to be the same run, as JSON can hold it; kept in the marker.

    Attributes:
        trainer (`Trainer` or `None`):
            Whose training it guards, while [`train_or_finish`] runs.
        seconds_before (`float`):
            What earlier starts took, up to the checkpoint that was resumed from.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None):
        self.settings = as_json_holds_it(settings)
        self.trainer: Trainer | None = None
        self.seconds_before, self._began_at = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Raises:
            ValueError: see [`check_checkpoint_arguments`].
        """
        check_checkpoint_arguments(args)
        if state.is_world_process_zero:
            write_json_atomically({"marker": MARKER_NAME}, Path(str(args.output_dir)) / GUARDED_NAME)
        self.seconds_before, self._began_at = 0.0, time.monotonic()
        if state.global_step > 0:  # how often to save and to log is what this start says, not the checkpoint
            state.compute_steps(args, state.max_steps)
        if self.trainer is not None and state.global_step > 0:
            marker = read_marker(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}") or {}
            if "progress" in marker:  # not in those of earlier versions
                self._go_on_from(marker["progress"], self.trainer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        description = {**describe_processes(args), "settings": self.settings}
        if self.trainer is not None:
            description["progress"] = self._describe_progress(self.trainer)
        if is_distributed():
            dist.barrier()  # each process writes its own random state, and under DeepSpeed its share of the optimizer
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", description)

    def _describe_progress(self, trainer: Trainer) -> dict[str, Any]:
        """Where Trainer's sums are; to be called on all ranks, each of which has losses of its own."""
        losses = [trainer._tr_loss]
        if is_distributed():
            losses = [torch.zeros_like(trainer._tr_loss) for _ in range(dist.get_world_size())]
            dist.all_gather(losses, trainer._tr_loss)
        return {
            "unlogged_losses": [loss.item() for loss in losses],  # of each process, since `last_logged_step`
            "last_logged_step": trainer._globalstep_last_logged,
            "logged_losses": trainer._total_loss_scalar,
            "seconds": self.seconds_before + time.monotonic() - self._began_at,
        }

    def _go_on_from(self, progress: Mapping[str, Any], trainer: Trainer) -> None:
        """Puts Trainer's sums, which it has just set to zero, where they were."""
        trainer._tr_loss += progress["unlogged_losses"][trainer.args.process_index]
        trainer._globalstep_last_logged = progress["last_logged_step"]
        trainer._total_loss_scalar = progress["logged_losses"]
        trainer._initial_global_step = 0  # the final figures are of the steps since this one
        self.seconds_before = progress["seconds"]


def check_checkpoint_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: with these arguments there are moments at which a kill leaves no checkpoint to resume from.
    """
    fewest = fewest_checkpoints(args)
    if args.save_total_limit is not None and 0 < args.save_total_limit < fewest:
        best = " The best one counts too, which is looked for here." if fewest > 2 else ""
        raise ValueError(
            f"Expected `save_total_limit` of at least {fewest} (or None to keep all), got {args.save_total_limit}: Trainer deletes "
            "the previous checkpoint before the new one is known to be complete, so a kill in between would leave none, or an "
            f"old one.{best} Set it to {fewest}."
        )
    if args.save_strategy == SaveStrategy.BEST:
        raise ValueError(
            'Expected `save_strategy` "steps" or "epoch", got "best": nothing would be saved between two best scores, and at a '
            'signal only if the score is the best. Choose "steps", which keeps the best checkpoint as well, with '
            "`load_best_model_at_end` to end with it."
        )
    if args.save_only_model:
        raise ValueError(
            "Expected `save_only_model=False`, got True: without the optimizer's state a run cannot be resumed."
        )
    if args.save_on_each_node:
        raise ValueError(
            "Expected `save_on_each_node=False`, got True: rank 0 checks the files of all processes. Put `output_dir` "
            "on a file system that all nodes share."
        )
    if args.enable_jit_checkpoint:
        raise ValueError(
            "Expected `enable_jit_checkpoint=False`, got True: it saves without a marker, and each process by itself. "
            "StopOnSignal saves at a signal instead."
        )


def fewest_checkpoints(args: TrainingArguments) -> int:
    """How many checkpoints are to be kept: the newest, the one before, and, where Trainer looks for it, the best."""
    return 2 if args.metric_for_best_model is None else 3


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """
    Keeps a second start of a run away, which would delete the checkpoints that the first one is writing. To be called on all
    ranks, before [`prepare_resume`]; the first one holds the lock.

    Raises:
        BlockingIOError: in the first process, that another run is at work in the folder.
        ValueError: in the others, the same.
    """
    message = (
        f"{output_dir}: another run is at work in this folder, or processes of an earlier start have not ended. Wait for it, "
        "or end it, or choose another training.output_dir."
    )
    with ExitStack() as locks:
        done_by_first_process(lambda: locks.enter_context(only_one_at(output_dir / LOCK_NAME, message)))
        yield


def prepare_resume(
    args: TrainingArguments,
    settings: Mapping[str, Any] | None = None,
    upgrade: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> str | None:
    """
    Finds the checkpoint to resume from, after deleting incomplete ones. To be called on all ranks, before training.

    Args:
        args (`TrainingArguments`):
            The arguments of the run that starts; its checkpoints are in `output_dir`.
        settings (`Mapping[str, Any]`, *optional*):
            As given to [`CheckpointGuard`].
        upgrade (`Callable`, *optional*):
            Brings the settings in a checkpoint, which an earlier version may have written, into the form of `settings`.

    Returns:
        `str` or `None`: for `Trainer.train(resume_from_checkpoint=...)`, the same on all ranks; None starts afresh.

    Raises:
        ValueError: the checkpoint is from a run with other settings or processes; or the folder holds checkpoints of a
            run without a guard; or see [`check_checkpoint_arguments`].
        FileNotFoundError: a process does not see the checkpoint that rank 0 found.
    """
    check_checkpoint_arguments(args)
    found = done_by_first_process(lambda: clean_and_find(Path(str(args.output_dir)), args, settings, upgrade))
    if found is not None and not Path(found).is_dir():
        raise FileNotFoundError(
            f"{found}: rank 0 found this checkpoint, rank {args.process_index} does not see it. Put `output_dir` on a "
            "file system that all nodes share."
        )
    return found


def done_by_first_process(action: Callable[[], Result]) -> Result:
    """
    What `action` returns in the first process, in every process. The others wait, for as long as it takes: the time limit of
    the run's other communication (`ddp_timeout`) does not count here. To be called on all ranks.

    Raises:
        Exception: in the first process, what `action` raised.
        ValueError: in the others, that it failed there, and why.
    """
    if not is_distributed():
        return action()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    message: list[Any] = [None, None]  # the result, and what went wrong
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message[0] = action()
        except Exception as caught:  # raised below, after the others have been told: else they would wait for ever
            error, message[1] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(message, src=0, group=group)
    dist.destroy_process_group(group)
    if error is not None:
        raise error
    if message[1] is not None:
        raise ValueError(f"The first process failed: {message[1]}")
    return message[0]


def train_or_finish(trainer: Trainer, checkpoint: str | None) -> TrainOutput:
    """
    `trainer.train(resume_from_checkpoint=checkpoint)`, except that a run that had reached its last step stays as it was.

    Trainer resumes such a run correctly if it ended with an epoch; in the middle of one it would take another step. With a
    [`CheckpointGuard`] among the callbacks, the figures that it returns are of the whole run.
    """
    run_epoch, finalize = trainer._run_epoch, trainer._finalize_training
    guards = [entry for entry in trainer.callback_handler.callbacks if isinstance(entry, CheckpointGuard)]

    def run_epoch_if_steps_are_left(**kwargs: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**kwargs)

    def finalize_all_starts(trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        return finalize(trial, num_train_samples, start_time - sum(guard.seconds_before for guard in guards))

    trainer._run_epoch = run_epoch_if_steps_are_left  # type: ignore[assignment, method-assign]
    trainer._finalize_training = finalize_all_starts  # type: ignore[method-assign]
    for guard in guards:
        guard.trainer = trainer
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer._run_epoch, trainer._finalize_training = run_epoch, finalize  # type: ignore[method-assign]
        for guard in guards:
            guard.trainer = None


def clean_and_find(
    output_dir: Path,
    args: TrainingArguments,
    settings: Mapping[str, Any] | None,
    upgrade: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> str | None:
    checkpoint = find_complete_checkpoint(output_dir)
    if checkpoint is not None:  # first: nothing is deleted for a run that is refused
        check_same_run(checkpoint, args, settings, upgrade)
    remove_incomplete_checkpoints(output_dir)
    if checkpoint is None:
        logger.info(f"{output_dir}: no complete checkpoint, training starts at step 0.")
        return None
    logger.info(f"Resuming from {checkpoint}.")
    return str(checkpoint)


def find_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    return next((path for path in list_checkpoints(Path(output_dir)) if is_complete(path)), None)


def remove_incomplete_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Deletes what a killed run left half written or half deleted. To be called on rank 0 only.

    Returns:
        `list[Path]`: the deleted folders.

    Raises:
        ValueError: the checkpoints are of a run without a guard, which has no markers.
    """
    output_dir = Path(output_dir)
    incomplete = [path for path in list_checkpoints(output_dir) if not is_complete(path)]
    if incomplete and not (output_dir / GUARDED_NAME).exists():
        raise ValueError(
            f"{output_dir}: expected an empty folder or one of an earlier run with CheckpointGuard, found "
            f"{', '.join(path.name for path in incomplete)} without {MARKER_NAME}. Move them away or choose another "
            "`output_dir`; they are not deleted, since a run without the guard may have written them."
        )
    for path in incomplete:
        logger.warning(f"{path}: not complete ({what_is_missing(path)}), deleting it.")
        (path / MARKER_NAME).unlink(missing_ok=True)  # first, so that no kill leaves a marker behind
        shutil.rmtree(path)
    return incomplete


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders `checkpoint-N`, newest (highest N) first."""
    if not output_dir.is_dir():
        return []
    matches = [(CHECKPOINT_PATTERN.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    steps = {path: int(match.group(1)) for match, path in matches if match is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def is_complete(checkpoint: Path) -> bool:
    return not what_is_missing(checkpoint)


def what_is_missing(checkpoint: Path) -> str:
    """Why a checkpoint is not complete, in words; empty when it is."""
    marker = read_marker(checkpoint)
    if marker is None:
        return f"no readable {MARKER_NAME}"
    for name, size in marker["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return ""


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """The marker of a checkpoint; None if there is none, or not a whole one."""
    try:
        marker = json.loads((checkpoint / MARKER_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    is_whole = isinstance(marker, dict) and isinstance(marker.get("files"), dict)
    return marker if is_whole and TRAINER_STATE_NAME in marker["files"] else None


def mark_complete(checkpoint: Path, description: Mapping[str, Any]) -> None:
    """
    Brings all files of a checkpoint to the disk, then lists them in its marker.

    Args:
        checkpoint (`Path`):
            Folder to which nothing is being written any more.
        description (`Mapping[str, Any]`):
            What else the marker says, as JSON can hold it.

    Raises:
        FileNotFoundError: there is no trainer state in the folder, so nothing could be resumed from it.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{checkpoint}: expected a checkpoint with {TRAINER_STATE_NAME}, found none. Trainer writes it before "
            "`on_save`; check that `output_dir` is the one given to Trainer."
        )
    files: dict[str, int] = {}
    folders = [checkpoint]
    for path in sorted(checkpoint.rglob("*")):
        if path.is_dir():
            folders.append(path)
        elif path != checkpoint / MARKER_NAME:
            flush_to_disk(path)
            files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    for folder in [*reversed(folders), checkpoint.parent]:  # their entries, the innermost first
        flush_to_disk(folder)
    write_json_atomically({**description, "files": files}, checkpoint / MARKER_NAME)
    flush_to_disk(checkpoint)


def flush_to_disk(path: Path) -> None:
    """
    Waits until a file's content, or a folder's entries, would survive a loss of power. Windows opens no folder for that, and a
    file only to write.
    """
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_processes(args: TrainingArguments) -> dict[str, Any]:
    """How a run is spread over processes: its `world_size`, and `distributed` as "plain", "ddp", "zero-2" and so on."""
    plugin = args.deepspeed_plugin
    if plugin is not None:
        config = plugin.hf_ds_config.config
        distributed = f"zero-{config.get('zero_optimization', {}).get('stage', 0)}"
    elif args.world_size == 1:
        distributed = "plain"  # also when a launcher started the one process: the files are the same
    else:
        distributed = "fsdp" if args.fsdp else "ddp"
    return {"world_size": args.world_size, "distributed": distributed}


def check_same_run(
    checkpoint: Path,
    args: TrainingArguments,
    settings: Mapping[str, Any] | None,
    upgrade: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> None:
    """
    Refuses to resume from a checkpoint of a differently run training.

    DeepSpeed fails with another number of processes, and everything else continues, but silently without the
    optimizer's state (a DeepSpeed checkpoint without DeepSpeed) or on other data (another number of processes).

    Raises:
        ValueError: the number or kind of processes or the settings are not those in the checkpoint's marker.
    """
    marker = read_marker(checkpoint)
    if marker is None:
        raise ValueError(f"{checkpoint}: expected a complete checkpoint, it has no readable {MARKER_NAME}.")
    written = marker.get("settings") or {}
    before = {
        **{name: marker.get(name) for name in ("world_size", "distributed")},
        **(upgrade(written) if upgrade is not None and written else written),
    }
    now = {**describe_processes(args), **as_json_holds_it(settings)}
    different = [f"{key}: expected {one!r}, got {other!r}" for key, one, other in differences(before, now)]
    if different:
        raise ValueError(
            f"{checkpoint} was written by a run with other settings ({'; '.join(different)}), so that going on would "
            "not be the same training. Resume with the expected values, or choose another `output_dir` to start anew."
        )


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a default for each one that is not there, at all levels."""
    completed = {**defaults, **settings}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(completed[key], dict):
            completed[key] = with_defaults(completed[key], default)
    return completed


def as_json_holds_it(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as they are when read back from a marker: tuples become lists, keys become strings."""
    return json.loads(json.dumps(dict(settings or {})))


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class StopOnSignal(TrainerCallback):
    """
    Saves a checkpoint and ends training, on all ranks after the same step, when one of them receives a signal.

    SIGTERM is what clusters send before they kill; SIGUSR1 is for SLURM's `--signal=USR1@SECONDS`, which torchrun passes on only
    if the environment variable `PET_SIGNALS_TO_HANDLE` lists it, as `med3dvlm train` and the launch files of this package have
    it. The time between
    signal and kill must cover a step and the saving; a validation that is due then is left out, unless the run depends
    on its score (`metric_for_best_model`). If it does not, nothing is lost but the steps since the last complete
    checkpoint. torchrun passes SIGTERM on and kills 30 s later, unless the environment variable
    `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` names other seconds: `med3dvlm train` and the launch files of this package set 280.

    Attributes:
        was_stopped (`bool`): whether a signal ended the training. The caller should then exit with `exit_code`.
        stopped_by_signal (`str` or `None`): its name, e.g. "SIGTERM"; the same on all ranks.
        exit_code (`int`): 128 + the signal's number, as shells have it (143 for SIGTERM); 0 if there was none.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.stopped_by_signal: str | None = None
        self._received = 0  # number of the signal this process received
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._old_mask: set[Any] | None = None

    @property
    def was_stopped(self) -> bool:
        return self.stopped_by_signal is not None

    @property
    def exit_code(self) -> int:
        return 0 if self.stopped_by_signal is None else 128 + signal.Signals[self.stopped_by_signal]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()
        self.stopped_by_signal, self._received = None, 0
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Training runs outside the main thread: signals cannot be caught here, they end the process."
            )
            return
        for number in self.SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        if hasattr(signal, "pthread_sigmask"):
            # A cluster's signal goes to the workers of the data loader too; they would die, and the training with them.
            # Processes started while it is blocked here inherit that. `on_step_end` lets it through.
            self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number  # nothing more: this may run in the middle of any Python statement

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._old_mask is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # what has come meanwhile reaches `_handle` here
            signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        received = self._received
        if is_distributed():  # also when this process cannot catch signals: the others wait for it here
            flag = torch.tensor([received], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = int(flag.item())
        if received:
            self.stopped_by_signal = signal.Signals(received).name
            logger.warning(f"{self.stopped_by_signal} received: saving step {state.global_step} and stopping.")
            control.should_save = control.should_training_stop = True
            if args.metric_for_best_model is None:
                control.should_evaluate = False  # it would come before the saving

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer ends the epoch as if it were whole; saving once more would undo what is complete for a while."""
        if self.was_stopped and (args.metric_for_best_model is None or float(state.epoch or 0) % 1):
            control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Puts back how signals were handled before. To be called by hand only where training ended with an error."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()
        if self._old_mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
            self._old_mask = None
