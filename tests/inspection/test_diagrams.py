"""`diagram`: layers, and arrows from where an input was made to where it is used."""

import jax
import jax.numpy as jnp
import pytest
from support import mermaid

import diffprog as dp

TIMES = "\N{MULTIPLICATION SIGN}"


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def drawn(net, x, **options):
    """Arrows by label, and the boxes around every label, of valid text."""
    text = dp.inspection.diagram(net, x, **options)
    assert mermaid.faults(text) == []
    text = text.replace(TIMES, "x")
    return mermaid.edges(text), mermaid.boxes(text)


def arrows(net, x, **options):
    """(start, end) of every arrow."""
    return [edge[:2] for edge in drawn(net, x, **options)[0]]


def test_a_transformer_block():
    block = dp.pre_norm(dp.self_attention(4)) >> dp.pre_norm(dp.ffn(64))
    text = dp.inspection.diagram(dp.repeat(6, block), shape(2, 10, 16))
    assert text.replace(TIMES, "x") == """flowchart TD
    n0(["x"])
    subgraph b1["repeat x 6"]
        n2["layer_norm()"]
        n3["self_attention(4)"]
        n4(("#43;"))
        n5["layer_norm()"]
        n6["ffn(64)"]
        n7(("#43;"))
    end
    n8(["y"])
    n0 -->|"float32[2,10,16]"| n2
    n2 -->|"float32[2,10,16]"| n3
    n0 -->|"float32[2,10,16]"| n4
    n3 -->|"float32[2,10,16]"| n4
    n4 -->|"float32[2,10,16]"| n5
    n5 -->|"float32[2,10,16]"| n6
    n4 -->|"float32[2,10,16]"| n7
    n6 -->|"float32[2,10,16]"| n7
    n7 -->|"float32[2,10,16]"| n8"""


def test_it_is_the_wiring_that_is_drawn_and_not_the_order_of_the_calls():
    @dp.program(late=dp.linear(3), early=dp.linear(5), norm=dp.layer_norm())
    def net(layers, x):
        left, right = layers.early(x), layers.norm(x)
        return layers.late(right), jnp.tanh(left)

    assert arrows(net, shape(2, 4)) == [
        ("x", "early linear(5)"), ("x", "norm layer_norm()"),
        ("norm layer_norm()", "late linear(3)"),
        ("early linear(5)", "tanh"), ("late linear(3)", "y"), ("tanh", "y")]


def test_branches_and_a_shortcut():
    net = dp.branch(dp.linear(2), dp.linear(3), merge=dp.concatenate) >> dp.residual(
        dp.linear(7), dp.linear(7, bias=False))
    edges, boxes = drawn(net, shape(2, 4))
    assert edges == [
        ("x", "linear(2)", "float32[2,4]", False), ("x", "linear(3)", "float32[2,4]", False),
        ("linear(2)", "concatenate", "float32[2,2]", False),
        ("linear(3)", "concatenate", "float32[2,3]", False),
        ("concatenate", "linear(7)", "float32[2,5]", False),
        ("concatenate", "linear(7, bias=False)", "float32[2,5]", False),
        ("linear(7, bias=False)", "+", "float32[2,7]", False),
        ("linear(7)", "+", "float32[2,7]", False), ("+", "y", "float32[2,7]", False)]
    assert set(boxes.values()) == {()}  # combinators that have no name are drawn by their arrows


def test_inputs_of_several_parts():
    net = dp.parallel(dp.linear(2), jnp.tanh)
    edges, _ = drawn(net, (shape(2, 4), shape(3, 5)))
    assert edges == [
        ("x", "linear(2)", "float32[2,4]", False), ("x", "jax.nn.tanh", "float32[3,5]", False),
        ("linear(2)", "y", "float32[2,2]", False), ("jax.nn.tanh", "y", "float32[3,5]", False)]
    both, _ = drawn(dp.serial(dp.add), (shape(2, 4), shape(2, 4)))
    assert both == [("x", "add", "float32[2,4]", False), ("add", "y", "float32[2,4]", False)]
    different, _ = drawn(dp.serial(dp.concatenate), (shape(2, 4), shape(2, 3)))
    assert different[0][2] == "float32[2,4], float32[2,3]"


