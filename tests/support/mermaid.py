"""Is a text a flowchart that Mermaid draws? The part of its grammar that diagrams are written in.

The grammar was compared with Mermaid 11 itself, which is no Python package: what is refused here is
refused or drawn wrongly by it.
"""

import re

ENTITY = r"#(?:\d+|quot|amp|lt|gt);"
LABEL = rf'"((?:[^"#`<>&*\n]|<br>|{ENTITY})+)"'
NODE = re.compile(rf"(n\d+)(?:\[{LABEL}\]|\[\[{LABEL}\]\]|\(\[{LABEL}\]\)|\({LABEL}\)|"
                  rf"\(\({LABEL}\)\))")
BOX = re.compile(rf"subgraph (b\d+)\[{LABEL}\]")
ARROW = re.compile(rf"([nb]\d+) (?:-->|-\.->)\|{LABEL}\| ([nb]\d+)")
LIST = re.compile(r"(?:[-+*]|\d+[.)])(?: |$)")  # what Markdown would take for a list


def faults(text):
    """What is wrong with the text, in words."""
    first, *lines = text.split("\n")
    wrong = [] if first == "flowchart TD" else ["it does not begin with flowchart TD"]
    declared, depth, used = [], 0, []
    for line in lines:
        bare = line.strip()
        wrong += [f"{bare} is not indented"] * (len(line) - len(bare) != 4 * (depth + 1)
                                                - 4 * (bare == "end"))
        if match := NODE.fullmatch(bare):
            declared.append(match[1])
            wrong += [f"{bare} begins a list"
                      for label in match.groups()[1:] if label and LIST.match(label)]
        elif match := BOX.fullmatch(bare):
            declared.append(match[1])
            depth += 1
        elif bare == "end":
            depth -= 1
        elif match := ARROW.fullmatch(bare):
            used += [match[1], match[3]]
        else:
            wrong.append(f"{bare} is no line")
    wrong += ["boxes and ends differ in number"] * (depth != 0)
    wrong += [f"{name} is declared twice" for name in set(declared) if declared.count(name) > 1]
    return wrong + [f"{name} is not declared" for name in sorted({*used} - {*declared})]


def edges(text):
    """(start, end, label, dotted) of every arrow, places by their labels."""
    names = {}
    for line in text.split("\n"):
        if match := NODE.fullmatch(line.strip()) or BOX.fullmatch(line.strip()):
            names[match[1]] = plain(next(filter(None, match.groups()[1:])))
    return [(names[m[1]], names[m[3]], plain(m[2]), "-.->" in m[0])
            for m in map(ARROW.fullmatch, map(str.strip, text.split("\n"))) if m]


def boxes(text):
    """Label of every node and box -> the titles of the boxes around it, from the outside."""
    around, found = [], {}
    for line in map(str.strip, text.split("\n")):
        if match := NODE.fullmatch(line):
            found.setdefault(plain(next(filter(None, match.groups()[1:]))), tuple(around))
        elif match := BOX.fullmatch(line):
            around.append(plain(match[2]))
        elif line == "end":
            around.pop()
    return found


def plain(label):
    """The label as it is read."""
    words = {"quot": '"', "amp": "&", "lt": "<", "gt": ">"}
    return re.sub(ENTITY, lambda m: words.get(m[0][1:-1]) or chr(int(m[0][1:-1])),
                  label.replace("<br>", " "))
