"""What users saved and wrote against an earlier commit works with today's code.

tests/data/before holds the files. The commit before the modules moved wrote them, by `write.py` beside them. It pickles
an optimizer after two steps with every form of multiplier, saves models of every kind of block, checkpoints and a
scales file, and records the numbers that they give. `interface.json` lists the public names, the signatures and the
schemas of the ops as they were. A signature that grows on purpose is changed there too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels.moved import MOVED

BEFORE = Path(__file__).parent / "data" / "before"
INTERFACE = json.loads((BEFORE / "interface.json").read_text())
NUMBERS = torch.load(BEFORE / "numbers.pt", weights_only=True)
# One forward in float64 of outputs of size 1; another machine's convolutions sum in another order.
FORWARD_TOLERANCE = 1e-12


def unpickled(name):
    with open(BEFORE / f"{name}.pkl", "rb") as file:
        return pickle.load(file)


def resolve(dotted):
    place, name = gr, dotted.removeprefix("gradrep_kernels.")
    for part in name.split("."):
        place = getattr(place, part)
    return place


# ---- pickles


def test_grad_mults():
    for mult, (scale, identity) in zip(unpickled("grad_mults"), NUMBERS["grad_mults"], strict=True):
        assert type(mult) is gr.GradMult
        assert torch.equal(mult.scale, scale)
        assert (mult.identity is None) == (identity is None)
        assert identity is None or torch.equal(mult.identity, identity)


def test_branch_scales():
    for scales, parts in zip(unpickled("branch_scales"), NUMBERS["branch_scales"], strict=True):
        assert type(scales) is gr.BranchScales
        for now, then in zip((scales.kxk, scales.one_by_one, scales.identity), parts, strict=True):
            assert torch.equal(now, then) if isinstance(then, torch.Tensor) else now is then
        same = gr.BranchScales(*parts)
        assert scales.has_identity == same.has_identity
        assert scales.grad_mult(3).same(same.grad_mult(3), (scales.channels, 1, 3, 3))


# ---- optimizers


def forced_steps(optimizer, params):
    for step in NUMBERS["optimizer"]["grads"]:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()


def assert_ends_as_before(params):
    """Bit for bit: the reference defines every rounding of a step."""
    for now, then in zip(params, NUMBERS["optimizer"]["end"], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_pickled_optimizer_steps_on(backend):
    params, optimizer = unpickled("optimizer")
    assert type(optimizer) is gr.FusedRepSGD
    assert all(torch.equal(p, start) for p, start in zip(params, NUMBERS["optimizer"]["start"], strict=True))
    assert [optimizer.grad_mult(p) is not None for p in params] == [True, True, True, False, False]
    with gr.use_backend(backend):
        forced_steps(optimizer, params)
    assert_ends_as_before(params)
    again = pickle.loads(pickle.dumps((params, optimizer)))
    assert [again[1].grad_mult(p) is not None for p in again[0]] == [True, True, True, False, False]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_checkpoint_of_an_optimizer_steps_on(backend):
    params = [nn.Parameter(start.clone()) for start in NUMBERS["optimizer"]["start"]]
    optimizer = gr.FusedRepSGD([{"params": params[:3]}, {"params": params[3:]}], lr=1.0)
    optimizer.load_state_dict(torch.load(BEFORE / "optimizer_state.pt", weights_only=True))
    for n, g in NUMBERS["optimizer"]["scalings"].items():
        optimizer.set_spatial_scaling(params[n], g)  # no part of a checkpoint
    with gr.use_backend(backend):
        forced_steps(optimizer, params)
    assert_ends_as_before(params)


def test_a_checkpoint_is_written_as_before():
    _, optimizer = unpickled("optimizer")
    then, now = torch.load(BEFORE / "optimizer_state.pt", weights_only=True), optimizer.state_dict()
    assert now.keys() == then.keys()
    assert now["param_groups"] == then["param_groups"]
    assert now["state"].keys() == then["state"].keys()
    for n, state in then["state"].items():
        assert now["state"][n].keys() == state.keys()
        assert torch.equal(now["state"][n]["momentum_buffer"], state["momentum_buffer"])
    assert now["grad_mults"].keys() == then["grad_mults"].keys()
    for n, parts in then["grad_mults"].items():
        assert now["grad_mults"][n].keys() - parts.keys() <= {"name"}  # since parameters are found by their names
        for key, part in parts.items():
            assert now["grad_mults"][n][key] is part or torch.equal(now["grad_mults"][n][key], part)


# ---- models


@pytest.fixture(scope="module")
def models():
    return torch.load(BEFORE / "models.pt", weights_only=False)


@pytest.mark.parametrize("name", NUMBERS["y"])
def test_a_saved_model_computes_what_it_did(models, name):
    x, y = NUMBERS["x"], NUMBERS["y"][name]
    model = models[name]
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=0, atol=FORWARD_TOLERANCE)
        for fold_norm in (False, True):
            merged = gr.csla.merge(model, fold_norm)
            assert not any(
                type(module).__module__.startswith("gradrep_kernels.branches") for module in merged.modules()
            )
            torch.testing.assert_close(merged(x), y, rtol=0, atol=FORWARD_TOLERANCE)


def test_a_saved_model_can_be_saved_again(models, tmp_path):
    torch.save(models, tmp_path / "models.pt")
    for name, model in torch.load(tmp_path / "models.pt", weights_only=False).items():
        with torch.no_grad():
            assert torch.equal(model(NUMBERS["x"]), models[name](NUMBERS["x"]))


def test_a_saved_model_knows_that_it_was_reinitialized(models):
    scales = gr.csla.load_scales(BEFORE / "scales.pth")
    with pytest.raises(ValueError, match=r"stage0\.conv was re-initialised before"):
        gr.csla.reinitialize(models["reinitialized"], scales)


def test_saved_models_give_their_scales(models):
    for name in ("hs", "csla"):
        for site, value in gr.csla.extract_scales(models[name]).items():
            assert value.tensors().keys() == NUMBERS["scales"][site].keys()
    csla = gr.csla.extract_scales(models["csla"])
    for site, then in NUMBERS["scales"].items():
        for branch in ("conv", "1x1"):  # the identity's has trained on
            assert torch.equal(csla[site].tensors()[branch], then[branch])


def test_the_hooks_of_a_saved_model_are_idle(models):
    """A model that is saved under `every_steps` carries hooks, which have no controller after loading."""
    model = models["every_steps"]
    assert all(conv._forward_pre_hooks for conv in model.modules() if getattr(conv, "kernel_size", 0) == (3, 3))
    model.train()(NUMBERS["x"]).sum().backward()
    model.zero_grad()
    model.eval()


# ---- files


def test_a_scales_file():
    loaded = gr.csla.load_scales(BEFORE / "scales.pth")
    assert loaded.keys() == NUMBERS["scales"].keys()
    for name, then in NUMBERS["scales"].items():
        now = loaded[name].tensors()
        assert now.keys() == then.keys()
        assert all(torch.equal(now[branch], then[branch]) for branch in then)


def test_a_state_of_spatial_gradient_scaling(models):
    model = models["every_steps"]
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.01)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    then = torch.load(BEFORE / "sgs_state.pt", weights_only=True)
    sgs.load_state_dict(then)
    assert sgs.scalings.keys() == NUMBERS["scalings"].keys()
    for name, g in NUMBERS["scalings"].items():
        assert not bool((g == 1).all())
        assert torch.equal(sgs.scalings[name], g)
        total = optimizer.grad_mult(model.get_submodule(name).weight, total=True)
        assert torch.equal(total.scale.reshape(3, 3), g)
    now = sgs.state_dict()
    sgs.remove()
    assert now.keys() - then.keys() == {"epoch", "history"}  # since each update is remembered
    assert now["history"]["updates"] == 0
    assert (now["steps"], now["paused"]) == (then["steps"], then["paused"]) == (2, False)
    assert now["ranges"].keys() == then["ranges"].keys()
    for name, parts in then["ranges"].items():
        assert all(torch.equal(a, b) for a, b in zip(now["ranges"][name], parts, strict=True))


# ---- the interface


@pytest.mark.parametrize("module", INTERFACE["names"])
def test_public_names(module):
    """None is gone. There may be more."""
    assert set(INTERFACE["names"][module]) <= set(importlib.import_module(module).__all__)


def parameters(signature: str) -> dict[str, tuple[str, str | None, str | None]]:
    """{name: (kind, annotation, default)} of a signature as `inspect` writes it."""
    arguments = ast.parse(f"def f{signature}: ...").body[0].args
    positional = [("positional only", a) for a in arguments.posonlyargs] + [("any", a) for a in arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    rows = [(kind, a, default) for (kind, a), default in zip(positional, defaults)]
    rows += [("keyword only", a, default) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    rows += [(kind, a, None) for kind, a in (("*", arguments.vararg), ("**", arguments.kwarg)) if a is not None]
    return {
        a.arg: (kind, *(node and ast.unparse(node) for node in (a.annotation, default))) for kind, a, default in rows
    }


WIDER = {  # annotations that take more than then: (function, parameter) -> now
    # A Mapping's keys have one type, so that one of Tensors is not one of Parameters, which `csla.grad_mults` gives.
    ("gradrep_kernels.FusedRepSGD", "grad_mults"): "'GradMults | None'",
    # A mapping and a function of (name, conv, depth) serve too.
    ("gradrep_kernels.csla.hyper_search_model", "init"): "'Init'",
    # A user's own function names its arguments more narrowly than `object`.
    ("gradrep_kernels.SpatialGradientScaling.update", "forward"): "'Callable[..., object] | None'",
}


@pytest.mark.parametrize("name", INTERFACE["signatures"])
def test_signatures(name):
    """Every call of then works and means the same. There may be more parameters, at the end, with defaults."""
    then, now = (parameters(s) for s in (INTERFACE["signatures"][name], str(inspect.signature(resolve(name)))))
    for key, (kind, annotation, default) in then.items():
        then[key] = (kind, WIDER.get((name, key), annotation), default)
    assert {key: now.get(key) for key in then} == then
    added = {key: value for key, value in now.items() if key not in then}
    assert all(kind in ("*", "**") or default is not None for kind, _, default in added.values())
    in_order = [[key for key, (kind, *_) in each.items() if kind != "keyword only"] for each in (then, now)]
    assert in_order[1][: len(in_order[0])] == in_order[0]


@pytest.mark.parametrize("name", INTERFACE["attributes"])
def test_attributes(name):
    assert [a for a in INTERFACE["attributes"][name] if not hasattr(resolve(name), a)] == []


@pytest.mark.parametrize("name", INTERFACE["schemas"])
def test_op_schemas(name):
    """Every call of then works. There may be more arguments, at the end, with defaults."""
    arguments, result = INTERFACE["schemas"][name].rsplit(") -> ", 1)
    now, now_result = str(getattr(torch.ops.gradrep_kernels, name).default._schema).rsplit(") -> ", 1)
    assert now.startswith(arguments)
    assert now_result == result
    added = now[len(arguments) :]
    assert added == "" or added.startswith(", ")
    assert all("=" in argument for argument in added.split(", ")[1:])


# ---- old places


@pytest.mark.parametrize("old", MOVED)
def test_an_old_place_leads_to_the_class(old):
    module, name = old.split(":")
    kind = getattr(importlib.import_module(module), name)
    assert f"{kind.__module__}:{kind.__qualname__}" == MOVED[old]
    with pytest.raises(AttributeError, match=re.escape(f"module {module!r} has no attribute 'missing'")):
        importlib.import_module(module).missing  # noqa: B018


def test_an_empty_module_stands_only_where_none_is():
    """The package must have loaded every old module that still exists before it installs the old places."""
    root = Path(gr.__file__).parent
    for module in {old.split(":")[0] for old in MOVED}:
        path = root.joinpath(*module.split(".")[1:])
        exists = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
        assert exists == (sys.modules[module].__spec__ is not None), module


def test_old_places_load_in_a_fresh_process():
    """Without the imports of this file, and quietly."""
    code = f"""import pickle, torch, gradrep_kernels
torch.load({str(BEFORE / "models.pt")!r}, weights_only=False)
pickle.load(open({str(BEFORE / "branch_scales.pkl")!r}, "rb"))"""
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["fused", "hooks", "every_steps"])
def test_a_pickled_controller_goes_on(name):
    """With the optimizer's own scaling it does as before. Hooks were lost with the pickle then, and are there now."""
    with open(BEFORE / "controllers.pkl", "rb") as file:
        pickled, (before, weights, after) = pickle.load(file)[name]
    model, optimizer, sgs, x = pickle.loads(pickled)
    go_on = runpy.run_path(str(BEFORE / "write_controllers.py"))["go_on"]  # as the writer went on with what it loaded
    found_before, found_weights, found_after = go_on(model, optimizer, sgs, x)
    assert all(torch.equal(found_before[layer], g) for layer, g in before.items())
    assert any(not torch.equal(found_before[layer], found_after[layer]) for layer in before)
    if name == "fused":
        for layer, g in after.items():
            torch.testing.assert_close(found_after[layer], g, rtol=0, atol=1e-6)  # of another processor, perhaps
        for p, expected in zip(found_weights, weights):
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
