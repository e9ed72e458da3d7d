"""DINO's loss and centre against a slow loop, and the promises of their docstrings."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.dino import Center, DINOTerms, dino_loss
from pipeline.training.workers import Workers
from tests.losses.slow_dino import slow_terms
from tests.training.two_workers import TwoWorkers


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_all(
    views: int, teachers: int, images: int, prototypes: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the student, of the teacher, the centre."""
    return (
        draw(views, images, prototypes, seed=seed),
        draw(teachers, images, prototypes, seed=seed + 1),
        draw(prototypes, seed=seed + 2),
    )


def alone(value: Tensor) -> Tensor:
    return value


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    teachers=st.integers(1, 3),
    more=st.integers(0, 4),
    images=st.integers(1, 3),
    prototypes=st.integers(1, 7),
    temps=st.tuples(st.floats(0.03, 2), st.floats(0.03, 2)),
    seed=st.integers(0, 1000),
)
def test_the_terms_equal_the_slow_loop(
    teachers: int,
    more: int,
    images: int,
    prototypes: int,
    temps: tuple[float, float],
    seed: int,
) -> None:
    views = max(teachers + more, 2)
    inputs = draw_all(views, teachers, images, prototypes, seed)
    fast = dino_loss(*inputs, student_temp=temps[0], teacher_temp=temps[1])
    student, teacher, center = (each.numpy() for each in inputs)
    slow = slow_terms(student, teacher, center, *temps)
    np.testing.assert_allclose([term.item() for term in fast], slow, rtol=1e-10, atol=1e-11)
    assert not fast.entropy.requires_grad
    assert not fast.divergence.requires_grad


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(2, 2, 1, 3), (2, 1, 2, 4), (4, 2, 2, 3), (5, 3, 1, 5), (3, 3, 2, 2)]),
    temps=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
    seed=st.integers(0, 1000),
)
def test_the_gradient_is_that_of_the_slow_loop(
    shape: tuple[int, int, int, int], temps: tuple[float, float], seed: int
) -> None:
    student, teacher, center = draw_all(*shape, seed)
    leaf = student.clone().requires_grad_()
    terms = dino_loss(leaf, teacher, center, student_temp=temps[0], teacher_temp=temps[1])
    (gradient,) = torch.autograd.grad(3 * terms.loss, [leaf])
    step = 1e-5
    for index in np.ndindex(*student.shape):
        losses = []
        for moved in (student[index] + step, student[index] - step):
            other = student.numpy().copy()
            other[index] = moved
            losses.append(slow_terms(other, teacher.numpy(), center.numpy(), *temps)[0])
        expected = 3 * (losses[0] - losses[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_teacher_and_the_centre_get_no_gradient_and_may_change_before_the_backward_pass() -> (
    None
):
    gradients = []
    for change in (False, True):
        student, teacher, center = (each.requires_grad_() for each in draw_all(4, 2, 3, 5))
        # Not leaves: as they come out of a network.
        outputs = [each * 1 for each in (teacher, center)]
        loss, *others = dino_loss(student, *outputs, teacher_temp=0.1)
        assert not any(other.requires_grad for other in others)
        if change:
            with torch.no_grad():
                for output in outputs:
                    output.fill_(7)
        loss.backward()  # type: ignore[no-untyped-call]
        assert teacher.grad is None
        assert center.grad is None
        assert student.grad is not None
        gradients.append(student.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_views_see_only_the_teachers_other_views() -> None:
    # One teacher view: the student's same view has no pair, so nothing it says matters.
    student, teacher, center = draw_all(3, 1, 2, 4)
    student.requires_grad_()
    dino_loss(student, teacher, center, teacher_temp=0.1).loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1].any()
    assert student.grad[2].any()


def test_parts_of_a_batch_average_to_the_whole() -> None:
    student, teacher, center = draw_all(5, 2, 6, 8)
    whole = dino_loss(student, teacher, center, teacher_temp=0.05)
    parts = [
        dino_loss(student[:, part], teacher[:, part], center, teacher_temp=0.05)
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    for together, *apart in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, torch.stack(apart).mean(), rtol=1e-12, atol=0)


def test_the_two_collapses_show_as_the_docstring_says() -> None:
    prototypes = 16
    one = torch.zeros(3, 2, prototypes)
    one[..., 4] = 5
    uniform = torch.zeros(3, 2, prototypes)
    center = torch.zeros(prototypes)
    peaked = dino_loss(one, one[:2], center, teacher_temp=0.1)
    flat = dino_loss(uniform, uniform[:2], center, teacher_temp=0.04)
    assert peaked.entropy.item() == pytest.approx(0, abs=1e-6)
    assert flat.entropy.item() == pytest.approx(math.log(prototypes))
    for terms in (peaked, flat):
        assert terms.divergence.item() == pytest.approx(0, abs=1e-6)


def test_default_temperature_of_the_student_is_the_published_one() -> None:
    inputs = draw_all(3, 2, 2, 4)
    assert dino_loss(*inputs, teacher_temp=0.04) == dino_loss(
        *inputs, student_temp=0.1, teacher_temp=0.04
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_reckoned_in_float32_also_under_autocast(
    dtype: torch.dtype,
) -> None:
    student, teacher, center = (each.to(dtype) for each in draw_all(4, 2, 3, 200))
    expected = dino_loss(student.float(), teacher.float(), center.float(), teacher_temp=0.04)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found = dino_loss(student, teacher, center.float(), teacher_temp=0.04)
        (gradient,) = torch.autograd.grad(found.loss, [student])
    assert found == expected
    assert {term.dtype for term in found} == {torch.float32}
    assert gradient.dtype == dtype
    wide = student.detach().float().requires_grad_()
    loss = dino_loss(wide, teacher.float(), center.float(), teacher_temp=0.04).loss
    (reference,) = torch.autograd.grad(loss, [wide])
    # Each number is rounded once, at the end.
    assert torch.equal(gradient, reference.to(dtype))


def test_large_outputs_overflow_nothing() -> None:
    student = (1e4 * draw(4, 3, 50, dtype=torch.float32)).requires_grad_()
    teacher = 1e4 * draw(2, 3, 50, seed=1, dtype=torch.float32)
    terms = dino_loss(student, teacher, torch.zeros(50), teacher_temp=0.04)
    (gradient,) = torch.autograd.grad(terms.loss, [student])
    assert all(term.isfinite() for term in (*terms, gradient.sum()))


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    student = draw(10, 4, 300, dtype=torch.float32).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, alone):
        dino_loss(student, draw(2, 4, 300), torch.zeros(300), teacher_temp=0.04)
    own = [tensor for tensor in kept if tensor.data_ptr() != student.data_ptr()]
    assert len(kept) > len(own)
    assert sum(tensor.numel() for tensor in own) <= 2 * 4 * 300


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3, 5), (2, 3, 6), (5,)), "the outputs must be"),
        (((4, 3, 5), (2, 2, 5), (5,)), "the outputs must be"),
        (((4, 3, 5), (2, 3, 5), (6,)), "the outputs must be"),
        (((4, 3, 5), (2, 3, 5), (1, 5)), "the outputs must be"),
        (((12, 5), (6, 5), (5,)), "the outputs must be"),
        (((2, 3, 5), (3, 3, 5), (5,)), "at least 2 views"),
        (((1, 3, 5), (1, 3, 5), (5,)), "at least 2 views"),
        (((4, 3, 5), (0, 3, 5), (5,)), "at least 2 views"),
        (((4, 0, 5), (2, 0, 5), (5,)), "there must be an image"),
        (((4, 3, 0), (2, 3, 0), (0,)), "there must be an image"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Any, message: str) -> None:
    student, teacher, center = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        dino_loss(student, teacher, center, teacher_temp=0.04)