def test_boxes_are_copies_and_names_of_your_own():
    @dp.program(norm=dp.layer_norm(), feed=dp.linear(8) >> jnp.tanh)
    def block(layers, x):
        return layers.feed(layers.norm(x))

    net = dp.serial(
        dp.serial(dp.linear(4), jnp.tanh), block, dp.heads(2, dp.linear(3)),
        deep=dp.repeat(3, dp.residual(dp.linear(6))), last=dp.ensemble(5, dp.heads(2, dp.ffn(7))))
    _, boxes = drawn(net, shape(2, 4))
    assert boxes == {
        "x": (), "linear(4)": (), "jax.nn.tanh": (), "norm layer_norm()": ("block",),
        "linear(8)": ("block", "feed"), "linear(3)": ("heads x 2",),
        "linear(6)": ("deep: repeat x 3",), "+": ("deep: repeat x 3",),
        "ffn(7)": ("last: ensemble x 5: heads x 2",), "y": ()}


def test_inside_copies_shapes_are_those_of_one():
    net = dp.heads(4, dp.linear(8) >> jnp.tanh) >> dp.linear(3)
    edges, _ = drawn(net, shape(2, 5))
    assert [edge[2] for edge in edges] == [
        "float32[2,5]", "float32[2,8]", "float32[2,32]", "float32[2,3]"]


def test_wrappers_change_a_diagram_by_dtypes_alone():
    plain = dp.linear(4) >> jnp.tanh
    same = dp.inspection.diagram(plain, shape(2, 4))
    assert dp.inspection.diagram(dp.remat(plain), shape(2, 4)) == same
    assert dp.inspection.diagram(dp.tap(plain, "tanh~0"), shape(2, 4)).startswith(same)
    assert dp.inspection.diagram(dp.remat(dp.linear(4)) >> jnp.tanh, shape(2, 4)) == same
    edges, _ = drawn(dp.mixed(plain, jnp.bfloat16), shape(2, 4))
    assert [edge[2] for edge in edges] == ["bfloat16[2,4]", "bfloat16[2,4]", "float32[2,4]"]
    _, boxes = drawn(dp.mixed(dp.linear(4), jnp.bfloat16), shape(2, 4))
    assert "linear(4) in bfloat16" in boxes


def test_a_tap_inside_a_net_has_arrows_from_the_end_of_the_layer_it_wraps():
    @dp.program(body=dp.tap(dp.linear(4) >> jnp.tanh, "linear_0"))
    def net(layers, x):
        y, seen = layers.body(x)
        return y + seen["linear_0"]

    assert arrows(net, shape(2, 4))[-2:] == [("jax.nn.tanh", "+"), ("+", "y")]


def test_a_shared_layer_is_drawn_once_for_each_call():
    @dp.program(leaf=dp.linear(4), whole=dp.linear(4) >> jnp.tanh)
    def net(layers, x):
        return layers.whole(layers.leaf(layers.whole(layers.leaf(x))))

    assert arrows(net, shape(2, 4)) == [
        ("x", "leaf linear(4)"), ("leaf linear(4)", "linear(4)"), ("linear(4)", "jax.nn.tanh"),
        ("jax.nn.tanh", "leaf (again) linear(4)"), ("leaf (again) linear(4)", "linear(4)"),
        ("linear(4)", "jax.nn.tanh"), ("jax.nn.tanh", "y")]
    assert '["whole (again)"]' in dp.inspection.diagram(net, shape(2, 4))


@pytest.mark.slow
def test_side_inputs_are_dotted_to_those_that_take_them():
    net = dp.models.transformer(7, 9, width=8, depth=1, heads=2, hidden=8)
    ids = shape(2, 5, dtype=jnp.int32)
    edges, _ = drawn(net, ids, source=shape(2, 6, dtype=jnp.int32),
                     source_mask=shape(2, 6, dtype=bool), mask=shape(2, 5, dtype=bool))
    dotted = [edge[:3] for edge in edges if edge[3]]
    attention = "attention(2, kernel_init='glorot_uniform')"
    causal = "self_attention(2, causal=True, kernel_init='glorot_uniform')"
    assert ("source_mask", f"self_{attention}", "mask: bool[2,6]") in dotted
    assert ("source_mask", f"cross_{attention}", "memory_mask: bool[2,6]") in dotted
    assert ("mask", causal, "bool[2,5]") in dotted
    assert ("layer_norm()", f"cross_{attention}", "memory: float32[2,6,8]") in dotted
    assert ("embed embedding(9, 8)", "@", "params: float32[8,9]") in dotted
    assert ("source", "hide()", "int32[2,6]", False) in edges
    assert {start for start, *_ in dotted} == {
        "source_mask", "mask", "layer_norm()", "embed embedding(9, 8)"}


def test_params_of_a_layer_made_of_layers_come_from_the_layer_in_it_that_has_them():
    @dp.program(read=dp.serial(table=dp.embedding(5, 4), norm=dp.layer_norm()))
    def net(layers, x):
        y = layers.read(x)
        return y @ layers.read.params["table"]["embedding"].T

    ids = shape(2, 3, dtype=jnp.int32)
    assert ("table embedding(5, 4)", "@", "params: float32[4,5]", True) in drawn(net, ids)[0]
    # Where the box is closed, from the box.
    closed = dp.serial(whole=net)
    assert ("read", "@", "params: float32[4,5]", True) in drawn(closed, ids, levels=1)[0]


