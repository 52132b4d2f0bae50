"""The assignments: what is blank, what it is worth, which tests grade it, one hint, and what students get
wrong. The lists are in bank/.

A blank has points if *all* of its tests pass, and 0 otherwise: blanks are small. `tests` are in the
repository's tests/ and in the student's folder; `hidden` ones, in hidden/, run on data of the grader's
seed. `needs` names the blanks that the tests call besides this one; they come earlier in the list. When a
blank is graded, these come from the solution and all others are empty, so that a mistake counts once. `wrong`
are answers that a student might give: (what is wrong, old text, new text, ...), edits of the solution's body,
each of which must apply exactly once. The tests must reject every one (tests/test_course.py).
"""
from course.bank import a1, a2, a3, a4
from course.bank.blank import Blank

TITLES = {"A1": "Images to tokens", "A2": "The masked autoencoder", "A3": "Flows", "A4": "Measuring",
          "A5": "An experiment"}

ASSIGNMENTS = {"A1": a1.BLANKS, "A2": a2.BLANKS, "A3": a3.BLANKS, "A4": a4.BLANKS, "A5": ()}

# A5 has no blanks. What a program can tell of it is whether the report and the runs are there;
# (id, points, what).
A5_CHECKS = (
    ("A5.1", 4, "`report.md` or `report.pdf` is there; report.md has 100 to 1,200 words, two pages"),
    ("A5.2", 6, "`config.json` of two runs at least, of equal options, that differ in the seed"),
)


def blank_of(id: str) -> Blank:
    """The blank with this id, "A2.1"."""
    return next(b for b in ASSIGNMENTS[id.split(".")[0]] if b.id == id)