@pytest.mark.parametrize("name", ["student_temp", "teacher_temp"])
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_temperatures_that_are_not_above_0_are_refused(name: str, value: float) -> None:
    temps: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.04} | {name: value}
    with pytest.raises(ValueError, match="student_temp and teacher_temp must be above 0"):
        dino_loss(*draw_all(3, 2, 2, 4), **temps)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    momentum=st.floats(0, 1),
    steps=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_the_centre_equals_a_slow_loop_over_parts_and_steps(
    momentum: float, steps: list[list[int]], seed: int
) -> None:
    center = Center(3, momentum=momentum)
    slow = [0.0] * 3
    for step, parts in enumerate(steps):
        seen: list[Any] = []
        for part, images in enumerate(parts):
            teacher = draw(2, images, 3, seed=seed + 10 * step + part)
            center.add(teacher)
            seen += teacher.flatten(0, 1).tolist()
        center.update(alone)
        if seen:
            for k in range(3):
                mean = sum(output[k] for output in seen) / len(seen)
                slow[k] = momentum * slow[k] + (1 - momentum) * mean
    np.testing.assert_allclose(center.center_K.numpy(), slow, rtol=1e-5, atol=1e-6)


def test_the_centre_starts_at_0_with_the_published_momentum() -> None:
    center = Center(4)
    assert not center.center_K.any()
    center.add(torch.ones(2, 3, 4))
    center.update(alone)
    torch.testing.assert_close(center.center_K, torch.full((4,), 0.1))


