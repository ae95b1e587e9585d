"""Errors of schedules, denoisers and samplers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.refusing import KEY

import diffprog as dp
from errors.given import floats, ints, traced

SCHEDULE = dp.diffusion.cosine_noise(10)
SMALL = dict(widths=(4, 8), depth=1, attention=(), groups=2)
UNET = dp.models.unet(1, classes=3, **SMALL)
X, TIME = floats(2, 4, 4, 1), ints(2)


@dp.program()
def plain(layers, x, *, time=None, condition=None):
    return x


@dp.program()
def doubled(layers, x, *, time=None):
    return jnp.concatenate([x, x], -1)


def drawn(net, x=X, sampler=dp.diffusion.ddim, schedule=SCHEDULE, **options):
    """A call of a sampler."""
    return traced(functools.partial(sampler, net, {}, schedule=schedule), x, **options)


def asked(net, batch, **options):
    """The denoising objective of a batch."""
    objective = dp.diffusion.denoising(SCHEDULE, **options)
    return lambda: jax.eval_shape(
        lambda batch: objective(net, {}, {}, batch, key=KEY, train=True), batch)


EXAMPLES = {
    # Schedules.
    "wants beta_start in (0, 1), got 0.0; pass a fraction of the variance":
        lambda: dp.diffusion.linear_noise(10, beta_start=0.0),
    "wants beta_end in (0, 1), got 1; pass a fraction of the variance":
        lambda: dp.diffusion.linear_noise(10, beta_end=1),
    "wants offset of at least 0, got -0.1; pass 0.008, as the paper does":
        lambda: dp.diffusion.cosine_noise(10, offset=-0.1),
    "wants steps as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.diffusion.cosine_noise(0),
    "wants a schedule (steps,) that decreases in (0, 1), got [0.9, 0.0]; pass "
    "cosine_noise(1000), for example":
        lambda: dp.diffusion.denoising([0.9, 0.0]),
    "wants a schedule (steps,) that decreases in (0, 1), got float64[10]; pass "
    "cosine_noise(1000), for example":
        lambda: dp.diffusion.denoising(SCHEDULE[::-1]),
    "wants a schedule (steps,) that decreases in (0, 1), got float64[3]; pass "
    "cosine_noise(1000), for example":
        drawn(plain, schedule=np.array([1.0, 0.5, 0.2])),
    "wants a schedule (steps,) that decreases in (0, 1), got float64[2]; pass "
    "cosine_noise(1000), for example":
        drawn(plain, sampler=dp.diffusion.ddpm, schedule=np.array([np.nan, 0.5]), key=KEY),
    # The objective.
    "wants noise of shape (2, 3) and time of shape (2,), got float32[3] and int32[2]; draw noise "
    "for each number of x":
        traced(dp.diffusion.add_noise, floats(2, 3), floats(3), schedule=SCHEDULE, time=TIME),
    "wants predict out of noise, velocity, got 'image'; choose one of them":
        lambda: dp.diffusion.denoising(SCHEDULE, predict="image"),
    "wants rate in [0, 1), got 1.0; pass a fraction, not a percentage":
        lambda: dp.diffusion.denoising(SCHEDULE, null_class=3, rate=1.0),
    "wants a net that takes time, got one that takes none; name it in a program: (layers, x, *, "
    "time=None)":
        asked(dp.linear(1), X),
    "wants a net that returns the shape of x, (2, 4, 4, 1), got float32[2,4,4,2]; give it as many "
    "output features as x has":
        asked(doubled, X),
    "wants a batch with x and side inputs of the net (condition), got labels, x; rename or remove "
    "the rest: time and noise are drawn":
        asked(plain, {"x": X, "labels": TIME}),
    "wants a condition of one class for each image, ints (batch,), got float32[2,2]; pass labels, "
    "or null={...} in place of null_class":
        asked(plain, {"x": X, "condition": floats(2, 2)}, null_class=3),
    'wants a condition in each batch with null_class, got none; pass {"x": images, '
    '"condition": labels}':
        asked(plain, X, null_class=3),
    "wants a null_class or null, got both; pass null alone: it may hold the class":
        lambda: dp.diffusion.denoising(SCHEDULE, null_class=3, null={"condition": 3}),
    "wants null as side inputs of one example, got float32[2]; pass "
    'null={"condition": jnp.zeros(8)}, for example':
        drawn(plain, null=jnp.zeros(2)),
    "wants memory in each batch with null, got condition; add it to the batch, or remove it from "
    "null":
        asked(plain, {"x": X, "condition": TIME}, null={"memory": 0.0}),
    "wants null condition for one example, float32[2], got float32[3]; give it the shape and "
    "kind of dtype of one example":
        asked(plain, {"x": X, "condition": floats(2, 2)}, null={"condition": jnp.zeros(3)}),
    "wants null condition for one example, int32[], got float32[]; give it the shape and kind "
    "of dtype of one example":
        asked(plain, {"x": X, "condition": TIME}, null={"condition": 0.5}),
    # Samplers.
    "wants eta in [0, 1], got 2; pass 0 for no fresh noise, 1 for as much as in ddpm":
        drawn(plain, eta=2),
    "wants a key for an eta above 0, got none; pass key=jax.random.key(seed)":
        drawn(plain, eta=0.5),
    "wants at most 10 steps, those of the schedule, got 11; lower it":
        drawn(plain, steps=11),
    "wants a null_class for guidance, or null, got none; pass the null_class= or null= "
    "of denoising":
        drawn(plain, guidance_scale=3.0, condition=TIME),
    "wants a condition for guidance, got none; pass condition=labels":
        drawn(plain, guidance_scale=3.0, null_class=3),
    # Denoisers.
    "told (time_and_class(time=serial(body=serial(linear(16), jax.nn.silu), head=linear(16)), "
    "classes=embedding(4, 16))): wants time as ints of shape (2,), got none; pass one per image":
        lambda: UNET.init(KEY, X),
    "told (time_and_class(time=serial(body=serial(linear(16), jax.nn.silu), head=linear(16)), "
    "classes=embedding(4, 16))): wants condition as ints of shape (2,), got float32[2]; pass one "
    "per image":
        lambda: UNET.init(KEY, X, time=TIME, condition=floats(2)),
    "told (time_and_class(time=serial(body=serial(linear(16), jax.nn.silu), head=linear(16)))): "
    "wants no condition, for a net without classes, got int32[2]; build the net with classes=10, "
    "for example":
        lambda: dp.models.unet(1, **SMALL).init(KEY, X, time=TIME, condition=TIME),
    "at (unet(told=time_and_class(time=serial(body=serial(linear(16), jax.nn.silu), "
    "head=linear(16)), classes=embedding(4, 16 ...): wants images with sides that are multiples "
    "of 2, got float32[2,4,5,1]; pad or crop them":
        lambda: dp.serial(at=UNET).init(KEY, floats(2, 4, 5, 1), time=TIME),
    "wants widths as a sequence of sizes, got 64; pass (64, 128), for example":
        lambda: dp.models.unet(1, widths=64),
    "wants attention at levels from 1 to 2, got 3; leave it out, or add widths":
        lambda: dp.models.unet(1, **SMALL | {"attention": (3,)}),
    "wants width as a multiple of 4, got 6; choose another: sine and cosine of row and column "
    "have a quarter each":
        lambda: dp.models.dit(1, width=6),
}
