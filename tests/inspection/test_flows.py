"""`gradient_flow`: against gradients with respect to zeros that are added by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))
Y = jnp.arange(6) % 3
OBJECTIVE = dp.classification()


def flow(net, batch=(X, Y), objective=OBJECTIVE, key=None, params=None):
    """The rows by path, and the parameters."""
    given = batch if isinstance(batch, dict) else {"x": batch[0]}
    made, state = net.init(KEY, given["x"], mask=given.get("mask"))
    params = made if params is None else params
    seen = dp.inspection.gradient_flow(net, objective, params, batch, state=state, key=key)
    rows = {row.path: row for row in seen.rows}
    assert len(rows) == len(seen.rows)
    return rows, params


def rms(tree):
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt((np.concatenate(leaves) ** 2).mean()))


def copy(tree, *at):
    return jax.tree.map(lambda a: a[at], tree)


def by_hand(steps, values, head):
    """Activation and gradient behind each step, by zeros added to each."""
    def loss(zeros):
        h, seen = X, []
        for step, value, zero in zip(steps, values, zeros, strict=True):
            h = step(value, h) + zero
            seen.append(h)
        return dp.losses.cross_entropy(head(h), Y), seen

    shapes = jax.eval_shape(lambda: loss([0.0] * len(steps))[1])
    zeros = [jnp.zeros(a.shape) for a in shapes]
    gradients, seen = jax.jit(jax.grad(loss, has_aux=True))(zeros)
    return [(rms(a), rms(g)) for a, g in zip(seen, gradients, strict=True)]


def sizes(rows, paths):
    return [(rows[path].activation, rows[path].gradient) for path in paths]


def affine(params, h):
    return h @ params["kernel"] + params["bias"]


@pytest.mark.slow
def test_a_deep_net_against_zeros_added_by_hand():
    body = dp.linear(4) >> jnp.tanh
    net = dp.serial(deep=dp.repeat(3, body), head=dp.linear(3))
    rows, params = flow(net)
    copies = [copy(params["deep"]["linear_0"], i) for i in range(3)]
    steps = [affine, lambda _, h: jnp.tanh(h)] * 3
    values = [value for own in copies for value in (own, None)]
    expected = by_hand(steps, values, functools.partial(affine, params["head"]))
    paths = [f"deep[{i}]/{name}" for i in range(3) for name in ("linear_0", "tanh~0")]
    np.testing.assert_allclose(sizes(rows, paths), expected, rtol=1e-5)
    # A copy gives what its last layer gives, the net what its head does.
    whole = [f"deep[{i}]" for i in range(3)]
    np.testing.assert_allclose(sizes(rows, whole), expected[1::2], rtol=1e-5)
    assert sizes(rows, ["head"]) == sizes(rows, [""])
    inside = [f"deep[{i}]{name}" for i in range(3) for name in ("/linear_0", "/tanh~0", "")]
    assert list(rows) == [*inside, "head", ""]

    gradients = jax.jit(jax.grad(lambda p: dp.losses.cross_entropy(net(p, X), Y)))(params)
    for i in range(3):
        row = rows[f"deep[{i}]/linear_0"]
        assert row.parameters == pytest.approx(rms(copies[i]), rel=1e-5)
        assert row.parameter_gradient == pytest.approx(
            rms(copy(gradients["deep"]["linear_0"], i)), rel=1e-5)
    assert rows["deep[0]/tanh~0"].parameters is None is rows["deep[1]"].parameter_gradient


@pytest.mark.slow
def test_wrappers_change_nothing_and_copies_side_by_side_are_taken_together():
    def net(wrap):
        return dp.serial(deep=dp.repeat(2, wrap(dp.residual(dp.linear(4) >> jnp.tanh))),
                         wide=dp.heads(2, dp.linear(5) >> jax.nn.relu), head=dp.linear(3))

    rows, params = flow(net(lambda f: f))
    wrapped, _ = flow(net(dp.remat))
    assert list(wrapped) == list(rows)
    for path, row in rows.items():
        np.testing.assert_allclose(
            np.array(wrapped[path][2:], float), np.array(row[2:], float), rtol=1e-5)

    def tail(params, h):
        wide = [jax.nn.relu(affine(copy(params["wide"]["linear_0"], i), h)) for i in range(2)]
        return affine(params["head"], jnp.concatenate(wide, -1))

    def block(own, h):
        return h + jnp.tanh(affine(own, h))

    copies = [copy(params["deep"]["body"]["linear_0"], i) for i in range(2)]
    expected = by_hand([block, block], copies, functools.partial(tail, params))
    np.testing.assert_allclose(sizes(rows, ["deep[0]", "deep[1]"]), expected, rtol=1e-5)
    # Of what `heads` joins, every number is of one of the copies.
    np.testing.assert_allclose(
        sizes(rows, ["wide"]), sizes(rows, ["wide/relu~0"]), rtol=1e-5)
    narrow, _ = flow(net(lambda f: dp.mixed(f, jnp.bfloat16)))
    np.testing.assert_allclose(
        sizes(narrow, ["deep[0]", "head"]), sizes(rows, ["deep[0]", "head"]), rtol=0.05)


@pytest.mark.slow
def test_depth_without_and_with_residual_sums_and_norms():
    """The gradient vanishes, or explodes, in the one and does neither in the other."""
    def ratio(body, scale=1.0):
        net = dp.repeat(20, body) >> dp.linear(3)
        params, _ = net.init(KEY, X)
        params["repeat_0"] = jax.tree.map(lambda a: scale * a, params["repeat_0"])
        rows, _ = flow(net, params=params)
        return rows["repeat_0[0]"].gradient / rows["repeat_0[19]"].gradient

    plain = dp.linear(4) >> jnp.tanh
    assert ratio(plain, 0.5) < 1e-6
    assert ratio(dp.linear(4), 3.0) > 1e6
    assert 0.1 < ratio(dp.residual(dp.layer_norm() >> plain)) < 30


@pytest.mark.slow
def test_a_repeated_layer_that_is_not_made_of_layers():
    rows, params = flow(dp.repeat(2, dp.repeat(3, dp.linear(4))) >> dp.linear(3))
    assert list(rows) == [*[f"repeat_0[{i}][{j}]" for i in range(2) for j in range(3)],
                          "linear_0", ""]
    assert repr(rows["repeat_0[1][2]"].layer) == "linear(4)"
    assert rows["repeat_0[1][2]"].parameters == pytest.approx(
        rms(copy(params["repeat_0"], 1, 2)), rel=1e-5)


def test_a_net_that_is_a_single_layer_or_a_repeat():
    rows, params = flow(dp.linear(3))
    assert list(rows) == [""] and rows[""].parameters == pytest.approx(rms(params), rel=1e-5)
    rows, _ = flow(dp.repeat(2, dp.linear(4) >> jnp.tanh))
    assert list(rows) == ["[0]/linear_0", "[0]/tanh~0", "[0]", "[1]/linear_0", "[1]/tanh~0", "[1]"]


def test_what_the_loss_does_not_depend_on_has_gradient_0_and_is_in_the_order_of_the_calls():
    @dp.program(late=dp.linear(3), cut=dp.linear(4), lost=dp.linear(2))
    def net(layers, x):
        y = jax.lax.stop_gradient(layers.cut(x))
        layers.lost(x)
        return layers.late(y)

    rows, _ = flow(net)
    assert list(rows) == ["cut", "lost", "late", ""]
    for path in ("cut", "lost"):
        assert rows[path].activation is None
        assert rows[path].gradient == rows[path].parameter_gradient == 0
        assert rows[path].parameters > 0


def test_several_calls_of_a_layer_have_the_mean_of_their_sizes():
    @dp.program(twice=dp.linear(4, bias=False), head=dp.linear(3))
    def net(layers, x):
        return layers.head(layers.twice(layers.twice(x)))

    rows, params = flow(net)
    kernel = params["twice"]["kernel"]
    expected = by_hand([lambda w, h: h @ w] * 2, [kernel] * 2,
                       functools.partial(affine, params["head"]))
    np.testing.assert_allclose(sizes(rows, ["twice"]), [np.mean(expected, 0)], rtol=1e-5)


@pytest.mark.slow
def test_recurrence_state_randomness_masks_and_integers():
    net = dp.serial(
        embed=dp.embedding(7, 4), run=dp.recurrent(dp.serial(dp.linear(4), dp.gru(3))),
        norm=dp.batch_norm(), drop=dp.dropout(0.5), pool=dp.collapse("mean"), head=dp.linear(3))
    ids = jnp.arange(30).reshape(6, 5) % 7
    mask = jnp.arange(5) < jnp.array([5, 4, 3, 2, 1, 5])[:, None]
    batch = {"x": ids, "y": Y, "mask": mask}
    rows, _ = flow(net, batch, key=KEY)
    assert list(rows) == ["embed", "run/linear_0", "run/gru_0", "run", "norm", "drop", "pool",
                          "head", ""]
    assert all(row.activation and row.gradient for row in rows.values())
    assert rows["norm"].activation < rows["drop"].activation  # what is kept is doubled
    with pytest.raises(dp.LayerError, match="a key when train=True"):
        flow(net, batch)
    integers = dp.serial(hide=dp.hide(), embed=dp.embedding(7, 4), pool=dp.collapse("mean"),
                         head=dp.linear(3))
    assert list(flow(integers, batch)[0]) == ["embed", "pool", "head", ""]


@pytest.mark.slow
def test_the_target_of_a_hypernetwork_has_one_row():
    net = dp.linear(4) >> dp.hyper(dp.linear(5) >> dp.linear(3), dp.linear(2))
    batch = {"x": X, "y": Y, "condition": X[:, :3]}
    params, state = net.init(KEY, X, condition=X[:, :3])
    seen = dp.inspection.gradient_flow(net, OBJECTIVE, params, batch, state=state)
    assert [row.path for row in seen.rows] == ["linear_0", "hyper_0", ""]
    assert all(row.activation and row.gradient for row in seen.rows)


@pytest.mark.slow
def test_it_prints_as_a_table():
    net = dp.repeat(2, dp.linear(4) >> jnp.tanh) >> dp.linear(3)
    params, _ = net.init(KEY, X)
    seen = dp.inspection.gradient_flow(net, OBJECTIVE, params, (X, Y))
    lines = str(seen).splitlines()
    assert lines[0].split() == ["path", "layer", "activation", "gradient", "parameters", "their",
                                "gradient"]
    assert set(lines[1]) == {"-"} and len(lines) == 2 + len(seen.rows)
    row = next(row for row in seen.rows if row.path == "repeat_0[1]/linear_0")
    (line,) = [line for line in lines if line.startswith("repeat_0[1]/linear_0 ")]
    assert line.split() == [row.path, "linear(4)", *(f"{size:.2e}" for size in row[2:])]
    (whole,) = [line for line in lines if line.startswith("repeat_0[1] ")]
    assert whole.split()[:2] == ["repeat_0[1]", "serial"] and len(whole.split()) == 4


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sizes_have_the_range_of_float32(scale):
    """The square of 1e-30 is zero in float32, and that of 1e30 infinite."""
    def objective(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch, key=key, train=train)
        return scale * jnp.sum(y), (state, {})

    net = dp.serial(dp.linear(3), dp.linear(3, bias=False))
    params, state = net.init(KEY, X)
    params["linear_1"]["kernel"] = 2 * jnp.eye(3)
    seen = dp.inspection.gradient_flow(net, objective, params, X, state=state)
    rows = {row.path: row for row in seen.rows}
    assert rows["linear_1"].gradient == pytest.approx(scale, rel=1e-5)
    assert rows["linear_0"].gradient == pytest.approx(2 * scale, rel=1e-5)