def test_a_centre_that_was_shown_nothing_stays_and_forgets_after_each_update() -> None:
    center = Center(2)
    center.add(draw(2, 3, 2))
    center.update(alone)
    moved = center.center_K.clone()
    assert moved.all()
    center.update(alone)
    assert torch.equal(center.center_K, moved)


def test_only_the_centre_is_in_a_checkpoint_and_among_the_buffers() -> None:
    center = Center(2)
    center.add(draw(2, 3, 2))
    assert list(center.state_dict()) == ["center_K"]
    assert [name for name, _ in center.named_buffers()] == ["center_K"]
    assert list(center.parameters()) == []
    center.update(alone)
    again = Center(2)
    again.load_state_dict(center.state_dict())
    assert torch.equal(again.center_K, center.center_K)


def test_many_half_precision_outputs_are_added_in_float32() -> None:
    center = Center(1, momentum=0)
    for _ in range(300):
        # In bfloat16 the sum would stop at 256.
        center.add(torch.ones(1, 1, 1, dtype=torch.bfloat16))
    center.update(alone)
    assert center.center_K.item() == 1


def test_the_centre_holds_no_graph_of_the_teacher() -> None:
    center = Center(2)
    center.add(draw(2, 3, 2).requires_grad_())
    assert isinstance(center._sum_K, Tensor)
    assert not center._sum_K.requires_grad
    center.update(alone)
    assert not center.center_K.requires_grad


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4)])
def test_outputs_that_are_not_the_centres_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(G, B, 3\)"):
        Center(3).add(torch.zeros(shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_prototypes": 0}, "num_prototypes must be at least 1, got 0"),
        ({"num_prototypes": 2, "momentum": 1.1}, r"momentum must be in \[0, 1\], got 1.1"),
        ({"num_prototypes": 2, "momentum": -0.1}, r"momentum must be in \[0, 1\], got -0.1"),
    ],
)
def test_impossible_centres_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Center(**wrong)


def _center_of(workers: Workers, images: list[int]) -> list[float]:
    """A worker's centre after a step in which it saw ``images[rank]`` of five images."""
    teacher = draw(2, 5, 3, dtype=torch.float32)
    first = sum(images[: workers.rank])
    center = Center(3)
    if images[workers.rank]:
        center.add(teacher[:, first : first + images[workers.rank]])
    center.update(workers.total)
    values: list[float] = center.center_K.tolist()
    return values


@pytest.mark.slow
def test_two_workers_reach_the_centre_that_one_would(pair: TwoWorkers) -> None:
    expected = Center(3)
    expected.add(draw(2, 5, 3, dtype=torch.float32))
    expected.update(alone)
    for images in ([2, 3], [4, 1], [5, 0]):
        first, second = pair.run(_center_of, images)
        assert first == second
        np.testing.assert_allclose(first, expected.center_K.numpy(), rtol=1e-5)
    assert pair.run(_center_of, [0, 0]) == [[0.0] * 3] * 2


def test_the_terms_come_by_name() -> None:
    terms = dino_loss(*draw_all(3, 2, 2, 4), teacher_temp=0.04)
    assert DINOTerms._fields == ("loss", "entropy", "divergence")
    torch.testing.assert_close(terms.loss, terms.entropy + terms.divergence)
