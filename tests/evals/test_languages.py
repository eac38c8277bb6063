"""MultiPL-E: hand-made solutions of ten tasks in each language pass, wrong ones fail with their class, and what is
missing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.evals.datasets import fetch
from llama.evals.languages import LANGUAGES, Foreign, MultiPLE, missing_tools
from llama.evals.sandbox import has_bubblewrap

EVALDATA = Path(__file__).parents[3] / "shared" / "evaldata"
pytestmark = [
    pytest.mark.skipif(not EVALDATA.is_dir(), reason=f"{EVALDATA} is missing: the published files of tasks"),
    pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap is missing: apt-get install bubblewrap"),
]
NAMES = "23_strlen 53_add 60_sum_to_n 97_multiply 150_x_or_y 13_greatest_common_divisor 49_modp 15_string_sequence"
TASKS = [*NAMES.split(), "52_below_threshold", "55_fib"]
END = {"js": "\n}\n", "php": "\n}\n"}
"""Where the tests don't begin with the brace that closes the function."""
PRIME = {
    "cpp": "if (n < 2) return y; for (long i = 2; i * i <= n; i++) if (n % i == 0) return y; return x;",
    "js": "if (n < 2) return y; for (let i = 2; i * i <= n; i++) if (n % i == 0) return y; return x;",
    "php": "if ($n < 2) return $y; for ($i = 2; $i * $i <= $n; $i++) if ($n % $i == 0) return $y; return $x;",
    "sh": "local i\n(($1 < 2)) && { echo $3; return; }\n"
    "for ((i = 2; i * i <= $1; i++)); do (($1 % i)) || { echo $3; return; }; done\necho $2",
}
SOLUTIONS: dict[str, list[str]] = {
    "cpp": [
        "return string.length();", "return x + y;", "return n * (n + 1) / 2;", "return abs(a % 10) * abs(b % 10);",
        PRIME["cpp"], "while (b) { long t = a % b; a = b; b = t; } return a;",
        "long r = 1 % p; for (long i = 0; i < n; i++) r = r * 2 % p; return r;",
        'std::string s = "0"; for (long i = 1; i <= n; i++) s += " " + std::to_string(i); return s;',
        "for (long v : l) if (v >= t) return false; return true;",
        "long a = 0, b = 1; for (long i = 0; i < n; i++) { long t = a + b; a = b; b = t; } return a;",
    ],
    "java": [
        "return string.length();", "return x + y;", "return n * (n + 1) / 2;",
        "return Math.abs(a % 10) * Math.abs(b % 10);", PRIME["cpp"],
        "while (b != 0) { long t = a % b; a = b; b = t; } return a;",
        "long r = 1 % p; for (long i = 0; i < n; i++) r = r * 2 % p; return r;",
        'String s = "0"; for (long i = 1; i <= n; i++) s += " " + i; return s;',
        "for (long v : l) if (v >= t) return false; return true;",
        "long a = 0, b = 1; for (long i = 0; i < n; i++) { long t = a + b; a = b; b = t; } return a;",
    ],
    "js": [
        "return string.length;", "return x + y;", "return n * (n + 1) / 2;",
        "return Math.abs(a % 10) * Math.abs(b % 10);",
        PRIME["js"], "while (b) [a, b] = [b, a % b]; return a;",
        "let r = 1 % p; for (let i = 0; i < n; i++) r = r * 2 % p; return r;",
        "return [...Array(n + 1).keys()].join(' ');", "return l.every(v => v < t);",
        "let a = 0, b = 1; for (let i = 0; i < n; i++) [a, b] = [b, a + b]; return a;",
    ],
    "php": [
        "return strlen($string);", "return $x + $y;", "return intdiv($n * ($n + 1), 2);",
        "return abs($a % 10) * abs($b % 10);", PRIME["php"],
        "while ($b) { $t = $a % $b; $a = $b; $b = $t; } return $a;",
        "$r = 1 % $p; for ($i = 0; $i < $n; $i++) $r = $r * 2 % $p; return $r;", "return implode(' ', range(0, $n));",
        "foreach ($l as $v) if ($v >= $t) return false; return true;",
        "$a = 0; $b = 1; for ($i = 0; $i < $n; $i++) { $t = $a + $b; $a = $b; $b = $t; } return $a;",
    ],
    "sh": [
        "echo ${#1}", "echo $(($1 + $2))", "echo $(($1 * ($1 + 1) / 2))",
        "local a=${1#-} b=${2#-}\necho $(((a % 10) * (b % 10)))", PRIME["sh"],
        "local a=$1 b=$2 t\nwhile ((b)); do t=$((a % b)); a=$b; b=$t; done\necho $a",
        "local r=$((1 % $2)) i\nfor ((i = 0; i < $1; i++)); do r=$((r * 2 % $2)); done\necho $r",
        'local s=0 i\nfor ((i = 1; i <= $1; i++)); do s="$s $i"; done\necho "$s"',
        "local v\nfor v in $1; do ((v < $2)) || { echo false; return; }; done\necho true",
        "local a=0 b=1 t i\nfor ((i = 0; i < $1; i++)); do t=$((a + b)); a=$b; b=$t; done\necho $a",
    ],
}  # fmt: skip
QUICK = [word if word == "sh" else pytest.param(word, marks=pytest.mark.slow) for word in SOLUTIONS]
ENDLESS = {"sh": "while true; do :; done", "cpp": "while (true);", "java": "while (n < 9999999) n = 0; return n;"}
LEAVES = {"js": "process.exit(0)", "php": "exit(0);", "cpp": "exit(0);", "java": "System.exit(0); return 0;"}
"""With code 0, before the end. (Bash runs a candidate in a shell of its own.)"""


