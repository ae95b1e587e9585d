"""The window of convolutions and pools: sides, margins, what stands beyond a border."""

import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.layers.spatial import window


def test_one_number_stands_for_all_axes_and_a_tuple_sets_their_number():
    assert window.sides("stride", 2, 3) == (2, 2, 2)
    assert window.sides("stride", (1, 2), 2) == (1, 2)
    assert window.sides("extra", 0, 1, least=0) == (0,)
    assert window.window(3, 2) == (3, 3) and window.window((3, 1, 2), 2) == (3, 1, 2)
    for wrong in (0, (1, 2), 1.0, True, "2"):
        with pytest.raises(dp.LayerError, match="stride"):
            window.sides("stride", wrong, 1)
    with pytest.raises(dp.LayerError, match="1, 2 or 3 axes"):
        window.window((1, 1, 1, 1), 2)


def test_dilation_spreads_the_entries():
    assert window.extents((1, 2, 3), (4, 4, 2)) == (1, 5, 5)


def test_paddings_are_pairs():
    assert window.margins(1, 2) == ((1, 1), (1, 1)) and window.margins("SAME", 2) == "SAME"
    assert window.margins([(1, 2), (0, 3)], 2) == ((1, 2), (0, 3))
    for wrong in (-1, "same", ((1, 1),), ((1, -1), (0, 0)), (1, 2), True):
        with pytest.raises(dp.LayerError, match="padding"):
            window.margins(wrong, 2)
    x = jnp.zeros((1, 7, 6, 1))
    for margin, wanted in (("VALID", [(0, 0), (0, 0)]), ("SAME", [(1, 2), (0, 1)]),
                           ([(1, 2), (0, 3)], [(1, 2), (0, 3)])):
        assert list(window.pairs_for(margin, x, (4, 3), (2, 2))) == wanted


@pytest.mark.parametrize("mode", window.MODES)
def test_what_stands_beyond_a_border_is_what_numpy_says(mode):
    x = np.arange(12.0).reshape(1, 4, 3, 1)
    pairs = ((1, 2), (0, 1))
    np.testing.assert_array_equal(window.continued(jnp.asarray(x), pairs, mode),
                                  np.pad(x, [(0, 0), *pairs, (0, 0)], window.MODES[mode]))


def test_a_border_gives_no_more_than_it_has():
    x = jnp.zeros((1, 3, 1))
    for mode, room in (("reflect", 2), ("circular", 3)):
        assert window.continued(x, ((room, 0),), mode).shape == (1, 3 + room, 1)
        with pytest.raises(dp.LayerError, match=mode):
            window.continued(x, ((room + 1, 0),), mode)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0, 2)])
def test_batch_axes_are_free(batch):
    x = np.arange(np.prod(batch, dtype=int) * 12.0).reshape(*batch, 4, 3, 1)
    y = window.on_images(lambda x: x[:, ::2] + x.ndim, 2, jnp.asarray(x))
    np.testing.assert_array_equal(y, x[..., ::2, :, :] + 4)


def test_a_window_larger_than_its_input_is_refused():
    window.check_fits(jnp.zeros((0, 2, 1)), jnp.zeros((0, 0, 1)), "window")
    with pytest.raises(dp.LayerError, match="at least as large as the window"):
        window.check_fits(jnp.zeros((1, 2, 1)), jnp.zeros((1, 0, 1)), "window")
