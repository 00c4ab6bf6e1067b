"""`gr.csla.check_equivalence`: it sees that CSLA = GR holds, and that a broken rule breaks it, on anybody's model."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import equivalence
from gradrep_kernels.csla import Equivalence, check_equivalence


class Net(nn.Module):
    """A strided, a shortcut and a grouped convolution, dropout, and a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Conv2d(8, 8, 5, padding=2, groups=4), nn.GroupNorm(2, 8)),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def images(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(n)]


def labelled(n=3):
    return [(x, torch.arange(4) % 5) for x in images(n)]


def random_scales(model):
    generator = torch.Generator().manual_seed(1)

    def drawn(t):
        return torch.randn(t.shape, generator=generator) + 0.1

    return {
        name: gr.BranchScales(drawn(v.kxk), drawn(v.one_by_one), v.has_identity and drawn(v.kxk))
        for name, v in gr.csla.extract_scales(gr.csla.hyper_search_model(model)).items()
    }


def test_it_holds_for_any_scales_and_hyper_parameters():
    model = Net()
    found = check_equivalence(
        model,
        random_scales(model),
        labelled(),
        loss=lambda y, batch: F.cross_entropy(y, batch[1]),
        steps=20,
        lr=0.1,
        momentum=0.8,
        weight_decay=0.01,
    )
    assert found
    assert found.agrees
    assert found.steps == 20
    assert 0 < max(found.outputs, found.weights) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "betas": (0.5, 0.9)}, {"amsgrad": True, "lr": 0.003}])
def test_it_holds_for_adamw(options):
    model = Net()
    loss = {"loss": lambda y, batch: F.cross_entropy(y, batch[1]), "weight_decay": 0.1, "optimizer": "adamw"}
    found = check_equivalence(model, random_scales(model), labelled(), steps=40, **loss, **options)
    assert found.steps == 40
    assert 0 < max(found.outputs, found.weights) <= 1e-12
    assert str(found).startswith("CSLA = GR in float64 over 40 steps: outputs differ by at most ")
    assert check_equivalence(model, None, images(), optimizer="adamw").agrees


def test_options_of_adamw_are_taken(monkeypatch):
    """Both optimizers get the same, and SGD's momentum goes to neither."""
    made = []
    for owner, name in ((torch.optim, "AdamW"), (equivalence, "FusedRepAdamW")):
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, right=right, **k: made.append(right(*a, **k)) or made[-1])
    options = {"lr": 0.003, "betas": (0.5, 0.9), "eps": 1e-2, "amsgrad": True}
    check_equivalence(Net(), None, images(), optimizer="adamw", momentum=0.5, weight_decay=0.2, steps=1, **options)
    assert len(made) == 2
    for optimizer in made:
        groups = optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
        assert all({key: group[key] for key in options} == options for group in groups)


def test_a_bias_before_a_batch_norm_needs_an_epsilon():
    """Its gradient is rounding alone. With torch's default ε AdamW makes more of it than the tolerance."""
    model, options = Net(), {"optimizer": "adamw", "steps": 60}
    assert check_equivalence(model, None, images(), **options).weights < 1e-12
    found = check_equivalence(model, None, images(), eps=1e-10, **options)
    assert found.outputs < 1e-12
    assert found.weights > 1e-10


def test_without_scales_and_labels_it_makes_them_up():
    found = check_equivalence(Net(), None, images())
    assert found.agrees
    assert found.steps == 10
    assert check_equivalence(Net(), None, images()).agrees
    first, second = (check_equivalence(copy.deepcopy(m), None, images(), steps=3) for m in [Net()] * 2)
    assert first == second


@pytest.mark.parametrize("broken", ["grad_mults", "branch_scales", "reinitialize", "dropout"])
def test_it_sees_a_broken_rule(monkeypatch, broken):
    right = getattr(equivalence, broken, None)
    if broken == "grad_mults":
        monkeypatch.setattr(
            equivalence, broken, lambda *a, **k: {p: gr.GradMult(m.scale) for p, m in right(*a, **k).items()}
        )
    elif broken == "branch_scales":
        monkeypatch.setattr(
            equivalence, broken, lambda *a, **k: {p: gr.BranchScales(v.kxk) for p, v in right(*a, **k).items()}
        )
    elif broken == "reinitialize":
        monkeypatch.setattr(equivalence, broken, lambda *a, **k: right(*a, identity="one", **k))
    else:
        monkeypatch.setattr(equivalence, "random_states", lambda gpus: [])
    model = Net().eval() if broken != "dropout" else Net()
    if broken == "dropout":  # the twins of the look before the training differ already
        with pytest.raises(ValueError, match="two copies of the model differ"):
            check_equivalence(model, random_scales(model), images())
    else:
        optimizer = "adamw" if broken == "branch_scales" else "sgd"
        found = check_equivalence(model, random_scales(model), images(), optimizer=optimizer)
        assert not found
        assert max(found.outputs, found.weights) > 1e-6


def test_everything_of_the_caller_stays():
    model = Net()
    model.body[1].eval()
    model.head.weight.grad = torch.ones(5, 8)
    before = copy.deepcopy(model.state_dict())
    data = torch.utils.data.TensorDataset(torch.randn(12, 3, 12, 12), torch.arange(12) % 5)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), loader.generator.get_state()
    check_equivalence(model, None, loader, steps=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert check_equivalence(model, None, loader, steps=2).agrees
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError):
        check_equivalence(model, None, loader, loss=lambda y, batch: 1 / 0)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), loader.generator.get_state()
    for a, b in zip(states, after):
        assert a == b if isinstance(a, tuple) else bool((a == b).all())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones(5, 8))
    assert [m.training for m in model.modules()].count(False) == 1
    assert model.head.weight.dtype == torch.float32
    gr.csla.reinitialize(model, random_scales(model))  # no mark was left


