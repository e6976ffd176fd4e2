"""Final answers, and Python tests in their sandbox."""

from __future__ import annotations

import socket
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from compress.data.checks import CHECKS, Truth
from compress.data.final_answers import final_choice, final_number, final_text
from compress.data.sandbox import code_in, passes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Natalia sold 48/2 = 24 clips.\nTogether 48+24 = 72.\n#### 72", 72),
        ("#### -1,234.50", Fraction(-2469, 2)),
        ("####42 apples, 3 more than 39", 42),
        ("First 7. The answer is $1,200 for 30 days.", 1200),
        ("**Answer:** 12 eggs of 30", 12),
        ("so x = \\boxed{\\frac{3}{4}} and y = 9", Fraction(3, 4)),
        ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)),
        ("\\boxed{\\text{about } 12{,}500}", 12500),
        ("\\boxed{\\frac12}", Fraction(1, 2)),
        ("It takes 1 1/2 cups.", Fraction(3, 2)),
        ("She ate 3/4.", Fraction(3, 4)),
        ("-5", -5),
        ("= −7.", -7),
        ("8-3", 3),
        ("8 - 3", 3),
        ("- 3 apples", 3),
        ("2,000,000 people", 2000000),
        ("12, 34", 34),
        ("about .5 of it", Fraction(1, 2)),
        ("it costs 20%.", 20),
        ("The answer is 3.", 3),
        ("The answer is 4. No: the answer is 5", 5),
        ("1e3 grams", 1000),
        ("none", None),
        ("The answer is unknown, after 3 tries", 3),
        ("The answer is unknown.\nAfter 3 tries", None),
        ("1/0", None),
        ("\\boxed{2x + 3}", None),
        ("\\boxed{(1, 2)}", None),
        ("\\boxed{\\sqrt{5}}", None),
        ("\\boxed{5^2}", None),
        ("\\boxed{5x}", None),
        ("\\boxed{\\$1,200}", 1200),
        ("\\boxed{25\\%}", 25),
        ("\\boxed{30^\\circ}", 30),
        ("\\boxed{12 cm^2}", 12),
        ("\\boxed{12\\text{ cm}^2}", None),
    ],
)
def test_final_number(text: str, value: object) -> None:
    assert final_number(text) == value


def test_long_answers_take_no_time() -> None:
    begun = time.monotonic()
    for text in ("\\boxed{5 " + "a" * 4000 + " x}", "1" * 4000 + " x", "\\boxed{" * 500 + "5", "### " * 2000):
        for find in (final_number, final_choice, final_text):
            find(text)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("b.", "B"),
        ("A) food", "A"),
        ("The answer is (B) food", "B"),
        ("Answer: d", "D"),
        ("**Answer: B**", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("I think option C is right", "C"),
        ("Not (A) but the correct choice is (D).", "D"),
        ("A dog is an animal", None),
        ("Because of food", None),
        ("The answer is food", None),
        ("The answer is I'm not sure", None),
        ("", None),
    ],
)
def test_final_choice(text: str, letter: str | None) -> None:
    assert final_choice(text) == letter


def test_final_text() -> None:
    assert (
        final_text("  The  Green Algae. ") == "the green algae" == final_text("Answer: **the green algae**\nAs said.")
    )
    assert final_text("state-of-the-art") != final_text("state of the art")
    assert final_text("?!") == "?!" and final_text(" ") is None


def agrees(check: str, text: str, gold: str, marker: str | None = None, answer: str = "") -> bool | None:
    """The check's verdict; None where gold has nothing to compare with."""
    found, truth = CHECKS.get(check).model_validate({}), Truth(gold, answer, marker=marker)
    return found.agrees(text, truth) if found.comparable(truth) else None


def test_agrees() -> None:
    assert agrees("number", "that makes 72 clips", "48 + 24\n#### 72") is True
    assert agrees("number", "that makes 71 clips", "#### 72") is False
    assert agrees("number", "that is nothing", "#### 72") is False
    assert agrees("number", "0.75", "#### 3/4") is True
    assert agrees("number", "so 72", "it is so") is None  # gold has none to compare with
    assert agrees("number", "so 72", "it is so", answer="72") is True
    assert agrees("number", "so 3", "it is so", answer="2x + 3") is None  # its last number says nothing
    assert agrees("number", "so 3/4", "it is so", answer="\\frac{3}{4}") is True
    assert agrees("choice", "I would say (B)", "B") is True
    assert agrees("exact", "Result >> food.", "Result >> Food", marker="Result >>") is True
    assert agrees("exact", "It is food.", "Food") is False
    assert agrees("number", "3 so ANS= 4 of 5", "ANS= 4", marker="ANS=") is True


