"""AlexNet: its parameters, counted by hand."""

from support.counting import conv, count


def test_the_parameters_of_alexnet():
    convolutions = [(11, 3, 96, 1), (5, 96, 256, 2), (3, 256, 384, 1), (3, 384, 384, 2),
                    (3, 384, 256, 2)]
    linear = [(6 * 6 * 256, 4096), (4096, 4096), (4096, 1000)]
    derived = sum(conv(*c) + c[2] for c in convolutions) + sum(m * n + n for m, n in linear)
    assert count("alexnet") == derived == 60_965_224
