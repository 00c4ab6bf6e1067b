"""AdamW of explicit branches is FusedRepAdamW of one convolution, and the published rule is not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases_branches import BLOCKS, STRANGERS, Block, Stranger, searched, trained
from cases_csla import EQUIVALENCE_TOLERANCE, GEOMETRIES, Geometry, random_scales
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import Branch, BranchScales, csla

named = pytest.mark.parametrize
BY_NAME = {case.name: case for case in BLOCKS}

# With torch's default ε of 1e-8 the update of a weight whose gradient is nothing but rounding (1e-17) is rounding / ε,
# 1e-9 of lr. Networks of these cases have none: convolutions before a batch norm have no bias. Then both columns hold:
# 37 blocks leave 3e-16 to 5e-15 with ε = 1e-3 and up to 2e-14 with 1e-8. See test_a_gradient_of_rounding_alone.
OPTIONS = {
    "epsilon_matters": {"lr": 0.01, "eps": 1e-3},
    "default_epsilon_amsgrad": {"lr": 0.01, "amsgrad": True},
}


def both(plain: nn.Module, branches: Any = None, scales: Any = None, case: Block | None = None):
    """The explicit network and the plain one, re-initialised, from the same random numbers; and the scales."""
    scales = searched(plain, branches) if scales is None else scales
    start = scales
    if case is not None and case.identity == "one":
        scales = {name: BranchScales(v.kxk, v.one_by_one, True, others=v.others) for name, v in scales.items()}
    draw = "conv2d" if case is None else case.draw
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales, one_by_one=draw)
    torch.manual_seed(5)
    csla.reinitialize(plain, start, one_by_one=draw, identity="searched" if case is None else case.identity, force=True)
    return explicit, plain, scales


def adamw(model: nn.Module, decay: float, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(gr.param_groups(model, decay), foreach=False, **options)


def rep_adamw(model: nn.Module, scales: dict[str, BranchScales], decay: float, **options: Any) -> gr.FusedRepAdamW:
    groups = gr.param_groups(model, decay)
    return gr.FusedRepAdamW(groups, branch_scales=csla.branch_scales(model, scales), **options)


def no_clip(_: torch.optim.Optimizer) -> float:
    return 0.0


def difference(explicit: nn.Module, plain: nn.Module) -> float:
    """The largest of all weights and buffers after merging, and of outputs for 16 images."""
    merged = csla.merge(explicit).state_dict()
    x = torch.randn(16, 3, 14, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    largest = max(float((merged[name] - value).abs().max()) for name, value in plain.state_dict().items())
    with torch.no_grad():
        y, z = (copy.deepcopy(model)(x) for model in (explicit, plain))  # a copy's norms count the batch
    return max(largest, float((y - z).abs().max()))


# ---- every block


@named("options", OPTIONS)
@named("case", BLOCKS, ids=lambda case: case.name)
def test_branches_train_as_one_convolution(case: Block, options):
    """Explicit branches under torch.optim.AdamW, then merged, against the plain convolution under FusedRepAdamW."""
    explicit, plain, scales = both(case.plain(), case.branches, case=case)
    start = plain[3].weight.detach().clone()
    negative = torch.cat([t for value in scales.values() for t in value.tensors().values()]) < 0
    assert float(negative.double().mean()) > 0.3 or case.branches == ["kxk", "1x1=1", "identity=1"]
    decay = 0.05 if "weight_decay" in case.sgd else 0.0  # blocks with constant branches are exact without alone
    trained(explicit, adamw(explicit, decay, **OPTIONS[options]), no_clip)
    trained(plain, rep_adamw(plain, scales, decay, **OPTIONS[options]), no_clip)
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE
    assert float((plain[3].weight.detach() - start).abs().max()) > 0.03  # it has trained


def geometry_net(geometry: Geometry) -> nn.Sequential:
    into, out = geometry.channels
    layers = [nn.Conv2d(3, into, 1, bias=False), nn.BatchNorm2d(into), nn.ReLU(), geometry.conv()]
    layers += [nn.GroupNorm(2, out), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * out, 5)]
    return nn.Sequential(*layers).double()


@named("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
def test_geometries(geometry: Geometry):
    plain = geometry_net(geometry)
    explicit, plain, scales = both(plain, scales=random_scales(plain))
    options = {"lr": 0.01, "eps": 1e-4, "betas": (0.8, 0.95)}
    trained(explicit, adamw(explicit, 0.05, **options), no_clip)
    trained(plain, rep_adamw(plain, scales, 0.05, **options), no_clip)
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE


HYPERS = {
    "default": {},
    "short_memory": {"betas": (0.3, 0.6), "eps": 1e-4},
    "no_memory": {"betas": (0.0, 0.9), "eps": 1e-4},
    "large_epsilon": {"eps": 1.0, "lr": 0.5},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9), "eps": 1e-4},
    "maximize": {"maximize": True, "lr": 1e-4, "eps": 1e-4},
    "tensor_lr": {"lr": torch.tensor(0.01, dtype=torch.float64), "eps": 1e-4},
}


@named("hyper", HYPERS)
def test_every_hyper_parameter(hyper):
    case = BY_NAME["mobileone"]
    explicit, plain, scales = both(case.plain(), case.branches)
    options = {"lr": 0.01, **HYPERS[hyper]}
    # torch rounds 1 - lr · wd to float32 where lr is a tensor, so that there both take no weight decay.
    decay = 0.0 if hyper == "tensor_lr" else 0.1
    trained(explicit, adamw(explicit, decay, **options), no_clip)
    trained(plain, rep_adamw(plain, scales, decay, **options), no_clip)
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE


def test_scales_that_are_all_negative():
    case = BY_NAME["list"]
    plain = case.plain()
    scales = {name: value.mapped(lambda t: -t.abs()) for name, value in searched(plain, case.branches).items()}
    explicit, plain, _ = both(plain, scales=scales)
    trained(explicit, adamw(explicit, 0.05, lr=0.01), no_clip)
    trained(plain, rep_adamw(plain, scales, 0.05, lr=0.01), no_clip)
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE


class Norms(list):
    """Collects the norms of explicit branches, which are clipped by them."""

    def of(self, model: nn.Module, max_norm: float):
        def clip(_: torch.optim.Optimizer) -> float:
            self.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=False)))
            return self[-1]

        return clip


@named("way", ["in_the_step", "by_the_method", "plain_norm"])
@named("block", ["clipped", "clipped_dilated", "mobileone", "qarepvgg"])
def test_clipping(block, way):
    """By the norm of the CSLA model. AdamW forgets a constant factor, so that the plain norm is a little off alone."""
    case = BY_NAME[block]
    explicit, plain, scales = both(case.plain(), case.branches)
    decay, options = (0.05 if "weight_decay" in case.sgd else 0.0), {"lr": 0.01, "eps": 1e-3}
    norms = Norms()
    trained(explicit, adamw(explicit, decay, **options), norms.of(explicit, 0.5))
    assert sum(norm > 0.5 for norm in norms) >= 10
    rep = rep_adamw(plain, scales, decay, max_grad_norm=0.5 if way == "in_the_step" else None, **options)
    clips = {
        "in_the_step": no_clip,
        "by_the_method": lambda opt: opt.clip_grad_norm_(0.5),
        "plain_norm": lambda _: nn.utils.clip_grad_norm_(plain.parameters(), 0.5),
    }
    rep_norms = trained(plain, rep, clips[way])
    if way == "plain_norm":
        assert difference(explicit, plain) > 1e-3
        return
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE
    if way == "in_the_step":
        assert float(rep.last_grad_norm) == pytest.approx(norms[-1], rel=1e-10)
    else:
        assert rep_norms == pytest.approx(norms, rel=1e-10)


def test_groups_with_hyper_parameters_of_their_own():
    case = BY_NAME["unireplk_7"]
    explicit, plain, scales = both(case.plain(), case.branches)

    def groups(model):
        head = gr.param_groups(nn.ModuleList(model[4:]), 0.02)
        own = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-2, "amsgrad": True}
        return [*head, *({**group, **own} for group in gr.param_groups(nn.ModuleList(model[:4]), 0.1))]

    theirs = torch.optim.AdamW(groups(explicit), lr=0.005, foreach=False)
    ours = gr.FusedRepAdamW(groups(plain), lr=0.005, branch_scales=csla.branch_scales(plain, scales))
    trained(explicit, theirs, no_clip)
    trained(plain, ours, no_clip)
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE


@named("late", ["in_the_optimizer", "added"])
def test_a_block_that_is_unfrozen_in_mid_run(late):
    """It has a count of its own: its first step is a first step."""
    case = BY_NAME["acb"]
    explicit, plain, scales = both(case.plain(), case.branches)
    options, kinds = {"lr": 0.01, "eps": 1e-4}, (adamw, lambda m, wd, **o: rep_adamw(m, scales, wd, **o))
    for model, make in zip((explicit, plain), kinds):
        block = [*model[3].parameters()]
        if late == "added":
            model[3].requires_grad_(False)
            optimizer = make(model, 0.05, **options)
        else:
            optimizer = make(model, 0.05, **options)
            model[3].requires_grad_(False)
        trained(model, optimizer, no_clip, steps=20)
        assert not any(p in optimizer.state for p in block)
        model[3].requires_grad_(True)
        if late == "added":
            for group in gr.param_groups(model[3], 0.05):
                optimizer.add_param_group(group)
        trained(model, optimizer, no_clip, steps=40)
        assert {float(optimizer.state[p]["step"]) for p in block} == {40.0}
        assert float(optimizer.state[model[0].weight]["step"]) == 60
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE


def test_a_gradient_of_rounding_alone():
    """A bias before a batch norm moves no output. AdamW divides the rounding of its gradient by ε."""

    def differences(eps: float) -> tuple[float, float, float]:
        plain = BY_NAME["acb"].plain()
        plain[4] = nn.BatchNorm2d(8).double()
        explicit, plain, scales = both(plain, "acb")
        trained(explicit, adamw(explicit, 0.05, lr=0.01, eps=eps), no_clip)
        trained(plain, rep_adamw(plain, scales, 0.05, lr=0.01, eps=eps), no_clip)
        assert float(plain[3].bias.grad.abs().max()) < 1e-15 * float(plain[8].weight.grad.abs().max()) * 10
        merged = csla.merge(explicit)
        x = torch.randn(16, 3, 14, 15, dtype=torch.float64)
        bias, weight = ((merged[3], plain[3], part) for part in ("bias", "weight"))
        of = [float((getattr(a, part) - getattr(b, part)).detach().abs().max()) for a, b, part in (bias, weight)]
        return (*of, float((merged(x) - plain(x)).detach().abs().max()))

    bias, weight, outputs = differences(1e-8)
    assert weight <= EQUIVALENCE_TOLERANCE
    assert outputs <= EQUIVALENCE_TOLERANCE
    assert 1e-12 < bias < 1e-7  # 1e-17 / 1e-8 · lr, many times
    assert max(differences(1e-3)) <= EQUIVALENCE_TOLERANCE


# ---- blocks that this package did not write


@named("block", STRANGERS)
def test_a_block_written_elsewhere_trains_as_one_convolution(block):
    preset, k, groups, sizes, rule = STRANGERS[block]
    plain = Block(block, preset, "", k, conv={"padding": k // 2, "groups": groups, "bias": False}).plain()
    scales = searched(plain, preset)
    if block == "qarepvgg":
        scales = {"3": BranchScales(scales["3"].kxk, torch.ones(8), constant_identity=1, constant_average=1)}
    value = scales["3"]
    torch.manual_seed(5)
    drawn = [nn.Conv2d(8, 8, size, groups=groups, bias=False, dtype=torch.float64).weight for size in sizes]
    own = [t for name, t in value.tensors().items() if name != "identity"]
    identity = value.identity if value.has_identity else None
    explicit = copy.deepcopy(plain)
    explicit[3] = Stranger([plain[3].weight, *drawn], own, rule, identity)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    start = plain[3].weight.detach().clone()
    decay = 0.0 if block == "qarepvgg" else 0.05
    decays = [p for p in explicit.parameters() if p.dim() > 1 or p is explicit[3].identity]
    rest = [p for p in explicit.parameters() if not any(p is d for d in decays)]
    split = [{"params": decays, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    options, norms = {"lr": 0.01, "eps": 1e-4, "amsgrad": True}, Norms()
    trained(explicit, torch.optim.AdamW(split, foreach=False, **options), norms.of(explicit, 0.5))
    trained(plain, rep_adamw(plain, scales, decay, max_grad_norm=0.5, **options), no_clip)
    assert sum(norm > 0.5 for norm in norms) >= 10
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(plain[3](x), explicit[3](x), rtol=0, atol=EQUIVALENCE_TOLERANCE)
    for p, q in zip(plain[4:].parameters(), explicit[4:].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=EQUIVALENCE_TOLERANCE)
    assert float((plain[3].weight.detach() - start).abs().max()) > 0.03


@named("rule", ["adamw", "sgd"])
def test_a_linear_layer_of_parallel_branches(rule):
    """α1 ⊙ (W1 x) + α2 ⊙ (W2 x) = W x: branch scales of a weight [O, I], and Σ α² [O, 1] for SGD."""
    first, second = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alphas = [torch.randn(6, dtype=torch.float64) for _ in range(2)]
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def merged():
        return (alphas[0][:, None] * first + alphas[1][:, None] * second).detach()

    linear = nn.Linear(5, 6, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(merged())
        linear.bias.zero_()
    value = BranchScales(kxk=alphas[0], one_by_one=alphas[1])
    branches, weights = [first, second, bias], list(linear.parameters())
    if rule == "adamw":
        theirs = torch.optim.AdamW(branches, lr=0.02, eps=1e-3, weight_decay=0.1, foreach=False)
        ours = gr.FusedRepAdamW(weights, lr=0.02, eps=1e-3, weight_decay=0.1, branch_scales={linear.weight: value})
    else:
        squares = (alphas[0].square() + alphas[1].square())[:, None]
        assert torch.equal(gr.GradMult(value.grad_mult(1).scale.flatten(1)).scale, squares)
        theirs = torch.optim.SGD(branches, lr=0.02, momentum=0.9, weight_decay=0.1, foreach=False)
        mult = {linear.weight: gr.GradMult(squares)}
        ours = gr.FusedRepSGD(weights, lr=0.02, momentum=0.9, weight_decay=0.1, grad_mults=mult)
    data = torch.Generator().manual_seed(2)
    for _ in range(60):
        x = torch.randn(7, 5, dtype=torch.float64, generator=data)
        y = alphas[0] * (x @ first.T) + alphas[1] * (x @ second.T) + bias
        for output, optimizer in ((y, theirs), (linear(x), ours)):
            optimizer.zero_grad()
            (output - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        assert float((output - y).detach().abs().max()) <= EQUIVALENCE_TOLERANCE
    assert float((linear.weight - merged()).detach().abs().max()) <= EQUIVALENCE_TOLERANCE
    with pytest.raises(ValueError, match="an identity branch needs a convolution's weight"):
        gr.FusedRepAdamW(weights, branch_scales={linear.weight: BranchScales(alphas[0], identity=True)})
    with pytest.raises(ValueError, match="reaches 3 x 3 taps, more than the 1 x 1 kernel has"):
        gr.FusedRepAdamW(weights, branch_scales={linear.weight: BranchScales(alphas[0], others=[Branch(alphas[1], 3)])})


# ---- the published rule


class PublishedAdamW(torch.optim.Optimizer):
    """AdamW whose update is multiplied by the signed sum of the scales that reach a tap, once."""

    def __init__(self, groups, sums, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.sums = sums

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = state["m"] / (1 - beta1 ** state["t"])
                update /= (state["v"] / (1 - beta2 ** state["t"])).sqrt() + group["eps"]
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * self.sums.get(p, 1.0) * update)


def signed_sums(conv: nn.Conv2d, value: BranchScales) -> torch.Tensor:
    sums = torch.zeros_like(conv.weight)
    for alpha, mask in value.branches(conv.kernel_size):
        sums += alpha.view(-1, 1, 1, 1) * mask
    if value.has_identity:
        for o in range(conv.out_channels):
            sums[o, o % conv.weight.shape[1], conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
    return sums.detach()


@named("scales_are", ["negative", "some_negative", "positive", "ones"])
def test_the_published_rule(scales_are):
    """It is right where every scale is 1, nearly where scales are positive and ε small, and wrong otherwise."""
    change = {
        "negative": lambda t: -t.abs(),
        "some_negative": lambda t: t,
        "positive": torch.abs,
        "ones": torch.ones_like,
    }[scales_are]
    case = BY_NAME["mobileone"]
    scales = {name: value.mapped(change) for name, value in searched(case.plain(), case.branches).items()}

    def off(eps: float) -> tuple[float, float]:
        torch.manual_seed(0)
        explicit, plain, _ = both(case.plain(), scales=scales)
        published = copy.deepcopy(plain)
        trained(explicit, adamw(explicit, 0.05, lr=0.01, eps=eps), no_clip)
        trained(plain, rep_adamw(plain, scales, 0.05, lr=0.01, eps=eps), no_clip)
        sums = {published[3].weight: signed_sums(published[3], scales["3"])}
        trained(published, PublishedAdamW(gr.param_groups(published, 0.05), sums, 0.01, eps=eps), no_clip)
        return difference(explicit, plain), difference(explicit, published)

    exact, published = off(1e-3)
    assert exact <= EQUIVALENCE_TOLERANCE
    if scales_are == "ones":
        assert published <= EQUIVALENCE_TOLERANCE
    else:
        assert published > 1e-3
    exact, published = off(1e-11)
    assert exact <= EQUIVALENCE_TOLERANCE
    if scales_are in ("positive", "ones"):
        assert published <= 1e-6
    else:
        assert published > 0.1


@named("wrong", ["one_of_two", "dilation", "no_identity", "constant_in_m", "m_for_alpha"])
def test_the_equivalence_is_not_a_matter_of_course(wrong):
    """Each departure that is easily made is far outside of the tolerance."""
    case = {"dilation": "unireplk_7", "constant_in_m": "qarepvgg"}.get(wrong, "list")
    explicit, plain, scales = both(BY_NAME[case].plain(), BY_NAME[case].branches)
    v = scales["3"]
    value = {
        "one_of_two": lambda: BranchScales(v.kxk, v.one_by_one, v.identity, others=v.others[:-1]),
        "dilation": lambda: BranchScales(v.kxk, others=[Branch(b.scale, b.kernel_size) for b in v.others]),
        "no_identity": lambda: BranchScales(v.kxk, v.one_by_one, others=v.others),
        "constant_in_m": lambda: BranchScales(v.kxk, v.one_by_one, True),
        "m_for_alpha": lambda: BranchScales(v.grad_mult(7).scale[:, 0, 0, 0].sqrt(), v.one_by_one, v.identity),
    }[wrong]()
    rep = gr.FusedRepAdamW(gr.param_groups(plain, 0.0), lr=0.01, branch_scales={plain[3].weight: value})
    trained(explicit, adamw(explicit, 0.0, lr=0.01), no_clip, steps=20)
    trained(plain, rep, no_clip, steps=20)
    assert difference(explicit, plain) > 1e6 * EQUIVALENCE_TOLERANCE


@named("decay", [0.0, 0.05])
def test_constant_branches_are_exact_without_weight_decay_alone(decay):
    explicit, plain, scales = both(BY_NAME["repvit"].plain(), BY_NAME["repvit"].branches)
    trained(explicit, adamw(explicit, decay, lr=0.01), no_clip)
    trained(plain, rep_adamw(plain, scales, decay, lr=0.01), no_clip)
    assert (difference(explicit, plain) <= EQUIVALENCE_TOLERANCE) == (decay == 0)


# ---- spatial gradient scaling


def scaled_by(g: torch.Tensor, block: nn.Module):
    """Scale the gradients of explicit branches by G on the taps that each reaches."""
    middle = g[g.shape[0] // 2, g.shape[1] // 2]
    for name, p in block.named_parameters():
        if name.endswith("bias"):
            continue
        kernel = p.shape[2:] if p.dim() == 4 else (1, 1)
        rows, columns = ((side - own) // 2 for side, own in zip(g.shape, kernel))
        p.grad *= g[rows : rows + kernel[0], columns : columns + kernel[1]] if p.dim() == 4 else middle


@named("max_norm", [math.inf, 0.5])
@named("block", ["repvgg", "acb", "mobileone", "replk"])
def test_spatial_scaling_of_branches(block, max_norm):
    """G scales the gradient of every branch, after it has been clipped."""
    case = BY_NAME[block]
    explicit, plain, scales = both(case.plain(), case.branches)
    g = torch.rand(plain[3].kernel_size, dtype=torch.float64) + 0.1
    g = (g / g.mean()).float().double()
    options = {"lr": 0.01, "eps": 1e-3}
    norms = Norms()
    clip = norms.of(explicit, max_norm)

    def clip_then_scale(optimizer):
        norm = clip(optimizer)
        scaled_by(g, explicit[3])
        return norm

    trained(explicit, adamw(explicit, 0.05, **options), clip_then_scale)
    rep = rep_adamw(plain, scales, 0.05, max_grad_norm=None if math.isinf(max_norm) else max_norm, **options)
    rep.set_spatial_scaling(plain[3].weight, g)
    trained(plain, rep, no_clip)
    assert math.isinf(max_norm) or sum(norm > max_norm for norm in norms) >= 10
    assert difference(explicit, plain) <= EQUIVALENCE_TOLERANCE
    torch.manual_seed(0)
    _, without, _ = both(case.plain(), case.branches)
    trained(without, rep_adamw(without, scales, 0.05, max_grad_norm=rep.max_grad_norm, **options), no_clip)
    assert difference(explicit, without) > 1e-3


def test_spatial_scaling_that_is_learned():
    """SpatialGradientScaling sets G of FusedRepAdamW, and scales gradients of torch.optim.AdamW by hooks."""
    x = torch.randn(8, 3, 14, 15, dtype=torch.float64)
    models: list[nn.Module] = [BY_NAME["repvgg"].plain()]
    models.append(copy.deepcopy(models[0]))
    options = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.05}
    optimizers = (
        gr.FusedRepAdamW(models[0].parameters(), **options),
        torch.optim.AdamW(models[1].parameters(), foreach=False, **options),
    )
    learned = []
    for model, optimizer in zip(models, optimizers):
        sgs = gr.SpatialGradientScaling(model, optimizer, batches=1)
        sgs.update([x])
        trained(model, optimizer, no_clip)
        learned.append(sgs.scalings["3"])
    assert torch.equal(*learned)
    assert not torch.equal(learned[0], torch.ones(3, 3))
    for p, q in zip(*(model.parameters() for model in models)):
        assert float((p - q).detach().abs().max()) <= EQUIVALENCE_TOLERANCE
