"""FusedRepSGD inside Accelerate, Lightning and timm.

The first two come with the extra `interop`; timm by `pip install --no-deps timm`, for it would pull torchvision and
with it another torch.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from cases_optim import assert_close, batch, dense, mults, net, oracle_step, set_grads
from timm_alone import importable_timm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradrep_kernels as gr
from gradrep_kernels import FusedRepSGD, GradMult

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
BATCHES = 4
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(autouse=True)
def _as_it_was():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.cat([batch(torch.float64, seed) for seed in range(BATCHES)])), batch_size=4)


def twin_run(epochs: int = 1, gamma: float = 1.0, clip: float | None = None) -> nn.Module:
    """What torch's SGD makes of it on M ⊙ g; `clip` by the norm of the CSLA model."""
    model = net(torch.float64)
    masks = {p: dense(m, p.shape) for p, m in mults(model).items()}
    sgd = torch.optim.SGD(model.parameters(), **OPTIONS, foreach=False)
    for _ in range(epochs):
        for (x,) in loader():
            sgd.zero_grad()
            model(x).square().mean().backward()
            if clip is not None:
                norm = (
                    sum(float((p.grad.square() * masks.get(p, torch.ones(()))).sum()) for p in model.parameters())
                    ** 0.5
                )
                for p in model.parameters():
                    p.grad.mul_(min(1.0, clip / (norm + 1e-6)))
            oracle_step(sgd, masks)
            sgd.param_groups[0]["lr"] *= gamma
    return model


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-13) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(p, q, tolerance)


# ---- Accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install gradrep_kernels[interop]")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(accelerator):
    model = net(torch.float64)
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=mults(model))
    return accelerator.prepare(model, optimizer, loader(), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))


def test_accelerate_trains_saves_and_resumes(accelerator, tmp_path):
    """prepare() sends the state_dict through load_state_dict.

    Multipliers and momentum survive save_state / load_state.
    """
    model, optimizer, batches, scheduler = accelerated(accelerator)
    for (x,) in batches:
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        optimizer.optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        scheduler.step()
    assert_same(accelerator.unwrap_model(model), twin_run(gamma=0.5, clip=0.3))
    accelerator.save_state(str(tmp_path))
    expected = [buffer["momentum_buffer"].clone() for buffer in optimizer.state.values()]
    accelerator.free_memory(model, optimizer, batches, scheduler)
    model, optimizer, _, scheduler = accelerated(accelerator)
    accelerator.load_state(str(tmp_path))
    assert_same(accelerator.unwrap_model(model), twin_run(gamma=0.5, clip=0.3))
    assert all(torch.equal(a, state["momentum_buffer"]) for a, state in zip(expected, optimizer.state.values()))
    assert len(optimizer.optimizer.state_dict()["grad_mults"]) == 5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(OPTIONS["lr"] * 0.5**BATCHES)


def test_accelerate_putting_other_parameters_into_the_groups_is_noticed(accelerator):
    """As it does under FSDP2 (fsdp2_switch_optimizer_parameters): without a word the multipliers would be gone."""
    model = net(torch.float64)
    optimizer = accelerator.prepare(FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=mults(model)))
    moved = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    optimizer._switch_parameters(moved)
    set_grads(moved.values(), 0)
    with pytest.raises(RuntimeError, match="no longer in param_groups: 5"):
        optimizer.step()


def test_accelerates_wrapper_passes_clipping_on_by_the_packages_function(accelerator):
    model, optimizer, batches, _ = accelerated(accelerator)
    for (x,) in batches:
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        gr.clip_grad_norm_(optimizer, 0.3)
        optimizer.step()
    assert_same(accelerator.unwrap_model(model), twin_run(clip=0.3))


# ---- Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install gradrep_kernels[interop]")


def lightning_module(lightning, clip: float | None = None, fused: bool | None = None):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net(torch.float64)
            self.norms = []

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = FusedRepSGD(self.net.parameters(), **OPTIONS, fused=fused, grad_mults=mults(self.net))
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
            ]

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if clip is not None:
                self.norms.append(optimizer.clip_grad_norm_(clip))

    return Module()


def trainer(lightning, tmp_path, epochs: int):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return lightning.Trainer(
        accelerator="cpu", devices=1, precision="64-true", max_epochs=epochs, default_root_dir=tmp_path, **quiet
    )


def test_lightning_trains_clips_and_resumes(lightning, tmp_path):
    """Automatic optimization steps with a closure; resuming goes through load_state_dict."""
    module = lightning_module(lightning, clip=0.3)
    first = trainer(lightning, tmp_path, 1)
    first.fit(module, loader())
    assert len(module.norms) == BATCHES
    assert_same(module.net, twin_run(gamma=0.5, clip=0.3))
    first.save_checkpoint(tmp_path / "one.ckpt")
    module = lightning_module(lightning, clip=0.3)
    trainer(lightning, tmp_path, 2).fit(module, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert_same(module.net, twin_run(2, gamma=0.5, clip=0.3))


def finetuned(lightning, kind: str):
    """A module whose backbone is frozen at first, and the callback that unfreezes it at epoch 1.

    Its optimizer is torch's, ours with the multipliers of what is trained (the callback sets the others), or ours with
    all multipliers and the names of its parameters.
    """
    from lightning.pytorch.callbacks import BaseFinetuning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            layers = list(net(torch.float64))
            self.backbone, self.head = nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])
            torch.manual_seed(4)
            self.multipliers = mults(nn.Sequential(self.backbone, self.head))

        def training_step(self, batch, index):
            return self.head(self.backbone(batch[0])).square().mean()

        def configure_optimizers(self):
            held = [p for p in self.parameters() if p.requires_grad]
            if kind == "torch":
                return torch.optim.SGD(held, **OPTIONS, foreach=False)
            if kind == "named":
                return FusedRepSGD(gr.param_groups(self, 0.01), lr=0.05, momentum=0.9, grad_mults=self.multipliers)
            return FusedRepSGD(
                held, **OPTIONS, grad_mults={p: self.multipliers[p] for p in held if p in self.multipliers}
            )

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.backbone)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.005)
                if kind == "bare":
                    for p in module.backbone.parameters():
                        optimizer.set_grad_mult(p, module.multipliers.get(p))

        def on_fit_start(self, trainer, module):
            super().on_fit_start(trainer, module)
            if trainer.ckpt_path:  # Lightning restores the groups, and leaves the parameters frozen
                self.make_trainable(module.backbone)

    return Module(), Unfreeze()


