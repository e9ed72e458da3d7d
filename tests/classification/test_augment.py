"""Transforms and mixing: timm's numbers, keyed draws, and nothing that a digit cannot bear."""

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

from pipeline.classification.augment import eval_transform, mix, train_transform
from pipeline.config.classification import AugmentConfig, Crop
from pipeline.data.seeding import key_of, seeded
from pipeline.errors import ConfigError
from pipeline.models.features import NORMALIZATIONS

CROPPED = AugmentConfig(crop="random_resized")
PLAIN = AugmentConfig(
    crop="pad", hflip="never", rand_augment=None, color_jitter=0, random_erasing=0
)


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(tensor: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS["imagenet"])
    return ((tensor * std + mean) * 255).round().permute(1, 2, 0).numpy()


def test_the_same_key_gives_the_same_image_and_another_key_another() -> None:
    transform = train_transform(AugmentConfig(crop="random_resized", random_erasing=1.0), 32)
    seen = []
    for key in ((1, 2, 3), (1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)):
        with seeded(*key):
            seen.append(transform(noise()))
    assert torch.equal(seen[0], seen[1])
    assert not any(torch.equal(seen[0], other) for other in seen[2:])


def test_global_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def restart() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    restart()
    expected = draws()
    restart()
    with pytest.raises(ValueError, match="too many"), seeded("a", 1):
        _, _ = draws()  # type: ignore[misc]
    with seeded("b", 2):
        draws()
    assert draws() == expected


def test_keys_may_be_nested() -> None:
    with seeded(1):
        expected = [float(np.random.rand()) for _ in range(2)]
    with seeded(1):
        first = float(np.random.rand())
        with seeded(2):
            np.random.rand()
        assert [first, float(np.random.rand())] == expected


def test_a_key_is_the_same_everywhere() -> None:
    assert key_of("order", 0, 1) == 0x5E633D688BB32D7D
    assert key_of(1, 23) != key_of(12, 3)


def test_random_resized_is_timms_own_transform() -> None:
    ours = train_transform(CROPPED, 48)
    timms = create_transform(
        48,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    for index in range(20):
        with seeded(index):
            expected = timms(noise(60, 50))
        with seeded(index):
            assert torch.equal(ours(noise(60, 50)), expected)


def test_colour_jitter_works_only_without_rand_augment() -> None:
    def steps(config: AugmentConfig) -> set[str]:
        transform: Any = train_transform(config, 224)
        return {type(step).__name__ for step in transform.transforms}

    assert "ColorJitter" not in steps(AugmentConfig())
    assert "ColorJitter" in steps(AugmentConfig(rand_augment=None))
    assert "ColorJitter" not in steps(AugmentConfig(rand_augment=None, color_jitter=0))


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
@pytest.mark.parametrize(
    ("hflip", "mirror_safe", "mirrors"),
    [
        ("unless_digits", True, True),
        ("unless_digits", False, False),
        ("always", False, True),
        ("never", True, False),
    ],
)
def test_mirroring_happens_only_where_it_is_allowed(
    crop: Crop, hflip: Any, mirror_safe: bool, mirrors: bool
) -> None:
    # Light falls off to the right in every crop, whatever its place: a mirrored one would rise.
    ramp = np.broadcast_to(np.linspace(255, 60, 32).astype(np.uint8)[:, None], (32, 32, 3))
    config = PLAIN.model_copy(update={"crop": crop, "hflip": hflip})
    transform = train_transform(config, 32, mirror_safe=mirror_safe)
    rising = 0
    for index in range(60):
        with seeded(index):
            middle = transform(Image.fromarray(np.ascontiguousarray(ramp)))[0, 16]
        rising += bool(middle[6] < middle[-7])
    assert (rising > 0) is mirrors
    assert rising < 60


def test_rand_augment_never_mirrors_a_digit() -> None:
    text = AugmentConfig().rand_augment
    assert text is not None
    names = {operation.name.lower() for operation in rand_augment_transform(text).ops}
    assert not any("flip" in name or "mirror" in name for name in names)


@pytest.mark.parametrize("magnitude", [0, 5, 9, 10])
def test_every_operation_of_rand_augment_works_at_every_magnitude(magnitude: int) -> None:
    """timm keeps 0 bits at magnitude 10, which Pillow 13 refuses."""
    config = AugmentConfig(crop="pad", rand_augment=f"rand-m{magnitude}-p1-inc1")
    transform: Any = train_transform(config, 32)
    (step,) = (s for s in transform.transforms if hasattr(s, "ops"))
    for operation in step.ops:
        assert operation(noise()).size == (32, 32), operation.name


def test_padding_moves_the_image_by_at_most_an_eighth_and_changes_no_pixel() -> None:
    transform = train_transform(PLAIN, 32)
    source = np.asarray(noise())
    framed = np.pad(source, ((4, 4), (4, 4), (0, 0)))
    windows = {
        framed[top : top + 32, left : left + 32].astype(np.float32).tobytes(): (top, left)
        for top in range(9)
        for left in range(9)
    }
    places = set()
    for index in range(150):
        with seeded(index):
            places.add(windows[pixels_of(transform(noise())).tobytes()])
    assert {0, 8} <= {top for top, _ in places}
    assert {0, 8} <= {left for _, left in places}


def test_evaluation_of_native_images_loses_no_pixel() -> None:
    evaluated = eval_transform(PLAIN, 32)(noise())
    assert np.array_equal(pixels_of(evaluated), np.asarray(noise()))


def test_evaluation_of_larger_images_is_timms_centre_crop() -> None:
    timms = create_transform(224, interpolation="bicubic", crop_pct=0.875)
    image = noise(300, 260)
    assert torch.equal(eval_transform(AugmentConfig(), 224)(image), timms(image))


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
@pytest.mark.parametrize("size", [(32, 32), (40, 23), (1, 1)])
def test_any_image_comes_out_in_the_size_of_the_network(crop: Crop, size: tuple[int, int]) -> None:
    config = AugmentConfig(crop=crop)
    for transform in (train_transform(config, 32), eval_transform(config, 32)):
        copy = pickle.loads(pickle.dumps(transform))
        with seeded(1):
            tensor = transform(noise(*size))
        with seeded(1):
            assert torch.equal(copy(noise(*size)), tensor)
        assert tensor.shape == (3, 32, 32)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    "text", ["rand-m9-mstdx", "rand-mstd.5", "ran-m9", "rand-m", "rand-q3", "", "augmix-m3"]
)
def test_what_timm_would_skip_or_die_of_is_an_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"rand-m9-mstd0\.5-inc1.*got") as caught:
        train_transform(AugmentConfig(rand_augment=text), 224)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m15-n2-mstd1", "rand-m9-p0.3"])
