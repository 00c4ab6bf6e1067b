"""What branches cost in training: as published, with constant scales, and as the multipliers of one convolution.

    python bench/study_branches.py [FAMILY ...] [--quick] [--seconds 20] [--threads 2] [--results DIR]

Each family of blocks is trained in three forms by SGD with momentum and by AdamW. Published blocks have a norm in every
branch. Explicit CSLA branches have constant scales and one norm behind their sum. Both are trained by torch's fused
optimizers. Ours is the plain network, by FusedRepSGD and FusedRepAdamW. Networks of timm stand there as timm trains
them, too. The trainings of a family take turns in one process (see harness.py), with random images.

Memory is counted and not sampled, so that it is the same in every run: weights, buffers, gradients, the optimizer's
states and factors, and each tensor that autograd keeps from the forward pass for the backward pass. What is given back
before the backward pass, such as the outputs of branches that are added up, does not count. The results are written
anew after each family.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import (
    ROOT,
    Candidate,
    Comparison,
    OtherWork,
    Setup,
    commit,
    compare,
    first_line,
    machine,
    thread_count,
    versions,
)
from report import BUSY, duration, number, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

import gradrep_kernels as gr
from gradrep_kernels.branches.algebra import CentredConv2d, MultiBranch, plain_conv
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.presets import Branches, Layout, layout_of
from gradrep_kernels.branches.sites import conv_sites
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.cores import cores

FORMS = ("published, a norm in every branch", "CSLA branches", "plain, ours")
OWN = "timm's own, whose pointwise blocks may have branches too"
OPTIMIZERS = ("SGD", "AdamW")
CLASSES = 10
TIMM = ("mobileone_s0", "repvgg_a0", "repvit_m1", "fastvit_t8")


# -- the networks


@dataclass(frozen=True)
class Family:
    """Blocks in a network.

    Args:
        plain:    makes the network, and says which branches its convolutions have
        shape:    of a batch  # [N, 3, H, W]
        own:      makes the network as its authors train it, where that is one form more
    """

    plain: Callable[[], tuple[nn.Module, Branches]]
    shape: tuple[int, int, int, int]
    own: Callable[[], nn.Module] | None = None

    def forms(self) -> tuple[dict[str, nn.Module], dict[str, gr.BranchScales]]:
        """The networks by name, and the scales of the last two."""
        model, branches = self.plain()
        search = gr.csla.hyper_search_model(model, branches=branches)
        scales = gr.csla.extract_scales(search)
        explicit = gr.csla.csla_model(model, scales, partial=True)
        published = normed_model(model, branches)
        gr.csla.reinitialize(model, scales, partial=True)
        own = {} if self.own is None else {OWN: self.own()}
        return own | dict(zip(FORMS, (published, explicit, model))), scales


class NormedSum(MultiBranch):
    """Σ norm_b(conv_b(x)) [+ norm(x)] [+ c · x] in place of a convolution and its norm, by the branches of a layout."""

    holds_norm = True

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, layout: Layout):
        super().__init__()
        kernels = [*([layout.one_by_one] if layout.one_by_one else []), *layout.others]
        smaller = (CentredConv2d(conv, kernel.size, kernel.dilation) for kernel in kernels)
        self.branches = nn.ModuleList(
            nn.Sequential(branch, copy.deepcopy(norm)) for branch in (plain_conv(conv, conv.weight), *smaller)
        )
        if layout.identity:
            self.branches.append(copy.deepcopy(norm))
        self.constant = layout.constant_identity

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = sum(branch(x) for branch in self.branches)
        return y + self.constant * x if self.constant else y

    def merged(self) -> nn.Conv2d:
        raise NotImplementedError("it is only timed")


def normed_model(model: nn.Module, branches: Branches) -> nn.Module:
    """The published form of a plain network: a norm in every branch, and none behind their sum."""

    def blocks(model: nn.Module) -> Iterable:
        for site in conv_sites(model):
            layout = layout_of(branches, site.name, site.conv)
            if layout is not None:
                yield site, NormedSum(site.conv, site.norm, layout)

    return with_blocks(model, blocks)


def mobile(side: int, channels: int, blocks: int = 4) -> nn.Sequential:
    """A stem, then depthwise kernels and pointwise convolutions in turns."""
    layers: list[nn.Module] = []

    def add(inputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers.extend([conv, nn.BatchNorm2d(channels), nn.ReLU()])

    add(3, 3, stride=2)
    for _ in range(blocks):
        add(channels, side, groups=channels)
        add(channels, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def vgg(branches: str) -> Callable[[], tuple[nn.Module, Branches]]:
    return lambda: (gr.models.repopt_vgg_small(num_classes=CLASSES), branches)


def depthwise(side: int, preset: str) -> Callable[[], tuple[nn.Module, Branches]]:
    return lambda: (mobile(side, 64), lambda name, conv: preset if conv.groups > 1 else None)


def ghost() -> tuple[nn.Module, Branches]:
    model = gr.models.repopt_ghostnet_0_5x(num_classes=CLASSES)
    return model, lambda name, conv: "repghost" if ".cheap_operation" in name else None


def of_timm(name: str) -> tuple[nn.Module, Branches]:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from timm_branches import plain_form
    finally:
        sys.path.remove(str(ROOT / "examples"))
    model = _timm(name)
    branches = plain_form(model)
    return model, lambda name, conv: branches.get(name)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


@contextlib.contextmanager
def timm_alone() -> Iterator[None]:
    """Let timm be imported where torchvision is missing. Without timm its networks are left out."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    if importlib.util.find_spec("timm") is None:
        yield
        return
    from timm_alone import importable_timm

    with importable_timm():
        yield


