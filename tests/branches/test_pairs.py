"""Norms are folded, or taken along by a block, only where they are what consumes a convolution's output."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from cases_csla import FORWARD_TOLERANCE
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gradrep_kernels import csla
from gradrep_kernels.branches.diverse import dbb_model
from gradrep_kernels.branches.normed import acb_model, repvgg_model


class Net(nn.Module):
    """Two convolutions and their norms in the order of `registered`. A subclass says how they are called."""

    registered = ("first", "first_norm", "second", "second_norm")

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        parts = {
            "first": nn.Conv2d(3, 5, 3, padding=1, bias=False),
            "first_norm": nn.BatchNorm2d(5),
            "second": nn.Conv2d(5, 5, 3, padding=1),
            "second_norm": nn.BatchNorm2d(5),
        }
        for name in self.registered:
            self.add_module(name, parts[name])
        for norm in (self.first_norm, self.second_norm):
            for statistic in (norm.running_mean, norm.weight.data, norm.bias.data):
                nn.init.normal_(statistic)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self.double()

    def forward(self, x):
        return self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))


class InPlace(Net):
    def forward(self, x):
        x = self.first_norm(self.first(x)).relu_()
        return {"out": [self.second_norm(self.second(x)), x.sum()]}


class Level(Net):
    """A head that is shared by two levels: both modules are called twice, always one after the other."""

    def forward(self, x):
        return [super(Level, self).forward(level) for level in (x, F.avg_pool2d(x, 2))]


class Reused(Net):
    def forward(self, x):
        return super().forward(x), self.first(x.flip(-1))


class Tapped(Net):
    """The output before the norm is used as well."""

    def forward(self, x):
        raw = self.first(x)
        return self.second_norm(self.second(self.first_norm(raw))) + raw


class NormElsewhere(Net):
    def forward(self, x):
        return self.first_norm(super().forward(x))


class Swapped(Net):
    """Registered as neighbours, called crosswise."""

    registered = ("first", "second_norm", "second", "first_norm")


class Apart(Net):
    registered = ("first", "second", "first_norm", "second_norm")


class WeightElsewhere(Net):
    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.first.weight, padding=1)


class Auxiliary(Net):
    """The second pair is called in training alone."""

    def forward(self, x):
        x = self.first_norm(self.first(x))
        return self.second_norm(self.second(x)) if self.training else x


class Skipping(Net):
    """Another way for an argument that is given than for its default."""

    def forward(self, x, skip=None):
        raw = self.first(x)
        y = self.second_norm(self.second(self.first_norm(raw)))
        return y + raw if skip is None else y + skip


class AsksForATensor(Net):
    def forward(self, x):
        raw = self.first(x)
        y = self.second_norm(self.second(self.first_norm(raw)))
        return y + raw if isinstance(x, torch.Tensor) else y


class Between(Net):
    def forward(self, x):
        return self.second_norm(self.second(self.first_norm(F.relu(self.first(x)))))


class ControlFlow(Net):
    """torch.fx cannot trace it."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class ControlFlowReused(ControlFlow):
    def forward(self, x):
        return super().forward(x), self.first(x)


RIGHT = [Net, InPlace, Level]
WRONG = {
    Reused: "first has another consumer than its norm in one of its 2 calls",
    Tapped: "first has another consumer than its norm",
    NormElsewhere: "the norm after first is called elsewhere too",
    Swapped: "first has another consumer than its norm",
    Apart: "second has another consumer than its norm",
    WeightElsewhere: "first has another consumer than its norm",
    Skipping: "first has another consumer than its norm",
    AsksForATensor: "first has another consumer than its norm",
    Between: "first has another consumer than its norm",
}
SEEN_BY_CALLS = [kind for kind in WRONG if kind is not WeightElsewhere]


def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def flat(outputs) -> torch.Tensor:
    return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(outputs)])


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_folded_gives_the_same_outputs(kind, with_example, no_warnings):
    model = kind().eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    merged = csla.merge(model, fold_norm=True, example=example() if with_example else None)
    assert isinstance(merged.first_norm, nn.Identity)
    assert isinstance(merged.second_norm, nn.Identity)
    with torch.no_grad():
        difference = (flat(model(example())) - flat(merged(example()))).abs().max()
    assert float(difference) < FORWARD_TOLERANCE
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_folded_is_refused_by_the_graph(kind, no_warnings):
    with pytest.raises(ValueError, match=rf"only consumer is the norm after them: {WRONG[kind]}"):
        csla.merge(kind().eval(), fold_norm=True)


