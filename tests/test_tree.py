"""Paths and patterns, and the tools that speak of some parameters by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffprog as dp

PARAMS = {
    "kernel": 0,
    "embed": {"kernel": 1},
    "blocks": {
        "attend": {"query": {"kernel": 2, "bias": 3}, "out": {"kernel": 4, "bias": 5}},
        "kernel_norm": {"scale": 6},
    },
    "blocks_2": {"kernel": 7},
    "a.b": {"bias": 8},
}


def found(*patterns, tree=PARAMS):
    return set(dp.tree.select(tree, *patterns))


def test_paths_name_every_leaf():
    assert dp.tree.paths(PARAMS) == {
        "kernel": 0, "embed/kernel": 1, "blocks/attend/query/kernel": 2,
        "blocks/attend/query/bias": 3, "blocks/attend/out/kernel": 4, "blocks/attend/out/bias": 5,
        "blocks/kernel_norm/scale": 6, "blocks_2/kernel": 7, "a.b/bias": 8,
    }
    assert dp.tree.paths({"a": [1, (2, 3)]}) == {"a/0": 1, "a/1/0": 2, "a/1/1": 3}
    assert dp.tree.paths({}) == {}


@pytest.mark.parametrize(("pattern", "wanted"), [
    ("embed/kernel", {"embed/kernel"}),
    ("*/kernel", {"embed/kernel", "blocks_2/kernel"}),
    ("**/kernel", {"kernel", "embed/kernel", "blocks/attend/query/kernel",
                   "blocks/attend/out/kernel", "blocks_2/kernel"}),
    ("blocks/**", {"blocks/attend/query/kernel", "blocks/attend/query/bias",
                   "blocks/attend/out/kernel", "blocks/attend/out/bias",
                   "blocks/kernel_norm/scale"}),
    ("kernel/**", {"kernel"}),  # none included
    ("**/attend/**", {"blocks/attend/query/kernel", "blocks/attend/query/bias",
                      "blocks/attend/out/kernel", "blocks/attend/out/bias"}),
    ("embed/**/kernel", {"embed/kernel"}),
    ("blocks/**/kernel", {"blocks/attend/query/kernel", "blocks/attend/out/kernel"}),
    ("blocks/*/*/bias", {"blocks/attend/query/bias", "blocks/attend/out/bias"}),
    ("**/query/*", {"blocks/attend/query/kernel", "blocks/attend/query/bias"}),
    ("**/**/bias", {"blocks/attend/query/bias", "blocks/attend/out/bias", "a.b/bias"}),
    ("blocks*/kernel", {"blocks_2/kernel"}),
    ("*_*/*", {"blocks_2/kernel"}),
    ("*", {"kernel"}),
    ("**", set(dp.tree.paths(PARAMS))),
    ("a.b/*", {"a.b/bias"}),
])
def test_a_pattern_selects(pattern, wanted):
    assert found(pattern) == wanted


def test_select_gives_leaves_in_the_order_of_the_tree():
    assert dp.tree.select(PARAMS, "**/out/*", "embed/*") == {
        "blocks/attend/out/bias": 5, "blocks/attend/out/kernel": 4, "embed/kernel": 1}
    assert list(dp.tree.select(PARAMS, "kernel", "a.b/bias")) == ["a.b/bias", "kernel"]


def test_several_patterns_add_up():
    assert found("kernel", "*/kernel", "embed/*") == {"kernel", "embed/kernel", "blocks_2/kernel"}


@pytest.mark.parametrize("pattern", [
    "head/kernel", "**/head/**", "block/**", "embed", "*/*/kernel", "embed/*/kernel", "kernel/*",
    "a?b/*", "axb/*", "Embed/kernel", ".*", "", "embed/", "/kernel",
])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(dp.LayerError, match="a pattern that matches a path") as caught:
        dp.tree.select(PARAMS, "embed/kernel", pattern)
    assert repr(pattern) in str(caught.value) and "embed/kernel" in str(caught.value)
    with pytest.raises(dp.LayerError):
        dp.tree.mask(PARAMS, pattern)


def test_stacking_adds_no_level():
    net = dp.serial(blocks=dp.repeat(3, dp.residual(dp.linear(4))))
    params, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((2, 4)))
    assert {path: leaf.shape for path, leaf in dp.tree.paths(params).items()} == {
        "blocks/body/kernel": (3, 4, 4), "blocks/body/bias": (3, 4)}


def test_a_mask_has_the_structure_of_the_tree():
    mask = dp.tree.mask(PARAMS, "**/bias", "kernel")
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    true = {path for path, flag in dp.tree.paths(mask).items() if flag}
    assert true == found("**/bias", "kernel")
    assert set(map(type, jax.tree.leaves(mask))) == {bool}


@pytest.mark.slow
def test_a_mask_freezes():
    net = dp.serial(body=dp.linear(4), head=dp.linear(3))
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2))), jnp.array([0, 1, 2, 0, 1])
    frozen = lambda params: dp.tree.mask(params, "body/**")  # noqa: E731
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen))
    step = dp.make_step(net, dp.classification(), optimizer, donate=False)
    before = step.init(jax.random.key(0), x)
    after, _ = step.apply(before, (x, y))
    moved = {path: bool((a != b).any()) for (path, a), b in zip(
        dp.tree.paths(before.params).items(), jax.tree.leaves(after.params), strict=True)}
    assert moved == {"body/bias": False, "body/kernel": False,
                     "head/bias": True, "head/kernel": True}


def test_count_adds_up_sizes_real_or_abstract():
    tree = {"a": np.ones((2, 3)), "b": [jnp.ones(5), jnp.ones(())]}
    assert dp.tree.count(tree) == 12
    assert dp.tree.count(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))) == 12
    assert dp.tree.count(jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)) == 1 << 40
    assert dp.tree.count({}) == 0


def test_nonfinite_names_the_leaves():
    tree = {"a": {"nan": jnp.array([[1.0, jnp.nan]]), "fine": jnp.ones(2)},
            "inf": jnp.array([jnp.inf]), "minus": jnp.array(-jnp.inf),
            "bf16": jnp.array([jnp.nan, 0], jnp.bfloat16), "int": jnp.arange(3),
            "empty": jnp.zeros(0), "largest": jnp.array(jnp.finfo(jnp.float32).max)}
    assert set(dp.tree.nonfinite(tree)) == {"a/nan", "inf", "minus", "bf16"}
    assert dp.tree.nonfinite({"a": jnp.ones(2), "i": np.arange(2)}) == []


def with_leaf(params, path, leaf):
    """A copy of the tree with one leaf put in; None takes it out."""
    first, *rest = path.split("/")
    if rest:
        return params | {first: with_leaf(params.get(first, {}), "/".join(rest), leaf)}
    others = {name: value for name, value in params.items() if name != first}
    return others if leaf is None else others | {first: leaf}


@pytest.mark.parametrize(("path", "leaf", "message"), [
    ("head/kernel", jnp.ones((4, 5)), r"head/kernel as float32\[4,3\], got float32\[4,5\]"),
    ("head/kernel", jnp.ones((4, 1)), r"head/kernel as float32\[4,3\]"),
    ("head/bias", jnp.ones(3, jnp.bfloat16), r"head/bias as float32\[3\], got bfloat16\[3\]"),
    ("head/bias", None, "params with head/bias"),
    ("head/scale", jnp.ones(3), "params without head/scale"),
    ("tail/kernel", jnp.ones(3), "params without tail/kernel"),
    ("head", None, "params with head/"),
    ("head/kernel/base", jnp.ones((4, 3)), "params with head/kernel"),
])
def test_verify_finds_the_difference(path, leaf, message):
    net, x = dp.serial(norm=dp.batch_norm(), head=dp.linear(3)), jnp.ones((2, 4))
    params, state = net.init(jax.random.key(0), x)
    dp.tree.verify(net, params, x, state=state)
    if "/base" in path:  # a subtree where a leaf should be
        params = with_leaf(params, "head/kernel", None)
    with pytest.raises(dp.LayerError, match=message):
        dp.tree.verify(net, with_leaf(params, path, leaf), x, state=state)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: {}, "state with norm/mean"),
    (lambda state: {"norm": {"mean": state["norm"]["mean"]}}, "state with norm/var"),
    (lambda state: with_leaf(state, "norm/var", jnp.ones(5)), "state norm/var as"),
    (lambda state: with_leaf(state, "norm/count", jnp.ones(())), "state without norm/count"),
], ids=["empty", "without a leaf", "another shape", "another leaf"])
def test_verify_compares_the_state_if_it_is_given(change, message):
    net, x = dp.serial(norm=dp.batch_norm(), head=dp.linear(3)), jnp.ones((2, 4))
    params, state = net.init(jax.random.key(0), x)
    dp.tree.verify(net, params, x)
    with pytest.raises(dp.LayerError, match=message):
        dp.tree.verify(net, params, x, state=change(state))


def test_verify_compares_with_the_input_too():
    net = dp.serial(head=dp.linear(3))
    params, _ = net.init(jax.random.key(0), jnp.ones((2, 4)))
    dp.tree.verify(net, params, jax.ShapeDtypeStruct((7, 4), jnp.float32))
    with pytest.raises(dp.LayerError, match=r"head/kernel as float32\[5,3\]"):
        dp.tree.verify(net, params, jax.ShapeDtypeStruct((2, 5), jnp.float32))
