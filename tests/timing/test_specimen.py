"""Contractions cut out of models: their families, and small models of them at other sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from hap_onnx.ops.implant import implant_forms
from hap_onnx.runtime.session import make_session
from hap_onnx.timing.specimen import Specimen, build_model, implant_parts, specimen_of

SPATIAL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}


def layer(op: str, weight: tuple[int, ...], *, bias: int | None = None, **attrs: object) -> gs.Node:
    constants = [gs.Constant("w", np.ones(weight, np.float32))]
    if bias is not None:
        constants.append(gs.Constant("b", np.ones(bias, np.float32)))
    inputs = [gs.Variable("x"), *constants]
    return gs.Node(op, "layer", attrs=attrs, inputs=inputs, outputs=[gs.Variable("y")])


def conv(n_in: int = 8, n_out: int = 12, **attrs: object) -> Specimen:
    found = specimen_of(
        layer("Conv", (n_out, n_in, 3, 3), bias=n_out, **SPATIAL, **attrs),
        (1, n_in * int(attrs.get("group", 1)), 10, 6),
        (1, n_out, 5, 3),
        opset=13,
    )
    assert found is not None
    return found


def depthwise(n: int = 12) -> Specimen:
    found = specimen_of(
        layer("Conv", (n, 1, 3, 3), bias=n, group=n, **SPATIAL), (1, n, 10, 6), (1, n, 5, 3), opset=13
    )
    assert found is not None
    return found


def gemm(n_in: int = 8, n_out: int = 12) -> Specimen:
    found = specimen_of(layer("Gemm", (n_out, n_in), bias=n_out, transB=1), (7, n_in), (7, n_out), opset=13)
    assert found is not None
    return found


def product(n_in: int = 8, n_out: int = 12) -> Specimen:
    found = specimen_of(layer("MatMul", (n_in, n_out)), (2, 5, n_in), (2, 5, n_out), opset=13)
    assert found is not None
    return found


@pytest.mark.parametrize("make", [conv, gemm, product])
def test_families_tell_all_but_channels(make) -> None:
    assert make(8, 12).family == make(24, 40).family
    assert make(8, 12).family != depthwise().family
    assert (make(24, 40).n_in, make(24, 40).n_out) == (24, 40)


def test_families_tell_strides_positions_groups_and_types() -> None:
    node = layer("Conv", (12, 8, 3, 3), bias=12, **SPATIAL)
    larger = specimen_of(node, (1, 8, 20, 6), (1, 12, 10, 3), opset=13)
    node.attrs["strides"] = [1, 1]
    denser = specimen_of(node, (1, 8, 5, 3), (1, 12, 5, 3), opset=13)
    assert larger is not None
    assert denser is not None
    names = {conv().family, conv(8, 12, group=2).family, depthwise().family, larger.family, denser.family}
    assert len(names) == 5
    assert depthwise(12).family == depthwise(30).family


@pytest.mark.parametrize("make", [conv, gemm, product])
def test_models_of_specimens_run_at_every_size(make) -> None:
    points = [(4, 6), (16, 6), (3, 32)]
    model, feed = build_model(make(), points)
    onnx.checker.check_model(model, full_check=True)
    session = make_session(model, providers="cpu")
    outputs = session.run(feed)
    axis = make().channel_axis
    assert [outputs[f"y{k}"].shape[axis] for k in range(3)] == [6, 6, 32]
    assert len(feed) == 3  # one input for each width


def test_biases_of_one_number_stay_what_they_are() -> None:
    node = layer("Gemm", (12, 8), transB=1)
    node.inputs.append(gs.Constant("b", np.array(1.0, np.float32)))
    specimen = specimen_of(node, (7, 8), (7, 12), opset=13)
    assert specimen is not None
    model, feed = build_model(specimen, [(4, 6)])
    assert make_session(model, providers="cpu").run(feed)["y0"].shape == (7, 6)


def test_depthwise_specimens_keep_a_group_for_each_channel() -> None:
    assert depthwise().is_depthwise
    assert not conv(1, 1).is_depthwise
    model, feed = build_model(depthwise(), [(1, 4), (1, 20)])
    groups = [next(a.i for a in node.attribute if a.name == "group") for node in model.graph.node]
    assert groups == [4, 20]
    assert make_session(model, providers="cpu").run(feed)["y1"].shape == (1, 20, 5, 3)


def test_what_is_no_contraction_of_one_input_is_not_cut_out() -> None:
    relu = gs.Node("Relu", "r", inputs=[gs.Variable("x")], outputs=[gs.Variable("y")])
    assert specimen_of(relu, (1, 8), (1, 8), opset=13) is None
    computed = layer("Gemm", (12, 8), transB=1)
    computed.inputs.append(gs.Variable("bias"))
    assert specimen_of(computed, (7, 8), (7, 12), opset=13) is None


def test_parts_of_implants_are_the_contractions_that_stand_in_for_a_layer() -> None:
    node = layer("Conv", (12, 8, 3, 3), bias=12, **SPATIAL)
    forms = {form.kind: form for form in implant_forms(node)}
    assert set(forms) == {"lowrank", "spatial", "pointwise"}
    first, second, is_joined = implant_parts(conv(), forms["lowrank"]) or pytest.fail("no parts")
    assert (first.n_in, second.n_out, is_joined) == (8, 12, False)
    assert (first.y[2:], second.x[2:], second.constants[1][2:]) == ((5, 3), (5, 3), (1, 1))
    first, second, is_joined = implant_parts(conv(), forms["spatial"]) or pytest.fail("no parts")
    assert (first.constants[1][2:], second.constants[1][2:], is_joined) == ((3, 1), (1, 3), False)
    assert first.y[2:] == (5, 6)
    first, second, is_joined = implant_parts(conv(), forms["pointwise"]) or pytest.fail("no parts")
    assert (first.constants[1][2:], second.constants[1][2:], is_joined) == ((3, 3), (1, 1), True)
