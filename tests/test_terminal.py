# SPDX-License-Identifier: MIT
"""What the command line draws, in Unicode and in ASCII."""

import io as streams

import numpy as np
import pytest

from chainrule.terminal import Screen, clip, confusion_lines, curve, duration, enlarged, picture


def ascii_screen():
    return Screen(streams.TextIOWrapper(streams.BytesIO(), encoding="ascii"))


@pytest.mark.parametrize("screen", [Screen(streams.StringIO()), ascii_screen()])
@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [3, 2, 1], [0.0, -1.0, 5.0], np.exp(-np.arange(500) / 50)]
)
def test_curves_of_every_kind_fit_their_frame(screen, values):
    lines = curve(values, screen, "loss", height=8)
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    assert f"{max(values):.3g}" in lines[0] and f"{min(values):.3g}" in lines[7]
    assert ("logarithmic" in lines[-1]) == (min(values) > 0)


def test_an_exponential_is_a_straight_line_on_the_logarithmic_axis():
    lines = curve(np.exp(-np.arange(100.0)), ascii_screen(), "loss", height=8)[:8]
    places = np.array([line.index("*") for line in lines])
    assert np.ptp(np.diff(places[1:])) <= 1 and places[-1] > 40


def test_drawings_by_hand():
    assert [line.rstrip() for line in curve([8, 4, 2, 1], ascii_screen(), "loss", height=4)[:4]] == [
        "         8 ┤************",
        "           │           **********************",
        "           │                                **********************",
        "         1 ┤                                                     ***********",
    ]
    assert picture(np.array([[1, 0], [1, 1]]), Screen(streams.StringIO())) == ["█▄"]
    assert picture(np.array([[1, 0], [1, 1]]), ascii_screen()) == ["@@  ", "@@@@"]
    expected = [[0, 0.5, 1], [0.5, 1, 1.5], [1, 1.5, 2]]
    np.testing.assert_array_equal(enlarged(np.array([[0.0, 1.0], [1.0, 2.0]]), 3), expected)
    assert clip("versicolor", 6) == "versi…" and clip("setosa", 6) == "setosa"
    assert [duration(s) for s in (0.0000123, 0.25, 75)] == ["12.3 µs", "0.25 s", "75 s"]
    assert confusion_lines(np.array([[9, 1], [0, 10]]), ["no", "a\nb"], 80) == [
        "  true ↓  predicted →  no  a\\nb",
        "  no                    9     1",
        "  a\\nb                  0    10",
    ]
    assert ascii_screen().plain("64 → 10, 3 µs") == "64 -> 10, 3 us"


def test_pictures_have_the_size_of_the_image():
    image = np.linspace(0, 1, 64).reshape(8, 8)
    assert [len(line) for line in picture(image, Screen(streams.StringIO()))] == [8] * 4
    assert [len(line) for line in picture(image, ascii_screen())] == [16] * 8
    coloured = Screen(streams.StringIO())
    coloured.colour = True
    assert all(line.count("▀") == 8 and line.endswith("\x1b[0m") for line in picture(image, coloured))


def test_confusion_tables():
    counts = np.array([[10, 0], [3, 7]])
    lines = confusion_lines(counts, ["a", "a very long name indeed"], 80)
    assert lines[1].split() == ["a", "10", "0"] and lines[2].endswith("7")
    assert confusion_lines(counts, ["a", "b"], 20) == ["  most frequent mistakes", "  b taken for a: 3 times"]
    assert confusion_lines(np.eye(2, dtype=int), ["a", "b"], 20) == ["  no mistakes"]
    alike = ["a very long name, first", "a very long name, second"]  # the same when cut to a column
    assert confusion_lines(counts, alike, 80)[1:] == [f"  {alike[1]} taken for {alike[0]}: 3 times"]
