"""course/: mutants of the solutions, right answers that are written differently, and seeds.

Here a sample, and one seed. All of it: python course/mutants.py A1 A2 A3 A4; python course/check.py --right;
python course/check.py --seeds 200.
"""
import ast
import textwrap

import pytest
from conftest import ROOT

from common import UserError
from course import assignments, blanks, check, grade, make, mutants
from course.right import a1, a2, a3, a4

NAMES = [name for name, listed in assignments.ASSIGNMENTS.items() if listed]
BLANKS = [b for name in NAMES for b in assignments.ASSIGNMENTS[name]]


# ----------------------------------------------- right answers ----------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_right_answers_are_accepted(name):
    """One of five, at one seed; `make course` tries all at ten."""
    complaints, count = check.right(name, seeds=(3,), every=5)
    assert not complaints, "\n".join(complaints)
    assert count >= 4 and len(check.right_answers(name)) >= 20


def test_every_blank_has_a_right_answer_that_is_not_the_solutions_text():
    answers = [answer for bank in (a1, a2, a3, a4) for answer in bank.RIGHT]
    assert len(answers) >= 40 and {id for id, _, _ in answers} == {b.id for b in BLANKS}
    written = lambda text: ast.unparse(ast.parse(textwrap.dedent(text)))
    solved = {b.id: written(blanks.body((ROOT / b.file).read_text(), b.name)) for b in BLANKS}
    texts = [(id, written(text)) for id, _, text in answers]
    assert len(set(texts)) == len(texts) and not set(texts) & set(solved.items())


@pytest.mark.slow
def test_a_wrong_answer_among_the_right_ones_is_told(monkeypatch):
    """At each seed; and a body that calls what it must not is met by an empty function."""
    monkeypatch.setattr(a1, "RIGHT", (
        ("A1.2", "the other way round", """
            a, b = x.float().chunk(2, dim=-1)
            return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
        """),
        ("A1.5", "another blank's work", """
            sobel(torch.zeros(1, 3, 8, 8))
        """)))
    complaints, count = check.right("A1", seeds=(0, 1))
    assert count == 2
    assert any(line.startswith("A1.2, right: the other way round: course/hidden/a1.py::test_rotate fails at "
                               "2 of 2 seeds (0, 1): ") for line in complaints), complaints
    assert any("A1.5, right: another blank's work" in line and "NotImplementedError: A1.4" in line
               for line in complaints), complaints


# -------------------------------------------------- seeds ---------------------------------------------------

PLANTED = """
import pytest
from course.hidden import given

def test_tenth():
    assert given.SEED % 10 != 3

def test_sound():
    pass

def test_skipped():
    pytest.skip("always")

def test_endless():
    while True:
        pass
"""


@pytest.fixture
def planted(monkeypatch):
    """A1 with one blank, whose hidden tests are PLANTED's."""
    copy = make.copy_files

    def with_planted(patterns, folder):
        copy(patterns, folder)
        (folder / "course/hidden/planted.py").write_text(PLANTED)

    monkeypatch.setattr(make, "copy_files", with_planted)
    at = lambda *names: tuple(f"course/hidden/planted.py::test_{name}" for name in names)
    blank = assignments.blank_of("A1.5")._replace(hidden=at("tenth", "sound", "skipped"))
    monkeypatch.setitem(assignments.ASSIGNMENTS, "A1", (blank,))
    return at


@pytest.mark.slow
def test_a_hidden_test_that_fails_at_some_seeds_is_found(planted, capsys):
    with pytest.raises(UserError, match="has 2 faults"):
        check.main(["A1", "--seeds", "20"])
    shown, (tenth, skipped) = capsys.readouterr().out, planted("tenth", "skipped")
    assert f"\nA1, the solution: {tenth} fails at 2 of 20 seeds (3, 13): " in shown
    assert f"\nA1, the solution: {skipped} did not run\n" in shown and "sound" not in shown


@pytest.mark.slow
def test_what_never_ends_is_ended(planted):
    rounds = [dict(name=str(i), put={}, tests=planted(test), first=True, limit=1)
              for i, test in enumerate(("endless", "sound"))]
    entries, trouble = check.run(rounds)
    first, second = [e for e in entries if "round" in e]
    assert trouble is None and "run for too long" in first["reason"] and second["outcome"] == "passed"


def test_a_seed_holds_if_nothing_is_complained_of(monkeypatch):
    asked = []
    monkeypatch.setattr(check, "bank", lambda name, seed: asked.append((name, seed)) or ([], {}, (0, 0, 0)))
    monkeypatch.setattr(check, "right", lambda name, seeds: (["A2.9, right: no"] if seeds == [4] else [], 1))
    check.seed_holds("A2", 3)
    check.seed_holds("A5", 3)                                      # has no blanks
    assert asked == [("A2", 3)]
    with pytest.raises(UserError, match="at seed 4 the tests of A2(?s:.*)A2.9, right"):
        check.seed_holds("A2", 4)


# ------------------------------------------------- mutants --------------------------------------------------

@pytest.fixture(scope="module")
def every_mutant():
    return [m for b in BLANKS for m in mutants.mutants(b)]


