import pytest
import timm
import torch
from torch import nn

from pipeline.models.feature_maps import ConvFeatures, Vgg16Map, normalize_map


def test_a_map_is_normalised_by_one_mean_and_one_deviation_per_image() -> None:
    maps = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 10.0, 100.0])[:, None, None, None] + 3
    found = normalize_map(maps)
    for map_HWD, normalised in zip(maps, found, strict=True):
        # LOST: features as (1, N, d), then a fresh LayerNorm over both of the last axes.
        reference = map_HWD.reshape(1, 20, 6)
        expected = nn.LayerNorm(reference.shape[1:])(reference).reshape(4, 5, 6)
        assert torch.allclose(normalised, expected, atol=1e-5)
        by_hand = (map_HWD - map_HWD.mean()) / (map_HWD.var(unbiased=False) + 1e-5).sqrt()
        assert torch.allclose(normalised, by_hand, atol=1e-5)


def test_normalisation_is_not_per_position() -> None:
    tokens = normalize_map(torch.rand(1, 8, 8, 16) * torch.arange(1, 9)[None, :, None, None])
    assert tokens.mean(dim=-1).abs().max() > 0.1


def test_tokens_are_rows_first_float32_and_alone_equals_together() -> None:
    torch.manual_seed(0)
    extractor = ConvFeatures(nn.Conv2d(3, 7, 16, stride=16)).requires_grad_(False)
    images = torch.randn(3, 3, 32, 80)
    features = extractor(images)
    assert features.stride == extractor.patch_size == 16
    assert features.tokens_BHWD.shape == (3, 2, 5, 7)
    alone = extractor(images[1:2]).tokens_BHWD
    assert torch.allclose(features.tokens_BHWD[1], alone[0], atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert extractor(images).tokens_BHWD.dtype == torch.float32


def test_a_network_of_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="2 x 4 map at stride 16, got 4 x 8"):
        ConvFeatures(nn.Conv2d(3, 2, 8, stride=8))(torch.zeros(1, 3, 32, 64))


def test_vgg16_equals_the_librarys_features_without_the_last_pool() -> None:
    ours = Vgg16Map().eval().requires_grad_(False)
    with torch.device("meta"):
        library = timm.create_model("vgg16").features[:-1]
    library = library.to_empty(device="cpu").eval()
    library.load_state_dict(ours.features.state_dict())
    images = torch.randn(1, 3, 48, 64)
    found = ours(images)
    assert found.shape == (1, 512, 3, 4)
    assert torch.equal(found, library(images))