def test_recurrence_of_a_cell_made_of_layers_is_a_box_of_one_step():
    net = dp.recurrent(dp.serial(dp.linear(6), dp.lstm(5))) >> dp.recurrent(
        dp.gru(3), bidirectional=True)
    edges, boxes = drawn(net, shape(2, 7, 4), mask=shape(2, 7, dtype=bool))
    assert boxes["lstm(5)"] == ("recurrent",)
    assert [edge for edge in edges if edge[1] in ("linear(6)", "recurrent")] == [
        ("mask", "recurrent", "bool[2,7]", True), ("x", "linear(6)", "float32[2,4]", False)]
    assert ("lstm(5)", "forward recurrent(gru(3))", "float32[2,7,5]", False) in edges
    assert ("backward recurrent(gru(3), reverse=True)", "concatenate", "float32[2,7,3]",
            False) in edges


@pytest.mark.parametrize("levels", [1, 2, None])
def test_levels_close_the_boxes_that_lie_deeper(levels):
    net = dp.serial(trunk=dp.serial(blocks=dp.repeat(4, dp.residual(dp.linear(8)))),
                    head=dp.linear(3))
    _, boxes = drawn(net, shape(2, 8), levels=levels)
    opened = {"linear(8)": ("trunk", "blocks: repeat x 4"), "+": ("trunk", "blocks: repeat x 4")}
    middle = {"blocks: repeat x 4": ("trunk",)} if levels == 1 else opened
    assert boxes == {"x": (), **middle, "head linear(3)": (), "y": ()}
    last = next(reversed(middle))
    assert (last, "head linear(3)") in arrows(net, shape(2, 8), levels=levels)


@pytest.mark.slow
def test_large_models_are_within_what_mermaid_draws_by_default():
    """At most 500 arrows and 50,000 characters."""
    image = shape(1, 224, 224, 3)
    text = dp.inspection.diagram(dp.models.resnet(50), image)
    assert mermaid.faults(text) == []
    assert len(mermaid.edges(text)) < 500 and len(text) < 50_000
    assert len(mermaid.edges(dp.inspection.diagram(dp.models.resnet(152), image, levels=1))) < 200


def test_diagrams_of_equal_nets_are_equal():
    make = lambda: dp.models.gpt(11, length=8, width=8, depth=2, heads=2)  # noqa: E731
    ids, mask = jnp.ones((2, 5), int), jnp.ones((2, 5), bool)
    text = dp.inspection.diagram(make(), shape(2, 5, dtype=jnp.int32), mask=shape(2, 5, dtype=bool))
    assert dp.inspection.diagram(make(), ids, mask=mask) == text


def test_a_single_layer_and_a_layer_whose_children_cannot_be_seen():
    assert arrows(dp.linear(3), shape(2, 4)) == [("x", "linear(3)"), ("linear(3)", "y")]
    inner = dp.linear(3) >> jnp.tanh
    hidden = dp.Layer(inner.init, inner.apply, children=inner.children, name="hidden")
    assert arrows(hidden, shape(2, 4)) == [
        ("x", "hidden(linear_0=linear(3), tanh~0=jax.nn.tanh)"),
        ("hidden(linear_0=linear(3), tanh~0=jax.nn.tanh)", "y")]


def test_none_is_an_absent_side_input_and_faults_of_the_net_are_its_own():
    net = dp.self_attention(2)
    assert dp.inspection.diagram(net, shape(2, 3, 4), mask=None) == dp.inspection.diagram(net,
        shape(2, 3, 4))
    with pytest.raises(dp.LayerError, match="side inputs"):
        dp.inspection.diagram(net, shape(2, 3, 4), memory=shape(2, 3, 4))
    with pytest.raises(dp.LayerError, match="wants levels"):
        dp.inspection.diagram(net, shape(2, 3, 4), levels=0)


def test_the_iterate_of_a_fixed_point_is_drawn_without_an_origin():
    net = dp.fixed_point(dp.parallel(dp.linear(4), dp.linear(4, bias=False)) >> dp.add >> jnp.tanh)
    edges, boxes = drawn(net, shape(2, 4))
    assert [edge[:2] for edge in edges] == [
        ("x", "linear(4, bias=False)"), ("linear(4)", "add"), ("linear(4, bias=False)", "add"),
        ("add", "jax.nn.tanh"), ("jax.nn.tanh", "y")]
    assert boxes["linear(4)"] == ("fixed_point",)
