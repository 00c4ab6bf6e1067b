"""torch.optim.SGD with `g ← M ⊙ g` first, in one pass (RepOptimizers, section 3.4)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import SGD, sgd

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.reference.multiply import multiply
from gradrep_kernels.ops.reference.rep_sgd_step import HYPER, compute_dtype
from gradrep_kernels.optim.multipliers import Multipliers, pack, unpack
from gradrep_kernels.optim.plan import StepPlan
from gradrep_kernels.optim.sharding import PLAIN, aligned_grad, is_dtensor, local, norm_over_shards

_FINGERPRINT = "grad_mults_fingerprint"
_SHOWN = 4  # mismatches listed in one error


class FusedRepSGD(SGD):
    """torch.optim.SGD, argument for argument, whose gradients are multiplied by constants before weight decay and momentum:

        g ← −g if maximize;  g ← M ⊙ g;  g ← g + wd · W;  v ← μ v + (1 − dampening) g  (first step of a parameter: v ← g);
        d ← g + μ v if nesterov else v;  W ← W − lr · d

    Source: RepOptimizers (Ding et al., 2023), section 3.4; SGS (Detkov et al., 2023), Eq. 2.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable: as torch.optim.SGD
            (`lr` and `weight_decay` may be one-element tensors). `foreach` is accepted and changes nothing.
        fused: True asks for in-kernel gradient unscaling under torch.amp.GradScaler. It selects nothing else and is never
            saved: the fused kernels are used whenever they can be.
        grad_mults: {parameter: GradMult | Tensor that broadcasts to it}. None: plain SGD.

    A step never changes `.grad` (except that it unscales under GradScaler with fused=True, as torch's fused optimizers do).
    bf16 and fp16 are computed in float32 and rounded once per stored tensor; products and sums are rounded one by one.
    Where torch.compile traces the step, and with differentiable=True, torch's functional SGD takes M ⊙ g and rounds as it does.

    From its second step on the optimizer holds parameters on the CPU for its kernels too, so torch.utils.swap_tensors refuses
    them: with torch.__future__.set_swap_module_params_on_conversion(True) convert the model first.

    Of sharded parameters (DTensor: FSDP2, tensor parallelism) give the multiplier for the whole weight; make the optimizer
    after the model is sharded. ZeroRedundancyOptimizer cannot pass `grad_mults` on; set them on what each rank holds:

        for group in zero.optim.param_groups:
            for p in group["params"]:
                zero.optim.set_grad_mult(p, mults.get(p))

    Raises ValueError for multipliers that do not broadcast to their parameter, are negative, NaN or inf, or belong to a
    parameter that this optimizer does not have; nothing is changed then.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        grad_mults: Mapping[Tensor, GradMult | Tensor] | None = None,
    ):
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if grad_mults is not None and not isinstance(grad_mults, Mapping):
            raise TypeError(f"grad_mults must map parameters to GradMult or Tensor, got {type(grad_mults).__name__}")
        self._multipliers = Multipliers()
        self._forget_plan()
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
        )
        if fused:
            self._step_supports_amp_scaling = (
                True  # only when asked for: Lightning refuses gradient clipping where it is set
            )
        checked = [(param, self._checked(param, mult)) for param, mult in (grad_mults or {}).items()]
        for param, mult in checked:
            self._multipliers.set_caller(param, mult)
        self._refresh_fingerprints()

    # ---- Grad Mult

    def set_grad_mult(self, param: Tensor, mult: GradMult | Tensor | None) -> None:
        """Set (or with None remove) the caller's Grad Mult of one parameter. Raises ValueError as the constructor does.

        Those of parameters that are no longer in `param_groups` are dropped.
        """
        self._multipliers.set_caller(param, self._checked(param, mult))
        self._multipliers.drop(self._multipliers.strays(self._params()))
        self._refresh_fingerprints()

    def grad_mult(self, param: Tensor, total: bool = False) -> GradMult | None:
        """The caller's Grad Mult of `param`, or with total=True its product with what `set_spatial_scaling` set; None is 1."""
        self._position(param)
        return self._multipliers.product(param) if total else self._multipliers.caller(param)

    def set_spatial_scaling(self, param: Tensor, scaling: Tensor | None) -> None:
        """Set (or with None remove) the second factor, G of spatial gradient scaling  # [kh, kw]. Not part of a checkpoint.

        For CSLA = GR to stay exact G must not change while a momentum buffer lives.
        """
        if isinstance(scaling, Tensor) and scaling.dim() != 2:
            raise ValueError(f"a spatial scaling must have shape [kh, kw], got {list(scaling.shape)}")
        self._multipliers.set_spatial(param, self._checked(param, scaling))

    def _position(self, param: Tensor) -> int:
        for n, p in enumerate(self._params()):
            if p is param:
                return n
        what = f"shape {list(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
        raise ValueError(f"unknown parameter ({what}): it is not in this optimizer's param_groups")

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _describe(self, position: int) -> str:
        names = [
            name for group in self.param_groups for name in group.get("param_names", [None] * len(group["params"]))
        ]
        if names[position] is not None:
            return f"parameter {names[position]!r}"
        return f"parameter {position} of shape {list(self._params()[position].shape)}"

    def _checked(self, param: Tensor, mult: GradMult | Tensor | None) -> GradMult | None:
        """`mult` as a GradMult that fits `param`; an error names the parameter."""
        if mult is None and param in self._multipliers:
            return None
        position = self._position(param)
        if mult is None:
            return None
        try:
            if is_dtensor(mult):
                raise TypeError(
                    "a Grad Mult must be given for the whole weight, as a plain tensor (full_tensor()); got a DTensor"
                )
            if isinstance(mult, Tensor):
                # A user's own full-size mask often has the structured form: 0.1 MB instead of 199 MB for RepOpt-VGG-B1.
                mult = GradMult.from_dense(mult) if mult.shape == param.shape else GradMult(mult)
            if not isinstance(mult, GradMult):
                raise TypeError(f"a Grad Mult must be a GradMult or a Tensor, got {type(mult).__name__}")
            mult.check(param.shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._describe(position)}: {error}") from None
        return mult

    def _refresh_fingerprints(self) -> None:
        for group in self.param_groups:
            group[_FINGERPRINT] = self._multipliers.fingerprint(group["params"])

    # ---- the step

    def _forget_plan(self) -> None:
        self._plan: StepPlan | None = None  # the cached steady state of the CPU kernels, see plan.py
        self._last_step: tuple[int, list[int]] | None = None

    def step(self, closure: Callable[[], Any] | None = None):
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"] or (torch.compiler.is_compiling() and self._can_compile()):
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                for group in self.param_groups:
                    self._torch_step(group)
        elif torch.compiler.is_compiling() or not self._planned_step():  # which needs no torch.no_grad(): 1.4 µs
            self._step()
        return loss

    def _can_compile(self) -> bool:
        """torch's functional SGD neither unscales nor skips on overflow, nor does it know multipliers of shards."""
        return getattr(self, "found_inf", None) is None and not any(is_dtensor(p) for p in self._params())

    @staticmethod
    def profile_hook_step(func: Callable) -> Callable:
        """What torch wraps around `step`, a record for the profiler and the hooks, only where somebody listens: 8 of 35 µs."""
        heard = SGD.profile_hook_step(func)

        @functools.wraps(func)
        def step(self, *args, **kwargs):
            listening = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.compiler.is_compiling()
                or torch._C._autograd._profiler_enabled()
            )
            return (heard if listening else func)(self, *args, **kwargs)

        return step

    def _planned_step(self) -> bool:
        plan = self._plan
        if plan is None or not StepPlan.wanted():
            return False
        return plan.step(self, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._plan = None
        self._refuse_strays()
        work: dict[str, _Work] = {}  # by device type; "reference": what kernels must not touch
        sparse: list[tuple[dict, Tensor]] = []
        fresh: list[tuple[Tensor, Tensor]] = []
        seen: set[Tensor] = set()
        for row, group in enumerate(self.param_groups):
            momentum = group["momentum"] != 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                mult = self._multipliers.total(p)
                if p.grad.layout != torch.strided:
                    if mult is not None or group["weight_decay"] != 0:
                        self._refuse_layout(p, "weight decay" if mult is None else "a Grad Mult")
                    sparse.append((group, p))
                    continue
                grad, buffer, first = aligned_grad(p), p, False
                if momentum:
                    buffer = self.state.get(p, {}).get("momentum_buffer")
                    if buffer is None:
                        # float32 gradients of bf16 weights (p.grad_dtype) keep float32 momentum
                        buffer, first = (
                            torch.empty_like(
                                p, dtype=torch.promote_types(p.dtype, grad.dtype), memory_format=torch.preserve_format
                            ),
                            True,
                        )
                        fresh.append((p, buffer))
                if grad_scale is not None and grad is not p.grad:
                    p.grad = grad  # the same values, and what is unscaled below
                kind = p.device.type if p not in seen and _are_plain(p, grad, buffer) else "reference"
                seen.add(p)  # a parameter that is listed twice is stepped twice, one after the other
                work.setdefault(kind, _Work()).add(p, grad, buffer, mult, first, row)
        if found_inf is not None and (fresh or sparse) and found_inf.item() != 0:
            return  # a skipped step must not leave a state behind
        hyper = self._hyper()
        for kind, w in work.items():
            step = reference.rep_sgd_step if kind == "reference" else backends.implementation("rep_sgd_step", kind)
            step(
                *w.arguments(),
                hyper.cpu() if kind == "cpu" else hyper,
                *(
                    t if t is None or kind in ("reference", t.device.type) else t.to(kind)
                    for t in (grad_scale, found_inf)
                ),
            )
            torch.autograd.graph.increment_version(
                w.written if grad_scale is None else w.written + w.grads
            )  # kernels do not
        for p, buffer in fresh:
            self.state[p]["momentum_buffer"] = buffer
        for group, p in sparse:
            if grad_scale is not None:
                p.grad.div_(grad_scale)
            self._torch_step({**group, "params": [p]})
        if not fresh and not sparse:
            self._make_plan(work)

    def _make_plan(self, work: dict[str, _Work]) -> None:
        """A plan for the next step, once two steps in a row had the same parameters and multipliers, and all of them suit it."""
        if work.keys() != {"cpu"} or not StepPlan.wanted() or any(map(is_dtensor, self._params())):
            return
        w, last = work["cpu"], self._last_step
        self._last_step = (self._multipliers.version, list(map(id, w.params)))
        if self._last_step != last:
            return
        momentum = [group["momentum"] != 0 for group in self.param_groups]
        buffers = [buffer if momentum[row] else None for buffer, row in zip(w.buffers, w.groups)]
        if all(map(StepPlan.can_take, w.params, w.grads, buffers)):
            self._plan = StepPlan(
                self, [(p, b, self._multipliers.total(p), row) for p, b, row in zip(w.params, buffers, w.groups)]
            )

    def _refuse_strays(self) -> None:
        strays = self._multipliers.strays(self._params())
        if strays:
            raise RuntimeError(
                f"parameters with Grad Mults are no longer in param_groups: {len(strays)}, one of shape {list(strays[0].shape)}. If something replaced them "
                "(wrapping the model after the optimizer was made), set the Grad Mults again on the new ones; else set_grad_mult(old, None)"
            )

    def _refuse_layout(self, p: Tensor, what: str) -> None:
        raise ValueError(
            f"{self._describe(self._position(p))}: {what} cannot be applied to a gradient of layout {p.grad.layout}"
        )

    def _hyper(self) -> Tensor:
        """The table of hyper-parameters  # [G, 6] float64; read from the groups at every step: schedulers change them.

        On the CPU; where one is a tensor on another device, there: reading it would wait for the device, which a CUDA graph
        does not allow.
        """
        rows = [[group[key] for key in HYPER] for group in self.param_groups]
        device = next(
            (v.device for row in rows for v in row if isinstance(v, Tensor) and not v.is_cpu), torch.device("cpu")
        )
        if device.type == "cpu":
            return torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64, device=device).reshape(
                -1, len(HYPER)
            )
        number = {"dtype": torch.float64, "device": device}
        return torch.stack(
            [
                torch.stack(
                    [
                        torch.full((), float(v), **number)
                        if not isinstance(v, Tensor) or v.is_cpu
                        else v.to(**number).reshape(())
                        for v in row
                    ]
                )
                for row in rows
            ]
        )

    def _torch_step(self, group: dict[str, Any]) -> None:
        """torch's own functional SGD on M ⊙ g: for torch.compile, differentiable steps and sparse gradients."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse = self._init_group(group, params, grads, buffers)
        for n, p in enumerate(params):
            mult = self._multipliers.total(p)
            if mult is not None:
                g = grads[n].to(compute_dtype(grads[n].dtype))  # many real multipliers would underflow in fp16
                grads[n] = multiply(g, *mult.parts(), g.real.dtype if g.is_complex() else g.dtype).to(grads[n].dtype)
        options = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
        foreach = None if torch.compiler.is_compiling() else False
        sgd(params, grads, buffers, has_sparse_grad=has_sparse, foreach=foreach, fused=False, **options)
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer

    # ---- clipping

    @torch.compiler.disable
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip by √(Σ M ⊙ g²), the gradient norm of the CSLA model; this keeps CSLA = GR exactly.

        `torch.nn.utils.clip_grad_norm_` does not: it is 10 % off on RepOpt-VGG-B1's scales, 20-27 % on L1's.
        Scales all gradients in place by min(1, max_norm / (norm + 1e-6)), as torch's does, and returns the norm  # []

        Raises RuntimeError where the norm is NaN or inf and error_if_nonfinite is True.
        """
        max_norm = float(max_norm)
        params = [p for p in dict.fromkeys(self._params()) if p.grad is not None]
        if not params:
            return torch.zeros(())
        groups: dict[Any, list[Tensor]] = {}
        for p in params:
            groups.setdefault((p.device_mesh, p.placements) if is_dtensor(p) else p.device, []).append(p)
        norms = [norm_over_shards(self._norm(group), group[0]) for group in groups.values()]
        norm = (
            norms[0]
            if len(norms) == 1
            else torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        )
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"the gradient norm is {float(norm)}, so it cannot be clipped; error_if_nonfinite=False scales the gradients by it anyway"
            )
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for p in params:
            g = local(p.grad)
            g.mul_(factor.to(g.device, g.real.dtype if g.is_complex() else g.dtype))
        return norm

    def _norm(self, params: list[Tensor]) -> Tensor:
        """√(Σ M ⊙ g²) of parameters on one device, of DTensors over this rank's shards."""
        mults = [self._multipliers.total(p) for p in params]
        for p, mult in zip(params, mults):
            if p.grad.layout != torch.strided and mult is not None:
                self._refuse_layout(p, "a Grad Mult")
        grads = [p.grad.coalesce().values() if p.grad.is_sparse else local(aligned_grad(p)) for p in params]
        scales, identities = zip(*((None, None) if mult is None else mult.parts() for mult in mults))
        norm = (
            backends.implementation("rep_grad_norm", grads[0].device.type)
            if _are_plain(*grads)
            else reference.rep_grad_norm
        )
        return norm(grads, list(scales), list(identities))

    # ---- saving, copying, loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "grad_mults" in param_group:
            # ZeroRedundancyOptimizer puts all its keyword arguments there, on every rank
            raise ValueError(
                "grad_mults is not an option of a parameter group: call set_grad_mult, under ZeroRedundancyOptimizer that of its .optim"
            )
        super().add_param_group(param_group)
        self.param_groups[-1].update({"fused": None, _FINGERPRINT: 0})

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_multipliers": self._multipliers}
        if getattr(self, "_step_supports_amp_scaling", False):
            kept["_step_supports_amp_scaling"] = True
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plan()
        if "_multipliers" not in self.__dict__:  # a pickled torch.optim.SGD's state
            self._multipliers = Multipliers()
        for group in self.param_groups:
            group["fused"] = None  # of an SGD(fused=True) checkpoint: not ours to take over
        self._refresh_fingerprints()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.SGD's, which loads it, and the key 'grad_mults': {position of the parameter: its Grad Mult's parts}."""
        return {**super().state_dict(), "grad_mults": pack(self._multipliers.callers(self._params()))}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a checkpoint of this class or of torch.optim.SGD.

        Grad Mults of the checkpoint are restored where none are live. Where some are, they must be the same: ValueError,
        before anything is changed (strict=False keeps the live ones and warns). A checkpoint of torch.optim.SGD has none:
        the live ones stay. One that lost them on the way (distributed checkpoint drops the key) is told by the number
        `grad_mults_fingerprint` in its groups, and accepted where the live ones have the same.
        """
        params = self._params()
        live = self._multipliers.callers(params)
        restored: dict[int, GradMult] = {}
        problem = None
        if "grad_mults" not in state_dict:
            problem = self._lost(state_dict["param_groups"])
        else:
            saved = unpack(state_dict["grad_mults"], len(params))
            if live:
                problem = self._differences(live, saved)
            else:
                restored = saved
        if problem and strict:
            raise ValueError(
                f"the checkpoint's Grad Mults are not the live ones: {problem}. Set the right ones first, or load with strict=False"
            )
        checked = [(params[n], self._checked(params[n], mult)) for n, mult in restored.items()]
        super().load_state_dict(state_dict)
        if problem:
            warnings.warn(f"the checkpoint's Grad Mults are not the live ones, which stay: {problem}", stacklevel=2)
        for param, mult in checked:
            self._multipliers.set_caller(param, mult)
        self._refresh_fingerprints()

    def _lost(self, saved_groups: list[dict[str, Any]]) -> str | None:
        for n, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups)):
            live = self._multipliers.fingerprint(group["params"])
            saved = saved_group.get(_FINGERPRINT, live)
            if saved != live:
                were, are = (
                    "none" if saved == 0 else "some, which the checkpoint has lost",
                    "none" if live == 0 else "others" if saved else "some",
                )
                return f"group {n} had {were}, and {are} are set"
        return None

    def _differences(self, live: dict[int, GradMult], saved: dict[int, GradMult]) -> str | None:
        params = self._params()
        found = []
        for n in sorted(live.keys() | saved.keys()):
            if n not in saved:
                found.append(f"{self._describe(n)} has none in the checkpoint")
            elif n not in live:
                found.append(f"{self._describe(n)} has one only in the checkpoint")
            elif not live[n].same(saved[n], params[n].shape):
                found.append(f"{self._describe(n)} has another one")
        if not found:
            return None
        return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _are_plain(*tensors: Tensor) -> bool:
    """Whether the data of all of them lies where their data_ptr says."""
    return all(type(t) in PLAIN or type(local(t)) in PLAIN for t in tensors)


class _Work:
    """The arguments of rep_sgd_step for the parameters of one device type."""

    def __init__(self):
        self.written: list[Tensor] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        self.identities: list[Tensor | None] = []
        self.first: list[bool] = []
        self.groups: list[int] = []

    def add(self, p: Tensor, grad: Tensor, buffer: Tensor, mult: GradMult | None, first: bool, row: int) -> None:
        scale, identity = (None, None) if mult is None else mult.parts()
        self.params.append(local(p))
        self.grads.append(local(grad))
        self.buffers.append(local(buffer))
        self.scales.append(scale)
        self.identities.append(identity)
        self.first.append(first)
        self.groups.append(row)
        self.written += (p, buffer)

    def arguments(self) -> tuple[list, ...]:
        return self.params, self.grads, self.buffers, self.scales, self.identities, self.first, self.groups
