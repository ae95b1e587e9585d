"""`summary`: rows, paths and totals, read off shapes alone."""

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.core.factories import factory


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def nested():
    block = dp.residual(dp.serial(dp.linear(8), jax.nn.relu, dp.linear(4)))
    return dp.serial(dp.flatten(), dp.linear(4), blocks=dp.repeat(3, block),
                     norm=dp.batch_norm(), head=dp.heads(2, dp.linear(5, bias=False)))


def test_one_row_for_every_layer():
    rows = dp.summary(nested(), shape(2, 3, 2)).rows
    up, down = 4 * 8 + 8, 8 * 4 + 4
    assert [(row.path, row.parameters) for row in rows] == [
        ("", 6 * 4 + 4 + 3 * (up + down) + 8 + 2 * 4 * 5),
        ("flatten~0", 0),
        ("linear_0", 6 * 4 + 4),
        ("blocks", 3 * (up + down)),
        ("blocks/body", 3 * (up + down)),
        ("blocks/body/linear_0", 3 * up),
        ("blocks/body/relu~0", 0),
        ("blocks/body/linear_1", 3 * down),
        ("norm", 8),
        ("head", 2 * 4 * 5),
    ]


def test_rows_have_the_shapes_of_input_and_output():
    rows = {row.path: row for row in dp.summary(nested(), shape(2, 3, 2)).rows}
    shapes = {path: (row.input.shape, row.output.shape) for path, row in rows.items()}
    assert shapes[""] == ((2, 3, 2), (2, 10))
    assert shapes["flatten~0"] == ((2, 3, 2), (2, 6))
    assert shapes["blocks"] == ((2, 4), (2, 4))
    assert shapes["blocks/body/linear_0"] == ((2, 4), (2, 8))
    assert shapes["blocks/body/linear_1"] == ((2, 8), (2, 4))
    assert shapes["head"] == ((2, 4), (2, 10))
    assert rows["norm"].output.dtype == jnp.float32
    assert repr(rows["blocks/body/linear_0"].layer) == "linear(8)"


def test_totals_are_those_of_the_initialized_trees():
    net = nested()
    seen = dp.summary(net, shape(2, 3, 2))
    params, state = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((2, 3, 2)))
    assert seen.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert seen.state == sum(leaf.size for leaf in jax.tree.leaves(state)) == 8
    assert seen.bytes == 4 * (seen.parameters + seen.state)


def test_it_prints_as_a_table_with_totals():
    lines = str(dp.summary(nested(), shape(2, 3, 2))).splitlines()
    assert lines[0].split() == ["path", "layer", "input", "output", "parameters", "bytes", "FLOPs"]
    assert lines[-1].startswith("parameters 304   state 8   memory 1.25 kB   FLOPs ")
    rule = lines[1]
    assert set(rule) == {"-"} and [i for i, line in enumerate(lines) if line == rule] == [
        1, 12, len(lines) - 2]
    table = {line.split()[0]: line.split() for line in lines[3:12]}
    assert table["blocks"][1:-1] == [
        "repeat", "x", "3", "float32[2,4]", "float32[2,4]", "228", "912", "B"]
    assert table["blocks/body/linear_0"][1:-1] == [
        "linear(8)", "float32[2,4]", "float32[2,8]", "120", "480", "B"]
    assert table["flatten~0"][1:] == [  # no numbers where none can be
        "flatten()", "float32[2,3,2]", "float32[2,6]", "0"]


def test_numbers_and_columns_are_aligned():
    lines = str(dp.summary(dp.serial(dp.linear(2000), dp.linear(1)), shape(1, 1000))).splitlines()
    end = lines[0].index("parameters") + len("parameters")
    assert lines[3][:end].endswith("2,002,000") and lines[4][:end].endswith("    2,001")
    assert len(lines[2]) == len(lines[3]) == len(lines[4]) == len(lines[1])
    at = lines[0].index("output")
    assert all(line[at:].startswith("float32[") and line[at - 1] == " " for line in lines[2:5])


def test_a_shared_layer_is_counted_once():
    @dp.program(twice=dp.linear(4))
    def net(layers, x):
        return layers.twice(layers.twice(x))

    seen = dp.summary(net, shape(2, 4))
    assert [(row.path, row.parameters) for row in seen.rows] == [
        ("", 20), ("twice", 20), ("twice", 0)]
    assert seen.parameters == 20
    assert seen.flops == 2 * seen.rows[1].flops == 2 * seen.rows[2].flops > 0


def test_side_inputs_are_passed():
    @dp.program(a=dp.linear(4), b=dp.linear(3))
    def net(layers, x, *, memory):
        return layers.a(x), layers.b(memory)

    seen = dp.summary(net, shape(2, 4), memory=shape(2, 7))
    shapes = {row.path: row.input.shape for row in seen.rows}
    assert shapes == {"": (2, 4), "a": (2, 4), "b": (2, 7)}
    assert seen.parameters == 20 + 7 * 3 + 3


def test_a_net_too_large_for_any_machine_is_summarized():
    width = 1 << 18
    net = dp.serial(blocks=dp.repeat(100, dp.residual(dp.linear(width))))
    seen = dp.summary(net, shape(1, width))
    assert seen.parameters == 100 * (width * width + width) > 10**12
    assert seen.bytes == 4 * seen.parameters
    assert f"{seen.parameters:,}" in str(seen)
    assert [row.parameters for row in seen.rows] == [seen.parameters] * 3


def test_memory_counts_bytes_and_not_numbers():
    with jax.enable_x64(True):
        seen = dp.summary(dp.linear(3), shape(2, 4, dtype=jnp.float64))
        assert (seen.parameters, seen.bytes) == (15, 120)
    assert dp.summary(dp.linear(3), shape(2, 4, dtype=jnp.bfloat16)).bytes == 60


# Wrappers and windows are known by the record, not by names.

def max_pool(x):
    """A user's function with the name of a layer."""
    return x[:, ::2]


@factory
def top(n, layer):
    """A user's factory with arguments named as those of `repeat`."""
    return dp.serial(layer, dp.linear(n))


def test_a_users_function_named_as_a_pool_is_no_window():
    found = dp.summary(dp.linear(4) >> max_pool, shape(2, 6))
    assert [row.field for row in found.rows] == [None, None, None]


def test_a_users_factory_is_no_wrapper():
    layer = dp.linear(4)
    net = top(3, layer)
    found = dp.summary(net, shape(2, 6))
    alone = dp.summary(dp.serial(layer, dp.linear(3)), shape(2, 6))
    assert found.flops == alone.flops and found.parameters == alone.parameters
    assert [row.path for row in found.rows] == ["", "linear_0", "linear_1"]
