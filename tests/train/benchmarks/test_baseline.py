import numpy as np
import pytest
import tiny
import torch

from med3dvlm import DCFormerModel, Med3DVLMImageProcessor
from med3dvlm.modeling_med3dvlm.modeling_dcformer import DCFormerDecomposedConv
from med3dvlm.train.benchmarks.baseline import PlainEncoder, prepare_with_other_libraries
from med3dvlm.train.benchmarks.sections import encoder_like_trained, write_synthetic_ct


CPU = torch.device("cpu")


@pytest.mark.parametrize("is_training", [False, True])
def test_plain_encoder_is_the_model_to_the_bit(monkeypatch, is_training):
    monkeypatch.setattr(DCFormerDecomposedConv, "fused_training", False)
    model = encoder_like_trained(tiny.tiny_dcformer_config(), CPU).train(is_training)
    model.fused_inference = False
    plain = PlainEncoder.like(model)
    volumes = tiny.random_volumes(2)
    expected = model(volumes, output_hidden_states=True).hidden_states
    ours = plain(volumes)
    assert plain.training is is_training and len(ours) == len(expected)
    for own, other in zip(ours, expected):
        assert torch.equal(own, other)
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_plain_encoder_has_its_own_weights():
    model = DCFormerModel(tiny.tiny_dcformer_config())
    plain = PlainEncoder.like(model)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in plain.parameters()}


def test_other_libraries_prepare_the_same_volume(tmp_path):
    pytest.importorskip("SimpleITK", reason="compares with SimpleITK, which is not installed")
    pytest.importorskip("monai", reason="compares with MONAI, which is not installed")
    path = tmp_path / "scan.nii.gz"
    write_synthetic_ct(path, (40, 30, 20))
    processor = Med3DVLMImageProcessor(image_size=[16, 20, 24], intensity_mode="window", hu_range=[-1000.0, 1000.0])
    ours = processor(path)["pixel_values"][0]
    theirs = prepare_with_other_libraries(path, (16, 20, 24), (-1000.0, 1000.0))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
