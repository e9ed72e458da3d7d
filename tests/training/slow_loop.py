"""A task without images, and its training written out so that it is obviously right.

Shape letters:  N examples   B examples of a part   D inputs   H hidden   K classes
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.training.loop import LoopState, Losses, Part, StepKey
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.workers import Workers

NUM_GLOBAL = 8
STEPS_PER_EPOCH = 3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)
FIRST_LAYER_SCALE = 0.5
DECAY_OF_AVERAGE = 0.7


class TinyNetwork(nn.Module):
    """Two layers and two losses; the type in which the hidden layer was computed is kept."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)
        self.computed_in: torch.dtype | None = None

    def forward(self, inputs_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        hidden_BH = self.dropout(self.first(inputs_BD).tanh())
        self.computed_in = hidden_BH.dtype
        logits_BK = self.last(hidden_BH)
        return {
            "fit": F.cross_entropy(logits_BK, labels_B),
            "small": 0.3 * hidden_BH.square().mean(),
            "right": (logits_BK.argmax(dim=1) == labels_B).to(inputs_BD.dtype).mean(),
        }


def tiny_network(
    dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 1
) -> TinyNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNetwork(dropout=dropout).to(dtype)


def examples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and labels: as many as an epoch takes."""
    generator = torch.Generator().manual_seed(0)
    num = NUM_GLOBAL * STEPS_PER_EPOCH
    inputs_ND = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    return inputs_ND.to(dtype), torch.randint(3, (num,), generator=generator)


def batch_indices(epoch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(epoch)
    order_N = torch.randperm(NUM_GLOBAL * STEPS_PER_EPOCH, generator=generator)
    yield from torch.split(order_N, NUM_GLOBAL)


def name_of(example: int) -> str:
    return f"example {example:02d}"


def learning_rate(step: int) -> float:
    """Up and down, so that a step that took its neighbour's is seen."""
    return 0.01 * (1 + step % 4) + 0.001 * step


@dataclass
class TinyTask:
    """``cuts`` has the sizes of each worker's parts; all together are a global batch."""

    objective: TinyNetwork
    workers: Workers
    cuts: Sequence[Sequence[int]] = ((NUM_GLOBAL,),)
    spoiled: Mapping[int, float] = field(default_factory=dict)
    """By step: a number that takes the place of the LAST input of the global batch."""

    added: Mapping[int, float] = field(default_factory=dict)
    """By step: a number added to that input's loss, which leaves the gradient as it is."""

    @property
    def steps_per_epoch(self) -> int:
        return STEPS_PER_EPOCH

    def begin_epoch(self, epoch: int) -> Iterator[Tensor]:
        return batch_indices(epoch)

    def parts(self, batch: Tensor, key: StepKey) -> list[Part]:
        dtype = self.objective.first.weight.dtype
        inputs_ND, labels_N = examples(dtype)
        inputs_BD, labels_B = inputs_ND[batch], labels_N[batch]
        if key.step in self.spoiled:
            inputs_BD[-1] = self.spoiled[key.step]
        starts = [0, *accumulate(sum(sizes) for sizes in self.cuts)]
        start, sizes = starts[self.workers.rank], self.cuts[self.workers.rank]
        ends = [start + end for end in accumulate(sizes)]
        added = [self.added.get(key.step, 0.0) if end == NUM_GLOBAL else 0.0 for end in ends]
        names = [name_of(example) for example in batch.tolist()]
        parts = []
        for size, end, more in zip(sizes, ends, added, strict=True):
            mine = slice(end - size, end)
            inputs = (inputs_BD[mine], labels_B[mine], more)
            parts.append(Part(inputs, size, NUM_GLOBAL, names[mine]))
        return parts

    def losses(self, network: nn.Module, part: Part) -> Losses:
        inputs_BD, labels_B, added = part.inputs
        found = network(inputs_BD, labels_B)
        terms = {"fit": found["fit"] + added, "small": found["small"]}
        return Losses(terms, {"right": found["right"]})

    def constants(self, epoch: int) -> dict[str, float]:
        return {"weight": 10.0 + epoch}


def tiny_state(network: TinyNetwork, *, scale: float | None = None) -> LoopState:
    """AdamW in which the first layer learns half as fast, an average, and a scaler for fp16."""
    scales = {"first.weight": FIRST_LAYER_SCALE, "first.bias": FIRST_LAYER_SCALE}
    groups = parameter_groups(network, weight_decay=WEIGHT_DECAY, lr_scales=scales)
    optimizer = build_optimizer(groups, kind="adamw", lr=1.0, betas=BETAS)
    moving = get_ema_multi_avg_fn(DECAY_OF_AVERAGE)  # type: ignore[no-untyped-call]
    average = AveragedModel(network, multi_avg_fn=moving)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return LoopState(network, optimizer, average, scaler)


@dataclass
class Written:
    """What the training written out comes to."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    history: list[dict[str, float]]
    """The means of each epoch, named as the loop names them."""

    norms: list[float]
    """Of the whole gradient before clipping, step by step."""

    norms_of_terms: list[dict[str, float]]


def train_slowly(network: TinyNetwork, *, num_epochs: int, clip: float) -> Written:
    """One process, one pass over the whole batch per step, AdamW and the average by hand."""
    weights = dict(network.named_parameters())
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    average: dict[str, Tensor] = {}
    done = Written({}, average, [], [], [])
    inputs_ND, labels_N = examples(network.first.weight.dtype)
    step = 0
    for epoch in range(num_epochs):
        found_in_epoch: list[dict[str, float]] = []
        for index in batch_indices(epoch):
            found = network(inputs_ND[index], labels_N[index])
            found_in_epoch.append({name: value.item() for name, value in found.items()})
            done.norms_of_terms.append(
                {
                    name: _norm(
                        torch.autograd.grad(
                            found[name],
                            list(weights.values()),
                            retain_graph=True,
                            allow_unused=True,
                        )
                    )
                    for name in ("fit", "small")
                }
            )
            loss = found["fit"] + found["small"]
            gradients = torch.autograd.grad(loss, list(weights.values()))
            done.norms.append(_norm(gradients))
            shrink = min(1.0, clip / (done.norms[-1] + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    _adamw(name, weight, gradient * shrink, (first[name], second[name]), step)
                    if step == 0:
                        average[name] = weight.clone()
                    else:
                        average[name] = (
                            DECAY_OF_AVERAGE * average[name] + (1 - DECAY_OF_AVERAGE) * weight
                        )
            step += 1
        done.history.append(_means(found_in_epoch, done.norms[-STEPS_PER_EPOCH:], epoch, step - 1))
    done.weights = {name: weight.detach().clone() for name, weight in weights.items()}
    return done


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(one.square().sum()) for one in gradients if one is not None))


def _adamw(
    name: str, weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int
) -> None:
    """Loshchilov and Hutter, algorithm 2, with the defaults of torch."""
    first, second = moments
    lr = learning_rate(step) * (FIRST_LAYER_SCALE if name.startswith("first.") else 1.0)
    if name.endswith("weight"):
        weight *= 1 - lr * WEIGHT_DECAY
    first.copy_(BETAS[0] * first + (1 - BETAS[0]) * gradient)
    second.copy_(BETAS[1] * second + (1 - BETAS[1]) * gradient**2)
    unbiased_first = first / (1 - BETAS[0] ** (step + 1))
    unbiased_second = second / (1 - BETAS[1] ** (step + 1))
    weight -= lr * unbiased_first / (unbiased_second.sqrt() + 1e-8)


def _means(
    found: Sequence[Mapping[str, float]], norms: Sequence[float], epoch: int, step: int
) -> dict[str, float]:
    means = {
        f"train/{name}": sum(one[name] for one in found) / len(found)
        for name in ("fit", "small", "right")
    }
    return means | {
        "grad_norm/total": sum(norms) / len(norms),
        "lr": learning_rate(step),
        "weight": 10.0 + epoch,
    }
