"""Networks in 8 bits, weights and activations: after training (PTQ), and trained so (QAT).

Both flows are others' work: FX graph mode of torch.ao.quantization, which the RepOptimizers paper used (Appendix C), as
long as torch has it, and PT2E of torchao, which follows it. FX converts to torch's int8 kernels, on the CPU. PT2E takes
any network that torch.export does, and its converted network computes in float on the grid of 8 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from gradrep_kernels.recipes.errors import InputError

__all__ = ["FLOWS", "Flow", "chosen_flow"]


@dataclass(frozen=True)
class Flow:
    """One way from a float network to one of 8 bits.

    Parameters of a prepared network are those of the float one, the same objects, so that an optimizer over them goes
    on and keeps its multipliers.
    """

    name: str
    title: str
    load: Callable[[], ModuleType]
    """Imports what it needs. Raises ImportError or AttributeError where it is not there."""
    prepare: Callable[[nn.Module, Tensor, bool, bool], nn.Module]
    """(model, example, whether for training, whether weights have a step per channel) -> the model with observers, or
    with fake quantization for training. It holds the parameters of `model`, which must not be used again.
    Its `train` and `eval` may return nothing."""
    freeze: Callable[[nn.Module], None]
    """Make a model that was prepared for training keep its ranges."""
    convert: Callable[[nn.Module], nn.Module]
    """A prepared model on the CPU in eval mode -> the model in 8 bits."""

    def why_not(self) -> str | None:
        """Say why it cannot be used here. None: it can."""
        try:
            with _quiet():
                self.load()
        except (ImportError, AttributeError) as reason:
            return f"{self.title}: {reason}"
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of both libraries: of deprecation, and of extensions in torchao that no CPU needs."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- FX graph mode


def _fx() -> ModuleType:
    from torch.ao.quantization import quantize_fx

    if torch.backends.quantized.engine == "none":
        raise ImportError("this build of torch has no engine of int8 kernels")
    return quantize_fx


def _fx_prepare(model: nn.Module, example: Tensor, training: bool, per_channel: bool) -> nn.Module:
    from torch.ao import quantization

    engine = torch.backends.quantized.engine
    with _quiet():
        if training:
            mapping = quantization.get_default_qat_qconfig_mapping(engine)
            weight = quantization.default_weight_fake_quant
        else:
            mapping = quantization.get_default_qconfig_mapping(engine)
            weight = quantization.default_weight_observer
        if not per_channel:
            mapping.set_global(quantization.QConfig(mapping.global_qconfig.activation, weight))
        prepare = _fx().prepare_qat_fx if training else _fx().prepare_fx
        return prepare(model.train(training), mapping, (example,))


def _fx_freeze(prepared: nn.Module) -> None:
    from torch.ao.quantization import disable_observer

    prepared.apply(disable_observer)


def _fx_convert(prepared: nn.Module) -> nn.Module:
    with _quiet():
        return _fx().convert_fx(prepared)


# ---- PT2E


def _pt2e() -> ModuleType:
    from torchao.quantization.pt2e import quantize_pt2e

    return quantize_pt2e


def _pt2e_prepare(model: nn.Module, example: Tensor, training: bool, per_channel: bool) -> nn.Module:
    with _quiet():
        flow = _pt2e()
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batch = {0: torch.export.Dim("batch")}
        exported = torch.export.export(model.train(training), (example,), dynamic_shapes=(batch,)).module()
        config = x86.get_default_x86_inductor_quantization_config(is_qat=training)
        if not per_channel:
            per_tensor = _per_tensor(training)
            weight = dataclasses.replace(
                config.weight, qscheme=torch.per_tensor_symmetric, ch_axis=None, observer_or_fake_quant_ctr=per_tensor
            )
            config = dataclasses.replace(config, weight=weight)
        quantizer = x86.X86InductorQuantizer().set_global(config)
        prepared = (flow.prepare_qat_pt2e if training else flow.prepare_pt2e)(exported, quantizer)
        return allow_exported_model_train_eval(prepared)


def _per_tensor(training: bool) -> Callable:
    """Make the observer of a weight that has one step."""
    from torchao.quantization import pt2e

    if training:
        return pt2e.FusedMovingAvgObsFakeQuantize.with_args(observer=pt2e.MovingAverageMinMaxObserver)
    return pt2e.MinMaxObserver


def _pt2e_freeze(prepared: nn.Module) -> None:
    from torchao.quantization.pt2e import disable_observer

    prepared.apply(disable_observer)


def _pt2e_convert(prepared: nn.Module) -> nn.Module:
    with _quiet():
        from torchao.quantization.pt2e import allow_exported_model_train_eval

        return allow_exported_model_train_eval(_pt2e().convert_pt2e(prepared))


FLOWS = {
    flow.name: flow
    for flow in (
        Flow("fx", "FX graph mode of torch.ao.quantization", _fx, _fx_prepare, _fx_freeze, _fx_convert),
        Flow("pt2e", "PT2E of torchao", _pt2e, _pt2e_prepare, _pt2e_freeze, _pt2e_convert),
    )
}
"""Every flow by its name, the one that is tried first at its front."""


def chosen_flow(name: str | None) -> tuple[Flow | None, str | None]:
    """Return (flow, None), or (None, why none can be used). `name` None: the first that can be used.

    Raises InputError, saying what to install, where the flow of a given name cannot be used.
    """
    flows = list(FLOWS.values()) if name is None else [FLOWS[name]]
    reasons = []
    for flow in flows:
        reason = flow.why_not()
        if reason is None:
            return flow, None
        reasons.append(reason)
    why = f"{'; '.join(reasons)}; `pip install --no-deps torchao` brings pt2e"
    if name is not None:
        raise InputError(f"--flow {name}: {why}")
    return None, why
