"""Which parameters an optimizer has: frozen ones, those that join later, their names, and checkpoints of them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from cases_optim import STEADY, Pair, all_equal, assert_close, mults, net, set_grads
from files import through_a_file
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import GradMult

FROZEN = (0, 4)  # positions of the weights that are frozen at first: one with an identity, one of a grouped conv


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def partly_frozen(dtype=torch.float64):
    """A model, its frozen parameters, and the multipliers of all."""
    model = net(dtype)
    params = list(model.parameters())
    for n in FROZEN:
        params[n].requires_grad_(False)
    return model, [params[n] for n in FROZEN], mults(model)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- frozen parameters


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_multipliers_of_frozen_parameters_wait_until_they_join(case, no_warnings, copied):
    """Two steps without them, then steps with them, as the oracle's on M ⊙ g; also after a copy in between."""
    pair = Pair(case)
    model, frozen, found = partly_frozen()
    opt = case.make(gr.param_groups(model, 0.0), lr=0.05, **case.hyper, grad_mults=found)
    held = [p for p in model.parameters() if p.requires_grad]
    if copied is not None:
        model, frozen, opt = copied((model, frozen, opt))
        held = [p for p in model.parameters() if p.requires_grad]
    for group in opt.param_groups:
        group["weight_decay"] = case.hyper["weight_decay"]
    for step in range(STEADY + 4):
        pair.set_grads(step)
        if step == STEADY:
            for p in frozen:
                p.requires_grad_(True)
            opt.add_param_group({"params": frozen, "weight_decay": case.hyper["weight_decay"]})
            held = list(model.parameters())
        late = step < STEADY
        for n, (p, q) in enumerate(zip(pair.ours.parameters(), pair.twin.parameters())):
            if late and n in FROZEN:
                p.grad = q.grad = None
        for p, q in zip(model.parameters(), pair.ours.parameters()):
            p.grad = None if q.grad is None else q.grad.clone()
        assert all(p.grad is None for p in model.parameters() if all(p is not h for h in held))
        opt.step()
        pair.step()
    for p, q in zip(model.parameters(), pair.twin.parameters()):
        assert_close(p, q)


def test_what_is_said_of_frozen_parameters(case):
    model, (frozen, _), found = partly_frozen()
    held = [p for p in model.parameters() if p.requires_grad]
    opt = case.make(held, grad_mults=found)
    assert opt.grad_mult(frozen) is found[frozen]
    opt.set_grad_mult(frozen, None)
    assert opt.grad_mult(frozen) is None
    opt.set_grad_mult(frozen, torch.full((3, 3), 2.0))
    assert len(opt.state_dict()["grad_mults"]) == len([p for p in held if p in found])
    with pytest.raises(ValueError, match=r"^frozen parameter of shape \[6, 3, 3, 3\]: scale \[5\] does not broadcast"):
        opt.set_grad_mult(frozen, torch.ones(5))
    with pytest.raises(ValueError, match="unknown parameter"):
        opt.set_grad_mult(frozen.detach(), torch.ones(3, 3))  # no parameter, so it can never join
    stranger = nn.Parameter(torch.ones(6, 3, 3, 3))
    with pytest.raises(ValueError, match="If it is another model's, make the multipliers from this one"):
        opt.set_grad_mult(stranger, torch.ones(3, 3))
    opt.set_grad_mult(held[0], None)  # a step and a change leave the one that waits alone
    set_grads(held, 0)
    opt.step()
    assert opt.grad_mult(frozen).scale.shape == (3, 3)


def test_a_parameter_that_is_frozen_again_may_leave_and_join_again(case):
    model, (frozen, _), found = partly_frozen()
    opt = case.make([p for p in model.parameters() if p.requires_grad], grad_mults=found)
    frozen.requires_grad_(True)
    opt.add_param_group({"params": [frozen]})
    for _ in range(STEADY):
        set_grads(model.parameters(), 0)
        opt.step()
    group = opt.param_groups.pop()
    with pytest.raises(RuntimeError, match=r"no longer in param_groups: 1, one of shape \[6, 3, 3, 3\]"):
        opt.step()
    frozen.requires_grad_(False)
    opt.step()
    frozen.requires_grad_(True)
    opt.add_param_group({"params": group["params"]})
    opt.step()
    assert opt.grad_mult(frozen) is found[frozen]
    assert opt.param_groups[-1]["grad_mults_fingerprint"] != 0


