import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.data import dataset as dataset_module
from med3dvlm.train.data.augmentation import augment_laterality_safe
from med3dvlm.train.data.cache import VolumeCache
from med3dvlm.train.data.dataset import (
    ConversationBuilder,
    EpochSampler,
    PairBuilder,
    ProcessedVolumes,
    QuestionGroups,
    StudyDataset,
    TextDataset,
    item_generator,
    text_group_id,
)
from med3dvlm.train.data.samples import SAMPLE_FEATURES


class Constant:
    """Volumes that tell by their values which path they are of."""

    def load(self, path):
        if path == "broken":
            raise ValueError("broken: cannot be read")
        return torch.full((4, 6, 8), int(path) / 100)


class WordTokenizer:
    def __call__(self, text, **kwargs):
        return {"input_ids": [0, *range(len(text.split())), 1]}


def samples(count=7, images=None):
    rows = [
        {
            "image": images[row] if images else str(row),
            "case": f"case{row}",
            "task": "report",
            "question": "",
            "choices": [],
            "answer": f"Report {row % 3}.",
            "answer_choice": "",
            "question_type": 0,
        }
        for row in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)


def take(dataset, sampler, num_workers, batch_size=2):
    loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=lambda items: items)
    return [
        (item["messages"][0]["content"][1]["text"], item["volume"].flatten().tolist())
        for batch in loader
        for item in batch
    ]


def test_folders_of_slices_are_read_as_the_cache_reads_them(tmp_path, caplog):
    folder = tmp_path / "series"
    folder.mkdir()
    for number in range(4):
        array = np.random.default_rng(number).integers(0, 256, size=(20, 30), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number}.png")
    image_processor = Med3DVLMImageProcessor(image_size=[8, 12, 16])
    expected = VolumeCache(tmp_path / "cache", image_processor, "float32").load(str(folder))
    assert torch.equal(ProcessedVolumes(image_processor).load(str(folder)), expected)
    (folder / "x.db").touch()
    ProcessedVolumes(image_processor).load(str(folder))
    assert "series: 1 files are not among the slices (x.db" in caplog.text


def test_items_do_not_depend_on_the_number_of_workers():
    dataset = StudyDataset(samples(), Constant(), ConversationBuilder(), augment_laterality_safe, seed=5)
    sampler = EpochSampler(len(dataset), seed=5)
    sampler.set_epoch(2)
    expected = take(dataset, sampler, 0)
    assert take(dataset, sampler, 2) == expected
    assert len(expected) == 7


def test_epochs_differ_in_order_prompt_and_augmentation_and_repeat_by_seed():
    dataset = StudyDataset(samples(), Constant(), ConversationBuilder(), augment_laterality_safe, seed=5)
    runs = []
    for seed, epoch in ((5, 0), (5, 1), (5, 0), (6, 0)):
        dataset.seed = seed
        sampler = EpochSampler(len(dataset), seed)
        sampler.set_epoch(epoch)
        runs.append(take(dataset, sampler, 0))
    assert runs[0] == runs[2]
    assert runs[0] != runs[1] and runs[0] != runs[3]


def test_a_plain_index_is_of_the_epoch_that_has_begun_in_workers_too():
    def prompts(items):
        return [item["messages"][0]["content"][1]["text"] for item in items]

    dataset = StudyDataset(samples(3), Constant(), ConversationBuilder(), seed=5)
    in_epochs = [prompts(dataset[3 * epoch + index] for index in range(3)) for epoch in range(3)]
    assert in_epochs[0] != in_epochs[1] != in_epochs[2]
    loader = DataLoader(dataset, 3, num_workers=1, persistent_workers=True, collate_fn=lambda items: items)
    for epoch in (2, 0, 1):
        dataset.begin_epoch(epoch)
        assert prompts(dataset[index] for index in range(3)) == in_epochs[epoch]
        (batch,) = loader
        assert prompts(batch) == in_epochs[epoch]


def test_sampler_takes_every_sample_once_an_epoch():
    sampler = EpochSampler(9, seed=3)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        draws = list(sampler)
        assert len(sampler) == 9 and sorted(draws) == list(range(9 * epoch, 9 * epoch + 9)) != draws
    sampler = EpochSampler(4, seed=3, shuffle=False)
    sampler.set_epoch(2)
    assert list(sampler) == [8, 9, 10, 11]


