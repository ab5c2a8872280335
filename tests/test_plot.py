# SPDX-License-Identifier: MIT
"""draw: well-formed, self-contained, nothing over anything else, and grey until computed."""

import errno
import itertools
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import chainrule as cr
from test_gradcheck import Affine, Sine, quartic

SVG = "{http://www.w3.org/2000/svg}"

# ---- geometry, read off the finished picture -----------------------------------------------------

# Widths in font sizes of DejaVu Sans, the widest sans-serif that readers commonly have.
WIDE = dict.fromkeys("mMW…→@%", 1.0) | dict.fromkeys("il.,:'|()[] fjtI1¹-", 0.42)


def extent(text):
    """(left, top, right, bottom) of a text element."""
    size, x, y = (float(text.get(name)) for name in ("font-size", "x", "y"))
    width = size * sum(WIDE.get(c, 0.64) for c in text.text) * (1.08 if text.get("font-weight") else 1)
    left = x if text.get("text-anchor") == "start" else x - width / 2
    return left, y - 0.78 * size, left + width, y + 0.24 * size


def overlaps(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def boxes(root, kind):
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") == f"cr-{kind}":
            x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            yield x, y, x + w, y + h


def segments(root):
    """The straight pieces of all arrows, as thin boxes."""
    for path in root.iter(f"{SVG}path"):
        if path.get("class").endswith("-line"):
            numbers = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d"))
            points = [(float(x), float(y)) for x, y in numbers]
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                yield min(x0, x1) - 0.8, min(y0, y1) - 0.8, max(x0, x1) + 0.8, max(y0, y1) + 0.8


def inside(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def assert_tidy(drawing):
    root = ElementTree.fromstring(str(drawing))
    texts = [(text.text, extent(text)) for text in root.iter(f"{SVG}text")]
    assert texts
    canvas = tuple(float(v) for v in root.get("viewBox").split())
    for name, box in texts:
        assert inside(box, canvas), f"{name!r} leaves the picture"
    for (name, a), (other, b) in itertools.combinations(texts, 2):
        assert not overlaps(a, b), f"{name!r} over {other!r}"
    frames = [*boxes(root, "box"), *boxes(root, "off")]
    for a, b in itertools.combinations(frames, 2):
        assert not overlaps(a, b)
    for name, text in texts:
        assert all(inside(text, frame) for frame in frames if overlaps(text, frame)), f"{name!r} on an edge"
        assert not any(overlaps(text, line) for line in segments(root)), f"an arrow through {name!r}"
    lines = list(segments(root))
    for frame, line in itertools.product(frames, lines):
        assert not overlaps(frame, line), "an arrow through a box"
    return root


def network(depth, width, rng):
    """`depth` layers, Linear and activations in turn, of this width and of 3: few weights, wide values."""
    layers, inputs = [], width
    for index in range(depth):
        if index % 2:
            layers.append([cr.ReLU(), cr.LeakyReLU(), cr.Dropout(0.25), cr.LogSoftmax()][index // 2 % 4])
        else:
            outputs = 3 if inputs == width else width
            layers.append(cr.Linear(inputs, outputs, bias=index % 4 == 0))
            inputs = outputs
    return cr.Sequential(*layers, seed=int(rng.integers(100)))


@pytest.mark.parametrize("width", [1, 2, 5, 64, 2048])
@pytest.mark.parametrize("depth", range(1, 13))
def test_nothing_overlaps(depth, width, rng):
    net = network(depth, width, rng)
    x = rng.standard_normal(width) * 10.0 ** rng.integers(-12, 12)
    y = rng.standard_normal(net.out_features)
    assert_tidy(cr.draw(net))
    assert_tidy(cr.draw(net, x))
    assert_tidy(cr.draw(net, loss="mse"))
    root = assert_tidy(cr.draw(net, x, y, "mse"))
    assert len(list(boxes(root, "box"))) == depth + 1 and not list(boxes(root, "off"))


@pytest.mark.parametrize("per_row", [1, 2, 3, 5, 12, 40])
def test_nothing_overlaps_however_long_the_rows_are(per_row, rng):
    net = network(12, 7, rng)
    assert_tidy(cr.draw(net, per_row=per_row))
    root = assert_tidy(
        cr.draw(net, rng.standard_normal(7), np.ones(net.out_features), "mse", per_row=per_row)
    )
    tops = {y for _, y, _, _ in boxes(root, "box")}
    assert len(tops) == -(-13 // per_row)


def test_long_names_are_made_to_fit(rng):
    class ARatherLongNameForALayerOfOnesOwn(Sine):
        pass

    def a_loss_that_was_given_a_name_that_says_it_all(f, y):
        return quartic(f, y)

    net = cr.Sequential(cr.Linear(2, 4), ARatherLongNameForALayerOfOnesOwn(), Affine(4, 50000))
    root = assert_tidy(cr.draw(net, [1, 2], np.zeros(50000), a_loss_that_was_given_a_name_that_says_it_all))
    assert "ARatherLongN" in " ".join(text.text for text in root.iter(f"{SVG}text"))
    three = Affine(4, 2)
    three.params["another_parameter"] = np.zeros((3, 4, 5))
    assert_tidy(cr.draw(cr.Sequential(three)))


# ---- what is shown -------------------------------------------------------------------------------


@pytest.fixture
def net():
    return cr.mlp([2, 3, 1], activation="tanh", seed=0)


def texts_of(drawing, kind):
    root = ElementTree.fromstring(str(drawing))
    return [text.text for text in root.iter(f"{SVG}text") if text.get("class") == f"cr-{kind}"]


def shown(values):
    return [f"{v:.3g}".replace("-", "−") for v in np.ravel(values)]


def test_values_and_cotangents_are_those_of_the_network(net):
    """Against the trace and the gradient of the engine: ∂L/∂b of a Linear is its cotangent ∂L/∂φ."""
    drawing = cr.draw(net, [1.0, 2.0], 0.5, "mse")
    phi = net.trace([[1.0, 2.0]]).phi
    value, grads = net.value_and_grad([[1.0, 2.0]], [0.5], loss="mse")
    assert [t for t in texts_of(drawing, "forward") if t[0] != "L"] == shown(np.hstack(phi))
    assert f"L = {value:.4g}" in texts_of(drawing, "forward")
    reverse = texts_of(drawing, "reverse")
    dx = grads["0.bias"] @ net.state_dict()["0.weight"]
    assert reverse[:2] == shown(dx) and reverse[2:5] == shown(grads["0.bias"])
    assert shown(np.linalg.norm(grads["0.weight"]))[0] in reverse and "∂L/∂L = 1" in reverse
    assert "not computed" not in str(drawing)


@pytest.mark.parametrize(
    ("arguments", "state", "grey"),
    [
        ({}, "structure", 8 + 4),
        ({"x": [1.0, 2.0]}, "forward", 4 + 4),
        ({"x": [1.0, 2.0], "loss": "mse"}, "forward", 4 + 4),
    ],
)
def test_what_is_not_computed_is_grey_and_not_zero(arguments, state, grey, net):
    """Four values, four cotangents, two gradients for each of two layers; and a line in the legend."""
    drawing = cr.draw(net, **arguments)
    assert drawing.description.endswith(f"; {state}")
    assert texts_of(drawing, "muted").count("not computed") == grey + 1
    assert not [t for t in texts_of(drawing, "reverse") if re.search(r"\d", t)]


def test_a_value_of_zero_is_written_down():
    net = cr.Sequential(cr.Linear(2, 1, init="zeros"))
    assert texts_of(cr.draw(net, [0.0, 0.0], [0.0], "mse"), "reverse").count("0") == 5  # 2 dx, df, ‖dW‖, ‖db‖


def test_edges_carry_their_sizes(net):
    assert [t for t in texts_of(cr.draw(net), "muted") if t[0] == "ℝ"] == ["ℝ²", "ℝ³", "ℝ³", "ℝ¹"]


def test_long_vectors_are_a_few_bars(rng):
    """28 groups of neighbours at most, and the extremes written below."""
    net = cr.Sequential(cr.Linear(2048, 1, init="zeros"))
    x = rng.standard_normal(2048)
    drawing = cr.draw(net, x)
    bars = [p.get("d") for p in ElementTree.fromstring(str(drawing)).iter(f"{SVG}path")]
    assert max(d.count("z") for d in bars) == 28
    assert f"{x.min():.2g} … {x.max():.2g}".replace("-", "−") in texts_of(drawing, "forward")
    assert len(str(drawing)) < 10_000


def test_values_that_are_not_finite_are_drawn():
    class Hole(Sine):
        def forward(self, x):
            return np.where(x > 0, np.inf, np.nan)

    drawing = cr.draw(cr.Sequential(cr.Linear(5, 5), Hole()), np.ones(5))
    assert_tidy(drawing)


# ---- the file ------------------------------------------------------------------------------------


def test_self_contained_and_accessible(net):
    drawing = cr.draw(net, [1.0, 2.0], 0.5, "mse")
    root = ElementTree.fromstring(str(drawing))
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    named = {node.get("id"): node.text for node in root if node.get("id")}
    assert root.get("aria-labelledby").split() == list(named)
    title, description = named.values()
    assert title == "chainrule: x → Linear → Tanh → Linear → f → mse; forward and reverse"
    assert description.startswith(
        "A chain of 3 layers: Linear(2, 3), Tanh(), Linear(3, 1). x = [1, 2], f = ["
    )
    assert {node.tag.removeprefix(SVG) for node in root.iter()} == {
        "svg", "title", "desc", "style", "rect", "text", "path",
    }  # fmt: skip
    assert "url(" not in str(drawing) and str(drawing).count("http") == 1  # the name space
    assert "A chain of 1 layer: Linear(2, 3)." in str(cr.draw(cr.Sequential(cr.Linear(2, 3))))


def test_readable_in_light_and_dark(net):
    """Every class has a colour as attribute, and another one in the dark; contrast 4.5 : 1 for text."""
    drawing = str(cr.draw(net, [1.0, 2.0]))
    light = dict(re.findall(r'class="cr-([\w-]+)" fill="(#\w+)"', drawing))
    dark = dict(re.findall(r"\.cr-(\w+)\{fill:(#\w+)", drawing))

    def luminance(colour):
        parts = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    for colours in (light, dark):
        for text, ground in itertools.product(("ink", "muted", "forward", "reverse"), ("back", "box")):
            low, high = sorted(luminance(colours[kind]) for kind in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_pictures_of_one_page_have_ids_of_their_own(net):
    pictures = [cr.draw(net), cr.draw(net, [1.0, 2.0]), cr.draw(net, [1.0, 3.0])]
    ids = re.findall(r' id="(\w+)"', "".join(map(str, pictures)))
    assert len(set(ids)) == len(ids) == 6
    assert str(cr.draw(net)) == str(pictures[0])


def test_saving(net, tmp_path):
    drawing = cr.draw(net)
    drawing.save(tmp_path / "g.svg")
    assert (tmp_path / "g.svg").read_text(encoding="utf-8") == str(drawing) == drawing._repr_svg_()
    with pytest.raises(
        ValueError, match=r"^\[save\] file name '.*g\.png': expected the suffix \.svg, got '\.png'$"
    ):
        drawing.save(tmp_path / "g.png")
    with pytest.raises(FileNotFoundError):
        drawing.save(tmp_path / "nowhere" / "g.svg")


def test_a_full_disk_leaves_the_old_picture(net, tmp_path, monkeypatch):
    drawing, path = cr.draw(net), tmp_path / "g.svg"
    drawing.save(path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*g\.svg'"):
        cr.draw(net, [1.0, 2.0]).save(path)
    assert path.read_text(encoding="utf-8") == str(drawing)
    assert os.listdir(tmp_path) == ["g.svg"]


def test_the_readmes_picture_is_what_its_lines_draw():
    chain = cr.Sequential(cr.Linear(3, 4), cr.Tanh(), cr.Linear(4, 2), seed=0, dtype="float64")
    picture = Path(__file__).resolve().parent.parent / "python" / "examples" / "chain.svg"
    drawn = cr.draw(chain, [0.5, -1.0, 2.0], 1, "cross_entropy")
    assert picture.read_text(encoding="utf-8") == str(drawn)


def test_names_are_escaped():
    class Odd(Sine):
        pass

    Odd.__name__ = "<&>"
    assert "<&>" in texts_of(cr.draw(cr.Sequential(cr.Linear(2, 2), Odd())), "ink")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": 0.5, "loss": "mse"}, ValueError, r"\[draw\] y needs x: expected x, y and loss"),
        ({"x": [1.0, 2.0], "y": 0.5}, ValueError, r"\[draw\] y needs loss"),
        ({"x": [[1.0, 2.0]] * 2}, ValueError, r"\[draw\] x must be one example: expected 1 row, got 2"),
        ({"x": [1.0]}, ValueError, r"\[draw\] x must have one column per input"),
        ({"loss": "no"}, ValueError, r"\[draw\] loss"),
        ({"per_row": 0}, ValueError, r"\[draw\] per_row"),
    ],
)
def test_what_is_refused(arguments, error, message, net):
    with pytest.raises(error, match=message):
        cr.draw(net, **arguments)


def test_bfloat16_has_structure_alone():
    net = cr.mlp([2, 1], dtype="bfloat16")
    assert cr.draw(net).description == "x → Linear → f; structure"
    with pytest.raises(
        ValueError, match=r"^\[draw\] derivatives are exact: expected dtype float32 or float64"
    ):
        cr.draw(net, [1.0, 2.0])