FAMILIES = {
    "RepVGG: small RepOpt-VGG": Family(vgg("repvgg"), (32, 3, 32, 32)),
    "ACNet: small RepOpt-VGG": Family(vgg("acb"), (32, 3, 32, 32)),
    "MobileOne: 4 branches, 3 x 3 depthwise": Family(depthwise(3, "mobileone:4"), (16, 3, 64, 64)),
    "RepLKNet: 13 x 13 depthwise": Family(depthwise(13, "replk:5"), (8, 3, 32, 32)),
    "RepLKNet: 31 x 31 depthwise": Family(depthwise(31, "replk:5"), (4, 3, 32, 32)),
    "UniRepLKNet: 13 x 13 depthwise": Family(depthwise(13, "unireplk"), (8, 3, 32, 32)),
    "RepGhost: RepOpt-GhostNet 0.5x": Family(ghost, (16, 3, 96, 96)),
    **{
        f"timm: {name}": Family(lambda name=name: of_timm(name), (8, 3, 96, 96), lambda name=name: _timm(name))
        for name in TIMM
    },
}


# -- a training, and what it holds


class Training:
    """A network with its optimizer and a batch. `run` takes a step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, shape: Sequence[int]):
        self.model, self.optimizer = model.train(), optimizer
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(*shape, generator=generator)
        self.labels = torch.arange(shape[0]) % CLASSES

    def run(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for. Each tensor counts once, by the memory that it holds."""
        self.run()
        tensors = {
            "weights and buffers": [*self.model.parameters(), *self.model.buffers()],
            "gradients": [p.grad for p in self.model.parameters() if p.grad is not None],
            "states": [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)],
            "factors": factors(self.optimizer),
            "kept for the backward pass": self._kept(),
        }
        seen: set[int] = set()
        return {what: sum(_bytes(t, seen) for t in group) for what, group in tensors.items()}

    def _kept(self) -> list[Tensor]:
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cross_entropy(self.model(self.images), self.labels)
        mine = self.images.untyped_storage().data_ptr()  # no part of the training
        return [t for t in kept if t.untyped_storage().data_ptr() != mine]


