from types import SimpleNamespace

import pytest
import torch

from med3dvlm.train.data.study import read_task
from med3dvlm.train.evaluation import embeddings
from med3dvlm.train.evaluation.embeddings import embed_all, gather_embeddings
from med3dvlm.train.evaluation.predictions import build_references
from med3dvlm.train.evaluation.settings import EvaluationSettings, Work


def process(rank, num_processes):
    """What the evaluation asks of a process; nothing is waited for, the processes run one after the other."""
    return SimpleNamespace(
        process_index=rank, num_processes=num_processes, is_main_process=rank == 0, wait_for_everyone=lambda: None
    )


def test_processes_share_the_pairs_out_and_embed_what_one_embeds(study, dual_encoder, tmp_path, monkeypatch):
    samples = read_task(str(study), "test", "report")
    references = build_references(samples)
    settings = EvaluationSettings(str(study), ("report",))

    def embed(output, num_processes):
        with monkeypatch.context() as patch:
            if num_processes > 1:  # both look at the journal before either writes
                patch.setattr(embeddings, "read_shards", lambda journal: ([], torch.zeros(0), torch.zeros(0)))
            work = Work(batch_size=2)
            counts = [
                embed_all(output, settings, dual_encoder, samples, references, work, process(rank, num_processes))
                for rank in range(num_processes)
            ]
        return [count for count, _ in counts], gather_embeddings(output, references)

    (all_of_one,), expected = embed(tmp_path / "one", 1)
    counts, found = embed(tmp_path / "two", 2)
    assert all_of_one == len(references) == 6 and counts == [3, 3]
    for vectors, others in zip(found, expected):
        torch.testing.assert_close(vectors, others, atol=1e-5, rtol=1e-5)


def test_reports_are_cut_where_the_settings_say_and_loading_is_not_timed(study, dual_encoder, tmp_path, monkeypatch):
    samples = read_task(str(study), "test", "report").select(range(2))
    limits, clock, load = [], [0.0], embeddings.load_for_evaluation

    def keep(model, processor, chosen, volumes, max_text_length, batch_size):
        limits.append(max_text_length)
        clock[0] += 2.0
        return torch.ones(len(chosen), 2), torch.ones(len(chosen), 2)

    def load_slowly(*arguments):
        clock[0] += 100.0
        return load(*arguments)

    monkeypatch.setattr(embeddings, "embed_samples", keep)
    monkeypatch.setattr(embeddings, "load_for_evaluation", load_slowly)
    monkeypatch.setattr(embeddings.time, "perf_counter", lambda: clock[0])
    settings = EvaluationSettings(str(study), ("report",), max_text_length=77)
    references = build_references(samples)
    assert embed_all(tmp_path, settings, dual_encoder, samples, references, Work(), process(0, 1)) == (2, 2.0)
    assert limits == [77]


@pytest.mark.parametrize("num_done", [1, 2])
def test_pairs_that_are_embedded_are_not_embedded_again(study, dual_encoder, tmp_path, monkeypatch, num_done):
    samples = read_task(str(study), "test", "report").select(range(3))
    references = build_references(samples)
    settings = EvaluationSettings(str(study), ("report",))
    first = samples.select(range(num_done)), references[:num_done]
    assert embed_all(tmp_path, settings, dual_encoder, *first, Work(), process(0, 1))[0] == num_done
    assert embed_all(tmp_path, settings, dual_encoder, samples, references, Work(), process(0, 1))[0] == 3 - num_done
    monkeypatch.setattr(embeddings, "load_for_evaluation", lambda *arguments: pytest.fail("loaded"))
    assert embed_all(tmp_path, settings, dual_encoder, samples, references, Work(), process(0, 1)) == (0, 0.0)
