"""Writes the files of this folder. It is kept to show how they came about.

It was run once, with a checkout of the commit that README.md names: PYTHONPATH=CHECKOUT python write.py FOLDER
"""

import copy
import inspect
import json
import pickle
import sys
from pathlib import Path

import torch
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels.models.repopt_vgg import RepOptVGG

FOLDER = Path(sys.argv[1])
CLASSES = (gr.FusedRepSGD, gr.GradMult, gr.BranchScales, gr.SpatialGradientScaling)
FUNCTIONS = (
    gr.alpha_beta_scaling, gr.joint_histogram, gr.normalized_mutual_information, gr.pair_ranges, gr.param_groups,
    gr.spatial_gradient_scaling, gr.use_backend,
)  # fmt: skip
OPS = (
    "rep_sgd_step", "rep_grad_norm", "pair_ranges", "joint_histogram", "joint_histogram_",
    "rep_sgd_plan", "rep_sgd_plan_step", "rep_sgd_plan_free",
)  # fmt: skip


def network(se=False):
    """Two convolutions of 3 x 3, the second with a shortcut."""
    return RepOptVGG((1,), (4,), (1, 1), 5, se=se).double()


def unpadded():
    """Branches beside an unpadded convolution crop their input."""
    return nn.Sequential(nn.Conv2d(3, 4, (5, 3), bias=True), nn.BatchNorm2d(4), nn.ReLU()).double()


def vector(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def trained(model, x):
    """`model` after norms have met some images, in eval mode."""
    for _ in range(3):
        model.train()(x + 0.1 * torch.randn_like(x))
    return model.eval()


def signatures():
    public = {f"gradrep_kernels.{f.__name__}": f for f in FUNCTIONS}
    public.update(
        {f"gradrep_kernels.csla.{name}": getattr(gr.csla, name) for name in gr.csla.__all__ if name != "Scales"}
    )
    public.update({f"gradrep_kernels.models.{name}": getattr(gr.models, name) for name in gr.models.__all__})
    for kind in CLASSES:
        public[f"gradrep_kernels.{kind.__name__}"] = kind
        for name in vars(kind):
            if not name.startswith("_") and name != "profile_hook_step" and callable(getattr(kind, name)):
                public[f"gradrep_kernels.{kind.__name__}.{name}"] = getattr(kind, name)
    return {name: str(inspect.signature(what)) for name, what in public.items()}


def attributes():
    return {
        kind.__name__: sorted(
            n for n, v in vars(kind).items() if not n.startswith("_") and not callable(getattr(kind, n))
        )
        for kind in CLASSES
    }


def interface():
    return {
        "names": {m.__name__: sorted(m.__all__) for m in (gr, gr.csla, gr.models)},
        "attributes": attributes(),
        "signatures": signatures(),
        "schemas": {name: str(getattr(torch.ops.gradrep_kernels, name).default._schema) for name in OPS},
    }


def forced_steps(optimizer, params, grads):
    for step in grads:
        for p, grad in zip(params, step):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def optimizer_files(numbers):
    """Every form of multiplier: a CSLA block's, a dense one, one beside a G, a G alone, and none."""
    shapes = [(2, 2, 3, 3), (2, 3, 3, 3), (3, 2, 3, 3), (2, 1, 5, 5), (4,)]
    params = [nn.Parameter(vector(*shape, dtype=torch.float32)) for shape in shapes]
    names = ["shortcut", "dense", "both", "spatial", "bias"]
    mults = {
        params[0]: gr.BranchScales(vector(2), vector(2), True).grad_mult(3),
        params[1]: gr.GradMult(torch.rand(2, 3, 3, 3)),
        params[2]: gr.GradMult(torch.rand(3, 1, 3, 3)),
    }
    groups = [
        {"params": params[:3], "param_names": names[:3], "weight_decay": 0.01},
        {"params": params[3:], "param_names": names[3:]},
    ]
    optimizer = gr.FusedRepSGD(groups, lr=0.05, momentum=0.9, nesterov=True, grad_mults=mults)
    scalings = {2: torch.rand(3, 3), 3: torch.rand(5, 5)}
    for n, g in scalings.items():
        optimizer.set_spatial_scaling(params[n], g)
    grads = [[vector(*shape, dtype=torch.float32) for shape in shapes] for _ in range(5)]
    forced_steps(optimizer, params, grads[:2])
    for p in params:
        p.grad = None
    saved = [p.detach().clone() for p in params]
    torch.save(optimizer.state_dict(), FOLDER / "optimizer_state.pt")
    with open(FOLDER / "optimizer.pkl", "wb") as file:
        pickle.dump((params, optimizer), file)
    numbers["optimizer"] = {
        "start": saved,
        "scalings": scalings,
        "grads": grads[2:],
        "end": forced_steps(optimizer, params, grads[2:]),
    }


def model_files(numbers):
    x = vector(2, 3, 8, 8)
    plain = network()
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(plain))
    scales = {
        name: gr.BranchScales(vector(4), vector(4), vector(4) if s.has_identity else False)
        for name, s in scales.items()
    }
    gr.csla.save_scales(scales, FOLDER / "scales.pth")
    numbers["scales"] = {name: value.tensors() for name, value in scales.items()}
    reinitialized = copy.deepcopy(plain)
    gr.csla.reinitialize(reinitialized, scales)
    models = {
        "hs": trained(gr.csla.hyper_search_model(plain), x),
        "csla": trained(gr.csla.csla_model(plain, scales), x),
        "repvgg": trained(gr.models.repvgg_model(plain), x),
        "acb": trained(gr.models.acb_model(unpadded()), x),
        "reinitialized": reinitialized.eval(),
        "every_steps": network(se=True),
    }
    optimizer = gr.FusedRepSGD(models["every_steps"].parameters(), lr=0.01, momentum=0.9)
    sgs = gr.SpatialGradientScaling(models["every_steps"], optimizer, every_steps=1)
    for _ in range(2):
        models["every_steps"].train()(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(sgs.state_dict(), FOLDER / "sgs_state.pt")
    numbers["scalings"] = sgs.scalings
    numbers["x"], numbers["y"] = x, {}
    for name, model in models.items():
        with torch.no_grad():
            numbers["y"][name] = model.eval()(x)
    torch.save(models, FOLDER / "models.pt")


def pickles(numbers):
    mults = [gr.GradMult(torch.rand(4, 1, 3, 3), torch.rand(4)), gr.GradMult(torch.rand(1, 1, 5, 5).double())]
    scales = [
        gr.BranchScales(vector(4), vector(4), vector(4)),
        gr.BranchScales(vector(3, dtype=torch.float32), None, True),
    ]
    for name, values in (("grad_mults", mults), ("branch_scales", scales)):
        with open(FOLDER / f"{name}.pkl", "wb") as file:
            pickle.dump(values, file)
    numbers["grad_mults"] = [m.parts() for m in mults]
    numbers["branch_scales"] = [(s.kxk, s.one_by_one, s.identity) for s in scales]


torch.manual_seed(0)
numbers: dict = {}
pickles(numbers)
optimizer_files(numbers)
model_files(numbers)
torch.save(numbers, FOLDER / "numbers.pt", _use_new_zipfile_serialization=False)  # 20 kB less
(FOLDER / "interface.json").write_text(json.dumps(interface(), indent=1, ensure_ascii=False) + "\n")
