"""The sequence classifier learns."""

from support.learning import LABELLED, learns

import diffprog as dp


def test_it_learns_eight_examples():
    net = dp.models.sequence_classifier(11, 4, dp.recurrent(dp.gru(16)), width=16, method="last")
    learns(net, dp.classification(), LABELLED, 60)
