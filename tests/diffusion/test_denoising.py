"""Schedules and the objective, against formulas in NumPy and nets that know the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, drawn

import diffprog as dp
from diffprog.diffusion.process import image_and_noise, scales

SCHEDULE = dp.diffusion.cosine_noise(50)
IMAGE = np.array([0.5, -1.0, 2.0])  # the only image, so that the noise is known


def test_the_linear_schedule_matches_its_recursion():
    """The variance by the recursion ``x = sqrt(1 - beta) * x + sqrt(beta) * noise``."""
    signal, variance, found = 1.0, 0.0, []
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        signal, variance = signal * np.sqrt(1 - beta), (1 - beta) * variance + beta
        found.append(signal**2)
        assert abs(signal**2 + variance - 1) < 1e-12
    np.testing.assert_allclose(dp.diffusion.linear_noise(), found, rtol=1e-12)
    # Section 4 of the paper: the last step has about 1e-5 bits of the image.
    assert 3e-5 < found[-1] < 5e-5


def test_the_cosine_schedule():
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(SCHEDULE[:-1], f[1:-1] / f[0], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE[-1], 1e-3 * SCHEDULE[-2], rtol=1e-12)  # clipped at 0.999
    assert f[-1] < 1e-30  # without clipping it would be 0


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("make", [dp.diffusion.linear_noise, dp.diffusion.cosine_noise])
def test_schedules_decrease_in_0_1(make, steps):
    schedule = make(steps)
    assert schedule.shape == (steps,) and schedule.dtype == np.float64
    assert 0 < schedule[-1] and schedule[0] < 1 and (np.diff(schedule) < 0).all()


def test_add_noise_uses_the_step_of_each_example():
    x, noise, time = drawn(3, 2, 4), drawn(3, 2, 4, seed=1), np.array([49, 0, 20])
    wanted = np.stack([np.sqrt(SCHEDULE[t]) * x[i] + np.sqrt(1 - SCHEDULE[t]) * noise[i]
                       for i, t in enumerate(time)])
    with jax.enable_x64(True):
        y = dp.diffusion.add_noise(jnp.asarray(x), jnp.asarray(noise), SCHEDULE, jnp.asarray(time))
        assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
    narrow = dp.diffusion.add_noise(*jnp.ones((2, 3, 1), jnp.bfloat16), SCHEDULE, time)
    assert narrow.dtype == jnp.bfloat16
    beyond = dp.diffusion.add_noise(*jnp.ones((2, 3, 1)), SCHEDULE, jnp.array([50, -1, 49]))
    assert np.isnan(beyond[:, 0]).tolist() == [True, True, False]


def test_noise_and_velocity_determine_the_image():
    image, noise, a = drawn(4, 3), drawn(4, 3, seed=1), SCHEDULE[[0, 9, 30, 48]][:, None]
    signal, spread = np.sqrt(a), np.sqrt(1 - a)
    x = signal * image + spread * noise
    # The velocity is the derivative of x by the angle.
    angle, bit = np.arccos(signal), 1e-6
    moved = [np.cos(angle + d) * image + np.sin(angle + d) * noise for d in (-bit, bit)]
    velocity = signal * noise - spread * image
    np.testing.assert_allclose((moved[1] - moved[0]) / (2 * bit), velocity, atol=1e-8)
    for predict, y in (("noise", noise), ("velocity", velocity)):
        found = image_and_noise(y, x, signal, spread, predict)
        np.testing.assert_allclose(found, (image, noise), rtol=0, atol=1e-9)


def knowing(predict, error=0.0):
    """A net that knows the image, and thus the noise, up to an error."""

    @dp.program()
    def net(layers, x, *, time=None):
        signal, spread = scales(SCHEDULE, time, x)
        noise = (x - signal * IMAGE) / spread
        return error + (noise if predict == "noise" else signal * noise - spread * IMAGE)

    return net


@pytest.mark.parametrize("predict", ["noise", "velocity"])
@pytest.mark.parametrize(("error", "wanted"), [(0.0, 0.0), (0.5, 0.25)])
def test_the_loss_is_the_mean_squared_error_of_the_prediction(predict, error, wanted):
    x = jnp.broadcast_to(jnp.asarray(IMAGE, jnp.float32), (64, 3))
    objective = dp.diffusion.denoising(SCHEDULE, predict=predict)
    loss, (state, metrics) = objective(knowing(predict, error), {}, {}, x, key=KEY, train=True)
    assert abs(loss - wanted) < 1e-4 and metrics["loss"] == loss
    assert state == {} and metrics["count"] == 64 * 3


@dp.program()
def null_detector(layers, x, *, time=None, condition=None):
    """Returns 100 for the null class, so that the loss shows how often it appears."""
    return jnp.where(condition == 7, 100.0, 0.0)[:, None] * jnp.ones_like(x)


@pytest.mark.slow
def test_a_fraction_of_the_classes_is_replaced_in_training_only():
    batch = {"x": jnp.zeros((4000, 2)), "condition": jnp.arange(4000) % 7}

    def fraction(train=True, **options):
        objective = dp.diffusion.denoising(SCHEDULE, **options)
        loss, _ = objective(null_detector, {}, {}, batch, key=KEY, train=train)
        return float(loss) / 1e4

    assert abs(fraction(null_class=7) - 0.1) < 0.02
    assert abs(fraction(null_class=7, rate=0.5) - 0.5) < 0.04
    assert fraction(null_class=7, train=False) < 2e-4 and fraction(rate=0.5) < 2e-4


@pytest.mark.parametrize(("null", "wanted"), [
    ({"condition": jnp.array([7.0, 8.0])}, ([7, 8], None)), ({"condition": 7}, ([7, 7], None)),
    ({"condition": np.zeros(2), "valid": jnp.array([True, False])}, ([0, 0], [1, 0])),
    ({"valid": False}, (None, [0, 0]))], ids=str)
def test_null_values_that_are_no_classes(null, wanted):
    """Vectors and masks; a fraction `rate` of the examples has all of them replaced."""
    seen = {}

    def forward(params, x, *, time, condition, valid):
        seen.update(condition=condition, valid=valid)
        return x

    batch = {"x": jnp.zeros((2000, 1)), "condition": jnp.full((2000, 2), 3.0),
             "valid": jnp.ones((2000, 2), bool)}
    net = dp.stateless(None, forward)
    for train in (False, True):
        objective = dp.diffusion.denoising(SCHEDULE, null=null, rate=0.3)
        objective(net, {}, {}, batch, key=KEY, train=train)
        changed = [(seen[name] != batch[name]).any(-1) for name in seen]
        if not train:
            assert not np.any(changed)
    for name, other, where in zip(("condition", "valid"), wanted, changed, strict=True):
        if other is None:
            assert not where.any()
            continue
        assert abs(where.mean() - 0.3) < 0.05
        assert (seen[name][where] == jnp.asarray(other)).all()
        assert seen[name].dtype == batch[name].dtype
    if None not in wanted:
        assert (changed[0] == changed[1]).all()


@pytest.mark.slow
def test_steps_and_noise_depend_on_the_key_and_are_fixed_in_inference():
    @dp.program()
    def net(layers, x, *, time=None):
        return jnp.broadcast_to(time[:, None] / 25.0, x.shape)

    loss = jax.jit(lambda key: dp.diffusion.denoising(SCHEDULE)(
        net, {}, {}, jnp.zeros((8, 1)), key=key, train=True)[0])
    other = jax.random.key(1)
    assert loss(KEY) == loss(KEY) != loss(other)
    first, second = (dp.diffusion.denoising(SCHEDULE)(
        net, {}, {}, jnp.zeros((8, 1)), key=None, train=False)[0] for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_fit_finds_the_best_linear_denoiser():
    """The minimum of the loss over linear maps is the regression of the noise on x."""

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


@pytest.mark.slow
def test_masked_entries_have_no_loss():
    """By a mask of time steps, which the net need not take, and by one of targets."""
    net = dp.stateless(None, lambda params, x, *, time: 0 * x, name="zero")
    x = np.ones((3, 4, 2), np.float32)
    steps = np.arange(4) < np.array([1, 4, 2])[:, None]
    image = np.random.default_rng(0).random(x.shape) < 0.5
    noise = np.asarray(jax.random.normal(jax.random.split(KEY, 4)[2], x.shape))
    for masks, valid in ((dict(mask=steps), steps[..., None] & np.ones_like(image)),
                        (dict(target_mask=image), image),
                        (dict(mask=steps, target_mask=image), steps[..., None] & image)):
        loss, (_, metrics) = dp.diffusion.denoising(SCHEDULE)(
            net, {}, {}, {"x": np.where(valid, x, np.nan), **masks}, key=KEY, train=True)
        np.testing.assert_allclose(loss, (noise**2)[valid].mean(), rtol=1e-5)
        assert int(metrics["count"]) == valid.sum()


@pytest.mark.slow
def test_noise_in_16_bits_has_tails():
    """P(|noise| > 3) = 0.0027; it is 0 for noise drawn in bfloat16."""
    seen = []

    def forward(params, x, *, time):
        seen.append(x)
        return x

    images = jnp.zeros((4, 256, 256), jnp.bfloat16)
    dp.diffusion.denoising(np.array([1e-6]))(
        dp.stateless(None, forward), {}, {}, images, key=KEY, train=True)
    assert seen[-1].dtype == jnp.bfloat16
    assert abs(float((jnp.abs(seen[-1].astype(jnp.float32)) > 3).mean()) - 0.0027) < 0.0004
