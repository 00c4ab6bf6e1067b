"""The callbacks in a Trainer do what the same lines do in a loop of one's own, and resume to the bit."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision_alone
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradrep_kernels as gr

FRAMEWORKS = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Framework:
    def __init__(self, name):
        self.pl = pytest.importorskip(FRAMEWORKS[name], reason="needs lightning: pip install gradrep_kernels[interop]")
        callbacks = importlib.import_module(f"gradrep_kernels.integrations.{name}")
        self.Updates, self.Clip = callbacks.SpatialGradientScalingCallback, callbacks.ClipGradNorm
        self.Averages = callbacks.ValidateAverages

    def module(self, network, make, **methods):
        class Module(self.pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = network
                self.seen = []

            def forward(self, x):
                return self.net(x)

            def training_step(self, batch, index):
                self.seen.append(float(batch[0].flatten()[0]))
                return self.net(batch[0]).square().mean()

            def configure_optimizers(self):
                optimizer = make(self.net)
                if isinstance(optimizer, list):
                    return optimizer
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
                return {"optimizer": optimizer, "lr_scheduler": schedule}

        for name, method in methods.items():
            setattr(Module, name, method)
        return Module()

    def trainer(self, folder, callbacks, **options):
        off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        options = {**dict.fromkeys(off, False), "max_epochs": 3, "precision": "64-true", **options}
        return self.pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, callbacks=callbacks, **options)


@pytest.fixture
def lightning():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield Framework("lightning")
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)


def network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
    return nn.Sequential(*layers).to(dtype)


def data(dtype=torch.float64):
    maps = torch.randn(24, 2, 11, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return TensorDataset(F.avg_pool2d(maps, 3, 1).to(dtype))


def loader(**options):
    return DataLoader(data(), batch_size=4, **options)


def multipliers(model):
    return {p: torch.linspace(0.2, 3, p[0].numel(), dtype=p.dtype).view(p[0].shape) for p in model.parameters()}


def fused(model):
    mults = {p: m for p, m in multipliers(model).items() if p.dim() == 4}
    return gr.FusedRepSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, grad_mults=mults)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def own_loop(make, epochs=3, accumulate=1, clip=None, **options):
    model = network()
    optimizer = make(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, **options)
    for epoch in range(epochs):
        sgs.update_if_due(epoch, loader())
        for i, (x,) in enumerate(loader()):
            is_last = (i + 1) % accumulate == 0

            def closure(x=x, is_last=is_last):  # as Lightning does
                loss = model(x).square().mean() / accumulate
                loss.backward()
                if clip is not None and is_last:
                    optimizer.clip_grad_norm_(clip)
                return loss

            if is_last:
                optimizer.step(closure)
                optimizer.zero_grad()
            else:
                closure()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    return model, sgs


def assert_same(a, b):
    """Tensors by name, in a LightningModule's `net` or without it."""
    a, b = ({name.removeprefix("net."): value for name, value in each.items()} for each in (a, b))
    assert a.keys() == b.keys()
    assert a
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize(
    "options", [{"every": 2}, {"every_steps": 2}, {"every": 1, "warmup": 0, "batches": 3}], ids=str
)
@pytest.mark.parametrize("make", [fused, adamw])
def test_a_trainer_does_what_an_own_loop_does(lightning, tmp_path, name, make, options):
    framework = Framework(name)
    clip = 0.05 if make is fused else None
    model, sgs = own_loop(make, accumulate=2, clip=clip, **options)
    module = framework.module(network(), make)
    callbacks = [framework.Updates(**options), *([framework.Clip(clip)] if clip else [])]
    trainer = framework.trainer(tmp_path, callbacks, accumulate_grad_batches=2)
    trainer.fit(module, loader())
    assert_same(module.net.state_dict(), model.state_dict())
    assert_same(callbacks[0].sgs.scalings, sgs.scalings)
    assert not torch.equal(sgs.scalings["0"], torch.ones(3, 3))
    centres = [float(g[1, 1]) for g in sgs.scalings.values()]
    assert float(trainer.callback_metrics["sgs_centre"]) == pytest.approx(sum(centres) / 2, rel=0.2)
    if clip:
        assert float(callbacks[1].last_grad_norm) > clip


