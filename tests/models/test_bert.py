"""The models of sequences: parameters counted and derived, and learning."""

import jax
import numpy as np
import optax
import pytest
from golden import MODELS

import diffprog as dp

KEY = jax.random.key(0)


def count(name):
    return dp.tree.count(MODELS[name].plan().params)


def linear(inputs, features):
    return inputs * features + features


def norm(width):
    return 2 * width


def attention(width):
    return 4 * linear(width, width)


def block(width):
    """Attention, a net with a hidden axis four times as wide, and their norms."""
    feed = linear(width, 4 * width) + linear(4 * width, width)
    return attention(width) + feed + 2 * norm(width)


def test_the_parameters_of_gpt_2():
    derived = (50257 + 1024) * 768 + 12 * block(768) + norm(768)
    assert count("gpt") == derived == 124_439_808


def test_the_parameters_of_bert():
    embedded = (30522 + 512 + 2) * 768 + norm(768)
    derived = embedded + 12 * block(768) + linear(768, 768)
    assert count("bert") == derived == 109_482_240
    derived += linear(768, 768) + norm(768) + 30522 + linear(768, 2)  # tokens; what follows
    assert count("bert_pretraining") == derived == 110_106_428


def test_the_parameters_of_the_vision_transformer():
    patches = linear(16 * 16 * 3, 768)
    places = 1 + (224 // 16) ** 2
    derived = patches + 768 + places * 768 + 12 * block(768) + norm(768) + linear(768, 1000)
    assert count("vit") == derived == 86_567_656


def test_the_parameters_of_llama():
    width, hidden = 4096, 11008
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    derived = 2 * 32000 * width + 32 * layer + width
    assert count("llama") == derived == 6_738_415_616


def test_the_parameters_of_the_transformer():
    decoder = block(512) + attention(512) + norm(512)
    derived = 2 * 37000 * 512 + 6 * block(512) + 6 * decoder
    assert count("transformer") == derived == 82_026_496


def test_the_parameters_of_seq2seq():
    def lstm(inputs, width):
        return linear(inputs, 4 * width) + width * 4 * width

    encoder = 50 * 16 + 2 * lstm(16, 8)
    decoder = 60 * 16 + lstm(16, 16) + attention(16) + linear(32, 16)
    assert count("seq2seq") == encoder + decoder


DRAW = np.random.default_rng(0)
NET = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}
IDS, SOURCE = DRAW.integers(0, 10, (2, 8, 6))
IDS[:, 0] = np.arange(8)  # what begins alike cannot be told apart
HIDDEN = np.arange(6) % 3 == 1
TRANSLATED = {"x": IDS, "source": SOURCE}
PAIRS = {"x": np.where(HIDDEN, 10, IDS), "y": (np.where(HIDDEN, IDS, -100), np.arange(8) % 2)}
LABELLED = {"x": IDS, "y": np.arange(8) % 4}
IMAGES = LABELLED | {"x": DRAW.normal(size=(8, 4, 4, 1)).astype(np.float32)}
READER = dp.recurrent(dp.gru(16))
# The net, its objective, a batch of eight, and how many steps it is given.
LEARN = {
    "gpt": (dp.gpt(11, length=5, **NET), dp.next_token(), IDS, 60),  # it reads five of six
    "llama": (dp.llama(11, kv_heads=1, **NET), dp.next_token(), {"x": IDS}, 60),
    "bert_pretraining": (
        dp.bert_pretraining(11, length=6, **NET), dp.masked_language(), PAIRS, 80),
    "transformer": (dp.transformer(11, 11, **NET), dp.next_token(), TRANSLATED, 60),
    "seq2seq": (dp.seq2seq(11, 11, width=16), dp.next_token(), TRANSLATED, 80),
    "vit": (dp.vit(4, image_size=4, patch_size=2, **NET), dp.classification(), IMAGES, 40),
    "sequence_classifier": (dp.sequence_classifier(11, 4, READER, width=16, how="last"),
                            dp.classification(), LABELLED, 60),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "sequence_classifier"))
    for name in LEARN])
def test_a_model_of_sequences_learns_eight_examples(name):
    net, objective, batch, steps = LEARN[name]
    step = dp.make_step(net, objective, optax.adam(1e-2))
    fit = dp.fit(step, dp.batches(batch, 8, seed=0), key=KEY, steps=steps, every=10,
                 progress=False)
    assert fit.history[-1]["loss"] < 0.05


@pytest.mark.parametrize("shape", [(1, 4, 16, 3), (1, 9, 9, 3), (1, 4, 4, 3), (8, 8)])
def test_images_of_another_size_are_refused(shape):
    """A strip of 4 x 16 has as many patches as 8 x 8, at other places."""
    net = dp.vit(4, image_size=8, patch_size=2, **NET)
    with pytest.raises(dp.LayerError) as caught:
        net.init(KEY, np.ones(shape, np.float32))
    assert caught.value.path == "images"


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1)])
def test_token_types_are_not_broadcast(shape):
    net = dp.bert(11, length=5, **NET)
    with pytest.raises(dp.LayerError, match="token_types of the shape of x"):
        net.init(KEY, np.ones((2, 5), int), token_types=np.ones(shape, int))
