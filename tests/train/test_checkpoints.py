"""Checkpoints that survive a kill, and runs that stop at a signal and go on as if nothing had been."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_processes
from transformers import TrainerCallback, TrainerControl, TrainerState

from med3dvlm.train import checkpoints
from med3dvlm.train.checkpoints import (
    GUARDED_NAME,
    MARKER_NAME,
    CheckpointGuard,
    StopOnSignal,
    check_same_run,
    find_complete_checkpoint,
    mark_complete,
    prepare_resume,
    remove_incomplete_checkpoints,
    with_defaults,
)


PROGRAM = Path(__file__).parent / "training_program.py"
sys.path.insert(0, str(PROGRAM.parent))
import training_program


NUM_STEPS = 6


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The trace of a run that nothing disturbs."""
    trainer, stop, checkpoint = training_program.train(tmp_path_factory.mktemp("uninterrupted"))
    assert checkpoint is None and not stop.was_stopped and stop.exit_code == 0
    return training_program.read_trace(trainer)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A folder with the checkpoints 3 and 4 of a run of which SIGTERM is the end."""
    folder = tmp_path_factory.mktemp("stopped")
    training_program.train(folder, signal_at=4)
    return folder


@pytest.fixture
def run_folder(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "run")


# The marker


class MarkerWatcher(TrainerCallback):
    """Runs before the guard does, as it is given to Trainer before it."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.seen.append(((checkpoint / "trainer_state.json").exists(), (checkpoint / MARKER_NAME).exists()))


def test_marker_is_written_after_everything_and_lists_it(tmp_path):
    watcher = MarkerWatcher()
    training_program.train(tmp_path, settings={"recipe": "tiny", "sizes": (1, 2)}, callbacks=(watcher,), max_steps=2)
    assert watcher.seen == [(True, False)] * 2
    checkpoint = find_complete_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-2"
    marker = json.loads((checkpoint / MARKER_NAME).read_text())
    assert marker["files"] == {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != MARKER_NAME}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"} <= set(marker["files"])
    assert (marker["world_size"], marker["distributed"]) == (1, "plain")
    assert marker["settings"] == {"recipe": "tiny", "sizes": [1, 2]}


def make_checkpoint(output_dir, step, complete=True):
    checkpoint = output_dir / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "global_step" / "rank_0.pt").write_bytes(b"12345")
    (output_dir / GUARDED_NAME).write_text("{}")
    if complete:
        mark_complete(checkpoint, {"world_size": 1, "distributed": "plain", "settings": {}})
    return checkpoint


def test_files_reach_the_disk_before_the_marker_does(tmp_path, monkeypatch):
    events = []
    flush, replace = checkpoints.flush_to_disk, os.replace
    monkeypatch.setattr(checkpoints, "flush_to_disk", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    make_checkpoint(tmp_path, 3)
    before, after = events[: events.index("replace")], events[events.index("replace") + 1 :]
    assert set(before) == {"trainer_state.json", "rank_0.pt", "global_step", "checkpoint-3", tmp_path.name}
    assert after == ["checkpoint-3"]


def test_windows_flushes_files_that_it_may_write_and_no_folders(tmp_path, monkeypatch):
    path, opened, real = tmp_path / "file", [], os.open
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda place, flags: (opened.append((place, flags)), real(place, flags))[1])
        patch.setattr(os, "name", "nt")
        checkpoints.flush_to_disk(path)
        checkpoints.flush_to_disk(path.parent)
    assert opened == [(path, os.O_RDWR)]


def test_mark_complete_refuses_a_folder_without_trainer_state(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint with trainer_state\.json"):
        mark_complete(tmp_path, {})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}', '{"files": {"trainer_state.json": 3}}', "\udcff"])
def test_a_checkpoint_with_a_broken_marker_does_not_count(content, tmp_path):
    marker = make_checkpoint(tmp_path, 3) / MARKER_NAME
    marker.write_bytes(content.encode(errors="surrogateescape"))
    assert find_complete_checkpoint(tmp_path) is None


