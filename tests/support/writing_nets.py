"""Small language models, and their greedy decoding without a stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp

KEY = jax.random.key(0)
VOCABULARY, LONGEST = 7, 12
PROMPTS = [[3, 1, 4], [5], [2, 6, 0, 1]]
SOURCE = jnp.array([[1, 2, 3], [4, 4, 0], [2, 0, 0]])
SOURCE_MASK = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)


def recurrence(cell):
    return dp.serial(embed=dp.embedding(VOCABULARY, 6), body=dp.recurrent(cell),
                     head=dp.linear(VOCABULARY))


@dp.program(embed=dp.embedding(VOCABULARY, 8), head=dp.linear(VOCABULARY),
            body=dp.repeat(2, dp.pre_norm(dp.self_attention(2, causal=True))))
def twice(layers, x):
    """A trunk called twice: the calls share parameters, but not streams."""
    return layers.head(layers.body(jnp.tanh(layers.body(layers.embed(x)))))


DECODERS = {
    "twice": twice,
    "gpt": dp.models.gpt(VOCABULARY, length=LONGEST, width=8, depth=2, heads=2, hidden=8),
    "llama": dp.models.llama(VOCABULARY, width=8, depth=2, heads=4, kv_heads=2, hidden=8,
        tied=True),
    "llama with a window": dp.models.llama(VOCABULARY, width=8, depth=2, heads=2, hidden=8,
        window=3),
    "lstm": recurrence(dp.lstm(6) >> dp.lstm(5)),
    "gru": recurrence(dp.gru(6)),
    "convolution": dp.embedding(VOCABULARY, 6) >> dp.conv(6, 3, dims=1, padding="CAUSAL")
    >> jnp.tanh >> dp.linear(VOCABULARY),
    "mixed": dp.mixed(
        dp.models.gpt(VOCABULARY, length=LONGEST, width=8, depth=2, heads=2, hidden=8),
        jnp.float32),
}
TRANSLATORS = {
    "transformer": dp.models.transformer(5, VOCABULARY, width=8, depth=2, heads=2, hidden=8,
                                          kernel_init="lecun_normal"),
    "seq2seq": dp.models.seq2seq(5, VOCABULARY, width=6),
}
NETS = DECODERS | TRANSLATORS

# Standard deviation and seed of the noise on the parameters of each net: texts vary, and no two
# logits are so close that rounding decides.
NOISE = {"gpt": (1.0, 18), "llama": (1.5, 24), "llama with a window": (1.5, 4), "lstm": (1.5, 31),
         "gru": (1.5, 23), "convolution": (1.0, 19), "mixed": (1.0, 18), "transformer": (0.7, 16),
         "seq2seq": (1.0, 16), "twice": (0.7, 19)}


@functools.cache
def trees(name):
    """Parameters and state of a net."""
    net, x = NETS[name], jnp.zeros((1, 4), int)
    side = {"source": SOURCE[:1]} if name in TRANSLATORS else {}
    params, state = net.init(KEY, x, **side)
    leaves, structure = jax.tree.flatten(params)
    deviation, seed = NOISE[name]
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [
        a + deviation * jax.random.normal(key, a.shape)
        for a, key in zip(leaves, keys, strict=True)]), state


@functools.cache
def whole(name):
    """The jitted log-probabilities of a causal net."""
    net = NETS[name]
    return jax.jit(lambda params, ids, **side: jax.nn.log_softmax(net(params, ids, **side)))


def scores(name, rows, number=None):
    """Log-probabilities (rows, LONGEST, vocabulary) of texts; `number` is that of their source."""
    ids = np.zeros((len(rows), LONGEST), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    side = {}
    if name in TRANSLATORS:
        side = {"source": jnp.repeat(SOURCE[number : number + 1], len(rows), 0),
                "source_mask": jnp.repeat(SOURCE_MASK[number : number + 1], len(rows), 0)}
    return np.asarray(whole(name)(trees(name)[0], jnp.asarray(ids), **side))


def greedy(name, prompt, steps, number=None):
    """Tokens of greedy decoding, each by the whole prefix, and their log-probabilities."""
    row, found = list(prompt), []
    for _ in range(steps):
        likely = scores(name, [row], number)[0, len(row) - 1]
        row.append(int(likely.argmax()))
        found.append(likely.max())
    return row[len(prompt):], np.array(found)


def memory(name):
    """The encoder output of a translator as side inputs; none for a decoder."""
    if name not in TRANSLATORS:
        return {}
    encode = NETS[name].children["encoder"]
    output = encode(trees(name)[0]["encoder"], SOURCE, mask=SOURCE_MASK)
    return {"memory": output, "memory_mask": SOURCE_MASK}
