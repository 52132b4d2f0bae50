"""One function that students write, as the lists of this folder have it (a1.py ... a4.py)."""
from typing import NamedTuple


class Blank(NamedTuple):
    """One function to write."""
    id: str                   # "A2.1"
    file: str                 # "maetok.py"
    name: str                 # qualified: "random_mask", "Encoder.forward"
    source: str               # where the paper has it: "Sec. 3.2"
    points: int
    checks: str               # what the tests check, a line for the handout's table
    tests: tuple              # pytest node ids, in the student's folder too; all cases of a parametrised test
    hidden: tuple             # node ids in course/hidden/
    hint: str
    wrong: tuple
    needs: tuple = ()

    @property
    def message(self):
        """What the blank's NotImplementedError says."""
        return f"{self.id} {self.name}: {self.source}"


def at(file, *names):
    """Node ids of tests in a file."""
    return tuple(f"{file}::{name}" for name in names)
