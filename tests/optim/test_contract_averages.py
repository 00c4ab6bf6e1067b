"""Averages of the weights as people use them, and what a checkpoint keeps of the end of a step."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases_optim import SGD, STEADY, all_equal, net, set_grads
from torch import nn

from gradrep_kernels import FusedRepSGD

OPTIONS = {"max_grad_norm": 0.7, "ema_decay": 0.9}


def schedule(step: int) -> float:
    return min(0.99, step / (4 + step))


def trained(case, model=None, steps: int = STEADY, dtype=torch.float32, optimizer=None, first: int = 0, **options):
    """(model, optimizer) after steps on forced gradients."""
    model = net(dtype) if model is None else model
    if optimizer is None:
        optimizer = case.make(model.parameters(), **{"lr": 0.05, **case.hyper, **OPTIONS, **options})
    for step in range(first, first + steps):
        set_grads([p for p in model.parameters() if p.requires_grad], step)
        optimizer.step()
    return model, optimizer


def values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def averages(model, optimizer) -> list[torch.Tensor]:
    return [optimizer.ema(p).clone() for p in model.parameters()]


# ---- for an evaluation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_the_averages_inside(case, dtype):
    model, opt = trained(case, dtype=dtype)
    before, expected = values(model), averages(model, opt)
    objects, versions = list(model.parameters()), [p._version for p in model.parameters()]
    assert not all_equal([w.double() for w in before], [e.double() for e in expected])
    with opt.swap_ema():
        assert all_equal(values(model), [e.to(dtype) for e in expected])
        assert all_equal(averages(model, opt), expected)
        assert list(map(id, model.parameters())) == list(map(id, objects))
        assert all(p._version > version for p, version in zip(model.parameters(), versions))
    assert all_equal(values(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_weights_come_back_when_the_evaluation_raises(case):
    model, opt = trained(case)
    before = values(model)
    with pytest.raises(ZeroDivisionError), opt.swap_ema():
        raise ZeroDivisionError
    assert all_equal(values(model), before)
    trained(case, model, 1, optimizer=opt)


def test_nothing_else_is_done_inside(case):
    model, opt = trained(case)
    with opt.swap_ema():
        with pytest.raises(RuntimeError, match="swap_ema inside swap_ema"), opt.swap_ema():
            pass
        before = values(model)
        with pytest.raises(RuntimeError, match="a step inside swap_ema would train the averages"):
            opt.step()
        assert all_equal(values(model), before)
        assert all_equal([e.to(w.dtype) for e, w in zip(averages(model, opt), before)], before)


def test_training_goes_on_as_if_there_had_been_no_swap(case):
    model, opt = trained(case)
    twin, other = trained(case)
    with opt.swap_ema():
        pass
    trained(case, model, STEADY, optimizer=opt, first=20)
    trained(case, twin, STEADY, optimizer=other, first=20)
    assert all_equal(values(model), values(twin))
    assert all_equal(averages(model, opt), averages(twin, other))


def test_without_averages(case):
    model, opt = trained(case, ema_decay=None)
    weight = next(model.parameters())
    for use in (lambda: opt.ema(weight), lambda: opt.ema_state_dict(model), lambda: opt.swap_ema().__enter__()):
        with pytest.raises(RuntimeError, match="this optimizer keeps no averages: give it an ema_decay"):
            use()
    with pytest.raises(
        ValueError, match=r"unknown parameter \(shape \[2\]\): it is not in this optimizer's param_groups$"
    ):
        opt.ema(nn.Parameter(torch.ones(2)))
    opt.step()


def test_before_the_first_step(case):
    model = net()
    opt = case.make(model.parameters(), lr=0.1, ema_decay=0.9)
    weight = next(model.parameters())
    assert torch.equal(opt.ema(weight), weight)
    opt.ema(weight).zero_()  # a copy
    assert weight.abs().sum() > 0
    with opt.swap_ema():
        pass
    entries = opt.ema_state_dict(model)
    assert list(entries) == list(model.state_dict())
    assert all(torch.equal(entries[name], value) for name, value in model.state_dict().items())


class Tied(nn.Module):
    """A frozen part, a buffer, one weight under two names, and state of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.again = self.body[0]

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        assert state == {"epoch": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_of_averages(case, wrapped, dtype):
    model = Tied().to(dtype)
    _, opt = trained(case, model)
    model.body[1].running_mean.fill_(7)
    outside = nn.DataParallel(model) if wrapped else model
    entries = opt.ema_state_dict(outside)
    own = outside.state_dict()
    assert list(entries) == list(own)
    prefix = "module." if wrapped else ""
    names = {id(p): name for name, p in model.named_parameters()}
    for p in opt.state:
        entry = entries[prefix + names[id(p)]]
        assert entry.dtype == dtype
        assert not entry.requires_grad
        assert torch.equal(entry, opt.ema(p).to(dtype))
        assert entry.data_ptr() != p.data_ptr()
    assert torch.equal(entries[f"{prefix}again.weight"], entries[f"{prefix}body.0.weight"])
    assert torch.equal(entries[f"{prefix}frozen.weight"], model.frozen.weight)
    assert torch.equal(entries[f"{prefix}body.1.running_mean"], torch.full((4,), 7.0, dtype=dtype))
    other = Tied().to(dtype)
    (nn.DataParallel(other) if wrapped else other).load_state_dict(entries)
    with opt.swap_ema():
        assert all_equal(values(other), values(model))


def test_averages_of_another_models_weights(case):
    model, opt = trained(case)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        opt.ema_state_dict(list(net().parameters()))
    for other in (net(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"this optimizer has no parameter of this model\. If the model is a copy"):
            opt.ema_state_dict(other)


# ---- checkpoints


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_has_the_same_bits(case, dtype, narrow):
    if narrow and case is not SGD:
        pytest.skip("it has no option for the dtype of its states")
    options = {"ema_decay": schedule, **({"momentum_dtype": torch.bfloat16} if narrow else {})}
    model, opt = trained(case, dtype=dtype, **options)
    opt.rounding_seed = 2**40 + 5
    trained(case, model, 2, optimizer=opt, first=4)
    twin = copy.deepcopy(model)
    other = case.make(twin.parameters(), **{"lr": 0.05, **case.hyper, **OPTIONS, **options})
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert other.rounding_seed == 2**40 + 5
    trained(case, model, STEADY, optimizer=opt, first=6)
    trained(case, twin, STEADY, optimizer=other, first=6)
    assert all_equal(values(model), values(twin))
    assert all_equal(averages(model, opt), averages(twin, other))
    assert {state["ema"].dtype for state in other.state.values()} == {torch.promote_types(dtype, torch.float32)}
    for p, q in zip(model.parameters(), twin.parameters()):
        for key in case.states:
            assert torch.equal(opt.state[p][key], other.state[q][key])
            assert opt.state[p][key].dtype == (torch.bfloat16 if narrow else dtype)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_alike(case, copied):
    narrow = {"momentum_dtype": torch.bfloat16} if case is SGD else {}
    model, opt = trained(case, ema_decay=schedule, **narrow)
    opt.rounding_seed = 11
    twin, other = copied((model, opt))
    assert other.last_grad_norm is None
    trained(case, model, STEADY, optimizer=opt, first=5)
    trained(case, twin, STEADY, optimizer=other, first=5)
    assert all_equal(values(model), values(twin))
    assert all_equal(averages(model, opt), averages(twin, other))


def test_torchs_optimizer_takes_the_checkpoint_and_gives_one(case):
    model, opt = trained(case)
    twin = copy.deepcopy(model)
    oracle = case.oracle(twin.parameters(), **{"lr": 0.05, **case.hyper})
    oracle.load_state_dict(saved_and_loaded(opt.state_dict()))
    set_grads(twin.parameters(), 9)
    oracle.step()
    back = copy.deepcopy(oracle.state_dict())  # it carries the averages along, and moves them no more
    other = case.make(twin.parameters(), **{"lr": 0.05, **case.hyper}, ema_decay=0.9)
    other.load_state_dict(back)
    assert all_equal(averages(twin, other), averages(model, opt))
    for entry in back["state"].values():
        del entry["ema"]
    with pytest.warns(UserWarning, match="the checkpoint has no averages of the weights: they begin anew"):
        other.load_state_dict(back)
    assert all_equal(averages(twin, other), values(twin))


def test_averages_that_nobody_moves_are_kept_with_a_warning(case):
    model, opt = trained(case)
    twin = copy.deepcopy(model)
    other = case.make(twin.parameters(), **{"lr": 0.05, **case.hyper})
    with pytest.warns(UserWarning, match="has averages of the weights, and this optimizer no ema_decay: they stay"):
        other.load_state_dict(opt.state_dict())
    trained(case, twin, STEADY, optimizer=other)
    assert all_equal([other.state[p]["ema"] for p in twin.parameters()], averages(model, opt))


def test_momentum_changes_its_dtype_with_the_optimizer():
    wide_model, wide = trained(SGD)
    model = copy.deepcopy(wide_model)
    opt = FusedRepSGD(model.parameters(), lr=0.05, **SGD.hyper, **OPTIONS, momentum_dtype=torch.bfloat16)
    opt.load_state_dict(wide.state_dict())
    for p, q in zip(model.parameters(), wide_model.parameters()):
        buffer = opt.state[p]["momentum_buffer"]
        assert torch.equal(buffer, wide.state[q]["momentum_buffer"].to(torch.bfloat16))
    again = FusedRepSGD(wide_model.parameters(), lr=0.05, **SGD.hyper, **OPTIONS)
    again.load_state_dict(saved_and_loaded(opt.state_dict()))
    for p, q in zip(model.parameters(), wide_model.parameters()):
        assert again.state[q]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(again.state[q]["momentum_buffer"], opt.state[p]["momentum_buffer"].float())


def test_a_plain_optimizers_checkpoint_says_nothing_of_it(case):
    _, opt = trained(case, max_grad_norm=None, ema_decay=None)
    assert not {"step_count", "rounding_seed"} & opt.state_dict()["param_groups"][0].keys()
    _, tailed = trained(case)
    assert tailed.state_dict()["param_groups"][0]["step_count"] == STEADY


@pytest.mark.parametrize("make", [lambda t: t.double(), lambda t: t.bfloat16()])
def test_an_average_of_another_dtype_is_loaded_as_one_of_this_optimizer(case, make):
    model, opt = trained(case, dtype=torch.bfloat16)
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry["ema"] = make(entry["ema"])
    opt.load_state_dict(state)
    for n, p in enumerate(model.parameters()):
        assert opt.ema(p).dtype == torch.float32
        assert torch.equal(opt.ema(p), state["state"][n]["ema"].float())


def test_the_count_of_steps_is_that_of_the_checkpoint(case):
    """A checkpoint without a count, of torch's or an earlier version, has the schedule begin anew."""
    asked = []
    model, opt = trained(case, steps=2, ema_decay=lambda step: asked.append(step) or 0.5)
    saved = copy.deepcopy(opt.state_dict())
    trained(case, model, 3, optimizer=opt)
    opt.load_state_dict(copy.deepcopy(saved))
    trained(case, model, 1, optimizer=opt)
    for group in saved["param_groups"]:
        del group["step_count"], group["rounding_seed"]
    opt.load_state_dict(saved)
    trained(case, model, 1, optimizer=opt)
    assert asked == [1, 2, 3, 4, 5, 3, 1]


@pytest.mark.parametrize(("key", "value"), [("step_count", -3), ("rounding_seed", "x"), ("rounding_seed", 2**53)])
def test_a_checkpoint_with_a_count_that_is_none(case, key, value):
    _, opt = trained(case)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(
        ValueError, match=rf"{key} of a group in the checkpoint must be an integer in .*, got {value!r}"
    ):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"][0]["step_count"] == STEADY


@pytest.mark.parametrize("which", ["ema", "state"])
def test_a_checkpoint_of_a_network_of_another_width_is_refused(case, which):
    """Torch takes it in silence, and a step then fails when some weights are updated already."""
    model, opt = trained(case)
    saved = opt.state_dict()
    key = "ema" if which == "ema" else case.states[0]
    entry = saved["state"][1]
    saved = {**saved, "state": {**saved["state"], 1: {**entry, key: torch.cat([entry[key], entry[key]])}}}
    before = {name: value.clone() for name, value in opt.state[next(model.parameters())].items()}
    with pytest.raises(ValueError, match=rf"of parameters of other sizes: parameter .* has shape .*, its {key} \["):
        opt.load_state_dict(saved)
    assert all(torch.equal(value, before[name]) for name, value in opt.state[next(model.parameters())].items())


# ---- momentum in bfloat16


def narrow_run(dtype: torch.dtype = torch.float32, seed: int = 0, steps: int = STEADY + 2):
    model = net(dtype)
    opt = FusedRepSGD(model.parameters(), lr=0.05, **SGD.hyper, momentum_dtype=torch.bfloat16)
    opt.rounding_seed = seed
    return trained(SGD, model, steps, optimizer=opt)


def test_momentum_is_stored_in_half_the_bytes_and_close_to_the_exact_one():
    model, opt = narrow_run()
    wide_model, wide = trained(SGD, steps=STEADY + 2, max_grad_norm=None, ema_decay=None)
    assert opt.momentum_dtype == torch.bfloat16
    for p, q in zip(model.parameters(), wide_model.parameters()):
        buffer, exact = opt.state[p]["momentum_buffer"], wide.state[q]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16
        assert not torch.equal(buffer.float(), exact)
        torch.testing.assert_close(buffer.float(), exact, rtol=2**-5, atol=2**-5)


def test_the_seed_chooses_the_bits_and_nothing_else_does():
    first, again, other = narrow_run()[0], narrow_run()[0], narrow_run(seed=1)[0]
    assert all_equal(values(first), values(again))
    assert not all_equal(values(first), values(other))
    state = torch.random.get_rng_state()
    narrow = FusedRepSGD(first.parameters(), lr=0.05, momentum=0.9, momentum_dtype=torch.bfloat16)
    narrow.step()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_mean_over_seeds_is_the_exact_momentum():
    """One step's rounding: 400 seeds, within 5 standard errors of a uniform draw between neighbours."""
    weight = nn.Parameter(torch.zeros(257))
    grad = torch.randn(257, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(257, dtype=torch.float64)
    for seed in range(400):
        opt = FusedRepSGD([weight], lr=0.0, momentum=0.9, momentum_dtype=torch.bfloat16)
        opt.rounding_seed, weight.grad = seed, grad
        opt.step()
        total += opt.state[weight]["momentum_buffer"].double()
    spacing = torch.exp2(torch.floor(torch.log2(grad.abs().double())) - 7)
    error = (total / 400 - grad.double()).abs() / spacing
    assert float(error.max()) < 5 * 0.5 / 400**0.5
    assert float(error.mean()) > 0.001  # it was rounded


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "rounding_seed must be an integer in"), (2**53, "rounding_seed must be"), (0.5, "rounding_seed must be")],
)
def test_wrong_seeds(value, message):
    opt = FusedRepSGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        opt.rounding_seed = value