def test_mutants_of_a_small_function():
    body = """
        if not n < 2:
            x.mul_(0.5)                       # a comment
        return F.pad(x.float(), (-n, 0), value=True), max(n, 1)
    """
    found = {(line, what): text for line, what, text in mutants.changed_bodies(body, ["x"])}
    assert list(found) == [
        (0, "x detached"),
        (2, "condition True"), (2, "condition False"), (2, "not dropped"), (2, "< to <="), (2, "< to >"),
        (2, "2 to 3"), (2, "2 to 1"),
        (3, "statement dropped"), (3, ".mul_() dropped"), (3, "0.5 to 1.0"),
        (4, "results 0 and 1 swapped"), (4, "result 0 detached"), (4, "result 1 detached"),
        (4, "value= dropped"), (4, "last arguments of pad swapped"), (4, ".float() dropped"),
        (4, "- dropped"), (4, "0 to 1"), (4, "0 to -1"), (4, "True to False"),
        (4, "max() dropped for argument 0"), (4, "max() dropped for argument 1"),
        (4, "argument n of max detached"), (4, "1 to 2"), (4, "1 to 0")]
    same = textwrap.dedent("""\
        if not n < 2:
            x.mul_(0.5)
        return (F.pad(x.float(), (-n, 0), value=True), max(n, 1))""")
    for key, old, new in (((2, "< to <="), "<", "<="), ((2, "not dropped"), "not ", ""),
                          ((3, "statement dropped"), "x.mul_(0.5)", "pass"),
                          ((4, ".float() dropped"), ".float()", ""), ((4, "0 to -1"), ", 0)", ", -1)"),
                          ((4, "value= dropped"), ", value=True", "")):
        assert found[key] == same.replace(old, new), key
    assert found[0, "x detached"] == "x = x.detach()\n" + same


def test_mutants_of_operators_and_axes():
    found = [what for _, what, _ in mutants.changed_bodies("return (a + b) // c ** 2 == x.sum(1) or a is b")]
    for what in ("or to and", "== to !=", "is to is not", "// to %", "// to /", "+ to -", "** to *",
                 "sum to mean", "1 to 2", "1 to 0", "result detached"):
        assert found.count(what) == 1, what


def test_mutants_are_many_named_once_and_compile(every_mutant):
    assert len(every_mutant) == len({m.name for m in every_mutant}) >= 1000
    for b in BLANKS:
        assert sum(m.blank is b for m in every_mutant) >= 5, b.id
    for m in every_mutant[::50]:                                     # each compiles its whole file
        place, = m.put
        assert m.put[place] != grade.solution(m.blank)[place], m.name
        assert m.before or " line 0: " in m.name
        assert m.after
    assert mutants.mutants(BLANKS[0]) == [m for m in every_mutant if m.blank is BLANKS[0]]


def test_reasons_are_for_mutants_that_exist(every_mutant):
    for key, reason in mutants.EQUIVALENT.items():
        assert reason and any(mutants.matches(key, m.name) for m in every_mutant), key


def test_survivors_need_a_reason_and_reasons_a_survivor(monkeypatch, capsys):
    b = assignments.blank_of("A1.1")
    made = lambda name: mutants.Mutant(name, b, "", "old", "new")
    listed = [made(f"A1.1 line {i}: {what}") for i, what in
              enumerate(("< to <=", "1 to 2", "x detached", "y detached", "1 to 0"))]
    verdict = {m.name: None for m in listed} | {"A1.1 line 3: y detached": "cannot run",
                                                "A1.1 line 4: 1 to 0": "a test"}
    monkeypatch.setattr(mutants, "EQUIVALENT", {"A1.1 line 0: < to <=": "", "A1.1 ... detached": "",
                                                "A2.1 line 9: 1 to 2": ""})
    assert mutants.report("A1", listed, verdict) == 1
    shown = capsys.readouterr().out
    assert "A1.1 line 1: 1 to 2\n    - old\n    + new" in shown and "EQUIVALENT" not in shown
    assert "4 mutants, 1 rejected, 2 known to be equivalent, 1 left" in shown
    monkeypatch.setattr(mutants, "EQUIVALENT", {"A1.1 ... 1 to": "one of them is rejected",
                                                "A1.1 line 7: no": ""})
    assert mutants.report("A1", listed, verdict) == 2 + 2
    assert capsys.readouterr().out.count("EQUIVALENT names a mutant that is rejected, or none: ") == 2


@pytest.mark.slow
def test_a_blanks_mutants_are_run_and_told_apart(monkeypatch, capsys):
    """A3.13, x (1 + scale) + shift: its own mutants, one that changes nothing, one that cannot run."""
    b = assignments.blank_of("A3.13")
    body, of = "    return x * (1 + scale) + shift", mutants.mutants
    more = [mutants.Mutant("A3.13 line 1: same", b, body, "old", "new"),
            mutants.Mutant("A3.13 line 1: 1 detached", b, body.replace("1 +", "(1).detach() +"), "", "")]
    monkeypatch.setattr(mutants, "mutants", lambda blank: [*of(blank), *more])
    count = len(of(b)) + 1
    with pytest.raises(UserError, match="1 faults"):
        mutants.main(["A3", "--blank", "A3.13"])
    assert capsys.readouterr().out.startswith(
        "A3.13 line 1: same\n    - old\n    + new\n"
        f"A3: {count} mutants, {count - 1} rejected, 0 known to be equivalent, 1 left; ")
    with pytest.raises(UserError, match="A3 has no blank A2.1"):
        mutants.main(["A3", "--blank", "A2.1"])