def test_generators_of_samples_and_epochs_differ():
    firsts = {
        float(torch.rand((), generator=item_generator(seed, epoch, index)))
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(firsts) == 27


def test_groups_take_every_sample_once_an_epoch_and_stay_with_their_volume():
    owners = ["a", "b", "a", "a", "b", "c", "a", "a"]
    groups = QuestionGroups(owners, 2)
    assert len(groups) == 3 + 1 + 1  # five of a, two of b, one of c
    drawn = [[groups.rows_of(index, seed=0, epoch=epoch) for index in range(len(groups))] for epoch in range(4)]
    for of_epoch in drawn:
        assert sorted(row for rows in of_epoch for row in rows) == list(range(8))
        assert all(len({owners[row] for row in rows}) == 1 for rows in of_epoch)
        assert sorted(map(len, of_epoch)) == [1, 1, 2, 2, 2]
    assert len({str(of_epoch) for of_epoch in drawn}) > 1
    assert drawn[1] == [groups.rows_of(index, seed=0, epoch=1) for index in range(len(groups))]
    with pytest.raises(ValueError, match="at least 1 question per volume, got 0"):
        QuestionGroups(owners, 0)


def test_order_groups_and_items_have_random_numbers_of_their_own(monkeypatch):
    def numbers(draw):
        taken = []

        def noted(seed, epoch, number):
            taken.append(number)
            return item_generator(seed, epoch, number)

        monkeypatch.setattr(dataset_module, "item_generator", noted)
        draw()
        return set(taken)

    rows = samples(6, ["1", "1", "1", "2", "2", "3"])
    dataset = StudyDataset(rows, Constant(), ConversationBuilder(), questions_per_volume=2)
    order = numbers(lambda: list(EpochSampler(len(dataset), seed=0)))
    groups = numbers(lambda: [dataset.groups.rows_of(index, 0, 0) for index in range(len(dataset))])
    groups_and_items = numbers(lambda: [dataset[index] for index in range(len(dataset))])
    assert (len(order), len(groups), len(dataset)) == (1, 3, 4)
    assert len(order | groups_and_items) == 1 + 3 + 4


def test_questions_of_a_group_come_with_one_volume():
    rows = list(samples(2, ["1", "2"]))
    asked = [{**rows[0], "task": "open_vqa", "question": f"Question {number}?"} for number in range(3)]
    grouped = datasets.Dataset.from_list([*rows, *asked], features=SAMPLE_FEATURES)
    dataset = StudyDataset(
        grouped, Constant(), ConversationBuilder(), augment_laterality_safe, 3, questions_per_volume=4
    )
    alone = StudyDataset(grouped, Constant(), ConversationBuilder(), augment_laterality_safe, 3)
    assert (len(dataset), len(alone)) == (2, 5)
    item = dataset[0]
    texts = {messages[0]["content"][1]["text"] for messages in item["conversations"]}
    assert len(item["conversations"]) == 4 and {"Question 0?", "Question 1?", "Question 2?"} < texts
    assert item["volume"].shape == (4, 6, 8) and set(item) == {"conversations", "volume"}
    assert len(dataset[1]["conversations"]) == 1

    words = TextDataset(grouped, 3, questions_per_volume=4)
    assert len(words) == 2 and len(words[0]["conversations"]) == 4
    told = {messages[0]["content"][0]["text"] for messages in words[0]["conversations"]}
    assert told == {words.descriptions["case0"] + "\n"}


def test_a_broken_case_stops_and_is_not_replaced():
    dataset = StudyDataset(samples(3, ["0", "broken", "2"]), Constant(), ConversationBuilder())
    with pytest.raises(ValueError, match="broken: cannot be read"):
        dataset[1]
    with pytest.raises(IndexError, match="index from 0, got -1"):
        dataset[-1]


def test_identical_reports_have_one_group():
    builder = PairBuilder(WordTokenizer(), max_length=20)
    dataset = StudyDataset(samples(), Constant(), builder)
    groups = [dataset[index]["text_group_id"] for index in range(7)]
    assert groups[0] == groups[3] == groups[6] and len(set(groups)) == 3
    assert text_group_id("a  b\n") == text_group_id("a b") != text_group_id("a c")
    assert all(0 <= group < 2**63 for group in groups)


def test_conversations_in_words_tell_what_is_known_of_the_case():
    rows = list(samples(3))
    question = {"image": "0", "task": "open_vqa", "question": "Which plane?", "answer": "axial", "question_type": 1}
    rows.append({**rows[0], **question})
    dataset = TextDataset(datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES), seed=3)
    assert len(dataset) == 4
    told = [dataset[row]["messages"][0]["content"][0]["text"] for row in range(4)]
    assert told == [
        "Report 0. Which plane? axial.\n",
        "Report 1.\n",
        "Report 2.\n",
        "Report 0. Which plane? axial.\n",
    ]
    asked = [dataset[draw]["messages"][0]["content"][1]["text"] for draw in range(3, 4 * 12, 4)]
    assert set(asked) == {"Which plane?"} and dataset[3]["messages"][1]["content"] == "axial"
    requests = [dataset[draw]["messages"][0]["content"][1]["text"] for draw in range(0, 4 * 12, 4)]
    assert len(set(requests)) > 3  # drawn anew in every epoch
    with pytest.raises(IndexError, match="index from 0"):
        dataset[-1]