@dataclass
class Output:
    logits: Tensor
    maps: list[Tensor]


class Wrapped(Net):
    def forward(self, pixels: Tensor, factor: Tensor) -> Output:
        maps = self.body(pixels * factor)
        return Output(self.head(maps.mean((2, 3))), [maps])


def test_batches_and_outputs_of_other_kinds():
    dicts = [{"pixels": x, "factor": torch.tensor(2.0)} for x in images()]
    assert check_equivalence(Wrapped(), None, dicts, steps=3).agrees
    whole = [(x, torch.tensor(2.0), torch.arange(4)) for x in images()]
    found = check_equivalence(
        Wrapped(),
        None,
        whole,
        steps=3,
        forward=lambda model, batch: model(batch[0], factor=batch[1]),
        loss=lambda y, batch: F.cross_entropy(y.logits, batch[2]) + y.maps[0].square().mean(),
    )
    assert found.agrees


def test_it_ends_with_batches_that_cannot_be_begun_again():
    assert check_equivalence(Net(), None, iter(images(2)), steps=7).steps == 2
    assert check_equivalence(Net(), None, images(2), steps=7).steps == 7


def test_a_trained_or_a_re_initialised_model_is_taken():
    model = Net()
    scales = random_scales(model)
    gr.csla.reinitialize(model, scales)
    model(images()[0])
    assert check_equivalence(model, scales, images(), steps=3).agrees


def test_partial_scales():
    model = Net()
    scales = random_scales(model)
    del scales["body.0"]
    with pytest.raises(ValueError, match=r"body\.0: missing"):
        check_equivalence(model, scales, images())
    assert check_equivalence(model, scales, images(), partial=True, steps=3).agrees


def test_the_result_is_one_readable_line():
    good, bad = Equivalence(100, 2.3e-13, 5.1e-13), Equivalence(1, float("inf"), 0.0)
    assert str(good) == repr(good)
    assert str(good) == (
        "CSLA = GR in float64 over 100 steps: outputs differ by at most 2.3e-13, weights by 5.1e-13 (within 1e-10)"
    )
    assert "over 1 step:" in str(bad)
    assert "(NOT within 1e-10)" in str(bad)
    assert not bad


# ---- wrong input


class Stateful(Net):
    calls = 0  # of the class, which copies share

    def forward(self, x):
        Stateful.calls += 1
        return super().forward(x) + Stateful.calls


class Casting(Net):
    def forward(self, x):
        return super().forward(x).float()


class Halfway(Net):
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)).float())


class Locked(Net):
    def __deepcopy__(self, memo):
        raise RuntimeError("not this one")


class Counting(Net):
    def forward(self, x):
        return super().forward(x).argmax(1)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "message"),
    [
        (Stateful, images(), {}, ValueError, "keeps state outside of itself"),
        (Casting, images(), {}, TypeError, r"does not run in float64: its forward casts, and gives torch\.float32"),
        (Halfway, images(), {}, TypeError, "does not run in float64, for its forward makes or casts"),
        (Locked, images(), {}, ValueError, "cannot be copied.*RuntimeError: not this one"),
        (Counting, images(), {}, ValueError, "no floating-point output to compare, but Tensor"),
        (Frozen, images(), {}, ValueError, "no parameter that trains"),
        (Net, [], {}, ValueError, "batches is empty"),
        (Net, ["x"], {}, TypeError, "a batch must be a Tensor.*got str"),
        (Net, images(), {"optimizer": "adam"}, ValueError, "optimizer must be 'sgd' or 'adamw', got 'adam'"),
        (Net, images(), {"steps": 0}, ValueError, "steps must be an int, 1 or more, got 0"),
        (Net, images(), {"loss": lambda y, batch: y}, ValueError, "loss must return a Tensor of one element"),
        (Net, images(), {"loss": lambda y, batch: y.sum() * 0}, ValueError, "no converted convolution has a gradient"),
        (Net, images(), {"lr": 1e200}, FloatingPointError, "not finite at step 2; an lr below 1e"),
        (lambda: Net().to("meta"), images(), {}, ValueError, "model is on meta"),
        (lambda: nn.Linear(3, 3), images(), {}, ValueError, "no odd k x k"),
        (lambda: gr.csla.hyper_search_model(Net()), images(), {}, ValueError, "multi-branch blocks already"),
        (lambda: "net", images(), {}, TypeError, "model must be an nn.Module"),
    ],
)
def test_it_refuses(model, batches, options, error, message):
    with pytest.raises(error, match=message):
        check_equivalence(model(), None, batches, **options)


def test_scales_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="scales must map names to BranchScales, got Tensor"):
        check_equivalence(Net(), {"body.0": torch.ones(8)}, images())


def test_constant_branches_that_decay_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(model, branches="qarepvgg"))
    batches = [torch.randn(8, 4, 6, 6)]
    found = gr.csla.check_equivalence(model, scales, batches, weight_decay=0.1)
    assert "NOT within" in str(found)
    assert "weight_decay=0 compares what is exact" in str(found)
    exact = gr.csla.check_equivalence(model, scales, batches, weight_decay=0.0)
    assert exact
    assert "weight_decay" not in str(exact)
