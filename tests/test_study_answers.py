"""The grader of boxed answers: right ones in every usual form, wrong ones, and attacks."""

import pytest

from ttt_fast.study.answers import agree, boxed, tidied, value_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is $\boxed{6-\sqrt{5}}$.", r"6-\sqrt{5}"),
        (r"\boxed{\frac{\sqrt{2}}{3}}", r"\frac{\sqrt{2}}{3}"),
        (r"\boxed {7} then \fbox{8}", "8"),
        (r"\boxed{1} and \boxed{2", "1"),  # cut off while it was written
        (r"\boxed{\{-2\} \cup [0,6)}", r"\{-2\} \cup [0,6)"),
        (r"\boxed{}", ""),
        ("the answer is 7", None),
        (r"\boxed 7", None),
        ("", None),
    ],
)
def test_the_last_box_whose_braces_close(text, answer):
    assert boxed(text) == answer


RIGHT = [
    ("5", "5.0"),
    ("025", "25"),
    ("$336^\\circ$", "336"),
    (r"40^{\circ}", r"40^\circ"),
    ("270,000", r"270,\!000"),
    (r"1{,}050", "1050"),
    (r"\$12.50", "12.5"),
    (r"50\%", "50"),
    (r"\dfrac{9}{7}", r"\frac{9}{7}"),
    (r"\frac97", "9/7"),
    (r"-\frac{2}{15}", "-2/15"),
    (r"\frac{-2}{15}", r"-\frac2{15}"),
    (r"\frac{9\sqrt5}{5}", r"9/\sqrt{5}"),
    (r"2\sqrt{2} - 2", r"-2 + 2 \sqrt{2}"),
    (r"1 + \sqrt[3]{3}", r"\sqrt[3]{3}+1"),
    (r"18\pi", r"18 \cdot \pi"),
    ("18π", r"18\pi"),
    ("5^{2/3}", r"\sqrt[3]{25}"),
    (r"70*(2^{1/5}-1)", r"70 \left(\sqrt[5]{2} - 1\right)"),
    (r"\left(\frac{14}{9}, -\frac{7}{9}, \frac{22}{9}\right)", "(14/9,-7/9,22/9)"),
    (r"(-\infty, -4) \cup (6, +\infty)", r"(-\infty,-4)\cup(6,\infty)"),
    (r"(6,\infty) \cup (-\infty,-4)", r"(-\infty,-4)\cup(6,\infty)"),
    (r"(-8, 1.0]", "(-8,1]"),
    (r"4 \text{ or } 0", "0 or 4"),
    ("4, 0", "0 or 4"),
    (r"\text{CAKE}", "CAKE"),
    (r"12\text{ cm}", "12"),
    (r"n = 12", "12"),
    ("A, D, E", r"\text{A, D, E}"),
    (r"\{-2\} \cup [0,6)", r"\{ -2 \} \cup [0, 6)"),
    ("4(3-2x)(3+2x)", "4(3 - 2x)(3 + 2x)"),
    (r"3x-a-b-c", "3x - a - b - c"),
]


@pytest.mark.parametrize(("one", "other"), RIGHT)
def test_right(one, other):
    assert agree(one, other)
    assert agree(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "-5"),
        ("5", "5.001"),
        ("", ""),
        ("", "5"),
        ("3", "(3,100)"),
        ("3100", "(3,100)"),
        (r"\frac{1}{6}", "0.1667"),
        (r"1\frac{1}{2}", "0.5"),  # one and a half
        (r"1\frac{1}{2}", "1/2"),
        (r"\sqrt{5}", r"\sqrt{6}"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(1,2]"),
        ("1,2", "(1,2)"),
        ("1,2", "1,2,3"),
        ("1,1,2", "1,2,2"),
        (r"(-\infty,4)", r"(-\infty,-4)"),
        ("CAKE", "cake"),
        ("2^10", "20"),
        ("x", "y"),
        ("3x", "3"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        (r"10^{999}", r"10^{998}"),
        (r"\sqrt{-1}", r"\sqrt{-2}"),
    ],
)
def test_wrong(one, other):
    assert not agree(one, other)
    assert not agree(other, one)


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').system('echo broken')",
        "9**9**9**9",
        r"9^{9^{9^{9^{9}}}}",
        "(" * 400 + "1" + ")" * 400,
        "{" * 60 + "1" + "}" * 60,
        r"\sqrt" * 80 + "2",
        "(1," * 150,
        r"\text{" * 80,
        "(1,(" * 10**6,
        "1" * 400,
        r"\frac" * 90,
    ],
)
def test_what_a_model_writes_is_no_number_and_does_no_harm(attack, capfd):
    assert not agree(attack, "2")
    assert not agree("(1,2)", attack)
    assert "broken" not in capfd.readouterr().out


def test_deep_but_plain_nesting_is_read():
    assert value_of("(" * 20 + "7" + ")" * 20) == 7.0
    assert value_of(r"\sqrt{\sqrt{16}}") == 2.0


def test_tidied():
    assert tidied(r" $\left( \dfrac{1}{2} ,\; 3\,000 \right)$. ") == r"(\frac{1}{2},3000)"
    assert tidied("1,234,567.5") == "1234567.5"