def test_the_newest_is_the_one_with_the_highest_number(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step, complete=step < 100)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert remove_incomplete_checkpoints(tmp_path) == [tmp_path / "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint-10", "checkpoint-9", "checkpoint-best"]


def test_no_folder_means_a_fresh_start(tmp_path):
    assert find_complete_checkpoint(tmp_path / "absent") is None
    assert remove_incomplete_checkpoints(tmp_path / "absent") == []
    assert prepare_resume(training_program.make_arguments(tmp_path / "absent")) is None


def test_checkpoints_of_a_run_without_guard_are_not_deleted(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, complete=False)
    (tmp_path / GUARDED_NAME).unlink()
    with pytest.raises(ValueError, match=r"found checkpoint-3 without COMPLETE\.json\. Move them away"):
        prepare_resume(training_program.make_arguments(tmp_path))
    assert checkpoint.exists()


# Damage


def remove(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def halve(name):
    def damage(checkpoint):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        remove("optimizer.pt"),
        remove("scheduler.pt"),
        remove("rng_state.pth"),
        remove("trainer_state.json"),
        remove(MARKER_NAME),
        halve("model.safetensors"),
        halve("optimizer.pt"),
        halve(MARKER_NAME),
        empty,
    ],
    ids=[
        "no optimizer",
        "no scheduler",
        "no random state",
        "no trainer state",
        "no marker",
        "half the weights",
        "half the optimizer",
        "half the marker",
        "empty",
    ],
)
def test_damaged_newest_checkpoint_is_skipped_and_removed(damage, run_folder, caplog):
    damage(run_folder / "checkpoint-4")
    assert prepare_resume(training_program.make_arguments(run_folder)) == str(run_folder / "checkpoint-3")
    assert not (run_folder / "checkpoint-4").exists()


@pytest.mark.parametrize("damage", [remove("optimizer.pt"), halve("model.safetensors")], ids=["missing", "half"])
def test_resume_past_damaged_checkpoints_equals_the_uninterrupted_run(damage, run_folder, uninterrupted):
    damage(run_folder / "checkpoint-4")
    half_deleted = shutil.copytree(run_folder / "checkpoint-3", run_folder / "checkpoint-2")
    remove("trainer_state.json")(half_deleted)
    trainer, _, checkpoint = training_program.train(run_folder)
    assert checkpoint == str(run_folder / "checkpoint-3")
    assert training_program.read_trace(trainer) == uninterrupted
    assert not half_deleted.exists()


def test_nothing_is_left_when_every_checkpoint_is_damaged(run_folder, uninterrupted):
    for checkpoint in run_folder.glob("checkpoint-*"):
        remove("rng_state.pth")(checkpoint)
    trainer, _, checkpoint = training_program.train(run_folder)
    assert checkpoint is None
    assert training_program.read_trace(trainer) == uninterrupted


def test_a_finished_run_resumes_to_the_same_end(run_folder, uninterrupted):
    training_program.train(run_folder)
    trainer, _, checkpoint = training_program.train(run_folder)
    assert checkpoint == str(run_folder / f"checkpoint-{NUM_STEPS}")
    assert training_program.read_trace(trainer) == uninterrupted