def test_timms_notation_is_understood(text: str) -> None:
    train_transform(AugmentConfig(rand_augment=text), 224)


def random_batch(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (num,), generator=generator)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("step", range(6))
def test_mixing_is_timms_with_neighbours_as_partners(
    mixup: float, cutmix: float, step: int
) -> None:
    images, targets = random_batch(6)
    mixed, soft = mix(
        images,
        targets,
        AugmentConfig(mixup=mixup, cutmix=cutmix),
        num_classes=5,
        key=(1, 2, step),
    )
    opposite = [0, 2, 4, 5, 3, 1]
    timms = Mixup(mixup, cutmix, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
    np.random.seed(key_of("mix", 1, 2, step) & 0xFFFFFFFF)
    expected, expected_soft = timms(images[opposite], targets[opposite])
    assert torch.equal(mixed[opposite], expected)
    assert torch.equal(soft[opposite], expected_soft)
    assert torch.equal(images, random_batch(6)[0])


def test_mixing_draws_both_kinds_and_other_steps_draw_other_things() -> None:
    images, targets = random_batch(2)
    config = AugmentConfig()
    kinds = set()
    shares = set()
    for step in range(30):
        mixed, soft = mix(images, targets, config, num_classes=5, key=(0, 0, step, 0))
        # CutMix takes whole pixels: each is one of the two.
        whole = (mixed == images) | (mixed == images.flip(0))
        kinds.add(bool(whole.all()))
        shares.add(float(soft[0].max()))
    assert kinds == {True, False}
    assert len(shares) > 20


@pytest.mark.parametrize("num", [1, 3, 7])
def test_the_last_image_of_an_odd_batch_stays_itself(num: int) -> None:
    images, targets = random_batch(num)
    config = AugmentConfig()
    for step in range(8):
        mixed, soft = mix(images, targets, config, num_classes=5, key=(0, 0, step))
        torch.testing.assert_close(mixed[-1], images[-1])
        assert soft[-1].argmax() == targets[-1]
        torch.testing.assert_close(soft.sum(1), torch.ones(num))


@pytest.mark.parametrize("num", [8, 7])
def test_slices_of_whole_pairs_mixed_with_one_key_are_the_whole_batch_mixed(num: int) -> None:
    images, targets = random_batch(num)
    config = AugmentConfig()
    for step in range(6):
        whole = mix(images, targets, config, num_classes=5, key=(0, 0, step))
        parts = [
            mix(images[part], targets[part], config, num_classes=5, key=(0, 0, step))
            for part in (slice(0, 2), slice(2, 6), slice(6, num))
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_without_alphas_targets_are_smoothed_and_images_stay() -> None:
    images, targets = random_batch(3)
    config = AugmentConfig(mixup=0, cutmix=0, label_smoothing=0.1)
    mixed, soft = mix(images, targets, config, num_classes=5, key=(0,))
    assert torch.equal(mixed, images)
    expected = torch.full((3, 5), 0.02)
    expected[torch.arange(3), targets] = 0.92
    torch.testing.assert_close(soft, expected)


def test_mixing_leaves_numpys_stream_alone_and_does_not_hear_it() -> None:
    images, targets = random_batch(4)
    config = AugmentConfig()
    results = []
    for seed in (1, 2):
        np.random.seed(seed)
        expected = np.random.rand()
        np.random.seed(seed)
        results.append(mix(images, targets, config, num_classes=5, key=(3, 4, 5))[0])
        assert np.random.rand() == expected
    assert torch.equal(results[0], results[1])
