"""rep_sgd_step: the reference against torch.optim.SGD, every kernel against the reference, bit for bit."""

from __future__ import annotations

import cases
import checks
import implementations
import pytest
import torch
from cases import Problem, assert_same_bits

from gradrep_kernels.ops import reference

HYPER_IDS = [h.name for h in cases.HYPERS]


# ---- the reference against a stranger


def torch_step(params, grads, buffers, options, steps_before):
    """One step of torch.optim.SGD(foreach=False) from a given state."""
    twins = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.SGD(twins, foreach=False, **options)
    for p, g, b in zip(twins, grads, buffers):
        p.grad = g.clone()
        if steps_before and options.get("momentum"):
            optimizer.state[p]["momentum_buffer"] = b.clone()
    optimizer.step()
    return [p.detach() for p in twins], [optimizer.state[p].get("momentum_buffer") for p in twins]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", ["none", "repopt", "spatial", "dense", "number"])
@pytest.mark.parametrize("hyper", cases.HYPERS, ids=HYPER_IDS)
def test_reference_is_torch_sgd_on_multiplied_gradients(hyper, form, first):
    shapes = [
        cases.SHAPES[name]
        for name in ("empty", "scalar", "prime", "linear", "conv_3x3_square", "conv_3x5", "grouped", "depthwise")
    ]
    problem = Problem(shapes, form, dtype=torch.float64, hypers=(hyper,), first=first)
    before = problem.clone()
    multiplied = []
    for g, scale, identity in zip(before.grads, before.scales, before.identities):
        if scale is None:
            multiplied.append(g)
            continue
        m = scale.expand(g.shape).clone()
        if identity is not None:
            for o in range(g.shape[0]):
                m[o, o % g.shape[1], g.shape[2] // 2, g.shape[3] // 2] += identity[o]
        multiplied.append(m * g)
    expected, expected_buffers = torch_step(before.params, multiplied, before.buffers, hyper.options, not first)
    problem.run(reference.rep_sgd_step)
    for p, old, wanted in zip(problem.params, before.params, expected):
        largest = torch.maximum(wanted.abs(), (wanted - old).abs())
        assert bool(((p - wanted).abs() <= cases.FLOAT64_TOLERANCE * largest).all())
    if hyper.options.get("momentum"):
        for buffer, wanted, g in zip(problem.buffers, expected_buffers, multiplied):
            assert bool(((buffer - wanted).abs() <= 4e-16 * (wanted.abs() + g.abs() + 1)).all())
    else:
        assert all(torch.equal(a, b) for a, b in zip(problem.buffers, before.buffers))
    assert all(torch.equal(a, b) for a, b in zip(problem.grads, before.grads))


@pytest.mark.parametrize("hyper", cases.HYPERS, ids=HYPER_IDS)
def test_float32_is_within_4_ulp_of_float64(hyper):
    shapes = [cases.SHAPES[name] for name in ("prime", "conv_3x3_square", "grouped")]
    problem = Problem(shapes, hypers=(hyper,))
    exact = problem.clone()
    for name in ("params", "grads", "buffers"):
        setattr(exact, name, [t.double() for t in getattr(exact, name)])
    old = [p.clone() for p in exact.params]
    exact.hyper = exact.hyper.float().double()  # lr = 0.1 is not a float32 number: that is not the step's error
    problem.run(reference.rep_sgd_step)
    exact.run(reference.rep_sgd_step)
    for p, wanted, before, buffer in zip(problem.params, exact.params, old, exact.buffers):
        largest = torch.stack(
            [wanted.abs(), before.abs(), (wanted - before).abs(), buffer.abs() * hyper.options["lr"]]
        ).amax(0)
        assert bool(((p.double() - wanted).abs() <= cases.FLOAT32_TOLERANCE * largest).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hyper", cases.HYPERS, ids=HYPER_IDS)
def test_low_precision_is_no_worse_than_twice_eager_torch(hyper, dtype):
    problem = Problem([(257,), (16, 8, 3, 3)], "none", dtype=dtype, hypers=(hyper,))
    before = problem.clone()
    exact, _ = torch_step(
        [p.double() for p in before.params],
        [g.double() for g in before.grads],
        [b.double() for b in before.buffers],
        hyper.options,
        True,
    )
    eager, _ = torch_step(before.params, before.grads, before.buffers, hyper.options, True)
    problem.run(reference.rep_sgd_step)
    ours = max(float((p.double() - e).abs().max()) for p, e in zip(problem.params, exact))
    theirs = max(float((p.double() - e).abs().max()) for p, e in zip(eager, exact))
    assert ours <= 2 * theirs


# ---- every kernel against the reference

STEP = implementations.of("rep_sgd_step")


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_kernel_has_the_references_bits(backend, device, form, dtype, channels_last):
    """All shapes at once, with and without identity, in four groups of unlike hyper-parameters."""
    step = implementations.get("rep_sgd_step", backend, device)
    for identity in (False, True):
        for first in (False, True):
            problem = Problem(
                cases.SHAPES.values(),
                form,
                identity,
                dtype,
                [cases.HYPERS[n] for n in (0, 3, 4, 8)],
                channels_last,
                first,
            )
            assert_same_bits(problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("hyper", cases.HYPERS, ids=HYPER_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernel_follows_every_hyper_parameter(backend, device, hyper, dtype):
    step = implementations.get("rep_sgd_step", backend, device)
    shapes = [
        cases.SHAPES[name] for name in ("prime", "conv_3x3_square", "conv_5x5", "conv_7x7", "conv_1x1", "conv_3x5")
    ]
    for form in ("none", "repopt", "dense"):
        problem = Problem(shapes, form, dtype=dtype, hypers=(hyper,))
        assert_same_bits(problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("what", [("grads",), ("params",), ("buffers",), ("grads", "params", "buffers")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unaligned_tensors_of_a_block_and_more(backend, device, dtype, what):
    """Gradients in DistributedDataParallel's buckets and shards of FSDP start anywhere.

    On a GPU a wide access there is an error that stays.
    """
    step = implementations.get("rep_sgd_step", backend, device)
    problem = Problem(
        [cases.SHAPES[name] for name in ("prime", "chunk", "chunk_minus_1", "chunk_plus_1", "conv_3x3_many_chunks")],
        dtype=dtype,
    )
    there = problem.clone(device)
    for name in what:
        setattr(there, name, [cases.unaligned(t, 1 + n % 3) for n, t in enumerate(getattr(there, name))])
    assert_same_bits(there.run(step), problem.run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unscaling_and_overflow(backend, device, dtype):
    step = implementations.get("rep_sgd_step", backend, device)
    problem = Problem(cases.SHAPES.values(), dtype=dtype)
    amp = {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)}
    there = {name: value.to(device) for name, value in amp.items()}
    assert_same_bits(problem.clone(device).run(step, **there), problem.clone().run(reference.rep_sgd_step, **amp))
    for overflow in (1.0, 2.0, -1.0, float("nan")):
        after = problem.clone(device).run(
            step, grad_scale=there["grad_scale"], found_inf=torch.tensor(overflow, device=device)
        )
        assert_same_bits(after, problem)


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_zeros_infinities_and_nan_pass_through(backend, device):
    checks.zeros_infinities_and_nan_pass_through(implementations.get("rep_sgd_step", backend, device), device)


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_what_the_kernel_does_not_take_goes_to_the_reference(backend, device):
    checks.what_the_kernel_does_not_take_goes_to_the_reference(
        implementations.get("rep_sgd_step", backend, device), device
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    step = (
        implementations.get("rep_sgd_step", *STEP[0].values)
        if not STEP[0].marks
        else pytest.skip(STEP[0].marks[0].kwargs["reason"])
    )
    problem = Problem(list(cases.SHAPES.values()) * 2)
    expected = problem.clone().run(reference.rep_sgd_step)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(problem.clone().run(step), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_nothing_to_do(backend, device):
    checks.nothing_to_do(implementations.get("rep_sgd_step", backend, device))
    checks.nothing_to_do(reference.rep_sgd_step)


def test_the_registered_default_is_there():
    problem = Problem([(5,), (4, 4, 3, 3)])
    assert_same_bits(
        problem.clone().run(torch.ops.gradrep_kernels.rep_sgd_step), problem.clone().run(reference.rep_sgd_step)
    )