def judge(word: str, seconds: float | None = None) -> Foreign:
    if missing := missing_tools(word):
        pytest.skip(f"{missing[0]} is not installed")
    return Foreign(word, [fetch(needed, EVALDATA) for needed in LANGUAGES[word].needs], seconds=seconds)


def programs(word: str, bodies: list[str], names: list[str]) -> list[str]:
    tasks = {task.id: task for task in MultiPLE[word].read(EVALDATA)[0]}
    chosen = [tasks[f"HumanEval_{name}"] for name in names]
    pairs = zip(chosen, bodies, strict=True)
    return [MultiPLE[word].program(task, body + END.get(word, "")) for task, body in pairs]


@pytest.mark.parametrize("word", QUICK)
def test_right_ones_pass_and_wrong_ones_do_not(word: str) -> None:
    with judge(word, 60) as own:
        found = sorted(own.all(programs(word, SOLUTIONS[word], TASKS)), key=lambda pair: pair[0])
        right = [verdict for _, verdict in found]
        unfair = word == "php"  # which has a strlen already: nobody passes this task of MultiPL-E's
        assert [verdict for verdict in right[unfair:] if not verdict.passed] == []
        turned = [*SOLUTIONS[word][1:], SOLUTIONS[word][0]]  # another task's
        assert not any(verdict.passed for _, verdict in own.all(programs(word, turned, TASKS)))


@pytest.mark.parametrize("word", QUICK)
def test_each_mistake_has_its_class(word: str) -> None:
    endless = ENDLESS.get(word, "while (true);")
    bad = ["", "((", LEAVES.get(word, "exit 0"), endless]
    with judge(word, {"sh": 1.5, "js": 4, "php": 4}.get(word, 15)) as own:
        found = [own.one(program) for program in programs(word, bad, ["60_sum_to_n"] * len(bad))]
    assert not any(verdict.passed for verdict in found)
    assert found[1].error == ("compile" if word in ("cpp", "java") else "failed")
    assert found[2].error == ("exit" if word in LEAVES else "failed")
    assert found[3].error == "timeout"


def test_attacks_get_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    attacks = [
        f"cat {secret} && exit 0", "cat /etc/passwd", f"echo x > {tmp_path}/new", "echo x > /usr/of-a-test",
        "echo x > /dev/tcp/127.0.0.1/22", "kill -9 $PPID; kill -9 -1", "setsid sleep 4321 & sleep 4321 & exit 0",
        "while true; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done", "read line", "exec 1>&- 2>&-",
    ]  # fmt: skip
    with judge("sh", 2) as own:
        assert not any(verdict.passed for _, verdict in own.all(programs("sh", attacks, ["53_add"] * len(attacks))))
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert "sleep\x004321" not in "".join(
        path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    )


def test_a_missing_toolchain_is_not_a_failure_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="multiple:cs is not measured, since csc is not installed"):
        Foreign("cs")
