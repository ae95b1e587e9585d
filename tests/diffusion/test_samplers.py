"""Samplers on normally distributed images, whose best denoiser has a closed form.

For ``x_t = sqrt(a) * x + sqrt(1 - a) * noise`` with x ~ normal(MEAN, DEVIATION**2) the conditional
mean of the noise is linear in x_t, and so is each step. References are loops in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close

import diffprog as dp
from diffprog.diffusion.process import scales

SCHEDULE = dp.diffusion.cosine_noise(100)
MEAN, DEVIATION = 0.7, 0.4
NOISE = jax.random.normal(jax.random.key(1), (20_000, 1))


def best(a, x, deviation=DEVIATION):
    """The conditional mean of the noise in x, by the regression of noise on x."""
    return np.sqrt(1 - a) / (a * deviation**2 + 1 - a) * (x - np.sqrt(a) * MEAN)


def denoiser(predict="noise", deviation=DEVIATION, schedule=SCHEDULE):
    """The net that predicts the conditional mean."""

    @dp.program()
    def net(layers, x, *, time=None):
        signal, spread = scales(schedule, time, x)
        variance = signal**2 * deviation**2 + spread**2
        noise = spread / variance * (x - signal * MEAN)
        image = (x - spread * noise) / signal
        return noise if predict == "noise" else signal * noise - spread * image

    return net


def path(steps):
    """The visited steps, last to first: the last step of each of equal parts."""
    return [len(SCHEDULE) * i // steps - 1 for i in range(steps, 0, -1)]


def posterior(now, before, image, x):
    """Mean and variance of x one step before: the product of two normal densities.

    The prior normal(sqrt(b) * image, 1 - b), and the likelihood x ~ normal(sqrt(a/b) * x_before,
    1 - a/b).
    """
    kept = now / before
    precision = 1 / (1 - before) + kept / (1 - kept)
    mean = np.sqrt(before) * image / (1 - before) + np.sqrt(kept) * x / (1 - kept)
    return mean / precision, 1 / precision


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 7])
def test_ddpm_samples_from_the_posteriors(steps):
    """All steps are linear, so mean and variance follow a recursion."""
    mean, variance, times = 0.0, 1.0, path(steps or 100)
    for time, earlier in zip(times, [*times[1:], None], strict=True):
        now = SCHEDULE[time]

        def step(x, now=now, earlier=earlier):
            image = (x - np.sqrt(1 - now) * best(now, x)) / np.sqrt(now)
            return (image, 0.0) if earlier is None else posterior(now, SCHEDULE[earlier], image, x)

        slope = step(1.0)[0] - step(0.0)[0]
        mean, variance = step(mean)[0], slope**2 * variance + step(0.0)[1]
    found = dp.diffusion.ddpm(denoiser(), {}, NOISE, SCHEDULE, key=KEY, steps=steps)
    found = np.asarray(found, float)
    assert abs(found.mean() - mean) < 4 * np.sqrt(variance / len(NOISE))
    assert abs(found.var() / variance - 1) < 4 * np.sqrt(2 / len(NOISE))
    if steps is None:  # with all steps the distribution is that of the images
        assert abs(mean - MEAN) < 0.01 and abs(np.sqrt(variance) - DEVIATION) < 0.03


@pytest.mark.parametrize("steps", [None, 7])
def test_ddim_matches_numpy(steps):
    times = path(steps or 100)
    x = np.asarray(NOISE[:50], float)
    for time, earlier in zip(times, [*times[1:], None], strict=True):
        now, before = SCHEDULE[time], 1.0 if earlier is None else SCHEDULE[earlier]
        noise = best(now, x)
        image = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x = np.sqrt(before) * image + np.sqrt(1 - before) * noise
    found = dp.diffusion.ddim(denoiser(), {}, NOISE[:50], SCHEDULE, steps=steps)
    np.testing.assert_allclose(found, x, rtol=0, atol=2e-5)
    if steps is None:  # an image is as many deviations from the mean as its noise
        np.testing.assert_allclose(found, MEAN + DEVIATION * NOISE[:50], atol=0.05)


@pytest.mark.parametrize("steps", [None, 7])
def test_ddim_with_eta_1_equals_ddpm(steps):
    first, second = (
        sampler(denoiser(), {}, NOISE[:100], SCHEDULE, steps=steps, key=KEY)
        for sampler in (dp.diffusion.ddpm, functools.partial(dp.diffusion.ddim, eta=1.0)))
    close(first, second)


@pytest.mark.slow
def test_eta_between_0_and_1_keeps_the_distribution():
    found = dp.diffusion.ddim(denoiser(), {}, NOISE, SCHEDULE, eta=0.5, key=KEY)
    assert abs(found.mean() - MEAN) < 0.02 and abs(found.std() - DEVIATION) < 0.03
    straight = dp.diffusion.ddim(denoiser(), {}, NOISE, SCHEDULE)
    alike = np.corrcoef(found[:, 0], straight[:, 0])[0, 1]
    assert 0.05 < alike < 0.99  # some of the noise is fresh


@pytest.mark.parametrize(
    "sampler", [functools.partial(dp.diffusion.ddpm, key=KEY), dp.diffusion.ddim])
def test_predictions_of_noise_and_of_velocity_give_equal_samples(sampler):
    first, second = (
        sampler(denoiser(predict), {}, NOISE[:100], SCHEDULE, predict=predict)
        for predict in ("noise", "velocity"))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "sampler", [functools.partial(dp.diffusion.ddpm, key=KEY), dp.diffusion.ddim])
def test_all_samples_are_the_image_if_there_is_one(sampler):
    found = sampler(denoiser(deviation=0.0), {}, NOISE[:100], SCHEDULE, steps=9)
    np.testing.assert_allclose(found, MEAN, rtol=0, atol=1e-3)


@dp.program(table=dp.embedding(4, 2))
def classed(layers, x, *, time=None, condition=None, offset=None):
    """Predicts a noise that depends on the class."""
    return layers.table(condition) + 0.1 * x + (0.0 if offset is None else offset[:, None])


@pytest.mark.slow
def test_guidance_extrapolates_from_the_null_class():
    x, condition, offset = NOISE[:6].reshape(3, 2), jnp.array([0, 2, 1]), jnp.array([1.0, 0.0, 2.0])
    side = {"time": jnp.zeros(3, int), "condition": condition, "offset": offset}
    params, _ = classed.init(KEY, x, **side)
    table = params["table"]["embedding"]

    def sampled(table, **options):
        return dp.diffusion.ddim(classed, {"table": {"embedding": table}}, x, SCHEDULE, steps=5,
                       condition=condition, offset=offset, **options)

    for guidance in (0.0, 0.5, 3.0):
        beyond = table[3] + guidance * (table - table[3])
        close(sampled(table, guidance_scale=guidance, null_class=3), sampled(beyond))
    close(sampled(table, guidance_scale=1.0), sampled(table, null_class=3))


@pytest.mark.slow
def test_guidance_extrapolates_from_a_null_sequence():
    """Against the combination of two denoisers by hand."""
    def forward(params, x, *, time, memory, memory_mask):
        words = jnp.where(memory_mask[..., None], memory, 0).sum(1)
        return 0.1 * x + words

    x = NOISE[:6].reshape(3, 2)
    words = jax.random.normal(KEY, (3, 4, 2))
    valid = jnp.arange(4) < jnp.array([4, 2, 1])[:, None]
    nothing, first = jnp.array([0.5, -1.0]), jnp.arange(4) < 1

    def by_hand(params, x, *, time):
        conditional = forward(params, x, time=time, memory=words, memory_mask=valid)
        return nothing + 0.1 * x + 3.0 * (conditional - nothing - 0.1 * x)

    run = functools.partial(dp.diffusion.ddim, params={}, x=x, schedule=SCHEDULE, steps=5)
    found = run(dp.stateless(None, forward), memory=words, memory_mask=valid, guidance_scale=3.0,
                null={"memory": nothing, "memory_mask": first})
    close(found, run(dp.stateless(None, by_hand)))
    plain = functools.partial(run, dp.stateless(None, forward), memory=words, memory_mask=valid)
    close(plain(null={"memory": nothing}), plain())


@pytest.mark.slow
def test_samplers_keep_dtypes_and_run_inside_jit():
    run = jax.jit(lambda x, key: dp.diffusion.ddpm(denoiser(), {}, x, SCHEDULE, steps=5, key=key))
    close(run(NOISE[:4], KEY),
        dp.diffusion.ddpm(denoiser(), {}, NOISE[:4], SCHEDULE, steps=5, key=KEY))
    half = dp.diffusion.ddim(denoiser(), {}, NOISE[:4].astype(jnp.bfloat16), SCHEDULE, steps=5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), dp.diffusion.ddim(
        denoiser(), {}, NOISE[:4], SCHEDULE, steps=5), atol=0.05)


def test_the_size_of_the_program_does_not_grow_with_steps():
    run = functools.partial(dp.diffusion.ddim, denoiser(), {}, NOISE[:2], SCHEDULE)
    sizes = [len(str(jax.make_jaxpr(lambda n=n: run(steps=n))())) for n in (10, 99)]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sizes[0]


@pytest.mark.slow
def test_gradients_of_loop_constants_are_summed_in_float32():
    """A condition in bfloat16, used in 512 steps."""
    def forward(params, x, *, time, condition):
        return jnp.broadcast_to(condition, x.shape)

    net = dp.stateless(None, forward)
    schedule, x = dp.diffusion.linear_noise(512, beta_end=1e-3), jnp.zeros((1, 2))

    def total(condition):
        return dp.diffusion.ddim(net, {}, x, schedule, condition=condition).sum()

    wanted = jax.grad(total)(jnp.zeros(2))
    found = jax.grad(total)(jnp.zeros(2, jnp.bfloat16))
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=1e-2)