@pytest.mark.parametrize("kind", SEEN_BY_CALLS)
def test_what_cannot_be_folded_is_refused_by_the_calls_on_an_example(kind, no_warnings):
    if kind in (Tapped, Skipping, AsksForATensor):
        message = "differ by up to"  # hooks do not see a sum, the outputs do
    else:
        message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        csla.merge(kind().eval(), fold_norm=True, example=example())


@pytest.mark.parametrize("with_example", [False, True])
def test_what_is_not_called_in_eval_mode_is_left(with_example, no_warnings):
    model = Auxiliary().eval()
    merged = csla.merge(model, fold_norm=True, example=example() if with_example else None)
    assert isinstance(merged.first_norm, nn.Identity)
    assert isinstance(merged.second_norm, nn.BatchNorm2d)
    assert float((model(example()) - merged(example())).detach().abs().max()) < FORWARD_TOLERANCE


def test_a_pair_with_hooks_or_a_computed_weight_is_left(no_warnings):
    def doubles(module, inputs, output):
        return output * 2

    for spoil in (
        lambda m: m.first.register_forward_hook(doubles),
        lambda m: m.first_norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
        lambda m: prune.random_unstructured(m.first, "weight", 0.5),
    ):
        model = Net().eval()
        spoil(model)
        with torch.no_grad():
            model(
                example()
            )  # what pruning computes is no leaf, and cannot be copied, before a forward without autograd
        merged = csla.merge(model, fold_norm=True)
        assert isinstance(merged.first_norm, nn.BatchNorm2d)
        assert isinstance(merged.second_norm, nn.Identity)
        assert float((model(example()) - merged(example())).detach().abs().max()) < FORWARD_TOLERANCE


@pytest.mark.filterwarnings("ignore:merge")  # a buffer that is written to cannot be traced
def test_looking_leaves_nothing_in_the_model():
    seen = []

    class Keeps(Net):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.kept = self.act(self.first_norm(self.first(x)))
            self.calls += 1
            return self.second_norm(self.second(self.kept)) * torch.rand(())

    model = Keeps().eval()
    model.act.register_forward_hook(lambda *args: seen.append(args[1]))
    state = torch.get_rng_state()
    for merged in (csla.merge(model, fold_norm=True), csla.merge(model, fold_norm=True, example=example())):
        assert not hasattr(merged, "kept")
        assert float(merged.calls) == float(model.calls) == 0
        copy.deepcopy(merged)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(type(inputs[0]) is torch.Tensor for inputs in seen)


class Output(NamedTuple):
    logits: torch.Tensor


@dataclasses.dataclass
class Data:
    logits: torch.Tensor


