"""Rates, weights and temperatures over a run: numbers in, a number out, no state to save.

To add a schedule: a function. One of the loss weight also needs a case in ``drloc_weight`` and its
name in ``WeightSchedule``.
"""

import math
from collections.abc import Sequence

from pipeline.config.classification import WeightSchedule


def warmup_cosine(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    floor: float = 0.0,
) -> float:
    """The learning rate of update ``step`` (from 0), as timm's cosine schedule has it.

    From ``warmup_start`` in a line towards ``peak`` over ``warmup_steps``, then half a cosine to
    ``floor`` at ``total_steps``; after that ``floor``, so cool-down epochs need nothing more. The
    cosine starts at step 0, not after the warm-up (timm's ``warmup_prefix=False``): the rate right
    after a warm-up of 20 epochs in 300 is 0.989 of the peak.

    Args:
        step: updates made before this one.
        peak: where the warm-up leads and the cosine starts.
        total_steps: updates until the floor, cool-down not counted, at least 1.
        warmup_steps: updates of the warm-up.
        warmup_start: rate of the first update, where there is a warm-up.
        floor: lowest rate.

    Raises:
        ValueError: ``total_steps`` is below 1, or ``step`` or ``warmup_steps`` below 0.
    """
    if total_steps < 1 or min(step, warmup_steps) < 0:
        raise ValueError(
            "total_steps must be at least 1, step and warmup_steps at least 0, "
            f"got {total_steps}, {step} and {warmup_steps}"
        )
    if step < warmup_steps:
        return warmup_start + step * (peak - warmup_start) / warmup_steps
    return cosine(step, start=peak, end=floor, total_steps=total_steps)


def warmup_then_cosine(
    step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int
) -> float:
    """DINO's learning rate: a line from 0 to ``peak``, and only then half a cosine to ``floor``.

    Unlike in ``warmup_cosine``, the cosine starts where the warm-up ends, at ``peak`` itself.

    Raises:
        ValueError: a number of steps is below 0, or the warm-up longer than all.
    """
    if not 0 <= warmup_steps <= total_steps or step < 0:
        raise ValueError(
            "warmup_steps must be in [0, total_steps] and step at least 0, "
            f"got {warmup_steps}, {total_steps} and {step}"
        )
    if step < warmup_steps:
        # The last of the warm-up is the peak, as numpy's linspace has it.
        return peak * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return floor
    rest = total_steps - warmup_steps
    return cosine(step - warmup_steps, start=peak, end=floor, total_steps=rest)


def warmup_then_milestones(
    step: int,
    *,
    peak: float,
    milestones: Sequence[int],
    factor: float = 0.1,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
) -> float:
    """Detectron2's learning rate: a line up to ``peak``, then times ``factor`` at each milestone.

    The warm-up starts at ``warmup_factor`` of the rate and reaches all of it at ``warmup_steps``.

    Raises:
        ValueError: a number of steps is below 0.
    """
    if min(step, warmup_steps, *milestones, 0) < 0:
        raise ValueError(
            "step, warmup_steps and milestones must be at least 0, "
            f"got {step}, {warmup_steps} and {list(milestones)}"
        )
    rate = peak * factor ** sum(milestone <= step for milestone in milestones)
    if step >= warmup_steps:
        return rate
    done = step / warmup_steps
    return rate * (warmup_factor * (1 - done) + done)


def warmup_cosine_one_late(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    floor: float = 0.0,
) -> float:
    """``warmup_cosine`` of the update before: the rates the released DRLoc code really used.

    Like Swin's, it sets the rate after update n from n and not from n + 1, so that the first two
    updates share the first rate. The difference is one step; this is for exact comparisons.
    """
    return warmup_cosine(
        max(step - 1, 0),
        peak=peak,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start,
        floor=floor,
    )


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Half a cosine, up or down: ``start`` at step 0, ``end`` at ``total_steps`` and after it.

    DINO's weight decay (0.04 to 0.4) and the momentum of its teacher (0.996 to 1) go like this, per
    update (Caron et al., ICCV 2021, sections 3.1 and 3.2).

    Args:
        step: updates made before this one.
        start: value of the first update.
        end: value from ``total_steps`` on.
        total_steps: updates until the end, at least 1.

    Raises:
        ValueError: ``total_steps`` is below 1, or ``step`` below 0.
    """
    if total_steps < 1 or step < 0:
        raise ValueError(
            f"total_steps must be at least 1 and step at least 0, got {total_steps} and {step}"
        )
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def teacher_temperature(
    epoch: int, *, start: float = 0.04, end: float = 0.04, warmup_epochs: int = 0
) -> float:
    """Temperature of DINO's teacher in an epoch (from 0), Caron et al., ICCV 2021, section 3.2.

    In a line from ``start`` at epoch 0 to ``end`` at ``warmup_epochs``, then ``end``. The released
    code arrives one epoch earlier, as its line has ``warmup_epochs`` points, both ends counted.

    Raises:
        ValueError: a temperature is not above 0, or ``epoch`` or ``warmup_epochs`` is below 0.
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"the teacher's temperatures must be above 0, got {start} and {end}")
    if min(epoch, warmup_epochs) < 0:
        raise ValueError(
            f"epoch and warmup_epochs must be at least 0, got {epoch} and {warmup_epochs}"
        )
    if epoch >= warmup_epochs:
        return end
    return start + epoch * (end - start) / warmup_epochs


def drloc_weight(
    epoch: int, *, weight: float, schedule: WeightSchedule, ramp_epochs: int, total_epochs: int
) -> float:
    """Lambda of an epoch (from 0): what the localization loss is multiplied by.

    Args:
        epoch: from 0.
        weight: lambda where it is highest.
        schedule: ``constant`` is the paper, ``ramp_decay`` the released code.
        ramp_epochs: for ramp and ramp_decay.
        total_epochs: for ramp_decay alone.

    Raises:
        ValueError: there is no such schedule.
    """
    match schedule:
        case "constant":
            return weight
        case "ramp":
            return ramp(epoch, weight=weight, ramp_epochs=ramp_epochs)
        case "ramp_decay":
            return ramp_decay(
                epoch, weight=weight, ramp_epochs=ramp_epochs, total_epochs=total_epochs
            )
    raise ValueError(f"schedule must be constant, ramp or ramp_decay, got {schedule!r}")


def ramp(epoch: int, *, weight: float, ramp_epochs: int) -> float:
    """In a line from 0 at epoch 0 to ``weight`` at ``ramp_epochs``, then ``weight``.

    With ``ramp_epochs`` 0 it is ``weight`` from the start.
    """
    return weight * epoch / ramp_epochs if epoch < ramp_epochs else weight


def ramp_decay(epoch: int, *, weight: float, ramp_epochs: int, total_epochs: int) -> float:
    """``ramp``, then in a line down to 0 at ``total_epochs``, and 0 after it.

    A run that ends before ``total_epochs`` (the released code: epoch 101 of 300) ends above 0.
    """
    if epoch <= ramp_epochs:
        return ramp(epoch, weight=weight, ramp_epochs=ramp_epochs)
    if epoch >= total_epochs:
        return 0.0
    return weight * (1 - (epoch - ramp_epochs) / (total_epochs - ramp_epochs))