@pytest.mark.parametrize("kind", ["torch", "bare", "named"])
def test_lightnings_finetuning_resumes_as_it_went_on(lightning, tmp_path, kind):
    def fit(epochs, **resume):
        module, callback = finetuned(lightning, kind)
        run = trainer(lightning, tmp_path, epochs)
        run.callbacks.append(callback)
        run.fit(module, loader(), **resume)
        return module, run

    whole, _ = fit(4)
    _, stopped = fit(2)
    stopped.save_checkpoint(tmp_path / "two.ckpt")
    resumed, run = fit(4, ckpt_path=tmp_path / "two.ckpt")
    assert_same(whole, resumed, 0.0)
    if kind != "torch":
        (optimizer,) = run.optimizers
        assert all((optimizer.grad_mult(p) is None) == (p not in resumed.multipliers) for p in resumed.parameters())
        # frozen at first, the backbone trained by its multipliers afterwards
        start, _ = finetuned(lightning, kind)
        assert not torch.equal(start.backbone[0].weight, resumed.backbone[0].weight)


# ---- Fabric


def test_fabric_wraps_names_steps_and_checkpoints(lightning, tmp_path):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)

    def network():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))

    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(network(), init=0.8))

    def session():
        model = network()
        optimizer = FusedRepSGD(gr.param_groups(model, 0.01), lr=0.05, grad_mults=gr.csla.grad_mults(model, scales))
        return fabric.setup(model, optimizer)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            fabric.backward(model(batch(seed=seed)).square().mean())
            gr.clip_grad_norm_(optimizer, 0.7)
            optimizer.step()

    model, optimizer = session()
    assert list(gr.csla.grad_mults(model, scales)) == [model.module[0].weight, model.module[2].weight]
    assert list(gr.csla.extract_scales(gr.csla.hyper_search_model(model))) == ["0", "2"]
    assert gr.param_groups(model, 0.1)[0]["param_names"] == ["0.weight", "2.weight"]
    steps(model, optimizer, range(4))
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    steps(model, optimizer, range(4, 8))
    other, resumed = session()
    fabric.load(tmp_path / "run.ckpt", {"model": other, "optimizer": resumed})
    steps(other, resumed, range(4, 8))
    assert_same(model, other, 0.0)


def test_lightnings_wrapper_passes_our_methods_on(lightning):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = net(torch.float64)
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS)
    wrapped = LightningOptimizer(optimizer)
    weight = next(model.parameters())
    wrapped.set_grad_mult(weight, GradMult(torch.full((3, 3), 2.0)))
    wrapped.set_spatial_scaling(weight, torch.full((3, 3), 3.0))
    assert float(optimizer.grad_mult(weight, total=True).scale.mean()) == 6.0
    assert wrapped.state_dict().keys() == optimizer.state_dict().keys()


@pytest.mark.parametrize("fused", [None, True])
def test_lightning_clips_under_mixed_precision_unless_fused_was_asked_for(lightning, fused):
    from lightning.pytorch.plugins.precision import MixedPrecision

    model = net()
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS, fused=fused)
    set_grads(model.parameters(), 0)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    if fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            plugin.clip_gradients(optimizer, 1.0)
    else:
        plugin.clip_gradients(optimizer, 1.0)
        assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1.0)


# ---- timm


@pytest.fixture
def timm_optim():
    with importable_timm():
        yield importlib.import_module("timm.optim")


def test_timms_registry_makes_it(timm_optim):
    """By name, with timm's groups: biases without weight decay, learning rates that fall from layer to layer."""
    from timm.optim._optim_factory import default_registry

    default_registry.register(
        timm_optim.OptimInfo(
            name="fusedrepsgd", opt_class=FusedRepSGD, has_momentum=True, has_eps=False, defaults={"nesterov": True}
        )
    )
    model, twin = net(torch.float64), net(torch.float64)
    optimizer = timm_optim.create_optimizer_v2(model, "fusedrepsgd", lr=0.05, weight_decay=0.01, momentum=0.9)
    sgd = timm_optim.create_optimizer_v2(twin, "sgd", lr=0.05, weight_decay=0.01, momentum=0.9, foreach=False)
    assert isinstance(optimizer, FusedRepSGD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert optimizer.param_groups[0]["nesterov"]
    found = mults(model)
    for p, mult in found.items():
        optimizer.set_grad_mult(p, mult)
    masks = {q: dense(found[p], p.shape) for p, q in zip(model.parameters(), twin.parameters()) if p in found}
    for (x,) in loader():
        for network, step in ((model, optimizer.step), (twin, lambda: oracle_step(sgd, masks))):
            network.zero_grad()
            network(x).square().mean().backward()
            step()
    assert_same(model, twin)