def factors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer of this package multiplies by, with all that it keeps of it."""
    if not isinstance(optimizer, (gr.FusedRepSGD, gr.FusedRepAdamW)):
        return []
    found = (optimizer.total_factor(p) for group in optimizer.param_groups for p in group["params"])
    return [
        tensor
        for factor in found
        if factor is not None
        for tensor in (*factor.parts(), *getattr(factor, "tensors", dict)().values())
        if tensor is not None
    ]


def _bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def training(
    form: str, model: nn.Module, scales: dict[str, gr.BranchScales], of: str, shape: Sequence[int]
) -> Training:
    model = copy.deepcopy(model)
    decay, hyper = (4e-5, {"lr": 1e-3, "momentum": 0.9}) if of == "SGD" else (0.05, {"lr": 1e-4})
    groups = gr.param_groups(model, decay)
    optimizer: torch.optim.Optimizer
    if form != FORMS[-1]:
        optimizer = (SGD if of == "SGD" else AdamW)(groups, fused=True, **hyper)
    elif of == "SGD":
        optimizer = gr.FusedRepSGD(groups, grad_mults=gr.csla.grad_mults(model, scales, partial=True), **hyper)
    else:
        by_branch = gr.csla.branch_scales(model, scales, partial=True)
        optimizer = gr.FusedRepAdamW(groups, branch_scales=by_branch, **hyper)
    return Training(model, optimizer, shape)


class Rounds:
    """What `compare` takes of pytest-benchmark."""

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}

    def pedantic(self, run: Callable[[], None], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            run()


def measured(name: str, family: Family, setup: Setup, threads: int) -> dict:
    torch.manual_seed(0)
    shape = (2, 3, 32, 32) if setup.quick else family.shape
    models, scales = family.forms()
    trainings = {(form, of): training(form, models[form], scales, of, shape) for form in models for of in OPTIMIZERS}
    memory = {key: own.memory() for key, own in trainings.items()}
    ways = [Candidate(f"{of}: {form}", own.run) for (form, of), own in trainings.items()]
    timed = compare(Rounds(), setup, ways, threads=threads)
    return {
        "family": name,
        "shape": list(shape),
        "blocks": len(scales),
        "forms": {form: _figures(form, model, memory, timed) for form, model in models.items()},
    }


def _figures(form: str, model: nn.Module, memory: dict, timed: Comparison) -> dict:
    ours = FORMS[-1]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **{
            of: {
                "bytes": memory[form, of],
                "seconds": asdict(timed.time(f"{of}: {form}")),
                "times_ours": asdict(timed.ratio(f"{of}: {form}", f"{of}: {ours}")),
            }
            for of in OPTIMIZERS
        },
    }


# -- what is told


def page(found: dict) -> str:
    head = ["network", "form", "parameters in training"]
    head += [f"{what}, {of}" for of in OPTIMIZERS for what in ("memory of a step", "time of a step", "times ours")]
    rows = []
    for row in found["rows"]:
        first, (images, _, height, width) = next(iter(row["forms"])), row["shape"]
        network = f"{row['family']}, {row['blocks']} blocks, {images} images of {height} x {width}"
        for form, figures in row["forms"].items():
            cells = [network if form == first else "", form]
            cells.append(f"{figures['parameters'] / 1e6:.2f} M")
            for of in OPTIMIZERS:
                own, last = figures[of], form == FORMS[-1]
                cells.append(f"{sum(own['bytes'].values()) / 1e6:.1f} MB")
                cells.append(duration(own["seconds"]["median"]))
                cells.append("1 x" if last else f"{number(own['times_ours']['median'])} x")
            rows.append(cells)
    lines = [
        *table(head, rows),
        *(f"- {name}: not measured: {why}" for name, why in found["skipped"].items()),
        *([""] if found["skipped"] else []),
        f"{found['machine']['cpu']}, {thread_count(found['threads'])}, torch {found['versions']['torch']}, "
        f"commit {found['commit']}. `{found['command']}`",
        "",
    ]
    busy = found["machine"].get("cores_busy_with_other_work", 0.0)
    if busy > BUSY:
        lines += [f"**Other work kept {number(busy)} cores busy: times and ratios suffer.**", ""]
    if found["remark"]:
        lines += [f"**{found['remark']}**", ""]
    if found["quick"]:
        lines += ["**Quick form: it shows that the study runs. Its figures mean nothing.**", ""]
    return "\n".join(lines)


def study(names: Sequence[str], setup: Setup, threads: int, remark: str = "") -> dict:
    found: dict = {
        "command": setup.command, "commit": commit(), "versions": versions(), "machine": machine(setup.device),
        "quick": setup.quick, "threads": threads, "remark": remark, "rows": [], "skipped": {},
    }  # fmt: skip
    others = OtherWork()
    setup.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            found["rows"].append(measured(name, FAMILIES[name], setup, threads))
        except ImportError as error:  # timm is optional
            found["skipped"][name] = first_line(error)
        found["machine"]["cores_busy_with_other_work"] = others.cores()
        print(f"{name}: {found['skipped'].get(name, 'measured')}", flush=True)
        files.write_json(setup.folder / "study-branches.json", found)
        files.write_text(setup.folder / "study-branches.md", page(found))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"words of: {'; '.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small images, two rounds: shows that the study runs")
    parser.add_argument("--seconds", type=float, help="for each family, about (default: 20, with --quick 0.05)")
    parser.add_argument("--threads", type=int, default=min(2, cores()), help="default: %(default)s")
    parser.add_argument("--remark", default="", help="a sentence for the page of the results")
    parser.add_argument("--results", type=Path, help="default: bench/results, with --quick runs/bench")
    given = parser.parse_args(argv)
    names = [name for name in FAMILIES if not given.families or any(word in name for word in given.families)]
    if not names:
        parser.error(f"no family has these words: {' '.join(given.families)}")
    folder = given.results or (ROOT / "runs" / "bench" if given.quick else ROOT / "bench" / "results")
    seconds = given.seconds or (0.05 if given.quick else 20.0)
    command = " ".join(["python", "bench/study_branches.py", *(sys.argv[1:] if argv is None else argv)])
    setup = Setup(torch.device("cpu"), given.quick, seconds, folder, command)
    with timm_alone():
        found = study(names, setup, given.threads, given.remark)
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