AFTER = {  # what a model makes of its output, of whose largest value a wrong fold moves a tenth and more
    "as it is": lambda y: y,
    "small": lambda y: y * 1e-5,
    "softmax": lambda y: y.flatten(1).softmax(1),
    "dict": lambda y: {"logits": y, "count": len(y)},
    "named tuple": Output,
    "dataclass": Data,
    "not a number": lambda y: torch.cat((y, torch.full_like(y, torch.nan))),
    "infinities": lambda y: torch.cat((y, torch.full_like(y, -torch.inf))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", AFTER)
def test_outputs_are_compared_in_every_form_and_dtype(after, dtype, no_warnings):
    class Right(Net):
        def forward(self, x):
            return AFTER[after](super().forward(x))

    class Wrong(Right):
        def forward(self, x):
            return AFTER[after](Net.forward(self, x) + F.conv2d(x, self.first.weight, padding=1))

    x = example().to(dtype)
    csla.merge(Right().to(dtype).eval(), fold_norm=True, example=x)
    with pytest.raises(ValueError, match="gives other outputs on the example: they differ by up to"):
        csla.merge(Wrong().to(dtype).eval(), fold_norm=True, example=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_cannot_be_computed_in_float64_is_compared_as_it_is(dtype, no_warnings):
    class Own(Net):
        def forward(self, x):
            return super().forward(x.to(dtype))

    class Between(Own):
        """Writes into the output before the norm, which hooks do not see."""

        def forward(self, x):
            y = self.first(x.to(dtype)).mul_(1.5).add_(0.5)
            return self.second_norm(self.second(F.relu(self.first_norm(y))))

    csla.merge(Own().to(dtype).eval(), fold_norm=True, example=example().to(dtype))
    with pytest.raises(ValueError, match="gives other outputs on the example"):
        csla.merge(Between().to(dtype).eval(), fold_norm=True, example=example().to(dtype))


@pytest.mark.parametrize("outputs", [lambda y: y.argmax(1), lambda y: y[:0], lambda y: "nothing"])
def test_outputs_that_cannot_be_compared_are_no_proof(outputs):
    class Odd(Net):
        def forward(self, x):
            return outputs(super().forward(x))

    with pytest.raises(ValueError, match="gives no floating-point outputs on it that could be compared"):
        csla.merge(Odd().eval(), fold_norm=True, example=example())


def test_weights_that_are_used_elsewhere_show_in_the_outputs(no_warnings):
    with pytest.raises(ValueError, match="gives other outputs on the example: they differ by up to"):
        csla.merge(WeightElsewhere().eval(), fold_norm=True, example=example())


def test_a_model_that_cannot_be_traced_is_folded_with_a_warning_or_by_an_example(no_warnings):
    model = ControlFlow().eval()
    with pytest.warns(UserWarning, match=r"are registered: first; second\. The model cannot be traced \(TraceError"):
        merged = csla.merge(model, fold_norm=True)
    checked = csla.merge(model, fold_norm=True, example=example())
    with torch.no_grad():
        for m in (merged, checked):
            assert float((model(example()) - m(example())).abs().max()) < FORWARD_TOLERANCE
    with pytest.raises(ValueError, match="first has another consumer than its norm in one of its 2 calls"):
        csla.merge(ControlFlowReused().eval(), fold_norm=True, example=example())


def test_neighbours_in_a_sequential_need_no_graph(no_warnings):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()

        def forward(self, x):
            return self.body(x if x.mean() > -9 else x * 2)

    model = Outer().eval()
    merged = csla.merge(model, fold_norm=True)
    assert float((flat(model(example())) - flat(merged(example()))).detach().abs().max()) < FORWARD_TOLERANCE


@pytest.mark.parametrize("given", [(0,), {"x": 0}, [0]], ids=["tuple", "dict", "list"])
def test_an_example_may_be_arguments(given):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, scale=1.0):
            return self.net(x) * scale

    values = {"x": example()} if isinstance(given, dict) else type(given)([example(), 2.0])
    csla.merge(Two().eval(), fold_norm=True, example=values)


def test_an_example_checks_merged_blocks_too():
    class Odd(Net):
        """Reads a weight that merging changes."""

        def forward(self, x):
            first = self.first if isinstance(self.first, nn.Conv2d) else self.first.conv
            return super().forward(x) + first.weight.sum()

    model = Odd().eval()
    search = csla.hyper_search_model(model, init=0.5).eval()
    with pytest.raises(ValueError, match="gives other outputs on the example"):
        csla.merge(search, example=example())
    plain = csla.hyper_search_model(Net(), init=0.5)  # in train mode, and stays so
    csla.merge(plain, example=example())
    assert plain.training
    assert int(plain.first_norm.num_batches_tracked) == 0


@pytest.mark.parametrize("convert", [repvgg_model, acb_model, dbb_model])
def test_blocks_that_take_their_norm_along_look_too(convert, no_warnings):
    with pytest.raises(ValueError, match=r"takes its norm along needs .* first has another consumer than its norm in"):
        convert(Reused())
    with pytest.raises(ValueError, match="second has another consumer"):
        convert(Apart())
    assert flat(convert(Level())(example())).numel() > 0
    with pytest.warns(UserWarning, match="takes its norm along cannot see whether"):
        convert(ControlFlow())


def test_a_norm_with_a_forward_of_its_own_is_taken_along_by_no_block():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))
    with pytest.raises(ValueError, match="need a BatchNorm2d with running statistics after each conv, got 0: NormAct"):
        repvgg_model(model)
    assert list(csla.extract_scales(csla.hyper_search_model(model))) == ["0"]  # the norm stays where it is
