import nibabel
import numpy as np
import torch

from med3dvlm import Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.train.demo import build_tiny_tokenizer
from med3dvlm.train.evaluation.settings import EvaluationSettings, Work, build_volumes
from med3dvlm.train.recipe import DataRecipe
from med3dvlm.train.stages import build_volume_loader


def test_prepared_volumes_of_another_size_are_seen_as_in_training(tmp_path):
    voxels = np.random.default_rng(0).random((8, 6, 4), dtype=np.float32)
    path = str(tmp_path / "volume.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    processor = Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=[2, 6, 4]), build_tiny_tokenizer())
    trained = build_volume_loader(DataRecipe(volumes="prepared"), processor.image_processor).load(path)
    settings = EvaluationSettings("study", ("report",), prepared=True)
    evaluated = build_volumes(processor, settings, Work()).load(path)
    assert evaluated.shape == (2, 6, 4) and torch.equal(evaluated, trained)
