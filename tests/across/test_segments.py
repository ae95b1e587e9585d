"""Sequences that share a row: each is as if it were alone, whole and in a stream."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn
from support.refusing import refused

import diffprog as dp

# Four sequences, of 3, 2, 2 and 3 steps, in two rows; what is padding has the id of a neighbour.
SEGMENTS = np.array([[3, 3, 3, 8, 8, 8, 8], [6, 1, 1, 6, 6, 6, 6]])
MASK = np.array([[1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0]], bool)
PLACES = {3: [(0, slice(0, 3)), (1, slice(3, 6))], 2: [(0, slice(4, 6)), (1, slice(1, 3))]}
CUTS = [0, 1, 4, 5, 7]


@dp.program(cell=dp.recurrent(dp.gru(4)))
def twice(layers, x):
    return layers.cell(jnp.tanh(layers.cell(x)))


def causal(**options):
    return dp.conv(4, 3, dims=1, padding="CAUSAL", **options)


STREAMS = {
    "gru": dp.recurrent(dp.gru(3)),
    "a cell of layers": dp.recurrent(dp.residual(dp.linear(4) >> dp.lstm(4)), unroll=2),
    "a cell that caches": dp.recurrent(dp.serial(
        lambda x: x[:, None], dp.self_attention(2, causal=True, bias=False, window=3),
        lambda y: y[:, 0])),
    "recurrence in copies": dp.repeat(2, dp.heads(2, dp.recurrent(dp.simple_rnn(2)))),
    "called twice": twice,
    "conv": causal(),
    "conv, dilated, in groups": causal(dilation=2, groups=2),
    "conv of one step": dp.conv(3, 1, dims=1, padding="CAUSAL"),
    "depthwise": dp.depthwise_conv(2, dims=1, padding="CAUSAL", multiplier=2),
    "learned": dp.learned_positions(8),
    "sinusoidal": dp.sinusoidal_positions(),
    "attention": dp.self_attention(2, causal=True, rotary=dp.rotary()),
    "all": dp.serial(causal(), dp.residual(dp.self_attention(1, causal=True, window=2)),
                     dp.learned_positions(8), dp.remat(dp.recurrent(dp.gru(4))), causal()),
}
WHOLE = {
    "backwards": dp.recurrent(dp.lstm(2), reverse=True),
    "both ways": dp.recurrent(dp.gru(2), bidirectional=True),
    "conv, same": dp.conv(3, 4, dims=1),
    "conv, padded": dp.conv(3, 3, dims=1, dilation=2, padding=((1, 3),)),
    "depthwise, same": dp.depthwise_conv(3, dims=1),
    "max_pool": dp.max_pool(3, dims=1, stride=1, padding="SAME"),
    "avg_pool": dp.avg_pool(3, dims=1, stride=1, padding=1),
    "avg_pool, all counted": dp.avg_pool(2, dims=1, stride=1, padding="SAME", count_padding=True),
    "batch_norm": dp.batch_norm(),
}


def together(run, x):
    """What `run` gives of each sequence by itself, in its place in the rows."""
    y = jnp.zeros((*x.shape[:2], run(x[:, :2]).shape[-1]), x.dtype)
    for places in PLACES.values():
        alone = run(jnp.stack([x[row, steps] for row, steps in places]))
        for (row, steps), part in zip(places, alone, strict=True):
            y = y.at[row, steps].set(part)
    return y


def streamed(net, params, x, cuts, **side):
    state, outputs = net.start(params, {}, x[:, :1], length=x.shape[1]), []
    for begin, end in itertools.pairwise(cuts):
        part = {name: value[:, begin:end] for name, value in side.items()}
        y, state = net.apply(params, state, x[:, begin:end], **part)
        outputs.append(y)
    return jnp.concatenate(outputs, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STREAMS, *WHOLE])
def test_each_segment_has_the_value_and_gradient_of_a_separate_sequence(name):
    net = (STREAMS | WHOLE)[name]
    with jax.enable_x64(True):
        x = jnp.asarray(drawn(2, 7, 4))
        params, state = net.init(KEY, x)
        seen = {"segments": jnp.asarray(SEGMENTS), "mask": jnp.asarray(MASK)}
        given = {n: seen[n] for n in seen.keys() & net.side}
        broken = jnp.where(MASK[..., None], x, jnp.nan if "mask" in net.side else 0)

        def total(params, x, run):
            y = jnp.where(MASK[..., None], run(params, x), 0)
            return jnp.sum(jnp.sin(y)), y

        def slopes(run):
            return jax.jit(jax.value_and_grad(lambda p, x: total(p, x, run), (0, 1), has_aux=True))

        run = lambda params, x, **side: net(params, x, state=state, **side)  # noqa: E731
        wanted = slopes(lambda p, x: together(lambda part: run(p, part), x))(params, x)
        close(slopes(lambda p, x: run(p, x, **given))(params, broken), wanted)
        if name in STREAMS:
            close(slopes(lambda p, x: streamed(net, p, x, CUTS, **given))(params, broken), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "conv", "learned", "attention", "both ways"])
def test_without_a_mask_every_step_is_of_its_segment(name):
    net, x = (STREAMS | WHOLE)[name], jnp.asarray(drawn(2, 7, 4), jnp.float32)
    params, _ = net.init(KEY, x)
    run = jax.jit(net)
    y = run(params, x, segments=jnp.asarray(SEGMENTS).at[1, 0].set(0))
    for row, begin, end in ((0, 0, 3), (0, 3, 7), (1, 0, 1), (1, 1, 3), (1, 3, 7)):
        close(y[row, begin:end], run(params, x[row : row + 1, begin:end])[0])


@pytest.mark.slow
def test_episodes_begin_where_the_last_is_done():
    done = np.array([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1]], bool)
    net, x = dp.recurrent(dp.gru(3)), drawn(2, 6, 4).astype(np.float32)
    params, _ = net.init(KEY, x)
    step = jax.jit(dp.gru(3).apply)
    y = np.zeros((2, 6, 3), np.float32)
    for row, t in np.ndindex(2, 6):
        carry = jnp.zeros((1, 3)) if t == 0 or done[row, t] else y[row : row + 1, t - 1]
        y[row, t] = step(params, {"hidden": carry}, x[row : row + 1, t])[0][0]
    episodes = jnp.cumsum(done, 1)
    close(jax.jit(net)(params, x, segments=episodes), y)
    close(streamed(net, params, x, [0, 2, 3, 6], segments=episodes), y)


@pytest.mark.slow
def test_a_chunk_between_chunks_with_segments_continues_the_last_segment():
    net, x = STREAMS["all"], jnp.asarray(drawn(2, 6, 4), jnp.float32)
    params, state = net.init(KEY, x)
    apply = jax.jit(net.apply)
    state = net.start(params, state, x, length=6)
    segments = jnp.array([[7, 7, 2, 2, 2, 2], [1, 1, 1, 1, 1, 3]])
    y = [None] * 3
    y[0], state = apply(params, state, x[:, :3], segments=segments[:, :3])
    y[1], state = apply(params, state, x[:, 3:5])
    y[2], state = apply(params, state, x[:, 5:], segments=segments[:, 5:])
    close(jnp.concatenate(y, 1), jax.jit(net)(params, x, segments=segments))


@pytest.mark.slow
def test_a_stream_has_one_structure_with_segments_or_without():
    net, x = STREAMS["all"], jnp.asarray(drawn(2, 2, 4), jnp.float32)
    params, state = net.init(KEY, x)
    state = net.start(params, state, x, length=4)
    shapes = [jax.eval_shape(lambda given: net.apply(params, state, x, **given)[1], given)
              for given in ({}, {"segments": jnp.zeros((2, 2), int)})]
    assert shapes[0] == shapes[1] == jax.eval_shape(lambda: state)


@pytest.mark.slow
def test_the_first_segment_has_the_carry_that_is_given():
    net, x = dp.recurrent(dp.gru(3)), jnp.asarray(drawn(2, 4, 4), jnp.float32)
    params, _ = net.init(KEY, x)
    state = net.start(params, {}, x, length=4)
    state["hidden"] = jnp.full((2, 3), 0.5)
    segments = jnp.array([[9, 9, 9, 9], [9, 9, 4, 4]])
    y, _ = net.apply(params, state, x, segments=segments)
    whole, _ = net.apply(params, state, x)
    close(y[0], whole[0])
    close(y[1, :2], whole[1, :2])
    close(y[1, 2:], net(params, x[1:, 2:])[0])
    by_hand = {"hidden": state["hidden"]}  # it serves, but knows no segment
    close(net.apply(params, by_hand, x)[0], whole)
    assert refused(net.apply, params, by_hand, x, segments=segments).got == "hidden"


@pytest.mark.parametrize("name", ["gru", "both ways", "conv", "conv, same", "max_pool", "avg_pool"])
def test_nan_does_not_reach_another_segment(name):
    net, x = (STREAMS | WHOLE)[name], jnp.asarray(drawn(2, 7, 4), jnp.float32)
    params, _ = net.init(KEY, x)
    run = jax.jit(net)
    broken = run(params, x.at[0, :3].set(jnp.nan), segments=jnp.asarray(SEGMENTS))
    close(broken[0, 3:], run(params, x, segments=jnp.asarray(SEGMENTS))[0, 3:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "sinusoidal", "attention", "all"])
def test_a_packed_stream_continues_after_the_last_valid_step(name):
    """Positions that are given rise and fall; the next one follows the last, not the largest."""
    net, x = STREAMS[name], jnp.asarray(drawn(2, 8, 4), jnp.float32)
    params, _ = net.init(KEY, x)
    apply = jax.jit(net.apply)
    packed = {"segments": jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 2]]),
              "positions": jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 0]]),
              "mask": jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0]], bool)}
    state = net.start(params, {}, x, length=8)
    if name == "all":  # what is padding keeps its place in a convolution
        packed["mask"] = jnp.ones((2, 6), bool)
        packed["positions"] = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 0]])
        own = [x[:1, 3:8], x[1:, 5:8]]
    else:
        own = [x[:1, [3, 4, 6, 7]], x[1:, [2, 4, 6, 7]]]
    _, state = apply(params, state, x[:, :6], **packed)
    y = []
    for t in (6, 7):
        part, state = apply(params, state, x[:, t : t + 1])
        y.append(part)
    for row, alone in enumerate(own):
        close(jnp.concatenate(y, 1)[row], jax.jit(net)(params, alone)[0, -2:])


MIXING = {
    "collapse": dp.collapse("mean"), "global_avg_pool": dp.global_avg_pool(dims=1),
    "adaptive_max_pool": dp.adaptive_max_pool(2, dims=1), "flatten": dp.flatten(),
    "reshape": dp.reshape((2, -1)), "patches": dp.patches(2, dims=1),
    "upsample": dp.upsample(2, dims=1), "group_norm": dp.group_norm(2, dims=1),
    "instance_norm": dp.instance_norm(dims=1),
    "conv_transpose": dp.conv_transpose(3, 2, dims=1, stride=2),
    "conv, stride": dp.conv(3, 3, dims=1, stride=2),
    "conv, valid": dp.conv(3, 3, dims=1, padding="VALID"),
    "conv, shorter": dp.conv(3, 3, dims=1, padding=((1, 0),)),
    "conv, ring": dp.conv(3, 3, dims=1, padding_mode="circular"),
    "max_pool": dp.max_pool(2, dims=1), "avg_pool": dp.avg_pool(3, dims=1, stride=1),
}
@pytest.mark.slow
def test_bert_reads_packed_texts_and_gives_the_first_as_a_whole():
    net, x = dp.models.bert(11, length=4, width=8, depth=1,
        heads=2), jnp.array([[3, 1, 4, 1, 5, 9]])
    params, _ = net.init(KEY, x[:, :4])
    run = jax.jit(net)
    y, whole = run(params, x, segments=jnp.array([[0, 0, 0, 0, 1, 1]]))
    first, second = run(params, x[:, :4]), run(params, x[:, 4:])
    close((y[:, :4], y[:, 4:], whole), (first[0], second[0], first[1]))


ON_IMAGES = {
    "conv": dp.conv(4, 3), "max_pool": dp.max_pool(2), "group_norm": dp.group_norm(2),
    "pixel_shuffle": dp.pixel_shuffle(2), "upsample": dp.upsample(2),
}


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_segments_refuse_them(name):
    net = dp.serial(dp.residual(dp.self_attention(1)), last=MIXING[name])
    x, segments = jax.ShapeDtypeStruct((2, 6, 4), jnp.float32), jnp.zeros((2, 6), int)
    assert net.plan(x).y.shape
    error = refused(net.plan, x, segments=segments)
    assert error.path == "last" and "segments" in error.wants
    assert refused(dp.repeat(1, net).plan, x, segments=segments).path.endswith("last")


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_IMAGES)
def test_layers_of_images_refuse_segments(name):
    x = jax.ShapeDtypeStruct((2, 6, 4, 4), jnp.float32)
    error = refused(dp.serial(at=ON_IMAGES[name]).plan, x, segments=jnp.zeros((2, 6), int))
    assert error.wants == "no segments"
