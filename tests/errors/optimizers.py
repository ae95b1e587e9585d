"""What optimizers and schedules refuse."""

import jax
import jax.numpy as jnp
from support.refusing import X

import diffprog as dp
from diffprog.training import adamw, layerwise_decay, muon, muon_partition, warmup_stable_decay

NET = dp.serial(embed=dp.embedding(7, 4), blocks=dp.repeat(2, dp.linear(4)), head=dp.linear(3))
IDS = jnp.ones((2, 5), int)
SUM = dp.residual(dp.linear(4)) >> dp.residual(dp.linear(4))
PARAMS = NET.plan(IDS).params


def begun(optimizer, params=PARAMS):
    """The optimizer begins on these parameters."""
    return lambda: jax.eval_shape(optimizer.init, params)


def layerwise(*layers):
    return begun(layerwise_decay(NET, 0.5, *layers))


EXAMPLES = {
    "wants a pattern that matches a path (blocks/bias, blocks/kernel, embed/embedding, head/bias, "
    "head/kernel), got '**/weight'; correct it: * is one level, ** any number":
        begun(adamw(0.1, decay="**/weight")),
    "wants a leaf named b, base, bias, direction, down, embedding, embeddings, kernel, offset, "
    "scale, up, w, or decay=, got table, float32[2,4]; pass decay= the paths of the leaves that "
    "decay, such as '**/kernel'":
        begun(adamw(0.1), {"table": X}),
    "wants a net, as in muon_partition(net, x), got {}; pass the layer whose init made the "
    "parameters":
        lambda: muon_partition({}, X),
    "wants one last map for each output, or adam=, which names them, got an output behind a sum or "
    "a loop (residual_0/body/kernel, residual_1/body/kernel); pass adam= the paths of the kernels "
    "that are no hidden ones, or adam=() if all are hidden":
        lambda: muon(0.1, SUM, X),
    "wants parameters of the net given to muon (residual_0/body/bias, residual_0/body/kernel, "
    "residual_1/body/bias, residual_1/body/kernel), got blocks/bias; pass muon the net that is "
    "trained":
        begun(muon(0.1, SUM, X, adam=())),
    "wants a net, as in layerwise_decay(net, rate, *layers), got 0.5; pass the layer whose init "
    "made the parameters":
        lambda: layerwise_decay(0.5, "**"),
    "wants rate as a positive number, got 0; pass 0.75, for example":
        lambda: layerwise_decay(NET, 0, "**"),
    "wants each leaf in one layer, got several for head/bias; narrow the patterns of one of them":
        layerwise("embed/**", "blocks/**", "**/bias", "head/**"),
    "wants each leaf in one layer, got none for embed/embedding; add a pattern, or several for one "
    "layer: ('embed/**', 'norm/**')":
        layerwise("blocks/**", "head/**"),
    "wants leaves of equally many copies in a layer, got '**', of 1, 2; write two patterns: each "
    "copy in a repeat is a layer":
        layerwise("**"),
    "wants peak as a positive number, got -1.0; pass 1e-3, for example":
        lambda: warmup_stable_decay(-1.0, 1, 1, 1),
    "wants decay as an int of at least 1, got 0; pass 1 or more":
        lambda: warmup_stable_decay(0.1, 1, 1, 0),
}