def test_complex_momentum_is_not_narrowed():
    weight, other = nn.Parameter(torch.ones(2, dtype=torch.complex64)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"momentum_dtype=torch\.bfloat16 cannot hold a complex momentum"):
        FusedRepSGD([weight], lr=0.1, momentum_dtype=torch.bfloat16)
    opt = FusedRepSGD([other], lr=0.1, momentum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="complex momentum"):
        opt.add_param_group({"params": [("weight", weight)]})
    assert [list(group["params"]) for group in opt.param_groups] == [[other]]
    assert "param_names" not in opt.param_groups[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_of_sparse_gradients_is_not_narrowed(momentum):
    weight = nn.Parameter(torch.ones(3, 2))
    opt = FusedRepSGD([weight], lr=0.5, momentum=momentum, momentum_dtype=torch.bfloat16)
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    if momentum:
        with pytest.raises(ValueError, match=r"momentum_dtype cannot be applied to a gradient of layout torch\.sparse"):
            opt.step()
        assert not opt.state
    else:
        opt.step()
    assert weight.detach().tolist() == [[1, 1], [1, 1] if momentum else [0.5, 0.5], [1, 1]]


def test_a_default_device_has_no_say(case):
    narrow = {"momentum_dtype": torch.bfloat16} if case is SGD else {}
    model, _ = trained(case, **narrow)
    twin, opt = trained(case, steps=0, **narrow)
    for step in range(STEADY):
        set_grads(twin.parameters(), step)
        with torch.device("meta"):
            opt.step()
    assert all_equal(values(model), values(twin))
    opt.zero_grad()
    with torch.device("meta"):
        opt.step()
        assert float(opt.last_grad_norm) == float(opt.clip_grad_norm_(1.0)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"])
def test_other_dtypes_of_momentum_are_refused(dtype):
    with pytest.raises(ValueError, match=r"momentum_dtype must be None or torch\.bfloat16, got"):
        FusedRepSGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum_dtype=dtype)