# Other settings


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"save_total_limit": 1}, r"`save_total_limit` of at least 2.*got 1.*Set it to 2"),
        (
            {"save_total_limit": 2, "metric_for_best_model": "loss"},
            r"of at least 3 .*got 2.*best one counts.*Set it to 3",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "save_total_limit": 3},
            '"steps" or "epoch", got "best": nothing would be saved between',
        ),
        ({"save_only_model": True}, "`save_only_model=False`, got True: without the optimizer"),
        ({"save_on_each_node": True}, "`save_on_each_node=False`.*file system that all nodes share"),
        ({"enable_jit_checkpoint": True}, "`enable_jit_checkpoint=False`.*StopOnSignal"),
    ],
)
def test_arguments_that_leave_nothing_to_resume_from_are_refused(overrides, message, tmp_path):
    args = training_program.make_arguments(tmp_path, **overrides)
    with pytest.raises(ValueError, match=message):
        prepare_resume(args)
    with pytest.raises(ValueError, match=message):
        CheckpointGuard().on_train_begin(args, None, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"world_size": 2, "distributed": "ddp"},
            "world_size: expected 2, got 1; distributed: expected 'ddp', got 'plain'",
        ),
        ({"distributed": "zero-2"}, "distributed: expected 'zero-2', got 'plain'"),
        ({"settings": {"batch": 4}}, "batch: expected 4, got 8"),
        ({"settings": {}}, "batch: expected None, got 8"),
        ({"settings": {"batch": 8, "data": {"a": 1, "b": 3}, "seed": 1}}, "seed: expected 1, got None"),
        ({"settings": {"batch": 8, "data": {"a": 1, "b": 2}}}, "data.b: expected 2, got 3"),
    ],
)
def test_resume_with_other_settings_is_refused_and_deletes_nothing(change, message, tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, complete=False)
    settings = {"batch": 8, "data": {"a": 1, "b": 3}}
    mark_complete(checkpoint, {"world_size": 1, "distributed": "plain", "settings": settings, **change})
    incomplete = make_checkpoint(tmp_path, 4, complete=False)
    with pytest.raises(ValueError, match=rf"checkpoint-3.*{message}.*another `output_dir`"):
        prepare_resume(training_program.make_arguments(tmp_path), settings)
    assert incomplete.exists()


def test_resume_with_the_same_settings_is_allowed(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, complete=False)
    mark_complete(checkpoint, {"world_size": 1, "distributed": "plain", "settings": {"sizes": [1, 2]}})
    args = training_program.make_arguments(tmp_path)
    check_same_run(checkpoint, args, {"sizes": (1, 2)})
    assert prepare_resume(args, {"sizes": (1, 2)}) == str(checkpoint)


def test_settings_of_an_earlier_version_are_brought_up_to_date(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, complete=False)
    mark_complete(checkpoint, {"world_size": 1, "distributed": "plain", "settings": {"data": {"root": "study"}}})
    args, settings = training_program.make_arguments(tmp_path), {"data": {"root": "study", "similar": 0}}
    with pytest.raises(ValueError, match="data.similar: expected None, got 0"):
        prepare_resume(args, settings)
    upgrade = functools.partial(with_defaults, defaults={"data": {"root": "data", "similar": 0}})
    assert prepare_resume(args, settings, upgrade) == str(checkpoint)
    with pytest.raises(ValueError, match="data.similar: expected 0, got 2"):
        prepare_resume(args, {"data": {"root": "study", "similar": 2}}, upgrade)


