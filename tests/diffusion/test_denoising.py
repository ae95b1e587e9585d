"""Schedules, noise, and what a net is asked for: formulas in NumPy, nets that know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import KEY, drawn

import diffprog as dp
from diffprog.diffusion.process import image_and_noise, shares

SCHEDULE = dp.diffusion.cosine_noise(50)
IMAGE = np.array([0.5, -1.0, 2.0])  # all images are this one, so that noise can be told from it


def test_the_linear_schedule_step_by_step():
    """The variance by the recursion ``x = sqrt(1 - beta) * x + sqrt(beta) * noise``."""
    signal, variance, found = 1.0, 0.0, []
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        signal, variance = signal * np.sqrt(1 - beta), (1 - beta) * variance + beta
        found.append(signal**2)
        assert abs(signal**2 + variance - 1) < 1e-12
    np.testing.assert_allclose(dp.diffusion.linear_noise(), found, rtol=1e-12)
    # Section 4 of the paper: what is left of an image says hardly anything of it, about 1e-5 bits.
    assert 3e-5 < found[-1] < 5e-5


def test_the_cosine_schedule():
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(SCHEDULE[:-1], f[1:-1] / f[0], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE[-1], 1e-3 * SCHEDULE[-2], rtol=1e-12)  # cut at 0.999
    assert f[-1] < 1e-30  # it would be no schedule


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("make", [dp.diffusion.linear_noise, dp.diffusion.cosine_noise])
def test_schedules_fall_inside_of_0_and_1(make, steps):
    schedule = make(steps)
    assert schedule.shape == (steps,) and schedule.dtype == np.float64
    assert 0 < schedule[-1] and schedule[0] < 1 and (np.diff(schedule) < 0).all()


def test_noise_is_added_by_the_share_of_each_example():
    x, noise, time = drawn(3, 2, 4), drawn(3, 2, 4, seed=1), np.array([49, 0, 20])
    wanted = np.stack([np.sqrt(SCHEDULE[t]) * x[i] + np.sqrt(1 - SCHEDULE[t]) * noise[i]
                       for i, t in enumerate(time)])
    with jax.enable_x64(True):
        y = dp.diffusion.add_noise(jnp.asarray(x), jnp.asarray(noise), SCHEDULE, jnp.asarray(time))
        assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
    assert dp.diffusion.add_noise(*jnp.ones((2, 3, 1), jnp.bfloat16), SCHEDULE,
        time).dtype == jnp.bfloat16
    beyond = dp.diffusion.add_noise(*jnp.ones((2, 3, 1)), SCHEDULE, jnp.array([50, -1, 49]))
    assert np.isnan(beyond[:, 0]).tolist() == [True, True, False]


def test_image_noise_and_velocity_give_each_other():
    image, noise, a = drawn(4, 3), drawn(4, 3, seed=1), SCHEDULE[[0, 9, 30, 48]][:, None]
    signal, spread = np.sqrt(a), np.sqrt(1 - a)
    x = signal * image + spread * noise
    # The velocity is how x changes with the angle whose cosine and sine the shares are.
    angle, bit = np.arccos(signal), 1e-6
    moved = [np.cos(angle + d) * image + np.sin(angle + d) * noise for d in (-bit, bit)]
    velocity = signal * noise - spread * image
    np.testing.assert_allclose((moved[1] - moved[0]) / (2 * bit), velocity, atol=1e-8)
    for predict, y in (("noise", noise), ("velocity", velocity)):
        found = image_and_noise(y, x, signal, spread, predict)
        np.testing.assert_allclose(found, (image, noise), rtol=0, atol=1e-9)


def knowing(predict, error=0.0):
    """A net that knows the one image, so that it knows the noise, up to an error."""

    @dp.program()
    def net(layers, x, *, time=None):
        signal, spread = shares(SCHEDULE, time, x)
        noise = (x - signal * IMAGE) / spread
        return error + (noise if predict == "noise" else signal * noise - spread * IMAGE)

    return net


@pytest.mark.parametrize("predict", ["noise", "velocity"])
def test_a_net_that_knows_the_answer_has_no_loss(predict):
    x = jnp.broadcast_to(jnp.asarray(IMAGE, jnp.float32), (64, 3))
    objective = dp.diffusion.denoising(SCHEDULE, predict=predict)
    for error, wanted in ((0.0, 0.0), (0.5, 0.25)):
        loss, (state, metrics) = objective(
            knowing(predict, error), {}, {}, x, key=KEY, train=True)
        assert abs(loss - wanted) < 1e-4 and metrics["loss"] == loss
    assert state == {} and metrics["count"] == 64 * 3


@dp.program()
def judge(layers, x, *, time=None, condition=None):
    """Says 100 where it is given no class, so that its loss says how often that was."""
    return jnp.where(condition == 7, 100.0, 0.0)[:, None] * jnp.ones_like(x)


def test_a_share_of_the_classes_is_replaced_in_training_alone():
    batch = {"x": jnp.zeros((4000, 2)), "condition": jnp.arange(4000) % 7}

    def share(train=True, **options):
        loss, _ = dp.diffusion.denoising(SCHEDULE, **options)(judge, {}, {}, batch, key=KEY,
            train=train)
        return float(loss) / 1e4

    assert abs(share(null_class=7) - 0.1) < 0.02
    assert abs(share(null_class=7, rate=0.5) - 0.5) < 0.04
    assert share(null_class=7, train=False) < 2e-4 and share(rate=0.5) < 2e-4


@pytest.mark.parametrize(("null", "wanted"), [
    ({"condition": jnp.array([7.0, 8.0])}, ([7, 8], None)), ({"condition": 7}, ([7, 7], None)),
    ({"condition": np.zeros(2), "real": jnp.array([True, False])}, ([0, 0], [1, 0])),
    ({"real": False}, (None, [0, 0]))], ids=str)
def test_what_stands_for_none_need_be_no_class(null, wanted):
    """Vectors and masks; of an example all are replaced or none, with the share of the rate."""
    seen = {}

    def forward(params, x, *, time, condition, real):
        seen.update(condition=condition, real=real)
        return x

    batch = {"x": jnp.zeros((2000, 1)), "condition": jnp.full((2000, 2), 3.0),
             "real": jnp.ones((2000, 2), bool)}
    net = dp.stateless(None, forward)
    for train in (False, True):
        dp.diffusion.denoising(SCHEDULE, null=null, rate=0.3)(net, {}, {}, batch, key=KEY,
            train=train)
        changed = [(seen[name] != batch[name]).any(-1) for name in seen]
        if not train:
            assert not np.any(changed)
    for name, other, where in zip(("condition", "real"), wanted, changed, strict=True):
        if other is None:
            assert not where.any()
            continue
        assert abs(where.mean() - 0.3) < 0.05
        assert (seen[name][where] == jnp.asarray(other)).all()
        assert seen[name].dtype == batch[name].dtype
    if None not in wanted:
        assert (changed[0] == changed[1]).all()


def test_steps_and_noise_are_drawn_by_the_key_and_at_rest_always_alike():
    @dp.program()
    def net(layers, x, *, time=None):
        return jnp.broadcast_to(time[:, None] / 25.0, x.shape)

    loss = jax.jit(lambda key: dp.diffusion.denoising(SCHEDULE)(
        net, {}, {}, jnp.zeros((8, 1)), key=key, train=True)[0])
    other = jax.random.key(1)
    assert loss(KEY) == loss(KEY) != loss(other)
    rest = [dp.diffusion.denoising(SCHEDULE)(net, {}, {}, jnp.zeros((8, 1)), key=None,
        train=False)[0]
            for _ in range(2)]
    assert rest[0] == rest[1]


def test_it_is_trained_by_fit():
    """Of all linear maps of x at one step, the one that knows the noise is the least loss."""

    @dp.program(map=dp.linear(1))
    def net(layers, x, *, time=None):
        return layers.map(x)

    x = np.random.default_rng(0).normal(size=(512, 1)).astype(np.float32) * 0.5
    step = dp.make_step(net, dp.diffusion.denoising(np.array([0.5])), optax.adam(0.05))
    fit = dp.fit(step, [x], key=KEY, steps=150, progress=False, validation=[x])
    kernel = float(fit.state.params["map"]["kernel"][0, 0])
    # E[noise | x_t] = cov / var * x_t, by hand: sqrt(1/2) / (0.25 / 2 + 1/2).
    assert abs(kernel - np.sqrt(0.5) / 0.625) < 0.03
    assert abs(fit.history[-1]["validation/loss"] - (1 - 0.5 / 0.625)) < 0.05


def test_what_is_not_real_is_not_asked_for():
    """By a mask of time, which the net need not take, and by one of targets."""
    net = dp.stateless(None, lambda params, x, *, time: 0 * x, name="silent")
    x = np.ones((3, 4, 2), np.float32)
    steps = np.arange(4) < np.array([1, 4, 2])[:, None]
    image = np.random.default_rng(0).random(x.shape) < 0.5
    noise = np.asarray(jax.random.normal(jax.random.split(KEY, 4)[2], x.shape))
    for masks, real in ((dict(mask=steps), steps[..., None] & np.ones_like(image)),
                        (dict(target_mask=image), image),
                        (dict(mask=steps, target_mask=image), steps[..., None] & image)):
        loss, (_, metrics) = dp.diffusion.denoising(SCHEDULE)(
            net, {}, {}, {"x": np.where(real, x, np.nan), **masks}, key=KEY, train=True)
        np.testing.assert_allclose(loss, (noise**2)[real].mean(), rtol=1e-5)
        assert int(metrics["count"]) == real.sum()


def test_noise_in_16_bits_has_tails():
    """P(|e| > 3) = 0.0027; drawn in bfloat16 it is 0."""
    seen = []

    def forward(params, x, *, time):
        seen.append(x)
        return x

    images = jnp.zeros((4, 256, 256), jnp.bfloat16)
    dp.diffusion.denoising(np.array([1e-6]))(
        dp.stateless(None, forward), {}, {}, images, key=KEY, train=True)
    assert seen[-1].dtype == jnp.bfloat16
    assert abs(float((jnp.abs(seen[-1].astype(jnp.float32)) > 3).mean()) - 0.0027) < 0.0004
