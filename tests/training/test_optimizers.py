"""Optimizers against the published algorithms in NumPy, and inside and outside `make_step`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.training_nets import KEY, assert_same, examples

import diffprog as dp
from diffprog.training import adamw, layerwise_decay, muon, warmup_stable_decay

X, Y = examples()
MLP = dp.models.mlp((6, 5), 3)
DECAY = {"weight_decay": 0.3}


def drawn(shapes, seed=0):
    """Float64 arrays of these shapes."""
    draw = np.random.default_rng(seed)
    return {path: draw.normal(size=shape) for path, shape in shapes.items()}


def nested(flat):
    """Nested dicts of two levels, from paths."""
    tree = {}
    for path, leaf in flat.items():
        name, _, rest = path.partition("/")
        tree.setdefault(name, {})[rest] = leaf
    return tree


def ones(net, x):
    """Parameters of a net, all one."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), net.plan(x).params)


def moved(optimizer, params):
    """Which leaves a step without a gradient moves: a tree of booleans."""
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    return jax.tree.map(lambda update: bool(update.any()), updates)


def steps(optimizer, params, gradients):
    """The parameters after a step with each gradient, by path, in a plain loop of optax."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        opt = optimizer.init(params)
        for gradient in gradients:
            updates, opt = jax.jit(optimizer.update)(
                jax.tree.map(jnp.asarray, gradient), opt, params)
            params = optax.apply_updates(params, updates)
        return jax.device_get(dp.tree.paths(params))


def near(one, other):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], other[path], rtol=1e-9, atol=1e-12, err_msg=path)


# The published algorithms.


class Adam:
    """Loshchilov and Hutter 2019, algorithm 2; with `cautious`, Chen et al. 2025, algorithm 1."""

    def __init__(self, rate, decay, cautious=False):
        self.rate, self.decay, self.cautious = rate, decay, cautious
        self.m = self.v = self.t = 0

    def step(self, w, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        update = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        chosen = update * w >= 0 if self.cautious else True
        return w - self.rate * (update + self.decay * w * chosen)


class Muon:
    """Jordan 2024: the momentum of one matrix, orthogonalized by five Newton-Schulz steps."""

    def __init__(self, rate, decay, rms, cautious=False):
        self.rate, self.decay, self.rms, self.cautious, self.b = rate, decay, rms, cautious, 0

    def step(self, w, g):
        self.b = 0.95 * self.b + g
        rows, columns = w.shape
        scale = (self.rms * np.sqrt(max(rows, columns)) if self.rms  # Liu et al. 2025
                 else np.sqrt(max(1, columns / rows)))
        update = scale * newton_schulz(g + 0.95 * self.b)
        chosen = update * w >= 0 if self.cautious else True
        return w - self.rate * (update + self.decay * w * chosen)


def newton_schulz(g):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Stack:
    """A rule for each matrix of a leaf, which is reshaped to (count, rows, columns)."""

    def __init__(self, shape, **settings):
        self.shape, self.rules = shape, [Muon(**settings) for _ in range(shape[0])]

    def step(self, w, g):
        parts = zip(self.rules, w.reshape(self.shape), g.reshape(self.shape), strict=True)
        return np.stack([rule.step(*part) for rule, *part in parts]).reshape(w.shape)


def followed(rules, params, gradients):
    """The parameters by path after a step of its rule with each gradient."""
    for gradient in gradients:
        params = {path: rules[path].step(w, gradient[path]) for path, w in params.items()}
    return params


# AdamW.


SHAPES = {"embed/embedding": (5, 3), "body/kernel": (2, 3, 4), "body/bias": (2, 4),
          "norm/scale": (2, 4)}
GRADIENTS = [drawn(SHAPES, seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("decay", "decayed"), [
    (None, {"embed/embedding", "body/kernel"}), ("**/bias", {"body/bias"}),
    (("body/*", "norm/**"), {"body/kernel", "body/bias", "norm/scale"}), ((), set())])
def test_adamw_is_the_paper_s_with_decay_by_path(decay, decayed, cautious):
    params = drawn(SHAPES)
    optimizer = adamw(0.1, decay=decay, cautious=cautious, **DECAY)
    found = steps(optimizer, nested(params), [nested(g) for g in GRADIENTS])
    near(found, followed({path: Adam(0.1, 0.3 * (path in decayed), cautious) for path in SHAPES},
                         params, GRADIENTS))


def test_cautious_decay_differs_in_some_entries_alone():
    params = drawn(SHAPES)
    both = [steps(adamw(0.1, cautious=cautious, **DECAY), nested(params), [nested(GRADIENTS[0])])
            for cautious in (False, True)]
    same = both[0]["body/kernel"] == both[1]["body/kernel"]
    assert same.any() and not same.all()
    zero = nested(jax.tree.map(np.zeros_like, params))
    one, other = (steps(adamw(0.1, cautious=cautious, **DECAY), nested(params), [zero])
                  for cautious in (False, True))
    near(one, other)  # where Adam leaves an entry alone, it decays


def test_adamw_with_all_leaves_decaying_is_that_of_optax():
    params = nested(drawn(SHAPES))
    gradients = [nested(g) for g in GRADIENTS]
    near(steps(adamw(0.1, decay="**", **DECAY), params, gradients),
         steps(optax.adamw(0.1, **DECAY), params, gradients))


@pytest.mark.parametrize(("net", "x", "decayed"), [
    (dp.heads(2, dp.attention_head(4)), (2, 3, 4), {"query/kernel", "key/kernel", "value/kernel"}),
    (dp.ensemble(3, dp.serial(dp.layer_norm(), dp.linear(2))), (2, 4), {"linear_0/kernel"}),
    (dp.lora(dp.linear(3), 2), (2, 4), {"kernel/down", "kernel/up"}),
    (dp.weight_norm(dp.linear(3)), (2, 4), {"kernel/direction"}),
    (dp.repeat(2, dp.serial(dp.linear(4), dp.prelu())), (2, 4), {"linear_0/kernel"}),
    (dp.recurrent(dp.gru(3)), (2, 5, 4), {"input/kernel", "hidden/kernel"}),
], ids=["heads", "ensemble", "lora", "weight_norm", "repeat", "recurrent"])
def test_decay_is_found_by_name_whatever_the_axes(net, x, decayed):
    found = dp.tree.paths(moved(adamw(1.0), ones(net, jnp.ones(x))))
    assert {path for path, has in found.items() if has} == decayed


# Muon.


HIDDEN = dp.serial(
    embed=dp.embedding(7, 4), blocks=dp.repeat(2, dp.linear(4)), many=dp.heads(3, dp.linear(2)),
    norm=dp.layer_norm(), head=dp.linear(7))
IDS = jnp.ones((2, 3), int)


@pytest.mark.parametrize(("rms", "cautious"), [(0.2, False), (None, True)])
def test_muon_is_the_published_one_for_each_matrix_of_a_stack(rms, cautious):
    shapes = {path: leaf.shape for path, leaf in dp.tree.paths(HIDDEN.plan(IDS).params).items()}
    params, gradients = drawn(shapes), [drawn(shapes, seed) for seed in (1, 2, 3)]
    optimizer = muon(0.1, HIDDEN, IDS, rms=rms, adam_learning_rate=0.02, cautious=cautious, **DECAY)
    found = steps(optimizer, nested(params), [nested(g) for g in gradients])
    settings = {"rate": 0.1, "decay": 0.3, "rms": rms, "cautious": cautious}
    rules = {path: Adam(0.02, 0.3 * path.endswith(("kernel", "embedding")), cautious)
             for path in shapes}
    rules |= {"blocks/kernel": Stack((2, 4, 4), **settings),
              "many/kernel": Stack((3, 4, 2), **settings)}
    near(found, followed(rules, params, gradients))


def test_muon_takes_a_convolution_as_a_matrix_from_places_and_channels():
    net = dp.serial(see=dp.conv(5, 3, bias=False), head=dp.flatten() >> dp.linear(2, bias=False))
    image = jnp.ones((1, 4, 4, 2))
    shapes = {"see/kernel": (3, 3, 2, 5), "head/linear_0/kernel": (80, 2)}
    params, gradients = drawn(shapes), [drawn(shapes, seed) for seed in (1, 2)]
    found = steps(muon(0.1, net, image, **DECAY), nested(params), [nested(g) for g in gradients])
    rules = {"see/kernel": Stack((1, 18, 5), rate=0.1, decay=0.3, rms=0.2),
             "head/linear_0/kernel": Adam(0.1, 0.3)}
    near(found, followed(rules, params, gradients))


@pytest.mark.parametrize("decay", [None, "body/**", "**/bias"])
def test_decay_of_muon_chooses_among_all_leaves(decay):
    params = ones(MLP, X)
    assert moved(muon(1.0, MLP, X, decay=decay), params) == dp.tree.mask(
        params, decay or "**/kernel")


# In a step.

BATCH = (X, Y)
FROZEN = dp.serial(body=dp.freeze(dp.linear(6)), middle=dp.lora(dp.linear(5), 2),
                   last=dp.linear(4), head=dp.linear(3))
MAKERS = {
    "adamw": lambda net, rate=0.05, **options: adamw(rate, **options),
    "muon": lambda net, rate=0.05, **options: muon(rate, net, X, **options),
    "layerwise": lambda net, rate=0.05: optax.chain(adamw(rate), layerwise_decay(
        net, 0.5, "middle/**", "last/**", "head/**") if net is FROZEN else
        layerwise_decay(net, 0.5, "body/linear_0/**", "body/linear_1/**", "head/**")),
}


MUON_FAST = [name if name == "muon" else pytest.param(name, marks=pytest.mark.slow)
             for name in MAKERS]


def after(net, optimizer, batches):
    step = dp.make_step(net, dp.classification(), optimizer)
    begun = state = step.init(KEY, X)
    begun = jax.device_get(begun.params)
    for batch in batches:
        state, metrics = step.apply(state, batch)
    return begun, state, metrics


@pytest.mark.parametrize("name", MAKERS)
def test_each_trains_what_is_not_frozen(name):
    begun, state, metrics = after(FROZEN, MAKERS[name](FROZEN), [BATCH] * 30)
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), begun, state.params)
    assert moved == dp.tree.trainable(FROZEN, begun)
    first = dp.evaluate(dp.make_step(FROZEN, dp.classification(), optax.sgd(0.1)),
                        state._replace(params=begun), [BATCH])
    assert metrics["loss"] < 0.7 * first["loss"]


@pytest.mark.parametrize("name", MUON_FAST)
def test_each_accumulates_in_multi_steps(name):
    halves = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    _, whole, _ = after(MLP, MAKERS[name](MLP), [BATCH])
    _, parts, _ = after(MLP, optax.MultiSteps(MAKERS[name](MLP), 2), halves)
    for path, leaf in dp.tree.paths(whole.params).items():
        np.testing.assert_allclose(leaf, dp.tree.paths(parts.params)[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MUON_FAST)
def test_each_takes_a_schedule(name):
    constant = after(MLP, MAKERS[name](MLP, 0.05), [BATCH] * 2)[1]
    scheduled = after(MLP, MAKERS[name](MLP, optax.constant_schedule(0.05)), [BATCH] * 2)[1]
    assert_same(constant._replace(opt_state=()), scheduled._replace(opt_state=()), rtol=1e-6)
    halved = after(MLP, MAKERS[name](MLP, lambda step: 0.0 * step), [BATCH] * 2)
    jax.tree.map(np.testing.assert_array_equal, halved[0], jax.device_get(halved[1].params))


# Layer-wise rates.


def factors(net, x, rate, *layers):
    """What becomes of an update of ones."""
    params = ones(net, x)
    scaling = layerwise_decay(net, rate, *layers)
    return dp.tree.paths(scaling.update(params, scaling.init(params))[0])


def test_rates_decay_towards_the_input_with_one_layer_for_each_copy():
    net = dp.serial(embed=dp.embedding(7, 4), positions=dp.learned_positions(5),
                    blocks=dp.repeat(3, dp.heads(2, dp.linear(2))), head=dp.linear(7))
    found = factors(net, IDS, 0.5, ("embed/**", "positions/**"), "blocks/**", "head/**")
    distances = {"embed/embedding": 4, "positions/embedding": 4, "head/kernel": 0, "head/bias": 0,
                 "blocks/kernel": np.array([3, 2, 1]), "blocks/bias": np.array([3, 2, 1])}
    for path, away in distances.items():  # BEiT: rate ** (layers + 1 - index)
        wanted = np.reshape(0.5**away, (-1, *[1] * (found[path].ndim - 1)))
        np.testing.assert_array_equal(found[path], np.broadcast_to(wanted, found[path].shape))


def test_nested_repeats_count_their_products_and_heads_do_not():
    net = dp.heads(2, dp.repeat(2, dp.remat(dp.repeat(3, dp.linear(4)))))
    found = factors(net, X, 0.5, "**")
    assert found["kernel"].shape == (2, 2, 3, 4, 4)
    for head in found["kernel"]:
        np.testing.assert_array_equal(head[..., 0, 0], 0.5 ** np.array([[5, 4, 3], [2, 1, 0]]))


def test_rates_behind_an_optimizer_are_those_of_its_leaves():
    layers = "body/linear_0/**", "body/linear_1/**", "head/**"
    params = ones(MLP, X)
    gradients = [jax.tree.map(lambda a: 2 * a, params)] * 2
    found = steps(optax.chain(adamw(0.1), layerwise_decay(MLP, 0.5, *layers)), params, gradients)
    for away, layer in enumerate(reversed(layers)):
        own = steps(adamw(0.1 * 0.5**away), params, gradients)
        one, other = ({path: leaf for path, leaf in tree.items() if dp.tree.matches(path, layer)}
                      for tree in (found, own))
        assert one
        near(one, other)


# Schedules.


@pytest.mark.parametrize(("warmup", "stable", "decay"), [
    (4, 5, 3), (0, 5, 3), (4, 0, 3), (0, 0, 1)])
def test_the_schedule_is_its_formula(warmup, stable, decay):
    schedule = warmup_stable_decay(0.3, warmup, stable, decay)
    end = warmup + stable + decay
    for i in range(end + 3):
        wanted = 0.3 * max(0, min(i / warmup if warmup else 1, 1, (end - i) / decay))
        np.testing.assert_allclose(schedule(i), wanted, rtol=1e-6, atol=1e-9)
    assert schedule(jnp.array(warmup)) == np.float32(0.3)