def test_the_others_wait_for_the_first_process_longer_than_their_time_limit_and_fail_with_it(tmp_path):
    run_processes(training_program.wait_for_the_first, 2, tmp_path, tmp_path, 4.0, 2.0)
    assert [path.name for path in tmp_path.glob("worked-*")] == ["worked-0"]
    results = [json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == ["done", "FileNotFoundError: scan.nii.gz is missing"]
    assert results[1] == ["done", "ValueError: The first process failed: FileNotFoundError: scan.nii.gz is missing"]


# Signals in this process


def test_sigterm_saves_and_stops_and_the_resumed_run_equals_the_uninterrupted(tmp_path, uninterrupted):
    old_handler, old_mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    trainer, stop, _ = training_program.train(tmp_path, signal_at=4, save_steps=100)
    assert signal.getsignal(signal.SIGTERM) == old_handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == old_mask
    assert (stop.was_stopped, stop.stopped_by_signal, stop.exit_code) == (True, "SIGTERM", 143)
    assert trainer.state.global_step == 4
    assert find_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    trainer, stop, checkpoint = training_program.train(tmp_path, save_steps=100)
    assert checkpoint == str(tmp_path / "checkpoint-4") and not stop.was_stopped
    assert training_program.read_trace(trainer) == uninterrupted


def test_rows_of_the_log_that_span_a_stop_are_those_of_the_uninterrupted_run(tmp_path):
    """Rows of 4 steps, checkpoints of 3, and a signal at 5; the final figures are those of all starts."""
    arguments = {"logging_steps": 4, "save_steps": 3, "max_steps": 11}
    trainer, _, _ = training_program.train(tmp_path / "whole", **arguments)
    expected, whole = training_program.read_trace(trainer), trainer.state.log_history[-1]
    assert [row[0] for row in expected] == [4, 8]
    training_program.train(tmp_path / "run", signal_at=5, **arguments)
    time.sleep(0.5)
    training_program.train(tmp_path / "run", signal_at=10, **arguments)
    remove("optimizer.pt")(tmp_path / "run" / "checkpoint-10")
    trainer, _, checkpoint = training_program.train(tmp_path / "run", **arguments)
    assert checkpoint == str(tmp_path / "run" / "checkpoint-9")
    assert training_program.read_trace(trainer) == expected
    last = trainer.state.log_history[-1]
    assert last["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    marker = json.loads((tmp_path / "run" / "checkpoint-11" / MARKER_NAME).read_text())
    assert last["train_runtime"] >= round(marker["progress"]["seconds"], 3) - 0.001
    for rate, number in (("steps", 11), ("samples", 22)):
        assert last[f"train_{rate}_per_second"] == pytest.approx(number / last["train_runtime"], rel=0.02)

    trainer, _, _ = training_program.train(tmp_path / "run", **arguments)  # not one step is left
    again = trainer.state.log_history[-1]
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert again["train_runtime"] >= round(marker["progress"]["seconds"], 3) - 0.001


def test_how_often_a_resumed_run_is_saved_is_what_its_own_start_says(tmp_path):
    training_program.train(tmp_path, signal_at=3, save_steps=100, save_total_limit=None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    training_program.train(tmp_path, save_steps=1, save_total_limit=None, logging_steps=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (3, 4, 5, 6)
    ]
    state = TrainerState.load_from_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert [row["step"] for row in state.log_history if "loss" in row] == [1, 2, 3, 4, 6]


def test_each_process_goes_on_with_its_own_losses():
    trainer = SimpleNamespace(_tr_loss=torch.zeros(()), args=SimpleNamespace(process_index=1))
    progress = {"unlogged_losses": [1.0, 2.0], "last_logged_step": 4, "logged_losses": 3.0, "seconds": 5.0}
    CheckpointGuard()._go_on_from(progress, trainer)
    assert (trainer._tr_loss.item(), trainer._globalstep_last_logged, trainer._total_loss_scalar) == (2.0, 4, 3.0)


def test_a_checkpoint_of_an_earlier_version_has_no_progress(run_folder, uninterrupted):
    for marker in run_folder.glob(f"checkpoint-*/{MARKER_NAME}"):
        content = json.loads(marker.read_text())
        del content["progress"]
        marker.write_text(json.dumps(content))
    trainer, _, checkpoint = training_program.train(run_folder)
    assert checkpoint is not None and training_program.read_trace(trainer) == uninterrupted


def test_a_stop_within_an_epoch_saves_once(tmp_path, monkeypatch):
    """Of a strategy of epochs: Trainer ends the epoch after a stop as if it were whole."""
    saved = []
    monkeypatch.setattr(
        CheckpointGuard, "on_save", lambda self, args, state, *rest, **kwargs: saved.append(state.epoch)
    )
    _, stop, _ = training_program.train(tmp_path, signal_at=2, save_strategy="epoch")
    assert stop.was_stopped and saved == [0.5]


@pytest.mark.parametrize(
    "metric, epoch, at_step, at_end",
    [(None, 0.5, False, False), (None, 1.0, False, False), ("loss", 0.5, True, False), ("loss", 1.0, True, True)],
)
def test_a_stop_leaves_out_the_validation_that_is_due_unless_the_run_depends_on_it(
    metric, epoch, at_step, at_end, tmp_path
):
    stop, args = StopOnSignal(), training_program.make_arguments(tmp_path, metric_for_best_model=metric)
    state, control = TrainerState(epoch=epoch), TrainerControl(should_evaluate=True)
    stop._received = signal.SIGTERM
    stop.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop and control.should_evaluate == at_step
    control.should_evaluate = control.should_save = True  # Trainer's own callback, at the end of the epoch
    stop.on_epoch_end(args, state, control)
    assert control.should_evaluate == control.should_save == at_end


def test_outside_the_main_thread_training_goes_on_without_handlers(tmp_path, uninterrupted):
    old_handler = signal.getsignal(signal.SIGTERM)
    traces = []
    thread = threading.Thread(
        target=lambda: traces.append(training_program.read_trace(training_program.train(tmp_path)[0]))
    )
    thread.start()
    thread.join(timeout=60)
    assert traces == [uninterrupted]
    assert signal.getsignal(signal.SIGTERM) == old_handler


def test_restore_puts_handlers_back_after_a_training_that_failed(tmp_path):
    old_handler, old_mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stop = StopOnSignal()
    stop.on_train_begin(training_program.make_arguments(tmp_path), None, None)
    assert signal.getsignal(signal.SIGTERM) != old_handler
    stop.restore()
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) == old_handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == old_mask


# Other processes


@pytest.fixture(scope="module")
def processes():
    """Starts processes that need not import anything first: they are forked from one that has."""
    folders = os.pathsep.join(str(PROGRAM.parents[level]) for level in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", folders)  # of the process that is forked
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training_program"])
        yield context


class Run:
    """Training in `world_size` processes, each the head of a session. On leaving the context all are killed."""

    def __init__(self, context, folder, world_size=1, zero_2=False, **arguments):
        folder.mkdir(exist_ok=True)
        self.folder, self.world_size = folder, world_size
        for path in [*folder.glob("progress-*"), *folder.glob("trace-*"), *folder.glob("rendezvous")]:
            path.unlink()
        self.processes = [
            context.Process(
                target=training_program.train_in_process, args=(folder, rank, world_size, zero_2, arguments)
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def output(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("output-*")))

    def wait_for_step(self, step, seconds=90):
        """Until every process has trained that step."""
        deadline = time.monotonic() + seconds
        paths = [self.folder / f"progress-{rank}" for rank in range(self.world_size)]
        while not all(path.exists() and int(path.read_text() or 0) >= step for path in paths):
            assert all(process.is_alive() for process in self.processes), f"ended early\n{self.output()}"
            assert time.monotonic() < deadline, f"no step {step} after {seconds} s\n{self.output()}"
            time.sleep(0.005)

    def kill(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(timeout=20)

    def finish(self, seconds=90):
        """The exit codes and reports of all processes."""
        for process in self.processes:
            process.join(timeout=seconds)
        reports = [self.folder / f"trace-{rank}.json" for rank in range(self.world_size)]
        assert all(path.exists() for path in reports), self.output()
        return [process.exitcode for process in self.processes], [json.loads(path.read_text()) for path in reports]


def survive_kills(context, folder, steps_of_kills, seed, **arguments):
    """Kills a run soon after each of these steps, lets it finish, and returns the resumed checkpoint and the trace."""
    moments = random.Random(seed)
    for step in steps_of_kills:
        with Run(context, folder, **arguments) as run:
            run.wait_for_step(step)
            time.sleep(moments.uniform(0, 0.06))  # in the middle of a step, of writing a checkpoint, of deleting one
            run.kill()
    with Run(context, folder, **arguments) as run:
        codes, reports = run.finish()
    assert codes == [0] * len(codes), run.output()
    assert all(report["trace"] == reports[0]["trace"] for report in reports)
    return reports[0]["resumed_from"], reports[0]["trace"]


def test_sigkill_at_random_moments_leaves_the_trace_as_it_is(processes, tmp_path):
    trainer, _, _ = training_program.train(tmp_path / "reference", max_steps=15)
    resumed_from, trace = survive_kills(processes, tmp_path / "run", (3, 7, 11), seed=0, max_steps=15)
    assert resumed_from is not None
    assert trace == training_program.read_trace(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_sigkills_leave_the_trace_as_it_is(seed, processes, tmp_path):
    trainer, _, _ = training_program.train(tmp_path / "reference", max_steps=40)
    resumed_from, trace = survive_kills(processes, tmp_path / "run", range(2, 32, 3), seed=seed, max_steps=40)
    assert resumed_from is not None
    assert trace == training_program.read_trace(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("zero_2", [False, True], ids=["ddp", "zero-2"])
def test_sigkill_of_two_processes_leaves_the_trace_as_it_is(zero_2, processes, tmp_path):
    arguments = {"world_size": 2, "zero_2": zero_2, "max_steps": 12}
    resumed_from, trace = survive_kills(processes, tmp_path / "run", (2, 5, 7, 9), seed=3, **arguments)
    _, expected = survive_kills(processes, tmp_path / "reference", (), seed=3, **arguments)
    assert resumed_from is not None
    assert trace == expected
    marker = json.loads((tmp_path / "run" / "checkpoint-12" / MARKER_NAME).read_text())
    assert (marker["world_size"], marker["distributed"]) == (2, "zero-2" if zero_2 else "ddp")
    shards = {f"global_step12/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)}
    expected_files = (
        {name.replace("bf16_", "") for name in shards} if zero_2 else {"rng_state_0.pth", "rng_state_1.pth"}
    )
    assert expected_files <= set(marker["files"])


def test_sigterm_to_the_whole_group_stops_cleanly_although_the_loader_has_workers(processes, tmp_path):
    with Run(processes, tmp_path, max_steps=10_000, save_steps=10_000, dataloader_num_workers=1) as run:
        run.wait_for_step(2)
        os.killpg(run.processes[0].pid, signal.SIGTERM)
        codes, (report,) = run.finish()
    assert codes == [143], run.output()
    assert find_complete_checkpoint(tmp_path) == tmp_path / f"checkpoint-{report['step']}"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_signal_to_one_process_stops_both_after_the_same_step(processes, tmp_path):
    with Run(processes, tmp_path, world_size=2, max_steps=10_000, save_steps=10_000) as run:
        run.wait_for_step(2)
        os.kill(run.processes[1].pid, signal.SIGUSR1)
        codes, reports = run.finish()
    assert codes == [128 + signal.SIGUSR1] * 2, run.output()
    assert reports[0]["step"] == reports[1]["step"]
    checkpoint = find_complete_checkpoint(tmp_path)
    assert checkpoint == tmp_path / f"checkpoint-{reports[0]['step']}"
    with pytest.raises(ValueError, match="world_size: expected 2, got 1; distributed: expected 'ddp', got 'plain'"):
        prepare_resume(training_program.make_arguments(tmp_path))


def test_zero_2_loses_what_plain_processes_lose_and_its_checkpoint_counts(processes, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    plain, sharded = (
        survive_kills(processes, tmp_path / name, (), seed=0, world_size=2, zero_2=zero_2, max_steps=3, save_steps=3)[
            1
        ]
        for name, zero_2 in {"plain": False, "sharded": True}.items()
    )
    assert len(plain) == 3
    assert [loss for _, loss, _ in sharded] == pytest.approx([loss for _, loss, _ in plain], abs=2e-5)
    marker = json.loads((tmp_path / "sharded" / "checkpoint-3" / MARKER_NAME).read_text())
    assert (marker["world_size"], marker["distributed"]) == (2, "zero-2")
    assert {f"global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)} <= set(
        marker["files"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero_2", [False, True], ids=["ddp", "zero-2"])
def test_two_processes_resumed_after_a_signal_equal_the_uninterrupted(zero_2, processes, tmp_path):
    arguments = {"world_size": 2, "zero_2": zero_2, "max_steps": 60, "save_steps": 1000}
    with Run(processes, tmp_path / "run", **arguments) as run:
        run.wait_for_step(3)
        os.kill(run.processes[1].pid, signal.SIGTERM)
        codes, reports = run.finish()
    assert codes == [143] * 2 and reports[0]["step"] == reports[1]["step"] < 60
    resumed_from, trace = survive_kills(processes, tmp_path / "run", (), seed=0, **arguments)
    _, expected = survive_kills(processes, tmp_path / "reference", (), seed=0, **arguments)
    assert resumed_from == str(tmp_path / "run" / f"checkpoint-{reports[0]['step']}")
    assert trace == expected
