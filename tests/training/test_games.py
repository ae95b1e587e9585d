"""Games: exact trajectories, statistics, inner steps, keys, purity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.training_nets import KEY, assert_same

import diffprog as dp

NUMBER = dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1:])}, lambda p, x: p["scale"] * x)
BOTH = dp.serial(point=NUMBER, rival=NUMBER)
ONE = jnp.ones(1)

# Two nets with statistics; the noise is in the batch, so that updates can be done by hand.
PAIR = dp.serial(maker=dp.linear(3) >> dp.batch_norm(),
                 judge=dp.serial(up=dp.linear(4), norm=dp.batch_norm(), out=dp.linear(1)))


def product(sign, net, params, state, batch, *, key, train):
    """The product of two numbers: one player minimizes it, the other maximizes it."""
    value = (params["point"]["scale"] * params["rival"]["scale"]).sum()
    return sign * value, (state, {"loss": sign * value})


def judged(net, params, state, batch, *, train):
    """Logits of real and of generated examples, and the state after both."""
    maker, judge = net.children.values()
    made, after = maker.apply(params["maker"], state["maker"], batch["z"], train=train)
    real, seen = judge.apply(params["judge"], state["judge"], batch["x"], train=train)
    fake, seen = judge.apply(params["judge"], seen, made, train=train)
    return real, fake, {"maker": after, "judge": seen}


def tell(net, params, state, batch, *, key, train):
    real, fake, state = judged(net, params, state, batch, train=train)
    loss = jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    return loss, (state, {"loss": loss})


def fool(net, params, state, batch, *, key, train):
    _, fake, state = judged(net, params, state, batch, train=train)
    loss = jax.nn.softplus(-fake).mean()
    return loss, (state, {"loss": loss})


def batch_of(count, seed=0):
    draw = np.random.default_rng(seed)
    return {"x": draw.normal(size=(count, 3)).astype(np.float32),
            "z": draw.normal(1.0, size=(count, 2)).astype(np.float32)}


@functools.cache  # tests share the compiled programs
def game(judge_steps=1, **options):
    return dp.training.make_game(
        PAIR, {"judge": dp.training.Player(tell, optax.sgd(0.1), judge_steps),
               "maker": dp.training.Player(fool, optax.sgd(0.05, momentum=0.9))},
        inputs=lambda batch: batch["z"], **options)


def begun(step=None):
    return (step or game(donate=False)).init(KEY, batch_of(4)["z"])


def close(one, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), one, other)


# exact trajectories


@pytest.mark.parametrize("simultaneous", [False, True])
def test_the_bilinear_game_follows_its_matrix(simultaneous):
    """min_x max_y x * y by gradients: a spiral outwards if simultaneous, an ellipse if not."""
    rate, steps = 0.3, 40
    players = {"point": dp.training.Player(functools.partial(product, 1.0), optax.sgd(rate)),
               "rival": dp.training.Player(functools.partial(product, -1.0), optax.sgd(rate))}
    step = dp.training.make_game(BOTH, players, simultaneous=simultaneous)
    last, metrics = jax.lax.scan(step.apply, step.init(KEY, ONE), None, length=steps)
    found = [float(last.params[name]["scale"][0]) for name in players]

    matrix = np.array([[1, -rate], [rate, 1 if simultaneous else 1 - rate**2]])
    np.testing.assert_allclose(found, np.linalg.matrix_power(matrix, steps) @ [1, 1], rtol=1e-4)
    if simultaneous:  # each step is a rotation and a growth
        np.testing.assert_allclose(np.hypot(*found), (2 * (1 + rate**2) ** steps) ** 0.5, rtol=1e-4)
    else:  # x**2 - rate * x * y + y**2 never changes
        np.testing.assert_allclose(found[0]**2 - rate * found[0] * found[1] + found[1]**2,
                                   2 - rate, rtol=1e-4)
    assert int(last.step) == steps
    np.testing.assert_allclose(metrics["point/loss"][0], 1.0)
    np.testing.assert_allclose(metrics["rival/loss"][0], -(1 if simultaneous else 1 - rate))


def test_a_gradient_penalty_is_differentiated_twice():
    """WGAN-GP of a linear critic w: the gradient in x is w, so every update has a closed form."""
    rate, weight, w = 0.1, 10.0, np.array([0.5, -1.0, 2.0])

    def distance(net, params, state, batch, *, key, train):
        critic = lambda x: net.children["critic"](params["critic"], x)[..., 0]  # noqa: E731
        real, fake = batch
        between = real + jax.random.uniform(key, (len(real), 1)) * (fake - real)
        slope = jnp.linalg.norm(jax.vmap(jax.grad(critic))(between), axis=-1)
        loss = critic(fake).mean() - critic(real).mean() + weight * jnp.square(slope - 1).mean()
        return loss, (state, {"loss": loss})

    step = dp.training.make_game(dp.serial(critic=dp.linear(1, bias=False)),
                        {"critic": dp.training.Player(distance, optax.sgd(rate))},
                        inputs=lambda b: b[0])
    real, fake = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    state = step.init(KEY, real)._replace(params={"critic": {"kernel": jnp.asarray(w[:, None])}})
    state, _ = step.apply(state, (real, fake))
    length = np.linalg.norm(w)
    slope = fake.mean(0) - real.mean(0) + weight * 2 * (length - 1) * w / length
    np.testing.assert_allclose(state.params["critic"]["kernel"][:, 0], w - rate * slope, rtol=1e-4)


# statistics and inner steps


@pytest.mark.slow
def test_a_player_updates_only_its_own_statistics():
    batch, before = batch_of(12), begun()
    after, _ = game(donate=False).apply(before, batch)

    def moved(stats, x):
        return {"mean": 0.9 * np.asarray(stats["mean"]) + 0.1 * x.mean(0),
                "var": 0.9 * np.asarray(stats["var"]) + 0.1 * x.var(0, ddof=1)}

    def linear(params, x):
        return x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])

    raw = linear(before.params["maker"]["linear_0"], batch["z"])
    made = (raw - raw.mean(0)) / np.sqrt(raw.var(0) + 1e-5)
    # The judge sees real, then generated examples; its call by the maker is discarded.
    wanted = before.state["judge"]["norm"]
    for x in (batch["x"], made):
        wanted = moved(wanted, linear(before.params["judge"]["up"], x))
    close(after.state["judge"]["norm"], wanted, rtol=1e-4, atol=1e-5)
    # The maker's are updated once, in its own turn, not when it generates for the judge.
    wanted = moved(before.state["maker"]["batch_norm_0"], raw)
    close(after.state["maker"]["batch_norm_0"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inner_steps_are_updates_on_parts_of_the_batch():
    batch, before = batch_of(12), begun()
    after, metrics = game(3, donate=False).apply(before, batch)

    params, state, losses = before.params, before.state, []

    parts = [jax.tree.map(lambda a, i=i: a[4 * i : 4 * i + 4], batch) for i in range(3)]
    gradient = {name: jax.jit(_gradient(name, objective))
                for name, objective in (("judge", tell), ("maker", fool))}
    for part in parts:
        (loss, (new, _)), slope = gradient["judge"](params, state, part)
        params = params | {"judge": jax.tree.map(lambda p, g: p - 0.1 * g, params["judge"], slope)}
        state = state | {"judge": new["judge"]}
        losses.append(float(loss))
    (loss, (new, _)), slope = gradient["maker"](params, state, parts[0])
    params = params | {"maker": jax.tree.map(lambda p, g: p - 0.05 * g, params["maker"], slope)}
    close(after.params, params, rtol=1e-4, atol=1e-6)
    close(after.state, state | {"maker": new["maker"]}, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["judge/loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["maker/loss"], loss, rtol=1e-5)
    # A metric without count is weighted by the examples.
    assert float(metrics["count/judge/loss"]) == 12 and float(metrics["count/maker/loss"]) == 4


def _gradient(name, objective):
    def loss(own, params, state, part):
        return objective(PAIR, params | {name: own}, state, part, key=None, train=True)

    slope = jax.value_and_grad(loss, has_aux=True)
    return lambda params, state, part: slope(params[name], params, state, part)


@pytest.mark.parametrize(("layer", "loops"), [(dp.linear(2), True), (dp.conv(2, 1), False)])
def test_inner_steps_with_a_convolution_are_unrolled_on_cpu(layer, loops):
    def loss(net, params, state, x, *, key, train):
        value = jnp.square(net(params, x)).mean()
        return value, (state, {"loss": value})

    step = dp.training.make_game(dp.serial(only=layer),
        {"only": dp.training.Player(loss, optax.sgd(0.1), 2)})
    x = jnp.ones((4, 1, 1, 3))
    text = step.apply.trace(step.init(KEY, x), x).lower(lowering_platforms=("cpu",)).as_text()
    assert ("stablehlo.while" in text) == loops


def test_metrics_are_weighted_by_their_counts():
    def score(net, params, state, x, *, key, train):
        return 0 * params["point"]["scale"].sum(), (state, {
            "loss": x.mean(), "hits": x.sum(), "count": x.sum(), "count/hits": jnp.float32(0)})

    step = dp.training.make_game(dp.serial(point=NUMBER),
        {"point": dp.training.Player(score, optax.sgd(0.1), 2)})
    _, metrics = step.apply(step.init(KEY, ONE), jnp.array([1.0, 3.0]))
    assert {name: float(value) for name, value in metrics.items()} == {
        "point/loss": 2.5, "count/point/loss": 4.0, "point/hits": 0.0, "count/point/hits": 0.0}


# keys, purity, and `fit`


@pytest.mark.slow
def test_every_update_has_its_own_key():
    def wander(net, params, state, x, *, key, train):
        loss = (params["point"]["scale"] + params["rival"]["scale"]).sum() * jax.random.normal(key)
        return loss, (state, {"loss": loss})

    def walked(steps, count):
        step = dp.training.make_game(BOTH, {name: dp.training.Player(wander, optax.sgd(1.0), steps)
                                   for name in ("point", "rival")})
        state, places = step.init(KEY, ONE), []
        for _ in range(count):
            state, _ = step.apply(state, jnp.ones(2))
            places += [float(state.params[name]["scale"][0]) for name in ("point", "rival")]
        return np.array(places)

    x1, y1, x2, y2 = walked(1, 2)
    assert len({x1 - 1, y1 - 1, x2 - x1, y2 - y1}) == 4  # of each player, in each step
    inner = walked(2, 1)
    assert abs(inner[0] - 1 - 2 * (x1 - 1)) > 1e-3  # and in each inner step
    np.testing.assert_array_equal(inner, walked(2, 1))


def test_a_game_is_a_pure_step():
    step, batch = game(), batch_of(8)
    init, apply = step
    assert init is step.init and apply is step.apply and step.net is PAIR
    batches = jax.tree.map(lambda a: a.reshape(2, 4, -1), batch)
    scanned, metrics = jax.lax.scan(step.apply, begun(step), batches)
    looped = begun(step)
    for i in range(2):
        old = looped
        looped, last = step.apply(looped, jax.tree.map(lambda a, i=i: a[i], batches))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))  # donated
    assert_same(scanned, looped, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["maker/loss"][1], last["maker/loss"], rtol=1e-4)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(looped.params)} == {"float32"}


def test_fit_plays_a_game():
    batch = batch_of(4)
    fit = dp.fit(game(), [batch], key=KEY, steps=3, validation=[batch], log_every=3, progress=False)
    assert fit.history[0].keys() == {
        "step", "judge/loss", "maker/loss", "validation/judge/loss", "validation/maker/loss"}
    looped = begun(game())
    for _ in range(3):
        looped, _ = game().apply(looped, batch)
    assert_same(fit.state, looped, rtol=1e-5, atol=1e-6)
    rest = dp.evaluate(game(), fit.state, [batch])
    loss, _ = fool(PAIR, looped.params, looped.state, batch, key=None, train=False)
    np.testing.assert_allclose(rest["maker/loss"], loss, rtol=1e-5)


@pytest.mark.slow
def test_noise_in_inference_is_the_same_each_time():
    def noisy(net, params, state, x, *, key, train):
        loss = params["point"]["scale"].sum() + jax.random.normal(key)
        return loss, (state, {"loss": loss})

    step = dp.training.make_game(dp.serial(point=NUMBER),
        {"point": dp.training.Player(noisy, optax.sgd(0.0))})
    state = step.init(KEY, ONE)
    first = dp.evaluate(step, state, [ONE])
    assert first == dp.evaluate(step, state, [ONE])
    state, metrics = step.apply(state, ONE)
    assert first == dp.evaluate(step, state, [ONE]) != {"point/loss": float(metrics["point/loss"])}


def test_fit_raises_when_a_player_diverges():
    with pytest.raises(dp.LayerError, match=r"a finite judge/loss, got nan by step 1"):
        dp.fit(game(), [batch_of(4) | {"x": np.full((4, 3), np.nan, np.float32)}], key=KEY,
               steps=1, progress=False)


def test_frozen_parameters_of_a_player_do_not_decay():
    number = dp.stateless(lambda key, x: {"scale": jnp.ones(1), "bias": jnp.ones(1)},
                          lambda params, x: params["scale"] * x + params["bias"], name="number")
    step = dp.training.make_game(dp.serial(point=dp.freeze(number, "bias"), rival=number), {
        name: dp.training.Player(functools.partial(product, sign),
            optax.adamw(0.1, weight_decay=0.5))
        for name, sign in (("point", 1), ("rival", -1))}, donate=False)
    before = step.init(KEY, jnp.ones(1))
    after, _ = step.apply(before, jnp.ones(1))
    assert after.params["point"]["bias"] == 1 and after.params["rival"]["bias"] < 1
    assert after.params["point"]["scale"] != 1
    assert dp.tree.count(after.opt_state["point"]) < dp.tree.count(after.opt_state["rival"])
