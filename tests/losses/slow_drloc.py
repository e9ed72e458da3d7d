"""The localization loss one pair, one neuron at a time, in plain Python: obviously right."""

import math
from typing import Any

Vector = list[float]
Layer = tuple[list[Vector], Vector]  # weight rows, biases


def linear(layer: Layer, x: Vector) -> Vector:
    return [
        sum(w * value for w, value in zip(row, x, strict=True)) + bias
        for row, bias in zip(*layer, strict=True)
    ]


def slow_outputs(features: Any, pair: Any, layers: dict[str, Any]) -> list[Vector]:
    """What the head says of one pair of cells of one image: a vector per axis."""
    (row_a, column_a), (row_b, column_b) = pair
    first = [channel[row_a][column_a] for channel in features]
    second = [channel[row_b][column_b] for channel in features]
    x = first + second
    for layer in layers["relu"]:
        x = [max(0.0, value) for value in linear(layer, x)]
    x = linear(layers["last"], x)
    if not layers["axes"]:
        return [[x[0]], [x[1]]]
    return [linear(layer, x) for layer in layers["axes"]]


def slow_target(first: int, second: int, side: int, *, signed: bool, normalize: str) -> float:
    offset = first - second
    if not signed:
        return abs(offset) / {"none": 1, "side": side, "side_minus_one": side - 1}[normalize]
    if normalize == "side":
        return offset / side
    return (offset + side - 1) / {"none": 1, "side_minus_one": 2 * (side - 1)}[normalize]


def slow_unit(side: int, *, signed: bool, normalize: str) -> int:
    if normalize == "side_minus_one":
        return 2 * (side - 1) if signed else side - 1
    return {"none": 1, "side": side}[normalize]


def slow_axis(mode: str, output: Vector, target: float) -> tuple[float, float]:
    """Loss and absolute error, the latter in the target's unit, of one axis of one pair."""
    if mode == "l1":
        return abs(output[0] - target), abs(output[0] - target)
    largest = max(output)
    powers = [math.exp(value - largest) for value in output]
    chance = [power / sum(powers) for power in powers]
    if mode == "ce":
        median = next(c for c in range(len(chance)) if sum(chance[: c + 1]) >= 0.5)
        return -math.log(chance[int(target)]), abs(median - target)
    mean = sum(c * p for c, p in enumerate(chance))
    variance = sum(p * (c - mean) ** 2 for c, p in enumerate(chance)) + 1e-8
    return (mean - target) ** 2 / variance + 0.001 * math.log(variance), abs(mean - target)


def slow_terms(
    features: Any,
    pairs: Any,
    layers: dict[str, Any],
    *,
    mode: str,
    signed: bool,
    normalize: str,
    reduction: str,
) -> tuple[float, float]:
    """Loss and error in cells over a batch of nested lists."""
    sides = len(features[0][0]), len(features[0][0][0])
    if reduction == "paper":
        normalize = "side"
    loss = error = 0.0
    count = 0
    for image, image_pairs in zip(features, pairs, strict=True):
        for pair in image_pairs:
            count += 1
            for axis, output in enumerate(slow_outputs(image, pair, layers)):
                target = slow_target(
                    pair[0][axis], pair[1][axis], sides[axis], signed=signed, normalize=normalize
                )
                axis_loss, axis_error = slow_axis(mode, output, target)
                loss += axis_loss
                error += axis_error * slow_unit(sides[axis], signed=signed, normalize=normalize)
    axes = 2 if mode == "l1" and reduction == "mean" else 1
    return loss / (count * axes), error / (count * 2)
