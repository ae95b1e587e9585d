"""`Flowchart`: what is drawn is valid Mermaid text, whatever the labels hold."""

import pytest
from support import mermaid

from diffprog.inspection.flowcharts import Flowchart


def small():
    chart = Flowchart()
    a = chart.sheet.node(["a"], "end")
    box = chart.sheet.box("copies x 3")
    b = box.node(["b", "f(x)"], "layer")
    chart.arrow(a, b, "float32[2]")
    chart.arrow(a, b, "float32[3]")
    chart.arrow(a, b, "float32[2]")
    chart.arrow(a, box, "bool[2]", "mask")
    chart.arrow(a, box, "int32[2]", "segments", silent=True)
    chart.arrow(None, b, "float32[2]")
    return chart


def test_the_text_of_a_flowchart_is_mermaid():
    assert str(small()) == """flowchart TD
    n0(["a"])
    subgraph b1["copies x 3"]
        n2["b<br>f(x)"]
    end
    n0 -->|"float32[2], float32[3]"| n2
    n0 -.->|"mask: bool[2], int32[2]"| b1"""
    assert mermaid.faults(str(small())) == []


@pytest.mark.parametrize("label", [
    'say "hi"', "<lambda f.py:3>", "a & b", "#1", "`code`", "*args", "end", "+", "1 -->|x| 2", "%%",
    "f(x)[0]{1}", "subgraph", "\N{MINUS SIGN}", "kernel_init='zeros'"])
def test_any_label_is_escaped_and_read_as_it_was(label):
    chart = Flowchart()
    box = chart.sheet.box(label)
    ends = [box.node([label], kind) for kind in ("layer", "closed", "end", "operation", "symbol")]
    chart.arrow(ends[0], ends[-1], label)
    assert mermaid.faults(str(chart)) == []
    assert mermaid.edges(str(chart)) == [(label, label, label, False)]
    assert mermaid.boxes(str(chart)) == {label: (label,)}


@pytest.mark.parametrize(("old", "new", "fault"), [
    ("flowchart TD", "graph", "it does not begin with flowchart TD"),
    ('"b<br>f(x)"', "b<br>f(x)", "n2[b<br>f(x)] is no line"),
    ('"b<br>f(x)"', '"b"f(x)"', 'n2["b"f(x)"] is no line'),
    ('"b<br>f(x)"', '"#1"', 'n2["#1"] is no line'),
    ('"b<br>f(x)"', '"<lambda>"', 'n2["<lambda>"] is no line'),
    ('"b<br>f(x)"', '"+"', 'n2["+"] begins a list'),
    ("    end\n", "", "boxes and ends differ in number"),
    ("n2[", "n0[", "n0 is declared twice"),
    ("| n2", "| n7", "n7 is not declared"),
    ("n0 -->", "n0 --", 'n0 --|"float32[2], float32[3]"| n2 is no line'),
    ("        n2", "    n2", 'n2["b<br>f(x)"] is not indented'),
])
def test_the_grammar_can_refuse(old, new, fault):
    text = str(small())
    assert old in text
    assert fault in mermaid.faults(text.replace(old, new))