@pytest.mark.parametrize("step", [6, 12, 11], ids=["before", "epoch", "mid-epoch"])
@pytest.mark.parametrize("options", [{"every": 5}, {"every_steps": 2}], ids=str)
@pytest.mark.parametrize("make", [fused, adamw])
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_on(lightning, tmp_path, make, options, step):
    class Save(lightning.pl.Callback):
        def save(self, trainer, *args):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "run.ckpt")
                self.scalings = updates.sgs.scalings

    class BeginAgain(lightning.pl.Callback):
        """The hook may come again for the epoch that was stopped: this Trainer leaves it out then."""

        def on_train_start(self, trainer, module):
            if step == 11:
                resumed.on_train_epoch_start(trainer, module)

    setattr(Save, "on_train_batch_end" if step == 11 else "on_train_epoch_end", Save.save)

    def fit(updates, callback, **resume):
        module = lightning.module(network(), make)
        lightning.trainer(tmp_path, [updates, callback]).fit(module, batches, **resume)
        return module.net

    # A Trainer that is stopped within an epoch begins it with the first batch again: all are alike here.
    batches = DataLoader(TensorDataset(data().tensors[0][:4].repeat(6, 1, 1, 1)), batch_size=4)
    updates, resumed, save = lightning.Updates(**options), lightning.Updates(**options), Save()
    whole = fit(updates, save)
    assert torch.equal(save.scalings["net.0"], torch.ones(3, 3)) == (step == 6)
    again = fit(resumed, BeginAgain(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert_same(again.state_dict(), whole.state_dict())
    assert_same(resumed.sgs.scalings, updates.sgs.scalings)


def test_a_second_fit_goes_on_with_what_was_learned(lightning, tmp_path):
    module, updates = lightning.module(network(), adamw), lightning.Updates()
    lightning.trainer(tmp_path, [updates], max_epochs=2).fit(module, loader())
    learned, first = updates.sgs.scalings, updates.sgs.optimizer
    lightning.trainer(tmp_path, [updates], max_epochs=1).fit(module, loader())
    assert_same(updates.sgs.scalings, learned)
    assert updates.sgs.optimizer is not first
    assert not first._optimizer_step_pre_hooks


def test_epochs_of_a_second_fit_count_anew(lightning, tmp_path):
    module, updates = lightning.module(network(), fused), lightning.Updates(warmup=0)
    learned = []
    for _ in range(2):
        lightning.trainer(tmp_path, [updates], max_epochs=1).fit(module, loader())
        learned.append(updates.sgs.scalings["net.3"])
    assert not torch.equal(*learned)


def test_batches_take_the_way_of_the_trainer(lightning, tmp_path):
    """Precision and hooks: bytes become what the training step takes."""
    images = TensorDataset((data().tensors[0] * 40 + 128).byte())

    def early(self, batch, index):
        assert batch[0].dtype == torch.uint8
        return [batch[0] / 64]

    def late(self, batch, index):
        assert batch[0].is_floating_point()
        return [(batch[0] - 2).to(torch.bfloat16)]

    hooks = {"on_before_batch_transfer": early, "on_after_batch_transfer": late}
    module, updates = lightning.module(network(), fused, **hooks), lightning.Updates(warmup=0)
    trainer = lightning.trainer(tmp_path, [updates], max_epochs=1, max_steps=1, precision="bf16-true")
    trainer.fit(module, DataLoader(images, batch_size=4))
    model = network(torch.bfloat16)
    sgs = gr.SpatialGradientScaling(model, fused(model))
    sgs.update([(images.tensors[0][i : i + 4] / 64 - 2).to(torch.bfloat16) for i in (0, 4)])
    assert_same(updates.sgs.scalings, sgs.scalings)


@pytest.mark.parametrize(("precision", "inputs"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_an_update_has_the_precision_of_the_training_step(lightning, tmp_path, precision, inputs):
    dtypes = []

    def forward(self, x):
        y = self.net(x)
        dtypes.append((x.dtype, y.dtype))
        return y

    def step(self, batch, index):
        return self(batch[0]).square().mean()

    methods = {"forward": forward, "training_step": step}
    module, updates = lightning.module(network(torch.float32), fused, **methods), lightning.Updates(warmup=0)
    trainer = lightning.trainer(tmp_path, [updates], max_epochs=1, max_steps=1, precision=precision)
    trainer.fit(module, DataLoader(data(torch.float32), batch_size=4))
    assert dtypes == [(inputs, torch.bfloat16)] * 5  # two batches, twice, and the step


def test_a_loader_whose_workers_stay_loses_no_batch(lightning, tmp_path):
    """The Trainer's iterator of the first epoch, and of the first after a resume, is made before the update."""
    module = lightning.module(network(), fused)
    workers = loader(num_workers=1, persistent_workers=True)
    updates = lightning.Updates(warmup=0)
    trainer = lightning.trainer(tmp_path, [updates], max_epochs=1)
    trainer.fit(module, workers)
    assert module.seen == [float(x.flatten()[0]) for (x,) in loader()]
    own = workers._iterator
    assert updates.loader(trainer) is not workers
    assert workers._iterator is own


def two(model):
    return [fused(model[:2]), torch.optim.SGD(model[3:].parameters(), lr=0.1)]


def manual(self, batch, index):
    loss = self.net(batch[0]).square().mean()
    self.manual_backward(loss)
    for optimizer in self.optimizers():
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("position", [None, 2, -1])
def test_several_optimizers_want_a_position(lightning, tmp_path, position):
    module = lightning.module(network(), two, training_step=manual, automatic_optimization=False)
    trainer = lightning.trainer(tmp_path, [lightning.Updates(optimizer=position)])
    with pytest.raises(ValueError, match=rf"among the 2 of the Trainer \(FusedRepSGD, SGD\), got {position}"):
        trainer.fit(module, loader())


def test_each_of_several_optimizers_has_its_controller(lightning, tmp_path):
    module = lightning.module(network(), two, training_step=manual, automatic_optimization=False)
    first, second = lightning.Updates(optimizer=0), lightning.Updates(optimizer=1)
    trainer = lightning.trainer(tmp_path, [first, second], max_epochs=2)
    trainer.fit(module, loader())
    assert list(first.sgs.scalings) == ["net.0"]
    assert list(second.sgs.scalings) == ["net.3"]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    saved = [list(state["sgs"]["scalings"]) for state in states.values()]
    assert sorted(saved) == [["net.0"], ["net.3"]]


def test_several_dataloaders_want_a_choice(lightning, tmp_path):
    def step(self, batch, index):
        return self.net(batch["a"][0]).square().mean()

    class Chosen(lightning.Updates):
        def loader(self, trainer):
            return trainer.train_dataloader["a"]

    module = lightning.module(network(), fused, training_step=step)
    loaders = {"a": loader(), "b": loader()}
    with pytest.raises(ValueError, match=r"is a dict; override loader\(trainer\)"):
        lightning.trainer(tmp_path, [lightning.Updates()]).fit(module, loaders)
    chosen = Chosen(warmup=0)
    lightning.trainer(tmp_path, [chosen], max_epochs=1).fit(module, loaders)
    assert not torch.equal(chosen.sgs.scalings["net.0"], torch.ones(3, 3))
    lightning.trainer(tmp_path, [lightning.Updates(every_steps=1)], max_epochs=1).fit(module, loaders)


def test_a_module_without_forward(lightning, tmp_path):
    def made():
        module = lightning.module(network(), fused)
        del type(module).forward
        return module

    with pytest.raises(ValueError, match="Module has no forward: give it one, or give forward="):
        lightning.trainer(tmp_path, [lightning.Updates()]).fit(made(), loader())
    updates = lightning.Updates(warmup=0, forward=lambda module, batch: module.net(batch[0]))
    lightning.trainer(tmp_path, [updates], max_epochs=1).fit(made(), loader())
    assert not torch.equal(updates.sgs.scalings["net.0"], torch.ones(3, 3))


def test_a_misspelt_option_is_told_at_once(lightning):
    with pytest.raises(TypeError, match="evry"):
        lightning.Updates(evry=3)


def test_clipping_by_the_trainer_too_is_refused(lightning, tmp_path):
    trainer = lightning.trainer(tmp_path, [lightning.Clip(1.0)], gradient_clip_val=0.5)
    with pytest.raises(ValueError, match=r"gradient_clip_val is 0\.5, which would clip by the plain norm"):
        trainer.fit(lightning.module(network(), fused), loader())


def test_scaled_gradients_are_not_clipped(lightning, tmp_path):
    plugin = importlib.import_module("lightning.pytorch.plugins.precision").MixedPrecision
    scaled = plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def make(model):
        return gr.FusedRepSGD(model.parameters(), lr=0.1, fused=True)

    trainer = lightning.trainer(tmp_path, [lightning.Clip(1.0)], precision=None, plugins=[scaled])
    with pytest.raises(ValueError, match="fused=True leaves gradients scaled until the step"):
        trainer.fit(lightning.module(network(torch.float32), make), DataLoader(data(torch.float32), batch_size=4))


def test_clipping_by_the_step_too_is_refused(lightning, tmp_path):
    trainer = lightning.trainer(tmp_path, [lightning.Clip(1.0)])
    with pytest.raises(ValueError, match=r"max_grad_norm is 2\.0: the step clips, so leave ClipGradNorm out"):
        trainer.fit(lightning.module(network(), clipping_and_averaging), loader())


def clipping_and_averaging(model):
    return gr.FusedRepSGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=2.0, ema_decay=0.5)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_validation_sees_the_averages(lightning, tmp_path, name, fails):
    framework = Framework(name)
    seen = []

    def validation_step(module, batch, index):
        seen.append({name: p.detach().clone() for name, p in module.net.named_parameters()})
        if fails and not module.trainer.sanity_checking:
            raise RuntimeError("a batch that cannot be read")

    def on_save_checkpoint(module, checkpoint):
        checkpoint["averages"] = module.optimizers(use_pl_optimizer=False).ema_state_dict(module)

    methods = {"validation_step": validation_step, "on_save_checkpoint": on_save_checkpoint}
    module = framework.module(network(), clipping_and_averaging, **methods)
    trainer = framework.trainer(tmp_path, [framework.Averages()], max_epochs=2)
    fit = lambda: trainer.fit(module, loader(), loader())  # noqa: E731
    if fails:
        with pytest.raises(RuntimeError, match="a batch that cannot be read"):
            fit()
    else:
        fit()
    optimizer = trainer.optimizers[0]
    averages = {name: optimizer.ema(p) for name, p in module.net.named_parameters()}
    assert_same(seen[-1], averages)
    assert not any(torch.equal(p, averages[name]) for name, p in module.net.named_parameters() if p.dim() == 4)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert_same({name: saved["averages"]["net." + name] for name in averages}, averages)
    assert_same(saved["state_dict"], module.state_dict())


def test_averages_without_a_decay_are_refused(lightning, tmp_path):
    trainer = lightning.trainer(tmp_path, [lightning.Averages()])
    with pytest.raises(ValueError, match="no optimizer of the Trainer keeps averages: give one an ema_decay"):
        trainer.fit(lightning.module(network(), fused), loader())


RANKS = """
    import sys, torch
    from pathlib import Path
    from torch.utils.data import DataLoader, DistributedSampler
    sys.path[:0] = [{tests!r}, {support!r}]
    import torchvision_alone
    import test_lightning_callbacks as t

    torch.set_num_threads(1)
    framework = t.Framework("lightning")
    updates = framework.Updates(warmup=0, every=100)
    module = framework.module(t.network(), t.fused)

    def end(self):
        rank = self.trainer.global_rank
        torch.save((updates.sgs.scalings, self.state_dict()), Path({folder!r}, f"{{rank}}.pt"))

    def dealt(self):
        every_other = DistributedSampler(t.data(), 2, self.trainer.global_rank, shuffle=False)
        return DataLoader(t.data(), batch_size=4, sampler=every_other)

    type(module).on_train_end, type(module).train_dataloader = end, dealt
    trainer = framework.pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", precision="64-true", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir={folder!r}, callbacks=[updates],
    )
    trainer.fit(module)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_ranks_learn_as_one_process_does(tmp_path):
    pytest.importorskip("lightning.pytorch")
    script = textwrap.dedent(RANKS).format(
        tests=str(Path(__file__).parent), support=str(Path(torchvision_alone.__file__).parent), folder=str(tmp_path)
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = network()
    sgs = gr.SpatialGradientScaling(model, fused(model))
    sgs.update([data().tensors[0][:16]])  # two batches of four on each of two ranks
    assert_same(first, sgs.scalings)
    assert_same(second, sgs.scalings)
    assert all(torch.equal(weights[f"net.{name}"], others[f"net.{name}"]) for name, _ in model.named_parameters())
