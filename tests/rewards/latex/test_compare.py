r"""Which answers are equivalent: usual notations, an example of each kind of fault of other verifiers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.rewards.boxed import equivalent, is_readable, why_unreadable
from rlkit.rewards.latex.compare import readings, same

# (reference answer, answer of a model)
EQUIVALENT = [
    (r"6.63 \times 10^{-34}", "6.63e-34"),
    (r"\frac{1}{2^{99}}", "2^{-99}"),
    ("3e8", r"3\times10^8"),
    ("3e8", "300000000"),
    ("300000000", "3e8"),
    ("3e8", r"3\cdot 10^{8}"),
    ("1e-5", "0.00001"),
    ("1e-5", "10^{-5}"),
    ("137 1/2", "137.5"),
    ("137 1/2", r"137\frac12"),
    (r"137 \frac{1}{2}", "137 1/2"),
    (r"2\frac12", "5/2"),
    ("52_8", "52"),
    ("52_8", "52_{8}"),
    ("52_8", "(52)_8"),
    (r"52_{\text{eight}}", "52_8"),
    ("41", r"\text{41}"),
    ("41", r"\textbf{41}"),
    ("41", r"\mathrm{41}"),
    ("41", r"\mathbf{41}"),
    ("41", r"\boldsymbol{41}"),
    ("41", r"\color{red}{41}"),
    ("41", r"{\color{red} 41}"),
    ("41", r"\textcolor{blue}{41}"),
    ("41", "41 people"),
    ("41", "41 hours"),
    ("41", "41 apples."),
    ("41", "41 red marbles"),
    ("41", r"\text{Answer: }41"),
    ("76", "76°"),
    (r"4\sqrt2", "4√2"),
    ("12", r"12 \text{ square units}"),
    ("x^2", "x²"),
    (r"(-\infty,2)", "(-∞, 2)"),
    ("(1,2)", r"\bigl(1,2\bigr)"),
    (r"\text{east}", r"\textrm{east}"),
    (r"\text{east}", r"\mbox{east}"),
    (r"\text{east}", "East"),
    ("14 - i", "14.0 - 1.0i"),
    ("3+i", "3+1i"),
    (r"2+2i\sqrt3", r"2+2\sqrt{3}i"),
    ("6 - 5i", r"6-5\cdot i"),
    ("6 - 5i", r"6 - 5\mathrm{i}"),
    ("2i", "2 i"),
    ("D", r"\textbf{(D)}\ 12"),
    ("D", "D. 12"),
    ("D", "D) 12"),
    ("D", "Option D"),
    ("D", "(D)"),
    ("D", r"\text{D}"),
    ("D", r"\text{(D) } 12"),
    ("D", "D: none of these"),
    (r"\textbf{(D)}\ 12", "D"),
    (r"1-\frac{1}{e}", r"1-\frac{1}{\mathrm{e}}"),
    (r"1-\frac{1}{\mathrm{e}}", r"1-\frac1e"),
    (r"2\pi", "2pi"),
    (r"\pi", "pi"),
    (r"\frac12", "½"),
    (r"\frac52", "2½"),
    ("x^2", "x**2"),
    (r"\frac13", r"0.\overline{3}"),
    (r"0.\overline{3}", "1/3"),
    (r"\text{6:00 PM}", "6:00 PM"),
    ("6:00", "6:00"),
    (r"\text{6:00 PM}", "6:00 p.m."),
    (r"\text{5 hours}", "5"),
    (r"\text{No.}", "no"),
    (r"\text{all real numbers}", r"\mathbb{R}"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\varnothing", r"\emptyset"),
    ("[0,1[", "[0,1)"),
    ("[0,1)", "[0,1["),
    ("(1,2)", "x=1, y=2"),
    (r"\{(1,2)\}", "(1,2)"),
    (r"(-\infty,3)", "x<3"),
    ("x<3", r"(-\infty,3)"),
    ("x<3", "3>x"),
    ("1000", "1 000"),
    (r"x \in [-2,7]", r"-2 \\le x \\le 7"),
    ("(0,12.5)", "0 < x < 12.5"),
    (r"x\le -1 \text{ or } x\ge 1", r"(-\infty,-1]\cup[1,\infty)"),
    (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)"),
    (r"\mathbb{R}\setminus\{0\}", r"x \neq 0"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
    (r"\sin x\cos x", r"\frac12\sin 2x"),
    (r"\ln 4", r"2\ln 2"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"),
    (r"\frac{1}{\sqrt{2}+1}", r"\sqrt2-1"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt{2}", r"\sqrt2 \approx 1.414"),
    ("1.41421356", r"\sqrt2"),
    (r"x=\pm 2", "-2, 2"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"),
    ("y=2x+1", "2x+1"),
    ("y=2x+1", "2x-y+1=0"),
    ("f(x)=x^2", "x^2"),
    (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"),
    (r"\{1,2\}", r"\{2,1,1\}"),
    (r"\frac{x}{2}", "0.5x"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("12.5", r"12.5\%"),
    ("5", r"5 \text{ cm}"),
    (r"500\text{ cm}", r"5\text{ m}"),
    ("90", r"90^\circ"),
    (r"\frac{\pi}{6}", r"30^\circ"),
    ("5", "5 m"),
    ("10", "10 m/s"),
    ("10", r"10\,\mathrm{m/s^2}"),
    ("5,000,000", "5 million"),
    ("5,000,000", r"5\text{ million}"),
    (r"\$5", "5 dollars"),
    ("18", r"\$18.00"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    (r"\infty", r"+\infty"),
    (r"\infty", "∞"),
    (r"\infty", "infinity"),
    ("1:2", r"\frac12"),
    ("2:4", "1:2"),
    (r"x\equiv 1 \pmod 4", r"x \equiv 1 \pmod{4}"),
    ("abc", r"a\cdot b\cdot c"),
    ("mgh", "m g h"),
    (r"\angle ABC = 30^\circ", "30"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"-\frac{1}{2}", "-.5"),
    (r"\frac{3}{4}", "3/4"),
    (r"\frac{3}{4}", "0.75"),
    ("2^{10}", "1024"),
    (r"\sqrt[3]{-8}", "-2"),
    ("|x|", r"\sqrt{x^2}"),
    (r"\lfloor x\rfloor", r"\lfloor x \rfloor"),
    (r"\frac{a+b}{c}", "(a+b)/c"),
    ("x^{1/2}", r"\sqrt{x}"),
    (r"\tan^{-1} 1", r"\frac{\pi}{4}"),
    (r"\arctan 1", r"\frac\pi4"),
    ("x=3", "3"),
    ("3", "x=3"),
    ("3", "$x = 3$."),
    ("1,2", r"1 \text{ and } 2"),
    ("1,2", "1 and 2"),
    ("1,2", r"x=1 \text{ or } x=2"),
    ("(2,3),(3,2)", "(3,2),(2,3)"),
    ("ab", "ba"),
    ("AB=5", "5"),
    (r"63^\circ 45'", r"63.75^\circ"),
    (r"1.5\times10^{11}", "1.5e11"),
    (r"\frac{1}{13983816}", "7.15112e-8"),
    ("no solution", r"\text{No solution}"),
    ("no solution", "No solution."),
    ("yes", "Yes"),
    (r"\text{(A)}", "A"),
    ("3x^2+2x", "x(3x+2)"),
    ("x^2+y^2=1", "y^2+x^2=1"),
    ("x^2+y^2=1", "x^2+y^2-1=0"),
    ("2x+3y<6", "6>3y+2x"),
    ("C", r"\textbf{C}"),
    (r"\frac{9}{4}", r"2 \frac{1}{4}"),
    ("C", "C. A and B only"),
    ("C", "C) Both A and B"),
    ("C", "C. It is incorrect to divide by zero"),
    (r"\begin{cases}1&x>0\\0&x\le0\end{cases}", r"\begin{cases}1,&x>0\\0,&x\le0\end{cases}"),
    (
        r"\begin{cases}1&x>0\\0&x\le0\end{cases}",
        r"\begin{cases}0&\text{if }x\le0\\1&\text{if }x>0\end{cases}",
    ),
    (
        r"\begin{cases}1&x>0\\0&x\le0\end{cases}",
        r"\begin{cases}1, & \text{if } x>0, \\ 0, & \text{otherwise}\end{cases}",
    ),
    (
        r"\begin{cases}1&x>0\\0&x\le0\end{cases}",
        r"\left\{\begin{array}{ll}1 & x>0\\0&x\le0\end{array}\right.",
    ),
    (r"x=\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}", r"\frac{\pi}{6}+2k\pi"),
    (r"\frac{\pi}{4}+n\pi", r"x=\frac{\pi}{4}+n\pi, n\in\mathbb{Z}"),
    (r"\frac{\pi}{4}+n\pi", r"\frac{\pi}{4}+n\pi \quad (n\in\mathbb{Z})"),
    (r"\sum_{n=1}^\infty \frac{1}{n^2}", r"\sum_{n=1}^{\infty}\frac{1}{n^2}"),
    (r"\binom{10}{3}", r"{10 \choose 3}"),
    (r"\binom{10}{3}", r"\frac{10!}{3!7!}"),
    (r"\frac12", r"1\over 2"),
    (r"\frac12", r"{1\over2}"),
    ("[2,5]", r"x\ge2 \text{ and } x\le5"),
    ("[2,5]", r"\{x\in\mathbb{R}: 2\le x\le5\}"),
    (r"\{x\mid x>2\}", r"\{x\in\mathbb{R}\mid x>2\}"),
    (r"(-\infty,2)\cup(3,\infty)", "(-∞, 2) U (3, ∞)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2) \text{ or } (3,\infty)"),
    (r"\emptyset", "no solution"),
    (r"x\equiv3\pmod7", "x ≡ 3 (mod 7)"),
    (r"x\equiv3\pmod7", r"x\equiv3\;(\text{mod }7)"),
    ("52_8", "52_{(8)}"),
    ("52_8", r"52_{\text{base }8}"),
    ("52_8", "52 base 8"),
    ("1101_2", "1101 base 2"),
    (r"\langle1,2,3\rangle", r"\vec{v}=\langle1,2,3\rangle"),
    ("3+4i", "3+i4"),
    (r"25^\circ\text{C}", "25°C"),
    (r"25^\circ\text{C}", r"25^\circ C"),
    (r"25^\circ\text{C}", "25 ℃"),
    (r"25^\circ\text{C}", "25 degrees Celsius"),
    (r"60\text{ mph}", "60 miles per hour"),
    ("7", "7 units^2"),
    (r"12\text{ sq units}", "12 units^2"),
    (r"10\text{ N}", "10 Newtons"),
    (r"90\text{ square feet}", "90 sq. ft."),
    (r"\text{undefined}", "not defined"),
    (r"\sqrt{2GM/R}", r"\frac{\sqrt{2GM}}{\sqrt R}"),
    (r"\sqrt{xy}", r"\sqrt{x}\sqrt{y}"),
    (r"\ln(xy)", r"\ln x+\ln y"),
    ("(-1)^n", r"\cos n\pi"),
    ("92.5857658508735", "92.5858"),
    (r"\frac{1}{1024}", "0.000976563"),
    ("0.5", "50 percent"),
    ("0.5", r"50\text{ percent}"),
    ("50", "50 percent"),
    ("5", "5 min"),
    ("5 minutes", "5 min"),
    ("2", "((((((((((((((((((((((((((((((2))))))))))))))))))))))))))))))"),
    ("60", "60 sec"),
    (r"\min(x,y)", "min(x,y)"),
    (r"\sec x", "sec x"),
    ("x=1,x=2,y=3", "x=2,x=1,y=3"),
    ("5", r"5\text{ seeds}"),
    ("5", "5 beds"),
    ("5", "5 paths"),
    ("5", "5_{10}"),
    ("1:5", "2:10"),
    ("1:2", "2:4"),
    (r"5^\circ C", "5° celsius"),
    ("[1,2]", r"[0,2]\cap[1,3]"),
    (r"63^\circ 45' 30''", "63° 45' 30\""),
    ("2", r"\log_{10^{400}} 10^{800}"),
    (r"\{\}, 2", r"2, \{\}"),
    ("[0,1)", "[0,1["),
    ("(0,1)", "]0,1["),
    ("0", r"\sin\pi"),
    (r"\sin \pi", "0"),
    (r"\cos\frac{\pi}{2}", "0"),
    ("0", r"\sqrt{2}\sqrt{3}-\sqrt6"),
    (r"\ln(e)", "1"),
    ("(x+1)^{99}", "(1+x)^{99}"),
]

DIFFERENT = [
    (r"6.63 \times 10^{-34}", r"1.5 \times 10^{-30}"),
    (r"6.63 \times 10^{-34}", "0.0"),
    (r"4.5\times 10^{-7}", "0.0"),
    (r"4.5\times 10^{-7}", "0.0000001"),
    (r"\frac{1}{13983816}", "0.0"),
    (r"\frac{1}{2598960}", "0.0"),
    ("10^{-20}", "10^{-21}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{100}}"),
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}"),
    (r"\frac{1}{20!}", r"\frac{1}{21!}"),
    (r"\frac{3^{50}+1}{2\cdot 3^{50}}", r"\frac{3^{50}-1}{2\cdot 3^{50}}"),
    (r"\frac{3^{50}+1}{2\cdot 3^{50}}", r"\frac{1}{3^{50}}"),
    (r"\frac{2^{100}-1}{2^{101}}", r"\frac{2^{100}+1}{2^{101}}"),
    (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}"),
    (r"\sqrt{10^{40}+1}", "10^{20}"),
    (r"\sqrt{10^{400}+1}", "10^{200}"),
    (r"\frac{R}{r}", "1"),
    (r"\frac{R}{r}", r"\frac{r}{R}"),
    ("R-r", "0"),
    ("R-r", "r-R"),
    (r"\frac{m}{M+m}", r"\frac12"),
    (r"\frac{m}{M+m}", r"\frac{M}{M+m}"),
    (r"\sqrt{2GM/R}", r"\sqrt{2gm/r}"),
    (r"V=\frac43\pi R^3", r"\frac43\pi r^3"),
    (r"\Delta-\delta", "0"),
    ("E", "e"),
    ("N=n", "1=1"),
    ("N=n", "x=x"),
    ("N=n", "M=m"),
    ("3e8", "65.238764"),
    ("137 1/2", "69"),
    ("x+y=3", "3"),
    ("xy=6", "6"),
    ("x+y+z=1", "1"),
    ("52_8", "52_9"),
    ("101", "101_2"),
    ("7", "7_{5,6,8}"),
    ("7", r"7 \text{ (or 5)}"),
    ("7", r"7\text{, or 5}"),
    ("7", r"7 \text{ if } x>0; 5 \text{ otherwise}"),
    ("7", r"7\text{5}"),
    ("7", r"7 \approx 5"),
    ("7", r"7\text{ is wrong}"),
    ("7", r"7\text{ (incorrect)}"),
    ("D", r"D\text{, A}"),
    (r"\text{Alice: }5\text{, Bob: }6", r"\text{Alice: }6\text{, Bob: }5"),
    ("no solution", "solution no"),
    ("No", "on"),
    ("7", "7 or 8"),
    ("7", r"7 \lor 8"),
    ("7", "7, maybe 8"),
    ("7", "7 wrong"),
    ("7", r"7\text{ no}"),
    ("7", r"7\text{ never}"),
    ("7", r"7\text{ plus one}"),
    ("7", "7 / 8"),
    ("7", "7 | 8"),
    ("7", "7; 8"),
    ("5 cm", "5 m"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"\$5", "5 euros"),
    ("5 apples", "5 oranges"),
    ("5", "5 million"),
    (r"-\frac12", r"\frac12"),
    ("D", "D or A"),
    ("D", "(D), (A)"),
    ("D", "D) 12 or A) 5"),
    ("D", "A. D"),
    ("D", "D. wrong, A"),
    ("0.5", "50"),
    ("(1,2)", "[1,2]"),
    ("[-2,7)", r"-2 \le x \le 7"),
    ("x<3", "y<3"),
    ("x<3", r"x\le 3"),
    ("x<3", "x>3"),
    ("12:00", "1:00"),
    ("1:2", "2"),
    ("x=3", "y=3"),
    ("1,2", "1,1,2"),
    ("41", "41,41"),
    ("3+i", "3-i"),
    ("3+4i", "4+3i"),
    ("i", "j"),
    (r"\pi", "3.14"),
    (r"\sqrt2", "1.414"),
    ("5", r"\sin 30^\circ = 5"),
    (r"\mathbb{R}", r"\mathbb{Z}"),
    (r"(-\infty,3)", r"x \le 3"),
    (r"\frac{1}{x}", "0"),
    ("x+1", "y+1"),
    (r"\infty", r"-\infty"),
    ("2 mgh", "2"),
    ("e^x", "e^{-x}"),
    ("ab", "a"),
    ("AB", "BA"),
    (r"[-\infty,2)", r"(-\infty,2)"),
    ("1", "x/x"),
    ("0.333333", "0.333"),
    ("1.6", "1.600001"),
    ("100", "100.0001"),
    ("2^{1000}", "2^{1000}+1"),
    ("5", "5!"),
    ("6", "3!!"),
    ("0", "-1e-400"),
    ("x^2=4", "4"),
    (r"\frac{3}{4}", "3/4/1 or 5"),
    ("12", "1 2"),
    ("24", "2 dozen or 3 dozen"),
    ("24", "25 - 1 + 1"),
    ("x=5", "x=5.00001"),
    ("x=5", "x=5.0000000001"),
    ("2x=10", "2x=10.00001"),
    ("x=5", "5+x=10.00001"),
    ("x=1000000", "x=1000000.4"),
    ("x=123456.7", "x=123456.8"),
    ("x^2+y^2=25", "x^2+y^2=25.0001"),
    ("y=2x+3", "y=2.000001x+3"),
    ("|x|", "x"),
    ("x", "|x|"),
    ("x", r"\sqrt{x^2}"),
    ("x", r"\max(x,0)"),
    ("x=5", "|x|=5"),
    ("y=x^2", "|y|=x^2"),
    ("x>5", "|x|>5"),
    (r"\frac{x}{y}", "|x/y|"),
    ("x^3", "|x|^3"),
    ("e^{-kt}", "e^{-k|t|}"),
    (r"\ln|x|", r"\ln x"),
    ("|x-5|", "5-x"),
    (r"\max(x,5)", "5"),
    (r"\lfloor x/10\rfloor", "0"),
    (r"\lceil n/2\rceil+1", r"\lceil n/5\rceil+1"),
    (r"\lfloor n/2\rfloor", r"\lfloor n/3\rfloor"),
    (r"\lfloor x\rfloor", r"\lceil x\rceil-1"),
    (r"\cos x", r"|\cos x|"),
    (r"\arcsin(\sin x)", "x"),
    ("325,950", "950,325"),
    ("276,000", "276,0"),
    ("1,000", "0,1"),
    ("2,125", r"\{2,125\}"),
    ("7", "7 extraneous"),
    ("7", r"7\text{ (extraneous)}"),
    ("7", "7 rejected"),
    ("7", "7 falsch"),
    ("7", "7 нет"),
    ("7", "7 halves"),
    ("7", "7 thirds"),
    ("7", "7 hundreds"),
    ("7", "7 doubled"),
    ("7", "7 more"),
    ("7", "7 square"),
    (r"3\text{ red balls}", "3 blue balls"),
    ("4", r"\sin x=4"),
    ("4", r"\log_2 x=4"),
    ("4", r"\sqrt{x}=4"),
    ("4", "x^{-1}=4"),
    ("3", "not = 3"),
    ("3", r"\text{wrong} = 3"),
    ("B", "B. wait C"),
    ("B", "B. no it is C"),
    ("B", "(B) C"),
    ("B", "B. the answer is C"),
    ("B", "(B)^2"),
    ("B", "(B)+1"),
    ("D", "D. Oops B"),
    ("10", "9.999996"),
    ("1", "0.9999996"),
    ("100.000", "100.0004"),
    ("7", "7+0.00000100000"),
    ("x^2", "1.000001x^2"),
    (r"60^\circ", "60 rad"),
    (r"60^\circ", r"60\%"),
    ("12:30", "2/5"),
    ("12:30", "24:60"),
    ("1", r"\tanh 100"),
    (r"(-\infty,2)\cup(3,\infty)", "x<2 and x>3"),
    (r"x = 5 \text{ and } y = 6", "x=5 or y=6"),
    (r"x = 5 \text{ or } x = 6", "(5,6)"),
    (r"\{1,2,3\}", r"\{\{1,2,3\}\}"),
    (r"\{1,2\}", r"\{1,\{2\}\}"),
    (r"x=0,\pi", r"2x=0,\pi"),
    ("0.5", "0.5 percent"),
    ("x=1, x=1, y=3", "x=1, x=5, y=3"),
    (r"\mathbb{Z}\setminus\{0\}", r"\{0\}\setminus\mathbb{Z}"),
    (
        r"\begin{cases}1&x>0\\2&x\le0\end{cases}",
        r"\begin{cases}1&\text{otherwise}\\2&\text{otherwise}\end{cases}",
    ),
    ("7", "7 doubled"),
    ("7", "7 thirds"),
    ("7", "7 fifths"),
    ("-5", "-101_2"),
    ("5", "101_2+0"),
    ("12:30", "24:60"),
    ("B", "B. Wrong"),
    ("1", r"1 < x \approx 3"),
    ("3", "3!"),
    ("e^{-1000}", "0"),
    ("0", "e^{-1000}"),
    (r"\sqrt{10^{40}+1}-10^{20}", "0"),
    (r"\sqrt{10^{400}+1}-10^{200}", "0"),
    (r"\tan\frac\pi2", "5"),
    ("x^{100}-1", "x^{100}"),
    (r"1-\cos(10^{-30})", "0"),
    (r"\sin(10^{-50})", "0"),
]


@pytest.mark.parametrize(("answer", "text"), EQUIVALENT)
def test_equivalent_accepts_another_notation(answer, text):
    assert equivalent(text, answer)


@pytest.mark.parametrize(("answer", "text"), DIFFERENT)
def test_equivalent_rejects_another_answer(answer, text):
    assert not equivalent(text, answer)


integers = st.integers(-(10**40), 10**40)
exponents = st.integers(2, 400)


@settings(max_examples=200, deadline=None)
@given(integers, integers.filter(bool), integers, integers.filter(bool))
def test_fractions_are_compared_exactly(a, b, c, d):
    assert equivalent(rf"\frac{{{c}}}{{{d}}}", rf"\frac{{{a}}}{{{b}}}") == (a * d == b * c)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), exponents, st.integers(1, 10**6), exponents)
def test_decimals_are_compared_relative_to_their_size(a, m, b, n):
    texts = [rf"{a}.5 \times 10^{{-{m}}}", f"{b}.5e-{n}"]
    is_equal = (2 * a + 1) * 10**n == (2 * b + 1) * 10**m
    assert equivalent(texts[0], texts[1]) == is_equal
    assert equivalent("0.0", texts[0]) is False


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(1, 9))
def test_irrational_numbers_are_compared_with_enough_digits(n, step):
    assert not equivalent(f"10^{{{n}}}", rf"\sqrt{{10^{{{2 * n}}} + {step}}}")
    assert equivalent(rf"\sqrt{{{step}}} \cdot 10^{{{n}}}", rf"\sqrt{{{step} \cdot 10^{{{2 * n}}}}}")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**4), st.integers(7, 12))
def test_only_a_decimal_with_six_digits_is_rounded(n, digits):
    root = rf"\sqrt{{{n}}}"
    value = f"{n**0.5:.{digits - 1}e}"
    wrong = f"{n**0.5 * (1 + 10 ** (2 - digits)):.{digits - 1}e}"
    assert equivalent(value, root)
    assert not equivalent(wrong, root)
    if n**0.5 % 1:
        assert not equivalent(f"{n**0.5:.3g}", root)


letters = st.sampled_from("abcdfghkmnpqrstuvwxyz")


@settings(max_examples=200, deadline=None)
@given(letters, letters, st.sampled_from([r"\frac{%s}{%s}", "%s - %s", r"\sqrt{%s + %s^2}", "2%s %s^3"]))
def test_upper_and_lower_case_are_different_letters(a, b, form):
    texts = [form % (x, y) for x in (a, a.upper()) for y in (b, b.upper())]
    for i, answer in enumerate(texts):
        assert [equivalent(text, answer) for text in texts] == [i == j for j in range(4)]


RETRACTIONS = [
    "is wrong",
    "(or 5)",
    "or 5",
    "not",
    "if x > 0",
    "is not it",
    "maybe 5",
    "plus one",
    "wait, no",
]


@settings(max_examples=100, deadline=None)
@given(st.integers(-1000, 1000), st.sampled_from(RETRACTIONS), st.sampled_from(["%s %s", r"%s\text{ %s}"]))
def test_text_that_takes_a_value_back_counts(n, words, form):
    assert not equivalent(form % (n, words), str(n))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms())
def test_order_counts_in_tuples_and_not_in_lists(items, random):
    shuffled = random.sample(items, len(items))
    text, other = ", ".join(map(str, items)), ", ".join(map(str, shuffled))
    assert equivalent(other, text)
    assert equivalent(f"({other})", f"({text})") == (items == shuffled)
    assert not equivalent(", ".join(map(str, items[1:])), text)
    assert not equivalent(f"{text}, {items[0]}", text)


@settings(max_examples=100, deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.booleans(), st.booleans())
def test_interval_equals_its_inequality(low, width, has_low, has_high):
    high = low + width
    interval = f"{'[' if has_low else '('}{low}, {high}{']' if has_high else ')'}"
    signs = [r"\le" if closed else "<" for closed in (has_low, has_high)]
    inequality = f"{low} {signs[0]} x {signs[1]} {high}"
    for answer, text in ((interval, inequality), (inequality, interval), (inequality, rf"x \in {interval}")):
        assert equivalent(text, answer)
    flipped = f"{'(' if has_low else '['}{low}, {high}{']' if has_high else ')'}"
    assert not equivalent(flipped, inequality)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 36), st.integers(2, 36), st.integers(2, 10**6))
def test_base_is_optional_but_not_another_one(base, other, number):
    numeral = ""
    while number:
        number, digit = divmod(number, min(base, 10))
        numeral = str(digit) + numeral
    assert equivalent(f"{numeral}_{{{other}}}", f"{numeral}_{{{base}}}") == (base == other)
    assert equivalent(numeral, f"{numeral}_{{{base}}}")
    assert equivalent(f"{numeral}_{{{base}}}", numeral) == (base == 10)


@settings(max_examples=100, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 9))
def test_equation_equals_its_multiples(a, b, c, factor):
    answer = f"{a}x + {b}y = {c}"
    text = f"{factor * b}y + {factor * a}x - {factor * c} = 0".replace("- -", "+ ")
    if a and b:
        assert equivalent(text, answer)
        assert not equivalent(f"{a}x + {b}y = {c + 1}", answer)
        assert not equivalent(str(c), answer)


@pytest.mark.parametrize("text", ["1/0", r"\frac{0}{0}", r"\log 0", "0^0", "?", r"\frac{1", ""])
def test_is_readable_rejects_what_has_no_value(text):
    assert not is_readable(text)


HOSTILE = [
    r"{7\}",
    "5_❶",
    "|" * 200 + "x" + "|" * 200,
    r"\sin " * 200 + "1",
    "-" * 900 + "7",
    r"\sqrt" * 390,
    "x^" * 490 + "7",
    "x!" * 490,
    "α" * 1000,
    r"\frac{x}{1+" * 30 + "x" + "}" * 30 + "=0",
    "1e99999+" * 200 + "1",
    r"\text{" * 13 + "}" * 13,
    ",".join(rf"x\ne\sqrt {i}" for i in range(120)),
    r"\mathbb{R}\setminus\{" + ",".join(map(str, range(299))) + r"\}",
    r"\{" + ",".join(rf"x^{{{i}.5}}" for i in range(99)) + r"\}",
    "10^{1200}x+" + "+".join([r"\arcsin x"] * 100),
    "+".join([r"\sqrt[64]{2^{4000}+1}"] * 60),
    "+".join(["3000!"] * 60),
    r"x e^{i\pi} < 2",
    "\0",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answer_is_wrong_without_an_exception(text):
    for answer in ["7", "x=1", r"\sin x", r"x\ne 2", r"\{1,2\}", "(B)", "x>-1"]:
        assert not equivalent(text, answer)
    why_unreadable(text)


def test_same_is_reflexive_for_what_the_parser_reads():
    for answer, text in EQUIVALENT:
        for node in (*readings(answer), *readings(text)):
            assert same(node, node)
