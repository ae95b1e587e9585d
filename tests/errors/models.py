"""Errors of models."""

from support.refusing import KEY

import diffprog as dp
from errors.given import at, floats, ints

SMALL = dict(width=4, depth=1, heads=2, hidden=4)
VIT = dp.models.vit(4, image_size=8, patch_size=2, **SMALL)
TRANSFORMER = dp.models.transformer(5, 7, **SMALL)
MEMORY = floats(2, 3, 4)


EXAMPLES = {
    "wants depth out of 18, 34, 50, 101, 152, got 20; build others from image_stem and stages of "
    "diffprog.models.resnet":
        lambda: dp.models.resnet(20),
    "stage_1/rest/residual_0 (residual(serial(conv(4, 3, padding=1, bias=False, "
    "kernel_init='he_normal_fan_out'), batch_norm(), jax.nn.relu, conv( ...): wants a body that "
    "keeps the shape of x, float32[1,8,8,5], got float32[1,8,8,4]; give it as many features, or a"
    " shortcut of the same shape":
        lambda: dp.models.resnet(18, 10, width=4, stem=dp.conv(5, 3)).init(KEY, floats(1, 8, 8, 1)),
    "wants hidden as a sequence of sizes, got 64; pass (64, 32), for example":
        lambda: dp.models.mlp(64, 10),
    "linear(0): wants features as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.models.mlp((64, 0), 10),
    "wants image_size as 4 times a power of two, got 12; resize the images: each step doubles the "
    "side":
        lambda: dp.models.dcgan_generator(12),
    "wants image_size as a multiple of patch_size=2, got 9; choose a patch_size that divides it, "
    "or crop or pad the images":
        lambda: dp.models.vit(4, image_size=9, patch_size=2, **SMALL),
    "at/images (images): wants images of 8 x 8, got float32[1,4,16,3]; resize them, or set "
    "image_size=":
        at(VIT, floats(1, 4, 16, 3)),
    "at/images (images): wants at least 3 axes (..., height, width, channels), got float32[8,8]; "
    "add the missing axes":
        at(VIT, floats(8, 8)),
    "at (bert(hide=hide(), embed=embedding(11, 4, embedding_init='truncated_normal'), "
    "types=embedding(2, 4, embedding_init='t ...): wants token_types of the shape of x, (2, 5), "
    "got int32[5]; pass one per token":
        at(dp.models.bert(11, length=5, **SMALL), ints(2, 5), token_types=ints(5)),
    "at (translate(encoder=serial(hide=hide(), embed=embedding(5, 4), scaled=scaled, "
    "positions=sinusoidal_positions(), drop=d ...): wants source or memory, got both, int32[2,3] "
    "and float32[2,3,4]; pass one of them: memory is the encoder's output for source":
        at(TRANSFORMER, ints(2, 3), source=ints(2, 3), memory=MEMORY),
    "at (translate(encoder=serial(hide=hide(), embed=embedding(5, 4), scaled=scaled, "
    "positions=sinusoidal_positions(), drop=d ...): wants source with its source_mask, got "
    "source_mask alone; pass source= too, or memory_mask= for a memory":
        at(TRANSFORMER, ints(2, 3), memory=MEMORY, source_mask=ints(2, 3)),
    "at/decoder/body/blocks/cross/body (cross_attention(2, kernel_init='glorot_uniform')): wants "
    "the side input memory, got none; pass memory=, the encoder output, in each call: only a "
    "stream keeps it":
        at(TRANSFORMER, ints(2, 3)),
    "wants width as an even int, got 5; choose another: each direction of the encoder has half "
    "of it":
        lambda: dp.models.seq2seq(5, 7, width=5),
}