def test_the_two_helpers_agree_on_a_model_with_frozen_layers(no_warnings):
    def model():
        torch.manual_seed(3)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm2d(4)]
        return nn.Sequential(*layers)

    plain = model()
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(plain, init=0.7))
    plain[2].weight.requires_grad_(False)
    gr.csla.reinitialize(plain, scales)
    opt = gr.FusedRepSGD(gr.param_groups(plain, 1e-4), lr=0.1, grad_mults=gr.csla.grad_mults(plain, scales))
    assert [name for group in opt.param_groups for name in group["param_names"]] == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias"),
    ]
    assert opt.grad_mult(plain[2].weight).dense((4, 4, 5, 5)).max() == pytest.approx(1 + 2 * 0.7**2)


# ---- groups with and without names


@pytest.mark.parametrize("form", [list, tuple, iter], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("names_first", [True, False])
def test_groups_with_and_without_names_mix(case, names_first, form):
    model = net()
    pairs = named(model)
    first, second = pairs[:5], pairs[5:]
    bare = [p for _, p in (second if names_first else first)]
    groups = [first, form(bare)] if names_first else [form(bare), second]
    opt = case.make(groups[0], grad_mults={pairs[0][1]: torch.ones(3, 3)})
    opt.add_param_group({"params": groups[1], "lr": 0.5})
    expected = [name if (n < 5) == names_first else None for n, (name, _) in enumerate(pairs)]
    assert [name for group in opt.param_groups for name in group["param_names"]] == expected
    assert [p for group in opt.param_groups for p in group["params"]] == list(model.parameters())
    with pytest.raises(ValueError, match=rf"^parameter {'5 of shape' if names_first else repr(pairs[5][0])}"):
        opt.set_grad_mult(pairs[5][1], torch.ones(7))
    fresh = case.make([{"params": first if names_first else bare}, {"params": bare if names_first else second}])
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert fresh.grad_mult(pairs[0][1]) is not None


def test_a_refused_group_changes_no_names(case):
    params = list(net().parameters())
    opt = case.make(params[:2])
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        opt.add_param_group({"params": [("again", params[0])]})
    assert "param_names" not in opt.param_groups[0]
    opt.add_param_group({"params": params[2]})
    assert len(opt.param_groups) == 2
    named_opt = case.make([("first", params[0])])
    refused = {"params": [params[0]]}
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        named_opt.add_param_group(refused)
    assert "param_names" not in refused


def test_names_are_those_of_the_model_inside(case):
    model = net()
    plain = [name for group in gr.param_groups(model, 0.1) for name in group["param_names"]]
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert [name for group in gr.param_groups(wrapped, 0.1) for name in group["param_names"]] == plain


# ---- checkpoints find parameters by their names


class Alike(nn.Module):
    """Four weights of one shape, so that a misplaced multiplier fits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        for name in ("stem", "left", "right", "head"):
            setattr(self, name, nn.Conv2d(4, 4, 3, bias=False).double())


NUMBERS = {"left.weight": 2.0, "right.weight": 0.5, "head.weight": 3.0}
ORDER = ("right.weight", "head.weight", "stem.weight", "left.weight")


def alike(case, order=None, multiplied=True, names=True):
    model = Alike()
    own = dict(model.named_parameters())
    params = [(name, own[name]) if names else own[name] for name in order or own]
    opt = case.make(params, lr=0.05, **case.hyper)
    if multiplied:
        for name, number in NUMBERS.items():
            opt.set_grad_mult(own[name], GradMult(torch.full((), number)))
    return model, opt


def steps(model, opt, count, seed):
    for step in range(count):
        for n, (_, p) in enumerate(sorted(model.named_parameters())):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * (seed + step) + n)).double()
        opt.step()


def numbers(model, opt):
    found = {name: opt.grad_mult(p) for name, p in model.named_parameters()}
    return {name: float(mult.scale) for name, mult in found.items() if mult is not None}


def positions(state_dict, own):
    """{number in the checkpoint: number here}, by name."""
    here = {name: n for group in own for name, n in zip(group["param_names"], group["params"])}
    return {
        n: here[name] for group in state_dict["param_groups"] for name, n in zip(group["param_names"], group["params"])
    }


def moves_states(opt, state):
    """Knows nothing of multipliers, as a hook written for any optimizer."""
    own = opt.state_dict()["param_groups"]
    to = positions(state, own)
    return {**state, "param_groups": own, "state": {to[n]: entry for n, entry in state["state"].items()}}


def moves_states_and_multipliers(opt, state):
    to = positions(state, opt.state_dict()["param_groups"])
    return {**moves_states(opt, state), "grad_mults": {to[n]: parts for n, parts in state["grad_mults"].items()}}


def moves_in_place(opt, state):
    new = moves_states(opt, state)
    state["state"] = new["state"]
    state["param_groups"] = new["param_groups"]


def moves_group_entries(opt, state):
    """Leaves states and their numbers alone, and lists the numbers in the order of this optimizer."""
    (group,), (own,) = state["param_groups"], opt.state_dict()["param_groups"]
    number = dict(zip(group["param_names"], group["params"]))
    listed = {**group, "params": [number[name] for name in own["param_names"]], "param_names": own["param_names"]}
    return {**state, "param_groups": [listed]}


def adapts_its_own(opt, state):
    """As torch's documentation has it: the optimizer's own state_dict, filled with the checkpoint's states."""
    adapted = opt.state_dict()
    adapted["param_groups"][0]["grad_mults_fingerprint"] = state["param_groups"][0]["grad_mults_fingerprint"]
    adapted["state"] = moves_states(opt, state)["state"]
    return adapted


HOOKS = [moves_states, moves_states_and_multipliers, moves_in_place, moves_group_entries, adapts_its_own]


@pytest.mark.parametrize("live", [False, True], ids=["none live", "the same live"])
@pytest.mark.parametrize("hook", HOOKS, ids=[hook.__name__ for hook in HOOKS])
def test_a_pre_hook_that_matches_names_moves_multipliers_too(case, no_warnings, hook, live):
    model, opt = alike(case)
    steps(model, opt, STEADY, 0)
    saved = through_a_file(opt.state_dict())
    twin, fresh = alike(case, ORDER, multiplied=live)
    twin.load_state_dict(model.state_dict())
    fresh.register_load_state_dict_pre_hook(hook)
    fresh.load_state_dict(saved)
    assert numbers(twin, fresh) == NUMBERS
    assert fresh.param_groups[0]["param_names"] == list(ORDER)
    steps(model, opt, STEADY, 50)
    steps(twin, fresh, STEADY, 50)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert_close(p, q, 0.0)
    again = alike(case, multiplied=False)
    again[1].register_load_state_dict_pre_hook(moves_states)
    again[1].load_state_dict(through_a_file(fresh.state_dict()))  # the names it was saved with are right
    assert numbers(*again) == NUMBERS


def test_without_hooks_multipliers_are_found_by_name_all_the_same(case):
    saved, (twin, fresh) = alike(case)[1].state_dict(), alike(case, ORDER, multiplied=False)
    fresh.load_state_dict(saved)
    assert numbers(twin, fresh) == NUMBERS


def test_names_that_only_a_wrapper_has_changed_leave_positions(case, no_warnings):
    saved = alike(case)[1].state_dict()
    for parts in saved["grad_mults"].values():
        parts["name"] = f"module.{parts['name']}"
    model, opt = alike(case, multiplied=False)
    opt.load_state_dict(saved)
    assert numbers(model, opt) == NUMBERS


@pytest.mark.parametrize("hook", [None, lambda opt, state: None], ids=["no hook", "a hook that moves nothing"])
@pytest.mark.parametrize("order", [ORDER, ("stem.weight", "right.weight", "left.weight", "new.weight")])
def test_states_that_go_by_position_to_others_are_told(case, order, hook):
    """Multipliers are found by name all the same."""
    model, opt = alike(case)
    steps(model, opt, 2, 0)
    own = {**dict(Alike().named_parameters()), "new.weight": nn.Parameter(torch.ones(4, 4, 3, 3).double())}
    fresh = case.make([(name, own[name]) for name in order], **case.hyper)
    if hook is not None:
        fresh.register_load_state_dict_pre_hook(hook)
    others = r"right\.weight, head\.weight, stem\.weight, left\.weight" if order == ORDER else r"right\.weight, left\.w"
    message = rf"stand in another order\..*so these have those of other parameters: {others}"
    with pytest.warns(UserWarning, match=message) as heard:
        fresh.load_state_dict(through_a_file(opt.state_dict()), strict=False)
    assert heard[0].filename == __file__
    assert fresh.param_groups[0]["param_names"] == list(order)
    found = {name: fresh.grad_mult(own[name]) for name in order}
    assert {name: float(m.scale) for name, m in found.items() if m is not None} == {
        name: number for name, number in NUMBERS.items() if name in order
    }


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_distributed_state_dict_places_states_by_name(case, no_warnings, multiplied):
    """torch places them, leaves the checkpoint's names in the groups, and drops the multipliers."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = alike(case, multiplied=multiplied)
    steps(model, opt, 2, 0)
    twin, fresh = alike(case, ORDER, multiplied=multiplied)
    set_optimizer_state_dict(twin, fresh, get_optimizer_state_dict(model, opt))
    assert numbers(twin, fresh) == (NUMBERS if multiplied else {})
    if multiplied:
        fresh.set_grad_mult(twin.left.weight, torch.full((), 9.0))
        with pytest.raises(ValueError, match="which the checkpoint has lost, and others are set"):
            set_optimizer_state_dict(twin, fresh, get_optimizer_state_dict(model, opt))
    for p, q in zip(model.parameters(), twin.parameters()):
        for key in case.states:
            assert torch.equal(opt.state[p][key], fresh.state[q][key])


def test_states_of_other_names_go_by_position_as_torch_has_it(case, no_warnings):
    model, opt = alike(case, multiplied=False)
    steps(model, opt, 2, 0)
    twin = Alike()
    fresh = case.make([(f"layer{n}", p) for n, p in enumerate(twin.parameters())], **case.hyper)
    fresh.load_state_dict(opt.state_dict())
    for p, q in zip(model.parameters(), twin.parameters()):
        for key in case.states:
            assert torch.equal(opt.state[p][key], fresh.state[q][key])


def test_a_name_that_the_optimizer_does_not_have_takes_no_position(case):
    saved = alike(case)[1].state_dict()
    model = Alike()
    opt = case.make([(f"renamed.{name}", p) for name, p in model.named_parameters()])
    with pytest.raises(ValueError, match=r"'left\.weight' has one, but the optimizer has no parameter of this"):
        opt.load_state_dict(saved)
    with pytest.warns(UserWarning, match="has no parameter of this name"):
        opt.load_state_dict(saved, strict=False)
    assert numbers(model, opt) == {}


def test_a_name_of_several_parameters_is_none(case, no_warnings):
    def pair(multiplied):
        first, second = Alike(), Alike()
        opt = case.make([{"params": list(m.named_parameters())} for m in (first, second)])
        if multiplied:
            opt.set_grad_mult(first.left.weight, GradMult(torch.full((), 2.0)))
        return first, second, opt

    first, second, fresh = pair(False)
    fresh.load_state_dict(pair(True)[2].state_dict())
    assert (numbers(first, fresh), numbers(second, fresh)) == ({"left.weight": 2.0}, {})


def test_an_older_checkpoint_has_its_names_in_its_groups(case, no_warnings):
    saved = alike(case)[1].state_dict()
    for parts in saved["grad_mults"].values():
        del parts["name"]
    twin, fresh = alike(case, ORDER, multiplied=False)
    fresh.load_state_dict(saved)
    assert numbers(twin, fresh) == NUMBERS


def test_a_group_whose_names_are_out_of_step_has_none(case, no_warnings):
    opt = alike(case)[1]
    late = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=torch.float64))
    opt.param_groups[0]["params"].insert(0, late)  # past add_param_group
    opt.set_grad_mult(late, GradMult(torch.full((), 7.0)))
    saved = opt.state_dict()
    assert [set(parts) for parts in saved["grad_mults"].values()] == [case.of_a_grad_mult] * 4
    twin = Alike()
    fresh = case.make([nn.Parameter(late.detach().clone()), *twin.parameters()])
    fresh.load_state_dict(saved)
    assert numbers(twin, fresh) == NUMBERS
    assert saved["param_groups"][0]["grad_mults_fingerprint"] == fresh.param_groups[0]["grad_mults_fingerprint"]


def test_a_parameter_that_is_listed_twice_is_found_in_its_own_checkpoint(case):
    p, q = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = case.make([p, p, q], grad_mults={p: torch.full((), 2.0)})
    opt.load_state_dict(through_a_file(opt.state_dict()))
    assert float(opt.grad_mult(p).scale) == 2.0


def test_a_checkpoint_of_another_size_is_refused_in_torchs_words(case):
    saved = alike(case)[1].state_dict()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        case.make(list(Alike().parameters())[:2]).load_state_dict(saved)


def test_groups_that_were_replaced_are_saved_with_their_own_fingerprint(case):
    model, opt = alike(case)
    opt.param_groups = [{**opt.param_groups[0], "params": [model.left.weight], "param_names": ["left.weight"]}]
    for p in (model.right.weight, model.head.weight):
        p.requires_grad_(False)
    saved = opt.state_dict()
    fresh = case.make([("left.weight", nn.Parameter(model.left.weight.detach().clone()))])
    fresh.load_state_dict(saved)
    assert saved["param_groups"][0]["grad_mults_fingerprint"] == fresh.param_groups[0]["grad_mults_fingerprint"]


def test_a_post_hook_of_the_caller_sees_everything_restored(case):
    opt = alike(case)[1]
    twin, fresh = alike(case, multiplied=False)
    seen = []
    fresh.register_load_state_dict_post_hook(lambda opt: seen.append(numbers(twin, opt)))
    fresh.load_state_dict(opt.state_dict())
    assert seen == [NUMBERS]


def swaps_entries(opt, state):
    """Exchanges the entries of two parameters within the dict of states."""
    state["state"][1], state["state"][2] = state["state"][2], state["state"][1]


def swaps_arrays(opt, state):
    """Exchanges arrays within the entries of two parameters."""
    first, second = state["state"][1], state["state"][2]
    for key in first:
        first[key], second[key] = second[key], first[key]


@pytest.mark.parametrize("hook", [swaps_entries, swaps_arrays])
def test_states_that_a_hook_moved_in_place_are_noticed(case, hook):
    model, opt = alike(case, names=False)
    steps(model, opt, 2, 0)
    fresh = alike(case, multiplied=False, names=False)[1]
    fresh.register_load_state_dict_pre_hook(hook)
    with pytest.raises(ValueError, match="pre-hooks moved the states and not 'grad_mults'"):
        fresh.load_state_dict(through_a_file(opt.state_dict()))


def test_a_hook_that_drops_multipliers_is_told_so(case):
    def drops(opt, state):
        return {key: value for key, value in state.items() if key != "grad_mults"}

    fresh = alike(case, multiplied=False, names=False)[1]
    fresh.register_load_state_dict_pre_hook(drops)
    with pytest.raises(ValueError, match="pre-hooks dropped 'grad_mults', and the optimizer knows no such name"):
        fresh.load_state_dict(alike(case, names=False)[1].state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_states_that_moved_without_names_take_no_multiplier_to_a_stale_position(case, strict):
    def moves(opt, state):
        return {**state, "state": {3 - n: entry for n, entry in state["state"].items()}}

    model, opt = alike(case, names=False)
    steps(model, opt, 2, 0)
    saved = through_a_file(opt.state_dict())
    twin, fresh = alike(case, multiplied=False, names=False)
    fresh.register_load_state_dict_pre_hook(moves)
    message = "parameter 1 has one, but load_state_dict pre-hooks moved the states and not 'grad_mults'"
    if strict:
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(saved)
        assert not fresh.state
    else:
        with pytest.warns(UserWarning, match=message):
            fresh.load_state_dict(saved, strict=False)
    assert numbers(twin, fresh) == {}


def test_a_hook_that_moves_nothing_leaves_positions(case, no_warnings):
    def halves_the_rate(opt, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**copy.deepcopy(state), "param_groups": groups}

    model, opt = alike(case, names=False)
    steps(model, opt, 2, 0)
    twin, fresh = alike(case, multiplied=False, names=False)
    fresh.register_load_state_dict_pre_hook(halves_the_rate)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert numbers(twin, fresh) == NUMBERS
    assert fresh.param_groups[0]["lr"] == 0.025


def test_a_checkpoint_that_names_a_parameter_twice(case):
    opt = alike(case)[1]
    saved = opt.state_dict()
    saved["grad_mults"][0] = {**saved["grad_mults"][1]}
    with pytest.raises(ValueError, match=r"speaks of parameter 'left\.weight' twice"):
        opt.load_state_dict(saved)


# ---- checkpoints of more and of fewer multipliers, and of wider states


def test_a_resumed_optimizer_that_has_some_of_the_multipliers_gets_the_others(case, no_warnings):
    pair, fresh = Pair(case), Pair(case)
    pair.train(STEADY)
    known = list(fresh.mults)[::2]
    for p in list(fresh.mults)[1::2]:
        fresh.opt.set_grad_mult(p, None)
    fresh.ours.load_state_dict(pair.ours.state_dict())
    fresh.opt.load_state_dict(through_a_file(pair.opt.state_dict()))
    for p, q in zip(pair.ours.parameters(), fresh.ours.parameters()):
        a, b = pair.opt.grad_mult(p), fresh.opt.grad_mult(q)
        assert (a is None and b is None) or a.same(b, p.shape)
    assert all(fresh.opt.grad_mult(p) is fresh.mults[p] for p in known)
    pair.train(STEADY, seed=40)
    for step in range(STEADY):
        set_grads(fresh.ours.parameters(), 40 + step)
        fresh.opt.step()
    assert all_equal(pair.weights(), [p.detach() for p in fresh.ours.parameters()])


WIDE = [  # parameter, gradient (their state has the wider dtype of both), whether p.grad_dtype is set before loading
    (torch.bfloat16, torch.float32, True),
    (torch.bfloat16, torch.float32, False),
    (torch.float16, torch.float32, True),
    (torch.float16, torch.float32, False),
    (torch.float32, torch.float64, True),  # not False: a float64 state is told from a float64 run's by p.grad_dtype
    (torch.float32, torch.bfloat16, True),
]
WIDE_IDS = [f"{str(p)[6:]} of {str(g)[6:]}, declared {declared}" for p, g, declared in WIDE]


@pytest.mark.parametrize(("dtype", "grad_dtype", "declared"), WIDE, ids=WIDE_IDS)
def test_a_resumed_run_keeps_states_that_are_wider_than_their_parameters(case, dtype, grad_dtype, declared):
    def start(weight):
        p = nn.Parameter(weight.clone())
        if declared:
            p.grad_dtype = grad_dtype
        return p, case.make([p], lr=0.1, **case.hyper, grad_mults={p: torch.tensor(0.7)})

    def run(p, opt, steps):
        p.grad_dtype = grad_dtype
        for step in steps:
            p.grad = torch.randn(67, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(grad_dtype)
            opt.step()

    p, opt = start(torch.linspace(-1, 1, 67).to(dtype))
    run(p, opt, range(STEADY))
    q, resumed = start(p.detach())
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    for key in case.states:
        assert resumed.state[q][key].dtype == opt.state[p][key].dtype == torch.promote_types(dtype, grad_dtype)
    for each, optimizer in ((p, opt), (q, resumed)):
        run(each, optimizer, range(STEADY, 2 * STEADY))
    assert torch.equal(p, q)


def test_states_of_another_dtype_are_brought_to_the_parameters_otherwise(case):
    """A float64 run that goes on in float32, as torch does it."""
    wide, narrow = Pair(case), Pair(case, dtype=torch.float32)
    wide.train(2)
    narrow.opt.load_state_dict(through_a_file(wide.opt.state_dict()))
    assert all(array.dtype == torch.float32 for array in narrow.arrays())


# ---- a clipping factor is not narrowed before it is used

CLIPPED = [  # value, elements, max_norm: the factor is below float16's smallest number, the product is not
    (100.0, 1, 1e-6),
    (3e4, 40_000, 0.02),
    (-6e4, 257, 1e-4),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "count", "max_norm"), CLIPPED)
def test_small_clipping_factors_of_low_precision_gradients(case, value, count, max_norm, dtype):
    p = nn.Parameter(torch.zeros(count, dtype=dtype))
    p.grad = torch.full((count,), value, dtype=dtype)
    exact = p.grad.double()
    expected = (exact.float() * torch.tensor(max_norm / (float(exact.norm()) + 1e-6))).to(dtype)
    assert float(expected.abs().min()) > 0
    case.make([p]).clip_grad_norm_(max_norm)
    torch.testing.assert_close(p.grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_sparse_low_precision_gradient_is_clipped_and_unscaled_in_float32():
    p = nn.Parameter(torch.zeros(4, 2, dtype=torch.float16))
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.full((2, 2), 3e4, dtype=torch.float16), (4, 2))
    opt = gr.FusedRepSGD([p], lr=1.0, fused=True)
    opt.clip_grad_norm_(1e-3)
    assert float(p.grad.to_dense().double().norm()) == pytest.approx(1e-3, rel=1e-2)
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.full((2, 2), 3e4, dtype=torch.float16), (4, 2))
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**17), torch.tensor(0.0)  # the scale is no float16
    opt.step()
    assert float(p[1, 0].detach()) == pytest.approx(-3e4 / 2**17, rel=1e-3)


# ---- clipping behind a wrapper


class Around(torch.optim.Optimizer):
    """As Accelerate's wrapper: an Optimizer that never ran its constructor, and passes nothing on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_clipping_through_wrappers(case):
    pair = Pair(case)
    pair.set_grads(0)
    before = [p.grad.clone() for p in pair.ours.parameters()]
    norm = gr.clip_grad_norm_(Around(Around(pair.opt)), 0.25)
    clipped = [p.grad.clone() for p in pair.ours.parameters()]
    for p, grad in zip(pair.ours.parameters(), before):
        p.grad = grad
    assert torch.equal(norm, pair.opt.clip_grad_norm_(0.25))
    assert all_equal(clipped, [p.grad for p in pair.ours.parameters()])
    next(pair.ours.parameters()).grad.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        gr.clip_grad_norm_(pair.opt, 1.0, error_if_nonfinite=True)


def test_what_cannot_be_clipped_by_the_norm_of_the_csla_model():
    sgd = torch.optim.SGD(net().parameters())
    with pytest.raises(TypeError, match="must be one with Grad Mult, such as FusedRepSGD, got SGD"):
        gr.clip_grad_norm_(Around(sgd), 1.0)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got list"):
        gr.clip_grad_norm_([sgd], 1.0)
    odd = Around(None)
    odd.base = sgd
    with pytest.raises(TypeError, match="is a Around around another one: pass its attribute 'base'"):
        gr.clip_grad_norm_(odd, 1.0)
