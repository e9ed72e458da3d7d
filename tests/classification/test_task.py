"""DRLoc beside the labels: it changes nothing else, and nobody can tell how the work was shared."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.classification.augment import train_transform
from pipeline.classification.setup import build_objective
from pipeline.classification.task import ClassInputs, SupervisedTask
from pipeline.config import (
    AugmentConfig,
    ClassifierConfig,
    DataConfig,
    DRLocConfig,
    TrainClassifierJob,
)
from pipeline.config.settings import LoaderConfig
from pipeline.data.loader import Batch, ShardedBatchSampler, train_loader
from pipeline.errors import TrainingDiverged
from pipeline.training.loop import Hooks, LoopSettings, LoopState, StepKey, train
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.workers import Workers
from tests.training.two_workers import TwoWorkers

ALONE = Workers(0, 1, torch.device("cpu"))
NUM_IMAGES = 20
BATCH = 10
"""Five pairs of neighbours: two workers' slices are uneven."""

VIT = ClassifierConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    patch_size=8,
    drop_path=0.2,
    options="{embed_dim: 24, depth: 2, num_heads: 2, proj_drop_rate: 0.2}",
)
STILL_VIT = VIT.model_copy(
    update={"drop_path": 0.0, "options": "{embed_dim: 24, depth: 2, num_heads: 2}"}
)
SWIN = ClassifierConfig(
    name="swin_tiny_patch4_window7_224",
    image_size=32,
    patch_size=2,
    options="{embed_dim: 8, depths: [1, 1, 2], num_heads: [1, 2, 2]}",
)
RESNET = ClassifierConfig(name="resnet18", image_size=64)
CVT = ClassifierConfig(
    name="cvt_13", image_size=64, patch_size=2, options="{dims: [8, 16, 24], heads: [1, 2, 3]}"
)


