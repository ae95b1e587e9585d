"""The window of convolutions and pools: edges, margins, padding modes."""

import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.layers.spatial import window


def test_an_int_sets_all_edges_and_a_tuple_sets_dims():
    assert window.edges("stride", 2, 3) == (2, 2, 2)
    assert window.edges("stride", (1, 2), 2) == (1, 2)
    assert window.edges("extra", 0, 1, least=0) == (0,)
    assert window.window(3, 2) == (3, 3)
    assert window.window((3, 1, 2), 2) == (3, 1, 2)
    with pytest.raises(dp.LayerError, match="1, 2 or 3 axes"):
        window.window((1, 1, 1, 1), 2)


@pytest.mark.parametrize("wrong", [0, (1, 2), 1.0, True, "2"])
def test_edges_must_be_positive_ints(wrong):
    with pytest.raises(dp.LayerError, match="stride"):
        window.edges("stride", wrong, 1)


def test_the_extent_includes_the_gaps_of_a_dilation():
    assert window.extents((1, 2, 3), (4, 4, 2)) == (1, 5, 5)


def test_padding_becomes_pairs():
    assert window.margins(1, 2) == ((1, 1), (1, 1))
    assert window.margins("SAME", 2) == "SAME"
    assert window.margins([(1, 2), (0, 3)], 2) == ((1, 2), (0, 3))


@pytest.mark.parametrize("wrong", [-1, "same", ((1, 1),), ((1, -1), (0, 0)), (1, 2), True], ids=str)
def test_padding_must_be_an_int_or_pairs(wrong):
    with pytest.raises(dp.LayerError, match="padding"):
        window.margins(wrong, 2)


@pytest.mark.parametrize(("margin", "wanted"), [
    ("VALID", [(0, 0), (0, 0)]), ("SAME", [(1, 2), (0, 1)]),
    ([(1, 2), (0, 3)], [(1, 2), (0, 3)])], ids=str)
def test_a_margin_has_pairs_on_x(margin, wanted):
    x = jnp.zeros((1, 7, 6, 1))
    assert list(window.pairs_for(margin, x, (4, 3), (2, 2))) == wanted


@pytest.mark.parametrize("mode", window.MODES)
def test_padding_modes_equal_numpy(mode):
    x = np.arange(12.0).reshape(1, 4, 3, 1)
    pairs = ((1, 2), (0, 1))
    np.testing.assert_array_equal(window.continued(jnp.asarray(x), pairs, mode),
                                  np.pad(x, [(0, 0), *pairs, (0, 0)], window.MODES[mode]))


@pytest.mark.parametrize(("mode", "most"), [("reflect", 2), ("circular", 3)])
def test_padding_is_limited_by_the_length_of_x(mode, most):
    x = jnp.zeros((1, 3, 1))
    assert window.continued(x, ((most, 0),), mode).shape == (1, 3 + most, 1)
    with pytest.raises(dp.LayerError, match=mode):
        window.continued(x, ((most + 1, 0),), mode)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0, 2)])
def test_batch_axes_are_free(batch):
    x = np.arange(np.prod(batch, dtype=int) * 12.0).reshape(*batch, 4, 3, 1)
    y = window.on_images(lambda x: x[:, ::2] + x.ndim, 2, jnp.asarray(x))
    np.testing.assert_array_equal(y, x[..., ::2, :, :] + 4)


def test_a_window_larger_than_its_input_raises():
    window.check_fits(jnp.zeros((0, 2, 1)), jnp.zeros((0, 0, 1)), "window")
    with pytest.raises(dp.LayerError, match="at least as large as the window"):
        window.check_fits(jnp.zeros((1, 2, 1)), jnp.zeros((1, 0, 1)), "window")