GOOD = "It adds:\n```python\ndef add(a, b):\n    return a + b\n```\nas asked."
TESTS = "assert add(1, 2) == 3"


def test_code_is_taken_from_its_fence() -> None:
    assert code_in(GOOD) == "def add(a, b):\n    return a + b\n"
    assert code_in("x = 1") == "x = 1"
    assert (
        code_in("```\nshort\n```\n```py\nlonger one\n```\n```bash\nmuch longer than both of them\n```")
        == "longer one\n"
    )
    assert code_in("```python\ncut = off") == "cut = off"


def test_python_tests_decide() -> None:
    assert passes(GOOD, TESTS)
    assert passes(GOOD, "import math, collections, re\nassert add(1, 2) == math.floor(3.5)")
    assert not passes(GOOD, "assert add(1, 2) == 4")
    assert not passes("def add(a, b", TESTS) and not passes("no code", TESTS)
    assert passes("def add(a, b):\n    print('noise' * 100000)\n    return a + b", TESTS)
    assert passes("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    raise SystemExit(1)", TESTS)


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()", "raise SystemExit"])
def test_ending_the_process_is_not_passing(code: str) -> None:
    assert not passes(f"def add(a, b):\n    return 3\n{code}", TESTS)


def test_time_and_memory_are_limited() -> None:
    begun = time.monotonic()
    assert not passes("while True: pass", TESTS, timeout=1)
    assert not passes("import time\ntime.sleep(60)", TESTS, timeout=1)
    assert time.monotonic() - begun < 12
    assert not passes("def add(a, b): return 3\nx = bytearray(1 << 30)", TESTS, memory=256)
    assert passes("def add(a, b): return 3\nx = bytearray(1 << 20)", TESTS, memory=256)


@pytest.mark.parametrize(
    "code",
    [
        "open('there', 'w')",
        "import os; os.open('there', os.O_CREAT | os.O_WRONLY)",
        "import pathlib; pathlib.Path(VICTIM).unlink()",
        "import os; os.rename(VICTIM, VICTIM + '2')",
        "import os; os.truncate(VICTIM, 0)",
        "import shutil, os; shutil.rmtree(os.path.dirname(VICTIM))",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT')",
        "import ctypes; ctypes.CDLL(None)",
        "import numpy",
        "import compress",
        "import os; assert os.environ.get('PATH')",
        "import os; assert os.listdir()",
        "import __main__; __main__.word",
    ],
)
def test_what_is_refused(code: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = code.replace("VICTIM", repr(str(victim))).replace("PORT", str(server.getsockname()[1]))
        assert not passes(f"def add(a, b): return a + b\n{code}", TESTS)
    assert victim.read_text() == "here"
    # The same refusal as an exception that the code may handle: it goes on, without what it wanted.
    kept = f"try:\n    {code}\nexcept Exception:\n    refused = True"
    assert passes(f"def add(a, b): return a + b\n{kept}", TESTS + "\nassert refused") or "exec" in code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
def test_the_network_is_out_of_reach_below_python_too() -> None:
    listed = "lines = open('/proc/net/dev').read().splitlines()[2:]\nnames = [l.split(':')[0].strip() for l in lines]"
    try:
        import ctypes

        allowed = _may_unshare(ctypes.CDLL(None))
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("user namespaces are not allowed here")
    assert passes(listed, "assert names == ['lo'] or names == [], names")


def _may_unshare(libc: object) -> bool:
    """Whether this machine lets a process leave the network; tried in a child."""
    import os

    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(0x50000000) == 0 else 1)  # type: ignore[attr-defined]
    return os.waitpid(child, 0)[1] == 0


def test_many_threads_may_check_at_once() -> None:
    held: list[bool] = []
    threads = [threading.Thread(target=lambda: held.append(passes(GOOD, TESTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [True] * 4