class Noise:
    """Pictures of noise in four classes."""

    def __init__(self) -> None:
        self.targets = np.arange(NUM_IMAGES, dtype=np.int64) % 4

    def __len__(self) -> int:
        return NUM_IMAGES

    def image(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def name(self, index: int) -> str:
        return str(index)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a test varies."""

    weight: float = 0.5
    schedule: Callable[[int], float] | None = None
    """lambda of an epoch; None is the weight."""
    model: ClassifierConfig = VIT
    drloc: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    seed: int = 3


def the_task(choice: Choice, workers: Workers = ALONE) -> SupervisedTask:
    """Small, but put together as a job does."""
    job = TrainClassifierJob(
        data=DataConfig(name="folder", root="-"),
        model=choice.model,
        drloc=DRLocConfig(weight=choice.weight, hidden_dim=16, num_pairs=7, **choice.drloc),
        seed=choice.seed,
    )
    side = choice.model.image_size or 32
    objective = build_objective(
        job, num_classes=4, image_size=side, patch_size=choice.model.patch_size
    )
    sampler = ShardedBatchSampler(
        NUM_IMAGES,
        batch_size=BATCH,
        rank=workers.rank,
        world_size=workers.size,
        seed=choice.seed,
        group=2,
    )
    augment = AugmentConfig(crop="pad")
    return SupervisedTask(
        objective=objective,
        loader=train_loader(
            Noise(),
            train_transform(augment, side),
            sampler=sampler,
            config=LoaderConfig(loader_workers=0),
        ),
        augment=augment,
        num_classes=4,
        drloc_weight=choice.schedule or (lambda epoch: choice.weight),
        workers=workers,
        seed=choice.seed,
        accumulate=choice.accumulate,
    )


@dataclass
class Seen:
    """What went through the network in each forward pass, and the numbers of each epoch."""

    images: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def run(
    task: SupervisedTask, *, num_epochs: int, lr: float, clip: float = 0.0, **others: Any
) -> Seen:
    """Train with plain SGD, which no tiny gradient can lead astray."""
    seen = Seen()

    def look(module: nn.Module, given: tuple[Tensor], prediction: Any) -> None:
        seen.images.append(given[0].clone())
        seen.logits.append(prediction.logits_BK.detach().clone())

    hook = task.objective.classifier.register_forward_hook(look)
    groups = parameter_groups(task.objective, weight_decay=0.05)
    optimizer = build_optimizer(groups, kind="sgd", lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = LoopState(task.objective, optimizer, None, scaler)
    settings = LoopSettings(num_epochs, lambda step: lr, seed=task.seed, clip=clip, **others)
    hooks = Hooks(on_epoch_end=lambda epoch, numbers: seen.history.append(numbers))
    train(task, state, settings, task.workers, hooks)
    hook.remove()
    return seen


class SpoiltNoise(Noise):
    """Of which one picture's tensor is no number anywhere."""

    spoilt = 13

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        image.info["spoilt"] = index == self.spoilt
        return image


@dataclass(frozen=True)
class Spoiling:
    """A transform that spoils the picture that says so."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels_3HW = self.transform(image)
        return pixels_3HW * math.nan if image.info["spoilt"] else pixels_3HW


def diverged(workers: Workers, accumulate: int) -> str:
    """What is told of a training that meets the spoilt picture."""
    task = the_task(Choice(model=STILL_VIT, accumulate=accumulate), workers)
    transform = Spoiling(train_transform(AugmentConfig(crop="pad"), 32))
    sampler = task.loader._batch_sampler
    assert isinstance(sampler, ShardedBatchSampler)
    config = LoaderConfig(loader_workers=0)
    task.loader = train_loader(SpoiltNoise(), transform, sampler=sampler, config=config)
    with pytest.raises(TrainingDiverged) as complaint:
        run(task, num_epochs=1, lr=0.01, detect_anomaly=True)
    return str(complaint.value)


def batch_of_the_spoilt() -> tuple[int, list[str]]:
    """In epoch 0: its step, and what all its pictures are called."""
    sampler = ShardedBatchSampler(NUM_IMAGES, batch_size=BATCH, seed=3, group=2)
    batches = [[str(index) for _, index in keys] for keys in sampler]
    return next(found for found in enumerate(batches) if str(SpoiltNoise.spoilt) in found[1])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_anomaly_names_the_images_of_its_part_and_those_mixed_into_them(accumulate: int) -> None:
    step, names = batch_of_the_spoilt()
    if accumulate == 3:
        # Parts of 4, 3 and 3, of which the middle ones share a mixed pair.
        ends = [(0, 4), (4, 8), (6, 10)]
        halves = [names[start:end] for start, end in ends]
        names = next(half for half in halves if str(SpoiltNoise.spoilt) in half)
    told = diverged(ALONE, accumulate)
    assert told.startswith(f"loss or gradient is not finite at epoch 1, step {step} (cross_entr")
    assert told.endswith(f"; images: {', '.join(names)}")


def test_the_worker_that_finds_an_anomaly_names_its_own_images(pair: TwoWorkers) -> None:
    _, names = batch_of_the_spoilt()
    shares = [names[:4], names[4:]]
    (finder,) = [rank for rank in range(2) if str(SpoiltNoise.spoilt) in shares[rank]]
    first, second = pair.run(diverged, 1)
    assert first == second
    assert f"worker {finder}: " in first
    assert f"worker {1 - finder}: " not in first
    assert first.endswith(f"; images: {', '.join(shares[finder])}")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def inputs_of(task: SupervisedTask, epoch: int) -> list[list[ClassInputs]]:
    """The parts of each batch of an epoch."""
    return [
        [
            part.inputs
            for part in task.parts(batch, StepKey(epoch, epoch * task.steps_per_epoch + index))
        ]
        for index, batch in enumerate(task.begin_epoch(epoch))
    ]


def joined(parts: list[ClassInputs]) -> list[Tensor]:
    """Images, targets and each grid's pairs, as if there were one part."""
    images, targets, pairs = zip(*parts, strict=True)
    return [
        torch.cat(images),
        torch.cat(targets),
        *(torch.cat(of_grid) for of_grid in zip(*pairs, strict=True)),
    ]


@pytest.mark.parametrize("model", [VIT, SWIN], ids=lambda model: model.name)
def test_drloc_changes_no_weight_batch_mix_or_dropout_of_the_classifier(
    model: ClassifierConfig,
) -> None:
    baseline, with_drloc = the_task(Choice(weight=0, model=model)), the_task(Choice(model=model))
    assert baseline.objective.drloc is None
    assert with_drloc.objective.drloc is not None
    assert are_equal(
        weights_of(baseline.objective.classifier), weights_of(with_drloc.objective.classifier)
    )
    # At rate 0 nothing but the random numbers could set steps apart: all of two epochs compare.
    wanted = run(baseline, num_epochs=2, lr=0.0)
    found = run(with_drloc, num_epochs=2, lr=0.0)
    assert len(wanted.logits) == 4
    for name in ("images", "logits"):
        pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name
    for told, expected in zip(found.history, wanted.history, strict=True):
        assert told["train/cross_entropy"] == expected["train/cross_entropy"]


def test_dropout_is_on_and_differs_from_step_to_step() -> None:
    """Or the test above would compare networks without any."""
    noisy = run(the_task(Choice(weight=0)), num_epochs=1, lr=0.0)
    still = run(the_task(Choice(weight=0, model=STILL_VIT)), num_epochs=1, lr=0.0)
    assert torch.equal(noisy.images[0], still.images[0])
    assert not torch.equal(noisy.logits[0], still.logits[0])


def test_an_epoch_at_lambda_0_moves_the_classifier_as_the_baseline_does() -> None:
    def late(epoch: int) -> float:
        return 0.5 * epoch

    final = []
    for num_epochs in (1, 2):
        baseline, ramped = the_task(Choice(weight=0)), the_task(Choice(schedule=late))
        for task in (baseline, ramped):
            run(task, num_epochs=num_epochs, lr=0.05)
        final.append((baseline.objective.classifier, ramped.objective.classifier))
    (first_baseline, first), (second_baseline, second) = (tuple(map(weights_of, f)) for f in final)
    assert are_equal(first, first_baseline)
    assert not are_equal(second, second_baseline)


def test_at_lambda_0_the_head_takes_no_part_in_clipping() -> None:
    tasks = [the_task(Choice(weight=0)), the_task(Choice(schedule=lambda epoch: 0.0))]
    histories = [run(task, num_epochs=1, lr=0.05, clip=0.01).history for task in tasks]
    assert histories[0][0]["grad_norm/total"] > 0.01
    first, second = (weights_of(task.objective.classifier) for task in tasks)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("drloc", [{}, {"stages": (-2, -1)}], ids=["last grid", "two grids"])
def test_workers_together_see_what_one_would(drloc: dict[str, Any]) -> None:
    choice = Choice(drloc=drloc)
    for epoch in (0, 1):
        alone = inputs_of(the_task(choice), epoch)
        first, second = (
            inputs_of(the_task(choice, Workers(rank, 2, torch.device("cpu"))), epoch)
            for rank in range(2)
        )
        assert [len(parts[0].images_B3HW) for parts in first] == [4, 4]
        assert len(alone) == len(first) == len(second) == 2
        for whole, mine, yours in zip(alone, first, second, strict=True):
            assert len(whole[0].pairs) == len(drloc.get("stages", (-1,)))
            for wanted, found in zip(joined(whole), joined(mine + yours), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("accumulate", [2, 3, 10, 99])
def test_accumulation_changes_no_image_mix_or_pair(accumulate: int) -> None:
    whole = inputs_of(the_task(Choice()), 1)
    cut = inputs_of(the_task(Choice(accumulate=accumulate)), 1)
    for wanted, parts in zip(whole, cut, strict=True):
        assert len(parts) == min(accumulate, BATCH)
        for one, other in zip(joined(wanted), joined(parts), strict=True):
            assert torch.equal(one, other)


def test_pairs_differ_with_the_step_and_the_seed_and_come_again() -> None:
    def pairs(seed: int, epoch: int, step: int) -> Tensor:
        task = the_task(Choice(seed=seed))
        batch = Batch(
            torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64), BATCH, 0
        )
        found: Tensor = task.parts(batch, StepKey(epoch, step))[0].inputs.pairs[0]
        return found

    assert torch.equal(pairs(3, 0, 1), pairs(3, 0, 1))
    assert not torch.equal(pairs(3, 0, 1), pairs(3, 0, 0))
    assert not torch.equal(pairs(3, 0, 1), pairs(4, 0, 1))
    # Images of a batch are asked for different pairs.
    assert not torch.equal(pairs(3, 0, 1)[0], pairs(3, 0, 1)[1])


@pytest.mark.parametrize(
    "choice",
    [
        Choice(model=STILL_VIT),
        Choice(model=STILL_VIT, weight=0),
        Choice(model=STILL_VIT, drloc={"stages": (-2, -1)}),
        Choice(model=STILL_VIT, drloc={"mode": "cbr"}),
        Choice(model=SWIN),
        Choice(model=RESNET),
        Choice(model=CVT),
        Choice(model=STILL_VIT, schedule=lambda epoch: 0.0),
    ],
    ids=lambda choice: f"{choice.model.name} {choice.weight} {choice.drloc}",
)
def test_every_weight_gets_a_gradient(choice: Choice) -> None:
    """DistributedDataParallel would wait for it."""
    task = the_task(choice)
    batch = next(iter(task.begin_epoch(0)))
    (part,) = task.parts(batch, StepKey(0, 0))
    torch.stack([*task.losses(task.objective, part).terms.values()]).sum().backward()  # type: ignore[no-untyped-call]
    missing = [name for name, weight in task.objective.named_parameters() if weight.grad is None]
    assert missing == []


def test_the_weighted_term_is_lambda_times_the_raw_one() -> None:
    def falling(epoch: int) -> float:
        return 0.5 / (1 + epoch)

    history = run(the_task(Choice(schedule=falling)), num_epochs=2, lr=0.01).history
    for epoch, numbers in enumerate(history):
        assert numbers["drloc/weight"] == falling(epoch)
        weighted = falling(epoch) * numbers["train/drloc"]
        assert numbers["train/drloc_weighted"] == pytest.approx(weighted, rel=1e-6)
        # l1 on raw targets: the loss is the error in cells.
        assert numbers["train/drloc_error_cells"] == pytest.approx(numbers["train/drloc"])
    baseline = run(the_task(Choice(weight=0)), num_epochs=1, lr=0.01).history[0]
    assert not [name for name in baseline if "drloc" in name]


def trained(workers: Workers, choice: Choice) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    task = the_task(choice, workers)
    seen = run(task, num_epochs=3, lr=0.05, clip=1.0, gradient_norm_steps=2)
    return weights_of(task.objective), seen.history


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_workers_train_as_one_does(pair: TwoWorkers, accumulate: int) -> None:
    choice = Choice(model=STILL_VIT, accumulate=accumulate)
    wanted, history = trained(ALONE, Choice(model=STILL_VIT))
    (first, told), (second, _) = pair.run(trained, choice)
    assert are_equal(first, second)
    for name, weight in wanted.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for numbers, expected in zip(told, history, strict=True):
        for name in ("train/cross_entropy", "train/drloc", "grad_norm/total"):
            assert numbers[name] == pytest.approx(expected[name], rel=1e-4)
