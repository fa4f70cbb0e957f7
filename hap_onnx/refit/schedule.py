"""The order of things: which step runs when, what of it can be refitted, and what nothing needs after."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hap_onnx.errors import SurgeryError
from hap_onnx.ops.linear import LinearForm, linear_form
from hap_onnx.ops.registry import find_macs
from hap_onnx.refit.pair import Pair, is_addition_step, order_steps
from hap_onnx.refit.spec import ImplantSpec
from hap_onnx.refit.store import ORIGINAL, Key
from hap_onnx.surgery import CONSTANT_SUFFIX
from hap_onnx.twin import Step, Twin


@dataclass(frozen=True)
class WeightFit:
    """A contraction whose weight is refitted, with its bias (if it has one of its own).

    ``fixed_bias`` is one that others read too.
    """

    form: LinearForm
    data: str
    weight: str
    bias: str | None
    fixed_bias: str | None


@dataclass(frozen=True)
class OffsetFit:
    """Something that is added to the output of a step, times ``scale``, along ``axis`` (None: as it is)."""

    initializer: str
    axis: int | None
    scale: float


@dataclass(frozen=True)
class ImplantFit:
    """A contraction that gets an implant; ``layer`` is None where there is nothing that it should give."""

    spec: ImplantSpec
    form: LinearForm
    weight: str
    layer: WeightFit | None


Fit = WeightFit | OffsetFit | ImplantFit


@dataclass(frozen=True)
class Task:
    """One step of one of the twins; ``release`` names what nothing needs after it."""

    twin: Twin
    step: Step
    fit: Fit | None
    release: tuple[Key, ...]


def plan_tasks(pair: Pair, leave: Collection[str] = ()) -> list[Task]:
    """Let each changed step of the compressed model follow its namesake of the original, and plan its fit.

    It ends with the last fit. Nodes of ``leave`` are run as they are.
    """
    changed: list[list[Step]] = [[] for _ in pair.original.steps]
    for when, step in order_steps(pair):
        if any(name in pair.changed for name in step.outputs):
            changed[when].append(step)
    order: list[tuple[Twin, Step, Fit | None]] = []
    end = 0
    for step, followers in zip(pair.original.steps, changed, strict=True):
        order.append((pair.original, step, None))
        for follower in followers:
            fit: Fit | None = _plan_implant(pair, follower)
            if fit is None and follower.name not in leave:
                fit = _plan_fit(pair, follower)
            order.append((pair.compressed, follower, fit))
            end = len(order) if fit is not None else end
    last: dict[Key, int] = {}
    for index, (twin, step, _) in enumerate(order):
        names = [name for name in (*step.inputs, *step.outputs) if name]
        last.update({(ORIGINAL, name) if twin is pair.original else pair.key(name): index for name in names})
        last.update({(ORIGINAL, name): index for name in step.outputs if name})  # may be its target
    release: list[list[Key]] = [[] for _ in order]
    for key, index in last.items():
        release[index].append(key)
    return [Task(*entry, tuple(keys)) for entry, keys in zip(order[:end], release, strict=False)]


def _plan_implant(pair: Pair, step: Step) -> ImplantFit | None:
    spec = pair.implants.get(step.name)
    if spec is None:
        return None
    form = linear_form(pair.nodes[step.name])
    if form is None or not pair.owned(step.inputs[form.weight_index]):
        raise SurgeryError(
            f"refit: {step.op_type} '{step.name}' cannot have an implant: it has no weight of its own"
        )
    layer = _plan_fit(pair, step)
    return ImplantFit(
        spec, form, step.inputs[form.weight_index], layer if isinstance(layer, WeightFit) else None
    )


def _plan_fit(pair: Pair, step: Step) -> Fit | None:
    """Say what of a changed step can be refitted."""
    node = pair.nodes[step.name]
    if step.outputs[0] not in pair.original_outputs:
        return None  # there is nothing that it should be
    for name in step.inputs:
        # What is left of a removed branch, where it is added to the others.
        if name.endswith(CONSTANT_SUFFIX) and is_addition_step(step) and pair.owned(name):
            return OffsetFit(name, None, 1.0)
    form = linear_form(node)
    third = step.inputs[2] if len(step.inputs) > 2 else ""
    if form is not None:
        weight = step.inputs[form.weight_index]
        if not pair.owned(weight) or (third and form.bias_index is None):
            return None
        owned = bool(third) and pair.owned(third)
        return WeightFit(
            form=form,
            data=step.inputs[form.data_index],
            weight=weight,
            bias=third if owned else None,
            fixed_bias=third if third and not owned else None,
        )
    contraction = find_macs(node.op, domain=node.domain or "") is not None
    if contraction and third and pair.owned(third) and pair.parameters[third].ndim == 1:
        return OffsetFit(third, 1, float(node.attrs.get("beta", 1.0)))
    return None
